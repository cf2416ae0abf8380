"""Memory that is freed is kept for the next tensor, in commands, where malloc is glibc's; imported before it is used.

By default the end of the heap goes back to the kernel whenever some tens of megabytes of it are free, so after every
step, and each page of it has to be found and cleared again in the next. Tensors of 32 MiB and more, the most that glibc
takes from the heap, still go back at once. What the environment says of malloc comes first.
"""

import ctypes
import os
import sys

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of malloc.h
NEVER, LARGEST = -1, 2**25

if sys.platform == "linux" and not any(name.startswith(("MALLOC_", "GLIBC_TUNABLES")) for name in os.environ):
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(M_TRIM_THRESHOLD, NEVER)
        mallopt(M_MMAP_THRESHOLD, LARGEST)
