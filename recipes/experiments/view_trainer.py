"""A `Trainer` for objectives without text, on the very views that a pretraining on instructions would see."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils.data import Dataset
from transformers import Trainer
from transformers.data import default_data_collator

from modeling_vitp.instructions.rows import prepare_rows
from modeling_vitp.training.base_trainer import BaseTrainer
from modeling_vitp.training.batching import EpochBatchSampler
from modeling_vitp.training.resume_config import free_settings
from modeling_vitp.training.vitp_config import ViTPTrainingConfig
from modeling_vitp.vrl import keyed_generator

Encode = Callable[[dict[str, Any], torch.Generator], dict[str, torch.Tensor]]


class Views(Dataset):
    """Inputs for a model. An index is a pair, epoch and place: what it gives is random by these and the seed alone.

    Args:
        rows: with an `id` each.
        encode: from a row, its images left encoded, and the generator that a `sample_transform` is given for the same
            seed, row and epoch by [`~modeling_vitp.instructions.collator.ViTPDataCollator`].
    """

    def __init__(self, rows: Dataset, encode: Encode, seed: int):
        self.rows, self.encode, self.seed = prepare_rows(rows), encode, seed

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: tuple[int, int]) -> dict[str, Any]:
        epoch, place = index
        row = self.rows[place]
        inputs = self.encode(row, keyed_generator(self.seed, row["id"], epoch, "transform"))
        return {**inputs, "id": row["id"]}


class ViewTrainer(BaseTrainer, Trainer):
    """Trains a model whose output has a `loss`, with the settings, batches and views of [`~modeling_vitp.ViTPTrainer`].

    Args:
        rows, encode: see [`Views`].
    """

    def __init__(self, model: nn.Module, args: ViTPTrainingConfig, rows: Dataset, encode: Encode):
        seed = args.seed if args.data_seed is None else args.data_seed
        super().__init__(model, args, train_dataset=Views(rows, encode, seed), data_collator=default_data_collator)
        self.model_accepts_loss_kwargs = False

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> EpochBatchSampler:
        args = self.args
        self._train_batches = EpochBatchSampler(
            len(self.train_dataset),
            self._train_batch_size,
            args.gradient_accumulation_steps,
            args.world_size,
            args.process_index,
            self.data_seed,
            drop_last=args.dataloader_drop_last,
        )
        return self._train_batches

    def training_data(self) -> Any:
        return self.train_dataset.rows

    def run_settings(self) -> dict[str, dict[str, Any]]:
        names = "seed dataloader_drop_last per_device_train_batch_size gradient_accumulation_steps"
        objective = type(self.accelerator.unwrap_model(self.model)).__name__
        fixed = {name: getattr(self.args, name) for name in names.split()}
        fixed |= {"data_seed": self.data_seed, "objective": objective}
        free = free_settings(self.args)
        return {"fixed": fixed, "free": {name: value for name, value in free.items() if name not in fixed}}
