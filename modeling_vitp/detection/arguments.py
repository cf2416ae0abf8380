"""Arguments of fine-tuning for detection on the command line."""

from dataclasses import dataclass, field

from ..command.paths import find_data
from ..metrics.report import metric_path
from ..training.arguments import FineTuningSettings, SplitArguments

TASKS = ("horizontal", "oriented", "instances")
VITP = "vitp"
DETECTORS = (VITP, "rt_detr_v2", "d_fine", "deformable_detr")


@dataclass
class DetectionSettings(FineTuningSettings):
    """What [`~modeling_vitp.detection.trainer.ViTPDetectionTrainingConfig`] adds to transformers' settings."""

    limits = {
        "image_size": "[32, inf)",
        "diagonal_flip": "[0, 1]",
        "rotation": "[0, 1]",
        "lr_milestones": "(0, inf)",
        "lr_gamma": "(0, 1]",
        "warmup_start": "[0, 1]",
    }

    image_size: int = field(
        default=800, metadata={"help": "Side of the square that images are brought into, in pixels; a multiple of 16."}
    )
    keep_ratio: bool = field(
        default=True, metadata={"help": "Whether images keep their shape in it, or are stretched to fill it."}
    )
    diagonal_flip: float = field(
        default=0.0, metadata={"help": "Probability of both flips. At most one of the three flips happens."}
    )
    rotation: float = field(default=0.0, metadata={"help": "Chance of a rotation, by any angle, in the square."})
    right_angle_classes: list[str] = field(
        default_factory=list,
        metadata={"help": "Classes with which an image is turned by a multiple of 90 degrees only."},
    )
    lr_milestones: list[float] | None = field(
        default=None,
        metadata={"help": "Epochs after which the learning rate falls by lr_gamma, in place of lr_scheduler_type."},
    )
    lr_gamma: float = field(default=0.1, metadata={"help": "What the learning rate is multiplied by at a milestone."})
    warmup_start: float = field(
        default=0.0, metadata={"help": "With lr_milestones: share of the learning rate that the warm-up starts from."}
    )

    def __post_init__(self):
        super().__post_init__()
        if self.image_size % 16:
            raise ValueError(f"image_size={self.image_size} is no multiple of 16, the side of a patch.")
        if self.horizontal_flip + self.vertical_flip + self.diagonal_flip > 1 + 1e-9:
            raise ValueError(
                "horizontal_flip, vertical_flip and diagonal_flip are chances of which one happens: at most 1."
            )
        if self.lr_milestones is not None and self.lr_milestones != sorted(self.lr_milestones):
            raise ValueError(f"lr_milestones={self.lr_milestones} do not rise.")


@dataclass
class DetectionArguments(SplitArguments):
    """What is trained on, and what is scored."""

    limits = {"empty_share": "[0, 1]"}
    choices = {"task": TASKS, "detector": DETECTORS}

    task: str = field(
        default="horizontal", metadata={"help": "'horizontal' or 'oriented' boxes, or 'instances': boxes with masks."}
    )
    detector: str = field(
        default=VITP,
        metadata={
            "help": "'vitp', this project's for the task, or one of transformers' own with one stage on the same "
            "backbone, for horizontal boxes: 'rt_detr_v2', 'd_fine' or 'deformable_detr'."
        },
    )
    empty_share: float = field(
        default=0.0,
        metadata={"help": "Images without objects are at most this share of what is trained on; 1 for all."},
    )
    blind_controls: bool = field(
        default=False,
        metadata={
            "help": "Whether to score the test split without its images too: detections exchanged between images, and "
            "the best objects that are the same for all."
        },
    )
    metric: str | None = field(
        default=None,
        metadata={
            "help": "average_precision (Pascal VOC's and DOTA's, by default for oriented boxes), "
            "coco_average_precision (by default for the others), or the path of a Python file with a metric."
        },
    )
    metric_options: dict | str | None = field(
        default=None, metadata={"help": 'Its settings, such as \'{"interpolation": "area"}\'.'}
    )
    submission: dict | str | None = field(
        default=None,
        metadata={"help": "`split` of which DOTA's server takes the detections, and `nms` of its windows."},
    )

    def __post_init__(self):
        super().__post_init__()
        if self.metric is not None:
            metric_path(self.metric)
        if self.detector != VITP and self.task != "horizontal":
            raise ValueError(f"detector={self.detector!r} is for task: horizontal; task: {self.task} needs {VITP!r}.")
        if isinstance(self.data.get("dataset_name"), str):
            self.data["dataset_name"] = find_data(self.data["dataset_name"])
        if self.blind_controls and self.test_split is None:
            raise ValueError("blind_controls: they are scores on the test split; give a test_split.")
        if self.metric == "coco_average_precision" and self.task == "oriented":
            raise ValueError("metric: coco_average_precision scores upright boxes and masks, not oriented boxes.")
        if self.submission is not None and self.task != "oriented":
            raise ValueError("submission: DOTA's server takes oriented boxes.")
