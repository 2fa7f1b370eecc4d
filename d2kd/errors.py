"""The one exception that d2kd raises for what a user can fix."""

import difflib
from typing import Iterable


class UserError(ValueError):
    """A mistake in a config, a file or a command line.

    The message is one line that names the key or file, what was found, what was expected and
    what to do. ``train_net.py`` prints it without a traceback (``--debug`` shows the traceback).
    """


def nearest(name: str, known: Iterable[str]) -> str:
    """Ending of a message about an unknown name: the nearest known one, or all of them.

    Args:
        name: what the user wrote.
        known: the names that exist.

    Returns:
        for instance ``did you mean 'FRS'?`` or ``known: CrossKD, FRS``.
    """
    known = sorted(known)
    by_lower = {k.lower(): k for k in known}
    close = difflib.get_close_matches(name.lower(), by_lower, n=1, cutoff=0.6)
    return f"did you mean '{by_lower[close[0]]}'?" if close else f"known: {', '.join(known)}"
