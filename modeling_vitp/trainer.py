"""TRL's `SFTTrainer` for ViTP: sample ids, epochs and an evaluation collator, which the stock one cannot do."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from accelerate.utils import is_peft_model
from datasets import Dataset, DatasetDict, Features, Image, IterableDataset, List, Value
from safetensors import safe_open
from torch.utils.data import DataLoader
from trl import SFTConfig, SFTTrainer

from .collator import SampleTransform, ViTPDataCollator, content_id
from .modeling_vitp import ViTPForConditionalGeneration
from .processing_vitp import ViTPProcessor


def has_fast_bf16() -> bool:
    """Whether the device that training will run on computes in bfloat16 natively."""
    if torch.accelerator.is_available():
        return torch.accelerator.current_accelerator().type != "cuda" or torch.cuda.is_bf16_supported(False)
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


@dataclass
class ViTPTrainingConfig(SFTConfig):
    """[`~trl.SFTConfig`] with VRL, and defaults for ViTP: 4,096 tokens, and bf16 wherever the hardware has it."""

    vrl_drop_ratio: float = field(
        default=0.75,
        metadata={"help": "VRL: share of each sample's visual tokens that is dropped in training, in [0, 1)."},
    )
    vrl_apply_prob: float = field(
        default=1.0,
        metadata={"help": "VRL: share of the samples it is applied to. The authors' release amounts to 1 - ratio."},
    )
    max_length: int | None = field(
        default=4096,
        metadata={"help": "Longest sequence after the drop, in tokens. Only answers are cut to it, with a warning."},
    )
    remove_unused_columns: bool = field(
        default=False,
        metadata={"help": "The collator picks the columns it needs, the sample id among them."},
    )

    def __post_init__(self):
        self.use_cpu = self.use_cpu or not torch.accelerator.is_available()
        if self.bf16 is None:
            self.bf16 = not self.fp16 and has_fast_bf16()
        # Rows are encoded by the collator, which needs the images; TRL would tokenise a text-only set beforehand.
        self.dataset_kwargs = {**(self.dataset_kwargs or {}), "skip_prepare_dataset": True}
        super().__post_init__()


class ViTPTrainer(SFTTrainer):
    """Trains [`ViTPForConditionalGeneration`] with Visual Robustness Learning.

    What differs from [`~trl.SFTTrainer`]: every row has an id that reaches the collator; the epoch reaches it too,
    also in persistent workers; evaluation runs without VRL and without augmentation; the drop ratio is recorded in
    the model's config; a checkpoint with missing or unexpected keys is an error when resuming.

    Args:
        model: the model to train.
        args: [`ViTPTrainingConfig`].
        train_dataset: rows with `messages` and `images` (or `image`), and optionally `id`; the row number is the id
            of a data set without.
        eval_dataset: the same, or a dictionary of such data sets.
        processing_class: [`ViTPProcessor`].
        data_collator: replaces the [`ViTPDataCollator`] that is made from `args`.
        sample_transform: augmentation in training, see [`ViTPDataCollator`].
        kwargs: as for [`~trl.SFTTrainer`].
    """

    _tag_names = ["trl", "sft", "vitp"]

    def __init__(
        self,
        model: ViTPForConditionalGeneration,
        args: ViTPTrainingConfig,
        train_dataset: Dataset | IterableDataset,
        eval_dataset: Dataset | IterableDataset | DatasetDict | dict | None = None,
        processing_class: ViTPProcessor | None = None,
        data_collator: ViTPDataCollator | None = None,
        sample_transform: SampleTransform | None = None,
        **kwargs,
    ):
        if processing_class is None:
            processing_class = ViTPProcessor.from_pretrained(model.config._name_or_path)
        check_compatible(model, processing_class)
        if data_collator is None:
            data_collator = ViTPDataCollator(
                processing_class,
                max_length=args.max_length,
                vrl_drop_ratio=args.vrl_drop_ratio,
                vrl_apply_prob=args.vrl_apply_prob,
                seed=args.seed if args.data_seed is None else args.data_seed,
                sample_transform=sample_transform,
                pad_to_multiple_of=args.pad_to_multiple_of,
            )
        model.config.vrl_drop_ratio = data_collator.vrl_drop_ratio
        model.config.vrl_apply_prob = data_collator.vrl_apply_prob
        self.eval_data_collator = data_collator.for_evaluation()
        if isinstance(eval_dataset, dict):
            eval_dataset = {name: prepare_rows(dataset) for name, dataset in eval_dataset.items()}
        elif eval_dataset is not None:
            eval_dataset = prepare_rows(eval_dataset)
        super().__init__(
            model=model,
            args=args,
            data_collator=data_collator,
            train_dataset=prepare_rows(train_dataset),
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            **kwargs,
        )

    def _get_dataloader(self, *args, is_training: bool = False, **kwargs) -> DataLoader:
        train_collator = self.data_collator
        if not is_training:
            self.data_collator = self.eval_data_collator
        try:
            dataloader = super()._get_dataloader(*args, is_training=is_training, **kwargs)
        finally:
            self.data_collator = train_collator
        # The seeds of workers would be drawn from the global generator, at other times in a run that is resumed than in
        # one that never stopped, and stochastic depth would differ from there on.
        getattr(dataloader, "base_dataloader", dataloader).generator = torch.Generator()
        return dataloader

    def _run_epoch(self, *args, epoch: int, **kwargs):
        self.data_collator.set_epoch(epoch)
        return super()._run_epoch(*args, epoch=epoch, **kwargs)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: torch.nn.Module | None = None) -> None:
        adapter_file = Path(resume_from_checkpoint) / "adapter_model.safetensors"
        if is_peft_model(self.model) and adapter_file.is_file():
            from peft import get_peft_model_state_dict

            expected = set(get_peft_model_state_dict(self.model))
            with safe_open(adapter_file, "pt") as file:
                check_loaded(expected - set(file.keys()), set(file.keys()) - expected)
        super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _issue_warnings_after_load(self, load_result) -> None:
        tied = set(getattr(self.model, "all_tied_weights_keys", None) or {})
        check_loaded(set(load_result.missing_keys) - tied, load_result.unexpected_keys)
        self.model.tie_weights()


def check_loaded(missing: Iterable[str], unexpected: Iterable[str]) -> None:
    """Raises a `ValueError` if a checkpoint and the model that it was loaded into have not the same keys."""
    if missing or unexpected:
        raise ValueError(
            f"The checkpoint does not fit the model: missing keys {sorted(missing)}, unexpected keys "
            f"{sorted(unexpected)}. Resume with the configuration that the run was started with."
        )


def check_compatible(model: ViTPForConditionalGeneration, processor: ViTPProcessor) -> None:
    """Raises a `ValueError` if the processor's tiles or tokens are not what the model expects."""
    config = model.config
    size = processor.image_processor.size
    pairs = {
        "image_seq_length": (config.image_seq_length, processor.image_seq_length),
        "image_token_id": (config.image_token_id, processor.image_token_id),
        "image size": (list(config.vision_config.image_size), [size["height"], size["width"]]),
    }
    for name, (expected, given) in pairs.items():
        if expected != given:
            raise ValueError(f"Model and processor do not belong together: {name} is {expected} and {given}.")
    num_embeddings = model.get_input_embeddings().num_embeddings
    if len(processor.tokenizer) > num_embeddings:
        raise ValueError(
            f"The tokenizer has {len(processor.tokenizer)} tokens, but the model only {num_embeddings} embeddings: "
            "call model.resize_token_embeddings(len(tokenizer))."
        )
    if processor.tokenizer.pad_token_id is None:
        raise ValueError("The tokenizer has no pad token: set tokenizer.pad_token.")


def prepare_rows(dataset: Dataset | IterableDataset) -> Dataset | IterableDataset:
    """Gives every row an id, and leaves images encoded, so that the collator can name the sample that is broken."""
    encoded = {}
    for name, feature in (dataset.features or {}).items():
        if isinstance(feature, Image) and feature.mode is None:
            encoded[name] = Image(decode=False)
        elif isinstance(feature, List) and isinstance(feature.feature, Image) and feature.feature.mode is None:
            encoded[name] = List(Image(decode=False))
    has_ids = dataset.column_names is not None and "id" in dataset.column_names
    if isinstance(dataset, Dataset):
        if not has_ids:
            dataset = dataset.add_column("id", list(range(len(dataset))))
        # `cast_column` would write a copy of the whole data set for a list of images, though no byte of it changes.
        dataset = dataset.select_columns(dataset.column_names)
        dataset.info.features = Features({**dataset.features, **encoded})
        return dataset
    for name, feature in encoded.items():
        dataset = dataset.cast_column(name, feature)
    if not has_ids:
        # Not the row number, which in a stream depends on the worker, the rank and the shuffle buffer.
        features = dataset.features and Features({"id": Value("string"), **dataset.features})
        dataset = dataset.map(lambda row: {"id": content_id(row), **row}, features=features)
    return dataset
