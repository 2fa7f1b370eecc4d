"""A queue of vectors over the last steps of all processes, as in MoCo (arXiv 1911.05722).

Shapes: M vectors of all processes in one step, Q places, d numbers per vector.
"""

from typing import Any, Dict

import torch
from torch import Tensor, nn


class VectorQueue(nn.Module):
    """The last vectors of all processes, first in, first out. Buffers hold it: saved with the run,
    and the same in every process.

    Attributes:
        vectors: (Q, d) float32; places that were never filled hold zeros.
        next: the place of the oldest vector, which the next one takes; a scalar tensor, so that the
            host need not know it.
    """

    def __init__(self, size: int, dim: int):
        """
        Args:
            size: Q, whatever the number of GPUs; 0 = no queue.
            dim: d.
        """
        super().__init__()
        self.register_buffer("vectors", torch.zeros(size, dim))
        self.register_buffer("next", torch.zeros((), dtype=torch.long))

    def _load_from_state_dict(self, state_dict: Dict[str, Any], prefix: str, *args) -> None:
        # Runs of 0.3.0 kept the oldest vector in the first place
        state_dict.setdefault(f"{prefix}next", torch.zeros_like(self.next))
        super()._load_from_state_dict(state_dict, prefix, *args)

    @torch.no_grad()
    def append(self, vectors: Tensor) -> None:
        """
        Args:
            vectors: (M, d), newest last. The oldest make room for them.
        """
        size = len(self.vectors)
        if not size:
            return
        newest = vectors[-size:]
        places = (self.next + torch.arange(len(newest), device=self.next.device)) % size
        self.vectors.index_copy_(0, places, newest.to(self.vectors.dtype))
        self.next.add_(len(newest)).remainder_(size)
