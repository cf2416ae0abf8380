"""Arguments of what a fine-tuning trains on and is scored on."""

from dataclasses import dataclass, field

from .values import Arguments


@dataclass
class SplitArguments(Arguments):
    """What is trained on, and what is scored."""

    limits = {"num_pictures": "[0, inf)"}

    data: dict | str | None = field(
        default=None,
        metadata={"help": "Classes, splits and files of the data set, see the page of the recipe."},
    )
    data_root: str | None = field(default=None, metadata={"help": "Where the data set is, instead of data.root."})
    train_splits: list[str] = field(default_factory=lambda: ["train"], metadata={"help": "What is trained on."})
    eval_split: str | None = field(
        default=None,
        metadata={
            "help": "What is scored while training, with eval_strategy, and at the end. The last checkpoint is the "
            "result, unless load_best_model_at_end is set."
        },
    )
    test_split: str | None = field(default=None, metadata={"help": "What is scored once, at the end; '' for nothing."})
    num_pictures: int = field(default=4, metadata={"help": "Samples in the picture of predictions."})

    def __post_init__(self):
        super().__post_init__()
        self.eval_split, self.test_split = self.eval_split or None, self.test_split or None
        if self.data_root is not None:
            self.data = {**(self.data or {}), "root": self.data_root}
        if self.test_split is not None and self.test_split in {*self.train_splits, self.eval_split}:
            raise ValueError(f"Split {self.test_split!r} is the test's; it may not be trained or selected on.")
