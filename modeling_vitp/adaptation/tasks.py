"""Tasks that backbones are compared on: their labels, their probes, and the defaults of their fine-tuning.

Each task is one object of [`TASKS`]. Other files of this folder ask these objects, not for the name of a task.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from tqdm import tqdm
from transformers import PreTrainedConfig

from ..data.layouts import ClassLayout, Layout, Masks, ObjectLayout
from ..data.settings import DataSettings
from ..image_processing_vitp_dense import IGNORE_INDEX
from ..tasks.classification.data import ClassificationData, names_of
from ..tasks.detection.arguments import TASKS as BOX_TASKS
from ..tasks.detection.data import DetectionData
from ..tasks.segmentation.data import DenseData
from ..vision_towers import pair

BACKGROUND = ("0", "0,0,0")  # value or color of masks that no question is about


class AdaptationTask:
    """Base of the tasks.

    Attributes:
        name: name of the task; `vitp finetune_NAME` is its command.
        layout: base class of the layouts of its labels.
        data: class of the setting `data` of its fine-tuning and probes.
        variants: values of the setting `task` of its fine-tuning.
        min_classes: least number of classes.
        annotations: value of `annotations` of `vitp probe`.
        probe_score, probe_title: main score of `vitp probe`, and its name in the report.
        draws_questions: whether the pretraining draws its questions from the labels.
        probes_patches: whether probes read the patch tokens of an image, instead of one vector.
        cuts_large_images: whether large images are cut into windows.
    """

    name: ClassVar[str]
    layout: ClassVar[type[Layout]]
    data: ClassVar[type[DataSettings]]
    variants: ClassVar[tuple[str, ...]] = ()
    min_classes: ClassVar[int] = 2
    annotations: ClassVar[str]
    probe_score: ClassVar[str]
    probe_title: ClassVar[str]
    draws_questions: ClassVar[bool] = True
    probes_patches: ClassVar[bool] = True
    cuts_large_images: ClassVar[bool] = False

    def infer_data(self, root: Path, layout: Layout) -> dict[str, Any]:
        """Return the setting `data` of a folder, with the splits that have labels."""
        data = self.data.infer(root)
        splits = {}
        for split, files in data["splits"].items():
            if "mask" in files or "annotations" in files:
                splits[split] = files
        return {**data, "splits": splits}

    def read_split(self, data: Mapping, split: str, settings: Mapping) -> dict[Path, set]:
        """Read the labels of a split, and return the classes in each image.

        Args:
            data: setting `data`.
            split: name of the split.
            settings: further settings of the fine-tuning.
        """
        raise NotImplementedError

    def class_names(self, data: Mapping, labels: Mapping[str, Mapping[Path, set]]) -> list:
        """Return the setting `classes` of `data`, for labels by split."""
        return data["classes"]

    def variant_settings(self, variant: str | None, layout: type[Layout]) -> dict[str, Any]:
        """Return the setting `task` of the fine-tuning if it differs from the default.

        Args:
            variant: wanted variant of the task. Default: the one of the layout.
            layout: layout of the labels.
        """
        return {}

    def phrases(self, class_names: Mapping[str, str], data: Mapping) -> dict[str, str | None]:
        """Return the phrases of classes for `make_instructions --names`.

        Args:
            class_names: given phrases by class.
            data: setting `data`.
        """
        return dict(class_names)

    def fine_tuning_defaults(
        self, config: PreTrainedConfig, size: tuple[int, int], window: int | None
    ) -> dict[str, Any]:
        """Return the image size and batch size of a fine-tuning.

        Args:
            config: configuration of the ViT.
            size: height and width of an image.
            window: side of the windows that images are cut into, if they are cut.
        """
        raise NotImplementedError


class ClassificationTask(AdaptationTask):
    """Classification of whole images."""

    name = "classification"
    layout = ClassLayout
    data = ClassificationData
    annotations = "classes"
    probe_score = "accuracy"
    probe_title = "accuracy"
    draws_questions = False  # A crop may not show what the class of an image is about.
    probes_patches = False

    def infer_data(self, root: Path, layout: Layout) -> dict[str, Any]:
        for images in layout.splits().values():
            for image_id, paths in images.items():
                layout.annotate(image_id, paths)  # raises an error for labels that cannot be read
        return self.data.infer(root)

    def read_split(self, data: Mapping, split: str, settings: Mapping) -> dict[Path, set]:
        opened_split = self.data.from_dict(data).open_split(split)
        classes = {}
        for sample, names in zip(opened_split.samples, opened_split.stored):
            classes[sample.images[0]] = set(names)
        return classes

    def class_names(self, data: Mapping, labels: Mapping[str, Mapping[Path, set]]) -> list:
        class_sets = []
        for split_labels in labels.values():
            class_sets += split_labels.values()
        return names_of(class_sets)

    def fine_tuning_defaults(
        self, config: PreTrainedConfig, size: tuple[int, int], window: int | None
    ) -> dict[str, Any]:
        return {"image_size": pair(config.image_size)[0], "per_device_train_batch_size": 64}


class SegmentationTask(AdaptationTask):
    """Classification of pixels by masks."""

    name = "segmentation"
    layout = Masks
    data = DenseData
    annotations = "masks"
    probe_score = "mean_iou"
    probe_title = "mIoU"

    def read_split(self, data: Mapping, split: str, settings: Mapping) -> dict[Path, set]:
        opened_split = self.data.from_dict(data).open_split(split)
        classes = {}
        for index, (row, _) in enumerate(tqdm(opened_split.rows, desc=f"masks of {split}", disable=None)):
            classes[row.images[0]] = {*opened_split.mask(index).unique().tolist()} - {IGNORE_INDEX}
        return classes

    def phrases(self, class_names: Mapping[str, str], data: Mapping) -> dict[str, str | None]:
        """Return the phrases of masks by value or color.

        The value 0 or color black is the background, which no question is about, unless `class_names` has a phrase for
        it. No question is about ignored values either.
        """
        names = {str(value): None for value in data.get("ignore", ())}
        classes = [entry["name"] for entry in data["classes"]]
        if unknown := sorted(class_names.keys() - set(classes)):
            raise ValueError(f"class_names: class {unknown[0]!r} not found. Classes: {', '.join(classes)}.")
        for entry in data["classes"]:
            key = str(entry["value"]) if "value" in entry else ",".join(map(str, entry["color"]))
            default = None if key in BACKGROUND else entry["name"]
            names[key] = class_names.get(entry["name"], default)
        return names

    def fine_tuning_defaults(
        self, config: PreTrainedConfig, size: tuple[int, int], window: int | None
    ) -> dict[str, Any]:
        side = min(max(min(size) // 32 * 32, 32), 512)
        return {"crop_size": side, "per_device_train_batch_size": 8}


class DetectionTask(AdaptationTask):
    """Detection of horizontal boxes, oriented boxes or instances."""

    name = "detection"
    layout = ObjectLayout
    data = DetectionData
    variants = BOX_TASKS
    min_classes = 1
    annotations = "boxes"
    probe_score = "centre_auc"
    probe_title = "AUC of patches with the center of an object"
    cuts_large_images = True

    def read_split(self, data: Mapping, split: str, settings: Mapping) -> dict[Path, set]:
        whole_images = self.data.from_dict(data).without_tiles()
        classes = {}
        for place in whole_images.open_split(split, settings.get("task", "horizontal")).places:
            classes[place.image] = set(place.objects.labels[~place.objects.crowd].tolist())
        return classes

    def variant_settings(self, variant: str | None, layout: type[Layout]) -> dict[str, Any]:
        if variant not in self.variants:
            variant = "oriented" if layout.is_oriented else "horizontal"
        return {} if variant == "horizontal" else {"task": variant}

    def fine_tuning_defaults(
        self, config: PreTrainedConfig, size: tuple[int, int], window: int | None
    ) -> dict[str, Any]:
        longest_side = max(size) if window is None else window
        side = min(-(-longest_side // 32) * 32, 1024)
        return {"image_size": side, "per_device_train_batch_size": 4}


DETECTION = DetectionTask()  # the task of configurations of `vitp finetune_detection`
TASKS: dict[str, AdaptationTask] = {task.name: task for task in (ClassificationTask(), SegmentationTask(), DETECTION)}


def find_task(name: str) -> AdaptationTask | None:
    """Return a task by its name or by that of a variant, `None` if the name is unknown."""
    for task in TASKS.values():
        if name == task.name or name in task.variants:
            return task
    return None
