"""The documentation as data: its pages, the blocks in them, and the commands in a block."""

import re
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import FrozenSet, Iterator, List, NamedTuple

ROOT = Path(__file__).parent.parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *ROOT.glob("datasets/*.md")])
NAMES = [str(page.relative_to(ROOT)) for page in PAGES]
# Of older versions, whose keys, files and commands are not those of today
TODAY = [name for name in NAMES if name != "CHANGELOG.md"]
SHELL = ("sh", "bash", "console")
_BLOCK = re.compile(
    r"(?:^<!-- needs: (?P<needs>[\w, ]+) -->\n)?^ *```(?P<language>\w*)\n(?P<text>.*?)^ *```$",
    re.DOTALL | re.MULTILINE,
)
# Every program is told to a file, and none is run: there is no path to look for one
_RECORD = 'command_not_found_handle() { { printf "%s\\037" "$@"; printf "\\036"; } >>"$RECORD"; }\n'


class Block(NamedTuple):
    """A fenced block. Before it may stand ``<!-- needs: COCO, GPU -->``."""

    page: str
    language: str
    text: str
    needs: FrozenSet[str]

    def __str__(self) -> str:
        return f"{self.page}: {self.text.splitlines()[0][:60]}" if self.text else self.page


def text(page: str) -> str:
    return (ROOT / page).read_text()


def blocks(page: str) -> Iterator[Block]:
    """All fenced blocks of a page, in order."""
    for match in _BLOCK.finditer(text(page)):
        needs = frozenset(re.findall(r"\w+", match["needs"] or ""))
        yield Block(page, match["language"], match["text"], needs)


def prose(page: str) -> str:
    """A page without its blocks."""
    return _BLOCK.sub("", text(page))


def commands(block: Block) -> List[List[str]]:
    """The words of every command in a block, as a shell reads them: loops are unrolled, variables
    and braces expanded, comments left out."""
    with tempfile.TemporaryDirectory() as folder:
        record = Path(folder) / "record"
        record.touch()
        shell = subprocess.run(
            [shutil.which("bash"), "-c", _RECORD + block.text],
            env={"PATH": "/nowhere", "RECORD": str(record)},
            cwd=folder,
            capture_output=True,
            text=True,
        )
        assert not shell.stderr, f"{block}\n{shell.stderr}"
        return [entry.split("\037")[:-1] for entry in record.read_text().split("\036")[:-1]]
