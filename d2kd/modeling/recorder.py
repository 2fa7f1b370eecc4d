"""Observing modules while they run."""

import contextlib
from typing import Dict, List, Tuple

from torch import nn

# The modules whose inputs are read. Those of others would only take memory.
_WITH_INPUTS = ("backbone", "box_pooler", "roi_heads")


class Recorder(contextlib.AbstractContextManager):
    """Keeps inputs and outputs of chosen modules while it is open, by forward hooks.

    Attributes:
        calls: per name, one (positional inputs, output) per call, in order. The inputs are None but
            for the few modules where somebody reads them; these stand there, with None as output,
            before the module runs.
    """

    def __init__(self, modules: Dict[str, nn.Module]):
        self._modules = modules
        self.calls: Dict[str, List[Tuple]] = {name: [] for name in modules}

    def __enter__(self) -> "Recorder":
        self._handles = []
        for name, module in self._modules.items():
            self._observe(module, self.calls[name], name in _WITH_INPUTS)
        return self

    def _observe(self, module: nn.Module, calls: List[Tuple], with_inputs: bool) -> None:
        def before(_, inputs):
            calls.append((inputs, None))

        def after(_, inputs, output):
            if with_inputs:
                calls.pop()
            calls.append((inputs if with_inputs else None, output))

        if with_inputs:
            self._handles.append(module.register_forward_pre_hook(before))
        self._handles.append(module.register_forward_hook(after))

    def __exit__(self, *_) -> None:
        for handle in self._handles:
            handle.remove()
