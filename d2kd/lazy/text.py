"""Python configs as text: YAML that Detectron2's LazyConfig reads, and a file that it opens."""

import contextlib
import types
from typing import Any, Dict, Optional

import cloudpickle
import yaml
from detectron2.utils.registry import locate
from omegaconf import DictConfig, OmegaConf, SCMode

from d2kd.errors import UserError, reason


class _Dumper(yaml.Dumper):
    """YAML that LazyConfig reads, functions without a name included."""


def _represent_callable(dumper: yaml.Dumper, value: Any) -> yaml.Node:
    if _importable(value) and "." not in value.__qualname__:
        return dumper.represent_name(value)
    code = [cloudpickle.dumps(value)]
    return dumper.represent_sequence("tag:yaml.org,2002:python/object/apply:pickle.loads", code)


_Dumper.add_representer(types.FunctionType, _represent_callable)
_Dumper.add_multi_representer(type, _represent_callable)


def _importable(value: Any) -> Optional[str]:
    """The dotted name under which a class or function can be imported; None if it has none."""
    name = f"{getattr(value, '__module__', None)}.{getattr(value, '__qualname__', None)}"
    if "<" in name:  # of a function within another, or without a name
        return None
    with contextlib.suppress(Exception):  # whatever the import of a module can raise
        return name if locate(name) == value else None
    return None


def _named_targets(node: Any) -> Any:
    """A plain config whose calls are by name, wherever there is one."""
    if isinstance(node, list):
        return [_named_targets(entry) for entry in node]
    if not isinstance(node, dict):
        return node
    arguments = {key: _named_targets(value) for key, value in node.items() if key != "_target_"}
    target = node.get("_target_")
    if callable(target):
        target = _importable(target) or target
    return {"_target_": target, **arguments} if "_target_" in node else arguments


def _container(config: DictConfig) -> Dict[str, Any]:
    plain = OmegaConf.to_container(config, resolve=False, structured_config_mode=SCMode.INSTANTIATE)
    return _named_targets(plain)


def to_text(config: DictConfig) -> str:
    """A Python config as YAML that ``LazyConfig`` reads.

    Raises:
        UserError: if it holds an object that cannot be written.
    """
    try:
        text = _dump(_container(config))
        yaml.unsafe_load(text)
    except Exception as error:  # whatever an object does when it is taken apart or made anew
        raise UserError(
            f"the config holds what cannot be saved: {reason(error)}; give functions with a name, "
            "or functools.partial"
        ) from error
    return text


def _dump(value: Any) -> str:
    options = {"default_flow_style": None, "allow_unicode": True, "width": 9999}
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, **options)


_PROGRAM = '''{header}
import os

import yaml

globals().update(yaml.unsafe_load("""
{text}"""))
{end}'''


def to_program(config: DictConfig, header: str, end: str = "") -> str:
    """A Python config as one file that ``LazyConfig.load`` opens.

    Args:
        config: what it defines.
        header: comment at its top.
        end: lines of code at its end.
    """
    text = to_text(config).replace("\\", "\\\\").replace('"""', '\\"\\"\\"')
    return _PROGRAM.format(header=header, text=text, end=end)


def comparable(config: DictConfig) -> Dict[str, Any]:
    """A tree of plain values, equal for configs that describe the same."""
    return _plain(_container(config))


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _plain(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(entry) for entry in value]
    if isinstance(value, types.FunctionType) and not _importable(value):
        code = value.__code__
        return f"{value.__qualname__} {code.co_names} {code.co_consts} {code.co_code.hex()}"
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    return " ".join(_dump(value).split())
