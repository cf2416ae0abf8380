"""How threads wait, as the OpenMP that torch brings tells it."""

import os
import subprocess
import sys

import pytest

COMMAND = "import modeling_vitp.training.command_line"


def spins(script, imports: str, **environment: str) -> int:
    """How often a thread looks before it sleeps, as OpenMP displays it when torch is loaded, in a program that makes
    some imports."""
    unset = {"OMP_WAIT_POLICY": "", "GOMP_SPINCOUNT": ""}
    environment = {**os.environ, **unset, "OMP_DISPLAY_ENV": "verbose", **environment}
    environment = {name: value for name, value in environment.items() if value}
    script.write_text(f"{imports}\nimport torch\ntorch.ones(3).sum()")
    done = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True, check=True)
    lines = [line for line in done.stderr.splitlines() if "GOMP_SPINCOUNT" in line]
    if not lines:
        pytest.skip("this build of torch has an OpenMP that does not tell")
    return int(lines[0].split("'")[1])


def test_threads_of_commands_spin_shortly_before_they_sleep(tmp_path):
    """The package knows a command by its name."""
    assert spins(tmp_path / "vitp", COMMAND) == 1000


@pytest.mark.slow
def test_threads_of_commands_wait_as_they_are_told(tmp_path):
    assert spins(tmp_path / "vitp", COMMAND, GOMP_SPINCOUNT="7") == 7
    assert spins(tmp_path / "vitp", COMMAND, OMP_WAIT_POLICY="PASSIVE") == 0
    assert spins(tmp_path / "vitp", COMMAND, OMP_WAIT_POLICY="ACTIVE") > 1000000


@pytest.mark.slow
def test_the_library_alone_leaves_them_as_they_are(tmp_path):
    plain = spins(tmp_path / "script.py", "")
    assert spins(tmp_path / "script.py", "import modeling_vitp") == plain > 1000
