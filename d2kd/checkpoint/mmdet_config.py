"""What a file of MMDetection says of its training: the config in its ``meta``, read as text.

The config is a Python program. It is parsed, never run: assignments of literals and of
``dict(...)`` are read, everything else is unknown.
"""

import ast
import re
from typing import Any, Dict, Mapping, Optional, Tuple

from .files import Unreadable

_UNKNOWN = object()
_MAX_VALUES = 10_000  # of a variable; those of MMDetection's own configs have some hundreds


def read_config(meta: Optional[Mapping]) -> Dict[str, Any]:
    """
    Args:
        meta: of a file of MMDetection, 3.x (``cfg``) or 2.x (``config``).

    Returns:
        the top-level variables of the config as far as they are literals; none without a config.
        A variable that is assigned twice is merged, as MMDetection does with its base configs.
    """
    meta = meta if isinstance(meta, dict) else {}
    text = meta.get("cfg") or meta.get("config")
    if not isinstance(text, str):
        return {}
    # 2.0 wrote the files of a config one after the other, each under its path.
    text = re.sub(r"^.*\.py[^\S\n]*$", "", text, flags=re.MULTILINE)
    try:
        return _assignments(ast.parse(text))
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return {}


def node(config: Mapping, *keys: str) -> Dict[str, Any]:
    """A dict within dicts, empty where there is none."""
    for key in keys:
        config = config.get(key)
        if not isinstance(config, dict):
            return {}
    return config


def _assignments(tree: ast.Module) -> Dict[str, Any]:
    names: Dict[str, Any] = {}
    for statement in tree.body:
        if isinstance(statement, ast.Assign) and isinstance(statement.targets[0], ast.Name):
            name, value = statement.targets[0].id, _literal(statement.value, names)
            if value is not _UNKNOWN and _count(value, _MAX_VALUES) < _MAX_VALUES:
                names[name] = _merged(names.get(name), value)
    return names


def _count(value: Any, most: int) -> int:
    """How many values there are in a value, counted up to a number: few names can stand for
    lists of lists without end."""
    count = 1
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    for part in parts:
        if count >= most:
            break
        count += _count(part, most - count)
    return count


def _literal(tree: ast.AST, names: Mapping[str, Any]) -> Any:
    """The value of an expression, or ``_UNKNOWN``."""
    if isinstance(tree, ast.Constant):
        return tree.value
    if isinstance(tree, ast.Name):
        return names.get(tree.id, _UNKNOWN)
    if isinstance(tree, (ast.List, ast.Tuple)):
        values = [_literal(x, names) for x in tree.elts]
        return _UNKNOWN if _UNKNOWN in values else values
    if isinstance(tree, ast.UnaryOp) and isinstance(tree.op, ast.USub):
        value = _literal(tree.operand, names)
        return -value if isinstance(value, (int, float)) else _UNKNOWN
    if isinstance(tree, ast.Dict):
        keys = [None if k is None else _literal(k, names) for k in tree.keys]
        return _dict(zip(keys, tree.values), names)
    if isinstance(tree, ast.Call) and getattr(tree.func, "id", None) == "dict" and not tree.args:
        return _dict(((k.arg, k.value) for k in tree.keywords), names)
    return _UNKNOWN


def _dict(items, names: Mapping[str, Any]) -> Dict:
    """The known entries; a key of None stands for ``**``."""
    result = {}
    for key, tree in items:
        value = _literal(tree, names)
        if key is None and isinstance(value, dict):
            result.update(value)
        elif isinstance(key, str) and value is not _UNKNOWN:
            result[key] = value
    return result


def _merged(old: Any, new: Any) -> Any:
    if not isinstance(old, dict) or not isinstance(new, dict) or new.get("_delete_"):
        return new
    return {**old, **{k: _merged(old.get(k), v) for k, v in new.items()}}


def anchor_counts(meta: Optional[Mapping], num_anchors: int, head: str) -> Tuple[int, int]:
    """
    Args:
        meta: of the file.
        num_anchors: of a location.
        head: that has them, as the file's config calls it: "bbox_head" or "rpn_head".

    Returns:
        how many aspect ratios and how many scales these are, by the file's config. Without one,
        the square root of 9 or what else is unambiguous.

    Raises:
        Unreadable: if the config is absent and several products are possible.
    """
    ratios = node(read_config(meta), "model", head, "anchor_generator").get("ratios")
    if isinstance(ratios, list) and ratios and num_anchors % len(ratios) == 0:
        return len(ratios), num_anchors // len(ratios)
    if num_anchors == 9:
        return 3, 3
    if all(num_anchors % i for i in range(2, num_anchors)):  # one ratio or one scale: no order
        return num_anchors, 1
    raise Unreadable(
        f"holds a detector of {num_anchors} anchors per location, and does not tell how many "
        "ratios and scales these are: keep the 'meta' of the file from training"
    )
