"""Small tensors over all processes of a run.

Shapes: R vectors of this process, M of all processes, d numbers per vector.
"""

from typing import Tuple

import torch
import torch.distributed as dist
from detectron2.utils import comm
from torch import Tensor


def mean_over_gpus(values: Tensor) -> Tensor:
    """Mean of a small tensor over all processes. One communication, no gradient."""
    values = values.detach()
    if comm.get_world_size() == 1:
        return values
    values = values.clone()
    dist.all_reduce(values)
    return values / comm.get_world_size()


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
    sizes = comm.all_gather(len(vectors))  # from host to host: none waits for its GPU
    padded = vectors.new_zeros(max(sizes), vectors.shape[1])
    padded[: len(vectors)] = vectors
    parts = [torch.empty_like(padded) for _ in sizes]
    dist.all_gather(parts, padded)
    everything = torch.cat([part[:size] for part, size in zip(parts, sizes)])
    return everything, sum(sizes[: comm.get_rank()])
