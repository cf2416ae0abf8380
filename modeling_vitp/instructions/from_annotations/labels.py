"""Labels that questions are asked about: opened with the same defaults for drawn and for stored questions."""

import os
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from ...data.annotation_files import read_list
from ...data.annotations import AnnotatedImage
from ...data.folders import UNSPLIT
from ...data.layouts import LAYOUTS, Layout, recognize_layout
from ...data.leaks import check_case_splits, leave_out_copies
from ...data.splits import choose_split
from ...images.reading import below
from .questions import KINDS, PHRASINGS

LAYOUT_OPTIONS = ("plane", "intensities", "percentiles", "class_property")  # of some layouts only
MOST_NAMES = 20  # Number of default names that are printed.


def open_layout(root: str | Path, options: Any) -> Layout:
    """Open the labels of a folder. No image is read. Options that are not set have the defaults of the layout.

    Args:
        root: folder of the labeled images.
        options: fields of [`~modeling_vitp.instructions.arguments.AnnotationOptions`].

    Raises:
        ValueError: If the folder has no known layout, or the layout does not have one of the options.
    """
    root = absolute(root)
    name = layout_name(root, options.layout)
    check_kinds(name, options.kinds or ())
    settings = {}
    for option in LAYOUT_OPTIONS:
        value = getattr(options, option)
        if value is None:
            continue
        if option not in LAYOUTS[name].options:
            raise ValueError(f"{option} needs the layout {layouts_with(option)}, got {name}.")
        settings[option] = value
    annotations = absolute(options.files) if options.files else None
    return LAYOUTS[name](root, options.names, annotations, **settings)


def layout_name(root: Path, option: str | None) -> str:
    """Return the name of the layout that is set by the option, or else recognized from the files in the folder."""
    name = option or recognize_layout(root)
    if name is None:
        raise ValueError(
            f"Expected labeled images in {root} in one of the layouts {', '.join(LAYOUTS)}, found none of them. See "
            "recipes/make_instructions.md for their files."
        )
    if name not in LAYOUTS:
        raise ValueError(f"Unknown layout {name!r}. Known: {', '.join(LAYOUTS)}; others by plugins.")
    if option == "folders":
        # Every layout has folders. The names of those of another layout would silently be taken for classes.
        recognized_name = recognize_layout(root)
        if recognized_name not in (None, "folders"):
            raise ValueError(
                f"{root} has the layout {recognized_name!r}, whose folders are not classes. Set the layout "
                f"{recognized_name!r}."
            )
    return name


def check_kinds(name: str, kinds: Sequence[str]) -> None:
    """Raise a `ValueError` for an unknown kind of question, with the kinds of the layout."""
    for kind in kinds:
        if kind not in KINDS:
            kinds_of_layout = ", ".join(PHRASINGS[LAYOUTS[name].subject])
            raise ValueError(f"kinds: unknown kind {kind!r}. Those of the layout {name}: {kinds_of_layout}.")


def describe_default_names(layout: Layout) -> str | None:
    """Return a sentence with the default names of a layout, or `None` if it has names of its own or needs none."""
    if not layout.has_default_names:
        return None
    descriptions = []
    for value, phrase in layout.names.items():
        description = "the background" if phrase is None else repr(phrase)
        descriptions.append(f"{value} is {description}")
    names = ", ".join(descriptions[:MOST_NAMES])
    if len(descriptions) > MOST_NAMES:
        names += f" and {len(descriptions) - MOST_NAMES} more"
    return f"names of the masks by default: {names}. Set other phrases with names."


def absolute(path: str | Path) -> Path:
    """Return an absolute path. Links are kept, so that annotations stay below the root that they were named in."""
    return Path(os.path.abspath(path))


def layouts_with(option: str) -> str:
    """Return the names of the layouts that have an option."""
    names = [name for name, layout in LAYOUTS.items() if option in layout.options]
    return " or ".join(sorted(names))


@dataclass
class LabeledImages:
    """Labeled images of a split.

    Args:
        images: images with their labels.
        copies: excluded files, each with the identical held-out file.
    """

    images: list[AnnotatedImage]
    copies: list[tuple[Path, Path]]


def read_labeled_images(
    layout: Layout,
    split: str,
    split_list: str | Path | None = None,
    on_error: str = "raise",
) -> LabeledImages:
    """Read the labels of a split. The pixels of the images are not read, but those of masks are.

    Args:
        layout: layout of the labels, see [`open_layout`].
        split: split of the images, see [`choose_split`]. In a folder without splits, `train` has all images.
        split_list: file with the names of the images to read, one per line; all images of the split if `None`.
        on_error: see [`annotate_all`].

    Raises:
        ValueError: If no images are found, or a label is invalid.
    """
    listed_names = read_list(Path(split_list)) if split_list else None
    if listed_names == []:
        raise ValueError(f"Expected the name of an image in each line of {split_list}, found no name.")
    if split == "train" and list(layout.split_images) == [UNSPLIT]:
        split = UNSPLIT
    paths_by_id, held_out_paths = choose_split(layout, split, listed_names)
    check_case_splits(layout, paths_by_id, held_out_paths)
    paths_by_id, copies = leave_out_copies(paths_by_id, held_out_paths)
    for path, held_out_path in copies:
        print(f"{path} is excluded: it is identical to the held-out {held_out_path}.", file=sys.stderr)
    images = annotate_all(layout, paths_by_id, on_error)
    if layout.subject in ("objects", "scene"):  # masks have values instead of class names, and may lack some of them
        check_names(layout)
    return LabeledImages(images, copies)


def check_names(layout: Layout) -> None:
    """Raise a `ValueError` if a class of --names occurs in no split. Images are read until all classes are found."""
    for paths_by_id in layout.split_images.values():
        for image_id, paths in paths_by_id.items():
            if layout.names.keys() <= layout.found:
                return
            with suppress(Exception):  # an image that is not used may be invalid
                layout.annotate(image_id, paths)
    missing_classes = sorted(layout.names.keys() - layout.found)
    if missing_classes:
        classes = ", ".join(sorted(layout.found))
        raise ValueError(
            f"--names: class {missing_classes[0]!r} not found in {layout.root}. Found: {classes}. Correct or remove it."
        )


def annotate_all(
    layout: Layout,
    paths_by_id: dict[str, tuple[Path, ...]],
    on_error: str = "raise",
) -> list[AnnotatedImage]:
    """Read the annotations of all images.

    Args:
        paths_by_id: files of the images, by id. Images outside of the layout's root are invalid, also through links.
        on_error: "raise" raises an error for an invalid annotation; "skip" reports it and excludes the image.

    Raises:
        ValueError: If an annotation is invalid, or no image is left; the message names the image or the annotation.
    """
    images = []
    for image_id, paths in tqdm(paths_by_id.items(), desc="annotations"):
        try:
            for path in paths:
                below(layout.root, path)
            images += layout.annotate(image_id, paths)
        except Exception as error:  # Files with unexpected content raise many types.
            message = describe_error(error, layout, paths[0])
            if on_error == "raise":
                raise ValueError(message) from error
            print(f"{image_id} is excluded: {message}", file=sys.stderr)
    if not images:
        raise ValueError(f"No valid annotations found in {layout.root}.")
    return images


def describe_error(error: Exception, layout: Layout, path: Path) -> str:
    """Return the message of an error in the annotation of an image, with the image if the message names no file."""
    message = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
    names_file = str(layout.root) in message or str(layout.annotations) in message
    if not names_file:
        message = f"{path}: its annotation cannot be read: {message}"
    return message
