"""Images that need not fit into memory, as a model is to see them: rows of a file that GDAL reads."""

import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import rasterio
import torch
from rasterio.enums import ColorInterp, MaskFlags
from rasterio.errors import NotGeoreferencedWarning
from rasterio.io import DatasetReader
from transformers import BaseImageProcessor, BatchFeature

from ..bands import named
from ..input_spec import InputSpec, band_percentiles
from .reading import check_colors, check_upright, is_tiff, over_white, tiff_tags

SAMPLE_SIZE = 2048  # longest side of the sample that percentiles are taken from
CACHE = 256  # of GDAL, in MiB: more than one row of windows, so that a PNG, which is read from the top, is read once
PICTURES = ("PNG", "WEBP")  # as GDAL calls them: in these transparency is no band, whatever a spec asks for


@dataclass
class LargeImage:
    """An image file as the model is to see it.

    Args:
        dataset: the open file.
        image_processor: the model's.
        bands: those that are read, from 1.
        input_spec: for these bands, the same for every window.
        is_masked: whether there may be pixels without data.
        alpha: the band, from 1, that says how transparent the others are, if one does.
    """

    dataset: DatasetReader
    image_processor: BaseImageProcessor
    bands: list[int]
    input_spec: dict[str, Any] | None
    is_masked: bool
    alpha: int | None

    @classmethod
    def open(cls, dataset: DatasetReader, image_processor: BaseImageProcessor) -> "LargeImage":
        spec = image_processor.input_spec
        fields = InputSpec.from_dict(spec)
        colors = dataset.colorinterp
        bands = chosen_bands(dataset, fields)
        if fields.band_names is not None and len(bands) != fields.num_channels:
            raise ValueError(
                f"{dataset.name} has {len(bands)} band(s), but the model takes {named(fields.band_names)}."
            )
        if fields.band_names is None and len(bands) not in (1, 3):
            raise ValueError(
                f"{dataset.name} has {len(bands)} bands: name the one or three to use, for example "
                'input_spec={"bands": [3, 2, 1]} of the image processor or on the command line.'
            )
        if any(colors[band - 1] == ColorInterp.palette for band in bands):
            raise ValueError(f"{dataset.name} has a palette: expand it with gdal_translate -expand rgb.")
        if spec is not None:
            spec = {name: value for name, value in spec.items() if name not in ("bands", "percentiles")}
            if fields.percentiles is not None:
                spec["window"] = sampled_windows(dataset, bands, fields)
        is_masked, alpha = has_gaps(dataset, bands), transparency(dataset, bands, fields)
        return cls(dataset, image_processor, bands, spec, is_masked, alpha)

    def read(self, top: int, bottom: int) -> torch.Tensor:
        """Rows as training reads them, `(1, bands, bottom - top, width)`: white where they are transparent."""
        pixels = read_colors(self.dataset, self.bands, self.alpha, window=whole_rows(self.dataset, top, bottom))
        if self.is_masked and self.input_spec is None and (self.dataset.driver, pixels.dtype) == ("PNG", np.uint8):
            pixels[:, self.has_no_data(top, bottom)] = 255  # one color may be transparent
        return torch.from_numpy(pixels)[None]

    def inputs(self, windows: torch.Tensor, **options) -> BatchFeature:
        """What the image processor makes of windows, `(batch, bands, height, width)`.

        Args:
            options: of the image processor.
        """
        return self.image_processor(
            list(windows),
            input_spec=self.input_spec,
            input_data_format="channels_first",
            return_tensors="pt",
            **options,
        )

    def has_no_data(self, top: int, bottom: int) -> np.ndarray:
        """bool of shape `(bottom - top, width)`."""
        return self.dataset.dataset_mask(window=whole_rows(self.dataset, top, bottom)) == 0


@contextmanager
def open_images(paths: Sequence[Path], image_processor: BaseImageProcessor) -> Iterator[list[LargeImage]]:
    """Images of the same ground, open.

    Raises:
        IsADirectoryError: if one is a folder.
        ValueError: if their bands are not what the input spec needs, they differ in size or georeference, or one is
            stored with an orientation (a tag of TIFF or EXIF) other than upright, or with other values than colors.
    """
    for path in paths:
        if path.is_dir():
            raise IsADirectoryError(f"{path} is a folder; give the file of an image.")
    with ExitStack() as stack:
        stack.enter_context(rasterio.Env(GDAL_CACHEMAX=CACHE))
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore", NotGeoreferencedWarning)  # a PNG need not be
        images = [LargeImage.open(stack.enter_context(rasterio.open(path)), image_processor) for path in paths]
        for path in paths:  # GDAL gives pixels as they are stored, in training they are as they are to be seen
            check_upright(path)
        if not InputSpec.from_dict(image_processor.input_spec).takes_bands:
            for path in filter(is_tiff, paths):
                with path.open("rb") as file:
                    check_colors(path, tiff_tags(file))
        check_same_ground([image.dataset for image in images])
        yield images


def whole_rows(dataset: DatasetReader, top: int, bottom: int) -> tuple[tuple[int, int], tuple[int, int]]:
    """As rasterio takes a window: the ranges of rows and of columns."""
    return (top, bottom), (0, dataset.width)


def chosen_bands(dataset: DatasetReader, spec: InputSpec) -> list[int]:
    """The bands of a file that a spec reads, from 1."""
    if spec.bands is not None:
        missing = [band for band in spec.bands if band >= dataset.count]
        if missing:
            raise ValueError(f"{dataset.name} has {dataset.count} band(s), but the input spec asks for {missing}.")
        return [band + 1 for band in spec.bands]
    return [
        band
        for band, color in zip(dataset.indexes, dataset.colorinterp)
        if color != ColorInterp.alpha or (spec.takes_bands and dataset.driver not in PICTURES)
    ]


def transparency(dataset: DatasetReader, bands: list[int], spec: InputSpec) -> int | None:
    """The band, from 1, by which training sees the chosen ones on white: of other files than pictures one of 8 bits."""
    if dataset.driver not in PICTURES and (spec.takes_bands or dataset.dtypes[0] != "uint8"):
        return None
    pairs = zip(dataset.indexes, dataset.colorinterp)
    return next((band for band, color in pairs if color == ColorInterp.alpha and band not in bands), None)


def read_colors(dataset: DatasetReader, bands: list[int], alpha: int | None, **options) -> np.ndarray:
    """Bands, `(bands, height, width)`, on white where they are transparent, and grey of few bits up to white.

    Args:
        alpha: as [`transparency`] gives it.
        options: of rasterio, that say what is read.
    """
    pixels = dataset.read(bands, **options)
    if dataset.driver == "PNG":  # of which GDAL gives the numbers of 1, 2 and 4 bits
        bits = int(dataset.tags(bands[0], ns="IMAGE_STRUCTURE").get("NBITS", 8))
        pixels *= 255 // (2**bits - 1)
    if alpha is not None:
        for row, shares in enumerate(dataset.read(alpha, **options)):
            pixels[:, row] = over_white(pixels[:, row], shares)
    return pixels


def has_gaps(dataset: DatasetReader, bands: list[int]) -> bool:
    """Whether there may be pixels without data."""
    # GDAL marks the fourth band of 8 bits as transparency, whatever it is.
    is_data = any(dataset.colorinterp[band - 1] == ColorInterp.alpha for band in bands)
    return any(
        MaskFlags.all_valid not in flags and not (is_data and MaskFlags.alpha in flags)
        for flags in dataset.mask_flag_enums
    )


def sampled_windows(dataset: DatasetReader, bands: list[int], spec: InputSpec) -> list[list[float]]:
    """Percentiles of each band over evenly spread pixels, of those that have data where some may have none."""
    size = {"out_shape": tuple(min(length, SAMPLE_SIZE) for length in dataset.shape)}
    sample = read_colors(dataset, bands, transparency(dataset, bands, spec), **size).astype(np.float64)
    if has_gaps(dataset, bands):
        sample[dataset.read_masks(bands, **size) == 0] = np.nan
    try:
        windows = [band_percentiles(torch.from_numpy(band), spec.percentiles) for band in sample]
    except ValueError as error:
        raise ValueError(f"{dataset.name}: {error}") from error
    return [[low, high if high > low else low + 1] for low, high in windows]


def check_same_ground(datasets: list[DatasetReader]) -> None:
    for other in datasets[1:]:
        for what in ("shape", "crs", "transform"):
            values = getattr(datasets[0], what), getattr(other, what)
            if values[0] != values[1]:
                raise ValueError(
                    f"{datasets[0].name} and {other.name} differ in {what}: {values[0]} and {values[1]}. Bring them "
                    "onto one grid, for example with gdalwarp."
                )
