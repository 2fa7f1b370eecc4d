"""Random numbers that do not shift those of others."""

import contextlib
import random
from typing import Any, Dict, Iterator, Optional

import numpy as np
import torch
from torch import Tensor


class RandomStream(contextlib.AbstractContextManager):
    """A stream of random numbers of its own: inside of it, torch's global generators (CPU and the
    current CUDA device) continue this stream, outside they are as if nothing had been drawn.

    Detectron2's samplers take no generator. So what draws numbers beside a detector's training,
    a teacher's sampling of proposals for instance, runs inside of a stream, and the student trains
    on the same samples as it does alone.
    """

    def __init__(self, seed: Optional[int] = None):
        """
        Args:
            seed: where the stream starts, the same on every device; drawn, if not given.
        """
        if seed is None:
            seed = int(torch.randint(2**31, (1,), device="cpu"))
        self._state = {"cpu": torch.Generator().manual_seed(seed).get_state(), "cuda": None}
        self._seed = seed
        self._depth = 0
        self._outside: Dict[str, Optional[Tensor]] = {}

    def __enter__(self) -> "RandomStream":
        self._depth += 1
        if self._depth > 1:  # it goes on
            return self
        self._outside = _global_state()
        if self._outside["cuda"] is not None and self._state["cuda"] is None:
            self._state["cuda"] = _cuda_start(self._seed)
        _set_global_state(self._state)
        return self

    def __exit__(self, *_: Any) -> None:
        self._depth -= 1
        if self._depth:
            return
        self._state = _global_state()
        _set_global_state(self._outside)

    def state_dict(self) -> Dict[str, Optional[Tensor]]:
        """Where the stream is, on the CPU and on the current CUDA device."""
        return dict(self._state)

    def load_state_dict(self, state: Dict[str, Optional[Tensor]]) -> None:
        """Continues where another stream was, see :meth:`state_dict`."""
        self._state = dict(state)


@contextlib.contextmanager
def preserve_rng_state(cuda: bool = True) -> Iterator[None]:
    """Gives Python's, NumPy's and torch's generators their states back at the end.

    Args:
        cuda: the generator of the current CUDA device is meant too, where CUDA is in use.
    """
    python_state, numpy_state = random.getstate(), np.random.get_state()
    torch_state = _global_state() if cuda else {"cpu": torch.get_rng_state(), "cuda": None}
    try:
        yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)
        _set_global_state(torch_state)


def _cuda_start(seed: int) -> Tensor:
    device = torch.device("cuda", torch.cuda.current_device())
    return torch.Generator(device).manual_seed(seed).get_state()


def _global_state() -> Dict[str, Optional[Tensor]]:
    return {
        "cpu": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None,
    }


def _set_global_state(state: Dict[str, Optional[Tensor]]) -> None:
    torch.set_rng_state(state["cpu"])
    if state["cuda"] is not None:
        torch.cuda.set_rng_state(state["cuda"])
