"""Command-line arguments for fine-tuning on image classification."""

from dataclasses import dataclass, field

from ...command.settings import NonNegativeInt, PositiveInt, Probability, Share
from ..arguments import FineTuningSettings, SplitArguments

# Settings that change the scores of a model.
SCORED_WITH = ("image_size", "per_device_eval_batch_size", "bf16", "fp16")


@dataclass
class ClassificationSettings(FineTuningSettings):
    """Settings that [`~modeling_vitp.ViTPClassificationTrainingConfig`] adds to [`~transformers.TrainingArguments`]."""

    image_size: PositiveInt = field(
        default=224,
        metadata={"help": "Side of the square input image in pixels, a multiple of the patch size."},
    )
    crop_area: list[Share] = field(
        default_factory=lambda: [0.5, 1.0],
        metadata={"help": "Smallest and largest area of a training crop, as a fraction of the image area."},
    )
    quarter_turns: Probability = field(
        default=0.0, metadata={"help": "Probability of a rotation by 90, 180 or 270 degrees."}
    )
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
    num_pictures: NonNegativeInt = field(
        default=16, metadata={"help": "Number of samples in the figure of predictions."}
    )

    def __post_init__(self):
        if not self.data and self.data_root is None:
            self.data = {}  # dataset_name may name the data set
        super().__post_init__()
        if self.dataset_name is not None:
            self.data = {**self.data, "dataset_name": self.dataset_name}
        if not self.data:
            raise ValueError("Expected a data set. Set `data_root` (a folder of images), `dataset_name` or `data`.")
