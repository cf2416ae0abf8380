"""Readers of annotation files that several layouts share: JSON, XML, text and lists of names."""

import json
import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from ..images.reading import below, visible_paths

STATISTICS = ".aux.xml"  # GDAL writes such a file beside an image whose statistics it has computed.
CLASS_FLAG = re.compile(r"\s+-1$|\s{2,}[01]$")  # Flags in the class lists of Pascal VOC; `scene 1` is a name.


def read_annotation(path: Path) -> Any:
    """Return the content of a JSON file. Raise a `ValueError` that names the file if it cannot be read."""
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError as error:
        raise ValueError(f"File {path} not found.") from error
    except (ValueError, RecursionError, OSError) as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error


def read_text(path: Path) -> str:
    """Return the content of a text file. Raise a `ValueError` that names the file if it cannot be read."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except (UnicodeDecodeError, OSError) as error:
        raise ValueError(f"{path} cannot be read as UTF-8 text: {error}") from error


def read_list(path: Path) -> list[str]:
    """Return the nonempty lines of a file, without the flags after the names in class lists of Pascal VOC."""
    return [CLASS_FLAG.sub("", line.strip()) for line in read_text(path).splitlines() if line.strip()]


def parse_xml(path: Path) -> ElementTree.Element:
    """Return the root of an XML file. Raise a `ValueError` that names the file if it cannot be read."""
    try:
        return ElementTree.parse(path).getroot()
    except (ElementTree.ParseError, LookupError, ValueError, OSError) as error:
        raise ValueError(f"{path} is not valid XML: {error}") from error


def files_by_key(
    folder: Path, suffix: str, key: Callable[[Path], str] = lambda path: path.stem, within: str = ""
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
    paths = [path for path in visible_paths(folder, f"*{suffix}") if not path.name.lower().endswith(STATISTICS)]
    paths = [path for path in paths if within in path.relative_to(folder).parent.as_posix().lower()] or paths
    files = {}
    for path in paths:
        other = files.setdefault(key(path), path)
        if other != path:
            raise ValueError(f"{other} and {path} both annotate {key(path)}. Set `annotations` to the right folder.")
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


def check_size(stated: Iterable[Any], size: tuple[int, int], path: Path, image: Path) -> None:
    """Raise a `ValueError` if the height and width in an annotation, if it has any, differ from those of the image."""
    height, width = stated
    try:
        height, width = int(float(height or 0)), int(float(width or 0))
    except (TypeError, ValueError, OverflowError):
        raise ValueError(f"{path}: expected the height and width of {image}, got {height!r} and {width!r}.") from None
    if height > 0 and width > 0 and (height, width) != size:  # Some files state 0.
        raise ValueError(f"{path}: {width} x {height} pixels is not the size of {image}, {size[1]} x {size[0]}.")
