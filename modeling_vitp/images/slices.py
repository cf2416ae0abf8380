"""Slices of volumes as 8-bit images, with those of their masks."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import PIL.Image

from .volumes import PLANES, check_same_place, open_volume, to_grey


def check_cut(plane: str, window: Sequence[float] | None, percentiles: Sequence[float] | None) -> None:
    """Raises a `ValueError` if it is not told how volumes become images."""
    if plane not in PLANES:
        raise ValueError(f"plane={plane!r} is none of {sorted(PLANES)}.")
    if (window is None) == (percentiles is None):
        raise ValueError("Volumes need either `window` or `percentiles`: which values become black and white.")
    name, pair = ("percentiles", percentiles) if window is None else ("window", window)
    are_numbers = all(isinstance(value, (int, float)) and not isinstance(value, bool) for value in pair)
    if len(pair) != 2 or not are_numbers or not pair[0] < pair[1]:
        raise ValueError(f"{name}={list(pair)}: volumes need two numbers, black first.")


class VolumeSlices:
    """The slices of a volume, or of several that are the channels of one, as 8-bit images, and of its mask.

    Args:
        paths: of one volume, or of three.
        plane: `"axial"`, `"coronal"` or `"sagittal"`.
        window: low and high value of the volumes' own units, which become black and white.
        percentiles: instead, low and high in [0, 100] of each volume's values that are not 0.
        mask: of the mask, if there is one.

    Raises:
        ValueError: names the volume that cannot be read (see [`~modeling_vitp.images.volumes.open_volume`]), or is of
            another shape or place than the first.
    """

    def __init__(
        self,
        paths: Sequence[Path],
        plane: str,
        window: Sequence[float] | None,
        percentiles: Sequence[float] | None,
        mask: Path | None = None,
    ):
        if len(paths) not in (1, 3):
            raise ValueError(f"{len(paths)} volumes cannot be the channels of an image: give one, or three.")
        self.plane = plane
        self.volumes = [open_volume(path) for path in paths]
        self.labels = None if mask is None else open_volume(mask)
        check_same_place(self.volumes if mask is None else [*self.volumes, self.labels])
        self.windows = [tuple(window) if window else volume.window(percentiles) for volume in self.volumes]

    def __len__(self) -> int:
        return self.volumes[0].number(self.plane)

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of a slice."""
        return self.volumes[0].size(self.plane)

    def image(self, index: int) -> PIL.Image.Image:
        channels = [
            to_grey(volume.cut(self.plane, index), window, volume.path)
            for volume, window in zip(self.volumes, self.windows)
        ]
        return PIL.Image.fromarray(channels[0] if len(channels) == 1 else np.stack(channels, -1))

    def mask(self, index: int) -> np.ndarray:
        """Uint8 of shape `(height, width)`."""
        values = self.labels.cut(self.plane, index)
        labels = values.astype(np.uint8)
        if (labels != values).any():
            raise ValueError(f"The mask {self.labels.path} has values that are no whole numbers from 0 to 255.")
        return labels
