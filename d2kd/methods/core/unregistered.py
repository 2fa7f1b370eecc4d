"""Methods that a config names and this process does not know."""

from typing import Any, Mapping

from detectron2.config import CfgNode

from d2kd.errors import UserError, nearest

from .distiller import DISTILLER_REGISTRY


def drop_unregistered(distill: Any, keys: Mapping[str, Any], path: str) -> None:
    """Takes the nodes of methods that are not registered out of what a run has written, where the
    run does not use them: versions until 0.3.0 wrote down those of all methods.

    Args:
        distill: the node ``DISTILL`` of a file, if it has one; changed in place.
        keys: of the node, beside methods.
        path: the file, for messages.

    Raises:
        UserError: if a method is used that is not registered.
    """
    if not isinstance(distill, CfgNode) or not isinstance(distill.get("METHODS"), list):
        return
    for name in distill.METHODS:
        if str(name).upper() in distill and name not in DISTILLER_REGISTRY:
            raise UserError(f"{path}: {unregistered(name)}")
    teacher = distill.get("TEACHER")
    # A run writes down every key; in a file made by hand, such a node is a mistyped one
    if isinstance(teacher, CfgNode) and set(keys["TEACHER"]) <= set(teacher):
        known = {*keys, *(name.upper() for name, _ in DISTILLER_REGISTRY)}
        for key in set(distill) - known:
            del distill[key]


def unregistered(name: Any) -> str:
    """What to say of a name in ``DISTILL.METHODS`` that no registered method has."""
    known = [known for known, _ in DISTILLER_REGISTRY]
    return (
        f"DISTILL.METHODS names '{name}': {nearest(str(name), known)}; a method of your own is "
        "there if you start with the script that imports it"
    )
