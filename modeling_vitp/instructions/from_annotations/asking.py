"""From the options of `make_instructions` to the images of a data set with the questions about each."""

import argparse
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from . import annotations
from .annotations import AnnotatedImage
from .collages import draw_collages
from .layouts import LAYOUTS
from .options import layout_options
from .questions import Asker, Exchange, make_conversations
from .windows import windows_of


@dataclass
class Asked:
    """
    Args:
        images: all images, windows and collages, also those about which nothing is asked.
        conversations: the questions about each.
        vocabulary: class -> number of images that have it.
        copies: files that are left out, with the held-out file that is the same.
    """

    images: list[AnnotatedImage]
    conversations: list[list[Exchange]]
    vocabulary: Counter
    copies: list[tuple[Path, Path]]

    @property
    def rows(self) -> list[tuple[AnnotatedImage, list[Exchange]]]:
        """The images about which something is asked, with the questions."""
        return [(image, asked) for image, asked in zip(self.images, self.conversations) if asked]


def ask_about_images(args: argparse.Namespace) -> Asked:
    """Reads the annotations of a split and asks about its images, which are not read.

    Raises:
        ValueError: if there are no images, their annotation cannot be used, or nothing can be asked.
    """
    names = annotations.read_annotation(args.names) if args.names else None
    layout = LAYOUTS[args.layout](args.root, names, args.annotations, **layout_options(args))
    listed = annotations.read_list(args.split_list) if args.split_list else None
    chosen, held_out = annotations.choose_split(layout, args.split, listed)
    annotations.check_cases(layout, chosen, held_out)
    chosen, copies = annotations.leave_out_copies(chosen, held_out)
    for path, other in copies:
        print(f"{path} is left out: the same file as the held-out {other}.", file=sys.stderr)

    scenes = images = annotations.annotate_all(layout, chosen, args.on_error)
    if args.window is not None:
        images = [window for image in images for window in windows_of(image, args.window, args.overlap)]
    number = round(args.collages * len(images))
    images = images + draw_collages(scenes, number, args.collage_size, args.collage_grid, args.seed)
    vocabulary = Counter(label for image in images for label in sorted(image.classes))
    asker = Asker(layout.subject, vocabulary, args.max_boxes, args.map_side, args.seed)
    asked = Asked(images, make_conversations(images, asker, args.kinds, args.turns), vocabulary, copies)
    if not asked.rows:
        raise ValueError(f"The annotation of {args.root} answers no question of the kinds {', '.join(args.kinds)}.")
    return asked
