"""What the trainers of fine-tunings have in common: layer-wise decay, and batches that are functions of the epoch."""

from typing import Any

import torch
from torch.utils.data import Dataset
from transformers import PreTrainedModel

from .batching import EpochBatchSampler
from .layer_decay import layer_decay_groups
from .run import Run


class FineTuner(Run):
    """For a `Trainer` of a model with a `backbone`; its arguments have those of
    [`~modeling_vitp.training.layer_decay_arguments`]."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        # The model's loss is a mean over its own batch: the Trainer has to divide it where gradients accumulate.
        self.model_accepts_loss_kwargs = False

    def create_optimizer(self, model: PreTrainedModel | None = None) -> torch.optim.Optimizer:
        if self.optimizer is None:
            model = self.model if model is None else model
            num_layers = self.accelerator.unwrap_model(model).config.backbone_config.num_hidden_layers
            args = self.args
            groups = layer_decay_groups(
                model,
                args.learning_rate,
                args.weight_decay,
                args.layer_decay,
                num_layers,
                args.level_embeddings_at_input,
                args.position_weight_decay,
            )
            optimizer_cls, settings = self.get_optimizer_cls_and_kwargs(args, model)
            self.optimizer = optimizer_cls(groups, **settings)
        return self.optimizer

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> EpochBatchSampler:
        args = self.args
        self._train_batches = EpochBatchSampler(
            len(self.train_dataset if train_dataset is None else train_dataset),
            self._train_batch_size,
            args.gradient_accumulation_steps,
            args.world_size,
            args.process_index,
            self.data_seed,
            drop_last=args.dataloader_drop_last,
        )
        if not len(self._train_batches):
            raise ValueError(
                f"{len(self.train_dataset)} sample(s) to train on are less than the "
                f"{self._train_batches.effective_batch_size} of one step: make batches smaller."
            )
        return self._train_batches
