"""Command-line arguments of experiments."""

import re
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Annotated, Literal

from lab.command import TREES_BASE, find_config
from modeling_vitp.command.paths import config_of_data, read_yaml
from modeling_vitp.command.settings import (
    Interval,
    JsonText,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Probability,
    Settings,
    Share,
    from_mapping,
)

OBJECTIVES = ("none", "mae", "masks")  # of the controls of the task
OBJECTIVES_OF_IMAGES = ("none", "random", "mae")  # of the controls of a pretraining without a task
SETTINGS_OF_IMAGES = {"vision_model", "vision_image_size", "annotations"}  # what these controls need
ROWS = ("label_share", "without_scenes")  # settings of an arm that select training rows of the task


@dataclass
class FinetuningPlan(Settings):
    """Plan for fine-tuning the backbones of an experiment on any labels, as `vitp adapt` does."""

    data: str = field(
        metadata={
            "help": "Folder of labeled images in a layout of `vitp adapt`, or a configuration of finetune_detection."
        }
    )
    learning_rates: list[PositiveFloat] = field(
        metadata={"help": "Learning rates that the first seed of each arm tries on the validation split."}
    )
    steps: PositiveInt | None = field(
        default=None, metadata={"help": "Steps of each fine-tuning. Default: the epochs of the configuration."}
    )
    label_shares: list[Share] = field(
        default_factory=list, metadata={"help": "Shares of the training images, beside all, that are also used."}
    )
    settings: dict | JsonText | None = field(
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
class TreeFinetuningPlan(Settings):
    """Plan for fine-tuning the backbones of an experiment on the masks of the trees, with a held-out scene."""

    config: str = field(metadata={"help": "Configuration of recipes/finetune_segmentation.py."})
    learning_rates: list[PositiveFloat] = field(
        metadata={"help": "Candidate learning rates, for each arm and layer-wise decay."}
    )
    layer_decays: list[Share] = field(
        metadata={"help": "Layer-wise decays of the learning rate; each is fine-tuned and scored."}
    )
    label_shares: list[Share] = field(metadata={"help": "Shares of the training windows whose masks are used."})
    held_out_scene: str = field(
        metadata={"help": "Training scene with the held-out windows for choosing learning rates."}
    )
    held_out_top: NonNegativeInt = field(metadata={"help": "First pixel row of the held-out windows in that scene."})
    seed: NonNegativeInt = field(default=0, metadata={"help": "Seed of the runs for choosing learning rates."})

    def __post_init__(self):
        super().__post_init__()
        find_config(self.config)


@dataclass
class SitePlan(Settings):
    """Plan for probes of frozen backbones on several sites, see lab.experiments.site_probes."""

    data: dict | JsonText = field(metadata={"help": "Settings of `data` of vitp probe."})
    task: str = field(metadata={"help": "Task of the labels."})
    sites: list[str] = field(metadata={"help": "Splits that are scored, of the own site and of held-out ones."})
    layers: list[PositiveInt] = field(metadata={"help": "Numbers of layers of the ViT, of which one is chosen."})
    score: str = field(metadata={"help": "Score of the probes."})
    image_size: PositiveInt = field(metadata={"help": "Side in pixels of the square that images are resized to."})
    train_split: str = field(default="train", metadata={"help": "Split that the probes are trained on."})
    validation_split: str = field(default="val", metadata={"help": "Split that shares and layers are chosen on."})
    probe: str = field(default="linear", metadata={"help": "Probe whose score on the validation split chooses."})
    shares: list[Probability] = field(
        default_factory=lambda: [0.0, 0.25, 0.5, 0.75],
        metadata={"help": "Shares of the way from the start to the trained ViT, beside the whole way; one is chosen."},
    )

    def __post_init__(self):
        super().__post_init__()
        if self.validation_split in self.sites or self.train_split in self.sites:
            raise ValueError("sites: a split that is trained on or chosen by is no site.")


@dataclass
class ArmSettings(Settings):
    """Settings of an arm beside those of the pretraining."""

    objective: Literal["none", "random", "mae", "masks"] | None = field(
        default=None,
        metadata={
            "help": "Objective of a control, see lab.experiments.controls and, of a base without a task, "
            "lab.experiments.objectives. Default: pretraining."
        },
    )
    after: str | None = field(default=None, metadata={"help": "Name of the arm whose ViT this arm starts from."})
    label_share: Share = field(default=1.0, metadata={"help": "Share of the training rows of the task."})
    without_scenes: list[str] = field(
        default_factory=list, metadata={"help": "Scenes whose training rows of the task are left out."}
    )
    without_sources: list[str] = field(
        default_factory=list, metadata={"help": "Sources of the mixture that are left out."}
    )


@dataclass
class ExperimentArguments(Settings):
    """Plan of an experiment on pretraining, and its output folder.

    Attributes:
        finetuning: mapping of the configuration, which is converted to [`FinetuningPlan`], or to [`TreeFinetuningPlan`]
            if it has a held-out scene.
    """

    output_dir: str = field(metadata={"help": "Output folder of runs, metrics.json and the picture."})
    claim: str = field(metadata={"help": "Claim that the experiment tests, in one sentence."})
    against: str = field(metadata={"help": "Result that would contradict the claim."})
    arms: dict[str, dict | None] | JsonText | None = field(
        metadata={"help": "Arms by name, with the pretraining settings that differ from `base`."}
    )
    control: str = field(metadata={"help": "Name of the control arm, with which the others are compared."})
    measures: dict[str, str] | JsonText | None = field(
        metadata={"help": "Measures by title, as dotted keys of a run's metrics.json."}
    )
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
    finetuning: dict | JsonText | None = field(
        default=None,
        metadata={"help": "Settings of FinetuningPlan, to fine-tune every backbone. Default: no fine-tuning."},
    )
    site_probes: dict | JsonText | None = field(
        default=None,
        metadata={"help": "Settings of SitePlan, to probe every backbone on several sites. Default: no such probes."},
    )
    probe_label_shares: list[Share] = field(
        default_factory=list,
        metadata={"help": "Shares of labeled windows, for probes of every backbone. Default: no probes."},
    )
    corruption_severities: list[Annotated[int, Interval("[1, 5]")]] = field(
        default_factory=list,
        metadata={"help": "Severities for probes under the twelve corruptions. Default: no corruptions."},
    )
    probe_color_jitter: dict | JsonText | None = field(
        default=None,
        metadata={
            "help": "Settings of color_jitter for the training views of further probes. Default: no further probes."
        },
    )

    def __post_init__(self):
        super().__post_init__()
        if self.finetuning is not None:
            plan = TreeFinetuningPlan if "held_out_scene" in self.finetuning else FinetuningPlan
            self.finetuning = from_mapping(plan, self.finetuning, "finetuning")
        if self.site_probes is not None:
            self.site_probes = from_mapping(SitePlan, self.site_probes, "site_probes")
        if self.probe_color_jitter is not None:
            from modeling_vitp.images.pixels import ColorJitter

            from_mapping(ColorJitter, self.probe_color_jitter, "probe_color_jitter")
        self.base = str(find_config(self.base))
        for name in ("seeds", "arms", "measures"):
            if not getattr(self, name):
                raise ValueError(f"{name} must not be empty.")
        base = read_yaml(self.base)
        if not isinstance(base, dict):
            raise ValueError(f"Expected base to be a pretraining configuration, got {self.base!r}.")
        sources = {source.get("name") for source in (base.get("mixture") or {}).get("sources", ())}
        folders: dict[str, str] = {}
        own_names = {item.name for item in fields(ArmSettings)}
        for arm, settings in self.arms.items():
            settings = settings or {}
            own_settings = {name: value for name, value in settings.items() if name in own_names}
            arm_settings = from_mapping(ArmSettings, own_settings, f"arm {arm!r}")
            folder = slug(arm)
            other = folders.setdefault(folder, arm)
            if other != arm or not folder.strip("."):
                raise ValueError(
                    f"arms: {arm!r} needs a name of its own in letters from a to z and digits, for its folder. "
                    f"{folder!r} is that of {other!r}."
                )
            if unknown := set(arm_settings.without_sources) - sources:
                raise ValueError(f"arm {arm!r}: `without_sources` names unknown sources: {sorted(unknown)}.")
            if arm_settings.after not in (None, *self.arms):
                raise ValueError(f"arm {arm!r}: `after` names the unknown arm {arm_settings.after!r}.")
            if shared := settings.keys() & {"output_dir", "seed"}:
                raise ValueError(
                    f"arm {arm!r}: set {', '.join(sorted(shared))} for the whole experiment, not in an arm."
                )
        if self.control not in self.arms:
            raise ValueError(f"control: unknown arm {self.control!r}. Found: {', '.join(map(repr, self.arms))}.")

    @property
    def needs_task(self) -> bool:
        """True if runs need training or scores of the task beside the pretraining."""
        base = read_yaml(self.base)
        has_images = "task" not in base and base.keys() >= SETTINGS_OF_IMAGES
        for settings in self.arms.values():
            if not set(ROWS).isdisjoint(settings or {}):
                return True
            objective = (settings or {}).get("objective")
            if objective is not None and not (has_images and objective in OBJECTIVES_OF_IMAGES):
                return True
        of_trees = isinstance(self.finetuning, TreeFinetuningPlan)
        probes = self.probe_label_shares, self.corruption_severities, self.probe_color_jitter is not None
        return bool(of_trees or any(probes))


def slug(arm: str) -> str:
    """Return the folder name of an arm: its letters a to z, digits and dots, in lower case."""
    return re.sub(r"[^a-z0-9.]+", "_", arm.lower()).strip("_")
