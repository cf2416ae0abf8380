"""Downstream tasks: the base class of task objects, and their registry. Importing them loads no heavy library."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from .arguments import BackboneArguments, FineTuningSettings, SplitArguments, StartArguments

if TYPE_CHECKING:
    import torch
    from torch.utils.data import Dataset
    from transformers import PreTrainedModel, TrainingArguments

    from ..data.settings import DataSettings
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
    """Downstream task: what a model of it is, and how it is trained and scored.

    A task object holds nothing of a run: its methods get the options, the data and the samples of a run as arguments.
    They import libraries of training only when they are called.

    Attributes:
        name: key of `TASKS`.
        arguments: class of the options of the data set.
        settings: class of the training settings that the task adds to those of transformers.
        start: class of the options of the start.
        training_config: full name of the class of training arguments, which inherits from `settings`.
        image_side: name of the training setting with the side of training images in pixels.
    """

    name: str
    arguments: ClassVar[type[SplitArguments]] = SplitArguments
    settings: ClassVar[type[FineTuningSettings]] = FineTuningSettings
    start: ClassVar[type[StartArguments]] = BackboneArguments
    training_config: ClassVar[str]
    image_side: ClassVar[str] = "image_size"

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
        raise NotImplementedError

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
