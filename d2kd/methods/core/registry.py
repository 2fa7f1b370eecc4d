"""The registry of methods. What a class declares is checked when it is registered: every command
makes a config node of it, and would end with a traceback."""

from typing import Any

from detectron2.utils.registry import Registry

from d2kd.schema import check_declaration

# What stands below DISTILL beside the methods' nodes
_TAKEN = ("METHODS", "TEACHER")


class DistillerRegistry(Registry):
    """Methods by class name.

    Raises:
        TypeError, ValueError: naming the class that cannot be registered, and why.
    """

    def _do_register(self, name: str, obj: Any) -> None:
        node = f"DISTILL.{name.upper()}"
        others = [other for other, _ in self if other != name and other.upper() == name.upper()]
        if others or name.upper() in _TAKEN:
            taken = f"that of {others[0]}" if others else "d2kd's own"
            raise ValueError(
                f"{name} would have the config node {node}, which is {taken}: rename it"
            )
        check_declaration(obj.keys, f"{name}.keys")
        if not obj.all_terms():
            raise ValueError(
                f"{name}.keys has no loss term, so that nothing would be distilled: give one, "
                '{"FEATURE": term(weight=1.0)} for instance'
            )
        super()._do_register(name, obj)
