"""Conversion of images of any depth and number of bands to the channels of a model."""

import math
from dataclasses import dataclass, replace

import numpy as np
import torch

from .bands import check_band_names, describe_bands


@dataclass(frozen=True)
class InputSpec:
    """Specification of how an image of any depth and number of bands becomes a model's channels, in [0, 255].

    A model for red, green and blue has three channels. A model for other bands has one channel for each of its
    `band_names`.

    Args:
        bands: indices of the image's bands to use, from 0: one (repeated to three channels) or three, or as many as
            there are `band_names`. Defaults to all bands, in the image's order.
        window: `(low, high)` in the image's own units (digital numbers, Hounsfield units, decibels …), or one such
            pair for each band; low becomes black, high becomes white, and values outside are clipped.
        percentiles: `(low, high)` in [0, 100]: the window is computed from each band's finite values.
        gamma: exponent applied to the windowed value in [0, 1]; below 1 brightens.
        band_names: names of the channels, for a model that takes other bands than red, green and blue, such as
            `["VV", "VH"]`.

    Without `window` and `percentiles`, unsigned integers span the range of their type (0 to 65535 for 16 bits) and
    floats must be in [0, 1].

    Raises:
        ValueError: if a field is invalid, or the fields contradict each other.
    """

    bands: tuple[int, ...] | None = None
    window: tuple | None = None
    percentiles: tuple[float, float] | None = None
    gamma: float = 1.0
    band_names: tuple[str, ...] | None = None

    def __post_init__(self):
        if self.band_names is not None:
            check_band_names(self.band_names)
        if self.bands is not None and not (
            isinstance(self.bands, (list, tuple))
            and len(self.bands) in self._numbers
            and all(isinstance(band, int) and band >= 0 for band in self.bands)
        ):
            number = "one or three" if self.band_names is None else len(self.band_names)
            bands = list(self.bands) if isinstance(self.bands, tuple) else self.bands
            raise ValueError(f"input_spec: expected {number} `bands` (indices from 0), got {bands}.")
        if self.window is not None and self.percentiles is not None:
            raise ValueError("input_spec: set `window` or `percentiles`, not both.")
        if self.window is not None and not (is_pair(self.window) or is_list_of_pairs(self.window)):
            raise ValueError(
                f"input_spec: expected `window` to be (low, high), or one such pair for each band, got {self.window}."
            )
        for low, high in self.windows or []:
            if not (low < high and math.isfinite(low) and math.isfinite(high)):
                raise ValueError(f"input_spec: window ({low}, {high}) is empty: low must be below high, both finite.")
        if self.percentiles is not None and not (
            is_pair(self.percentiles) and 0 <= self.percentiles[0] < self.percentiles[1] <= 100
        ):
            raise ValueError(f"input_spec: expected `percentiles` 0 <= low < high <= 100, got {self.percentiles}.")
        if not (isinstance(self.gamma, (int, float)) and self.gamma > 0):
            raise ValueError(f"input_spec: `gamma` must be positive, got {self.gamma}.")

    @classmethod
    def from_dict(cls, fields: dict | None) -> "InputSpec":
        """Create the spec from the dictionary that is saved with the image processor. Unknown fields raise an error."""
        fields = fields or {}
        unknown = set(fields) - set(cls.__dataclass_fields__)
        if unknown:
            raise ValueError(
                f"input_spec: unknown field(s) {sorted(unknown)}. Expected {sorted(cls.__dataclass_fields__)}."
            )
        return cls(**{name: as_tuples(value) for name, value in fields.items()})

    def with_range_of(self, image: torch.Tensor) -> "InputSpec":
        """Return a spec whose window is the percentiles of an image `(bands, height, width)`, for tiles of it."""
        if self.percentiles is None:
            return self
        self.check_number(image.shape[0])
        low, high = self._range(image if self.bands is None else image[list(self.bands)])
        return self.with_windows(torch.stack([low.flatten(), high.flatten()], dim=1).tolist())

    def with_windows(self, windows: list[list[float]]) -> "InputSpec":
        """Return a spec with a window for each used band in place of percentiles."""
        return replace(self, window=as_tuples(windows), percentiles=None)

    @property
    def windows(self) -> list[tuple[float, float]] | None:
        """Window as a list of pairs: one for all bands, or one for each."""
        if self.window is None:
            return None
        return [tuple(pair) for pair in self.window] if isinstance(self.window[0], (list, tuple)) else [self.window]

    @property
    def num_channels(self) -> int:
        """Number of channels of the converted image."""
        return 3 if self.band_names is None else len(self.band_names)

    @property
    def _numbers(self) -> tuple[int, ...]:
        """Allowed numbers of bands."""
        return (1, 3) if self.band_names is None else (len(self.band_names),)

    @property
    def is_in_units(self) -> bool:
        """`True` if black and white are given in an image's own units."""
        return self.window is not None or self.percentiles is not None

    @property
    def takes_bands(self) -> bool:
        """`True` if the spec selects or names bands, so that no band is interpreted as transparency."""
        return self.bands is not None or self.band_names is not None

    def __call__(self, image: torch.Tensor) -> torch.Tensor:
        """Convert an image to the model's channels.

        Args:
            image: of shape `(bands, height, width)`, any real dtype.

        Returns:
            float32 of shape `(num_channels, height, width)` in [0, 255].

        Raises:
            ValueError: if the image lacks bands of the spec, has no finite value, or needs a window that the spec does
                not have.
        """
        if image.is_complex():
            raise ValueError("Expected an image of real numbers, got complex ones. Pass its magnitude, for example.")
        self.check_number(image.shape[0])
        if self.bands is not None:
            image = image[list(self.bands)]
        low, high = (bound.to(image.device) for bound in self._range(image))
        scaled = ((image.to(torch.float64) - low) / (high - low)).nan_to_num(nan=0.0).clamp(0, 1)
        return (255 * scaled**self.gamma).float().expand(self.num_channels, -1, -1)

    def check_number(self, number: int) -> None:
        """Raise a `ValueError` if an image with `number` bands does not fit the spec."""
        if self.bands is not None:
            if max(self.bands) >= number:
                raise ValueError(
                    f"input_spec asks for bands {list(self.bands)}, counted from 0, but the image has {number} band(s)."
                )
        elif number not in self._numbers:
            if self.band_names is not None:
                raise ValueError(f"the model takes {describe_bands(self.band_names)}, but the image has {number}.")
            raise ValueError(
                f"the image has {number} bands. Name the one or three to use, for example "
                'input_spec={"bands": [3, 2, 1]} (also on the command line). Convert RGBA arrays to PIL images.'
            )

    def _range(self, image: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the black and white points, each of shape `(bands, 1, 1)` or `(1, 1, 1)`."""
        if self.window is not None:
            if len(self.windows) not in (1, image.shape[0]):
                raise ValueError(
                    f"input_spec has {len(self.windows)} windows, but {image.shape[0]} band(s) are used. Set one "
                    "window, or one for each band."
                )
            low, high = torch.tensor(self.windows, dtype=torch.float64).T
        elif self.percentiles is not None:
            points = [band_percentiles(band, self.percentiles) for band in image]
            low, high = torch.tensor(points, dtype=torch.float64).T
            high = torch.where(high > low, high, low + 1)
        elif image.dtype == torch.bool:
            low, high = torch.tensor([0.0]), torch.tensor([1.0])
        elif not image.dtype.is_signed:
            low, high = torch.tensor([0.0]), torch.tensor([float(torch.iinfo(image.dtype).max)])
        elif image.is_floating_point() and image.isfinite().all() and image.min() >= 0 and image.max() <= 1:
            low, high = torch.tensor([0.0]), torch.tensor([1.0])
        else:
            finite = image[image.isfinite()]
            span = f"values in [{finite.min():g}, {finite.max():g}]" if finite.numel() else "no finite value"
            raise ValueError(
                f"The image is {str(image.dtype).removeprefix('torch.')} with {span}, and its black and white "
                "points are not set. Set input_spec={'window': [low, high]} or "
                "input_spec={'percentiles': [2, 98]}."
            )
        return low.double().view(-1, 1, 1), high.double().view(-1, 1, 1)


def as_tuples(value):
    return tuple(map(as_tuples, value)) if isinstance(value, (list, tuple)) else value


def is_pair(value) -> bool:
    return isinstance(value, (list, tuple)) and len(value) == 2 and all(isinstance(v, (int, float)) for v in value)


def is_list_of_pairs(value) -> bool:
    return isinstance(value, (list, tuple)) and len(value) > 0 and all(is_pair(v) for v in value)


def band_percentiles(band: torch.Tensor, percentiles: tuple[float, float]) -> list[float]:
    """Return interpolated percentiles of the finite values (`torch.quantile` is limited to 16 million elements)."""
    band = band.cpu()
    values = band.numpy() if band.dtype != torch.bfloat16 else band.float().numpy()
    finite = np.isfinite(values)
    if not finite.any():
        raise ValueError(
            "A band of the image has no finite value, so it has no percentiles. Set a `window`, or other `bands`."
        )
    values = values if finite.all() else values[finite]
    values = values.astype(np.float32) if values.dtype in (np.float16, np.bool_) else values
    return np.percentile(values, percentiles).tolist()


__all__ = ["InputSpec"]
