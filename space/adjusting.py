"""Reading an image as the controls of the page say: bands, black and white levels, slice of a volume."""

import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from reading import Reading, UnreadableImage
from torch.nn import functional as F

from modeling_vitp.images.volumes import NIFTI, open_volume

AS_STATED = "as the file says"
PRESETS = {  # Hounsfield units that become black and white, by the usual centers and widths
    "lung": (-1350.0, 150.0),
    "bone": (-500.0, 1300.0),
    "soft tissue": (-160.0, 240.0),
    "brain": (0.0, 80.0),
}
PERCENTILES = (2.0, 98.0)


@dataclass(frozen=True)
class Adjustment:
    """Settings of a visitor for reading an image.

    Args:
        position: position in a volume (from the feet up) or in the frames of a DICOM file, in percent.
        preset: `AS_STATED` or a key of `PRESETS`.
        bands: numbers, from 1, of the bands for red, green and blue, or of one band for gray. If empty, the bands are
            found by their names.
        percentiles: percentiles of each band that become black and white. If they equal `PERCENTILES`, the levels in
            the file take precedence.
        part: size of the visible window, in percent of each side of the image.
        center: center of the visible window, in percent from the left and from the top.
    """

    position: float = 50.0
    preset: str = AS_STATED
    bands: tuple[int, ...] = ()
    percentiles: tuple[float, float] = PERCENTILES
    part: float = 100.0
    center: tuple[float, float] = (50.0, 50.0)

    @property
    def window(self) -> tuple[float, float, float, float] | None:
        """Left, top, right and bottom of the visible window, as fractions; `None` for the whole image."""
        if self.part >= 100:
            return None
        half = self.part / 200
        x, y = (min(max(at / 100, half), 1 - half) for at in self.center)
        return x - half, y - half, x + half, y + half

    @property
    def changes_values(self) -> bool:
        return self.preset != AS_STATED or self.percentiles != PERCENTILES or bool(self.bands)

    def spec(self, stated: dict | None) -> dict | None:
        """Return the fields of the input spec to read an image with, based on those of a model or a file."""
        spec = dict(stated or {})
        if self.preset != AS_STATED or self.percentiles != PERCENTILES:
            spec = {key: value for key, value in spec.items() if key not in ("window", "percentiles")}
            spec |= {"percentiles": self.percentiles} if self.preset == AS_STATED else {"window": PRESETS[self.preset]}
        if self.bands and "band_names" not in spec:  # A model with named bands takes all of them.
            spec["bands"] = [band - 1 for band in self.bands]
        return spec or None


def adjustment_of(
    position: float,
    preset: str,
    bands: str,
    low: float,
    high: float,
    part: float = 100.0,
    center_x: float = 50.0,
    center_y: float = 50.0,
) -> Adjustment:
    """Build the adjustment from the values of the controls.

    Raises:
        ValueError: if the bands are not one or three numbers, or the percentiles are not ascending.
    """
    numbers = tuple(int(number) for number in re.findall(r"\d+", (bands or "")[:50]))
    if len(numbers) not in (0, 1, 3) or 0 in numbers or re.search(r"[^\d\s,;/-]", bands or ""):
        raise ValueError(f"Expected one or three band numbers from 1, such as 4, 3, 2, got {bands[:50]!r}.")
    if not low < high:
        raise ValueError(f"The percentile of black must be below that of white, got {low:g} and {high:g}.")
    return Adjustment(position, preset, numbers, (float(low), float(high)), part, (center_x, center_y))


def is_volume(path: str | Path) -> bool:
    return str(path).lower().endswith(NIFTI)


def read_slice(path: Path, max_side: int, adjustment: Adjustment, input_spec: dict | None) -> Reading:
    """Read an axial slice of a NIfTI volume, in radiological orientation (seen from the feet).

    Raises:
        UnreadableImage: if the volume cannot be opened.
    """
    try:
        volume = open_volume(path)
    except ValueError as error:
        raise UnreadableImage(str(error).replace(str(path), path.name)) from error
    count = volume.number("axial")
    index = min(int(adjustment.position / 100 * count), count - 1)
    values = volume.cut("axial", index)
    height, width = values.shape
    scale = min(1.0, max_side / max(height, width))
    if scale < 1:
        size = max(1, round(scale * height)), max(1, round(scale * width))
        values = F.adaptive_avg_pool2d(torch.from_numpy(values)[None].double(), size)[0].float().numpy()
    spec = adjustment.spec({key: value for key, value in (input_spec or {}).items() if key != "bands"})
    spec = spec if spec and {"window", "percentiles"} & set(spec) else {**(spec or {}), "percentiles": PERCENTILES}
    spec.pop("bands", None)
    black, white = spec.get("window") or spec["percentiles"]
    how = f"{'window' if 'window' in spec else 'percentiles'} {black:g} to {white:g}"
    note = f"NIfTI, slice {index + 1} of {count}, {width} × {height} pixels, {how}"
    return Reading(np.ascontiguousarray(values)[None], spec, note)
