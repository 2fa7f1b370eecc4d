"""Config keys with what their values may be: one declaration, one check, one kind of message."""

import math
import re
from dataclasses import dataclass
from typing import (
    Any,
    Dict,
    Iterator,
    List,
    Mapping,
    MutableMapping,
    Optional,
    Sequence,
    Tuple,
    Union,
)

import yaml
from detectron2.config import CfgNode

from d2kd.errors import UserError, nearest

_WHOLE = re.compile("[+-]?[0-9]+")
# A zero byte, and what Python makes of bytes that are no UTF-8
_NOT_UTF8 = re.compile("[\0\ud800-\udfff]")


@dataclass(frozen=True)
class Key:
    """A config key.

    Attributes:
        default: its value unless a config gives another; of a list, every number counts.
        help: what it means, and where the default comes from.
        low, high: bounds of a number, or of every number of a list, both included.
        above, below: bounds of a number, not included.
        choices: the values that it may have.
        length: numbers in a list, or several that may be; None = any.
        item: type of a list's entries, where the default is empty.
    """

    default: Any
    help: str = ""
    low: float = -math.inf
    high: float = math.inf
    above: Optional[float] = None
    below: Optional[float] = None
    choices: Optional[Tuple] = None
    length: Union[int, Tuple[int, ...], None] = None
    item: Optional[type] = None

    def problem(self, value: Any) -> Optional[str]:
        """What is wrong with a value and what would be right, or None."""
        if isinstance(self.default, (list, tuple)):
            return self._problem_of_list(value)
        return self._problem_of_one(value, type(self.default))

    def _problem_of_list(self, value: Any) -> Optional[str]:
        if not isinstance(value, (list, tuple)):
            return "give a list"
        lengths = (self.length,) if isinstance(self.length, int) else self.length
        if lengths is not None and len(value) not in lengths:
            return f"give {' or '.join(map(str, lengths))} values"
        kind = self.item or type(self.default[0])
        problems = (self._problem_of_one(x, kind) for x in value)
        return next((f"{p}, each" for p in problems if p), None)

    def _problem_of_one(self, value: Any, kind: type) -> Optional[str]:
        if kind is float and _is(value, int):
            value = float(value)
        if not _is(value, kind):
            return f"give {TYPES.get(kind, kind.__name__)}"
        if self.choices is not None and value not in self.choices:
            named = [choice for choice in self.choices if choice != ""]
            return nearest(value, named) if kind is str else f"give one of {named}"
        if kind in (int, float):
            return self._problem_of_number(value)
        return None

    def _problem_of_number(self, value: float) -> Optional[str]:
        if not math.isfinite(value):
            return "give a finite number"
        if self.above is not None and value <= self.above:
            return f"give a number above {self.above:g}"
        if self.below is not None and value >= self.below:
            return f"give a number below {self.below:g}"
        return None if self.low <= value <= self.high else f"give {self._range()}"

    def _range(self) -> str:
        """What ``low`` and ``high`` leave; "" if they leave all."""
        if math.isinf(self.high):
            return "" if math.isinf(self.low) else f"{self.low:g} or more"
        if math.isinf(self.low):
            return f"{self.high:g} or less"
        return f"{self.low:g} ... {self.high:g}"

    def bounds(self) -> str:
        """What a number may be, such as "0 or more, below 1"; "" if any is allowed."""
        above = f"above {self.above:g}" if self.above is not None else ""
        below = f"below {self.below:g}" if self.below is not None else ""
        return ", ".join(filter(None, (above, self._range(), below)))


Keys = Mapping[str, Union[Key, Mapping]]

TYPES = {int: "a whole number", float: "a number", bool: "True or False", str: "a name"}


def _is(value: Any, kind: type) -> bool:
    """Whether a value is of a type; True and False are no numbers."""
    return kind is object or (
        isinstance(value, kind) and (kind is bool or not isinstance(value, bool))
    )


def check_declaration(keys: Keys, what: str) -> None:
    """
    Args:
        keys: as somebody wrote them.
        what: where they stand in the code.

    Raises:
        TypeError: if one is neither a key nor a mapping of keys.
        ValueError: if a name is not in capitals.
    """
    for name, key in keys.items():
        if not isinstance(name, str) or name != name.upper():
            raise ValueError(f"{what} names {name!r}: config keys are in capitals")
        if isinstance(key, Mapping):
            check_declaration(key, f"{what}[{name!r}]")
        elif not isinstance(key, Key):
            raise TypeError(
                f"{what}[{name!r}] is {key!r}: give a Key, or a mapping of Keys as term(...) makes"
            )


def config_node(keys: Keys) -> CfgNode:
    """A config node with the defaults of keys; a mapping within makes a node within."""
    node = CfgNode()
    for name, key in keys.items():
        if isinstance(key, Key):
            node[name] = list(key.default) if isinstance(key.default, list) else key.default
        else:
            node[name] = config_node(key)
    return node


def walk(keys: Keys, prefix: str) -> Iterator[Tuple[str, Key]]:
    """Every key with its full name."""
    for name, key in keys.items():
        if isinstance(key, Key):
            yield f"{prefix}.{name}", key
        else:
            yield from walk(key, f"{prefix}.{name}")


def leaves(node: Mapping[str, Any], prefix: str = "") -> Iterator[Tuple[str, Any]]:
    """Every value below a node of nested mappings, with its full name."""
    for name, value in node.items():
        if isinstance(value, Mapping):
            yield from leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def get_value(node: CfgNode, key: str) -> Any:
    """The value of a key below a node, such as ``"CLS.WEIGHT"``."""
    value: Any = node
    for part in key.split("."):
        value = value[part]
    return value


def set_value(node: MutableMapping[str, Any], key: str, value: Any) -> None:
    """Sets the value of a key below a node, and makes the nodes between that are missing."""
    *parents, name = key.split(".")
    for part in parents:
        node = node.setdefault(part, {})
    node[name] = value


def plain_values(node: CfgNode) -> Dict[str, Any]:
    """A node as it comes back from a YAML: nested dicts, and lists for tuples."""
    return yaml.safe_load(node.dump())


def changed(after: CfgNode, before: CfgNode) -> CfgNode:
    """The values of one node that another lacks or has otherwise."""
    found = CfgNode()
    for name, value in after.items():
        if isinstance(value, CfgNode):
            value = changed(value, before.get(name, CfgNode()))
            if value:
                found[name] = value
        elif value != before.get(name):
            found[name] = value
    return found


def check_node(node: CfgNode, keys: Keys, prefix: str) -> None:
    """
    Args:
        node: made by :func:`config_node` and then changed.
        keys: what made it.
        prefix: the node's place in the config, for messages.

    Raises:
        UserError: naming every value that is not what its key may be.
    """
    wrong: List[str] = []
    for name, key in walk(keys, prefix):
        value = get_value(node, name[len(prefix) + 1 :])
        problem = key.problem(value)
        if problem:
            wrong.append(f"{name} is {value!r}: {problem}")
    if wrong:
        raise UserError("; ".join(wrong))


def typed_opts(cfg: CfgNode, opts: Sequence) -> List:
    """
    Args:
        cfg: that they are for.
        opts: KEY VALUE ...

    Returns:
        the same with whole numbers as floats where the config has floats.

    Raises:
        UserError: for the key of a node, all of whose values would be lost.
    """
    typed = list(opts)
    for i, key in enumerate(opts[::2]):
        try:
            known = get_value(cfg, key)
        except (KeyError, TypeError):  # no key at all, which yacs says
            continue
        if isinstance(known, CfgNode):
            raise UserError(f"{key} holds keys, not a value: give one of them, {key}.{min(known)}")
        if isinstance(known, float) and _WHOLE.fullmatch(str(opts[2 * i + 1])):
            typed[2 * i + 1] = float(opts[2 * i + 1])
    return typed


def whole_numbers_as_floats(cfg: CfgNode, values: CfgNode) -> None:
    """Makes 0 and 1 of a file 0.0 and 1.0 where the config has such a number, since a config takes
    no value of another type.

    Args:
        cfg: that the values are for.
        values: of a file; changed in place.
    """
    for name, value in values.items():
        if isinstance(value, CfgNode) and isinstance(cfg.get(name), CfgNode):
            whole_numbers_as_floats(cfg[name], value)
        elif isinstance(cfg.get(name), float) and type(value) is int:
            values[name] = float(value)


def check_values(cfg: CfgNode, defaults: CfgNode, prefix: str = "") -> None:
    """
    Args:
        cfg: any config.
        defaults: the same with the values that it started from.
        prefix: its place in a larger config, with a dot at the end.

    Raises:
        UserError: for a value that is missing (None) where the default is not, that is NaN,
            infinite or of more than 64 bits, or a text that no file can have.
    """
    for name, value in cfg.items():
        default = defaults.get(name)
        if isinstance(value, CfgNode):
            check_values(
                value, default if isinstance(default, CfgNode) else value, f"{prefix}{name}."
            )
        elif value is None and default is not None:
            raise UserError(f"{prefix}{name} has no value: the default is {default!r}")
        elif value != default:
            problem = next(filter(None, map(_problem_of_scalar, _scalars(value))), None)
            if problem:
                raise UserError(f"{prefix}{name} is {value!r:.60}: {problem}")


def _scalars(value: Any) -> Iterator[Any]:
    if isinstance(value, (list, tuple)):
        for entry in value:
            yield from _scalars(entry)
    else:
        yield value


def _problem_of_scalar(value: Any) -> Optional[str]:
    if isinstance(value, str) and _NOT_UTF8.search(value):
        return "give text in UTF-8, without a zero byte"
    if isinstance(value, int) and abs(value) >= 2**63:
        return "give a number below 2^63"
    if isinstance(value, float) and not math.isfinite(value):
        return "give finite numbers"
    return None
