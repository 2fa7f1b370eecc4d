"""What yacs says of a config that it cannot take, in a line for people."""

import contextlib
import re
from typing import Iterator

from detectron2.config import CfgNode

from .errors import UserError, nearest
from .schema import TYPES


@contextlib.contextmanager
def yacs_errors_explained(cfg: CfgNode, source: str) -> Iterator[None]:
    """Turns what yacs says of a source that is merged into a :class:`UserError`."""
    try:
        yield
    except UserError:
        raise
    except (KeyError, AssertionError) as e:
        raise UserError(f"{source}: {_wrong_key(cfg, str(e))}") from e
    except (RecursionError, MemoryError) as e:  # of Python's own parser
        raise UserError(f"{source}: a value is nested too deeply") from e
    except (ValueError, TypeError, AttributeError, ArithmeticError, OSError) as e:
        raise UserError(f"{source}: {_wrong_type(str(e))}") from e


def _wrong_type(message: str) -> str:
    """What yacs says of a value of another type than its key has."""
    kinds = r"\(<class '(?:\w+\.)*(\w+)'> vs\. <class '(?:\w+\.)*(\w+)'>\)"
    values = r"with values \(.* vs\. (.*)\) for .* (\S+)$"
    match = re.search(rf"Type mismatch {kinds} {values}", message, re.DOTALL)
    if not match:
        return " ".join(message.split())
    wanted, _, value, key = match.groups()
    wanted = {"tuple": "list", "CfgNode": "node of keys"}.get(wanted, wanted)
    example = f', such as "[{value}]"' if wanted == "list" else ""
    kind = next((words for kind, words in TYPES.items() if kind.__name__ == wanted), f"a {wanted}")
    return f"{key} is '{value:.60}': give {kind}{example}"


def _wrong_key(cfg: CfgNode, message: str) -> str:
    renamed = re.search(
        r"Key (\S+) was renamed to (\S+?);.*?(?:Note: (.*?))?['\"]?$", message, re.S
    )
    if renamed:
        also = f" ({' '.join(renamed[3].split())})" if renamed[3] else ""
        return f"{renamed[1]} is now called {renamed[2]}{also}"
    unknown = re.search(r"Non-existent (?:config )?key: ([\w.]+)", message)
    if unknown:
        return f"no config key {unknown[1]}: {nearest(unknown[1], _keys(cfg))}"
    return " ".join(message.split())


def _keys(node: CfgNode, prefix: str = "") -> Iterator[str]:
    for key, value in node.items():
        yield prefix + key
        if isinstance(value, CfgNode):
            yield from _keys(value, f"{prefix}{key}.")
