"""Labels of a folder: their task, and training, validation and test images that share no scene."""

import dataclasses
import hashlib
import json
import math
import os
import statistics
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..command.paths import config_of_data, read_yaml
from ..data.annotation_files import STATISTICS, read_list
from ..data.files import FileSample
from ..data.folders import UNSPLIT
from ..data.layouts import LAYOUTS, Layout, layouts_about, layouts_of, recognize_layout
from ..data.scenes import MIN_IMAGES, draw_splits, find_scenes
from ..data.windows import object_windows
from ..images.reading import stored_size
from ..instructions.mixture import load_sources
from ..tasks import TASKS, Task, find_task
from ..training.checkpointing import write_whole

SPLITS = {"train": "training", "val": "validation", "test": "testing"}
# Sides in pixels of images that are cut into windows, and of these windows.
LARGE = 1536
WINDOW = 1024
OVERLAP = 200
# Command and page for the layouts that no task reads.
SINGLE_COMMANDS = {
    "volumes": ("finetune_segmentation", "medical.md"),
    "changes": ("finetune_change_detection", "finetune_segmentation.md"),
}
# Settings of a fine-tuning that its data or `adapt` replace.
SETTINGS_OF_RUNS = {
    "data",
    "output_dir",
    "seed",
    "model_name_or_path",
    "eval_split",
    "test_split",
    "submission",
}
TABLES = {".csv", ".tsv", ".parquet", ".xlsx"}


@dataclass(frozen=True)
class TaskData:
    """Labeled images of a task with three splits.

    Args:
        task: name of the task, see [`~modeling_vitp.tasks.TASKS`].
        layout: layout of the labels in `make_instructions`.
        root: folder of the labels.
        data: setting `data` of fine-tuning and probes, with the splits `train`, `val` and `test`.
        images: image files by split.
        how: sentence that says how the images are split.
        settings: further settings of fine-tuning, such as `{"task": "oriented"}` of detection.
        lists: file of each split with the path of an image below the root in each line, as `--split_list` of
            `make_instructions` takes it, with `--split all` for other splits than `train`.
        test_scenes: number of scenes of the test images, see [`find_scenes`].
        config: configuration of `vitp finetune_detection` that names the labels; `None` for a folder.
    """

    task: str
    layout: str
    root: Path
    data: dict[str, Any]
    images: dict[str, list[Path]]
    how: str
    settings: dict[str, Any]
    lists: dict[str, Path]
    test_scenes: int = 0
    config: Path | None = None

    @property
    def window(self) -> int | None:
        """Side of the windows that training images are cut into; `None` if they are not cut."""
        return self.data["splits"]["train"].get("tile", {}).get("size")


@dataclass(frozen=True)
class LabeledSplits:
    """Splits that the labels have, and those that are drawn from their training images.

    Args:
        classes: classes in each image, by split of the labels.
        drawn_splits: missing splits, which are drawn from the training images.
        scenes: scene of each training image.
        criterion: what the training images are split by; empty if no split is drawn.
    """

    classes: dict[str, dict[Path, set]]
    drawn_splits: list[str]
    scenes: np.ndarray
    criterion: str

    @property
    def training_classes(self) -> dict[Path, set]:
        """Classes in each training image of the labels, from which missing splits are drawn."""
        return self.classes["train"]

    @property
    def classes_of_images(self) -> dict[Path, set]:
        """Classes in each image of all splits."""
        classes_of_images = {}
        for split_classes in self.classes.values():
            classes_of_images.update(split_classes)
        return classes_of_images


def read_labels(
    root: str | Path,
    folder: str | Path,
    task: str | None = None,
    scene_pattern: str | None = None,
    seed: int = 0,
) -> TaskData:
    """Recognize the task of labels, and split their images into training, validation and test images.

    Splits of the labels are kept. A validation or a test split that is missing, or has no labels, is drawn from the
    training images: 15% of them, by scene if scenes can be told apart, see [`find_scenes`]. All images and labels are
    read and checked. Large images with boxes get the setting `tile`.

    Args:
        root: folder of the images and labels, in a layout of `make_instructions`: boxes, masks, class folders or a
            table of classes; or a configuration of `vitp finetune_detection`, whose `task` and `data` are used.
        folder: folder for the lists of the splits. If it has lists of the same images, their splits are kept.
        task: task, or for boxes also `"horizontal"`, `"oriented"` or `"instances"`. Default: the task of the layout,
            with oriented boxes for DOTA and horizontal boxes for other formats.
        scene_pattern: regular expression whose first group, in the path of an image below the root, is the scene.
        seed: seed of the draw.

    Raises:
        ValueError: If no labels are found, a file is invalid, there are too few classes, images or scenes, a split has
            no labels, two given splits share an image, or the lists in `folder` are of other images.
    """
    folder = Path(folder).resolve()
    labels, layout = recognize_labels(root, folder, task)
    classes = read_classes(labels)
    labels.data["classes"] = TASKS[labels.task].class_names(labels.data, classes)
    training_classes = set().union(*classes["train"].values())
    check_classes(training_classes, labels.task, f"the training images of {labels.root}")
    splits = find_drawn_splits(classes, labels.root, layout, scene_pattern)

    lists = {split: folder / f"{split}.txt" for split in SPLITS}
    if all(path.is_file() for path in lists.values()):
        images = read_images(lists, labels.root)
        check_listed(images, splits, folder)
    else:
        images = choose_images(splits, seed)
    check_splits(images, splits, labels.root)
    scene_of = scenes_of_images(splits, labels.root, layout, scene_pattern)

    labels.data["splits"] = listed_splits(labels, splits.drawn_splits, images["train"], lists)
    check_image_files(labels.task, labels.data, images)
    for split, path in lists.items():
        write_list(path, labels.root, images[split])
    for split in ("val", "test"):  # Their scores are resampled by scene.
        cases_file = write_cases(folder, split, images[split], labels.root, scene_of)
        if cases_file is not None:
            labels.data["splits"][split].setdefault("cases", str(cases_file))
    test_scenes = {scene_of[path] for path in images["test"]}
    return dataclasses.replace(
        labels,
        images=images,
        how=describe_splits(images, splits),
        lists=lists,
        test_scenes=len(test_scenes),
    )


def recognize_labels(root: str | Path, folder: Path, task: str | None) -> tuple[TaskData, Layout]:
    """Return the labels without their images and lists, and their layout.

    Args:
        root: folder of the images and labels, or a configuration.
        folder: folder for the lists of the splits.
        task: task, see [`read_labels`].
    """
    config = config_of_data(root)
    if config is not None:
        return recognize_labels_of_config(config, folder, task)
    root = Path(root).resolve()
    check_outside(folder, root)
    task_name, layout_name, settings = choose_task(root, task)
    layout = LAYOUTS[layout_name](root)
    data = infer_data(root, task_name, layout)
    labels = TaskData(
        task=task_name,
        layout=layout_name,
        root=root,
        data=data,
        images={},
        how="",
        settings=settings,
        lists={},
    )
    return labels, layout


def recognize_labels_of_config(config: Path, folder: Path, task: str | None) -> tuple[TaskData, Layout]:
    """Return the labels of a configuration without their images and lists, and their layout.

    Args:
        config, folder, task: as for [`recognize_labels`].
    """
    labels = labels_of_config(config, folder)
    check_outside(folder, labels.root)
    variant = labels.settings["task"]
    if task not in (None, labels.task, variant):
        raise ValueError(f"Expected the task {variant!r} of {config}, got {task!r}.")
    if not labels.root.is_dir():
        raise ValueError(f"Folder {labels.root} of the labels not found: {config} expects the images and labels there.")
    labeled_splits = {}
    for split in SPLITS:
        split_settings = labels.data["splits"].get(split, {})
        if "annotations" in split_settings:
            labeled_splits[split] = split_settings
    labels = dataclasses.replace(
        labels,
        data={**labels.data, "splits": labeled_splits},
        settings={"task": variant},
        config=config,
    )
    return labels, LAYOUTS[labels.layout](labels.root)


def check_outside(folder: Path, root: Path) -> None:
    """Raise a `ValueError` if the folder for the lists is in the folder of the labels."""
    if folder.is_relative_to(root):  # its files would be read as images and labels
        raise ValueError(f"Expected a folder outside of the labels {root}, got {folder}. Set another folder.")


def read_classes(labels: TaskData) -> dict[str, dict[Path, set]]:
    """Read the labels, and return the classes in each image, by split of the labels."""
    classes = {}
    for split in labels.data["splits"]:
        classes[split] = labels_of(labels.task, labels.data, split, labels.settings)
    return classes


def find_drawn_splits(
    classes: dict[str, dict[Path, set]], root: Path, layout: Layout, scene_pattern: str | None
) -> LabeledSplits:
    """Return the splits of the labels and those to draw, with the scenes to draw them by.

    Args:
        classes: classes in each image, by split of the labels.
        root: folder of the labels.
        layout: layout of the labels.
        scene_pattern: pattern of scenes, see [`read_labels`].
    """
    drawn_splits = [split for split in SPLITS if split not in classes]
    training_classes = classes["train"]
    if not drawn_splits:
        return LabeledSplits(classes, drawn_splits, np.zeros(len(training_classes), int), "")
    scenes, criterion = find_scenes(
        list(training_classes),
        root,
        list(training_classes.values()),
        layout,
        scene_pattern,
    )
    num_scenes = max(scenes) + 1
    if num_scenes <= len(drawn_splits):
        raise ValueError(
            f"{len(training_classes)} images in {root} cannot be split by {criterion}: {['train', *drawn_splits]} need "
            "a scene each. Add images, or set `scene_pattern` to a regular expression whose first group, in the path "
            "of an image, is the scene; '(.*)' splits by image."
        )
    return LabeledSplits(classes, drawn_splits, scenes, criterion)


def read_images(lists: Mapping[str, Path], root: Path) -> dict[str, list[Path]]:
    """Return the images in the list of each split."""
    images = {}
    for split, path in lists.items():
        images[split] = [root / line for line in read_list(path)]
    return images


def choose_images(splits: LabeledSplits, seed: int) -> dict[str, list[Path]]:
    """Return the images of each split, of which missing splits are drawn from the training images.

    Args:
        splits: splits of the labels.
        seed: seed of the draw.
    """
    sharing_splits = ["train", *splits.drawn_splits]  # They share the training images of the labels.
    images = {}
    for split in SPLITS:
        images[split] = [] if split in sharing_splits else list(splits.classes[split])
    training_classes = splits.training_classes
    split_of_each = draw_splits(splits.scenes, list(training_classes.values()), sharing_splits, seed)
    for path, split in zip(training_classes, split_of_each):
        images[split].append(path)
    return images


def check_splits(images: Mapping[str, list[Path]], splits: LabeledSplits, root: Path) -> None:
    """Raise a `ValueError` if a split has too few images, or no labels.

    Args:
        images: images by split.
        splits: splits of the labels.
        root: folder of the labels.
    """
    classes_of_images = splits.classes_of_images
    for split, paths in images.items():
        if len(paths) < MIN_IMAGES:
            split_by = f", split by {splits.criterion}" if splits.criterion else ""
            raise ValueError(
                f"Expected at least {MIN_IMAGES} images in each split of {root}, found {len(paths)} in {split!r}"
                f"{split_by}. Add images, or set `scene_pattern` for smaller scenes."
            )
        if not any(classes_of_images[path] for path in paths):
            remedy = "set another `seed`" if split in splits.drawn_splits else "remove the split, which is then drawn"
            raise ValueError(
                f"Expected labels in each split of {root}, found none in the {len(paths)} images of {split!r}. Add "
                f"labels, or {remedy}."
            )


def scenes_of_images(splits: LabeledSplits, root: Path, layout: Layout, scene_pattern: str | None) -> dict[Path, int]:
    """Return the scene of each image; images of drawn splits have the scenes that they were drawn by.

    Args:
        splits: splits of the labels.
        root: folder of the labels.
        layout: layout of the labels.
        scene_pattern: pattern of scenes, see [`read_labels`].
    """
    training_scenes = dict(zip(splits.training_classes, splits.scenes))
    if len(splits.classes) == 1:
        return training_scenes
    classes_of_images = splits.classes_of_images
    scenes, _ = find_scenes(
        list(classes_of_images),
        root,
        list(classes_of_images.values()),
        layout,
        scene_pattern,
    )
    scene_of = dict(zip(classes_of_images, scenes))
    if splits.drawn_splits:
        scene_of.update(training_scenes)
    return scene_of


def listed_splits(
    labels: TaskData, drawn_splits: Sequence[str], training_images: Sequence[Path], lists: Mapping[str, Path]
) -> dict[str, dict[str, Any]]:
    """Return the setting `splits` of the data, with the list of each split, and with windows for large images.

    Args:
        labels: labels, whose data have the splits of the labels.
        drawn_splits: splits that are drawn from the training images.
        training_images: images of the split `train`.
        lists: file of each split.
    """
    tile_settings = {}
    if TASKS[labels.task].cuts_large_images and max(median_size(training_images)) > LARGE:
        tile_settings["tile"] = {"size": WINDOW, "overlap": OVERLAP}
    splits = {}
    for split, path in lists.items():
        source = labels.data["splits"]["train" if split in drawn_splits else split]
        splits[split] = {**tile_settings, **source, "list": str(path)}
    return splits


def check_image_files(task: str, data: Mapping[str, Any], images: Mapping[str, list[Path]]) -> None:
    """Raise a `ValueError` if an image cannot be read, or two splits share one."""
    samples = {}
    for split, paths in images.items():
        samples[split] = [FileSample(path.stem, {}, (path,), None) for path in paths]
    TASKS[task].data_class.from_dict(data).check_files(samples)


def write_cases(
    folder: Path, split: str, images: Sequence[Path], root: Path, scene_of: Mapping[Path, int]
) -> Path | None:
    """Write the scene of each image of a split, and return the file; `None` if all images are of one scene."""
    cases = {}
    for path in images:
        cases[path.relative_to(root).as_posix()] = f"{split} {scene_of[path]}"
    if len(set(cases.values())) == 1:
        return None
    path = folder / f"{split}_scenes.json"
    write_whole(path, json.dumps(cases) + "\n")
    return path


def describe_splits(images: Mapping[str, Sequence[Path]], splits: LabeledSplits) -> str:
    """Return a sentence that says how the images are split.

    Args:
        images: images by split.
        splits: splits of the labels.
    """
    numbers = [f"{len(paths)} for {SPLITS[split]}" for split, paths in images.items()]
    numbers_text = ", ".join(numbers).replace(" ", " images ", 1)
    if not splits.drawn_splits:
        return f"The given splits train, val and test are kept: {numbers_text}."
    if len(splits.drawn_splits) == 2:
        return f"Split by {splits.criterion}: {numbers_text}."
    (drawn_split,) = splits.drawn_splits
    num_drawn = len(images[drawn_split])
    share = num_drawn / (len(images["train"]) + num_drawn)
    kept_splits = " and ".join(splits.classes)
    return (
        f"The given splits {kept_splits} are kept; {share:.0%} of the training images, by {splits.criterion}, are for "
        f"{SPLITS[drawn_split]}: {numbers_text}."
    )


def labels_digest(data: str | Path) -> str:
    """Return a digest of the names, sizes and modification times of all files of labels, without reading the files.

    The text of a configuration counts as well. Hidden files, and statistics that GDAL writes beside images, do not.
    """
    config = config_of_data(data)
    if config is None:
        root = Path(data)
        digest = hashlib.sha256()
    else:
        root = labels_of_config(config, "").root
        digest = hashlib.sha256(config.read_bytes())
    if not root.is_dir():
        raise ValueError(f"Folder {root} of the labels not found.")
    add_files(digest, root)
    return digest.hexdigest()


def instructions_digest(name: str) -> str:
    """Return a digest of the names, sizes and modification times of the local files of instructions.

    Args:
        name: data set or mixture, see [`~modeling_vitp.instructions.mixture.load_sources`].
    """
    digest = hashlib.sha256()
    places = [name]
    for source in load_sources(name).sources:
        places += [source.folder, source.annotation, source.dataset, source.image_root]
    for place in dict.fromkeys(places):  # each place once
        if place:
            add_files(digest, Path(place))  # Hub ids have no files here.
    return digest.hexdigest()


def add_files(digest: "hashlib._Hash", root: Path) -> None:
    """Add the states of a file, or of the files of a folder, to a digest."""
    if root.is_file():
        add_file(digest, str(root), root)
        return
    for folder, folder_names, file_names in os.walk(root, followlinks=True):
        visible_folders = [name for name in folder_names if not name.startswith(".")]
        folder_names[:] = sorted(visible_folders)  # `os.walk` goes on with the folders that this list has.
        for name in sorted(file_names):
            add_file(digest, os.path.join(folder, name), root)


def add_file(digest: "hashlib._Hash", path: str, root: Path) -> None:
    """Add the path below a root, the size and the modification time of a file, unless it is hidden or statistics."""
    name = os.path.basename(path)
    if name.startswith(".") or name.endswith(STATISTICS) or not os.path.exists(path):
        return
    state = os.stat(path)
    digest.update(f"{os.path.relpath(path, root)}\0{state.st_size}\0{state.st_mtime_ns}\0".encode())


def labels_of_config(config: str | Path, folder: str | Path) -> TaskData:
    """Return the labels and the settings of a configuration of `vitp finetune_detection`, without reading the labels.

    Args:
        config: YAML file, whose data have the split `train`.
        folder: folder for lists of training images, see [`with_label_fraction`].

    Raises:
        ValueError: If the file has no task of boxes, or its data are invalid.
    """
    settings = read_yaml(config)
    variant = settings.get("task")
    task = find_task(variant)
    if task is None or variant not in task.variants:
        raise ValueError(f"Expected a configuration of finetune_detection with a 'task' of boxes, got {config}.")
    data = task.data_class.from_dict(settings.get("data"))
    if data.root is None or "annotations" not in data.splits.get("train", ()):
        raise ValueError(f"Expected a split 'train' with `annotations` in `data` of {config}.")
    root = Path(data.root).resolve()
    return TaskData(
        task=task.name,
        layout=data.format,
        root=root,
        data={**settings["data"], "root": str(root)},
        images={},
        how="",
        settings={name: value for name, value in settings.items() if name not in SETTINGS_OF_RUNS},
        lists={"train": Path(folder) / "train.txt"},
    )


def median_size(images: Sequence[Path], window: int | None = None, number: int = 50) -> tuple[int, int]:
    """Return the median height and width of images, from the headers of some of them.

    Args:
        images: image files.
        window: side of the windows that images are cut into, if they are cut.
        number: approximate number of images whose headers are read.
    """
    step = max(len(images) // number, 1)
    heights = []
    widths = []
    for path in images[::step]:
        height, width = stored_size(path)
        heights.append(height)
        widths.append(width)
    longest_side = math.inf if window is None else window
    median_height = min(statistics.median(heights), longest_side)
    median_width = min(statistics.median(widths), longest_side)
    return round(median_height), round(median_width)


def num_windows(labels: TaskData, split: str) -> int:
    """Return the number of windows of an image of median size, 1 for images that are not cut."""
    tile = labels.data["splits"][split].get("tile")
    if tile is None:
        return 1
    size = median_size(labels.images[split])
    return len(object_windows(size, tile["size"], tile["overlap"]))


def with_label_fraction(labels: TaskData, fraction: float, seed: int, folder: str | Path) -> dict[str, Any]:
    """Return the setting `data` with a fraction of the training images, at least one.

    Images with further classes come first. With the same seed, a smaller fraction is a part of a larger one.

    Args:
        labels: labeled images.
        fraction: fraction of the training images in (0, 1].
        seed: seed of the draw.
        folder: folder for the list of the training images.
    """
    if not 0 < fraction <= 1:
        raise ValueError(f"Expected `fraction` in (0, 1], got {fraction}.")
    classes_of_images = labels_of(labels.task, labels.data, "train", labels.settings)
    paths = list(classes_of_images)
    seen_classes = set()
    images_with_new_classes = []
    other_images = []
    for index in np.random.default_rng(seed).permutation(len(paths)):
        path = paths[index]
        classes = classes_of_images[path]
        if classes <= seen_classes:
            other_images.append(path)
        else:
            images_with_new_classes.append(path)
        seen_classes |= classes
    number = max(1, round(fraction * len(paths)))
    training_images = sorted((images_with_new_classes + other_images)[:number])
    path = Path(folder).resolve() / f"train_{100 * fraction:g}_percent_seed_{seed}.txt"
    write_list(path, labels.root, training_images)
    splits = dict(labels.data["splits"])
    splits["train"] = {**splits["train"], "list": str(path)}
    return {**labels.data, "splits": splits}


def write_list(path: Path, root: Path, images: Sequence[Path]) -> None:
    lines = [f"{image.relative_to(root).as_posix()}\n" for image in images]
    write_whole(path, "".join(lines))


def choose_task(root: Path, task: str | None) -> tuple[str, str, dict[str, Any]]:
    """Return the task of the labels in a folder, their layout, and the settings of the task."""
    if not root.is_dir():
        raise ValueError(f"Folder {root} of the labels not found.")
    layout_base = Layout if task is None else layout_base_of_task(task)
    layout = recognize_layout(root, layouts_of(layout_base))
    if layout is None:
        raise ValueError(describe_missing_labels(root, task))
    layout_task = task_of_layout(layout)
    if layout_task is None:
        recipe, page = SINGLE_COMMANDS.get(layout, ("a fine-tuning command", "README.md"))
        raise ValueError(
            f"adapt does not read the layout {layout!r} of {root}. Use the commands make_instructions, pretrain and "
            f"{recipe} instead, see recipes/{page}."
        )
    return layout_task.name, layout, layout_task.variant_settings(task, LAYOUTS[layout])


def layout_base_of_task(name: str) -> type[Layout]:
    """Return the base class of the layouts of a task, which has this name or a variant of it."""
    task = find_task(name)
    if task is not None and task.layout_class is not None:
        return task.layout_class
    options = []
    for known_task in TASKS.values():
        if known_task.layout_class is not None:
            options += [known_task.name, *known_task.variants]
    raise ValueError(f"adapt has no task {name!r}. Options: {', '.join(options)}.")


def describe_missing_labels(root: Path, task: str | None) -> str:
    """Return the message of an error for a folder without labels, which says what is expected and what the folder has.

    Args:
        root: folder.
        task: task that the labels should be of.
    """
    files = Counter(path.suffix.lower() or "no suffix" for path in root.rglob("*") if path.is_file())
    numbers = [f"{number} {suffix}" for suffix, number in files.most_common(5)]
    contents = ", ".join(numbers) or "no files"
    hint_on_tables = ""
    if TABLES & files.keys():
        hint_on_tables = (
            "A table of classes needs a row for each image, with a column `file_name` of the image and a column "
            "`label` of its class. Other tables are read by finetune_classification, see "
            "recipes/finetune_classification.md. "
        )
    for_task = f" for {task}" if task else ""
    box_formats = ", ".join(layouts_about("objects"))
    return (
        f"No labels found in {root}{for_task}. Expected boxes ({box_formats}), "
        "masks of the same names as their images (images and masks), folders of at least two classes with the "
        f"images directly in them, or a table of the images and their classes. Found: {contents}. "
        f"{hint_on_tables}Captions and instructions alone are not a task to "
        "compare backbones on: add labeled images of your task."
    )


def task_of_layout(layout: str) -> Task | None:
    """Return the task of the labels in a layout, `None` if no task reads them."""
    for task in TASKS.values():
        if task.layout_class is not None and issubclass(LAYOUTS[layout], task.layout_class):
            return task
    return None


def infer_data(root: Path, task: str, layout: Layout) -> dict[str, Any]:
    """Return the setting `data` with the labeled splits of a folder; images without a split are `train`."""
    data = TASKS[task].infer_data(root, layout)
    splits = data["splits"]
    if "classes" in data:
        check_classes(data["classes"], task, root)
    if "part" in splits.get("train", ()):
        # The images have no splits, and those that were inferred are parts of them.
        all_images = dict(splits["train"])
        del all_images["part"]
        splits = {"train": all_images}
    training_splits = [split for split in ("train", "trainval", UNSPLIT) if split in splits]
    if not training_splits:
        raise ValueError(
            f"No labeled training images found in {root}. Found the splits {sorted(layout.splits())}, with labels: "
            f"{sorted(splits)}. Name the folder or file of the training images `train`."
        )
    labeled_splits = {"train": splits[training_splits[0]]}
    for split in ("val", "test"):
        if split in splits:
            labeled_splits[split] = splits[split]
    return {**data, "splits": labeled_splits}


def check_classes(classes: Collection, task: str, where: str | Path) -> None:
    least = TASKS[task].min_classes
    if len(classes) < least:
        raise ValueError(
            f"Expected labels of at least {least} class(es) in {where}, found {len(classes)}: {[*classes]}. Add images "
            "with other labels."
        )


def labels_of(task: str, data: Mapping, split: str, settings: Mapping) -> dict[Path, set]:
    """Read the labels of a split, and return the classes in each image, sorted by path."""
    classes_of_images = TASKS[task].read_split(data, split, settings)
    return dict(sorted(classes_of_images.items()))


def check_listed(images: Mapping[str, list[Path]], splits: LabeledSplits, folder: Path) -> None:
    """Raise a `ValueError` unless the lists of an earlier call have all images, and those of given splits in these.

    Args:
        images: listed images by split.
        splits: splits of the labels.
        folder: folder of the lists.
    """
    listed_splits_of_images = split_of_images(images)
    labeled_splits_of_images = split_of_images(splits.classes)
    differing_images = []
    for path in sorted({*listed_splits_of_images, *labeled_splits_of_images}):
        listed_split = listed_splits_of_images.get(path)
        labeled_split = labeled_splits_of_images.get(path)
        is_drawn = labeled_split == "train" and listed_split in splits.drawn_splits
        if listed_split != labeled_split and not is_drawn:
            differing_images.append(path)
    if differing_images:
        raise ValueError(
            f"The lists in {folder} are of other images or splits: {len(differing_images)} images differ, such as "
            f"{differing_images[0]}. Restore the images, or set another folder."
        )


def split_of_images(images: Mapping[str, Collection[Path]]) -> dict[Path, str]:
    """Return the split of each image."""
    splits = {}
    for split, paths in images.items():
        splits.update(dict.fromkeys(paths, split))
    return splits
