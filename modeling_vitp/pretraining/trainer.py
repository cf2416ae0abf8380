"""Trainer for ViTP, based on TRL's `SFTTrainer`, with exact resuming and exact shards."""

import contextlib
import dataclasses
import logging
from collections.abc import Callable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import gather_object, is_peft_model
from datasets import Dataset, DatasetDict, IterableDataset
from peft import get_peft_model_state_dict
from safetensors import safe_open
from torch import nn
from torch.utils.data import DataLoader
from transformers.trainer_utils import EvalLoopOutput
from trl import SFTTrainer

from ..instructions.collator import NO_LABEL, STEP, ViTPDataCollator, with_raw_tiles
from ..instructions.mixture import MixtureStream, check_rows, replacement_rows
from ..instructions.raw_tiles import normalize_tiles
from ..instructions.rows import SampleTransform, SourceSettings, describe_rows, prepare_rows
from ..instructions.sample_length import SampleLength
from ..instructions.schemas import to_conversations
from ..modeling_vitp import ViTPForConditionalGeneration
from ..processing_vitp import ViTPProcessor
from ..training.base_trainer import BaseTrainer
from ..training.batching import (
    BY_LENGTH,
    ROWS,
    EndlessBatches,
    GlobalBatchSampler,
    RankStream,
    RowKeeper,
    StepRows,
    StepSampler,
    StepStream,
    WholeBatchSampler,
    WholeBatchStream,
    gather_rows,
)
from ..training.callbacks import NamedBatches, RunState
from ..training.freezing import part_of
from ..training.resuming import (
    TRAINING_DATA,
    adapter_settings,
    base_fingerprint,
    check_loaded,
    check_tokenizer,
    freezing_settings,
)
from ..vision_towers import tower_of
from .config import ViTPTrainingConfig
from .generation import draw_answered_rows, rows_to_show
from .loading import check_compatible, load_checkpoint
from .model_patches import attention_by_sequence, check_attention, compile_layers, vitp_of
from .results import draw_summary, save_parts

logger = logging.getLogger(__name__)
SHUFFLE_BUFFER = 1000  # rows of a stream, in each worker


class ViTPTrainer(BaseTrainer, SFTTrainer):
    """Trainer of [`ViTPForConditionalGeneration`] with Visual Robustness Learning.

    Differences from [`~trl.SFTTrainer`]:

    - The collator receives the id of every row and the epoch, also in persistent workers.
    - Evaluation runs without VRL, masked answers and augmentation. The model's config records the ratios.
    - With `vrl_warmup_steps`, the drop ratio is 0 in the first optimizer steps, and the drop ratio of the last step is
      logged as "vrl_drop_ratio". With `patch_drop_ratio`, patches are dropped before the ViT except in the last steps,
      and the ratio of the last step is logged too.
    - The rows of an optimizer step do not depend on the number of processes, except those of split streams and of
      streams that worker processes read. At the end of an epoch, no row is repeated or lost, see
      [`GlobalBatchSampler`], [`RankStream`] and, for split streams, [`MixtureStream`].
    - Rows are shuffled in every epoch, those of a stream in a buffer, unless `train_sampling_strategy` is "sequential".
    - `padding_free` supports images: the samples of a batch are concatenated in one row.
    - `train_sampling_strategy` "group_by_length" and "batch_rebalance" measure the rows, unless the data set has a
      column `length_column_name`; "padding_share" is logged.
    - A checkpoint is complete or does not exist. A resumed run, with its streams and running averages, ends with the
      same weights as an uninterrupted run. Changed settings and missing or unexpected keys raise an error.
    - Only the model's files are pushed to the Hub, and no token is written, see [`BaseTrainer`].

    Args:
        model: model to train, or the folder or Hub id of a ViTP or `internvl` model, which is loaded with its processor
            in float32 unless `model_init_kwargs` of the arguments set another dtype.
        args: [`ViTPTrainingConfig`]; the default output folder is the name of the model followed by `-SFT`.
        train_dataset: rows with `messages` and `images` (or `image`), or in another schema of
            [`~modeling_vitp.instructions.schemas`], and optionally `id`. Without `id`, the row number, before any
            shuffle, is the id. A `sample_transform` or `data_collator` receives the rows as they are stored.
        eval_dataset: data set like `train_dataset`, or a dictionary of data sets.
        processing_class: [`ViTPProcessor`], by default that of the model.
        data_collator: collator that replaces the [`ViTPDataCollator`] built from `args`.
        sample_transform: augmentation of training rows, see [`ViTPDataCollator`].
        source_settings: encoding settings of each source, see [`ViTPDataCollator`].
        kwargs: arguments of [`~trl.SFTTrainer`].
    """

    trains_on_answers = True

    _tag_names = ["trl", "sft", "vitp"]
    fixed = ("train_sampling_strategy", "part_learning_rates")

    def __init__(
        self,
        model: ViTPForConditionalGeneration | str | Path,
        args: ViTPTrainingConfig | None = None,
        train_dataset: Dataset | IterableDataset | None = None,
        eval_dataset: Dataset | IterableDataset | DatasetDict | dict | None = None,
        processing_class: ViTPProcessor | None = None,
        data_collator: ViTPDataCollator | None = None,
        sample_transform: SampleTransform | None = None,
        source_settings: Mapping[str, SourceSettings] | None = None,
        **kwargs,
    ):
        if kwargs.get("compute_loss_func") is not None:
            raise ValueError("compute_loss_func is not supported. Override `compute_loss`.")
        if train_dataset is None:
            raise ValueError("train_dataset is required: a data set of conversations with images.")
        if args is None:
            args = default_args(model)
        elif not isinstance(args, ViTPTrainingConfig):
            raise ValueError(f"Expected args to be a ViTPTrainingConfig, got a {type(args).__name__}.")
        init_kwargs = args.model_init_kwargs
        is_loaded_here = isinstance(model, str | Path)
        model, processing_class = open_model(model, processing_class, init_kwargs or {})
        if is_loaded_here:
            args.model_init_kwargs = None  # TRL accepts it only with the name of a model
        check_compatible(model, processing_class)
        # A transform or another collator may read any format, so that its rows are not converted.
        is_converted = data_collator is None and sample_transform is None
        train_dataset = prepare_dataset(train_dataset, is_converted)
        check_strategies(args, train_dataset)
        if data_collator is None:
            data_collator = make_collator(args, processing_class, train_dataset, sample_transform, source_settings)
        check_collator(args, data_collator, model)
        set_robustness(model, data_collator)
        self.eval_data_collator = data_collator.for_evaluation()
        if isinstance(eval_dataset, dict):
            eval_dataset = {name: prepare_dataset(dataset, is_converted) for name, dataset in eval_dataset.items()}
        elif eval_dataset is not None:
            eval_dataset = prepare_dataset(eval_dataset, is_converted)
        self._stream: EndlessBatches | None = None
        self._eval_loaders: dict[str | None, tuple[DataLoader, Any]] = {}
        self._measured_dataset: Dataset | None = None
        self._measured_lengths: list[int] = []
        self._num_tokens_and_places = torch.zeros(2, dtype=torch.int64)  # sums over training batches since the last log
        if args.torch_compile:
            compile_layers(model)
        padding_free = args.padding_free
        args.padding_free = False  # TRL rejects it for images
        super().__init__(
            model=model,
            args=args,
            data_collator=data_collator,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            **kwargs,
        )
        self.args.model_init_kwargs = init_kwargs
        self.args.padding_free = padding_free
        # TRL's trainer gives the instance a forward pass for its own loss, which would bypass layers that accelerate
        # compiles in a copy of the model.
        base_model = self.model.get_base_model() if is_peft_model(self.model) else self.model
        base_model.__dict__.pop("forward", None)
        self._answer_sums: dict[str, torch.Tensor] = {}  # sums of training and evaluation since the last log
        self._num_trained_tokens = 0

    def check_rows(self) -> None:
        """Encode the first rows, at most those of the whole run, to find invalid rows early, see [`check_rows`].

        No patch is dropped, so that rows that are too long in the last steps are found.
        """
        num_rows = max(self.args.max_steps, 0) * self.get_total_train_batch_size(self.args)
        options = {
            "most_rows": num_rows or None,
            "in_processes": self.args.dataloader_num_workers > 0,
        }
        summary = check_rows(
            self.train_dataset,
            dataclasses.replace(self.data_collator, patch_drop_ratio=0.0),
            allow_text_only=self.args.allow_text_only,
            **options,
        )
        logger.info(summary)
        eval_datasets = self.eval_dataset
        if not isinstance(eval_datasets, dict):
            eval_datasets = {"eval_dataset": eval_datasets}
        for name, dataset in eval_datasets.items():
            if dataset is not None:
                logger.info("%s %s", name, check_rows(dataset, self.eval_data_collator, **options))

    def _train(self, *args, **kwargs):
        is_padding_free = self.data_collator.padding_free
        with attention_by_sequence(self.model) if is_padding_free else contextlib.nullcontext():
            return super()._train(*args, **kwargs)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Create the optimizer with the learning rate of each part of the model."""
        args = self.args
        if args.projector_steps and self.is_deepspeed_enabled:
            raise ValueError(
                "projector_steps is not supported with DeepSpeed, which does not expose gradients. Use FSDP2."
            )
        rates = args.part_learning_rates or {}
        self._check_parts_train(rates)
        if self.optimizer is None and rates:
            model = self.model if model is None else model
            optimizer_class, options = self.get_optimizer_cls_and_kwargs(args, model)
            self.optimizer = optimizer_class(self._parameter_groups(model, rates), **options)
        return super().create_optimizer(model)

    def _check_parts_train(self, rates: Mapping[str, float]) -> None:
        """Raise a `ValueError` if a part of the model has a learning rate or steps of its own, but is frozen."""
        trained_parts = {part_of(name) for name, weight in self.model.named_parameters() if weight.requires_grad}
        for part_name in rates:
            if part_name not in trained_parts:
                raise ValueError(
                    f"part_learning_rates has a rate of {part_name!r}, which is frozen. Remove one of the two options."
                )
        if self.args.projector_steps and "projector" not in trained_parts:
            raise ValueError("projector_steps is set, but the projector is frozen. Remove one of the two options.")

    def _parameter_groups(self, model: nn.Module, rates: Mapping[str, float]) -> list[dict[str, Any]]:
        """Return the trained weights in groups, by their part of the model and with or without weight decay."""
        args = self.args
        decayed_names = set(self.get_decay_parameter_names(model))
        groups: dict[tuple[str, bool], dict[str, Any]] = {}
        for name, weight in model.named_parameters():
            if not weight.requires_grad:
                continue
            part_name = part_of(name)
            has_decay = name in decayed_names
            if (part_name, has_decay) not in groups:
                groups[part_name, has_decay] = {
                    "params": [],
                    "lr": rates.get(part_name, args.learning_rate),
                    "weight_decay": args.weight_decay if has_decay else 0.0,
                }
            groups[part_name, has_decay]["params"].append(weight)
        return list(groups.values())

    # Batches

    def get_train_dataloader(self) -> DataLoader:
        collator = with_raw_tiles(self.data_collator)
        if isinstance(self.train_dataset, torch.utils.data.IterableDataset):
            return self._stream_loader(collator)
        self._sampler = self.train_sampler()
        self._sampler.check_not_empty()
        dataset = self.train_dataset
        if isinstance(self._sampler, StepSampler):
            dataset = StepRows(dataset)
        return self.data_loader(dataset, collator, batch_sampler=self._sampler)

    def train_sampler(self) -> GlobalBatchSampler:
        dataset = self.train_dataset
        sampler_class = StepSampler if self.data_collator.depends_on_step else GlobalBatchSampler
        return sampler_class(
            len(dataset),
            self.args.train_batch_size,
            seed=self.data_seed,
            strategy=self.args.train_sampling_strategy,
            lengths=lambda: self._lengths(dataset),
            **self._sharding(),
        )

    def _stream_loader(self, collator: Callable) -> DataLoader:
        accumulation = self.args.gradient_accumulation_steps
        stream = self._rank_stream(self.train_dataset, self.args.train_batch_size)
        if isinstance(stream, StepStream) and self.args.dataloader_num_workers > 1:
            collator = RowKeeper(collator)
        position = {}
        if self._resumed_state is not None:
            stored_sums = self._resumed_state.stateful_callbacks[RunState.__name__]["attributes"]
            position = {"num_trained": self._resumed_state.global_step * accumulation, **stored_sums["stream"]}

        def begin(epoch: int, first_batch: int) -> None:
            self._set_epoch(epoch)
            stream.set_epoch(epoch)
            if isinstance(stream, StepStream):
                stream.begin(first_batch // accumulation)

        self._loader = self._base_loader(stream, collator, is_training=True, batch_size=self.args.train_batch_size)
        self._stream = EndlessBatches(self._loader, stream, begin, self._finalize, **position)
        return self._on_device(DataLoader(self._stream, batch_size=None, collate_fn=lambda batch: batch))

    def begin_epoch(self) -> None:
        if self._stream is not None:
            self._stream.is_over = self.state.global_step >= self.state.max_steps
            return
        super().begin_epoch()
        self._set_epoch(self._sampler.epoch)

    def _set_epoch(self, epoch: int) -> None:
        self.data_collator.set_epoch(epoch)
        if hasattr(self.train_dataset, "set_epoch"):
            self.train_dataset.set_epoch(epoch)

    def _rank_stream(self, dataset: IterableDataset, batch_size: int) -> RankStream:
        strategy = self.args.train_sampling_strategy
        length = SampleLength.of(self.data_collator) if strategy in BY_LENGTH else None
        stream_class = StepStream if self.data_collator.depends_on_step else RankStream
        sharding = self._sharding()
        if getattr(dataset, "is_split", False):
            dataset = dataset.of_process(sharding.pop("num_processes"), sharding.pop("process_index"))
        elif not isinstance(dataset, MixtureStream) and strategy != "sequential":
            dataset = dataset.shuffle(self.data_seed, buffer_size=SHUFFLE_BUFFER)  # a mixture shuffles its own rows
        return stream_class(dataset, batch_size, length=length, **sharding)

    def _lengths(self, dataset: Dataset) -> list[int]:
        """Return the lengths of all rows of this epoch. A mixture selects them from the lengths of its sources."""
        if hasattr(dataset, "lengths"):
            return dataset.lengths(self._measure)
        if self._measured_dataset is not dataset:
            self._measured_lengths = self._measure(dataset)
            self._measured_dataset = dataset
        return self._measured_lengths

    def _measure(self, dataset: Dataset) -> list[int]:
        column = self.args.length_column_name
        # Rows of a mixture's source are created when they are read: its columns differ from the stored columns.
        is_custom = dataset.format["type"] == "custom"
        names = list(dataset[:1]) if is_custom else dataset.column_names
        if column not in names:
            if "messages" not in names:
                raise ValueError(
                    f"train_sampling_strategy={self.args.train_sampling_strategy!r} needs a column 'messages', or "
                    f"{column!r} with the length of each row. Found: {sorted(names)}."
                )
            length = SampleLength.of(self.data_collator)
            with PartialState().main_process_first():
                rows = dataset if is_custom else prepare_rows(dataset)
                dataset = rows.map(
                    lambda row: {column: length(row)},
                    remove_columns=dataset.column_names,
                    num_proc=self.args.dataset_num_proc,
                    desc="Measuring samples",
                )
        return list(dataset.with_format(None)[column])

    # Evaluation

    def get_eval_dataloader(self, eval_dataset: str | Dataset | IterableDataset | None = None) -> DataLoader:
        """Return a loader of the batches of this process in order, in which no row is repeated."""
        args = self.args
        name = eval_dataset if isinstance(eval_dataset, str) else None
        if name:
            dataset = self.eval_dataset[name]
        elif eval_dataset is None:
            dataset = self.eval_dataset
        else:
            dataset = eval_dataset
        if dataset is None:
            raise ValueError("Evaluation needs an eval_dataset.")
        loader, loaded_dataset = self._eval_loaders.get(name, (None, None))
        if loaded_dataset is dataset and args.dataloader_persistent_workers:
            return loader
        rows = dataset
        if not isinstance(dataset, torch.utils.data.IterableDataset):
            sampler = WholeBatchSampler(
                len(dataset),
                args.eval_batch_size,
                num_processes=args.world_size,
                process_index=args.process_index,
                drop_last=args.dataloader_drop_last,
            )
            batches = {"batch_sampler": sampler}
        else:
            if args.world_size > 1:
                rows = WholeBatchStream(
                    dataset,
                    args.eval_batch_size,
                    num_processes=args.world_size,
                    process_index=args.process_index,
                )
            batches = {"batch_size": args.eval_batch_size}
        loader = self.data_loader(rows, with_raw_tiles(self.eval_data_collator), is_training=False, **batches)
        self._eval_loaders[name] = loader, dataset
        return loader

    def get_test_dataloader(self, test_dataset: Dataset | IterableDataset) -> DataLoader:
        return self.get_eval_dataloader(test_dataset)

    def prediction_step(self, model, inputs, prediction_loss_only: bool, ignore_keys: list[str] | None = None):
        if self.args.world_size > 1 and "pixel_values" not in inputs:
            # If the ViT is sharded, all processes must run it the same number of times.
            pixel_values, indices = vitp_of(self.model)._unseen_tile()
            inputs = {**inputs, "pixel_values": pixel_values, "visual_token_indices": indices}
        num_answer_tokens = (inputs["labels"][:, 1:] != NO_LABEL).sum().item()
        self._num_eval_rows = len(inputs["labels"]) if num_answer_tokens else 0
        inputs = self._prepare_inputs(inputs)
        logits = None
        labels = None
        with torch.no_grad(), self.compute_loss_context_manager():
            if prediction_loss_only:
                loss = self.compute_loss(model, inputs)
            else:
                loss, outputs = self.compute_loss(model, inputs, return_outputs=True)
                logits = outputs.logits
                labels = inputs["labels"]
        self._eval_losses.append((loss.float().item(), num_answer_tokens))
        return loss, logits, labels

    def evaluation_loop(self, dataloader, *args, metric_key_prefix: str = "eval", **kwargs) -> EvalLoopOutput:
        self._eval_losses = []
        if self.args.world_size > 1:
            batch_size = self.args.eval_batch_size  # the last batches may be smaller or empty
            self.gather_function = lambda values: gather_rows(values, self._num_eval_rows, batch_size)
        output = super().evaluation_loop(dataloader, *args, metric_key_prefix=metric_key_prefix, **kwargs)
        # As in training, each answer token counts once, so that the loss does not depend on the batches.
        losses = []
        weights = []
        for batches_of_processes in zip(*gather_object([self._eval_losses])):
            for loss, num_answer_tokens in batches_of_processes:
                losses.append(loss)
                weights.append(num_answer_tokens)
        losses = np.array(losses)
        weights = np.array(weights)
        is_counted = weights > 0
        if self.args.logging_nan_inf_filter and np.isfinite(losses[is_counted]).any():
            is_counted &= np.isfinite(losses)
        mean_loss = np.average(losses[is_counted], weights=weights[is_counted])
        output.metrics[f"{metric_key_prefix}_loss"] = float(mean_loss)
        return output

    # Metrics

    def _finalize(self, batch: dict[str, Any], number: int) -> dict[str, Any]:
        """Encode a batch with stored rows again if the drop ratios of its step are others, see [`RowKeeper`]."""
        rows = batch.pop(ROWS, None)
        if rows is None:
            return batch
        step = number // self.args.gradient_accumulation_steps
        drop_ratios_at = self.data_collator.drop_ratios_at
        if drop_ratios_at(step) == drop_ratios_at(rows[0][STEP]):
            return batch
        collator = NamedBatches(with_raw_tiles(self.data_collator))
        return collator([{**row, STEP: step} for row in rows])

    def training_step(self, *args, **kwargs) -> torch.Tensor:
        self.model.train()  # accelerate compiles a copy, which shares layers but not the training flag of the model
        loss = super().training_step(*args, **kwargs)
        if self.state.global_step < self.args.projector_steps:
            # Weights without a gradient have no update, no decay and no moments, like frozen weights.
            for name, weight in self.model.named_parameters():
                if part_of(name) != "projector":
                    weight.grad = None
        return loss

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """Return the mean negative log-likelihood of the answer tokens, in training as `loss_reduction` says.

        Logits are computed for answer tokens only. Tiles are normalized on the device, see [`with_raw_tiles`]. With
        `return_outputs`, the logits of all tokens are computed in a second forward pass.
        """
        inputs = {**inputs, "use_cache": False}
        labels = inputs.pop("labels")
        if "pixel_values" in inputs:
            image_processor = self.data_collator.processor.image_processor
            inputs["pixel_values"] = normalize_tiles(inputs["pixel_values"], image_processor)
        scores = model(**inputs, answer_labels=labels)
        losses = -scores.log_probs
        if self.args.loss_type == "dft":  # https://huggingface.co/papers/2508.05629
            losses = losses * scores.log_probs.exp().detach()
        sums = torch.stack([scores.entropy.sum(), scores.is_top1.sum(), torch.ones_like(losses).sum()])
        mode = "train" if self.model.training else "eval"
        self._answer_sums[mode] = self._answer_sums.get(mode, 0) + sums.double()
        if self.model.training and self.args.loss_reduction == "sample":
            losses = losses * weights_of_samples(labels, inputs.get("cu_seq_lens_q"))
        num_items = losses.numel() if num_items_in_batch is None else num_items_in_batch
        loss = losses.sum() / torch.as_tensor(num_items, device=losses.device).clamp(min=1)
        if num_items_in_batch is not None and self.args.average_tokens_across_devices:
            loss = loss * self.args.world_size  # num_items counts all processes, whose gradients are averaged
        if not return_outputs:
            return loss
        with torch.no_grad():
            return loss, model(**inputs)

    def get_batch_samples(self, *args, **kwargs) -> tuple[list, torch.Tensor | int | None]:
        batches, num_items = super().get_batch_samples(*args, **kwargs)
        if not batches:
            return batches, num_items
        if self.args.loss_reduction == "sample":
            num_items = self.count_samples(batches)
        num_tokens = 0
        num_places = 0
        for batch in batches:
            if "attention_mask" in batch:
                num_tokens += batch["attention_mask"].sum()
            else:  # a batch without padding
                num_tokens += batch["input_ids"].numel()
            num_places += batch["input_ids"].numel()
        counts = torch.tensor([num_tokens, num_places], device=self.args.device)
        counts_of_processes = self.accelerator.gather(counts).view(-1, 2)
        self._num_tokens_and_places += counts_of_processes.sum(0).cpu()
        return batches, num_items

    def count_samples(self, batches: list[dict[str, torch.Tensor]]) -> torch.Tensor:
        """Return the number of samples with answers in batches, of all processes as the number of tokens is."""
        number = torch.zeros((), device=self.args.device)
        for batch in batches:
            weights = weights_of_samples(batch["labels"], batch.get("cu_seq_lens_q"))
            number += weights.sum().round().to(number.device)
        if self.args.average_tokens_across_devices:
            number = self.accelerator.gather(number).sum()
        return number

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        is_training = self.model.training
        num_tokens, num_places = self._num_tokens_and_places.tolist()
        num_trained_tokens = self._num_trained_tokens + num_tokens
        if is_training and num_places:
            self._num_trained_tokens = num_trained_tokens
            logs["padding_share"] = 1 - num_tokens / num_places
            drop_ratios = self.data_collator.drop_ratios_at(self.state.global_step - 1)
            if self.data_collator.vrl_warmup_steps > 0:
                logs["vrl_drop_ratio"] = drop_ratios["vrl_drop_ratio"]
            if self.data_collator.patch_drop_ratio > 0:
                logs["patch_drop_ratio"] = drop_ratios["patch_drop_ratio"]
            self._num_tokens_and_places.zero_()
        sums = self._answer_sums.pop("train" if is_training else "eval", None)
        if sums is not None:
            prefix = "" if is_training else "eval_"
            entropy, num_correct, num_answer_tokens = self.accelerator.reduce(sums, "sum").tolist()
            logs[f"{prefix}entropy"] = entropy / max(num_answer_tokens, 1)
            logs[f"{prefix}mean_token_accuracy"] = num_correct / max(num_answer_tokens, 1)
            logs[f"{prefix}num_tokens"] = num_trained_tokens
        super().log(logs, start_time)

    def watched_samples(self, number: int) -> list[dict[str, Any]]:
        return rows_to_show(self.eval_dataset or self.train_dataset, number, self.data_seed)

    @property
    def watched_collator(self) -> ViTPDataCollator:
        """Collator that reads the rows of [`watched_samples`]."""
        if self.eval_dataset is not None:
            return self.eval_data_collator
        return dataclasses.replace(self.eval_data_collator, sample_transform=self.data_collator.sample_transform)

    def draw_samples(self, samples: list[dict[str, Any]], path: Path) -> None:
        with self.accelerator.autocast():  # flash attention takes no float32
            draw_answered_rows(self.accelerator.unwrap_model(self.model), self.watched_collator, samples, path)

    def create_model_card(self, *args, **kwargs) -> None:
        """Do nothing, because TRL's card is for text generation; [`save_model`] writes a card instead."""

    # Checkpoints

    def save_parts(self) -> None:
        save_parts(self)

    def draw_summary(self) -> None:
        draw_summary(self)

    def run_settings(self) -> dict[str, dict[str, Any]]:
        args = self.args
        collator = self.data_collator
        image_processor = self.processing_class.image_processor
        model = self.accelerator.unwrap_model(self.model)
        vision_config = model.config.vision_config
        settings = super().run_settings()
        fixed = settings["fixed"]
        free = settings["free"]
        fixed["vrl_drop_ratio"] = collator.vrl_drop_ratio
        fixed["vrl_apply_prob"] = collator.vrl_apply_prob
        fixed["vrl_warmup_steps"] = collator.vrl_warmup_steps or None
        fixed["patch_drop_ratio"] = collator.patch_drop_ratio or None
        fixed["patch_drop_end"] = args.patch_drop_end if collator.patch_drop_ratio else None
        fixed["answer_mask_ratio"] = collator.answer_mask_ratio or None
        fixed["color_jitter"] = collator.color_jitter
        fixed["projector_steps"] = args.projector_steps or None
        fixed["sample_transform"] = getattr(collator.sample_transform, "settings", None)
        fixed["max_length"] = collator.max_length
        fixed["max_patches"] = image_processor.max_patches
        fixed["input_spec"] = image_processor.input_spec
        fixed["drop_path_rate"] = tower_of(vision_config).drop_path_rate(vision_config)
        fixed[TRAINING_DATA] = describe_rows(self.train_dataset)
        if isinstance(self.train_dataset, torch.utils.data.IterableDataset):
            # The batches of a stream depend on its readers.
            for name in ("per_device_train_batch_size", "gradient_accumulation_steps", "num_processes"):
                fixed[name] = free[name]
            fixed["dataloader_num_workers"] = args.dataloader_num_workers
        free["loss_type"] = None if args.loss_type == "nll" else args.loss_type
        free["loss_reduction"] = None if args.loss_reduction == "token" else args.loss_reduction
        free["padding_free"] = collator.padding_free or None
        trained = {**freezing_settings(model), **adapter_settings(model)}
        if trained["use_peft"]:
            trained["weights under the adapter"] = self.weights_under_adapter
        settings["model"] = trained
        return settings

    @cached_property
    def weights_under_adapter(self) -> str:
        """Hash of the base weights of an adapter, computed before sharding."""
        return base_fingerprint(self.model, self.is_world_process_zero())

    def running_sums(self) -> dict[str, Any]:
        sums = super().running_sums()
        answer_sums = self._answer_sums.get("train")
        if answer_sums is not None:
            answer_sums = self.accelerator.reduce(answer_sums, "sum").tolist()
        sums["answers"] = answer_sums
        sums["num_trained_tokens"] = self._num_trained_tokens
        sums["num_tokens_and_places"] = self._num_tokens_and_places.tolist()
        if self._stream is not None:
            num_trained = self.state.global_step * self.args.gradient_accumulation_steps
            epoch, first_batch = self._stream.start_of(num_trained)
            sums["stream"] = {"epoch": epoch, "first_batch": first_batch}
        return sums

    def restore_sums(self, sums: dict[str, Any] | None) -> None:
        super().restore_sums(sums)
        # A run that is resumed at its end has no further training logs.
        if sums is None or self.state.global_step >= self.state.max_steps:
            return
        if sums["answers"] and self.is_world_process_zero():
            answer_sums = torch.tensor(sums["answers"], dtype=torch.float64, device=self.args.device)
            self._answer_sums["train"] = answer_sums
        self._num_trained_tokens = sums["num_trained_tokens"]
        self._num_tokens_and_places += torch.tensor(sums["num_tokens_and_places"])

    def check_checkpoint(self, checkpoint: str) -> None:
        super().check_checkpoint(checkpoint)
        check_tokenizer(checkpoint, self.processing_class.tokenizer)
        adapter_file = Path(checkpoint) / "adapter_model.safetensors"
        if is_peft_model(self.model) and adapter_file.is_file():
            expected_weights = set(get_peft_model_state_dict(self.model))
            with safe_open(adapter_file, "pt") as file:
                stored_weights = set(file.keys())
            check_loaded(
                missing=expected_weights - stored_weights,
                unexpected=stored_weights - expected_weights,
            )


def default_args(model: ViTPForConditionalGeneration | str | Path) -> ViTPTrainingConfig:
    """Return training arguments with an output folder that is named after the model."""
    model_name = model if isinstance(model, str | Path) else model.config._name_or_path
    return ViTPTrainingConfig(f"{Path(model_name or 'model').name}-SFT")


def open_model(
    model: ViTPForConditionalGeneration | str | Path,
    processor: ViTPProcessor | None,
    init_kwargs: Mapping[str, Any],
) -> tuple[ViTPForConditionalGeneration, ViTPProcessor]:
    """Return a model, which is loaded if it is a folder or Hub id, and its processor if no other is given.

    Args:
        model, processor: see [`ViTPTrainer`].
        init_kwargs: arguments of `from_pretrained`. The default of `dtype` is float32.
    """
    if isinstance(model, str | Path):
        loaded_model, loaded_processor = load_checkpoint(str(model), **{"dtype": "float32", **init_kwargs})
        return loaded_model, processor or loaded_processor
    if processor is None:
        processor = ViTPProcessor.from_pretrained(model.config._name_or_path)
    return model, processor


def set_robustness(model: ViTPForConditionalGeneration, data_collator: ViTPDataCollator) -> None:
    """Record how a collator drops visual tokens and masks answers in the configuration of the model it trains."""
    for name in ("vrl_drop_ratio", "vrl_apply_prob", "vrl_warmup_steps", "answer_mask_ratio"):
        setattr(model.config, name, getattr(data_collator, name))
    if data_collator.answer_mask_ratio > 0:
        # The token that replaces masked tokens may be the pad token, whose embedding must then be trained.
        model.get_input_embeddings().padding_idx = None


def weights_of_samples(labels: torch.LongTensor, sample_ends: torch.Tensor | None) -> torch.Tensor:
    """Return the weights of answer tokens with which each sample counts the same: 1 / answer tokens of the sample.

    Args:
        labels: labels, int64 of shape `(batch_size, sequence_length)`.
        sample_ends: first token of each sample and the end of the last one, if the samples are one sequence.

    Returns:
        Weights, float32 of shape `(answer tokens,)`, in the order of the labels.
    """
    rows, columns = (labels[:, 1:] != NO_LABEL).nonzero(as_tuple=True)
    samples = rows
    if sample_ends is not None:
        samples = torch.searchsorted(sample_ends[1:], (columns + 1).to(sample_ends.dtype), right=True)
    return 1 / samples.bincount()[samples].float()


def prepare_dataset(dataset: Dataset | IterableDataset, is_converted: bool) -> Dataset | IterableDataset:
    """Return a data set whose rows have ids, and if `is_converted` is true, `messages` and `images`."""
    return prepare_rows(to_conversations(dataset) if is_converted else dataset)


def check_strategies(args: ViTPTrainingConfig, train_dataset: Dataset | IterableDataset) -> None:
    """Raise a `ValueError` if something happens at the end of an epoch of a stream."""
    if not isinstance(train_dataset, torch.utils.data.IterableDataset):
        return
    for name in ("save_strategy", "eval_strategy"):
        if getattr(args, name) == "epoch":
            raise ValueError(
                f"{name}='epoch' is not supported for a stream, because its number of rows is unknown. Use 'steps'."
            )


def make_collator(
    args: ViTPTrainingConfig,
    processor: ViTPProcessor,
    train_dataset: Dataset | IterableDataset,
    sample_transform: SampleTransform | None,
    source_settings: Mapping[str, SourceSettings] | None,
) -> ViTPDataCollator:
    """Return the collator of training batches."""
    num_rows = None if isinstance(train_dataset, torch.utils.data.IterableDataset) else len(train_dataset)
    num_steps = args.number_of_steps(num_rows, args.world_size) or 0
    return ViTPDataCollator(
        processor,
        max_length=args.max_length,
        vrl_drop_ratio=args.vrl_drop_ratio,
        vrl_apply_prob=args.vrl_apply_prob,
        vrl_warmup_steps=args.vrl_warmup_steps or 0,
        patch_drop_ratio=args.patch_drop_ratio,
        patch_drop_steps=args.patch_drop_steps(num_steps),
        answer_mask_ratio=args.answer_mask_ratio,
        color_jitter=args.color_jitter,
        seed=args.seed if args.data_seed is None else args.data_seed,
        sample_transform=sample_transform,
        source_settings=source_settings or {},
        on_error=args.on_error,
        replacement_rows=replacement_rows(train_dataset) if args.on_error == "skip" else None,
        pad_to_multiple_of=args.pad_to_multiple_of,
        padding_free=args.padding_free,
    )


def check_collator(
    args: ViTPTrainingConfig, data_collator: ViTPDataCollator, model: ViTPForConditionalGeneration
) -> None:
    """Raise a `ValueError` if the collator is of another class, or pads differently from the arguments or the model."""
    if not isinstance(data_collator, ViTPDataCollator):
        raise ValueError(f"Expected data_collator to be a ViTPDataCollator, got {type(data_collator).__name__}.")
    if args.padding_free and not data_collator.padding_free:
        raise ValueError("padding_free=True: the data_collator pads. Create it with padding_free=True.")
    if data_collator.padding_free:
        check_attention(model)
