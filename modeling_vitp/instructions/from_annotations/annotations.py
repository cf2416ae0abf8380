"""Annotated vision data as it lies on disk, read into one form: `AnnotatedImage`.

A `Layout` knows which images each split of a data set has, and what is annotated in one of them. Every layout is
complete by assumption: what is not annotated in an image is not there.
"""

import json
import re
import sys
import zlib
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image
from tqdm.auto import tqdm

from ...images.reading import Window, below, content_digest, patient_of, stored_orientation, stored_size
from ..boxes import Box, box_area, clip

UNSPLIT = "all"
SPLIT_NAME = re.compile(r"(trainval|train|val|valid|validation|test|test-dev)\d*", re.IGNORECASE)
OF_CLASS = re.compile(r"\s+-1$|\s{2,}[01]$")  # in Pascal VOC's lists of a class; `scene 1` is a name


@dataclass(frozen=True)
class Region:
    """An object, or a connected part of a mask.

    `box` lies inside the image. `area` is that of the outline where one is annotated and of the box otherwise. A
    region that is not `is_clear` (a crowd, marked as difficult, a speck) is there, but its class is neither counted
    nor pointed at.
    """

    label: str
    box: Box
    area: float
    caption: str | None = None
    is_clear: bool = True

    @property
    def centre(self) -> tuple[float, float]:
        left, top, right, bottom = self.box
        return (left + right) / 2, (top + bottom) / 2


class Labels(NamedTuple):
    """The class of every pixel."""

    numbers: np.ndarray
    """Integers of shape (height, width): 0 for what is no class, or else the place in `phrases`, from 1."""
    phrases: tuple[str, ...]


@dataclass(frozen=True)
class AnnotatedImage:
    """An image, or a pair before and after, with what is annotated: regions, one class of the whole, or captions.

    `window` is the part of the file that the image is; `size`, height and width, and boxes are in pixels of that part.
    `slivers` are what is seen of regions that lie for the most part outside of it. `mask` reads the class of each
    pixel, where that is annotated. `picture` is what is shown of a volume, where the file is none of an image.
    """

    id: str
    paths: tuple[Path, ...]
    size: tuple[int, int]
    regions: tuple[Region, ...] = ()
    label: str | None = None
    captions: tuple[str, ...] = ()
    window: Window | None = None
    slivers: tuple[Region, ...] = ()
    mask: Callable[[], Labels] | None = None
    picture: Callable[[], Image.Image] | None = None

    @property
    def cut(self) -> set[str]:
        """The classes of which more is seen than the regions."""
        return {region.label for region in self.slivers}

    @property
    def classes(self) -> set[str]:
        return {region.label for region in self.regions} | ({self.label} - {None})


class Layout:
    """A kind of annotated data set under a folder.

    Args:
        root: the data set's folder.
        names: class as annotated -> phrase for questions and answers; `None` leaves a class out. A class without an
            entry goes by its own name in plain words.
        annotations: file or folder of the annotations, where looking under `root` does not find the right one.
    """

    subject: str  # what the questions are about, see `wording.PHRASINGS`

    def __init__(self, root: Path, names: dict[str, str | None] | None = None, annotations: Path | None = None):
        if not root.is_dir():
            raise ValueError(f"{root} is not a folder.")
        names = {} if names is None else names
        if not isinstance(names, dict) or not all(
            phrase is None or (isinstance(phrase, str) and phrase.strip()) for phrase in names.values()
        ):
            raise ValueError(f"names={str(names)[:80]}, but a phrase (or null) for each class is needed.")
        self.root, self.names, self.annotations = root, names, annotations

    def splits(self) -> dict[str, dict[str, tuple[Path, ...]]]:
        """Split -> id of an image -> its file, or its two files. Without splits on disk, all are in `UNSPLIT`."""
        raise NotImplementedError

    def annotate(self, image_id: str, paths: tuple[Path, ...]) -> AnnotatedImage:
        """Reads one image's annotation. Raises `ValueError` that names the file if something is wrong with it."""
        raise NotImplementedError

    def annotate_file(self, image_id: str, paths: tuple[Path, ...]) -> list[AnnotatedImage]:
        """All images that a file has; more than one of a volume."""
        return [self.annotate(image_id, paths)]

    def case(self, path: Path) -> str | None:
        """What may be in one split only, where that is known: the patient in the tags of DICOM."""
        return patient_of(path)

    def phrase(self, label: str) -> str | None:
        phrase = self.names[label] if label in self.names else plain_words(label)
        if phrase == "":
            raise ValueError(f"The class {label!r} has no words in its name: give it some with --names.")
        return phrase

    def region(self, where: str, label: str, box: Box, size: tuple[int, int], area: float | None = None, **more):
        """A region with its box cut to the image, as a list: empty if its class is left out."""
        if not isinstance(label, str) or not label:
            raise ValueError(f"{where} has no name of a class, but {label!r}.")
        if not all(map(is_number, box)) or not (area is None or is_number(area)):
            raise ValueError(f"{where}: the box {list(box)}, of area {area}, is not of finite numbers.")
        if not isinstance(more.get("caption"), (str, type(None))):
            raise ValueError(f"{where}: the caption {more['caption']!r} is no text.")
        phrase = self.phrase(label)
        if phrase is None:
            return []
        height, width = size
        cut = clip(box, (0, 0, width, height))
        if box_area(cut) <= 0:
            raise ValueError(
                f"{where}: the box {list(box)} of {label!r} has no area inside the image of {width} x {height} pixels."
            )
        return [Region(phrase, cut, box_area(cut) if area is None else min(area, box_area(cut)), **more)]


def is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e15


def annotate_all(layout: Layout, chosen: dict[str, tuple[Path, ...]], on_error: str = "raise") -> list[AnnotatedImage]:
    """Reads the annotations of all images.

    Args:
        on_error: "raise" stops at the first that cannot be used; "skip" leaves the image out and says so.

    Raises:
        ValueError: names the image or the file of its annotation; also if none is left. An image that is not below the
            layout's root, wherever its name or a link leads, is not read.
    """
    images = []
    for image_id, paths in tqdm(chosen.items(), desc="annotations"):
        try:
            for path in paths:
                below(layout.root, path)
            images += layout.annotate_file(image_id, paths)
        except Exception as error:  # of many kinds, where a file holds other things than it should
            said = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
            if str(layout.root) not in said and str(layout.annotations) not in said:
                said = f"{paths[0]}: its annotation cannot be read: {said}"
            if on_error == "raise":
                raise ValueError(said) from error
            print(f"{image_id} is left out: {said}", file=sys.stderr)
    if not images:
        raise ValueError(f"No image of {layout.root} has an annotation that can be read.")
    return images


def upright_size(path: Path) -> tuple[int, int]:
    """Height and width. Raises `ValueError` if the file is no upright image."""
    try:
        size, orientation = stored_size(path), stored_orientation(path)
    except ValueError:
        raise
    except Exception as error:  # Pillow raises many kinds for a broken file
        raise ValueError(f"{path} cannot be read: {error}") from error
    if orientation != 1:
        raise ValueError(f"{path} is turned by its EXIF data, so boxes and pixels may disagree: save it upright.")
    return size


def read_annotation(path: Path):
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError as error:
        raise ValueError(f"There is no file {path}.") from error
    except (ValueError, RecursionError, OSError) as error:
        raise ValueError(f"{path} is no JSON: {error}") from error


def read_list(path: Path) -> list[str]:
    """Every line that is not empty, without what Pascal VOC's lists of a class have after a name."""
    return [OF_CLASS.sub("", line.strip()) for line in read_text(path).splitlines() if line.strip()]


def read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except (UnicodeDecodeError, OSError) as error:
        raise ValueError(f"{path} is no text: {error}") from error


def plain_words(label: str) -> str:
    """A class as a phrase: `AnnualCrop`, `annual_crop` and `Annual-Crop` -> `annual crop`; acronyms stay."""
    words = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", label).replace("_", " ").replace("-", " ").split()
    return " ".join(word if len(word) > 1 and word.isupper() else word.lower() for word in words)


def split_in(name: str) -> str | None:
    """The split that a file's or folder's name speaks of: `instances_train2017` -> `train`."""
    words = [word for word in name.split("_") if SPLIT_NAME.fullmatch(word)]
    if not words:
        return None
    split = words[-1].lower().rstrip("0123456789")
    return {"valid": "val", "validation": "val", "test-dev": "test"}.get(split, split)


def choose_split(
    layout: Layout, split: str, listed: list[str] | None = None
) -> tuple[dict[str, tuple[Path, ...]], set[Path]]:
    """The images of a split, and the files of those that are held out from it.

    Held out are the test split of the layout and, unless `split` is itself made of it, the validation split; an image
    that is in `split` too is held out all the same. With `listed` (ids, file names, or file names without suffix) only
    those images are chosen, and all others of the layout are held out.

    Raises:
        ValueError: if the layout has no such split, or no image of a listed name, or several.
    """
    splits = layout.splits()
    if listed is not None:
        chosen = choose_listed(layout, [splits[split]] if splits.get(split) else [*splits.values()], listed)
        taken = {path for paths in chosen.values() for path in paths}
        held_out = [
            {key: paths} for images in splits.values() for key, paths in images.items() if taken.isdisjoint(paths)
        ]
    elif split in splits:
        chosen = splits[split]
        held_out = [splits.get(name, {}) for name in {"train": ("val", "test"), "test": ()}.get(split, ("test",))]
    else:
        raise ValueError(
            f"{layout.root} shows no split {split!r}, only {sorted(splits)}. Give one of them, or name the images that "
            "may be used in a file: --split_list."
        )
    return chosen, {path for images in held_out for paths in images.values() for path in paths}


def choose_listed(
    layout: Layout, splits: list[dict[str, tuple[Path, ...]]], listed: list[str]
) -> dict[str, tuple[Path, ...]]:
    """The images of a list, by their ids, or else by their file names with or without suffix; see [`choose_split`]."""
    by_id, by_name = defaultdict(list), defaultdict(list)
    for images in splits:
        for key, paths in images.items():
            by_id[key].append((key, paths))
            for name in {paths[0].stem, paths[0].name}:
                by_name[name].append((key, paths))
    found = {name: by_id.get(name) or by_name.get(name, []) for name in listed}
    missing = [name for name, images in found.items() if not images]
    if missing:
        raise ValueError(f"{len(missing)} of {len(listed)} listed images are not in {layout.root}: {missing[0]}, …")
    for name, images in found.items():
        if len(images) > 1:
            raise ValueError(
                f"{name} of the list could be {images[0][1][0]} or {images[1][1][0]}: list ids, here "
                f"{images[0][0]!r} and {images[1][0]!r}, or give the --split."
            )
    return dict(image for (image,) in found.values())


def check_cases(layout: Layout, chosen: dict[str, tuple[Path, ...]], held_out: set[Path]) -> None:
    """Raises a `ValueError` that names the case of which there are images among the chosen and the held-out ones."""
    known = {layout.case(path): path for path in sorted(held_out) if path.exists()}
    known.pop(None, None)
    for paths in chosen.values() if known else ():
        for path in paths:
            case = layout.case(path) if path.exists() and path not in held_out else None
            if case in known:
                raise ValueError(
                    f"{case} is in two splits: {path} is to be used, and {known[case]} is held out. A case may be in "
                    "one only; choose by --split_list, or give a name of its own to what is another case."
                )


def leave_out_copies(
    chosen: dict[str, tuple[Path, ...]], held_out: set[Path]
) -> tuple[dict[str, tuple[Path, ...]], list[tuple[Path, Path]]]:
    """The chosen images without those whose file is the same, byte for byte, as a held-out one, and the pairs found."""
    known = {file_digest(path): path for path in tqdm(sorted(held_out), desc="held-out images")}
    known.pop(None, None)
    kept, copies = {}, []
    for image_id, paths in tqdm(chosen.items(), desc="images"):
        found = [(path, known[digest]) for path in paths if known and (digest := file_digest(path)) in known]
        copies += found
        if not found:
            kept[image_id] = paths
    return kept, copies


def file_digest(path: Path) -> bytes | None:
    """`None` if there is no such file, which is said where its annotation is read."""
    try:
        return content_digest(path) if path.exists() else None
    except (OSError, EOFError, zlib.error):
        return None
