"""Images with objects: whole files, windows of large ones, or rows of a `datasets` data set."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import datasets
import numpy as np
import torch

from ..images.pixels import to_pixels
from ..images.ranges import ranged
from ..images.reading import Picture, cut, read_image, read_picture
from ..images.windows import Window
from ..input_spec import InputSpec
from ..instructions.rows import content_of
from .objects import ImageObjects


@dataclass(frozen=True)
class Place:
    """Where a sample comes from: a file or a row, or a window of it; and what is in it, `None` if that is not known."""

    id: str
    whole: str  # the id of the image that it is a window of, or its own
    image: Path | int
    size: tuple[int, int]  # of the whole image
    window: Window | None
    objects: ImageObjects | None

    @property
    def start(self) -> tuple[int, int]:
        """x and y of the sample's top left corner in the image."""
        return self.window[:2] if self.window else (0, 0)


class ObjectImages(torch.utils.data.Dataset):
    """Samples of one image with its objects.

    An item is a dictionary: `id`; `image`, see [`~modeling_vitp.images.pixels.to_pixels`]; and, unless it is not known
    what is in the image, `labels`, int64 `(n,)`, `corners`, float32 `(n, 4, 2)` in pixels, `difficult` and `crowd`,
    bool `(n,)`, `area` as annotated, float64 `(n,)` with NaN where it is not, and `masks`, uint8 `(n, height, width)`,
    if there are any.

    Args:
        places: the samples.
        input_spec: how images that are not 8-bit RGB become so, see [`~modeling_vitp.InputSpec`].
        with_masks: whether there are outlines.
        rows: what the numbers of rows in `places` are of, and
        column: which of its columns has the images.
    """

    def __init__(
        self,
        places: Sequence[Place],
        input_spec: dict | None = None,
        with_masks: bool = False,
        rows: datasets.Dataset | None = None,
        column: str = "image",
    ):
        self.places, self.with_masks = list(places), with_masks
        self.spec = None if input_spec is None else InputSpec.from_dict(input_spec)
        self.rows = None if rows is None else rows.select_columns([column])
        self.column = column

    def __len__(self) -> int:
        return len(self.places)

    def subset(self, chosen: Sequence[int]) -> "ObjectImages":
        """Some of the samples, by their places."""
        subset = ObjectImages([self.places[index] for index in chosen], None, self.with_masks, self.rows, self.column)
        subset.spec = self.spec
        return subset

    def count(self, names: Sequence[str]) -> dict[str, int]:
        """Objects of each class, by name, without crowds."""
        labels = [place.objects.labels[~place.objects.crowd] for place in self.places if place.objects is not None]
        return dict(zip(names, np.bincount(np.concatenate(labels), minlength=len(names)).tolist()))

    def hash_of_objects(self) -> str:
        """The SHA-256 of what is annotated in the samples."""
        seen = hashlib.sha256()
        for place in self.places:
            objects = place.objects
            seen.update(f"{place.id}\0{place.window}\0{None if objects is None else objects.segmentations}\0".encode())
            for array in () if objects is None else (objects.labels, objects.corners, objects.difficult, objects.crowd):
                seen.update(array.tobytes())
        return seen.hexdigest()

    def image(self, index: int) -> torch.Tensor:
        """The image of a sample alone."""
        place = self.places[index]
        if isinstance(place.image, Path):
            name, picture = str(place.image), read_image(place.image, place.window, self.spec)
            spec = ranged(self.spec, place.image, place.window is not None)
        else:
            name, picture, spec = self._row(place)
        try:
            return to_pixels(picture, spec)
        except (OSError, ValueError) as error:
            raise ValueError(f"{name}: {error}") from error

    def _row(self, place: Place) -> tuple[str, Picture, InputSpec | None]:
        stored, name = self.rows[place.image][self.column], f"Row {place.id}"
        picture, spec = stored, self.spec
        try:
            if isinstance(stored, dict):
                content = content_of(stored)
                picture = read_picture(content, self.spec)
                spec = ranged(self.spec, content, place.window is not None)
        except Exception as error:  # Pillow raises many kinds for a broken file
            raise ValueError(f"{name}: the image cannot be read: {error}") from error
        if place.window is None:
            return name, picture, spec
        return name, cut(picture, place.window) if isinstance(picture, np.ndarray) else picture.crop(place.window), spec

    def __getitem__(self, index: int) -> dict:
        place, image = self.places[index], self.image(index)
        item = {"id": place.id, "image": image}
        if place.objects is None:
            return item
        objects = place.objects
        item |= {
            "labels": torch.from_numpy(objects.labels),
            "corners": torch.from_numpy(objects.moved_to(*place.start).corners).float(),
            "difficult": torch.from_numpy(objects.difficult),
            "crowd": torch.from_numpy(objects.crowd),
            "area": torch.from_numpy(objects.areas),
        }
        if self.with_masks:
            item["masks"] = torch.from_numpy(objects.masks(place.size, place.window))
        return item
