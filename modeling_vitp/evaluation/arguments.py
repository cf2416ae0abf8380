"""Arguments of experiments on the command line."""

from dataclasses import dataclass, field, fields

from ..training.arguments import SFT_MODULES, VRLArguments
from ..training.command_line import field_names, find_config, find_data
from ..training.values import Arguments


@dataclass
class ExperimentArguments(Arguments):
    """The plan of an experiment on pretraining, and where it goes."""

    output_dir: str = field(metadata={"help": "Where runs, metrics.json and the picture go."})
    claim: str = field(metadata={"help": "What the experiment is about, in a sentence."})
    against: str = field(metadata={"help": "What result would speak against the claim."})
    arms: dict | str = field(metadata={"help": "By name, the settings of the pretraining that differ from `base`."})
    control: str = field(metadata={"help": "The arm that the others are compared with."})
    measures: dict | str = field(metadata={"help": "By title, a figure in a run's metrics.json: its keys, with dots."})
    base: str = field(default="quickstart", metadata={"help": "Configuration of recipes/pretrain.py."})
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2, 3, 4], metadata={"help": "Of each arm."})

    def __post_init__(self):
        super().__post_init__()
        self.base = str(find_config(self.base))
        if self.control not in self.arms:
            raise ValueError(f"control: there is no arm {self.control!r}, only {', '.join(map(repr, self.arms))}.")
        told = {name for settings in self.arms.values() for name in settings or {}} & {"output_dir", "seed"}
        if told:
            raise ValueError(f"arms: {', '.join(sorted(told))} is told here, the same for all arms.")


@dataclass
class CompareArguments(Arguments):
    """What is compared, on what."""

    limits = {
        "label_shares": "(0, 1]",
        "drop_ratios": "[0, 1)",
        "learning_rates": "(0, inf)",
        "held_out_top": "[0, inf)",
    }

    output_dir: str = field(metadata={"help": "Where runs, metrics.json and the table go."})
    dataset_name: str = field(metadata={"help": "recipes/data/aerial_trees, or rows like these."})
    finetuning: str = field(metadata={"help": "Configuration of recipes/finetune_segmentation.py."})
    from_scratch: dict | str | None = field(metadata={"help": "The model to pretrain, see recipes/pretrain.py."})
    pretraining: dict | str | None = field(metadata={"help": "Settings of the pretraining, of ViTPTrainingConfig."})
    held_out_scene: str = field(metadata={"help": "Scene of the ground that learning rates are chosen on."})
    held_out_top: int = field(metadata={"help": "Training windows of that scene from here on, in pixels, are it."})
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2], metadata={"help": "At least two."})
    label_shares: list[float] = field(default_factory=lambda: [1.0, 0.1], metadata={"help": "Of the windows."})
    drop_ratios: list[float] = field(default_factory=lambda: [0.0, 0.75], metadata={"help": "VRL, in pretraining."})
    learning_rates: list[float] = field(
        default_factory=lambda: [3e-4, 1e-3, 3e-3], metadata={"help": "Of fine-tuning, to choose from."}
    )

    def __post_init__(self):
        super().__post_init__()
        self.dataset_name, self.finetuning = find_data(self.dataset_name), str(find_config(self.finetuning))
        if len(set(self.seeds)) < 2:
            raise ValueError(f"seeds={self.seeds}: a spread needs at least two.")
        inherited = set().union(*(field_names(module) for module in SFT_MODULES))
        known = {item.name for item in fields(VRLArguments)} | inherited
        unknown = sorted(set(self.pretraining) - (known - {"output_dir", "seed", "vrl_drop_ratio"}))
        if unknown:
            raise ValueError(
                f"pretraining: {unknown} are no settings of it; output, seed and drop ratio are told here."
            )
