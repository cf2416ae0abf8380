"""Memory that a process has had."""

import re
import resource
import sys
from pathlib import Path


def most_resident() -> float:
    """The most memory that this process has had at once, in GiB. On Linux not by `getrusage`, which begins with that of
    the process that started this one.
    """
    status = Path("/proc/self/status")
    if status.is_file():
        return int(re.search(r"VmHWM:\s+(\d+) kB", status.read_text())[1]) / 2**20
    scale = 2**30 if sys.platform == "darwin" else 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / scale
