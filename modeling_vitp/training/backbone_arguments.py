"""Arguments of the model that fine-tuning starts from."""

from dataclasses import dataclass, field

from .values import Arguments


@dataclass
class StartArguments(Arguments):
    """Where fine-tuning starts: a pretrained backbone, a fine-tuned model, or random weights."""

    limits = {"drop_path_rate": "[0, 1)"}
    neck = None  # what makes maps of the ViT's features, if anything does

    model_name_or_path: str | None = field(
        default=None,
        metadata={
            "help": "Folder or Hub id of an exported backbone, or of a model fine-tuned with this recipe; '' for none."
        },
    )
    model_revision: str = field(default="main", metadata={"help": "Branch, tag or commit on the Hub."})
    from_scratch: dict | str | None = field(
        default=None,
        metadata={"help": "Instead: configuration of a ViT with random weights, to compare with; '{}' for none."},
    )
    backbone: dict | str | None = field(
        default=None, metadata={"help": "More settings of the backbone's configuration, such as deformable_heads."}
    )
    drop_path_rate: float = field(default=0.1, metadata={"help": "Stochastic depth of the ViT."})
    head: dict | str | None = field(
        default=None,
        metadata={"help": "More settings of the model's configuration, such as hidden_size (of UPerNet) or pooling."},
    )

    def __post_init__(self):
        super().__post_init__()
        self.model_name_or_path = self.model_name_or_path or None
        self.from_scratch = self.from_scratch or None


@dataclass
class BackboneArguments(StartArguments):
    """Where fine-tuning for maps and boxes starts."""

    choices = {"neck": ("adapter", "pyramid")}

    neck: str = field(default="adapter", metadata={"help": "'adapter' (ViT-Adapter) or 'pyramid' (faster)."})
