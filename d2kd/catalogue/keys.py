"""Every config key of d2kd's, and what it may be."""

from typing import Dict, Iterator, Mapping, Tuple, Type

from d2kd.config import DATASETS_KEYS, DISTILL_KEYS, RUN_KEYS, SOLVER_KEYS
from d2kd.methods import DISTILLER_REGISTRY, Distiller
from d2kd.methods.core import term
from d2kd.modeling.config import MODEL_KEYS
from d2kd.schema import TYPES, Key, Keys, walk


def all_keys() -> Dict[str, Key]:
    """Every key that d2kd declares, by its full name."""
    nodes: Dict[str, Keys] = {
        "MODEL": MODEL_KEYS,
        "SOLVER": SOLVER_KEYS,
        "DATASETS": DATASETS_KEYS,
        "RUN": RUN_KEYS,
        "DISTILL": DISTILL_KEYS,
    }
    for _, method in DISTILLER_REGISTRY:
        nodes[method.node_name()] = method.keys
    return {name: key for prefix, keys in nodes.items() for name, key in walk(keys, prefix)}


def keys_of(method: Type[Distiller]) -> Iterator[Tuple[str, Key]]:
    """A method's keys by their names below its node; of what every term has, ``WEIGHT`` and what
    differs from the usual default."""
    usual = term(0.0)
    for name, key in walk(method.keys, method.node_name()):
        short = name[len(method.node_name()) + 1 :]
        first, _, last = short.rpartition(".")
        of_term = first.lower() in method.all_terms()
        if not of_term or last == "WEIGHT" or key.default != usual[last].default:
            yield short, key


def what_it_may_be(key: Key) -> str:
    """The type and the bounds of a key's value in words, such as "a number, 0 or more"."""
    is_list = isinstance(key.default, (list, tuple))
    kind = (key.item or type(key.default[0])) if is_list else type(key.default)
    if key.choices is not None:
        text = "one of " + ", ".join(repr(choice) for choice in key.choices)
    else:
        text = ", ".join(filter(None, (TYPES.get(kind, "anything"), key.bounds())))
    return f"a list, each {text}" if is_list else text


def defaults_by_student(name: str) -> Mapping[str, Tuple[object, str]]:
    """Other defaults of a key, with their source, by the student's ``MODEL.META_ARCHITECTURE``."""
    for _, method in DISTILLER_REGISTRY:
        prefix = f"{method.node_name()}."
        if name.startswith(prefix):
            return {
                student: (defaults.values[name[len(prefix) :]], defaults.source)
                for student, defaults in method.defaults_of.items()
                if name[len(prefix) :] in defaults.values
            }
    return {}
