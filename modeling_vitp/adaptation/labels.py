"""Labels of a folder: their task, and training, validation and test images that share no scene."""

import hashlib
import json
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
LARGE, WINDOW, OVERLAP = 1536, 1024, 200  # Sides in pixels: of images that are cut into windows, and of these windows.
# Command and page for the layouts that no task reads.
SINGLE_COMMANDS = {
    "volumes": ("finetune_segmentation", "medical.md"),
    "changes": ("finetune_change_detection", "finetune_segmentation.md"),
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


def read_labels(
    root: str | Path, folder: str | Path, task: str | None = None, scene_pattern: str | None = None, seed: int = 0
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
    folder, config = Path(folder).resolve(), config_of_data(root)
    described = None if config is None else labels_of_config(config, folder)
    root = Path(root).resolve() if described is None else described.root
    if folder.is_relative_to(root):  # its files would be read as images and labels
        raise ValueError(f"Expected a folder outside of the labels {root}, got {folder}. Set another folder.")
    if described is None:
        task, name, settings = choose_task(root, task)
        layout = LAYOUTS[name](root)
        data = infer_data(root, task, layout)
    else:
        settings, data = {"task": described.settings["task"]}, described.data
        if task not in (None, described.task, settings["task"]):
            raise ValueError(f"Expected the task {settings['task']!r} of {config}, got {task!r}.")
        if not root.is_dir():
            raise ValueError(f"Folder {root} of the labels not found: {config} expects the images and labels there.")
        task, name = described.task, described.layout
        layout = LAYOUTS[name](root)
        splits = {split: data["splits"][split] for split in SPLITS if "annotations" in data["splits"].get(split, ())}
        data = data | {"splits": splits}
    given = {split: labels_of(task, data, split, settings) for split in data["splits"]}
    pool, missing = given["train"], [split for split in SPLITS if split not in given]
    data["classes"] = TASKS[task].class_names(data, given)
    check_classes(set().union(*pool.values()), task, f"the training images of {root}")
    lists = {split: folder / f"{split}.txt" for split in SPLITS}
    scenes, by = np.zeros(len(pool), int), ""
    if missing:
        scenes, by = find_scenes([*pool], root, [*pool.values()], layout, scene_pattern)
    if max(scenes) < len(missing):
        raise ValueError(
            f"{len(pool)} images in {root} cannot be split by {by}: {['train', *missing]} need a scene each. Add "
            "images, or set `scene_pattern` to a regular expression whose first group, in the path of an image, is the "
            "scene; '(.*)' splits by image."
        )
    if all(path.is_file() for path in lists.values()):
        images = {split: [root / line for line in read_list(path)] for split, path in lists.items()}
        check_listed(images, given, missing, folder)
    else:
        images = choose_images(given, missing, scenes, seed)
    check_splits(images, given, missing, root, by)
    scene_of = dict(zip(pool, scenes))
    if len(given) > 1:
        classes_of = merge_splits(given)
        all_scenes, _ = find_scenes([*classes_of], root, [*classes_of.values()], layout, scene_pattern)
        # Scenes of drawn splits are those that they were drawn by.
        scene_of = dict(zip(classes_of, all_scenes)) | (scene_of if missing else {})
    is_large = TASKS[task].cuts_large_images and max(median_size(images["train"])) > LARGE
    tile = {"tile": {"size": WINDOW, "overlap": OVERLAP}} if is_large else {}
    splits = {}
    for split, path in lists.items():
        source = data["splits"]["train" if split in missing else split]
        splits[split] = {**tile, **source, "list": str(path)}
    data["splits"] = splits
    check_image_files(task, data, images)
    for split, path in lists.items():
        write_list(path, root, images[split])
    for split in ("val", "test"):  # Their scores are resampled by scene.
        cases_file = write_cases(folder, split, images[split], root, scene_of)
        if cases_file is not None:
            splits[split].setdefault("cases", str(cases_file))
    how = describe_splits(images, [*given], missing, by)
    test_scenes = len({scene_of[path] for path in images["test"]})
    return TaskData(task, name, root, data, images, how, settings, lists, test_scenes, config)


def merge_splits(labels: Mapping[str, Mapping[Path, set]]) -> dict[Path, set]:
    """Return the classes in each image of all splits."""
    classes_of = {}
    for split_labels in labels.values():
        classes_of |= split_labels
    return classes_of


def choose_images(
    given: Mapping[str, Mapping[Path, set]], missing: Sequence[str], scenes: np.ndarray, seed: int
) -> dict[str, list[Path]]:
    """Return the images of each split, of which missing splits are drawn from the training images.

    Args:
        given: classes in each image by split of the labels.
        missing: missing splits.
        scenes: scene of each training image.
        seed: seed of the draw.
    """
    pool = given["train"]
    images = {split: [*given.get(split, ())] for split in SPLITS}
    images |= {split: [] for split in ("train", *missing)}
    for path, split in zip(pool, draw_splits(scenes, [*pool.values()], ["train", *missing], seed)):
        images[split].append(path)
    return images


def check_splits(
    images: Mapping[str, list[Path]],
    given: Mapping[str, Mapping[Path, set]],
    missing: Sequence[str],
    root: Path,
    by: str,
) -> None:
    """Raise a `ValueError` if a split has too few images, or no labels.

    Args:
        images: images by split.
        given: classes in each image by split of the labels.
        missing: splits that are drawn.
        root: folder of the labels.
        by: what the images are split by; empty if no split is drawn.
    """
    classes_of = merge_splits(given)
    for split, paths in images.items():
        if len(paths) < MIN_IMAGES:
            raise ValueError(
                f"Expected at least {MIN_IMAGES} images in each split of {root}, found {len(paths)} in {split!r}"
                f"{f', split by {by}' if by else ''}. Add images, or set `scene_pattern` for smaller scenes."
            )
        if not any(classes_of[path] for path in paths):
            other = "set another `seed`" if split in missing else "remove the split, which is then drawn"
            raise ValueError(
                f"Expected labels in each split of {root}, found none in the {len(paths)} images of {split!r}. Add "
                f"labels, or {other}."
            )


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
    cases = {path.relative_to(root).as_posix(): f"{split} {scene_of[path]}" for path in images}
    if len(set(cases.values())) == 1:
        return None
    path = folder / f"{split}_scenes.json"
    write_whole(path, json.dumps(cases) + "\n")
    return path


def describe_splits(images: Mapping[str, Sequence[Path]], given: Sequence[str], missing: Sequence[str], by: str) -> str:
    """Return a sentence that says how the images are split.

    Args:
        images: images by split.
        given: splits of the labels.
        missing: splits that are drawn.
        by: what the images are split by.
    """
    numbers = [f"{len(paths)} for {SPLITS[split]}" for split, paths in images.items()]
    text = ", ".join(numbers).replace(" ", " images ", 1)
    if not missing:
        return f"The given splits train, val and test are kept: {text}."
    if len(missing) == 2:
        return f"Split by {by}: {text}."
    (drawn_split,) = missing
    share = len(images[drawn_split]) / (len(images["train"]) + len(images[drawn_split]))
    return (
        f"The given splits {' and '.join(given)} are kept; {share:.0%} of the training images, by {by}, are for "
        f"{SPLITS[drawn_split]}: {text}."
    )


def labels_digest(data: str | Path) -> str:
    """Return a digest of the names, sizes and modification times of all files of labels, without reading the files.

    The text of a configuration counts as well. Hidden files, and statistics that GDAL writes beside images, do not.
    """
    config, root = config_of_data(data), Path(data)
    if config is not None:
        root = labels_of_config(config, "").root
    if not root.is_dir():
        raise ValueError(f"Folder {root} of the labels not found.")
    digest = hashlib.sha256(b"" if config is None else config.read_bytes())
    add_files(digest, root)
    return digest.hexdigest()


def instructions_digest(name: str) -> str:
    """Return a digest of the names, sizes and modification times of the local files of instructions.

    Args:
        name: data set or mixture, see [`~modeling_vitp.instructions.mixture.load_sources`].
    """
    digest, places = hashlib.sha256(), [name]
    for source in load_sources(name).sources:
        places += [source.folder, source.annotation, source.dataset, source.image_root]
    for place in dict.fromkeys(filter(None, places)):  # Hub ids have no files here
        add_files(digest, Path(place))
    return digest.hexdigest()


def add_files(digest: "hashlib._Hash", root: Path) -> None:
    """Add the states of a file, or of the files of a folder, to a digest."""
    walked = [(root.parent, [], [root.name])] if root.is_file() else os.walk(root, followlinks=True)
    for folder, folders, names in walked:
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(names):
            path = os.path.join(folder, name)
            if not name.startswith(".") and not name.endswith(STATISTICS) and os.path.exists(path):
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
    names = ("data", "output_dir", "seed", "model_name_or_path", "eval_split", "test_split", "submission")
    root, described = Path(data.root).resolve(), settings["data"]
    settings = {name: value for name, value in settings.items() if name not in names}
    lists = {"train": Path(folder) / "train.txt"}
    return TaskData(task.name, data.format, root, described | {"root": str(root)}, {}, "", settings, lists)


def median_size(images: Sequence[Path], number: int = 50) -> tuple[int, int]:
    """Return the median height and width of images, from the headers of some of them."""
    chosen = images[:: max(len(images) // number, 1)]
    heights, widths = zip(*(stored_size(path) for path in chosen))
    return round(statistics.median(heights)), round(statistics.median(widths))


def num_windows(labels: TaskData, split: str) -> int:
    """Return the number of windows of an image of median size, 1 for images that are not cut."""
    tile = labels.data["splits"][split].get("tile")
    if tile is None:
        return 1
    return len(object_windows(median_size(labels.images[split]), tile["size"], tile["overlap"]))


def with_label_fraction(found: TaskData, fraction: float, seed: int, folder: str | Path) -> dict[str, Any]:
    """Return the setting `data` with a fraction of the training images, at least one.

    Images with further classes come first. With the same seed, a smaller fraction is a part of a larger one.

    Args:
        found: labeled images.
        fraction: fraction of the training images in (0, 1].
        seed: seed of the draw.
        folder: folder for the list of the training images.
    """
    if not 0 < fraction <= 1:
        raise ValueError(f"Expected `fraction` in (0, 1], got {fraction}.")
    classes_of = labels_of(found.task, found.data, "train", found.settings)
    paths = [*classes_of]
    seen_classes, images_with_new_classes, other_images = set(), [], []
    for index in np.random.default_rng(seed).permutation(len(paths)):
        path = paths[index]
        if classes_of[path] <= seen_classes:
            other_images.append(path)
        else:
            images_with_new_classes.append(path)
        seen_classes |= classes_of[path]
    number = max(1, round(fraction * len(paths)))
    chosen = sorted((images_with_new_classes + other_images)[:number])
    path = Path(folder).resolve() / f"train_{100 * fraction:g}_percent_seed_{seed}.txt"
    write_list(path, found.root, chosen)
    splits = found.data["splits"]
    return {**found.data, "splits": {**splits, "train": {**splits["train"], "list": str(path)}}}


def write_list(path: Path, root: Path, images: Sequence[Path]) -> None:
    write_whole(path, "".join(f"{image.relative_to(root).as_posix()}\n" for image in images))


def choose_task(root: Path, task: str | None) -> tuple[str, str, dict[str, Any]]:
    """Return the task of the labels in a folder, their layout, and the settings of the task."""
    if not root.is_dir():
        raise ValueError(f"Folder {root} of the labels not found.")
    tasks = [known_task for known_task in TASKS.values() if known_task.layout_class is not None]
    layout_base = Layout
    if task is not None:
        wanted_task = find_task(task)
        if wanted_task not in tasks:
            names = []
            for known_task in tasks:
                names += [known_task.name, *known_task.variants]
            raise ValueError(f"adapt has no task {task!r}. Options: {', '.join(names)}.")
        layout_base = wanted_task.layout_class
    layout = recognize_layout(root, layouts_of(layout_base))
    layout_task = None if layout is None else task_of_layout(layout)
    if layout is not None and layout_task is None:
        recipe, page = SINGLE_COMMANDS.get(layout, ("a fine-tuning command", "README.md"))
        raise ValueError(
            f"adapt does not read the layout {layout!r} of {root}. Use the commands make_instructions, pretrain and "
            f"{recipe} instead, see recipes/{page}."
        )
    if layout is None:
        files = Counter(path.suffix.lower() or "no suffix" for path in root.rglob("*") if path.is_file())
        found = ", ".join(f"{number} {suffix}" for suffix, number in files.most_common(5)) or "no files"
        of_table = (
            "A table of classes needs a row for each image, with a column `file_name` of the image and a column "
            "`label` of its class. Other tables are read by finetune_classification, see "
            "recipes/finetune_classification.md. "
        )
        formats = ", ".join(layouts_about("objects"))
        raise ValueError(
            f"No labels found in {root}{f' for {task}' if task else ''}. Expected boxes ({formats}), "
            "masks of the same names as their images (images and masks), folders of at least two classes with the "
            f"images directly in them, or a table of the images and their classes. Found: {found}. "
            f"{of_table if TABLES & files.keys() else ''}Captions and instructions alone are not a task to "
            "compare backbones on: add labeled images of your task."
        )
    return layout_task.name, layout, layout_task.variant_settings(task, LAYOUTS[layout])


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
    if "part" in splits.get("train", ()):  # a part of the only split
        splits = {"train": {key: value for key, value in splits["train"].items() if key != "part"}}
    train = next((split for split in ("train", "trainval", UNSPLIT) if split in splits), None)
    if train is None:
        raise ValueError(
            f"No labeled training images found in {root}. Found the splits {sorted(layout.splits())}, with labels: "
            f"{sorted(splits)}. Name the folder or file of the training images `train`."
        )
    return {**data, "splits": {"train": splits[train], **{k: splits[k] for k in ("val", "test") if k in splits}}}


def check_classes(classes: Collection, task: str, where: str | Path) -> None:
    least = TASKS[task].min_classes
    if len(classes) < least:
        raise ValueError(
            f"Expected labels of at least {least} class(es) in {where}, found {len(classes)}: {[*classes]}. Add images "
            "with other labels."
        )


def labels_of(task: str, data: Mapping, split: str, settings: Mapping) -> dict[Path, set]:
    """Read the labels of a split, and return the classes in each image, sorted by path."""
    return dict(sorted(TASKS[task].read_split(data, split, settings).items()))


def check_listed(
    images: Mapping[str, list[Path]], given: Mapping[str, Mapping], missing: Sequence[str], folder: Path
) -> None:
    """Raise a `ValueError` unless the lists of an earlier call have all images, and those of given splits in these."""
    listed = {path: split for split, part in images.items() for path in part}
    current = {path: split for split, part in given.items() for path in part}
    allowed = {None: (), "train": ("train", *missing), "val": ("val",), "test": ("test",)}
    wrong = [path for path in sorted({*listed, *current}) if listed.get(path) not in allowed[current.get(path)]]
    if wrong:
        raise ValueError(
            f"The lists in {folder} are of other images or splits: {len(wrong)} images differ, such as {wrong[0]}. "
            "Restore the images, or set another folder."
        )
