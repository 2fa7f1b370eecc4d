"""A page that is made from the code, and stays as the code says."""

import argparse
import sys
from pathlib import Path
from typing import Callable

ROOT = Path(__file__).resolve().parents[1]


def write_or_check(page: Path, make: Callable[[], str]) -> None:
    """What such a tool does as a command: it writes its page; with ``--check``, it ends with a line
    if the page is not up to date.

    Args:
        page: that is made.
        make: returns its text.
    """
    name = page.relative_to(ROOT)
    parser = argparse.ArgumentParser(description=f"Writes {name} from the code.")
    parser.add_argument("--check", action="store_true", help="only tell whether it is up to date")
    args = parser.parse_args()
    text = make()
    if not args.check:
        page.write_text(text)
    elif not page.exists() or page.read_text() != text:
        sys.exit(f"{name} is not up to date: run python tools/{Path(sys.argv[0]).name}")
