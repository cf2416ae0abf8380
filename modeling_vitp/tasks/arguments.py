"""Arguments of fine-tuning: the start, the data set, and settings that all tasks have."""

from dataclasses import dataclass, field
from typing import Literal

from ..command.settings import DropRate, JsonText, NonNegativeInt, Probability, Settings, Share
from ..training.arguments import PlanArguments, RunArguments


@dataclass
class StartArguments(Settings):
    """Arguments of the start of fine-tuning: a pretrained backbone, a fine-tuned model, or random weights."""

    advanced = ("model_revision", "from_scratch", "backbone", "head")

    neck = None  # classification uses the ViT's features without a neck

    model_name_or_path: str | None = field(
        default=None,
        metadata={
            "help": "Folder or Hub id of an exported backbone, of a ViT such as facebook/dinov2-base, or of a model "
            "fine-tuned with this recipe; '' for none."
        },
    )
    model_revision: str = field(
        default="main",
        metadata={"help": "Branch, tag or commit of model_name_or_path on the Hub."},
    )
    from_scratch: dict | JsonText | None = field(
        default=None,
        metadata={
            "help": "Configuration of a ViT with random weights, as JSON. Replaces model_name_or_path; '{}' for none."
        },
    )
    backbone: dict | JsonText | None = field(
        default=None, metadata={"help": "Fields of the backbone's configuration as JSON, such as deformable_heads."}
    )
    drop_path_rate: DropRate = field(
        default=0.1,
        metadata={
            "help": "Stochastic depth rate of the ViT's last layer, ignored if its family has no stochastic depth or "
            "the ViT is frozen. A fine-tuned model keeps its own."
        },
    )
    freeze_backbone: bool = field(
        default=False, metadata={"help": "Freeze the ViT; the neck and the head train. Default: false."}
    )
    backbone_lora_r: NonNegativeInt = field(
        default=0, metadata={"help": "Rank of LoRA on the layers of the ViT, whose own weights are frozen. 0: none."}
    )
    head: dict | JsonText | None = field(
        default=None,
        metadata={"help": "Fields of the model's configuration as JSON, such as hidden_size (of UPerNet) or pooling."},
    )

    def __post_init__(self):
        super().__post_init__()
        self.model_name_or_path = self.model_name_or_path or None
        self.from_scratch = self.from_scratch or None


@dataclass
class BackboneArguments(StartArguments):
    """Arguments of the start of fine-tuning for segmentation, change detection and detection."""

    neck: Literal["adapter", "pyramid"] | None = field(
        default=None,
        metadata={
            "help": "Neck of the ViT: 'adapter' (ViT-Adapter) or 'pyramid' (faster). By default 'adapter', or for a "
            "fine-tuned model its own, which it keeps."
        },
    )


@dataclass
class FineTuningSettings(RunArguments):
    """Settings that all fine-tuning tasks add to [`~transformers.TrainingArguments`].

    The settings of layer-wise learning rate decay are the arguments of
    [`~modeling_vitp.training.freezing.layer_decay_groups`].
    """

    advanced = ("watch_samples", "level_embeddings_at_input", "position_weight_decay")

    horizontal_flip: Probability = field(default=0.5, metadata={"help": "Probability of a horizontal flip."})
    vertical_flip: Probability = field(default=0.0, metadata={"help": "Probability of a vertical flip."})
    do_train: bool = field(
        default=True,
        metadata={"help": "Whether to train. If false, the model is only scored and its predictions are drawn."},
    )
    layer_decay: Share = field(
        default=0.9,
        metadata={
            "help": "Factor between the learning rates of a ViT layer and of the next layer, in (0, 1]. 1: no decay."
        },
    )
    level_embeddings_at_input: bool = field(
        default=False,
        metadata={
            "help": "Whether the adapter's level embeddings have the learning rate of the patch and position "
            "embeddings, as in the authors' release. By default they have that of the adapter."
        },
    )
    position_weight_decay: bool = field(
        default=False,
        metadata={"help": "Whether position embeddings have weight decay, as in the authors' release. Default: false."},
    )


@dataclass
class SplitArguments(PlanArguments):
    """Arguments of the data set and its splits for training and scoring."""

    advanced = ("resample_test", "num_pictures", "plugins")

    data: dict | JsonText | None = field(
        default=None,
        metadata={"help": "Classes, splits and files of the data set as JSON, see the page of the recipe."},
    )
    data_root: str | None = field(
        default=None,
        metadata={
            "help": "Folder of the data set, by default data.root. Without splits in `data`, classes and splits are "
            "inferred from the folder."
        },
    )
    train_splits: list[str] = field(default_factory=lambda: ["train"], metadata={"help": "Splits to train on."})
    eval_split: str | None = field(
        default=None,
        metadata={
            "help": "Split that is scored during training, according to eval_strategy, and at the end; '' for none. "
            "The last checkpoint is the result unless load_best_model_at_end is set, which selects by "
            "metric_for_best_model, by default the main score."
        },
    )
    test_split: str | None = field(
        default=None,
        metadata={"help": "Split that is scored once, at the end; '' for none."},
    )
    resample_test: bool = field(
        default=False,
        metadata={
            "help": "Whether to also write the main score of each resample of the test cases to metrics.json, for "
            "intervals of differences between models."
        },
    )
    num_pictures: NonNegativeInt = field(default=4, metadata={"help": "Number of samples in predictions.png. 0: none."})
    plugins: list[str] = field(
        default_factory=list,
        metadata={"help": "Python files that register heads, layouts of labels or tasks, see docs/extending.md."},
    )

    def __post_init__(self):
        super().__post_init__()
        self.has_default_splits = self.eval_split is None and self.test_split is None
        self.eval_split, self.test_split = self.eval_split or None, self.test_split or None
        if self.data_root is not None:
            self.data = {**(self.data or {}), "root": self.data_root}
        if self.data is None:
            raise ValueError("Expected a data set. Set `data_root` (a folder of annotated images) or `data`.")
