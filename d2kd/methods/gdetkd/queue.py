"""A queue of vectors over the last steps of all processes, as in MoCo (arXiv 1911.05722).

Shapes: M vectors of all processes in one step, Q places, d numbers per vector.
"""

import torch
from torch import Tensor, nn

# Vectors that are moved at once
_CHUNK = 8192


class VectorQueue(nn.Module):
    """The last vectors of all processes, first in, first out.

    Attributes:
        vectors: (Q, d) float32, oldest first; places that were never filled hold zeros. A buffer:
            saved with the run. The same in every process.
    """

    def __init__(self, size: int, dim: int):
        """
        Args:
            size: Q, whatever the number of GPUs; 0 = no queue.
            dim: d.
        """
        super().__init__()
        self.register_buffer("vectors", torch.zeros(size, dim))

    @torch.no_grad()
    def append(self, vectors: Tensor) -> None:
        """
        Args:
            vectors: (M, d), newest last. The oldest make room for them.
        """
        size = len(self.vectors)
        newest = vectors[max(len(vectors) - size, 0) :]
        kept = size - len(newest)
        # In place, chunk by chunk: a copy of the whole queue would be there twice.
        for start in range(0, kept, _CHUNK):
            end = min(start + _CHUNK, kept)
            moved = self.vectors[start + len(newest) : end + len(newest)].clone()
            self.vectors[start:end] = moved
        self.vectors[kept:] = newest
