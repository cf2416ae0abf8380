"""Command-line arguments of experiments."""

import re
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path

from lab.command import TREES_BASE, find_config
from modeling_vitp.command.paths import config_of_data, read_yaml
from modeling_vitp.command.settings import check_type
from modeling_vitp.training.arguments import Arguments, check_within

OBJECTIVES = ("none", "mae", "masks")  # of the control of the task
ROWS = ("label_share", "without_scenes")  # settings of an arm that select training rows of the task


@dataclass
class FinetuningPlan(Arguments):
    """Plan for fine-tuning the backbones of an experiment on any labels, as `vitp adapt` does."""

    limits = {"steps": "[1, inf)", "learning_rates": "(0, inf)", "label_shares": "(0, 1]"}

    data: str = field(
        metadata={
            "help": "Folder of labeled images in a layout of `vitp adapt`, or a configuration of finetune_detection."
        }
    )
    learning_rates: list[float] = field(
        metadata={"help": "Learning rates that the first seed of each arm tries on the validation split."}
    )
    steps: int | None = field(
        default=None, metadata={"help": "Steps of each fine-tuning. Default: the epochs of the configuration."}
    )
    label_shares: list[float] = field(
        default_factory=list, metadata={"help": "Shares of the training images, beside all, that are also used."}
    )
    settings: dict | str | None = field(
        default=None,
        metadata={"help": "Settings of the fine-tuning that replace those of `vitp adapt` or of the configuration."},
    )

    def __post_init__(self):
        super().__post_init__()
        settings = self.settings or {}
        if self.config is None and self.steps is None:
            raise ValueError("finetuning: set `steps` for a folder of labels.")
        if self.config is not None and len(self.learning_rates) > 1 and not settings.get("eval_split"):
            raise ValueError("finetuning: set one of `learning_rates`, or `eval_split` in `settings` to choose by.")
        if self.label_shares and settings.get("train_splits", ["train"]) != ["train"]:
            raise ValueError("finetuning: `label_shares` are shares of the split 'train'. Leave out `train_splits`.")

    @property
    def config(self) -> Path | None:
        """Configuration that `data` names, or `None` for a folder."""
        return config_of_data(self.data)


@dataclass
class TreeFinetuningPlan(Arguments):
    """Plan for fine-tuning the backbones of an experiment on the masks of the trees, with a held-out scene."""

    limits = {
        "learning_rates": "(0, inf)",
        "layer_decays": "(0, 1]",
        "label_shares": "(0, 1]",
        "held_out_top": "[0, inf)",
        "seed": "[0, inf)",
    }

    config: str = field(metadata={"help": "Configuration of recipes/finetune_segmentation.py."})
    learning_rates: list[float] = field(
        metadata={"help": "Candidate learning rates, for each arm and layer-wise decay."}
    )
    layer_decays: list[float] = field(
        metadata={"help": "Layer-wise decays of the learning rate; each is fine-tuned and scored."}
    )
    label_shares: list[float] = field(metadata={"help": "Shares of the training windows whose masks are used."})
    held_out_scene: str = field(
        metadata={"help": "Training scene with the held-out windows for choosing learning rates."}
    )
    held_out_top: int = field(metadata={"help": "First pixel row of the held-out windows in that scene."})
    seed: int = field(default=0, metadata={"help": "Seed of the runs for choosing learning rates."})

    def __post_init__(self):
        super().__post_init__()
        find_config(self.config)


@dataclass
class ExperimentArguments(Arguments):
    """Plan of an experiment on pretraining, and its output folder.

    Attributes:
        finetuning: mapping of the configuration, which is converted to [`FinetuningPlan`], or to [`TreeFinetuningPlan`]
            if it has a held-out scene.
    """

    limits = {"probe_label_shares": "(0, 1]", "corruption_severities": "[1, 5]"}

    output_dir: str = field(metadata={"help": "Output folder of runs, metrics.json and the picture."})
    claim: str = field(metadata={"help": "Claim that the experiment tests, in one sentence."})
    against: str = field(metadata={"help": "Result that would contradict the claim."})
    arms: dict | str | None = field(
        metadata={"help": "Arms by name, with the pretraining settings that differ from `base`."}
    )
    control: str = field(metadata={"help": "Name of the control arm, with which the others are compared."})
    measures: dict | str | None = field(metadata={"help": "Measures by title, as dotted keys of a run's metrics.json."})
    base: str = field(
        default=TREES_BASE,
        metadata={
            "help": "Configuration of all arms, of lab.trees.pretrain with `task: trees`, otherwise of pretrain."
        },
    )
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2, 3, 4], metadata={"help": "Seeds of each arm."})
    runs_dir: str | None = field(
        default=None,
        metadata={"help": "Folder of the runs, to reuse those of another experiment. Default: output_dir."},
    )
    finetuning: dict | str | None = field(
        default=None,
        metadata={"help": "Settings of FinetuningPlan, to fine-tune every backbone. Default: no fine-tuning."},
    )
    probe_label_shares: list[float] = field(
        default_factory=list,
        metadata={"help": "Shares of labeled windows, for probes of every backbone. Default: no probes."},
    )
    corruption_severities: list[int] = field(
        default_factory=list,
        metadata={"help": "Severities for probes under the twelve corruptions. Default: no corruptions."},
    )
    probe_color_jitter: dict | str | None = field(
        default=None,
        metadata={
            "help": "Settings of color_jitter for the training views of further probes. Default: no further probes."
        },
    )

    def __post_init__(self):
        super().__post_init__()
        if self.finetuning is not None:
            plan = TreeFinetuningPlan if "held_out_scene" in self.finetuning else FinetuningPlan
            check_keys("finetuning", self.finetuning, plan)
            self.finetuning = plan(**self.finetuning)
        if self.probe_color_jitter is not None:
            from modeling_vitp.images.pixels import ColorJitter

            check_keys("probe_color_jitter", self.probe_color_jitter, ColorJitter)
            try:
                ColorJitter(**self.probe_color_jitter)
            except ValueError as error:
                raise ValueError(f"probe_color_jitter: {error}") from error
        self.base = str(find_config(self.base))
        for name in ("seeds", "arms", "measures"):
            if not getattr(self, name):
                raise ValueError(f"{name} must not be empty.")
        base = read_yaml(self.base)
        if not isinstance(base, dict):
            raise ValueError(f"Expected base to be a pretraining configuration, got {self.base!r}.")
        sources = {source.get("name") for source in (base.get("mixture") or {}).get("sources", ())}
        folders: dict[str, str] = {}
        for arm, settings in self.arms.items():
            check_type("the name of an arm", arm, str)
            check_type(f"arm {arm!r}", settings, dict | None)
            settings, folder = settings or {}, slug(arm)
            other = folders.setdefault(folder, arm)
            if other != arm or not folder.strip("."):
                raise ValueError(
                    f"arms: {arm!r} needs a name of its own in letters from a to z and digits, for its folder. "
                    f"{folder!r} is that of {other!r}."
                )
            if unknown := set(settings.get("without_sources", ())) - sources:
                raise ValueError(f"arm {arm!r}: `without_sources` names unknown sources: {sorted(unknown)}.")
            share, scenes = settings.get("label_share", 1.0), settings.get("without_scenes", [])
            check_type(f"arm {arm!r}: label_share", share, float)
            check_within(f"arm {arm!r}: label_share", share, "(0, 1]")
            check_type(f"arm {arm!r}: without_scenes", scenes, list[str])
            if settings.get("objective", "none") not in OBJECTIVES:
                raise ValueError(
                    f"Expected objective of arm {arm!r} to be one of {', '.join(OBJECTIVES)}, got "
                    f"{settings['objective']!r}."
                )
            if settings.get("after", arm) not in self.arms:
                raise ValueError(f"arm {arm!r}: `after` names the unknown arm {settings['after']!r}.")
            if shared := settings.keys() & {"output_dir", "seed"}:
                raise ValueError(
                    f"arm {arm!r}: set {', '.join(sorted(shared))} for the whole experiment, not in an arm."
                )
        for title, path in self.measures.items():
            check_type(f"measure {title!r}", path, str)
        if self.control not in self.arms:
            raise ValueError(f"control: unknown arm {self.control!r}. Found: {', '.join(map(repr, self.arms))}.")

    @property
    def needs_task(self) -> bool:
        """True if runs need training or scores of the task beside the pretraining."""
        of_task = {"objective", *ROWS} & {name for settings in self.arms.values() for name in settings or {}}
        of_trees = isinstance(self.finetuning, TreeFinetuningPlan)
        probes = self.probe_label_shares, self.corruption_severities, self.probe_color_jitter is not None
        return bool(of_task or of_trees or any(probes))


def slug(arm: str) -> str:
    """Return the folder name of an arm: its letters a to z, digits and dots, in lower case."""
    return re.sub(r"[^a-z0-9.]+", "_", arm.lower()).strip("_")


def check_keys(name: str, given: dict, arguments: type) -> None:
    """Raise a `ValueError` that names missing keys of a mapping and keys that the class does not define."""
    known = {item.name: item.default is MISSING and item.default_factory is MISSING for item in fields(arguments)}
    missing, unknown = {key for key in known if known[key]} - set(given), set(given) - set(known)
    if missing or unknown:
        raise ValueError(f"{name}: missing keys {sorted(missing)}, unknown keys {sorted(unknown)}.")
