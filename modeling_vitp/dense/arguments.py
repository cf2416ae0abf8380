"""Arguments of fine-tuning for maps on the command line."""

from dataclasses import dataclass, field

from ..metrics.report import metric_path
from ..training.arguments import FineTuningSettings, SplitArguments, check_within

# Settings that the scores of a model depend on.
SCORED_WITH = ("window", "stride", "test_scales", "test_flip", "per_device_eval_batch_size", "bf16", "fp16")


@dataclass
class DenseSettings(FineTuningSettings):
    """What [`~modeling_vitp.dense.trainer.ViTPSegmentationTrainingConfig`] adds to transformers' settings."""

    limits = {
        "crop_size": "[1, inf)",
        "scale_range": "(0, inf)",
        "max_class_share": "(0, 1]",
        "exchange_time": "[0, 1]",
        "window": "[1, inf)",
        "stride": "[1, inf)",
        "test_scales": "(0, inf)",
    }

    crop_size: int = field(default=512, metadata={"help": "Side of the crops in training, in pixels."})
    scale_range: list[float] = field(
        default_factory=lambda: [0.5, 2.0], metadata={"help": "By what an image grows before it is cropped."}
    )
    max_class_share: float = field(
        default=0.75, metadata={"help": "A crop of which one class has more is drawn again, up to ten times."}
    )
    photometric: bool = field(
        default=True, metadata={"help": "Whether brightness, contrast, saturation and hue change."}
    )
    exchange_time: float = field(default=0.0, metadata={"help": "Pairs: chance that before and after change places."})
    window: int | None = field(
        default=None, metadata={"help": "Side of the windows in evaluation, in pixels; crop_size if not given."}
    )
    stride: int | None = field(
        default=None,
        metadata={"help": "From one window to the next, in pixels; no overlap if not given."},
    )
    test_scales: list[float] = field(
        default_factory=lambda: [1.0], metadata={"help": "The test averages predictions over these scales."}
    )
    test_flip: bool = field(default=False, metadata={"help": "The test averages over mirrored images, too."})
    dataloader_drop_last: bool = field(
        default=True, metadata={"help": "UPerNet has batch norm, so a last batch of one image would be an error."}
    )

    def __post_init__(self):
        super().__post_init__()
        if len(self.scale_range) != 2 or self.scale_range[0] > self.scale_range[1]:
            raise ValueError(f"scale_range={self.scale_range}: give the smallest and the largest.")
        if not self.test_scales:
            raise ValueError("test_scales is empty: give 1.0, the image as it is.")


@dataclass
class DenseArguments(SplitArguments):
    """What is trained on, and what is scored."""

    metric: str | None = field(
        default=None,
        metadata={"help": "mean_iou, dice or change_detection, or the path of a Python file with a metric."},
    )
    class_weights: list[str] | None = field(
        default=None, metadata={"help": "Of the loss: a number for each class, or 'balanced' (inverse frequency)."}
    )
    submission: dict | str | None = field(
        default=None,
        metadata={"help": "`split` and `file` of the masks that a benchmark's server takes; see configs/uavid.yaml."},
    )

    def __post_init__(self):
        if self.metric is not None:
            metric_path(self.metric)
        if self.class_weights is not None:  # a command line has words, a configuration numbers too, or one word
            weights = self.class_weights if isinstance(self.class_weights, list) else [self.class_weights]
            self.class_weights = [str(weight) for weight in weights]
        super().__post_init__()
        if self.submission is not None:
            if not {"split", "file"} <= set(self.submission) <= {"split", "file", "encoding"}:
                raise ValueError(f"submission needs `split` and `file`, and may have `encoding`: {self.submission}.")
            if "dataset_name" in self.data:
                raise ValueError("submission: masks are named after files, and the data are of a `dataset_name`.")
        if self.class_weights not in (None, ["balanced"]):
            try:
                check_within("class_weights", [float(weight) for weight in self.class_weights], "[0, inf)")
            except ValueError as error:
                raise ValueError(
                    f"class_weights={self.class_weights}: give 'balanced', or a number of 0 or more for each class."
                ) from error
