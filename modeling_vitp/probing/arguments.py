"""Arguments of the probes on the command line."""

from dataclasses import dataclass, field

from ..command.paths import Shard, find_config, read_yaml
from ..training.arguments import Arguments

POOLINGS = ("mean", "cls", "cls_mean")


@dataclass
class ProbeArguments(Arguments):
    """What is probed, and on what."""

    file_fields = ("data", "input_spec")
    limits = {
        "test_share": "(0, 1)",
        "shots": "[1, inf)",
        "shares": "(0, 1]",
        "image_size": "[1, inf)",
        "depths": "[1, inf)",
        "num_neighbours": "[1, inf)",
        "temperature": "(0, inf)",
        "l2": "[0, inf)",
        "batch_size": "[1, inf)",
        "num_workers": "[0, inf)",
    }
    choices = {"annotations": ("masks", "boxes"), "pooling": POOLINGS, "dtype": ("float32", "bfloat16", "float16")}

    backbones: list[str] = field(
        default_factory=list,
        metadata={"help": "Folders or Hub ids: exported backbones, or others that AutoModel opens; ID@REVISION too."},
    )
    random_control: bool = field(
        default=False, metadata={"help": "Probe each backbone with random weights too, to compare with."}
    )
    pixel_control: bool = field(
        default=False, metadata={"help": "With `data`: probe the bare pixels of each backbone's patches too."}
    )
    depths: int = field(
        default=1,
        metadata={"help": "With `data`: tokens of how many depths are read, at equal distances; 1 is the output."},
    )
    dataset_name: str | None = field(
        default=None, metadata={"help": "Images with a class each: Hub id, or folder with images as split/class/file."}
    )
    dataset_config: str | None = field(default=None, metadata={"help": "Its configuration, if it has several."})
    image_column: str = field(default="image", metadata={"help": "Its column of images."})
    label_column: str = field(default="label", metadata={"help": "Its column of classes."})
    test_share: float | None = field(
        default=None, metadata={"help": "If it has no test split: share of each class that is held out of training."}
    )
    input_spec: dict | str | None = field(
        default=None, metadata={"help": "How its images that are not 8-bit RGB are read, for all backbones."}
    )
    data: dict | str | None = field(
        default=None,
        metadata={"help": "Instead, masks or boxes: as in fine-tuning, or the file of such a configuration."},
    )
    annotations: str = field(
        default="masks",
        metadata={"help": "What `data` describes: 'masks', or 'boxes' as fine-tuning for detection takes them."},
    )
    data_root: str | None = field(default=None, metadata={"help": "Where they are, instead of data.root."})
    train_split: str = field(default="train", metadata={"help": "What the probes learn from."})
    test_split: str = field(default="test", metadata={"help": "What they are scored on."})
    shots: list[int] = field(default_factory=list, metadata={"help": "Few labels: training images of each class."})
    shares: list[float] = field(
        default_factory=list, metadata={"help": "Few labels: shares of the training images. 1 without these two."}
    )
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2], metadata={"help": "Of the draws of few labels."})
    pooling: str = field(default="mean", metadata={"help": f"Feature of an image: one of {', '.join(POOLINGS)}."})
    image_size: int | None = field(
        default=None, metadata={"help": "Side of the square that images become; else as the image processor says."}
    )
    num_neighbours: int = field(default=20, metadata={"help": "Of the nearest-neighbour probe."})
    temperature: float = field(default=0.07, metadata={"help": "Of its votes."})
    l2: float = field(default=1e-2, metadata={"help": "Weight decay of the linear probe, on standardised features."})
    output_dir: str = field(default="outputs/probe", metadata={"help": "For metrics.json and the features."})
    shard: str | None = field(
        default=None,
        metadata={"help": "I/N: extract the features of the I-th of N parts of the images, for a probe without this."},
    )
    batch_size: int = field(default=32, metadata={"help": "Images that a backbone sees at once."})
    num_workers: int = field(default=0, metadata={"help": "Processes that read images."})
    dtype: str = field(default="float32", metadata={"help": "Of the backbones: float32, bfloat16 or float16."})
    device: str | None = field(default=None, metadata={"help": "The accelerator if there is one, and if not given."})

    def __post_init__(self):
        super().__post_init__()
        if self.shard is not None:
            Shard.parse(self.shard)
        for name in self.file_fields:
            if isinstance(getattr(self, name), str):
                setattr(self, name, read_yaml(find_config(getattr(self, name)))[name])
        if not self.backbones:
            raise ValueError("Give `backbones`: what is probed.")
        if (self.dataset_name is None) == (self.data is None):
            raise ValueError("Give either `dataset_name`, images with a class each, or `data`, masks or boxes.")
        if self.dataset_name is not None and (self.pixel_control or self.depths > 1):
            raise ValueError("pixel_control and depths are about patches: they need `data`, masks or boxes.")
        if self.data is None and self.annotations == "boxes":
            raise ValueError("annotations: boxes are described by `data`.")
        if self.annotations == "masks" and self.data is not None and {"format", "box_format"} & self.data.keys():
            raise ValueError("data: these are boxes, by their format; give --annotations boxes.")
        if self.data is not None and self.data_root is not None:
            self.data["root"] = self.data_root
