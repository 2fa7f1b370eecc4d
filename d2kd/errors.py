"""The one exception that d2kd raises for what a user can fix, and what goes into its message."""

import contextlib
import difflib
import os
import re
import traceback
from typing import Iterable, Iterator, Sequence

_PACKAGE = os.path.dirname(os.path.abspath(__file__)) + os.sep


class UserError(ValueError):
    """A mistake in a config, a file or a command line.

    The message is one line that names the key or file, what was found, what was expected and
    what to do. ``d2kd`` prints it without a traceback (``--debug`` shows the traceback).
    """


# Names that a message lists at most
MAX_NAMES = 20


def nearest(name: str, known: Iterable[str]) -> str:
    """Ending of a message about an unknown name: the nearest known one, or all of them. Where
    others stand in the same node of a config, these alone.

    Args:
        name: what the user wrote.
        known: the names that exist.

    Returns:
        for instance ``did you mean 'FRS'?`` or ``known: CrossKD, FRS``.
    """
    known = sorted(known)
    node = name[: name.rfind(".") + 1]
    beside = [k for k in known if node and k[: k.rfind(".") + 1] == node]
    if beside:
        known = beside
    start = len(node) if beside else 0
    by_lower = {k[start:].lower(): k for k in known}
    close = difflib.get_close_matches(name[start:].lower(), by_lower, n=1, cutoff=0.6)
    if close:
        return f"did you mean '{by_lower[close[0]]}'?"
    return f"known: {first_of(known, MAX_NAMES)}"


def first_of(names: Sequence[str], number: int) -> str:
    """The first of many names, and how many more there are."""
    more = f" and {len(names) - number} more" if len(names) > number else ""
    return ", ".join(names[:number]) + more


def reason(error: BaseException) -> str:
    """What somebody else's exception says, in one line for people."""
    # What one of Detectron2's registries says of a name in a config that it does not know
    unknown = re.search(r"No object named '(.+)' found in '(.+)' registry", str(error))
    if unknown:
        return f"the config names '{unknown[1]}', unknown in the {unknown[2]} registry"
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0].strip()}" if lines else type(error).__name__


@contextlib.contextmanager
def building(what: str) -> Iterator[None]:
    """Turns whatever is raised while something that a config describes is built into a
    :class:`UserError`. What d2kd's own code raises is its fault, and stays as it is.

    Args:
        what: for instance "the optimizer that SOLVER describes".
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        raised_in = traceback.extract_tb(error.__traceback__)[-1].filename
        if os.path.abspath(raised_in).startswith(_PACKAGE):
            raise
        raise UserError(f"{what} cannot be built: {reason(error)} (--debug shows where)") from error
