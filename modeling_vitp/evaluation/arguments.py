"""Arguments of experiments on the command line."""

import re
from collections.abc import Iterable
from dataclasses import MISSING, dataclass, field, fields
from typing import Any

from ..command.yaml_files import read_yaml
from ..dense.arguments import SCORED_WITH
from ..training.command_line import find_config
from ..training.values import Arguments
from .answer_scores import KINDS


@dataclass
class FinetuningPlan(Arguments):
    """How the backbones of an experiment are fine-tuned, and where the learning rate of each arm is chosen."""

    limits = {
        "learning_rates": "(0, inf)",
        "layer_decays": "(0, 1]",
        "label_shares": "(0, 1]",
        "held_out_top": "[0, inf)",
        "seed": "[0, inf)",
    }

    config: str = field(metadata={"help": "Configuration of recipes/finetune_segmentation.py."})
    learning_rates: list[float] = field(metadata={"help": "To choose from, for each arm and layer-wise decay."})
    layer_decays: list[float] = field(metadata={"help": "Each is fine-tuned with, and scored."})
    label_shares: list[float] = field(metadata={"help": "Of the windows whose masks are fine-tuned on."})
    held_out_scene: str = field(metadata={"help": "Scene of the training ground that rates are chosen on."})
    held_out_top: int = field(metadata={"help": "Training windows of that scene from here on, in pixels, are it."})
    seed: int = field(default=0, metadata={"help": "Of the runs that rates are chosen by."})


@dataclass
class ExperimentArguments(Arguments):
    """The plan of an experiment on pretraining, and where it goes.

    Attributes:
        finetuning: [`FinetuningPlan`] once it has been read.
    """

    limits = {"probe_label_shares": "(0, 1]", "corruption_severities": "[1, 5]"}

    output_dir: str = field(metadata={"help": "Where runs, metrics.json and the picture go."})
    claim: str = field(metadata={"help": "What the experiment is about, in a sentence."})
    against: str = field(metadata={"help": "What result would speak against the claim."})
    arms: dict | str = field(metadata={"help": "By name, the settings of the pretraining that differ from `base`."})
    control: str = field(metadata={"help": "The arm that the others are compared with."})
    measures: dict | str = field(metadata={"help": "By title, a figure in a run's metrics.json: its keys, with dots."})
    base: str = field(default="quickstart", metadata={"help": "Configuration of recipes/pretrain.py."})
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2, 3, 4], metadata={"help": "Of each arm."})
    runs_dir: str | None = field(
        default=None,
        metadata={"help": "Where the runs lie, if not in output_dir: those of another experiment are not run again."},
    )
    finetuning: dict | str | None = field(
        default=None, metadata={"help": "Fine-tunes every backbone: see FinetuningPlan of evaluation/arguments.py."}
    )
    probe_label_shares: list[float] = field(
        default_factory=list, metadata={"help": "Probes every backbone with the masks of these shares of the windows."}
    )
    corruption_severities: list[int] = field(
        default_factory=list, metadata={"help": "Probes every backbone under the twelve corruptions, at these."}
    )

    def __post_init__(self):
        super().__post_init__()
        if self.finetuning is not None:
            check_keys("finetuning", self.finetuning, FinetuningPlan)
            self.finetuning = FinetuningPlan(**self.finetuning)
        self.base = str(find_config(self.base))
        if not self.seeds:
            raise ValueError("seeds is empty: give the seeds of each arm.")
        if self.control not in self.arms:
            raise ValueError(f"control: there is no arm {self.control!r}, only {', '.join(map(repr, self.arms))}.")
        unknown = {(settings or {}).get("after", self.control) for settings in self.arms.values()} - set(self.arms)
        if unknown:
            raise ValueError(f"arms: there is no arm {', '.join(sorted(map(repr, unknown)))} to start after.")
        check_folders(self.arms)
        told = {name for settings in self.arms.values() for name in settings or {}} & {"output_dir", "seed"}
        if told:
            raise ValueError(f"arms: {', '.join(sorted(told))} is told here, the same for all arms.")

    @property
    def needs_task(self) -> bool:
        """Whether a run is trained or scored by more than the pretraining itself."""
        of_task = {"objective", "label_share"} & {name for settings in self.arms.values() for name in settings or {}}
        return bool(of_task or self.finetuning or self.probe_label_shares or self.corruption_severities)


def slug(arm: str) -> str:
    """The name of an arm's folder: its letters a to z, digits and dots, in lower case."""
    return re.sub(r"[^a-z0-9.]+", "_", arm.lower()).strip("_")


def check_folders(arms: Iterable[str]) -> None:
    """Raises a `ValueError` that names the arms which have no folder of their own, see [`slug`]."""
    folders: dict[str, str] = {}
    for arm in arms:
        folder = slug(arm)
        if not folder.strip("."):
            raise ValueError(
                f"arms: {arm!r} has no letter from a to z and no digit to name its folder after: rename it."
            )
        other = folders.setdefault(folder, arm)
        if other != arm:
            raise ValueError(f"arms: {other!r} and {arm!r} would both have the folder {folder!r}: rename one.")


def check_keys(name: str, given: dict, arguments: type) -> None:
    """Raises a `ValueError` that names the keys that are missing in a mapping, or that the class does not have."""
    known = {item.name: item.default is MISSING and item.default_factory is MISSING for item in fields(arguments)}
    missing, unknown = {key for key in known if known[key]} - set(given), set(given) - set(known)
    if missing or unknown:
        raise ValueError(f"{name}: missing keys {sorted(missing)}, unknown keys {sorted(unknown)}.")


@dataclass
class RobustnessArguments(Arguments):
    """Which models are scored under which corruptions, on what.

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
    choices = {"metric": ("mean_iou", "dice", "change_detection")}

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
    metric: str | None = field(default=None, metadata={"help": "Folder of modeling_vitp/metrics, as in fine-tuning."})
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
    """Which vision-language models are asked the questions of which rows."""

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
