"""Pipeline of `make_instructions`: from its options to annotated images with questions."""

import argparse
import re
import shlex
import sys
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from ...data.annotation_files import read_annotation, read_list
from ...data.annotations import AnnotatedImage
from ...data.layouts import LAYOUTS, Layout, layouts_about, recognize_layout
from ...data.leaks import check_case_splits, leave_out_copies
from ...data.splits import choose_split
from ...data.windows import windows_of
from ...images.reading import below
from .collages import draw_collages
from .questions import PHRASINGS, Asker, Exchange, make_conversations, vocabulary_of

LAYOUT_OPTIONS = ("plane", "intensities", "percentiles", "class_property")  # of some layouts only
OWN_FILE = re.compile(r"\..*|README\.md|.+-\d{5}\.parquet")  # in the output folder; hidden files are ignored


@dataclass
class Instructions:
    """Images with questions about them.

    Args:
        images: all images, windows and collages, including those without questions.
        conversations: questions about each image.
        vocabulary: number of images of each class.
        copies: excluded files, each with the identical held-out file.
    """

    images: list[AnnotatedImage]
    conversations: list[list[Exchange]]
    vocabulary: Counter
    copies: list[tuple[Path, Path]]

    @property
    def rows(self) -> list[tuple[AnnotatedImage, list[Exchange]]]:
        """Images that have questions, with their questions."""
        return [(image, asked) for image, asked in zip(self.images, self.conversations) if asked]


def option_error(args: argparse.Namespace) -> str | None:
    """Return an error message if the options of `make_instructions` are invalid, or `None`."""
    if args.layout not in LAYOUTS:
        return f"Unknown layout {args.layout!r}. Known: {', '.join(sorted(LAYOUTS))}; others by --plugins."
    subject = LAYOUTS[args.layout].subject
    unknown = set(args.kinds or ()) - PHRASINGS[subject].keys()
    if unknown:
        return f"Unknown kinds for {args.layout}: {', '.join(sorted(unknown))}. Known: {', '.join(PHRASINGS[subject])}."
    if args.window is not None and subject != "objects":
        return f"--window needs annotated boxes: {', '.join(layouts_about('objects'))}."
    if args.collages and subject not in ("objects", "regions"):
        return f"--collages needs annotated boxes or masks: {', '.join(layouts_about('objects', 'regions'))}."
    for option in LAYOUT_OPTIONS:
        if getattr(args, option) is not None and option not in LAYOUTS[args.layout].options:
            return f"--{option} needs the layout {layouts_with(option)}."
    if args.layout == "volumes" and args.intensities is None and args.percentiles is None:
        return "Volumes need --intensities LOW HIGH, or --percentiles LOW HIGH: the values shown as black and white."
    root, output_dir = args.root.resolve(), args.output_dir.resolve()
    if root in (output_dir, *output_dir.parents) or output_dir in root.parents:
        return f"--output_dir {args.output_dir} and the data set {args.root} overlap. Set another output folder."
    foreign = sorted(path.name for path in output_dir.glob("*") if not OWN_FILE.fullmatch(path.name))
    if foreign:
        return f"--output_dir {args.output_dir} has other files, such as {foreign[0]}. Set a new folder."
    return None


def layouts_with(option: str) -> str:
    """Return the names of the layouts that have an option."""
    return " or ".join(sorted(name for name, layout in LAYOUTS.items() if option in layout.options))


@dataclass
class LabeledImages:
    """Labeled images of a split.

    Args:
        layout: layout of the labels.
        images: images with their labels.
        copies: excluded files, each with the identical held-out file.
    """

    layout: Layout
    images: list[AnnotatedImage]
    copies: list[tuple[Path, Path]]


def read_labeled_images(root: Path, args: Any, split: str, split_list: Path | None = None) -> LabeledImages:
    """Read the labels of a split. The pixels of the images are not read, but those of masks are.

    Args:
        root: folder of the labeled images.
        args: options `layout`, `names` (a mapping, or a JSON file), `annotations`, `on_error` and `LAYOUT_OPTIONS`.
        split: split of the images, see [`choose_split`].
        split_list: file with the names of the images to read, one per line; all images of the split if `None`.

    Raises:
        ValueError: If no images are found, or a label is invalid.
    """
    names = read_annotation(args.names) if isinstance(args.names, Path) else args.names
    options = {name: getattr(args, name) for name in LAYOUT_OPTIONS if getattr(args, name) is not None}
    found = recognize_layout(root) if args.layout == "folders" else None
    if found not in (None, "folders"):
        raise ValueError(
            f"{root} has the layout {found!r}, whose folders are not classes. Run vitp make_instructions {found}."
        )
    layout = LAYOUTS[args.layout](root, names, args.annotations, **options)
    listed = read_list(split_list) if split_list else None
    if listed == []:
        raise ValueError(f"Expected the name of an image in each line of {split_list}, found no name.")
    chosen, held_out = choose_split(layout, split, listed)
    check_case_splits(layout, chosen, held_out)
    chosen, copies = leave_out_copies(chosen, held_out)
    for path, other in copies:
        print(f"{path} is excluded: it is identical to the held-out {other}.", file=sys.stderr)
    images = annotate_all(layout, chosen, args.on_error)
    if layout.subject in ("objects", "scene"):  # masks have values instead of class names, and may lack some of them
        check_names(layout)
    return LabeledImages(layout, images, copies)


def build_instructions(args: argparse.Namespace) -> Instructions:
    """Read the annotations of a split and generate questions. The pixels of the images are not read.

    Raises:
        ValueError: If no images are found, an annotation is invalid, or the annotations answer no question.
    """
    labeled = read_labeled_images(args.root, args, args.split, args.split_list)
    scenes = images = labeled.images
    if args.window is not None:
        images = [window for image in images for window in windows_of(image, args.window, args.overlap)]
    number = round(args.collages * len(images))
    images = images + draw_collages(scenes, number, args.collage_size, args.collage_grid, args.seed)
    vocabulary = vocabulary_of(images)
    asker = Asker(labeled.layout.subject, vocabulary, args.max_boxes, args.map_side, args.seed, args.wordings)
    conversations = make_conversations(images, asker, args.kinds, args.turns)
    if not any(conversations):
        raise ValueError(f"The annotation of {args.root} answers no question of the kinds {', '.join(args.kinds)}.")
    return Instructions(images, conversations, vocabulary, labeled.copies)


def check_names(layout: Layout) -> None:
    """Raise a `ValueError` if a class of --names occurs in no split. Images are read until all classes are found."""
    for image_id, paths in (item for images in layout.splits().values() for item in images.items()):
        if layout.names.keys() <= layout.found:
            return
        with suppress(Exception):  # an image that is not used may be invalid
            layout.annotate(image_id, paths)
    if wrong := sorted(layout.names.keys() - layout.found):
        found = ", ".join(sorted(layout.found))
        raise ValueError(
            f"--names: class {wrong[0]!r} not found in {layout.root}. Found: {found}. Correct or remove it."
        )


def annotate_all(layout: Layout, chosen: dict[str, tuple[Path, ...]], on_error: str = "raise") -> list[AnnotatedImage]:
    """Read the annotations of all images.

    Args:
        chosen: files of the images, by id. Images outside of the layout's root are invalid, also through links.
        on_error: "raise" raises an error for an invalid annotation; "skip" reports it and excludes the image.

    Raises:
        ValueError: If an annotation is invalid, or no image is left; the message names the image or the annotation.
    """
    images = []
    for image_id, paths in tqdm(chosen.items(), desc="annotations"):
        try:
            for path in paths:
                below(layout.root, path)
            images += layout.annotate(image_id, paths)
        except Exception as error:  # Files with unexpected content raise many types.
            message = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
            if str(layout.root) not in message and str(layout.annotations) not in message:
                message = f"{paths[0]}: its annotation cannot be read: {message}"
            if on_error == "raise":
                raise ValueError(message) from error
            print(f"{image_id} is excluded: {message}", file=sys.stderr)
    if not images:
        raise ValueError(f"No valid annotations found in {layout.root}.")
    return images


def make_instructions_command(folder: str | Path) -> str | None:
    """Return the command that makes instructions from an annotated folder, or `None` if it has no known layout.

    If the layout needs `--names`, the command names the file `names.json`, which the user must write.
    """
    name = recognize_layout(folder)
    if name is None:
        return None
    words = ["vitp", "make_instructions", name, str(folder), *LAYOUTS[name].required_options]
    try:
        splits = LAYOUTS[name](Path(folder), {"0": None}).splits()
    except ValueError:  # The command reports the error.
        splits = {}
    if splits and "train" not in splits:
        words += ["--split", next(iter(splits))]
    return shlex.join([*words, "--output_dir", f"{Path(folder).resolve().name}_instructions"])
