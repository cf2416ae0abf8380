"""Options of instructions about labeled images. Importing them loads no heavy library."""

from dataclasses import dataclass, field
from typing import Annotated, Literal

from ..command.settings import (
    Interval,
    NonNegativeFloat,
    NonNegativeInt,
    Percentile,
    PositiveFloat,
    PositiveInt,
    Probability,
    Settings,
)


@dataclass
class AnnotationOptions(Settings):
    """Options of instructions that are drawn from labeled images, see [`DrawnInstructions`].

    Those that `vitp make_instructions` has too mean the same.
    """

    layout: str | None = field(default=None, metadata={"help": "Layout of the folder. By default it is recognized."})
    split: str = field(default="train", metadata={"help": "Split to train on."})
    split_list: str | None = field(
        default=None, metadata={"help": "File with the names of the images to train on, one per line."}
    )
    files: str | None = field(
        default=None, metadata={"help": "File or folder of the labels, if the folder has several of them."}
    )
    names: dict | None = field(
        default=None,
        metadata={
            "help": "Phrase of each class, or of each value of masks; null leaves a class out. By default the name of "
            "the class, and for masks `class 1` …, where 0 or black is the background."
        },
    )
    kinds: list[str] | None = field(
        default=None,
        metadata={"help": "Kinds of questions, of which those that the labels answer are asked. By default all."},
    )
    turns: PositiveInt = field(default=5, metadata={"help": "Maximum number of questions about a view."})
    wordings: PositiveInt | None = field(
        default=None, metadata={"help": "Number of wordings of each kind of question. By default all."}
    )
    max_boxes: PositiveInt = field(default=20, metadata={"help": "Maximum number of boxes per answer."})
    map_side: PositiveInt = field(default=7, metadata={"help": "Number of cells per side of a map."})
    window: PositiveInt | None = field(
        default=None,
        metadata={"help": "Side of the views in pixels. By default the shorter side of each image."},
    )
    overlap: NonNegativeInt = field(default=0, metadata={"help": "Overlap in pixels of the windows that are scored."})
    scale: tuple[PositiveFloat, PositiveFloat] = field(
        default=(0.8, 1.2), metadata={"help": "Lowest and highest random factor of the side of a view."}
    )
    turn: bool = field(default=True, metadata={"help": "Whether views are turned and mirrored."})
    mosaics: Probability = field(
        default=0.0, metadata={"help": "Share of mosaics of four crops among the views of one image."}
    )
    collages: NonNegativeFloat = field(default=0.0, metadata={"help": "Number of collages for each view of one image."})
    collage_grid: list[Annotated[int, Interval("[2, 16]")]] = field(
        default_factory=lambda: [7], metadata={"help": "Numbers of crops per side of a collage, drawn for each."}
    )
    collage_size: PositiveInt = field(default=448, metadata={"help": "Side of a collage in pixels."})
    on_error: Literal["raise", "skip"] = field(
        default="raise", metadata={"help": "Behavior on invalid labels: raise or skip."}
    )
    plane: Literal["axial", "coronal", "sagittal"] | None = field(
        default=None, metadata={"help": "Plane of the slices of volumes."}
    )
    intensities: tuple[float, float] | None = field(
        default=None, metadata={"help": "Intensities of volumes that are shown as black and white."}
    )
    percentiles: tuple[Percentile, Percentile] | None = field(
        default=None,
        metadata={
            "help": "Percentiles of each volume that are shown as black and white. By default 1 and 99, unless "
            "intensities are set."
        },
    )
    class_property: str | None = field(
        default=None, metadata={"help": "Property of GeoJSON or GeoPackage with the class."}
    )

    def __post_init__(self):
        super().__post_init__()
        if self.scale[0] > self.scale[1]:
            raise ValueError(f"Expected scale to be a low and a high factor, got {self.scale}.")
        if self.window is not None and self.overlap >= self.window:
            raise ValueError(f"Expected overlap below window={self.window}, got {self.overlap}.")
