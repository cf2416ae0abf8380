"""Training on several processes."""

import os
import subprocess
import sys
from pathlib import Path

from paths import HELPERS


def launch(num_processes: int, output: Path, script: str, *arguments: str) -> subprocess.Popen:
    """`torchrun` of a script of this folder."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={num_processes}"]
    paths = os.pathsep.join(path for path in [str(HELPERS), *sys.path] if path)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": paths}
    with open(output, "w") as file:
        return subprocess.Popen(
            [*launcher, str(HELPERS / script), *arguments], stdout=file, stderr=subprocess.STDOUT, env=environment
        )
