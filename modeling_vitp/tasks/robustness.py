"""Scores of a fine-tuned model on its test images, clean or corrupted: the base class of all tasks."""

from collections.abc import Callable
from typing import Any

from torch.utils.data import Dataset, Subset
from transformers import PreTrainedConfig, Trainer, TrainerCallback

from ..cards.record import read_record
from ..images.corruptions import CorruptedImages, move_mask
from ..images.large import weights_digest
from ..input_spec import InputSpec
from ..training.resuming import fingerprint_data
from .robustness_arguments import RobustnessArguments


class ProgressCallback(TrainerCallback):
    """Callback that reports the number of images of each batch.

    Args:
        update: function that is called with the number.
        num_images: number of all images.
        images_per_step: number of images of each batch but the last one.
    """

    def __init__(self, update: Callable[[int], Any], num_images: int, images_per_step: int):
        self.update = update
        self.remaining_images = num_images
        self.images_per_step = images_per_step

    def on_prediction_step(self, args, state, control, **kwargs):
        images_in_step = min(self.images_per_step, self.remaining_images)
        self.remaining_images -= images_in_step
        self.update(images_in_step)


class RobustnessScorer:
    """Base class of the scorers of a task: a fine-tuned model with its test images, clean or corrupted.

    Settings that are missing in the arguments are taken from the configuration that they name, or else from the record
    of the model's run. A subclass sets `samples`, `data`, `score` and `args`, and implements `trainer`.

    Args:
        name: folder or Hub id of the model.
        args: arguments of the command.

    Attributes:
        data: description of the images and annotations, which must be the same for all models.
        move: function that moves the annotations of a sample, see
            [`~modeling_vitp.images.corruptions.CorruptedImages`].
        score: key of the metric that is compared.
        args: training arguments with the evaluation settings.
        samples: clean images with their annotations.
        trainer: trainer of the model. It is loaded on first use, so that one model at a time is in memory.

    Raises:
        ValueError: If the test data are unknown or incomplete, or the model does not match them.
    """

    scored_with: tuple[str, ...]
    images_per_step = 1
    move = staticmethod(move_mask)
    data: dict[str, Any]
    score: str
    samples: Dataset
    trainer: Trainer

    def __init__(self, name: str, args: RobustnessArguments):
        self.name = name
        self.seed = args.seed
        self.jpeg_quality = args.jpeg_quality
        self.configuration = args.configuration or recorded_configuration(name)
        self.described = args.data or self.configuration.get("data")
        self.split = args.split or self.configuration.get("test_split") or self.configuration.get("eval_split")
        for option, setting in (("data", self.described), ("split", self.split)):
            if setting is None:
                raise ValueError(f"{name} has no record of the {option} it was scored on. Set --{option}.")
        if args.data_root:
            self.described = {**self.described, "root": args.data_root}

    def _set_samples(self, samples: Dataset, files: Any, limit: int | None) -> None:
        self.samples = samples
        if limit is not None and limit < len(samples):
            indices = [number * len(samples) // limit for number in range(limit)]
            self.samples = Subset(samples, indices)
        self.data = {
            "data": self.described,
            "split": self.split,
            "limit": limit,
            "files": fingerprint_data(files),
        }

    def _check_bands_and_classes(self, config: PreTrainedConfig, names: list[str], input_spec: dict | None) -> None:
        if input_spec is not None and InputSpec.from_dict(input_spec).band_names is not None:
            raise ValueError(f"Corruptions need the bands red, green and blue, but {self.name} takes other bands.")
        classes = list(config.id2label.values())
        default_names = [f"LABEL_{index}" for index in range(len(names))]  # Converted checkpoints have such names.
        if classes not in (names, default_names):
            raise ValueError(
                f"Expected the {len(names)} classes of the data, {names}, got {len(classes)} classes of {self.name}: "
                f"{classes}."
            )

    def _scoring_settings(self, args: RobustnessArguments, *more: str) -> dict[str, Any]:
        names = [*more, *self.scored_with]
        unsupported_names = sorted(set(args.scored_with) - set(names))
        if unsupported_names:
            raise ValueError(f"{', '.join(unsupported_names)}: not supported for {self.name}. Leave it out.")
        settings = {
            "output_dir": args.output_dir,
            "do_train": False,
            "dataloader_num_workers": args.dataloader_num_workers,
            "report_to": "none",
            "disable_tqdm": True,
        }
        for name in names:
            setting = args.scored_with.get(name, self.configuration.get(name))
            if setting is not None:
                settings[name] = setting
        return settings

    @property
    def settings(self) -> dict[str, Any]:
        """Settings on which the scores depend in addition to the data: those of prediction, and a hash of weights."""
        settings = {name: getattr(self.args, name) for name in self.scored_with}
        settings["weights"] = weights_digest(self.trainer.model)
        return settings

    @property
    def greater_is_better(self) -> bool:
        """Return whether a higher score is better."""
        return self.trainer.greater_is_better(self.score)

    def __len__(self) -> int:
        return len(self.samples)

    def evaluate(self, corruption: str | None, severity: int, update: Callable[[int], Any]) -> dict[str, float]:
        """Return all metrics of corrupted images.

        Random draws depend on the seed, the image and the corruption alone. Annotations move with the images, see
        [`~modeling_vitp.images.corruptions.motion`].

        Args:
            corruption: name of the corruption; `None` for clean images.
            severity: severity from 1 to 5.
            update: function that is called with the number of images after each batch.
        """
        samples = self.samples
        if corruption is not None:
            samples = CorruptedImages(samples, corruption, severity, self.seed, self.move, self.jpeg_quality)
        progress = ProgressCallback(update, len(samples), self.images_per_step)
        self.trainer.add_callback(progress)
        try:
            loader = self.trainer.get_eval_dataloader(samples)
            output = self.trainer.evaluation_loop(loader, self.name, metric_key_prefix="test")
        finally:
            self.trainer.remove_callback(progress)
        return {name.removeprefix("test_"): value for name, value in output.metrics.items()}


def recorded_configuration(name: str) -> dict[str, Any]:
    """Return the evaluation settings in the record of a model's run, as a fine-tuning configuration."""
    record = read_record(name).get("evaluated_on") or {}
    settings = record.get("scored_with") or {}
    return {
        "data": record.get("data"),
        "test_split": record.get("test"),
        "eval_split": record.get("eval"),
        **settings,
    }
