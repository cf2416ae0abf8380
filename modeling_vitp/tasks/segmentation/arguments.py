"""Command-line arguments for fine-tuning on semantic segmentation and change detection."""

from dataclasses import dataclass, field
from typing import Annotated, Literal

from ...command.settings import (
    Interval,
    JsonText,
    PositiveFloat,
    PositiveInt,
    Probability,
    Settings,
    Share,
    from_mapping,
)
from ...metrics.report import metric_path
from ..arguments import FineTuningSettings, SplitArguments

# Settings that change the scores of a model.
SCORED_WITH = (
    "window",
    "stride",
    "pad_windows",
    "test_scales",
    "test_flip",
    "per_device_eval_batch_size",
    "bf16",
    "fp16",
)


@dataclass
class DenseSettings(FineTuningSettings):
    """Settings that [`~modeling_vitp.ViTPSegmentationTrainingConfig`] adds to [`~transformers.TrainingArguments`]."""

    advanced = (
        "max_class_share",
        "rotation",
        "rotation_angle",
        "reflection",
        "photometric",
        "photometric_strengths",
        "exchange_time",
        "pad_windows",
        "test_scales",
        "test_flip",
        "dataloader_drop_last",
    )

    crop_size: PositiveInt = field(default=512, metadata={"help": "Side of the training crops in pixels."})
    scale_range: list[PositiveFloat] = field(
        default_factory=lambda: [0.5, 2.0],
        metadata={"help": "Smallest and largest random scale factor of an image before it is cropped."},
    )
    max_class_share: Share = field(
        default=0.75,
        metadata={
            "help": "Largest allowed share of one class in the labeled pixels of a training crop. Crops above it are "
            "drawn again, up to ten times."
        },
    )
    rotation: Probability = field(
        default=0.0, metadata={"help": "Probability that an image is rotated by a random angle before it is cropped."}
    )
    rotation_angle: Annotated[float, Interval("[0, 180]")] = field(
        default=180.0, metadata={"help": "Largest angle of a rotation in degrees, in both directions."}
    )
    reflection: Probability = field(
        default=0.0,
        metadata={
            "help": "Probability that an image that is not rotated is mirrored about a random axis: horizontal, "
            "vertical or one of the diagonals."
        },
    )
    photometric: bool = field(
        default=True, metadata={"help": "Whether to distort brightness, contrast, saturation and hue in training."}
    )
    photometric_strengths: list[Probability] = field(
        default_factory=lambda: [0.125, 0.5, 0.5, 0.1],
        metadata={
            "help": "Largest changes of brightness (share of white), contrast and saturation (of the factor 1) and hue "
            "(share of the color circle)."
        },
    )
    exchange_time: Probability = field(
        default=0.0, metadata={"help": "Probability that the before and after images of a pair are swapped."}
    )
    window: PositiveInt | None = field(
        default=None, metadata={"help": "Side of the evaluation windows in pixels. Default: crop_size."}
    )
    stride: PositiveInt | None = field(
        default=None,
        metadata={"help": "Sliding-window stride in pixels. Default: the window size, without overlap."},
    )
    pad_windows: bool = field(
        default=False,
        metadata={"help": "Whether images smaller than a window are padded to it with the mean color to score them."},
    )
    test_scales: list[PositiveFloat] = field(
        default_factory=lambda: [1.0],
        metadata={"help": "Image scales over which predictions on the test split are averaged."},
    )
    test_flip: bool = field(
        default=False, metadata={"help": "Whether predictions on the test split are averaged over mirrored images too."}
    )
    dataloader_drop_last: bool = field(
        default=True,
        metadata={
            "help": "Whether to drop the last incomplete training batch. The batch norm of UPerNet cannot train on a "
            "batch of one image."
        },
    )

    def __post_init__(self):
        super().__post_init__()
        if len(self.scale_range) != 2 or self.scale_range[0] > self.scale_range[1]:
            raise ValueError(
                f"Expected `scale_range` to be the smallest and the largest scale, got {self.scale_range}."
            )
        if len(self.photometric_strengths) != 4 or self.photometric_strengths[3] > 0.5:
            raise ValueError(
                "Expected `photometric_strengths` of brightness, contrast, saturation and hue, which is at most 0.5, "
                f"got {self.photometric_strengths}."
            )
        if not self.test_scales:
            raise ValueError("`test_scales` must not be empty. Use 1.0 for the original image size.")


@dataclass
class MaskSubmission(Settings):
    """Settings of the masks for the server of a benchmark."""

    split: str = field(metadata={"help": "Split whose masks are written."})
    file: str = field(metadata={"help": "File name of a mask, with fields of the pattern of the split."})
    encoding: Literal["mask", "index"] = field(
        default="mask", metadata={"help": "Values of the masks: those of the data set, or indices of classes from 0."}
    )


@dataclass
class DenseArguments(SplitArguments):
    """Arguments for the training and evaluation data, the metric and the loss weights."""

    advanced = ("metric", "submission")

    metric: str | None = field(
        default=None,
        metadata={"help": "Metric: mean_iou, dice or change_detection, or the path of a Python file with a metric."},
    )
    class_weights: list[str] | None = field(
        default=None,
        metadata={
            "help": "Class weights of the loss: one number per class, or 'balanced' for inverse pixel frequency. "
            "Default: equal weights."
        },
    )
    submission: dict | JsonText | None = field(
        default=None,
        metadata={
            "help": "`split` and `file` pattern of the masks to write for a benchmark server, see configs/uavid.yaml."
        },
    )

    def __post_init__(self):
        if self.class_weights is not None:
            self.class_weights = as_texts(self.class_weights)
        super().__post_init__()
        if self.metric is not None:
            metric_path(self.metric)
        if self.submission is not None:
            from_mapping(MaskSubmission, self.submission, "submission")
            if "dataset_name" in self.data:
                raise ValueError(
                    "submission: masks are named after image files. Use a data set of files instead of `dataset_name`."
                )
        if self.class_weights is None or self.class_weights == ["balanced"]:
            return
        if not all(is_weight(weight) for weight in self.class_weights):
            raise ValueError(
                "Expected `class_weights` to be 'balanced' or one non-negative number per class, got "
                f"{self.class_weights}."
            )


def as_texts(weights: list | float | str) -> list[str]:
    """Return class weights as on the command line; a configuration may give numbers, or one word without a list."""
    if not isinstance(weights, list):
        weights = [weights]
    return [str(weight) for weight in weights]


def is_weight(text: str) -> bool:
    try:
        return float(text) in Interval("[0, inf)")
    except ValueError:
        return False
