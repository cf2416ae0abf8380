"""Arguments of a pretraining on the tree task."""

from dataclasses import dataclass, field

from modeling_vitp.command.settings import JsonText, check_keys
from modeling_vitp.pretraining.arguments import PretrainArguments

OWN_ROWS = "the tree task reads and scores rows of its own."
TASK_OPTIONS = ("collage_share", "map_share", "mosaic_share", "kinds")


@dataclass
class TreePretrainArguments(PretrainArguments):
    """Arguments of `vitp pretrain`, with options of [`~lab.trees.instructions.TreeInstructions`]."""

    unsupported = dict.fromkeys(
        ("annotations", "mixture", "image_root", "columns", "prompt", "probe_data", "require", "dry_run"), OWN_ROWS
    )

    task: str | None = field(default="trees", metadata={"help": "Mark of a configuration of this command."})
    task_options: dict | JsonText | None = field(
        default=None, metadata={"help": f"Options of the instructions as JSON: {', '.join(TASK_OPTIONS)}."}
    )

    def __post_init__(self):
        super().__post_init__()
        if self.task != "trees":
            raise ValueError(f"Expected task to be 'trees', got {self.task!r}.")
        check_keys("task_options", self.task_options or {}, TASK_OPTIONS)
