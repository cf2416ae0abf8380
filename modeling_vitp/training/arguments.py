"""Arguments of the pretraining on the command line, and what they say of its data."""

import json
from dataclasses import dataclass, field
from pathlib import Path

from datasets import Dataset, IterableDataset
from trl import ScriptArguments

from ..cards.record import public_name
from ..instructions.mixture_file import Mixture


@dataclass
class PretrainArguments(ScriptArguments):
    mixture: dict | str | None = field(
        default=None,
        metadata={
            "help": "Instead of dataset_name: a mixture of sources with their rates, or the file that holds one, see "
            "recipes/configs/README.md. A released meta JSON can be given as it is."
        },
    )
    dry_run: bool = field(
        default=False,
        metadata={"help": "Prints what the mixture amounts to and stops; needs neither data nor Hub nor GPU."},
    )
    task: str | None = field(
        default=None,
        metadata={
            "help": "Module under recipes/tasks that turns annotated rows into instructions while training and scores "
            "the model at the end. Not needed for a data set that has `messages`."
        },
    )
    from_scratch: dict | str | None = field(
        default=None,
        metadata={
            "help": "Instead of model_name_or_path: `vision_config`, `text_config`, `vocab_size` and, optionally, "
            "`image_processor` of a model and tokenizer to build."
        },
    )
    vision_model: str | None = field(
        default=None,
        metadata={"help": "Instead of model_name_or_path: a pretrained backbone, to be trained with language_model."},
    )
    language_model: str | None = field(
        default=None,
        metadata={"help": "The causal LM that vision_model is joined to, by a projector that starts fresh."},
    )
    freeze_vision: bool = field(default=False, metadata={"help": "The ViT does not train."})
    freeze_projector: bool = field(default=False, metadata={"help": "The projector does not train."})
    freeze_language_model: bool = field(
        default=False, metadata={"help": "The language model does not train. For LoRA on it, give use_peft instead."}
    )
    unfreeze_vision_layers: int = field(
        default=0, metadata={"help": "How many of the last layers of a frozen ViT train all the same."}
    )
    drop_path_rate: float | None = field(
        default=None,
        metadata={"help": "Stochastic depth of the ViT, growing linearly over its layers. The paper uses 0.1."},
    )
    max_patches: int | None = field(
        default=None, metadata={"help": "Most tiles of a sample; its images share them. The paper uses 12, or 6."}
    )
    input_spec: dict | str | None = field(
        default=None,
        metadata={"help": "How images that are not 8-bit RGB are read: `bands`, `window`, `percentiles`, `gamma`."},
    )

    def __post_init__(self):
        for name in ("from_scratch", "input_spec", "mixture"):
            value = getattr(self, name)
            if isinstance(value, str) and value.lstrip().startswith("{"):
                setattr(self, name, json.loads(value))
        if (self.mixture is None) == (self.dataset_name is None):
            raise ValueError("Give either dataset_name or mixture in the configuration: what is trained on.")
        if self.mixture is not None and self.task is not None:
            raise ValueError("A task makes its own instructions from dataset_name; with a mixture there is none.")


def describe_data(args: PretrainArguments, mixture: Mixture | None, dataset: Dataset | IterableDataset) -> list[dict]:
    """What is trained on, for the record of the run; `dataset` is a Hub id."""
    if mixture is None:
        is_on_hub = not Path(args.dataset_name).exists()
        split = {"split": args.dataset_train_split, "rows": len(dataset) if isinstance(dataset, Dataset) else None}
        return [{"name": public_name(args.dataset_name), "dataset": args.dataset_name if is_on_hub else None, **split}]
    return [
        {
            "name": source.name,
            "dataset": source.dataset if source.is_on_hub else None,
            "rows": source.rows,
            "rate": source.rate,
            "modality": source.modality,
            "tasks": source.tasks,
        }
        for source in mixture.sources
    ]


def describe_evaluation(args: PretrainArguments) -> dict[str, str] | None:
    """What `metrics.json` will be about, for the record of the run."""
    if args.dataset_name is None:
        return None
    on_hub = {} if Path(args.dataset_name).exists() else {"dataset": args.dataset_name}
    return {"name": public_name(args.dataset_name), "eval": args.dataset_test_split, **on_hub}
