"""Arguments of `adapt`."""

import re
from dataclasses import dataclass, field
from typing import Any

from ..command.paths import find_config, read_yaml
from ..command.settings import JsonText, NonNegativeInt, PositiveFloat, PositiveInt, Settings, Share, check_value

START = "start"
RANDOM = "random"
MAE = "mae"
ADAPTED = "adapted"
LANGUAGE_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
UNITS = {"s": 1, "min": 60, "h": 3600, "d": 86400}
# Settings that `adapt` sets for each of its runs, with its own option for them, if there is one.
SET_OPTIONS = {
    "pretraining": {
        "output_dir": "output_dir",
        "eval_strategy": None,
        "report_to": None,
        "seed": "seed",
        "max_steps": "steps",
        "num_train_epochs": "steps",
        "dataset_name": "instructions",
        "mixture": "instructions",
        "annotations": "data",
        "require": None,
        "probe_data": None,
        "vision_image_size": "image_size",
    },
    "mae": {"output_dir": "output_dir", "seed": "seed", "max_steps": "steps", "report_to": None},
    "fine_tuning": {
        "output_dir": "output_dir",
        "eval_strategy": None,
        "report_to": None,
        "seed": "seeds",
        "max_steps": "fine_tuning_steps",
        "num_train_epochs": "fine_tuning_steps",
        "learning_rate": "learning_rates",
        "data": "data",
        "train_splits": "data",
        "eval_split": "data",
        "test_split": "data",
        "model_name_or_path": "start",
    },
}
# Settings of the pretraining that the option `start` replaces.
START_OPTIONS = {
    "model_name_or_path": "start",
    "vision_model": "start",
    "language_model": "language_model",
}


def read_budget(text: str) -> float:
    """Return the seconds of a duration such as `24h`, `90min` or `1.5d`.

    Raises:
        ValueError: if the text is not a positive number with one of these units.
    """
    match = re.fullmatch(r"(\d+\.?\d*)\s*(s|min|h|d)", text.strip())
    if match is not None:
        number = float(match[1])
        if number > 0:
            return number * UNITS[match[2]]
    raise ValueError(f"Expected budget to be a duration such as 24h, 90min or 600s, got {text!r}.")


@dataclass
class AdaptArguments(Settings):
    """Arguments of `adapt`.

    Attributes:
        seconds: budget in seconds.
    """

    data: str | None = field(
        default=None,
        metadata={
            "help": "Folder of labeled images: COCO, VOC, DOTA, YOLO, GeoJSON, masks, or one folder for each class. Or "
            "a configuration of finetune_detection, such as rsar, whose task and data are used."
        },
    )
    start: str | None = field(
        default=None,
        metadata={
            "help": "Folder or Hub id of the ViT to adapt, such as facebook/dinov2-base, or of a vision-language model "
            "of `vitp pretrain` or another one, whose ViT is taken. Default: the start in `pretraining`."
        },
    )
    language_model: str | None = field(
        default=None,
        metadata={"help": f"Folder or Hub id of the causal LM that a ViT is combined with ({LANGUAGE_MODEL})."},
    )
    baselines: list[str] = field(
        default_factory=lambda: [START, RANDOM],
        metadata={
            "help": "Backbones to compare with: start, random (weights), mae (a masked autoencoder that is trained on "
            "the same images with as many operations), and folders or Hub ids of ViTs."
        },
    )
    image_size: PositiveInt | None = field(
        default=None,
        metadata={
            "help": "Side of the images of all backbones in pixels, in multiples of two patches of the start. Default: "
            "that of an image, at least 8 patches and at most the size of the start."
        },
    )
    budget: str = field(default="24h", metadata={"help": "Time for the whole command, such as 24h or 90min (24h)."})
    task: str | None = field(
        default=None,
        metadata={
            "help": "Task that the backbones are compared on: classification, segmentation, detection, oriented or "
            "instances. Default: what the labels are."
        },
    )
    class_names: dict | JsonText | None = field(
        default=None,
        metadata={
            "help": "Phrases of the classes in the questions as JSON, without an article, such as "
            """'{"class 1": "tree"}'."""
        },
    )
    scene_pattern: str | None = field(
        default=None,
        metadata={
            "help": "Regular expression whose first group in an image's path is its scene. All images of a scene are "
            "in one split. Default: by coordinates, or by file names without tile numbers."
        },
    )
    instructions: str | None = field(
        default=None,
        metadata={
            "help": "Captions or instructions to pretrain on, as --dataset_name of `vitp pretrain`, instead of "
            "questions that are made from the labels."
        },
    )
    label_fractions: list[Share] = field(
        default_factory=lambda: [1.0],
        metadata={"help": "Fractions of the training images that backbones are also compared on, such as 0.1 0.25 1."},
    )
    seeds: list[NonNegativeInt] | None = field(
        default=None, metadata={"help": "Seeds of the fine-tuning. Default: 0 1 2, or fewer if the budget is short."}
    )
    learning_rates: list[PositiveFloat] = field(
        default_factory=lambda: [3e-5, 1e-4, 3e-4],
        metadata={"help": "Learning rates that are tried for each backbone on the validation split."},
    )
    steps: PositiveInt | None = field(
        default=None, metadata={"help": "Steps of the pretraining. Default: as many as the budget allows."}
    )
    fine_tuning_steps: PositiveInt | None = field(
        default=None, metadata={"help": "Steps of each fine-tuning. Default: as many as the budget allows."}
    )
    pretraining: dict | str | None = field(
        default=None,
        metadata={"help": "Settings of `vitp pretrain` that replace the chosen ones: JSON, or a configuration."},
    )
    fine_tuning: dict | str | None = field(
        default=None,
        metadata={"help": "Settings of the fine-tuning that replace the chosen ones: JSON, or a configuration."},
    )
    mae: dict | JsonText | None = field(
        default=None,
        metadata={
            "help": "Settings of the masked autoencoder as JSON, such as "
            """'{"learning_rate": 3e-4}'. Default: precision and image size of the pretraining."""
        },
    )
    plugins: list[str] = field(
        default_factory=list,
        metadata={"help": "Python files that register layouts of labeled images, see docs/extending.md."},
    )
    seed: int = field(default=0, metadata={"help": "Seed of the splits, the questions and the pretraining (0)."})
    dry_run: bool = field(default=False, metadata={"help": "Stop after the plan. Default: false."})
    allow_overlap: bool = field(
        default=False,
        metadata={"help": "Go on with test images that are, or may be, in the training data. Default: false."},
    )
    force: bool = field(
        default=False,
        metadata={
            "help": "Go on where the command would stop: answers that follow from their questions, test images in the "
            "training data or of one scene, a backbone that is worse after a tenth of the steps or not better than its "
            "start on the validation images. Default: false."
        },
    )
    output_dir: str | None = field(default=None, metadata={"help": "Output folder. The same command resumes in it."})

    def __post_init__(self):
        super().__post_init__()
        self.mae = self.free_settings("mae")
        self.pretraining = self.free_settings("pretraining")
        self.fine_tuning = self.free_settings("fine_tuning")
        self.seconds = read_budget(self.budget)
        for name in ("data", "output_dir"):
            if not getattr(self, name):
                raise ValueError(f"{name} is missing: give --data FOLDER --start VIT --output_dir FOLDER.")
        start_names = ("model_name_or_path", "vision_model", "from_scratch")
        if self.start is None and not any(self.pretraining.get(name) for name in start_names):
            raise ValueError("start is missing: give --start facebook/dinov2-base, or the folder of a ViT.")
        for name in ("baselines", "seeds", "learning_rates", "label_fractions"):
            values = getattr(self, name)
            if values is not None and (not values or len(set(values)) < len(values)):
                raise ValueError(f"{name} must be a list without duplicates, got {values}.")
        self.label_fractions = sorted({*self.label_fractions, 1.0}, reverse=True)

    @property
    def needs_weights(self) -> bool:
        """Whether models are run. The estimates of a dry run with all numbers of steps need no weights."""
        return not self.dry_run or None in (self.steps, self.fine_tuning_steps, self.seeds)

    def free_settings(self, field_name: str) -> dict[str, Any]:
        """Return the settings of a run without those that `adapt` sets.

        A configuration is for a command of its own, and its settings that `adapt` sets are left out. In JSON they are
        errors.

        Args:
            field_name: field with the settings, `pretraining` or `fine_tuning`.
        """
        settings = getattr(self, field_name)
        is_configuration = isinstance(settings, str)
        if is_configuration:
            file = settings
            settings = read_yaml(find_config(file))
            check_value(f"{field_name}={file}", settings, dict)
        if "hub_token" in (settings or {}):
            raise ValueError(
                f"{field_name} must not set hub_token, which would be written to the files of the run. Remove it, and "
                "log in with `hf auth login`."
            )
        options = dict(SET_OPTIONS[field_name])
        if field_name == "pretraining" and self.start is not None:
            options.update(START_OPTIONS)
        free_settings = {}
        for name, value in (settings or {}).items():
            if name not in options:
                free_settings[name] = value
            elif not is_configuration:
                remedy = "remove it" if options[name] is None else f"set {options[name]} of adapt instead"
                raise ValueError(f"{field_name} must not set {name}: {remedy}.")
        return free_settings
