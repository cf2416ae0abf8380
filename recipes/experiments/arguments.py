"""Arguments of experiments on the command line."""

import re
from collections.abc import Iterable
from dataclasses import MISSING, dataclass, field, fields

from modeling_vitp.command.paths import find_config
from modeling_vitp.training.arguments import Arguments


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
        default=None,
        metadata={"help": "Fine-tunes every backbone: see FinetuningPlan."},
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
        check_arm_folders(self.arms)
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


def check_arm_folders(arms: Iterable[str]) -> None:
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
