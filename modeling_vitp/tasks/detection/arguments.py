"""Command-line arguments for fine-tuning on object detection and instance segmentation."""

from dataclasses import dataclass, field
from typing import Annotated, Literal

from ...command.paths import find_data
from ...command.settings import Interval, JsonText, PositiveFloat, Probability, Settings
from ...metrics.report import metric_path
from ..arguments import FineTuningSettings, SplitArguments


@dataclass(frozen=True)
class BoxVariant:
    """Variant of the detection, a value of the option `task`.

    Args:
        default_metric: name of the metric.
        is_oriented: whether boxes are rotated rectangles.
        has_masks: whether an object has a mask beside its upright box.
    """

    default_metric: str
    is_oriented: bool = False
    has_masks: bool = False

    @property
    def has_outlines(self) -> bool:
        """Return whether the labels show where an object is in its upright box."""
        return self.is_oriented or self.has_masks


VARIANTS = {
    "horizontal": BoxVariant("coco_average_precision"),
    "oriented": BoxVariant("average_precision", is_oriented=True),
    "instances": BoxVariant("coco_average_precision", has_masks=True),
}
VITP = "vitp"
DETECTORS = (VITP, "rt_detr_v2", "d_fine", "deformable_detr")
SCORED_WITH = ("per_device_eval_batch_size", "bf16", "fp16")


@dataclass
class DetectionSettings(FineTuningSettings):
    """Settings that [`~modeling_vitp.ViTPDetectionTrainingConfig`] adds to [`~transformers.TrainingArguments`]."""

    advanced = ("keep_ratio", "diagonal_flip", "right_angle_classes", "warmup_start")

    image_size: Annotated[int, Interval("[32, inf)")] = field(
        default=800, metadata={"help": "Side of the square into which images are resized, in pixels, a multiple of 16."}
    )
    keep_ratio: bool = field(
        default=True,
        metadata={"help": "Whether to keep the aspect ratio of images. If false, images are stretched to the square."},
    )
    diagonal_flip: Probability = field(
        default=0.0,
        metadata={
            "help": "Probability of a horizontal and vertical flip together. At most one of the three flips is applied."
        },
    )
    rotation: Probability = field(
        default=0.0,
        metadata={
            "help": "Probability of a rotation by a random angle. It enlarges the boxes of the task 'horizontal', "
            "which has no outlines to compute them from."
        },
    )
    right_angle_classes: list[str] = field(
        default_factory=list,
        metadata={"help": "Names of classes for which an image is rotated by 90, 180 or 270 degrees only."},
    )
    lr_milestones: list[PositiveFloat] | None = field(
        default=None,
        metadata={
            "help": "Epochs after which the learning rate is divided by 10. Default: the schedule of lr_scheduler_type."
        },
    )
    warmup_start: Probability = field(
        default=0.0,
        metadata={"help": "Fraction of the learning rate at the start of the warmup, with lr_milestones only."},
    )

    def __post_init__(self):
        super().__post_init__()
        if self.image_size % 16:
            raise ValueError(f"`image_size` must be a multiple of 16, the patch size, got {self.image_size}.")
        if self.horizontal_flip + self.vertical_flip + self.diagonal_flip > 1 + 1e-9:
            raise ValueError(
                "The sum of `horizontal_flip`, `vertical_flip` and `diagonal_flip` must be at most 1, because at most "
                "one flip is applied."
            )
        if self.lr_milestones is not None and self.lr_milestones != sorted(self.lr_milestones):
            raise ValueError(f"`lr_milestones` must be in increasing order, got {self.lr_milestones}.")


@dataclass
class DotaSubmission(Settings):
    """Settings of the file of detections for the DOTA server."""

    split: str = field(metadata={"help": "Split whose detections are written."})
    nms: Probability = field(
        default=0.1, metadata={"help": "IoU threshold for merging the detections of neighboring windows."}
    )


@dataclass
class DetectionArguments(SplitArguments):
    """Arguments for the task, the detector, the training and evaluation data, and the metric."""

    advanced = ("empty_share", "blind_controls", "metric_options", "submission")

    task: Literal[tuple(VARIANTS)] = field(
        default="horizontal",
        metadata={"help": "Task: 'horizontal' boxes, 'oriented' boxes, or 'instances' (boxes with masks)."},
    )
    detector: Literal[DETECTORS] = field(
        default=VITP,
        metadata={
            "help": "Detector: 'vitp' (Cascade R-CNN, Oriented R-CNN or Mask R-CNN, depending on the task), or a "
            "one-stage detector of transformers for horizontal boxes: 'rt_detr_v2', 'd_fine' or 'deformable_detr'."
        },
    )
    empty_share: Probability = field(
        default=0.0,
        metadata={"help": "Largest share of images without objects in the training data. 1 keeps all of them."},
    )
    blind_controls: bool = field(
        default=False,
        metadata={
            "help": "Whether to also report test scores that are reached without looking at the images: detections "
            "swapped between images, and the same objects for all images."
        },
    )
    metric: str | None = field(
        default=None,
        metadata={
            "help": "Metric: average_precision (Pascal VOC and DOTA, the default for oriented boxes), "
            "coco_average_precision (the default for the other tasks), or the path of a Python file with a metric."
        },
    )
    metric_options: dict | JsonText | None = field(
        default=None, metadata={"help": 'Arguments of the metric, such as \'{"interpolation": "area"}\'.'}
    )
    submission: DotaSubmission | JsonText | None = field(
        default=None,
        metadata={
            "help": "`split` whose detections are written for the DOTA server, and `nms`, the IoU threshold for "
            "merging its windows."
        },
    )

    def __post_init__(self):
        super().__post_init__()
        if self.metric is not None:
            metric_path(self.metric)
        variant = VARIANTS[self.task]
        if self.detector != VITP and variant.has_outlines:
            raise ValueError(
                f"detector={self.detector!r} supports the task 'horizontal' only, got task={self.task!r}. Set "
                f"detector={VITP!r}."
            )
        if self.dry_run and self.detector != VITP:
            raise ValueError(f"dry_run estimates detector={VITP!r} only, got detector={self.detector!r}.")
        if isinstance(self.data.get("dataset_name"), str):
            self.data["dataset_name"] = find_data(self.data["dataset_name"])
        if self.blind_controls and self.test_split is None:
            raise ValueError("`blind_controls` are scores on the test split. Set `test_split`.")
        if self.metric == "coco_average_precision" and variant.is_oriented:
            raise ValueError(
                "metric='coco_average_precision' does not support oriented boxes. Set metric='average_precision'."
            )
        if self.submission is not None and not variant.is_oriented:
            raise ValueError(f"`submission` requires task='oriented' for the DOTA server, got task={self.task!r}.")
