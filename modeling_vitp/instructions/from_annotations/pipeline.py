"""Pipeline of `make_instructions`: from its options to annotated images with questions."""

import argparse
import re
import shlex
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from ...data.annotations import AnnotatedImage
from ...data.folders import UNSPLIT
from ...data.layouts import LAYOUTS, Layout, layouts_about, recognize_layout
from ...data.windows import windows_of
from .collages import draw_collages
from .labels import read_labeled_images
from .questions import PHRASINGS, Asker, Exchange, make_conversations, vocabulary_of

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


def check_options(layout: Layout, args: argparse.Namespace) -> None:
    """Raise a `ValueError` if the options of `make_instructions` do not fit the layout, or the folder is used."""
    subject = layout.subject
    unknown = set(args.kinds or ()) - PHRASINGS[subject].keys()
    if unknown:
        known = ", ".join(PHRASINGS[subject])
        raise ValueError(f"Unknown kinds for {layout.name}: {', '.join(sorted(unknown))}. Known: {known}.")
    if args.window is not None and subject != "objects":
        raise ValueError(f"--window needs annotated boxes: {', '.join(layouts_about('objects'))}.")
    if args.collages and subject not in ("objects", "regions"):
        known = ", ".join(layouts_about("objects", "regions"))
        raise ValueError(f"--collages needs annotated boxes or masks: {known}.")
    root, output_dir = args.root.resolve(), args.output_dir.resolve()
    if root in (output_dir, *output_dir.parents) or output_dir in root.parents:
        raise ValueError(
            f"--output_dir {args.output_dir} and the data set {args.root} overlap. Set another output folder."
        )
    foreign = sorted(path.name for path in output_dir.glob("*") if not OWN_FILE.fullmatch(path.name))
    if foreign:
        raise ValueError(f"--output_dir {args.output_dir} has other files, such as {foreign[0]}. Set a new folder.")


def build_instructions(layout: Layout, args: argparse.Namespace) -> Instructions:
    """Read the annotations of a split and generate questions. The pixels of the images are not read.

    Args:
        layout: layout of the annotations, see [`~modeling_vitp.instructions.from_annotations.labels.open_layout`].
        args: options of `make_instructions`.

    Raises:
        ValueError: If no images are found, an annotation is invalid, or the annotations answer no question.
    """
    labeled = read_labeled_images(layout, args.split, args.split_list, args.on_error)
    scenes = images = labeled.images
    if args.window is not None:
        images = [window for image in images for window in windows_of(image, args.window, args.overlap)]
    number = round(args.collages * len(images))
    images = images + draw_collages(scenes, number, args.collage_size, args.collage_grid, args.seed)
    vocabulary = vocabulary_of(images)
    asker = Asker(layout.subject, vocabulary, args.max_boxes, args.map_side, args.seed, args.wordings)
    conversations = make_conversations(images, asker, args.kinds, args.turns)
    if not any(conversations):
        raise ValueError(f"The annotation of {args.root} answers no question of the kinds {', '.join(args.kinds)}.")
    return Instructions(images, conversations, vocabulary, labeled.copies)


def make_instructions_command(folder: str | Path) -> str | None:
    """Return the command that makes instructions from an annotated folder, or `None` if it has no known layout."""
    name = recognize_layout(folder)
    if name is None:
        return None
    words = ["vitp", "make_instructions", name, str(folder)]
    try:
        splits = list(LAYOUTS[name](Path(folder)).splits())
    except ValueError:  # The command reports the error.
        splits = []
    if splits and "train" not in splits and splits != [UNSPLIT]:
        words += ["--split", splits[0]]
    return shlex.join([*words, "--output_dir", f"{Path(folder).resolve().name}_instructions"])
