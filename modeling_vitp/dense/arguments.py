"""Command-line arguments for fine-tuning on semantic segmentation and change detection."""

from dataclasses import dataclass, field

from ..command.settings import check_type
from ..metrics.report import metric_path
from ..training.arguments import FineTuningSettings, SplitArguments, check_within

# Settings that change the scores of a model.
SCORED_WITH = ("window", "stride", "test_scales", "test_flip", "per_device_eval_batch_size", "bf16", "fp16")


@dataclass
class DenseSettings(FineTuningSettings):
    """Settings that [`~modeling_vitp.ViTPSegmentationTrainingConfig`] adds to [`~transformers.TrainingArguments`]."""

    limits = {
        "crop_size": "[1, inf)",
        "scale_range": "(0, inf)",
        "max_class_share": "(0, 1]",
        "rotation": "[0, 1]",
        "rotation_angle": "[0, 180]",
        "reflection": "[0, 1]",
        "color_jitter": "[0, 1]",
        "exchange_time": "[0, 1]",
        "window": "[1, inf)",
        "stride": "[1, inf)",
        "test_scales": "(0, inf)",
    }

    crop_size: int = field(default=512, metadata={"help": "Side of the training crops in pixels."})
    scale_range: list[float] = field(
        default_factory=lambda: [0.5, 2.0],
        metadata={"help": "Smallest and largest random scale factor of an image before it is cropped."},
    )
    max_class_share: float = field(
        default=0.75,
        metadata={
            "help": "Largest allowed share of one class in the labeled pixels of a training crop. Crops above it are "
            "drawn again, up to ten times."
        },
    )
    rotation: float = field(
        default=0.0, metadata={"help": "Probability that an image is rotated by a random angle before it is cropped."}
    )
    rotation_angle: float = field(
        default=180.0, metadata={"help": "Largest angle of a rotation in degrees, in both directions."}
    )
    reflection: float = field(
        default=0.0,
        metadata={
            "help": "Probability that an image that is not rotated is mirrored about a random axis: horizontal, "
            "vertical or one of the diagonals."
        },
    )
    photometric: bool = field(
        default=True, metadata={"help": "Whether to distort brightness, contrast, saturation and hue in training."}
    )
    color_jitter: list[float] = field(
        default_factory=lambda: [0.125, 0.5, 0.5, 0.1],
        metadata={
            "help": "Largest changes of brightness (share of white), contrast and saturation (of the factor 1) and hue "
            "(share of the color circle)."
        },
    )
    exchange_time: float = field(
        default=0.0, metadata={"help": "Probability that the before and after images of a pair are swapped."}
    )
    window: int | None = field(
        default=None, metadata={"help": "Side of the evaluation windows in pixels. Default: crop_size."}
    )
    stride: int | None = field(
        default=None,
        metadata={"help": "Sliding-window stride in pixels. Default: the window size, without overlap."},
    )
    test_scales: list[float] = field(
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
        if len(self.color_jitter) != 4 or self.color_jitter[3] > 0.5:
            raise ValueError(
                "Expected `color_jitter` of brightness, contrast, saturation and hue, which is at most 0.5, got "
                f"{self.color_jitter}."
            )
        if not self.test_scales:
            raise ValueError("`test_scales` must not be empty. Use 1.0 for the original image size.")


@dataclass
class DenseArguments(SplitArguments):
    """Arguments for the training and evaluation data, the metric and the loss weights."""

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
    submission: dict | str | None = field(
        default=None,
        metadata={
            "help": "`split` and `file` pattern of the masks to write for a benchmark server, see configs/uavid.yaml."
        },
    )

    def __post_init__(self):
        if self.class_weights is not None:  # A configuration may give numbers or a single word instead of a list.
            weights = self.class_weights if isinstance(self.class_weights, list) else [self.class_weights]
            self.class_weights = [str(weight) for weight in weights]
        super().__post_init__()
        if self.metric is not None:
            metric_path(self.metric)
        if self.submission is not None:
            if not {"split", "file"} <= set(self.submission) <= {"split", "file", "encoding"}:
                raise ValueError(
                    f"Expected `submission` with `split` and `file`, and optionally `encoding`, got {self.submission}."
                )
            check_type("submission: file", self.submission["file"], str)
            encoding = self.submission.get("encoding", "mask")
            if encoding not in ("mask", "index"):
                raise ValueError(f"submission: expected `encoding` to be 'mask' or 'index', got {encoding!r}.")
            if "dataset_name" in self.data:
                raise ValueError(
                    "submission: masks are named after image files. Use a data set of files instead of `dataset_name`."
                )
        if self.class_weights not in (None, ["balanced"]):
            try:
                check_within("class_weights", [float(weight) for weight in self.class_weights], "[0, inf)")
            except ValueError as error:
                raise ValueError(
                    "Expected `class_weights` to be 'balanced' or one non-negative number per class, got "
                    f"{self.class_weights}."
                ) from error
