"""Whether freed memory is kept: pages that the kernel has to give a process that frees tensors and asks again."""

import os
import platform
import subprocess
import sys

import pytest

ROUNDS, PAGES_OF_A_ROUND = 20, 3 * 20 * 2**20 // os.sysconf("SC_PAGESIZE")
PROGRAM = f"""
import resource
import torch

def fill():
    kept = [torch.ones(5 * 2**20) for _ in range(3)]  # 20 MiB each

fill()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range({ROUNDS}):
    fill()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
COMMAND = "import modeling_vitp.training.command_line"

pytestmark = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another malloc than glibc's")


def rounds_of_pages(script, imports: str, **environment: str) -> float:
    """By how many of the rounds' pages a process asked the kernel, in rounds."""
    script.write_text(imports + PROGRAM)
    own = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_TUNABLES"))}
    done = subprocess.run([sys.executable, script], env=own | environment, capture_output=True, text=True, check=True)
    return int(done.stdout.split()[-1]) / PAGES_OF_A_ROUND


def test_commands_keep_what_tensors_have_freed_unless_told_otherwise(tmp_path):
    """The package knows a command by its name."""
    assert rounds_of_pages(tmp_path / "vitp", COMMAND) < 2
    assert rounds_of_pages(tmp_path / "vitp", COMMAND, MALLOC_TRIM_THRESHOLD_="1000000") > ROUNDS / 2


def test_the_library_alone_leaves_the_allocator_as_it_is(tmp_path):
    assert rounds_of_pages(tmp_path / "script.py", "import modeling_vitp") > ROUNDS / 2
