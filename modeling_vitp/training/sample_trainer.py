"""Base trainer of models of single images, which scores samples instead of computing a loss."""

import logging
import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any, ClassVar

import torch
from torch.utils.data import DataLoader, Dataset
from transformers import BaseImageProcessor
from transformers.trainer_utils import EvalLoopOutput

from ..vrl import keyed_generator
from .base_trainer import BaseTrainer

logger = logging.getLogger(__name__)


class AugmentedSamples(Dataset):
    """Base of the training data sets of the tasks, with augmented samples.

    An index is a pair of epoch and sample index. The augmentation depends only on the epoch, the sample's id and the
    seed. A subclass implements `__getitem__`.

    Args:
        samples: data set of a task, whose items have an `id`.
        augmentation: augmentation of the task.
        image_processor: image processor with the mean and standard deviation of the model.
        seed: seed of the augmentation.
    """

    def __init__(self, samples: Dataset, augmentation: Callable, image_processor: BaseImageProcessor, seed: int):
        self.samples = samples
        self.augmentation = augmentation
        self.image_processor = image_processor
        self.seed = seed

    def __len__(self) -> int:
        return len(self.samples)

    def sample(self, index: tuple[int, int]) -> tuple[dict[str, Any], torch.Generator]:
        """Return a sample and the generator of its augmentation."""
        epoch, sample_index = index
        sample = self.samples[sample_index]
        return sample, keyed_generator(self.seed, sample["id"], epoch, "augmentation")


class SampleTrainer(BaseTrainer):
    """Base trainer of models on [`AugmentedSamples`], in which each process scores a part of the evaluated samples.

    A subclass also inherits from [`~transformers.Trainer`].

    Attributes:
        counted: name of the things that are scored, such as pixels, for the warning about scores that are NaN.
    """

    counted: ClassVar[str]

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        # The model's loss is the mean over its batch, so the Trainer has to divide it by the accumulation steps.
        self.model_accepts_loss_kwargs = False

    def score(self, batches: Iterable, is_test: bool) -> dict[str, float]:
        """Return the scores over the samples of all processes, NaN for scores without anything to count.

        Args:
            batches: batches of this process from `get_eval_dataloader`.
            is_test: whether this is the final evaluation on the test split.
        """
        raise NotImplementedError

    def evaluation_loop(
        self,
        dataloader: DataLoader,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        self.callback_handler.eval_dataloader = dataloader
        scores = self.score(self._with_callbacks(dataloader), is_test=metric_key_prefix == "test")
        metrics = {}
        uncounted_scores = []
        for name, score in scores.items():
            metrics[f"{metric_key_prefix}_{name}"] = score
            if math.isnan(score):
                uncounted_scores.append(name)
        if uncounted_scores:
            names = ", ".join(uncounted_scores)
            logger.warning("%s: scores without any %s are NaN: %s.", description, self.counted, names)
        return EvalLoopOutput(
            predictions=None,
            label_ids=None,
            metrics=metrics,
            num_samples=len(dataloader.dataset.dataset),
        )

    def _with_callbacks(self, dataloader: DataLoader) -> Iterator:
        """Yield the batches, and call `on_prediction_step` of the callbacks after each batch."""
        for batch in dataloader:
            yield batch
            self.control = self.callback_handler.on_prediction_step(self.args, self.state, self.control)
