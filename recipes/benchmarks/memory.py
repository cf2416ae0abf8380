"""Peak memory of a process."""

import re
import resource
import sys
from pathlib import Path


def most_resident() -> float:
    """Return the peak resident memory of this process, in GiB.

    On Linux, `getrusage` is not used because it starts with the peak of the parent process.
    """
    status = Path("/proc/self/status")
    if status.is_file():
        return int(re.search(r"VmHWM:\s+(\d+) kB", status.read_text())[1]) / 2**20
    scale = 2**30 if sys.platform == "darwin" else 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / scale
