"""What a process does with the memory that it frees."""

import ctypes
import sys

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # M_..., malloc.h


def keep_freed_memory() -> None:
    """Lets the process keep the memory of large tensors for the next ones, as torch's allocator
    does on a GPU. Otherwise glibc hands it back to the kernel now and then, which has to clear it
    before it is used again. Does nothing on other systems."""
    if sys.platform == "linux" and hasattr(ctypes.CDLL(None), "mallopt"):
        ctypes.CDLL(None).mallopt(_TRIM_THRESHOLD, 2**31 - 1)
        ctypes.CDLL(None).mallopt(_MMAP_THRESHOLD, 2**30)
