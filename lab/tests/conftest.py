"""Fixtures of `tests/conftest.py`, which the tests of the laboratory share, and wheels with data."""

import importlib.util
import shutil
import subprocess

import pytest
from paths import ROOT

from lab.data.wheels import open_wheel

spec = importlib.util.spec_from_file_location("conftest_of_tests", ROOT / "tests" / "conftest.py")
shared = importlib.util.module_from_spec(spec)
spec.loader.exec_module(shared)
globals().update({name: value for name, value in vars(shared).items() if not name.startswith("__")})


@pytest.fixture(scope="session")
def download_wheel(tmp_path_factory):
    """Return a function that downloads a wheel and returns its path. It skips the test without a package index."""
    folder = tmp_path_factory.mktemp("downloads")

    def download(requirement: str) -> str:
        path = folder / f"{requirement}.whl"
        if not path.exists():
            try:
                with open_wheel(requirement) as wheel:
                    shutil.copy(wheel.filename, path)
            except subprocess.CalledProcessError:
                pytest.skip(f"{requirement} cannot be downloaded.")
        return str(path)

    return download
