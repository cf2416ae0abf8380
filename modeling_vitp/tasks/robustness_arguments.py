"""Arguments of `evaluate_robustness`."""

from dataclasses import dataclass, field
from typing import Annotated, Any

from ..command.paths import find_config, read_yaml
from ..command.settings import (
    Interval,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Settings,
    check_no_duplicates,
)
from ..metrics.report import metric_path
from .segmentation.arguments import SCORED_WITH


@dataclass
class RobustnessArguments(Settings):
    """Arguments of `evaluate_robustness`.

    Attributes:
        configuration: content of the fine-tuning configuration that `data` names; empty if `data` is not a file.
        scored_with: evaluation settings that are set here; they override those of a file or of a model's run.
    """

    models: list[str] = field(
        default_factory=list, metadata={"help": "Folders or Hub ids of the fine-tuned models to compare."}
    )
    data: dict | str | None = field(
        default=None,
        metadata={
            "help": "Images with masks, boxes or classes: a mapping as in fine-tuning, or a fine-tuning configuration. "
            "Default: the test data of the models' runs."
        },
    )
    data_root: str | None = field(default=None, metadata={"help": "Folder of the data; overrides data.root."})
    split: str | None = field(
        default=None,
        metadata={"help": "Split to score. Default: test_split, or else eval_split, of the configuration."},
    )
    corruptions: list[str] = field(
        default_factory=list,
        metadata={"help": "Names of corruptions in modeling_vitp.images.corruptions. Default: all twelve."},
    )
    severities: list[Annotated[int, Interval("[1, 5]")]] = field(
        default_factory=lambda: [1, 2, 3, 4, 5], metadata={"help": "Severities of the corruptions, from 1 to 5."}
    )
    seed: int = field(default=0, metadata={"help": "Seed of the corruptions: noise, clouds, gaps, directions."})
    jpeg_quality: Annotated[int, Interval("[1, 95]")] | None = field(
        default=None,
        metadata={
            "help": "Quality of JPEG files, out of 100, that corrupted images are saved to before they are scored. "
            "REOBench: 75. Default: they are not compressed."
        },
    )
    limit: PositiveInt | None = field(
        default=None, metadata={"help": "Maximum number of images, evenly spaced in the split. Default: all."}
    )
    plugins: list[str] = field(default_factory=list, metadata={"help": "Python files that register tasks or heads."})
    metric: str | None = field(
        default=None, metadata={"help": "Name or Python file of the metric, as in fine-tuning. Default: the model's."}
    )
    score: str | None = field(
        default=None,
        metadata={"help": "Value of the metric in table and plot, such as iou/tree. Default: its main score."},
    )
    window: PositiveInt | None = field(
        default=None, metadata={"help": "Side of the sliding window in pixels. Default: that of the fine-tuning run."}
    )
    stride: PositiveInt | None = field(
        default=None, metadata={"help": "Sliding-window stride in pixels. Default: that of the fine-tuning run."}
    )
    test_scales: list[PositiveFloat] | None = field(
        default=None,
        metadata={"help": "Scales over which predictions are averaged. Default: those of the fine-tuning run."},
    )
    test_flip: bool | None = field(
        default=None,
        metadata={"help": "Whether to average predictions over mirrored images. Default: as in the fine-tuning run."},
    )
    per_device_eval_batch_size: PositiveInt | None = field(
        default=None,
        metadata={"help": "Number of windows or images per batch. Default: that of the fine-tuning run."},
    )
    bf16: bool | None = field(
        default=None, metadata={"help": "Whether to compute in bfloat16. Default: as in the fine-tuning run."}
    )
    dataloader_num_workers: NonNegativeInt = field(
        default=0, metadata={"help": "Number of processes that read and corrupt images. 0: the main process."}
    )
    output_dir: str = field(
        default="outputs/robustness", metadata={"help": "Folder for metrics.json, the plot and finished conditions."}
    )

    def __post_init__(self):
        super().__post_init__()
        if self.metric is not None:
            metric_path(self.metric)
        self.configuration: dict[str, Any] = {}
        if isinstance(self.data, str):
            self.configuration = read_yaml(find_config(self.data))
            if not isinstance(self.configuration, dict) or not isinstance(self.configuration.get("data"), dict):
                raise ValueError(f"Expected a fine-tuning configuration with a mapping `data`, got data={self.data!r}.")
            self.data = self.configuration["data"]
        self.scored_with = {}
        for name in (*SCORED_WITH, "metric"):
            setting = getattr(self, name, None)
            if setting is not None:
                self.scored_with[name] = setting
        for name in ("models", "severities"):
            if not getattr(self, name):
                raise ValueError(f"Set `{name}`, which must not be empty.")
        for name in ("models", "corruptions", "severities"):
            check_no_duplicates(name, getattr(self, name))
