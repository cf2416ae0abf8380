"""Readers of annotation files that several layouts share: JSON, XML, text and lists of names."""

import json
import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from ..images.reading import below, read_errors, visible_paths

STATISTICS = ".aux.xml"  # GDAL writes such a file beside an image whose statistics it has computed.
CLASS_FLAG = re.compile(r"\s+-1$|\s{2,}[01]$")  # Flags in the class lists of Pascal VOC; `scene 1` is a name.


def read_annotation(path: Path) -> Any:
    """Return the content of a JSON file. Raise a `ValueError` that names the file if it cannot be read."""
    with read_errors(path, "JSON"):
        return json.loads(path.read_text(encoding="utf-8-sig"))


def read_text(path: Path) -> str:
    """Return the content of a text file. Raise a `ValueError` that names the file if it cannot be read."""
    with read_errors(path, "UTF-8 text"):
        return path.read_text(encoding="utf-8-sig")


def read_list(path: Path) -> list[str]:
    """Return the nonempty lines of a file, without the flags after the names in class lists of Pascal VOC."""
    names = []
    for line in read_text(path).splitlines():
        stripped_line = line.strip()
        if stripped_line:
            names.append(CLASS_FLAG.sub("", stripped_line))
    return names


def parse_xml(path: Path) -> ElementTree.Element:
    """Return the root of an XML file. Raise a `ValueError` that names the file if it cannot be read."""
    with read_errors(path, "XML"):
        return ElementTree.parse(path).getroot()


def add_file(files: dict[str, Path], name: str, path: Path) -> None:
    """Add a file under its name. Raise a `ValueError` that names both files if another file has the same name."""
    first_path = files.setdefault(name, path)
    if first_path != path:
        raise ValueError(
            f"{first_path} and {path} have the same name {name!r}. Rename or remove one of them, or choose the folder "
            "of one of them."
        )


def files_by_key(
    folder: Path,
    suffix: str,
    key: Callable[[Path], str] = lambda path: path.stem,
    within: str = "",
) -> dict[str, Path]:
    """Return the annotation files in a folder and its subfolders, by key.

    Args:
        folder: folder to search.
        suffix: suffix of the files.
        key: function from a path to its key.
        within: text in the names of subfolders; if some have it, only those are searched.

    Raises:
        ValueError: If two files have the same key, or no file is found.
    """
    paths = []
    paths_within = []
    for path in visible_paths(folder, f"*{suffix}"):
        if path.name.lower().endswith(STATISTICS):
            continue
        paths.append(path)
        subfolders = path.relative_to(folder).parent.as_posix().lower()
        if within in subfolders:
            paths_within.append(path)
    files = {}
    for path in paths_within or paths:
        add_file(files, key(path), path)
    if not files:
        raise ValueError(f"No {suffix} file found in {folder}.")
    return files


def is_below(root: Path, path: Path) -> bool:
    """Return whether a path is below a folder after symbolic links are resolved."""
    try:
        return bool(below(root, path))
    except ValueError:
        return False


def is_number(value: object) -> bool:
    """Return whether a value is a finite number in the range of coordinates."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e15


def read_flag(value: Any, name: str) -> bool:
    """Return a flag, 0 or 1 as a number, a bool or text; a missing one is false. Raise a `ValueError` for others."""
    flag = value.strip().lower() if isinstance(value, str) else value
    if flag in (None, "", 0, "0", "false"):
        return False
    if flag in (1, "1", "true"):
        return True
    raise ValueError(f"expected `{name}` to be 0 or 1, got {value!r}.")


def check_size(
    stated: Iterable[Any],
    size: tuple[int, int],
    path: Path,
    image: Path,
) -> None:
    """Raise a `ValueError` if the height and width in an annotation, if it has any, differ from those of the image."""
    height, width = stated
    try:
        height = int(float(height or 0))
        width = int(float(width or 0))
        # Some files state 0.
        is_stated = height > 0 and width > 0
    except (TypeError, ValueError, OverflowError):
        is_stated = True
    if is_stated and (height, width) != size:
        raise ValueError(f"{path}: {width} x {height} pixels is not the size of {image}, {size[1]} x {size[0]}.")
