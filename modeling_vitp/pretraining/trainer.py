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

from ..instructions.collator import NO_LABEL, STEP, SampleLength, ViTPDataCollator, normalize_tiles, with_raw_tiles
from ..instructions.mixture import MixtureStream, check_rows, replacement_rows
from ..instructions.rows import SampleTransform, SourceSettings, describe_rows, prepare_rows
from ..instructions.schemas import to_conversations
from ..modeling_vitp import ViTPForConditionalGeneration, ViTPModel
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
    frozen_parts,
)
from ..vision_towers import tower_of
from .config import ViTPTrainingConfig
from .generation import draw_answered_rows, rows_to_show
from .loading import check_compatible, load_checkpoint
from .model_patches import attention_by_sequence, check_attention, compile_layers
from .results import draw_summary, save_parts

logger = logging.getLogger(__name__)
SHUFFLE_BUFFER = 1000  # rows of a stream, in each worker
RATES = ("vision_learning_rate", "projector_learning_rate", "language_model_learning_rate")


class ViTPTrainer(BaseTrainer, SFTTrainer):
    """Trainer of [`ViTPForConditionalGeneration`] with Visual Robustness Learning.

    Differences from [`~trl.SFTTrainer`]:

    - The collator receives the id of every row and the epoch, also in persistent workers.
    - Evaluation runs without VRL, masked answers and augmentation. The model's config records the ratios.
    - With `vrl_warmup_steps`, the drop ratio is 0 in the first optimizer steps, and the drop ratio of the last step is
      logged as "vrl_drop_ratio".
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
    fixed = ("train_sampling_strategy", *RATES)

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
        if args is not None and not isinstance(args, ViTPTrainingConfig):
            raise ValueError(f"Expected args to be a ViTPTrainingConfig, got a {type(args).__name__}.")
        if args is None:
            name = model if isinstance(model, str | Path) else model.config._name_or_path
            args = ViTPTrainingConfig(f"{Path(name or 'model').name}-SFT")
        init_kwargs = args.model_init_kwargs
        if isinstance(model, str | Path):
            model, processor = load_checkpoint(str(model), **{"dtype": "float32", **(init_kwargs or {})})
            processing_class, args.model_init_kwargs = processing_class or processor, None
        elif processing_class is None:
            processing_class = ViTPProcessor.from_pretrained(model.config._name_or_path)
        check_compatible(model, processing_class)
        # A transform or another collator may read any format, so that its rows are not converted.
        convert = to_conversations if data_collator is None and sample_transform is None else lambda rows: rows
        train_dataset = prepare_rows(convert(train_dataset))
        if isinstance(train_dataset, torch.utils.data.IterableDataset):
            for name in ("save_strategy", "eval_strategy"):
                if getattr(args, name) == "epoch":
                    raise ValueError(
                        f"{name}='epoch' is not supported for a stream, because its number of rows is unknown. Use "
                        "'steps'."
                    )
        if data_collator is None:
            data_collator = ViTPDataCollator(
                processing_class,
                max_length=args.max_length,
                vrl_drop_ratio=args.vrl_drop_ratio,
                vrl_apply_prob=args.vrl_apply_prob,
                vrl_warmup_steps=args.vrl_warmup_steps or 0,
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
        if not isinstance(data_collator, ViTPDataCollator):
            raise ValueError(f"Expected data_collator to be a ViTPDataCollator, got {type(data_collator).__name__}.")
        if args.padding_free and not data_collator.padding_free:
            raise ValueError("padding_free=True: the data_collator pads. Create it with padding_free=True.")
        if data_collator.padding_free:
            check_attention(model)
        for name in ("vrl_drop_ratio", "vrl_apply_prob", "vrl_warmup_steps", "answer_mask_ratio"):
            setattr(model.config, name, getattr(data_collator, name))
        if data_collator.answer_mask_ratio > 0:
            # The token that replaces masked tokens may be the pad token, whose embedding must then be trained.
            model.get_input_embeddings().padding_idx = None
        self.eval_data_collator = data_collator.for_evaluation()
        if isinstance(eval_dataset, dict):
            eval_dataset = {name: prepare_rows(convert(dataset)) for name, dataset in eval_dataset.items()}
        elif eval_dataset is not None:
            eval_dataset = prepare_rows(convert(eval_dataset))
        self._stream: EndlessBatches | None = None
        self._eval_loaders: dict[str | None, tuple[DataLoader, Any]] = {}
        self._measured = None  # the measured data set and its lengths
        self._num_tokens_and_places = torch.zeros(2, dtype=torch.int64)  # sums over training batches since the last log
        if args.torch_compile:
            compile_layers(model)
        padding_free, args.padding_free = args.padding_free, False  # TRL rejects it for images
        super().__init__(
            model=model,
            args=args,
            data_collator=data_collator,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            **kwargs,
        )
        self.args.model_init_kwargs, self.args.padding_free = init_kwargs, padding_free
        # TRL's trainer gives the instance a forward pass for its own loss, which would bypass layers that accelerate
        # compiles in a copy of the model.
        inner = self.model.get_base_model() if is_peft_model(self.model) else self.model
        inner.__dict__.pop("forward", None)
        self._answer_sums: dict[str, torch.Tensor] = {}  # sums of training and evaluation since the last log
        self._num_trained_tokens = 0

    def check_rows(self) -> None:
        """Encode the first rows, at most those of the whole run, to find invalid rows early, see [`check_rows`]."""
        needed = max(self.args.max_steps, 0) * self.get_total_train_batch_size(self.args) or None
        options = {"most_rows": needed, "in_processes": self.args.dataloader_num_workers > 0}
        allowed = self.args.allow_text_only
        logger.info(check_rows(self.train_dataset, self.data_collator, allow_text_only=allowed, **options))
        named = self.eval_dataset if isinstance(self.eval_dataset, dict) else {"eval_dataset": self.eval_dataset}
        for name, dataset in named.items():
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
        rates = {name.removesuffix("_learning_rate"): getattr(args, name) for name in RATES}
        trained = {part_of(name) for name, weight in self.model.named_parameters() if weight.requires_grad}
        useless = [f"{part}_learning_rate" for part in rates if rates[part] is not None and part not in trained]
        useless += ["projector_steps"] if args.projector_steps and "projector" not in trained else []
        if useless:
            raise ValueError(
                f"{useless[0]} is set, but its part of the model is frozen. Remove one of the two options."
            )
        if self.optimizer is None and any(rate is not None for rate in rates.values()):
            model = self.model if model is None else model
            decayed = set(self.get_decay_parameter_names(model))
            groups: dict[tuple[str, bool], dict[str, Any]] = {}
            for name, weight in model.named_parameters():
                if weight.requires_grad:
                    part, has_decay = part_of(name), name in decayed
                    rate = args.learning_rate if rates[part] is None else rates[part]
                    decay = args.weight_decay if has_decay else 0.0
                    new = {"params": [], "lr": rate, "weight_decay": decay}
                    groups.setdefault((part, has_decay), new)["params"].append(weight)
            optimizer_cls, options = self.get_optimizer_cls_and_kwargs(args, model)
            self.optimizer = optimizer_cls(list(groups.values()), **options)
        return super().create_optimizer(model)

    # Batches

    def get_train_dataloader(self) -> DataLoader:
        collator = with_raw_tiles(self.data_collator)
        if isinstance(self.train_dataset, torch.utils.data.IterableDataset):
            return self._stream_loader(collator)
        self._sampler = self.train_sampler()
        self._sampler.check_not_empty()
        dataset = StepRows(self.train_dataset) if isinstance(self._sampler, StepSampler) else self.train_dataset
        return self.data_loader(dataset, collator, batch_sampler=self._sampler)

    def train_sampler(self) -> GlobalBatchSampler:
        dataset = self.train_dataset
        sampler_class = StepSampler if self.data_collator.vrl_warmup_steps > 0 else GlobalBatchSampler
        return sampler_class(
            len(dataset),
            self.args.train_batch_size,
            seed=self.data_seed,
            strategy=self.args.train_sampling_strategy,
            lengths=lambda: self._lengths(dataset),
            **self._sharding(),
        )

    def _stream_loader(self, collator: Callable) -> DataLoader:
        stream = self._rank_stream(self.train_dataset, self.args.train_batch_size)
        if isinstance(stream, StepStream) and self.args.dataloader_num_workers > 1:
            collator = RowKeeper(collator)
        resumed, accumulation = self._resumed_state, self.args.gradient_accumulation_steps
        where = {} if resumed is None else {"num_trained": resumed.global_step * accumulation}
        if resumed is not None:
            where |= resumed.stateful_callbacks[RunState.__name__]["attributes"]["stream"]

        def begin(epoch: int, first_batch: int) -> None:
            self._set_epoch(epoch)
            stream.set_epoch(epoch)
            if isinstance(stream, StepStream):
                stream.begin(first_batch // accumulation)

        loader = self._base_loader(stream, collator, is_training=True, batch_size=self.args.train_batch_size)
        self._loader, self._stream = loader, EndlessBatches(loader, stream, begin, self._finalize, **where)
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
        length = SampleLength.of(self.data_collator) if self.args.train_sampling_strategy in BY_LENGTH else None
        stream = StepStream if self.data_collator.vrl_warmup_steps > 0 else RankStream
        sharding = self._sharding()
        if getattr(dataset, "is_split", False):
            dataset = dataset.of_process(sharding.pop("num_processes"), sharding.pop("process_index"))
        elif not isinstance(dataset, MixtureStream) and self.args.train_sampling_strategy != "sequential":
            dataset = dataset.shuffle(self.data_seed, buffer_size=SHUFFLE_BUFFER)  # a mixture shuffles its own rows
        return stream(dataset, batch_size, length=length, **sharding)

    def _lengths(self, dataset: Dataset) -> list[int]:
        """Return the lengths of all rows of this epoch. A mixture selects them from the lengths of its sources."""
        if hasattr(dataset, "lengths"):
            return dataset.lengths(self._measure)
        if self._measured is None or self._measured[0] is not dataset:
            self._measured = dataset, self._measure(dataset)
        return self._measured[1]

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
                options = {"num_proc": self.args.dataset_num_proc, "desc": "Measuring samples"}
                dataset = rows.map(lambda row: {column: length(row)}, remove_columns=dataset.column_names, **options)
        return list(dataset.with_format(None)[column])

    # Evaluation

    def get_eval_dataloader(self, eval_dataset: str | Dataset | IterableDataset | None = None) -> DataLoader:
        """Return a loader of the batches of this process in order, in which no row is repeated."""
        args, name = self.args, eval_dataset if isinstance(eval_dataset, str) else None
        original = self.eval_dataset[name] if name else self.eval_dataset if eval_dataset is None else eval_dataset
        if original is None:
            raise ValueError("Evaluation needs an eval_dataset.")
        loader, loaded = self._eval_loaders.get(name, (None, None))
        if loaded is original and args.dataloader_persistent_workers:
            return loader
        dataset, processes = original, {"num_processes": args.world_size, "process_index": args.process_index}
        if not isinstance(dataset, torch.utils.data.IterableDataset):
            drop_last = args.dataloader_drop_last
            sampler = WholeBatchSampler(len(dataset), args.eval_batch_size, drop_last=drop_last, **processes)
            batches = {"batch_sampler": sampler}
        else:
            if args.world_size > 1:
                dataset = WholeBatchStream(dataset, args.eval_batch_size, **processes)
            batches = {"batch_size": args.eval_batch_size}
        loader = self.data_loader(dataset, with_raw_tiles(self.eval_data_collator), is_training=False, **batches)
        self._eval_loaders[name] = loader, original
        return loader

    def get_test_dataloader(self, test_dataset: Dataset | IterableDataset) -> DataLoader:
        return self.get_eval_dataloader(test_dataset)

    def prediction_step(self, model, inputs, prediction_loss_only: bool, ignore_keys: list[str] | None = None):
        if self.args.world_size > 1 and "pixel_values" not in inputs:
            # If the ViT is sharded, all processes must run it the same number of times.
            vitp = next(module for module in self.model.modules() if isinstance(module, ViTPModel))
            pixel_values, indices = vitp._unseen_tile()
            inputs = {**inputs, "pixel_values": pixel_values, "visual_token_indices": indices}
        num_answer_tokens = (inputs["labels"][:, 1:] != NO_LABEL).sum().item()
        self._num_eval_rows = len(inputs["labels"]) if num_answer_tokens else 0
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            if prediction_loss_only:
                loss, logits, labels = self.compute_loss(model, inputs), None, None
            else:
                loss, outputs = self.compute_loss(model, inputs, return_outputs=True)
                logits, labels = outputs.logits, inputs["labels"]
        self._eval_losses.append((loss.float().item(), num_answer_tokens))
        return loss, logits, labels

    def evaluation_loop(self, dataloader, *args, metric_key_prefix: str = "eval", **kwargs) -> EvalLoopOutput:
        self._eval_losses = []
        if self.args.world_size > 1:
            batch_size = self.args.eval_batch_size  # the last batches may be smaller or empty
            self.gather_function = lambda values: gather_rows(values, self._num_eval_rows, batch_size)
        output = super().evaluation_loop(dataloader, *args, metric_key_prefix=metric_key_prefix, **kwargs)
        # As in training, each answer token counts once, so that the loss does not depend on the batches.
        rounds = zip(*gather_object([self._eval_losses]))
        losses, weights = map(np.array, zip(*(batch for batches in rounds for batch in batches)))
        counted = weights > 0
        if self.args.logging_nan_inf_filter and np.isfinite(losses[counted]).any():
            counted &= np.isfinite(losses)
        output.metrics[f"{metric_key_prefix}_loss"] = float(np.average(losses[counted], weights=weights[counted]))
        return output

    # Metrics

    def _finalize(self, batch: dict[str, Any], number: int) -> dict[str, Any]:
        """Encode a batch with stored rows again if its step belongs to the warm-up, see [`RowKeeper`]."""
        rows, step = batch.pop(ROWS, None), number // self.args.gradient_accumulation_steps
        if rows is None or step >= self.data_collator.vrl_warmup_steps:
            return batch
        return NamedBatches(with_raw_tiles(self.data_collator))([{**row, STEP: step} for row in rows])

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
        """Return the mean negative log-likelihood of the answer tokens.

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
        sums = torch.stack([values.sum() for values in (scores.entropy, scores.is_top1, torch.ones_like(losses))])
        mode = "train" if self.model.training else "eval"
        self._answer_sums[mode] = self._answer_sums.get(mode, 0) + sums.double()
        num_items = len(losses) if num_items_in_batch is None else num_items_in_batch
        loss = losses.sum() / torch.as_tensor(num_items, device=losses.device).clamp(min=1)
        if num_items_in_batch is not None and self.args.average_tokens_across_devices:
            loss = loss * self.args.world_size  # num_items counts all processes, whose gradients are averaged
        if not return_outputs:
            return loss
        with torch.no_grad():
            return loss, model(**inputs)

    def get_batch_samples(self, *args, **kwargs) -> tuple[list, torch.Tensor | int | None]:
        batches, num_items = super().get_batch_samples(*args, **kwargs)
        if batches:
            masks = [batch.get("attention_mask", torch.ones_like(batch["input_ids"])) for batch in batches]
            counts = torch.tensor([sum(mask.sum() for mask in masks), sum(mask.numel() for mask in masks)])
            counts = self.accelerator.gather(counts.to(self.args.device))
            self._num_tokens_and_places += counts.view(-1, 2).sum(0).cpu()
        return batches, num_items

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        mode, prefix = ("train", "") if self.model.training else ("eval", "eval_")
        num_tokens, num_places = self._num_tokens_and_places.tolist()
        num_trained_tokens = self._num_trained_tokens + num_tokens
        if mode == "train" and num_places:
            self._num_trained_tokens = num_trained_tokens
            logs["padding_share"] = 1 - num_tokens / num_places
            if self.data_collator.vrl_warmup_steps > 0:
                logs["vrl_drop_ratio"] = self.data_collator.drop_ratio_at(self.state.global_step - 1)
            self._num_tokens_and_places.zero_()
        sums = self._answer_sums.pop(mode, None)
        if sums is not None:
            entropy, correct, number = self.accelerator.reduce(sums, "sum").tolist()
            logs[f"{prefix}entropy"] = entropy / max(number, 1)
            logs[f"{prefix}mean_token_accuracy"] = correct / max(number, 1)
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
        args, collator, image_processor = self.args, self.data_collator, self.processing_class.image_processor
        settings, model = super().run_settings(), self.accelerator.unwrap_model(self.model)
        fixed, free = settings["fixed"], settings["free"]
        fixed |= {
            "vrl_drop_ratio": collator.vrl_drop_ratio,
            "vrl_apply_prob": collator.vrl_apply_prob,
            "vrl_warmup_steps": collator.vrl_warmup_steps or None,
            "answer_mask_ratio": collator.answer_mask_ratio or None,
            "color_jitter": collator.color_jitter,
            "projector_steps": args.projector_steps or None,
            "sample_transform": getattr(collator.sample_transform, "settings", None),
            "max_length": collator.max_length,
            "max_patches": image_processor.max_patches,
            "input_spec": image_processor.input_spec,
            "drop_path_rate": tower_of(model.config.vision_config).drop_path_rate(model.config.vision_config),
            TRAINING_DATA: describe_rows(self.train_dataset),
        }
        if isinstance(self.train_dataset, torch.utils.data.IterableDataset):
            names = "per_device_train_batch_size", "gradient_accumulation_steps", "num_processes"
            fixed |= {name: free[name] for name in names} | {"dataloader_num_workers": args.dataloader_num_workers}
        free["loss_type"] = None if args.loss_type == "nll" else args.loss_type
        free["padding_free"] = collator.padding_free or None
        trained = frozen_parts(model) | adapter_settings(model)
        if trained["use_peft"]:
            trained["weights under the adapter"] = self.weights_under_adapter
        return settings | {"model": trained}

    @cached_property
    def weights_under_adapter(self) -> str:
        """Hash of the base weights of an adapter, computed before sharding."""
        return base_fingerprint(self.model, self.is_world_process_zero())

    def running_sums(self) -> dict[str, Any]:
        answers = self._answer_sums.get("train")
        sums = super().running_sums() | {
            "answers": None if answers is None else self.accelerator.reduce(answers, "sum").tolist(),
            "num_trained_tokens": self._num_trained_tokens,
            "num_tokens_and_places": self._num_tokens_and_places.tolist(),
        }
        if self._stream is not None:
            num_trained = self.state.global_step * self.args.gradient_accumulation_steps
            sums["stream"] = dict(zip(("epoch", "first_batch"), self._stream.start_of(num_trained)))
        return sums

    def restore_sums(self, sums: dict[str, Any] | None) -> None:
        super().restore_sums(sums)
        # A run that is resumed at its end has no further training logs.
        if sums is not None and self.state.global_step < self.state.max_steps:
            if sums["answers"] and self.is_world_process_zero():
                self._answer_sums["train"] = torch.tensor(sums["answers"], dtype=torch.float64, device=self.args.device)
            self._num_trained_tokens = sums["num_trained_tokens"]
            self._num_tokens_and_places += torch.tensor(sums["num_tokens_and_places"])

    def check_checkpoint(self, checkpoint: str) -> None:
        super().check_checkpoint(checkpoint)
        check_tokenizer(checkpoint, self.processing_class.tokenizer)
        adapter_file = Path(checkpoint) / "adapter_model.safetensors"
        if is_peft_model(self.model) and adapter_file.is_file():
            expected = set(get_peft_model_state_dict(self.model))
            with safe_open(adapter_file, "pt") as file:
                check_loaded(expected - set(file.keys()), set(file.keys()) - expected)
