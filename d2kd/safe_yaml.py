"""Reading YAML as data. A config file may come from anybody: nothing in it is ever run."""

import ast
import contextlib
import io
import os
import re
from typing import Any, Dict, Iterator, List, Set, Type, Union

import yaml
from detectron2.config import CfgNode
from fvcore.common.config import BASE_KEY

from d2kd.errors import UserError
from d2kd.model_zoo import CONFIG_DIRS, ZOO_DIRS, find_config

# How Detectron2's own Base-RetinaNet.yaml writes its anchor sizes: a list of a Python expression
_EXPRESSION_TAG = "tag:yaml.org,2002:python/object/apply:eval"
_ANCHOR_SIZES = re.compile(
    r"\[\[x,x\*2\*\*\(1\.0/3\),x\*2\*\*\(2\.0/3\)\]forxin\[(\d+(?:\.\d+)?(?:,\d+(?:\.\d+)?)*)\]\]"
)
_MAX_FILES = 100  # that a config is based on
_MAX_VALUES = 1_000_000  # of a file, however few aliases say so


def read_yaml(path: str) -> Dict[str, Any]:
    """
    Args:
        path: a config file, with ``_BASE_`` as fvcore reads it: beside the file. What is not there
            is taken for the name of a recipe, or of a config in Detectron2's model zoo.

    Returns:
        its content, merged with that of the files it is based on.

    Raises:
        UserError: if it is no YAML, has no keys, has a tag that only code could read, is of no
            version of Detectron2's configs, or is based on what is nowhere.
    """
    try:
        content = _reader().load_yaml_with_base(path, allow_unsafe=False)
    except RecursionError as e:
        raise UserError(f"{path}: nested too deeply") from e
    if content.get("VERSION") not in (None, 1, 2):
        raise UserError(f"{path}: VERSION is {content['VERSION']!r:.40}: Detectron2's are 1 and 2")
    return content


def read_value(word: Any) -> Any:
    """A value from the command line, where lists are often written as in a YAML, ``[FRS, PKD]``.

    Args:
        word: as typed.

    Returns:
        a list for a word in brackets that is none in Python; any other word as it is, for yacs to
        read.
    """
    if not isinstance(word, str) or not word.lstrip().startswith("["):
        return word
    try:
        ast.literal_eval(word)
    except (ValueError, SyntaxError, RecursionError, MemoryError):
        with contextlib.suppress(yaml.YAMLError, RecursionError):
            return plain_yaml(word)
    return word


def _reader() -> Type[CfgNode]:
    """What reads one config with all that it is based on."""
    return type("_Reader", (_PlainYaml,), {"opened": 0})


class _PlainYaml(CfgNode):
    """Hands fvcore's reader files in which plain values alone are left."""

    opened: int

    @classmethod
    def _open_cfg(cls, filename: str) -> io.StringIO:
        cls.opened += 1
        if cls.opened > _MAX_FILES:  # twelve files can ask for each other a million times
            raise UserError(
                f"{filename}: its {BASE_KEY} leads back to a file that is based on it, or to more "
                f"than {_MAX_FILES} files"
            )
        try:
            with super()._open_cfg(filename) as f:
                content = plain_yaml(f.read(), _Loader)
        except yaml.YAMLError as e:
            raise UserError(f"{filename}: {_explain(e)}") from e
        except UnicodeDecodeError as e:
            raise UserError(f"{filename}: is no text ({e})") from e
        if not isinstance(content, dict):
            raise UserError(f"{filename}: holds {content!r:.40}, expected config keys")
        for key in _keys(content):
            if not isinstance(key, str):
                raise UserError(f"{filename}: {key!r} is no key of a config, which is a name")
        if BASE_KEY in content:
            content[BASE_KEY] = _found(content[BASE_KEY], filename)
        return io.StringIO(yaml.safe_dump(content))


def plain_yaml(text: Union[str, bytes], loader: Type[yaml.SafeLoader] = yaml.SafeLoader) -> Any:
    """
    Returns:
        what the text holds.

    Raises:
        yaml.YAMLError: if it is no YAML, holds a date that is none, or more than a million values
            once its aliases are written out.
        RecursionError: if it is nested too deeply, or holds itself.
    """
    reader = loader(text)
    try:
        node = reader.get_single_node()
        values = _count(node, {})
        if values > _MAX_VALUES:
            raise yaml.YAMLError(f"holds {values:.0e} values once its aliases are written out")
        _refuse_twice(node, set())
        return None if node is None else reader.construct_document(node)
    except (ValueError, TypeError, AttributeError, ArithmeticError) as e:  # dates, numbers
        raise yaml.YAMLError(f"a value cannot be read ({e})") from e
    finally:
        reader.dispose()


def _count(node: Any, counted: Dict[yaml.Node, int]) -> int:
    """How many nodes there are below a node of YAML, or a pair of a mapping, and with it."""
    if not isinstance(node, (tuple, yaml.CollectionNode)):
        return 1
    if isinstance(node, tuple):
        return sum(_count(x, counted) for x in node)
    if node not in counted:
        counted[node] = 1 + sum(_count(x, counted) for x in node.value)
    return counted[node]


def _refuse_twice(node: Any, seen: Set[int]) -> None:
    """Of a key that stands twice in a mapping, YAML would take the last value without a word."""
    if not isinstance(node, yaml.CollectionNode) or id(node) in seen:
        return
    seen.add(id(node))
    names: Set[str] = set()
    for entry in node.value:
        pair = entry if isinstance(entry, tuple) else (entry,)
        key = pair[0].value if len(pair) == 2 and isinstance(pair[0], yaml.ScalarNode) else None
        if key is not None and key in names and key != "<<":
            raise yaml.YAMLError(f"line {pair[0].start_mark.line + 1}: '{key}' stands twice")
        names.add(key)
        for part in pair:
            _refuse_twice(part, seen)


def _keys(value: Any) -> Iterator[Any]:
    if isinstance(value, dict):
        yield from value
    if isinstance(value, (list, dict)):
        for x in value.values() if isinstance(value, dict) else value:
            yield from _keys(x)


def _found(base: Any, filename: str) -> Any:
    """What ``_BASE_`` names, recipes as their paths."""
    if isinstance(base, list):
        return [_found(entry, filename) for entry in base]
    if not isinstance(base, str):
        raise UserError(f"{filename}: {BASE_KEY} is {base!r}: give a file, or the name of a recipe")
    beside = os.path.join(os.path.dirname(filename), os.path.expanduser(base))
    if "://" in beside or os.path.isfile(beside):
        return base
    path = find_config(base)
    if path is None:
        raise UserError(
            f"{filename}: {BASE_KEY} is '{base}': no such file beside it, nor among d2kd's configs "
            f"({CONFIG_DIRS[-1]}), nor in Detectron2's model zoo ({ZOO_DIRS[0]})"
        )
    return os.path.abspath(path)


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader, and the one expression that Detectron2's own configs hold."""


def _anchor_sizes(loader: yaml.Loader, node: yaml.Node) -> List:
    try:
        (text,) = loader.construct_sequence(node)
        return anchor_sizes(text)
    except (ValueError, TypeError, yaml.YAMLError) as e:
        raise yaml.constructor.ConstructorError(
            None, None, _unreadable(_EXPRESSION_TAG), node.start_mark
        ) from e


def _refused(loader: yaml.Loader, node: yaml.Node) -> None:
    raise yaml.constructor.ConstructorError(None, None, _unreadable(node.tag), node.start_mark)


_Loader.add_constructor(_EXPRESSION_TAG, _anchor_sizes)
_Loader.add_constructor(None, _refused)


def _unreadable(tag: str) -> str:
    name = "!!" + tag.rsplit(",2002:", 1)[1] if ",2002:" in tag else tag
    return f"the tag {name} is refused, because nothing in a config is run: write the value itself"


def _explain(error: yaml.YAMLError) -> str:
    mark = getattr(error, "problem_mark", None)
    problem = getattr(error, "problem", None) or str(error)
    return f"line {mark.line + 1}: {problem}" if mark else " ".join(problem.split())


def anchor_sizes(text: str) -> List[List[float]]:
    """
    Args:
        text: ``[[x, x * 2**(1.0/3), x * 2**(2.0/3)] for x in [32, 64]]`` with any numbers in the
            last list.

    Returns:
        its value.

    Raises:
        ValueError: if it is anything else.
    """
    found = _ANCHOR_SIZES.fullmatch("".join(text.split())) if isinstance(text, str) else None
    if found is None:
        raise ValueError("no anchor sizes of three per octave")
    return [[x * 2 ** (i / 3) for i in range(3)] for x in map(float, found[1].split(","))]
