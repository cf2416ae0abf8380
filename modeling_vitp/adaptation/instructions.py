"""Questions about the labels: their options, and data sets of them for checks and controls."""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..data.layouts import LAYOUTS
from ..evaluation.comparison import Progress
from ..images.reading import has_8_bits
from ..instructions.making import kinds_of_questions
from ..tasks import TASKS
from . import runs
from .labels import TaskData

ALL = "all"  # split of `make_instructions` that stands for all images of a list


def make_all_questions(
    labels: TaskData, class_names: Mapping[str, str], folder: Path, seed: int, progress: Progress
) -> None:
    """Store questions about the training images, and about the test images for the controls.

    Args:
        labels: labeled images.
        class_names: phrases of classes.
        folder: folder of the data sets.
        seed: seed of the questions.
        progress: results of finished parts.
    """
    for split in ("train", "test"):

        def make(split: str = split) -> None:
            make_questions(labels, split, class_names, folder / split, seed)

        progress.result(f"instructions/{split}", make)


def make_questions(labels: TaskData, split: str, class_names: Mapping[str, str], output: Path, seed: int) -> None:
    """Store questions about the labels of a split.

    The pretraining draws its own from the same labels: those of the training images are for checks and estimates.
    Test images have no questions for the description of a box, which would be scored as captions.

    Args:
        labels: labeled images.
        split: `"train"` or `"test"`.
        class_names: phrases of classes.
        output: folder of the data set.
        seed: seed of the questions.
    """
    shutil.rmtree(output, ignore_errors=True)
    options = question_options(labels, split, class_names)
    if split == "test":
        subject = LAYOUTS[labels.layout].subject
        kinds = kinds_of_questions(subject)
        options["kinds"] = [kind for kind in kinds if kind != "region_caption"]
    runs.store_instructions(labels.root, options, output, seed)


def question_options(labels: TaskData, split: str, class_names: Mapping[str, str]) -> dict[str, Any]:
    """Return the options of questions about the labels of a split, as `annotation_options` of `vitp pretrain`.

    Questions for training are also about collages of 8-bit images.

    Args:
        labels, split, class_names: as for [`make_questions`].
    """
    subject = LAYOUTS[labels.layout].subject
    split_settings = labels.data["splits"][split]
    options: dict[str, Any] = {
        "layout": labels.layout,
        "split": "train" if split == "train" else ALL,
        "split_list": str(labels.lists[split]),
    }
    class_property = labels.data.get("class_property")
    if class_property:
        options["class_property"] = class_property
    if labels.config is not None and labels.layout != "yolo":  # The layout of YOLO finds its YAML file.
        options["files"] = str(labels.root / split_settings["annotations"])
    names = TASKS[labels.task].phrases(class_names, labels.data)
    if "files" in options:
        names = with_ignored_classes(names, labels, split, Path(options["files"]))
    if names:
        options["names"] = names
    tile = split_settings.get("tile")
    if subject == "objects" and tile is not None:
        options["window"] = tile["size"]
        options["overlap"] = tile["overlap"]
    if labels.data.get("bad_objects") == "skip":
        options["on_error"] = "skip"
    if split == "train" and subject in ("objects", "regions"):
        if all(has_8_bits(path) for path in labels.images[split]):
            options["collages"] = 1
    return options


def with_ignored_classes(
    names: Mapping[str, str | None], labels: TaskData, split: str, files: Path
) -> dict[str, str | None]:
    """Return the phrases of the annotated classes, `None` for the classes that the configuration leaves out.

    Args:
        names: phrases of classes.
        labels: labeled images.
        split: split of the images.
        files: file or folder of the annotations.
    """
    ignored_names = {name.casefold() for name in labels.data.get("leave_out", ())}
    if not names and not ignored_names:
        return {}
    class_property = labels.data.get("class_property")
    options = {"class_property": class_property} if class_property else {}
    layout = LAYOUTS[labels.layout](labels.root, annotations=files, **options)
    annotated_classes = layout.class_names()
    phrases = {}
    for label, phrase in names.items():
        # Test images may lack a class of `class_names`. For training images, `make_instructions` reports it.
        if split == "train" or label in annotated_classes:
            phrases[label] = phrase
    for label in annotated_classes:
        if label.casefold() in ignored_names:
            phrases[label] = None
    return phrases
