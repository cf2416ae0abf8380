"""Memory that is freed and kept for the next tensor, where malloc is glibc's."""

import ctypes
import os
import sys

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of malloc.h
NEVER, LARGEST = -1, 2**25


def keep_freed_memory() -> None:
    """For the rest of the process and those that it forks, unless the environment says something of malloc.

    By default the end of the heap goes back to the kernel whenever some tens of megabytes of it are free, so after
    every step, and each page of it has to be found and cleared again in the next. Tensors of 32 MiB and more, the most
    that glibc takes from the heap, still go back at once.
    """
    is_told = "glibc.malloc" in os.environ.get("GLIBC_TUNABLES", "")
    if sys.platform != "linux" or is_told or any(name.startswith("MALLOC_") for name in os.environ):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(M_TRIM_THRESHOLD, NEVER)
        mallopt(M_MMAP_THRESHOLD, LARGEST)
