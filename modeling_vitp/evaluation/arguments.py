"""Arguments of `evaluate_robustness` and `evaluate_vlm`."""

from dataclasses import dataclass, field
from typing import Any

from ..command.paths import find_config, read_yaml
from ..dense.arguments import SCORED_WITH
from ..metrics.report import metric_path
from ..training.arguments import Arguments
from .answer_scores import KINDS


@dataclass
class RobustnessArguments(Arguments):
    """Arguments of `evaluate_robustness`.

    Attributes:
        configuration: the file that `data` names, a configuration of fine-tuning; empty if it names none.
        scored_with: the settings of scoring that are given here, and not by a file or by a model's run.
    """

    file_fields = ("data",)
    limits = {
        "severities": "[1, 5]",
        "limit": "[1, inf)",
        "window": "[1, inf)",
        "stride": "[1, inf)",
        "test_scales": "(0, inf)",
        "per_device_eval_batch_size": "[1, inf)",
        "dataloader_num_workers": "[0, inf)",
    }
    models: list[str] = field(
        default_factory=list, metadata={"help": "Folders or Hub ids of fine-tuned models, side by side in the table."}
    )
    data: dict | str | None = field(
        default=None,
        metadata={
            "help": "Images with masks or classes: as in fine-tuning, or the file of such a configuration. By default "
            "what the models' runs were scored on."
        },
    )
    data_root: str | None = field(default=None, metadata={"help": "Where they are, instead of data.root."})
    split: str | None = field(
        default=None, metadata={"help": "Split to score; else test_split, or eval_split, of the configuration."}
    )
    corruptions: list[str] = field(
        default_factory=list, metadata={"help": "Of modeling_vitp.images.corruptions; all twelve if not given."}
    )
    severities: list[int] = field(default_factory=lambda: [1, 2, 3, 4, 5], metadata={"help": "From 1 to 5."})
    seed: int = field(default=0, metadata={"help": "Of what is drawn: noise, clouds, gaps, directions."})
    limit: int | None = field(
        default=None, metadata={"help": "Score only so many images, evenly spread over the split."}
    )
    plugins: list[str] = field(default_factory=list, metadata={"help": "Python files that register decode heads."})
    metric: str | None = field(default=None, metadata={"help": "Name or Python file, as in fine-tuning."})
    score: str | None = field(
        default=None, metadata={"help": "Value of the metric for table and plot, such as iou/tree; else its main one."}
    )
    window: int | None = field(default=None, metadata={"help": "As in fine-tuning; so are the next five."})
    stride: int | None = field(default=None, metadata={"help": "From one window to the next, in pixels."})
    test_scales: list[float] | None = field(default=None, metadata={"help": "Predictions are averaged over these."})
    test_flip: bool | None = field(default=None, metadata={"help": "Predictions are averaged over mirrored images."})
    per_device_eval_batch_size: int | None = field(default=None, metadata={"help": "Windows predicted together."})
    bf16: bool | None = field(default=None, metadata={"help": "Whether to compute in bfloat16."})
    dataloader_num_workers: int = field(default=0, metadata={"help": "Processes that read and corrupt images."})
    output_dir: str = field(default="outputs/robustness", metadata={"help": "For metrics.json, plot and parts."})

    def __post_init__(self):
        super().__post_init__()
        if self.metric is not None:
            metric_path(self.metric)
        self.configuration: dict[str, Any] = {}
        if isinstance(self.data, str):
            name = self.data
            self.configuration = read_yaml(find_config(name))
            if not isinstance(self.configuration, dict) or not isinstance(self.configuration.get("data"), dict):
                raise ValueError(f"data={name!r} is no configuration of fine-tuning: it has no mapping `data`.")
            self.data = self.configuration["data"]
        given = {name: getattr(self, name) for name in SCORED_WITH if getattr(self, name, None) is not None}
        self.scored_with = given | ({} if self.metric is None else {"metric": self.metric})
        if not self.models:
            raise ValueError("Give `models`: what is scored.")
        for name in ("models", "corruptions", "severities"):
            values = getattr(self, name)
            if len(set(values)) < len(values):
                raise ValueError(f"{name}={values}: one is given twice.")
        if not self.severities:
            raise ValueError("severities is empty: give some of 1 to 5.")


@dataclass
class VLMArguments(Arguments):
    """Arguments of `evaluate_vlm`."""

    limits = {
        "limit": "[1, inf)",
        "batch_size": "[1, inf)",
        "max_new_tokens": "[1, inf)",
        "pictures": "[0, inf)",
    }
    choices = {"kind": tuple(KINDS)}

    models: list[str] = field(
        default_factory=list,
        metadata={"help": "Folders or Hub ids of pretrained models or their checkpoints, side by side in the table."},
    )
    dataset_name: str | None = field(
        default=None, metadata={"help": "Rows, in any schema that `pretrain` takes: a file, a folder or a Hub id."}
    )
    dataset_config: str | None = field(default=None, metadata={"help": "Of a data set that has several."})
    split: str = field(default="test", metadata={"help": "To ask; that of a single file is train. Or test[:100]."})
    image_root: str | None = field(default=None, metadata={"help": "That paths of images are relative to."})
    kind: str | None = field(
        default=None,
        metadata={"help": "Of all answers: grounding, choice, map, vqa or caption. Else each is told from its answer."},
    )
    limit: int | None = field(default=None, metadata={"help": "Ask only so many questions, drawn by the seed."})
    seed: int = field(default=0, metadata={"help": "Of which questions are asked, and of the intervals."})
    batch_size: int = field(default=16, metadata={"help": "Questions that are answered together."})
    max_new_tokens: int = field(default=128, metadata={"help": "Of an answer."})
    bf16: bool = field(default=False, metadata={"help": "Whether to compute in bfloat16."})
    pictures: int = field(default=6, metadata={"help": "Questions that are drawn, with their answers."})
    output_dir: str = field(default="outputs/vlm", metadata={"help": "For metrics.json, answers and pictures."})

    def __post_init__(self):
        super().__post_init__()
        if not self.models:
            raise ValueError("Give `models`: what is asked.")
        if len(set(self.models)) < len(self.models):
            raise ValueError(f"models={self.models}: one is given twice.")
        if self.dataset_name is None:
            raise ValueError("Give `dataset_name`: rows with questions and answers.")
