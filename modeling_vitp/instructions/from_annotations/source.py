"""Labeled images of a folder as training data: drawn views of one split, and fixed windows of another."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset

from ...data.annotations import AnnotatedImage
from ...data.layouts import Layout
from .drawing import DrawnInstructions, ViewSettings, encode_picture, messages_of
from .labels import open_layout, read_labeled_images
from .questions import PHRASINGS, Asker, make_conversations, vocabulary_of
from .storage import FEATURES

MOST_WINDOWS = 500  # Number of windows of a test split that are stored.
MOST_QUESTIONS = 20  # About a window of the test split.
AS_CAPTION = "region_caption"  # Kind whose answers would be scored as captions.


@dataclass
class LabelSource:
    """Folder of labeled images, with the options of its instructions.

    Args:
        layout: layout of the folder.
        options: fields of [`~modeling_vitp.instructions.arguments.AnnotationOptions`].
    """

    layout: Layout
    options: Any

    @classmethod
    def open(cls, root: str | Path, options: Any) -> "LabelSource":
        """Open the labels of a folder, see [`open_layout`]."""
        return cls(open_layout(root, options), options)

    @property
    def splits(self) -> list[str]:
        """Names of the splits."""
        return list(self.layout.split_images)

    @property
    def kinds(self) -> list[str]:
        """Kinds of questions: those of the options that the labels can answer, or else all that they can answer."""
        possible_kinds = list(PHRASINGS[self.layout.subject])
        if not self.options.kinds:
            return possible_kinds
        return [kind for kind in self.options.kinds if kind in possible_kinds] or possible_kinds

    def images(self, split: str, split_list: str | None = None) -> list[AnnotatedImage]:
        """Read the labels of a split, see [`read_labeled_images`]."""
        return read_labeled_images(self.layout, split, split_list, self.options.on_error).images

    def draw(self, seed: int) -> DrawnInstructions:
        """Return the transform that draws views of the training images and conversations about them."""
        options = self.options
        images = self.images(options.split, options.split_list)
        asker = Asker(
            self.layout.subject,
            vocabulary_of(images),
            max_boxes=options.max_boxes,
            map_side=options.map_side,
            seed=seed,
            wordings=options.wordings,
        )
        settings = ViewSettings(
            window=options.window,
            scale=tuple(options.scale),
            turn=options.turn,
            mosaics=options.mosaics,
            collages=options.collages,
            collage_grid=tuple(options.collage_grid),
            collage_size=options.collage_size,
        )
        drawn = DrawnInstructions(images, asker, self.kinds, options.turns, settings)
        drawn.settings["intensities"] = options.intensities
        drawn.settings["percentiles"] = options.percentiles
        return drawn

    def store(self, drawn: DrawnInstructions, images: Sequence[AnnotatedImage]) -> Dataset:
        """Return rows of fixed windows of images, with a question of each kind that their labels answer.

        Args:
            drawn: transform of the training images, whose classes are asked for.
            images: labeled images. At most `MOST_WINDOWS` windows, spread over them, are used.
        """
        views = []
        for image in images:
            views += drawn.fixed_views(image, self.options.overlap)
        num_windows = min(MOST_WINDOWS, len(views))
        positions = np.linspace(0, len(views) - 1, num_windows)
        views = [views[index] for index in positions.round().astype(int)]
        kinds = [kind for kind in self.kinds if kind != AS_CAPTION]
        conversations = make_conversations(views, drawn.asker, kinds, MOST_QUESTIONS)
        rows = []
        for view, exchanges in zip(views, conversations):
            if not exchanges:
                continue
            pictures = [encode_picture(picture) for picture in drawn.scenes.render(view)]
            row = {
                "id": view.id,
                "images": pictures,
                "messages": messages_of(exchanges),
            }
            rows.append(row)
        return Dataset.from_list(rows, features=FEATURES)
