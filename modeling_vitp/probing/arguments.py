"""Arguments of the probes on the command line."""

from dataclasses import dataclass, field
from typing import Annotated, Literal

from ..command.paths import Shard, read_section
from ..command.settings import (
    Interval,
    JsonText,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Settings,
    Share,
)

POOLINGS = ("mean", "cls", "cls_mean")
# Options of images of `dataset_name`, and the setting of `data` in their place.
SETTINGS = {
    "input_spec": "input_spec",
    "test_share": "splits",
    "dataset_config": "dataset_config",
    "columns": "columns",
}


@dataclass
class ProbeArguments(Settings):
    """Arguments of `probe`."""

    backbones: list[str] = field(
        default_factory=list,
        metadata={
            "help": "Folders or Hub ids (also ID@REVISION) of exported backbones, of other models of AutoModel, or of "
            "vision-language models, whose ViT is taken."
        },
    )
    random_control: bool = field(
        default=False, metadata={"help": "Whether to also probe each backbone with random weights."}
    )
    pixel_control: bool = field(
        default=False,
        metadata={"help": "Whether to also probe the pixels of each backbone's patches, for classes their means."},
    )
    depths: PositiveInt = field(
        default=1,
        metadata={
            "help": "For masks and boxes: number of evenly spaced depths whose tokens are probed; 1 is the output only."
        },
    )
    dataset_name: str | None = field(
        default=None,
        metadata={"help": "Hub id of images with one class each, or folder with images at SPLIT/CLASS/NAME."},
    )
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of the data set."})
    columns: dict | JsonText | None = field(
        default=None,
        metadata={
            "help": 'Names of the columns of `dataset_name` as JSON, such as \'{"image": "photo", "label": "kind"}\'. '
            "By default, common names."
        },
    )
    test_share: Annotated[float, Interval("(0, 1)")] | None = field(
        default=None,
        metadata={
            "help": "Share of each class that is held out of the training split of `dataset_name` and used instead of "
            "test_split."
        },
    )
    input_spec: dict | str | None = field(
        default=None,
        metadata={"help": "Input spec, for all backbones, of images of `dataset_name` that are not 8-bit RGB."},
    )
    data: dict | str | None = field(
        default=None,
        metadata={
            "help": "Images with masks or boxes, instead of `dataset_name`: a mapping as in fine-tuning, or a "
            "fine-tuning configuration file."
        },
    )
    task: str | None = field(
        default=None,
        metadata={
            "help": "Task whose labels are in `data`: 'segmentation', 'detection', 'classification', or a task of "
            "plugins. Default: segmentation, with a box format in `data` detection, with `dataset_name` "
            "classification."
        },
    )
    data_root: str | None = field(
        default=None,
        metadata={
            "help": "Folder of the data; overrides data.root. Without splits in `data`, they are inferred from it."
        },
    )
    plugins: list[str] = field(
        default_factory=list,
        metadata={"help": "Python files that register layouts of labeled images, see docs/extending.md."},
    )
    train_split: str = field(default="train", metadata={"help": "Training split of the probes."})
    test_split: str = field(default="test", metadata={"help": "Test split of the probes."})
    shots: list[PositiveInt] = field(
        default_factory=list, metadata={"help": "Numbers of training images per class, one probe for each."}
    )
    shares: list[Share] = field(
        default_factory=list,
        metadata={"help": "Shares of the training images, one probe for each. Default: 1 if shots is not set."},
    )
    seeds: list[int] = field(
        default_factory=lambda: [0, 1, 2], metadata={"help": "Seeds of the draws of training images."}
    )
    intervals: bool = field(
        default=False,
        metadata={
            "help": "Whether to print differences to the first backbone with their intervals, and to write the main "
            "score of each resample of the test images."
        },
    )
    pooling: Literal[POOLINGS] = field(
        default="mean", metadata={"help": f"For classes: feature of an image, one of {', '.join(POOLINGS)}."}
    )
    image_size: PositiveInt | None = field(
        default=None,
        metadata={"help": "Side in pixels of the square that images are resized to. Default: as the image processor."},
    )
    num_neighbours: PositiveInt = field(
        default=20, metadata={"help": "Number of neighbors of the nearest-neighbor probe."}
    )
    temperature: PositiveFloat = field(
        default=0.07, metadata={"help": "Temperature of the votes of the nearest-neighbor probe."}
    )
    l2: NonNegativeFloat = field(
        default=1e-2, metadata={"help": "Weight decay of the linear probe, on standardized features."}
    )
    output_dir: str = field(default="outputs/probe", metadata={"help": "Folder for metrics.json and features."})
    shard: str | None = field(
        default=None,
        metadata={
            "help": "I/N: extract the features of part I of N of the images only. A later call without it uses them."
        },
    )
    batch_size: PositiveInt = field(default=32, metadata={"help": "Number of images per batch of a backbone."})
    num_workers: NonNegativeInt = field(
        default=0, metadata={"help": "Number of processes that read images. 0: the main process."}
    )
    dtype: Literal["float32", "bfloat16", "float16"] = field(
        default="float32", metadata={"help": "Dtype of the backbones: float32, bfloat16 or float16."}
    )
    device: str | None = field(
        default=None, metadata={"help": "Device of the backbones. Default: the accelerator if available."}
    )

    def __post_init__(self):
        super().__post_init__()
        if self.shard is not None:
            Shard.parse(self.shard)
        for name in ("data", "input_spec"):
            setting = getattr(self, name)
            if isinstance(setting, str):
                setattr(self, name, read_section(setting, name))
        if not self.backbones:
            raise ValueError("Set `backbones` to the backbones to probe.")
        if self.data_root is not None and self.dataset_name is None:
            self.data = {**(self.data or {}), "root": self.data_root}
        if (self.dataset_name is None) == (self.data is None):
            raise ValueError(
                "Set either `dataset_name` (images with one class each), or `data` or `data_root` (masks or boxes)."
            )
        if self.data is not None:
            self._check_settings_of_data()
        for name in ("task", "data_root"):
            if self.data is None and getattr(self, name) is not None:
                raise ValueError(f"{name} needs `data`. Remove it.")
        if self.task is None:
            self.task = self._default_task()

    def _default_task(self) -> str:
        """Return the task of the data that are given."""
        if self.data is None:
            return "classification"
        has_box_format = not self.data.keys().isdisjoint(("format", "box_format"))
        return "detection" if has_box_format else "segmentation"

    def _check_settings_of_data(self) -> None:
        """Raise a `ValueError` if an option is set that only images of `dataset_name` have."""
        for name, setting in SETTINGS.items():
            default = getattr(type(self), name)
            if getattr(self, name) != default:
                raise ValueError(f"{name} is for `dataset_name`. Set `{setting}` in `data` instead.")
