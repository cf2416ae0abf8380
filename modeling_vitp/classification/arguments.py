"""Arguments of fine-tuning for classes of images on the command line."""

from dataclasses import dataclass, field

from ..training.arguments import FineTuningSettings, SplitArguments

# Settings that the scores of a model depend on.
SCORED_WITH = ("image_size", "per_device_eval_batch_size", "bf16", "fp16")


@dataclass
class ClassificationSettings(FineTuningSettings):
    """Settings of [`~modeling_vitp.ViTPClassificationTrainingConfig`] beside those of transformers."""

    limits = {
        "image_size": "[1, inf)",
        "crop_area": "(0, 1]",
        "quarter_turns": "[0, 1]",
    }

    image_size: int = field(
        default=224, metadata={"help": "Side of the square that images become, in pixels: whole patches of the ViT."}
    )
    crop_area: list[float] = field(
        default_factory=lambda: [0.5, 1.0], metadata={"help": "What a crop in training has of an image's area."}
    )
    quarter_turns: float = field(default=0.0, metadata={"help": "Chance of a turn by 90, 180 or 270 degrees."})
    photometric: bool = field(
        default=True, metadata={"help": "Whether brightness, contrast, saturation and hue change."}
    )

    def __post_init__(self):
        super().__post_init__()
        if len(self.crop_area) != 2 or self.crop_area[0] > self.crop_area[1]:
            raise ValueError(f"crop_area={self.crop_area}: give the smallest and the largest.")


@dataclass
class ClassificationArguments(SplitArguments):
    """What is trained on, and what is scored."""

    dataset_name: str | None = field(
        default=None, metadata={"help": "A data set of the Hub, or a folder, instead of data.dataset_name."}
    )
    num_pictures: int = field(default=16, metadata={"help": "Samples in the picture of predictions."})

    def __post_init__(self):
        if self.dataset_name is not None:
            self.data = {**(self.data or {}), "dataset_name": self.dataset_name}
        if not self.data and self.data_root is None:
            raise ValueError("Give data_root, a folder of images, or dataset_name, or `data` in the configuration.")
        super().__post_init__()
