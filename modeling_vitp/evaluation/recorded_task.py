"""What models of all fine-tunings have in common under corruptions: what they are scored on, as their runs recorded."""

from collections.abc import Callable
from typing import Any

from torch.utils.data import Dataset, Subset
from transformers import Trainer, TrainerCallback

from ..cards.record import read_record
from .arguments import RobustnessArguments


class Progress(TrainerCallback):
    """Calls a function after each image, or each batch of them."""

    def __init__(self, update: Callable[[], Any]):
        self.update = update

    def on_prediction_step(self, args, state, control, **kwargs):
        self.update()


class RecordedTask:
    """Base of what implements [`~modeling_vitp.evaluation.robustness.Task`].

    What is not given in the arguments is taken from the configuration that they name, or if they name none from the
    record of the model's run. A subclass sets `samples` and gives `trainer` and [`corrupted`].

    Args:
        name: folder or Hub id of the model.
        args: of the command.

    Raises:
        ValueError: if it is not known what to score on.
    """

    samples: Dataset
    trainer: Trainer

    def __init__(self, name: str, args: RobustnessArguments):
        self.name, self.seed = name, args.seed
        self.configuration = args.configuration or recorded_configuration(name)
        described = args.data or self.configuration.get("data")
        if described is None:
            raise ValueError(f"{name} has no record of the data it was scored on: give --data.")
        self.described = {**described, "root": args.data_root} if args.data_root else described
        self.split = args.split or self.configuration.get("test_split") or self.configuration.get("eval_split")
        if self.split is None:
            raise ValueError(f"On which split {name} is to be scored is not known: give --split.")

    def limited(self, samples: Dataset, limit: int | None) -> Dataset:
        """So many of the samples, evenly spread."""
        if limit is None or limit >= len(samples):
            return samples
        return Subset(samples, [index * len(samples) // limit for index in range(limit)])

    def __len__(self) -> int:
        return len(self.samples)

    def corrupted(self, corruption: str, severity: int) -> Dataset:
        raise NotImplementedError

    def evaluate(self, corruption: str | None, severity: int, update: Callable[[], Any]) -> dict[str, float]:
        samples = self.samples if corruption is None else self.corrupted(corruption, severity)
        progress = Progress(update)
        self.trainer.add_callback(progress)
        try:
            loader = self.trainer.get_eval_dataloader(samples)
            metrics = self.trainer.evaluation_loop(loader, self.name, metric_key_prefix="test").metrics
        finally:
            self.trainer.remove_callback(progress)
        return {key.removeprefix("test_"): value for key, value in metrics.items()}


def recorded_configuration(name: str) -> dict[str, Any]:
    """What the run of a model recorded of its evaluation, as a configuration of fine-tuning has it."""
    record = read_record(name).get("evaluated_on") or {}
    splits = {"test_split": record.get("test"), "eval_split": record.get("eval")}
    return {"data": record.get("data"), **splits, **(record.get("scored_with") or {})}
