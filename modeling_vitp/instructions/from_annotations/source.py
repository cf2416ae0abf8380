"""Labeled images of a folder as training data: drawn views of one split, and fixed windows of another."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from datasets import Dataset

from ...data.annotations import AnnotatedImage, mask_key, read_mask_values
from ...data.folders import UNSPLIT
from ...data.layouts import LAYOUTS, Layout, recognize_layout
from .drawing import DrawnInstructions, ViewSettings, encode_picture, messages_of
from .pipeline import LAYOUT_OPTIONS, layouts_with, read_labeled_images
from .questions import KINDS, PHRASINGS, Asker, make_conversations, vocabulary_of
from .storage import FEATURES

MOST_WINDOWS = 500  # Number of windows of a test split that are stored.
DEFAULT_PERCENTILES = [1.0, 99.0]  # Of volumes, if the options have no intensities.
MOST_QUESTIONS = 20  # About a window of the test split.
BACKGROUND = ("0", "0,0,0")  # Values of masks that are the background if they have no names.
AS_CAPTION = "region_caption"  # Kind whose answers would be scored as captions.


@dataclass
class LabelSource:
    """Folder of labeled images, with the options of its instructions.

    Args:
        root: folder of the labeled images.
        options: fields of [`~modeling_vitp.pretraining.arguments.AnnotationOptions`].
        reading: options of [`read_labeled_images`].
        layout: layout of the folder.
    """

    root: Path
    options: Any
    reading: SimpleNamespace
    layout: Layout

    @classmethod
    def open(cls, root: str | Path, options: Any) -> "LabelSource":
        """Recognize the layout of a folder. No image is read, except for the values of masks without names.

        Raises:
            ValueError: If the folder has no known layout, or the layout does not have one of the options.
        """
        root = Path(root).resolve()
        name = options.layout or recognize_layout(root)
        if name not in LAYOUTS:
            raise ValueError(
                f"Expected labeled images in {root} in one of the layouts {', '.join(LAYOUTS)}, found "
                f"{name or 'none of them'}. See recipes/make_instructions.md for their files."
            )
        for kind in options.kinds or ():
            if kind not in KINDS:
                known = ", ".join(PHRASINGS[LAYOUTS[name].subject])
                raise ValueError(f"kinds: unknown kind {kind!r}. Those of the layout {name}: {known}.")
        for option in LAYOUT_OPTIONS:
            if getattr(options, option) is not None and option not in LAYOUTS[name].options:
                raise ValueError(f"{option} needs the layout {layouts_with(option)}, got {name}.")
        reading = SimpleNamespace(
            layout=name,
            annotations=Path(options.files) if options.files else None,
            names=options.names,
            on_error=options.on_error,
            **{option: getattr(options, option) for option in LAYOUT_OPTIONS},
        )
        if name == "volumes" and reading.intensities is None and reading.percentiles is None:
            reading.percentiles = DEFAULT_PERCENTILES
        if name == "masks" and not reading.names:
            reading.names = names_of_values(root, reading.annotations)
        settings = {option: getattr(reading, option) for option in LAYOUT_OPTIONS}
        settings = {option: value for option, value in settings.items() if value is not None}
        return cls(root, options, reading, LAYOUTS[name](root, reading.names, reading.annotations, **settings))

    @property
    def splits(self) -> list[str]:
        """Names of the splits."""
        return list(self.layout.splits())

    @property
    def train_split(self) -> str:
        """Name of the split to train on; all images of a folder without splits."""
        return UNSPLIT if self.splits == [UNSPLIT] and self.options.split == "train" else self.options.split

    @property
    def kinds(self) -> list[str]:
        """Kinds of questions: those of the options that the labels can answer, or else all that they can answer."""
        known = list(PHRASINGS[self.layout.subject])
        return [kind for kind in self.options.kinds or known if kind in known] or known

    def images(self, split: str, split_list: str | None = None) -> list[AnnotatedImage]:
        """Read the labels of a split, see [`read_labeled_images`]."""
        return read_labeled_images(self.root, self.reading, split, Path(split_list) if split_list else None).images

    def draw(self, seed: int) -> DrawnInstructions:
        """Return the transform that draws views of the training images and conversations about them."""
        options = self.options
        images = self.images(self.train_split, options.split_list)
        asker = Asker(
            self.layout.subject, vocabulary_of(images), options.max_boxes, options.map_side, seed, options.wordings
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
        drawn.settings |= {"intensities": self.reading.intensities, "percentiles": self.reading.percentiles}
        return drawn

    def store(self, drawn: DrawnInstructions, images: Sequence[AnnotatedImage]) -> Dataset:
        """Return rows of fixed windows of images, with a question of each kind that their labels answer.

        Args:
            drawn: transform of the training images, whose classes are asked for.
            images: labeled images. At most `MOST_WINDOWS` windows, spread over them, are used.
        """
        views = [view for image in images for view in drawn.fixed_views(image, self.options.overlap)]
        chosen = np.linspace(0, len(views) - 1, min(MOST_WINDOWS, len(views))).round().astype(int)
        views = [views[index] for index in chosen]
        kinds = [kind for kind in self.kinds if kind != AS_CAPTION]
        rows = []
        for view, exchanges in zip(views, make_conversations(views, drawn.asker, kinds, MOST_QUESTIONS)):
            if exchanges:
                encoded = [encode_picture(picture) for picture in drawn.scenes.render(view)]
                rows.append({"id": view.id, "images": encoded, "messages": messages_of(exchanges)})
        return Dataset.from_list(rows, features=FEATURES)


def names_of_values(root: Path, annotations: Path | None) -> dict[str, str | None]:
    """Return phrases for the values of masks without names: `class 1` …, and `None` for 0 or black, the background."""
    values: set[str] = set()
    for path in LAYOUTS["masks"](root, {"0": None}, annotations).mask_files():
        numbers, is_color = read_mask_values(path)
        values.update(mask_key(value, is_color) for value in np.unique(numbers).tolist())
    return {value: None if value in BACKGROUND else f"class {value}" for value in sorted(values)}
