"""Observing modules while they run."""

import contextlib
from typing import Any, Callable, Dict, Iterable, List, NamedTuple, Optional, Tuple

from torch import Tensor, nn


class Observed(NamedTuple):
    """A module to observe.

    Attributes:
        module: anything with ``register_forward_hook``.
        inputs: keep its inputs too. Those of other modules would only take memory.
    """

    module: nn.Module
    inputs: bool = False


class Call(NamedTuple):
    """One call of an observed module."""

    inputs: Optional[Tuple]  # positional; None where nobody asked for them
    output: Any


class Recorder(contextlib.AbstractContextManager):
    """Keeps what chosen modules get and give while it is open, by forward hooks, which change
    nothing."""

    def __init__(
        self,
        observed: Iterable[Observed],
        backbone: Optional[nn.Module] = None,
        before_backbone: Optional[Callable[[Tensor], None]] = None,
    ):
        """
        Args:
            observed: a module may stand here more than once.
            backbone: a detector's, for the next argument.
            before_backbone: called with the batch (N, 3, H, W) just before the backbone runs.
        """
        self._with_inputs: Dict[nn.Module, bool] = {}
        for module, inputs in observed:
            self._with_inputs[module] = inputs or self._with_inputs.get(module, False)
        self._calls: Dict[nn.Module, List[Call]] = {module: [] for module in self._with_inputs}
        self._backbone = backbone
        self._before_backbone = before_backbone

    def calls(self, module: nn.Module) -> List[Call]:
        """The calls of a module, in order; none if it is not observed."""
        return self._calls.get(module, [])

    def output(self, module: nn.Module) -> Any:
        """What an observed module gave in its first call."""
        return self._calls[module][0].output

    def forget(self, module: nn.Module) -> None:
        """Lets go of what an observed module gave."""
        self._calls[module].clear()

    def __enter__(self) -> "Recorder":
        self._handles = [
            module.register_forward_hook(self._keep(self._calls[module], inputs))
            for module, inputs in self._with_inputs.items()
        ]
        if self._before_backbone is not None:
            hook = self._backbone.register_forward_pre_hook(
                lambda _, inputs: self._before_backbone(inputs[0])
            )
            self._handles.append(hook)
        return self

    @staticmethod
    def _keep(calls: List[Call], with_inputs: bool) -> Callable:
        def hook(_, inputs, output):
            calls.append(Call(inputs if with_inputs else None, output))

        return hook

    def __exit__(self, *_) -> None:
        for handle in self._handles:
            handle.remove()
