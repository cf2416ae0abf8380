"""Downstream tasks: the base class of task objects, and their registry. Importing them loads no heavy library."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from .arguments import BackboneArguments, FineTuningSettings, SplitArguments, StartArguments

if TYPE_CHECKING:
    import torch
    from torch.utils.data import Dataset
    from transformers import PreTrainedConfig, PreTrainedModel, TrainingArguments

    from ..data.layouts import Layout
    from ..data.settings import DataSettings
    from ..probing.base import Probe
    from .robustness import RobustnessScorer
    from .trainer import FineTuningTrainer

TASKS: dict[str, "Task"] = {}  # by the name that users type: `vitp finetune_NAME`


@dataclass
class FineTuningOptions:
    """Options of a fine-tuning.

    Args:
        data: data set, its splits, and what is written about its scores.
        training: training arguments, of the class `training_config` of the task.
        start: model that the training starts from.
    """

    data: SplitArguments
    training: "TrainingArguments"
    start: StartArguments


def register_task(name: str) -> Callable[[type["Task"]], type["Task"]]:
    """Return a decorator that adds an object of a subclass of [`Task`] to `TASKS`."""

    def register(task_class: type[Task]) -> type[Task]:
        task = task_class()
        task.name = name
        TASKS[name] = task
        return task_class

    return register


class Task:
    """Downstream task: what a model of it is, and how it is trained, scored and compared.

    A task object holds nothing of a run: its methods get the options, the data and the samples of a run as arguments.
    They import libraries of training only when they are called. Fine-tuning and its estimates need the methods up to
    [`loss`], `vitp probe` the probe class, and `vitp adapt` also the layout class and the methods after it.

    Attributes:
        name: key of `TASKS`.
        arguments: class of the options of the data set.
        settings: class of the training settings that the task adds to those of transformers.
        start: class of the options of the start.
        training_config: full name of the class of training arguments, which inherits from `settings`.
        image_side: name of the training setting with the side of training images in pixels.
        variants: values of the option `task` of the data set, if it has one.
        min_classes: least number of classes.
        draws_questions: whether the pretraining of `vitp adapt` draws its questions from the labels.
        keeps_patches: whether models keep the patches of their backbone, so that images have whole patches of it.
        cuts_large_images: whether `vitp adapt` cuts large images into windows.
    """

    name: str
    arguments: ClassVar[type[SplitArguments]] = SplitArguments
    settings: ClassVar[type[FineTuningSettings]] = FineTuningSettings
    start: ClassVar[type[StartArguments]] = BackboneArguments
    training_config: ClassVar[str]
    image_side: ClassVar[str] = "image_size"
    variants: ClassVar[tuple[str, ...]] = ()
    min_classes: ClassVar[int] = 2
    draws_questions: ClassVar[bool] = True
    keeps_patches: ClassVar[bool] = False
    cuts_large_images: ClassVar[bool] = False

    @property
    def data_class(self) -> type["DataSettings"]:
        """Class of the setting `data`."""
        raise NotImplementedError

    @property
    def probe_class(self) -> type["Probe"]:
        """Class of the probes of frozen features."""
        raise NotImplementedError

    @property
    def scorer_class(self) -> type["RobustnessScorer"]:
        """Class that scores models of the task on clean and corrupted images."""
        raise NotImplementedError

    @property
    def layout_class(self) -> type["Layout"] | None:
        """Base class of the layouts of labels that `vitp adapt` reads for this task; `None` if it reads none."""
        return None

    def check_start(self, options: FineTuningOptions) -> None:
        """Check the options of the start, before any file of the data is opened.

        Raises:
            ValueError: if they are wrong.
        """
        raise NotImplementedError

    def open_data(self, options: FineTuningOptions) -> "DataSettings":
        """Return the data set of a run, in which no split has been opened.

        Raises:
            ValueError: if the settings are wrong, or the folder is not recognized.
        """
        return self.data_class.from_dict(options.data.data)

    def check_splits(self, data: "DataSettings", splits: Sequence[str], options: FineTuningOptions) -> None:
        """Raise a `ValueError` if splits share images, patients or cases."""
        data.check_disjoint(splits)

    def open_split(self, data: "DataSettings", name: str, options: FineTuningOptions) -> "Dataset":
        """Return the samples of a split."""
        return data.open([name])

    def training_samples(self, data: "DataSettings", options: FineTuningOptions) -> "Dataset":
        """Return the samples of the training splits."""
        return data.open(options.data.train_splits)

    def check_samples(
        self, data: "DataSettings", samples: Mapping[str, "Dataset | None"], options: FineTuningOptions
    ) -> dict[str, Any]:
        """Check the samples of a run before a model is loaded.

        Args:
            samples: samples under `train`, `eval` and `test`; `None` for those that the run does not need.

        Returns:
            Entries of the metrics, such as the number of training images of each class.

        Raises:
            ValueError: if the samples do not suit the task, or one of them would stop the run when it is scored.
        """
        return {}

    def load_model(
        self, data: "DataSettings", options: FineTuningOptions, checked: Mapping[str, Any]
    ) -> "PreTrainedModel":
        """Load the model with the classes of the data, see [`~modeling_vitp.tasks.loading.load_on_backbone`].

        Args:
            checked: result of [`check_samples`]; empty for an estimate of the cost.
        """
        raise NotImplementedError

    def create_trainer(
        self,
        model: "PreTrainedModel",
        data: "DataSettings",
        samples: Mapping[str, "Dataset | None"],
        options: FineTuningOptions,
    ) -> "FineTuningTrainer":
        """Return the trainer of a model, with the image processor of the start."""
        raise NotImplementedError

    def write_submission(self, trainer: "FineTuningTrainer", data: "DataSettings", options: FineTuningOptions) -> None:
        """Write the files for the server of a benchmark, if the options of the task have a `submission`."""
        raise NotImplementedError

    def score_controls(
        self,
        trainer: "FineTuningTrainer",
        data: "DataSettings",
        samples: Mapping[str, "Dataset | None"],
        options: FineTuningOptions,
    ) -> dict[str, float]:
        """Return further scores on the test split that show what the main score is worth. By default there are none."""
        return {}

    def loss(self, model: "PreTrainedModel", number: int, side: int) -> "torch.Tensor":
        """Return the loss of a model on samples without values, for an estimate of the cost.

        Args:
            number: number of samples.
            side: side of the images in pixels.
        """
        raise NotImplementedError

    def next_commands(self, folder: str, data: Any) -> list[str]:
        """Return commands for a fine-tuned model, with placeholders in capitals, that the end of a run prints.

        Args:
            folder: folder of the model, quoted for a shell.
            data: data of the fine-tuning, from `open_data`.
        """
        return []

    def infer_data(self, root: Path, layout: "Layout") -> dict[str, Any]:
        """Return the setting `data` of a folder, with the splits that have labels."""
        data = self.data_class.infer(root)
        splits = {}
        for split, files in data["splits"].items():
            if "mask" in files or "annotations" in files:
                splits[split] = files
        return {**data, "splits": splits}

    def read_split(self, data: Mapping[str, Any], split: str, settings: Mapping[str, Any]) -> dict[Path, set]:
        """Read the labels of a split, and return the classes in each image.

        Splits are drawn, and parts of the training images chosen, so that they have images of each class.

        Args:
            data: setting `data`.
            split: name of the split.
            settings: further settings of the fine-tuning.
        """
        raise NotImplementedError

    def class_names(self, data: Mapping[str, Any], labels: Mapping[str, Mapping[Path, set]]) -> list:
        """Return the setting `classes` of `data`, for labels by split."""
        return data["classes"]

    def variant_settings(self, variant: str | None, layout: type["Layout"]) -> dict[str, Any]:
        """Return the setting `task` of the fine-tuning if it differs from the default.

        Args:
            variant: wanted variant of the task. Default: the one of the layout.
            layout: layout of the labels.
        """
        return {}

    def phrases(self, class_names: Mapping[str, str], data: Mapping[str, Any]) -> dict[str, str | None]:
        """Return the phrases of classes for `make_instructions --names`.

        Args:
            class_names: given phrases by class.
            data: setting `data`.
        """
        return dict(class_names)

    def fine_tuning_defaults(
        self, config: "PreTrainedConfig", size: tuple[int, int], window: int | None
    ) -> dict[str, Any]:
        """Return the image size and batch size of a fine-tuning.

        Args:
            config: configuration of the ViT.
            size: height and width of an image.
            window: side of the windows that images are cut into, if they are cut.
        """
        raise NotImplementedError


def find_task(name: str) -> Task | None:
    """Return a task by its name or by that of a variant, `None` if the name is unknown."""
    for task in TASKS.values():
        if name == task.name or name in task.variants:
            return task
    return None
