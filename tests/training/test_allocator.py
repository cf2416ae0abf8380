"""Whether freed memory is kept: pages that the kernel has to give a process that frees tensors and asks again."""

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

ROUNDS, PAGES_OF_A_ROUND = 20, 3 * 20 * 2**20 // os.sysconf("SC_PAGESIZE")
PROGRAM = f"""
import resource
import torch

def fill():
    kept = [torch.ones(5 * 2**20) for _ in range(3)]  # 20 MiB each

def main():
    fill()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range({ROUNDS}):
        fill()
    print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)

"""
COMMAND = "from modeling_vitp.training.command_line import run\nrun(main)"
LIBRARY = "from modeling_vitp import ViTPTrainer\nmain()"

HUGE = Path("/sys/kernel/mm/transparent_hugepage/enabled")
pytestmark = [
    pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another malloc than glibc's"),
    pytest.mark.skipif(HUGE.is_file() and "[always]" in HUGE.read_text(), reason="pages may be large ones"),
]


def rounds_of_pages(program: str, **environment: str) -> float:
    """By how many of the rounds' pages a process asked the kernel, in rounds."""
    own = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_TUNABLES"))}
    command = [sys.executable, "-c", PROGRAM + program]
    done = subprocess.run(command, env=own | environment, capture_output=True, text=True, check=True)
    return int(done.stdout.split()[-1]) / PAGES_OF_A_ROUND


def test_commands_keep_what_tensors_have_freed():
    assert rounds_of_pages(COMMAND) < 2


@pytest.mark.slow
def test_commands_do_with_the_allocator_as_they_are_told():
    assert rounds_of_pages(COMMAND, MALLOC_TRIM_THRESHOLD_="1000000") > ROUNDS / 2
    assert rounds_of_pages(COMMAND, GLIBC_TUNABLES="glibc.pthread.rseq=0") < 2
    assert rounds_of_pages(COMMAND, GLIBC_TUNABLES="glibc.malloc.trim_threshold=1000000") > ROUNDS / 2


@pytest.mark.slow
def test_the_library_alone_leaves_the_allocator_as_it_is():
    assert rounds_of_pages(LIBRARY) > ROUNDS / 2
