"""Command-line arguments for fine-tuning on image classification."""

from dataclasses import dataclass, field

from ..training.arguments import FineTuningSettings, SplitArguments

# Settings that change the scores of a model.
SCORED_WITH = ("image_size", "per_device_eval_batch_size", "bf16", "fp16")


@dataclass
class ClassificationSettings(FineTuningSettings):
    """Settings that [`~modeling_vitp.ViTPClassificationTrainingConfig`] adds to [`~transformers.TrainingArguments`]."""

    limits = {
        "image_size": "[1, inf)",
        "crop_area": "(0, 1]",
        "quarter_turns": "[0, 1]",
    }

    image_size: int = field(
        default=224,
        metadata={"help": "Side of the square input image in pixels, a multiple of the patch size."},
    )
    crop_area: list[float] = field(
        default_factory=lambda: [0.5, 1.0],
        metadata={"help": "Smallest and largest area of a training crop, as a fraction of the image area."},
    )
    quarter_turns: float = field(default=0.0, metadata={"help": "Probability of a rotation by 90, 180 or 270 degrees."})
    photometric: bool = field(
        default=True, metadata={"help": "Whether to jitter brightness, contrast, saturation and hue in training."}
    )

    def __post_init__(self):
        super().__post_init__()
        if len(self.crop_area) != 2 or self.crop_area[0] > self.crop_area[1]:
            raise ValueError(f"Expected `crop_area` to be the smallest and largest area, got {self.crop_area}.")


@dataclass
class ClassificationArguments(SplitArguments):
    """Arguments for the training and evaluation data."""

    dataset_name: str | None = field(
        default=None,
        metadata={"help": "Name of a data set on the Hub, or a folder. Overrides dataset_name in `data`."},
    )
    num_pictures: int = field(default=16, metadata={"help": "Number of samples in the figure of predictions."})

    def __post_init__(self):
        if self.dataset_name is not None:
            self.data = {**(self.data or {}), "dataset_name": self.dataset_name}
        if not self.data and self.data_root is None:
            raise ValueError("Expected a data set. Set `data_root` (a folder of images), `dataset_name` or `data`.")
        super().__post_init__()
