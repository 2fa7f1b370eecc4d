"""A memory of vectors over the last steps of all processes.

Shapes: R vectors of this process, M of all processes, Q places, d numbers per vector.
"""

from typing import Tuple

import torch
import torch.distributed as dist
from detectron2.utils import comm
from torch import Tensor, nn


@torch.no_grad()
def gather_over_gpus(vectors: Tensor) -> Tuple[Tensor, int]:
    """The vectors of all processes. Every process has to call it; it may have none.

    Args:
        vectors: (R, d); R may differ between processes.

    Returns:
        the vectors of all processes (M, d) in the order of ranks, and the place of this process's
        first one.
    """
    if comm.get_world_size() == 1:
        return vectors, 0
    count = torch.tensor([len(vectors)], device=vectors.device)
    counts = [torch.empty_like(count) for _ in range(comm.get_world_size())]
    dist.all_gather(counts, count)
    sizes = torch.cat(counts).tolist()  # on the host, where the shapes of tensors are
    padded = vectors.new_zeros(max(sizes), vectors.shape[1])
    padded[: len(vectors)] = vectors
    parts = [torch.empty_like(padded) for _ in sizes]
    dist.all_gather(parts, padded)
    everything = torch.cat([part[:size] for part, size in zip(parts, sizes)])
    return everything, sum(sizes[: comm.get_rank()])


class Memory(nn.Module):
    """The last vectors of all processes, first in, first out.

    Attributes:
        vectors: (Q, d) float32, oldest first; places that were never filled hold zeros. A buffer:
            saved with the run. The same in every process.
    """

    def __init__(self, size: int, dim: int):
        """
        Args:
            size: Q, whatever the number of GPUs; 0 = no memory.
            dim: d.
        """
        super().__init__()
        self.register_buffer("vectors", torch.zeros(size, dim))

    @torch.no_grad()
    def append(self, vectors: Tensor) -> None:
        """
        Args:
            vectors: (M, d), newest last. The oldest of the memory make room for them.
        """
        size = len(self.vectors)
        newest = vectors[max(len(vectors) - size, 0) :].to(self.vectors.dtype)
        # Not in place: a loss that waits for its backward pass may still hold the old ones.
        self.vectors = torch.cat([self.vectors[len(newest) :], newest])
