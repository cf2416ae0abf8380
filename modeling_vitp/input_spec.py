"""Conversion of images of any depth and number of bands to the channels of a model."""

import math
from dataclasses import dataclass, replace
from typing import Any

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
        problem = self._problem()
        if problem is not None:
            raise ValueError(f"input_spec: {problem}.")

    def _problem(self) -> str | None:
        """Return what is wrong with a field, or `None` if all are valid."""
        if self.bands is not None:
            are_bands = is_list_of_indices(self.bands) and self._takes(len(self.bands))
            if not are_bands:
                number = "one or three" if self.band_names is None else len(self.band_names)
                return f"expected {number} `bands` (indices from 0), got {self.bands}"
        if self.window is not None and self.percentiles is not None:
            return "set `window` or `percentiles`, not both"
        if self.window is not None and not (is_window(self.window) or is_list_of_windows(self.window)):
            return (
                "expected `window` to be (low, high) with low < high, both finite, or one such pair for each band, "
                f"got {self.window}"
            )
        if self.percentiles is not None and not are_percentiles(self.percentiles):
            return f"expected `percentiles` 0 <= low < high <= 100, got {self.percentiles}"
        if not isinstance(self.gamma, (int, float)) or not self.gamma > 0:  # NaN is not positive.
            return f"`gamma` must be positive, got {self.gamma}"
        return None

    @classmethod
    def from_dict(cls, fields: dict | None) -> "InputSpec":
        """Create the spec from the dictionary that is saved with the image processor. Unknown fields raise an error."""
        if not fields:
            return cls()
        known_fields = set(cls.__dataclass_fields__)
        unknown_fields = set(fields) - known_fields
        if unknown_fields:
            raise ValueError(f"input_spec: unknown field(s) {sorted(unknown_fields)}. Expected {sorted(known_fields)}.")
        hashable_fields = {name: as_tuples(value) for name, value in fields.items()}
        return cls(**hashable_fields)

    def with_range_of(self, image: torch.Tensor) -> "InputSpec":
        """Return a spec whose window is the percentiles of an image `(bands, height, width)`, for tiles of it."""
        if self.percentiles is None:
            return self
        self.check_number(image.shape[0])
        used_bands = self._used_bands(image)
        low, high = self._range(used_bands)
        windows = torch.stack([low.flatten(), high.flatten()], dim=1)
        return self.with_windows(windows.tolist())

    def with_windows(self, windows: list[list[float]]) -> "InputSpec":
        """Return a spec with a window for each used band in place of percentiles."""
        return replace(
            self,
            window=as_tuples(windows),
            percentiles=None,
        )

    @property
    def windows(self) -> list[tuple[float, float]] | None:
        """Window as a list of pairs: one for all bands, or one for each."""
        if self.window is None:
            return None
        if isinstance(self.window[0], (list, tuple)):
            return [tuple(pair) for pair in self.window]
        return [self.window]

    @property
    def num_channels(self) -> int:
        """Number of channels of the converted image."""
        if self.band_names is None:
            return 3
        return len(self.band_names)

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
        image = self._used_bands(image)
        low, high = self._range(image)
        low = low.to(image.device)
        high = high.to(image.device)
        image = image.to(torch.float64)
        scaled = (image - low) / (high - low)
        scaled = scaled.nan_to_num(nan=0.0)
        scaled = scaled.clamp(0, 1)
        brightened = scaled**self.gamma
        channels = (255 * brightened).float()
        return channels.expand(self.num_channels, -1, -1)

    def check_number(self, number: int) -> None:
        """Raise a `ValueError` if an image with `number` bands does not fit the spec."""
        if self.bands is not None:
            fits = max(self.bands) < number
            bands = list(self.bands)
            problem = f"input_spec asks for bands {bands}, counted from 0, but the image has {number} band(s)."
        elif self.band_names is not None:
            fits = self._takes(number)
            problem = f"the model takes {describe_bands(self.band_names)}, but the image has {number}."
        else:
            fits = self._takes(number)
            problem = (
                f"the image has {number} bands. Name the one or three to use, for example "
                'input_spec={"bands": [3, 2, 1]} (also on the command line). Convert RGBA arrays to PIL images.'
            )
        if not fits:
            raise ValueError(problem)

    def _takes(self, number: int) -> bool:
        """Return whether the model can take this number of bands."""
        if self.band_names is None:
            return number in (1, 3)
        return number == len(self.band_names)

    def _used_bands(self, image: torch.Tensor) -> torch.Tensor:
        if self.bands is None:
            return image
        return image[list(self.bands)]

    def _range(self, image: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the black and white points, each of shape `(bands, 1, 1)` or `(1, 1, 1)`."""
        if self.window is not None:
            windows = self.windows
            num_bands = image.shape[0]
            if len(windows) not in (1, num_bands):
                raise ValueError(
                    f"input_spec has {len(windows)} windows, but {num_bands} band(s) are used. Set one window, or one "
                    "for each band."
                )
            ranges = torch.tensor(windows, dtype=torch.float64)
        elif self.percentiles is not None:
            band_ranges = [band_percentiles(band, self.percentiles) for band in image]
            ranges = torch.tensor(band_ranges, dtype=torch.float64)
        else:
            ranges = torch.tensor([range_of_type(image)])
        ranges = ranges.double()
        low, high = ranges.T
        if self.percentiles is not None:
            # A constant band becomes black.
            high = torch.where(high > low, high, low + 1)
        return low.view(-1, 1, 1), high.view(-1, 1, 1)


def range_of_type(image: torch.Tensor) -> tuple[float, float]:
    """Return the black and white points of an image whose spec has none.

    Raises:
        ValueError: if the type of the image does not determine them.
    """
    dtype = image.dtype
    if dtype == torch.bool:
        return 0.0, 1.0
    if not dtype.is_signed:
        return 0.0, float(torch.iinfo(dtype).max)
    if dtype.is_floating_point and image.isfinite().all() and image.min() >= 0 and image.max() <= 1:
        return 0.0, 1.0

    finite_values = image[image.isfinite()]
    span = "no finite value"
    if finite_values.numel() > 0:
        span = f"values in [{finite_values.min():g}, {finite_values.max():g}]"
    dtype_name = str(dtype).removeprefix("torch.")
    raise ValueError(
        f"The image is {dtype_name} with {span}, and its black and white points are not set. Set "
        "input_spec={'window': [low, high]} or input_spec={'percentiles': [2, 98]}."
    )


def as_tuples(value: Any) -> Any:
    """Return a value with tuples in place of its lists, also the nested ones."""
    if isinstance(value, (list, tuple)):
        return tuple(as_tuples(item) for item in value)
    return value


def is_list_of_indices(value: Any) -> bool:
    if not isinstance(value, (list, tuple)):
        return False
    return all(isinstance(index, int) and index >= 0 for index in value)


def is_ascending_pair(value: Any) -> bool:
    """Return whether a value is a list of two numbers in ascending order."""
    if not isinstance(value, (list, tuple)) or len(value) != 2:
        return False
    low, high = value
    are_numbers = isinstance(low, (int, float)) and isinstance(high, (int, float))
    return are_numbers and low < high


def is_window(value: Any) -> bool:
    return is_ascending_pair(value) and all(math.isfinite(bound) for bound in value)


def is_list_of_windows(value: Any) -> bool:
    if not isinstance(value, (list, tuple)) or len(value) == 0:
        return False
    return all(is_window(item) for item in value)


def are_percentiles(value: Any) -> bool:
    if not is_ascending_pair(value):
        return False
    low, high = value
    return low >= 0 and high <= 100


def band_percentiles(band: torch.Tensor, percentiles: tuple[float, float]) -> list[float]:
    """Return interpolated percentiles of the finite values (`torch.quantile` is limited to 16 million elements)."""
    band = band.cpu()
    if band.dtype == torch.bfloat16:
        band = band.float()
    values = band.numpy()
    is_finite = np.isfinite(values)
    if not is_finite.any():
        raise ValueError(
            "A band of the image has no finite value, so it has no percentiles. Set a `window`, or other `bands`."
        )
    if not is_finite.all():
        values = values[is_finite]
    if values.dtype in (np.float16, np.bool_):
        values = values.astype(np.float32)
    return np.percentile(values, percentiles).tolist()


__all__ = ["InputSpec"]
