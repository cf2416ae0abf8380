"""Arguments of `evaluate_vlm`."""

from dataclasses import dataclass, field
from typing import Literal

from ..command.settings import NonNegativeInt, PositiveInt, Settings, check_no_duplicates
from .answer_scores import KINDS


@dataclass
class VLMArguments(Settings):
    """Arguments of `evaluate_vlm`."""

    models: list[str] = field(
        default_factory=list,
        metadata={"help": "Folders or Hub ids of the pretrained models or checkpoints to compare."},
    )
    dataset_name: str | None = field(
        default=None, metadata={"help": "File, folder or Hub id of rows in any schema that `pretrain` takes."}
    )
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of the data set."})
    split: str = field(
        default="test",
        metadata={"help": "Split with the questions, or a part such as test[:100]. A single file has the split train."},
    )
    image_root: str | None = field(default=None, metadata={"help": "Folder that image paths are relative to."})
    kind: Literal[tuple(KINDS)] | None = field(
        default=None,
        metadata={
            "help": "Kind of all answers: grounding, choice, map, vqa or caption. Default: recognized for each answer."
        },
    )
    limit: PositiveInt | None = field(default=None, metadata={"help": "Maximum number of questions, drawn at random."})
    seed: int = field(default=0, metadata={"help": "Seed of the draws of questions and of the intervals."})
    batch_size: PositiveInt = field(default=16, metadata={"help": "Number of questions per batch."})
    max_new_tokens: PositiveInt = field(default=128, metadata={"help": "Maximum length of an answer in tokens."})
    bf16: bool = field(default=False, metadata={"help": "Whether to compute in bfloat16."})
    pictures: NonNegativeInt = field(
        default=6, metadata={"help": "Number of questions that are drawn with their answers."}
    )
    output_dir: str = field(default="outputs/vlm", metadata={"help": "Folder for metrics.json, answers and pictures."})

    def __post_init__(self):
        super().__post_init__()
        for name in ("models", "dataset_name"):
            if not getattr(self, name):
                raise ValueError(f"Set `{name}`, which must not be empty.")
        check_no_duplicates("models", self.models)
