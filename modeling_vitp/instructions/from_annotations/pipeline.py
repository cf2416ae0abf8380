"""Pipeline of `make_instructions`: from its options to annotated images with questions."""

import re
import shlex
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from ...data.annotations import AnnotatedImage
from ...data.folders import UNSPLIT
from ...data.layouts import LAYOUTS, Layout, layouts_about, recognize_layout
from ...data.windows import windows_of
from ..arguments import AnnotationOptions
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
        rows = []
        for image, conversation in zip(self.images, self.conversations):
            if conversation:
                rows.append((image, conversation))
        return rows


def check_options(layout: Layout, options: AnnotationOptions) -> None:
    """Raise a `ValueError` if options of stored instructions do not fit the layout."""
    subject = layout.subject
    unknown_kinds = set(options.kinds or ()) - PHRASINGS[subject].keys()
    if unknown_kinds:
        kinds = ", ".join(PHRASINGS[subject])
        raise ValueError(f"Unknown kinds for {layout.name}: {', '.join(sorted(unknown_kinds))}. Known: {kinds}.")
    if options.window is not None and subject != "objects":
        raise ValueError(f"--window needs annotated boxes: {', '.join(layouts_about('objects'))}.")
    if options.collages and subject not in ("objects", "regions"):
        layouts = ", ".join(layouts_about("objects", "regions"))
        raise ValueError(f"--collages needs annotated boxes or masks: {layouts}.")


def check_output(root: Path, output_dir: Path) -> None:
    """Raise a `ValueError` if an output folder overlaps with the labels, or has files that were not made here."""
    resolved_root = root.resolve()
    resolved_output = output_dir.resolve()
    if resolved_output.is_relative_to(resolved_root) or resolved_root.is_relative_to(resolved_output):
        raise ValueError(f"--output_dir {output_dir} and the data set {root} overlap. Set another output folder.")
    for path in sorted(resolved_output.glob("*")):
        if not OWN_FILE.fullmatch(path.name):
            raise ValueError(f"--output_dir {output_dir} has other files, such as {path.name}. Set a new folder.")


def build_instructions(layout: Layout, options: AnnotationOptions, seed: int = 0) -> Instructions:
    """Read the annotations of a split and generate questions. The pixels of the images are not read.

    Args:
        layout: layout of the annotations, see [`~modeling_vitp.instructions.from_annotations.labels.open_layout`].
        options: options of the questions.
        seed: seed of the questions.

    Raises:
        ValueError: If no images are found, an annotation is invalid, or the annotations answer no question.
    """
    labeled = read_labeled_images(layout, options.split, options.split_list, options.on_error)
    images = list(labeled.images)
    if options.window is not None:
        images = []
        for scene in labeled.images:
            images += windows_of(scene, options.window, options.overlap)
    images += draw_collages(
        labeled.images,
        number=round(options.collages * len(images)),
        size=options.collage_size,
        grids=options.collage_grid,
        seed=seed,
    )
    vocabulary = vocabulary_of(images)
    asker = Asker(
        layout.subject,
        vocabulary,
        max_boxes=options.max_boxes,
        map_side=options.map_side,
        seed=seed,
        wordings=options.wordings,
    )
    kinds = options.kinds or list(PHRASINGS[layout.subject])
    conversations = make_conversations(images, asker, kinds, options.turns)
    if not any(conversations):
        raise ValueError(f"The annotation of {layout.root} answers no question of the kinds {', '.join(kinds)}.")
    return Instructions(images, conversations, vocabulary, labeled.copies)


def explain_labels(name: str) -> str | None:
    """Return advice for a folder of labeled images that is opened as conversations, or `None` for other data."""
    command = make_instructions_command(name)
    if command is None:
        return None
    return (
        f"Expected conversations in {name}, found labeled images. Train on them with `vitp pretrain --annotations "
        f"{shlex.quote(name)}`, or make instructions from them: {command}"
    )


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
    has_other_splits = splits and splits != [UNSPLIT]
    if has_other_splits and "train" not in splits:
        words += ["--split", splits[0]]
    words += ["--output_dir", f"{Path(folder).resolve().name}_instructions"]
    return shlex.join(words)
