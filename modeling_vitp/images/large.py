"""Images that do not need to fit into memory, read row by row, and files that keep finished results."""

import hashlib
import io
import json
import math
import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Self

import numpy as np
import PIL.Image
import rasterio
import torch
from rasterio.enums import ColorInterp, MaskFlags
from rasterio.io import DatasetReader
from transformers import BaseImageProcessor, BatchFeature
from transformers.image_utils import ChannelDimension

from ..bands import describe_bands
from ..image_decoding import PNG, TIFF, open_raster, over_white, tiff_tags
from ..input_spec import InputSpec, band_percentiles
from .pixels import IMAGE_PROCESSOR, to_pixels
from .reading import (
    check_colors,
    check_upright,
    decode,
    is_tiff,
    lacks_end,
    read_errors,
    read_picture,
    stores_colors,
)

SAMPLE_SIZE = 2048  # Longest side of the sample from which percentiles are computed.
# GDAL cache in MiB. It holds more than one row of windows, so that a PNG, which is read from the top, is read once.
CACHE = 256
PICTURES = ("PNG", "WEBP")  # GDAL drivers of formats whose transparency is never a band.


@dataclass
class LargeImage:
    """Open image file that is read in windows as model inputs.

    Args:
        dataset: open file.
        image_processor: image processor of the model.
        bands: indices of the bands to read, from 1.
        input_spec: input spec for these bands, the same for every window.
        is_masked: whether the image may have pixels without data.
        alpha: index of the transparency band, from 1, or `None`.
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
                f"{dataset.name} has {len(bands)} band(s), the model expects {describe_bands(fields.band_names)}."
            )
        if fields.band_names is None and len(bands) not in (1, 3):
            raise ValueError(
                f"Expected an image with one or three bands, {dataset.name} has {len(bands)}. Select bands, for "
                'example with input_spec={"bands": [3, 2, 1]} of the image processor or on the command line.'
            )
        if any(colors[band - 1] == ColorInterp.palette for band in bands):
            raise ValueError(f"{dataset.name} has a palette. Convert it to RGB with gdal_translate -expand rgb.")
        if spec is not None:
            spec = {name: value for name, value in spec.items() if name not in ("bands", "percentiles")}
            if fields.percentiles is not None:
                spec["window"] = sampled_windows(dataset, bands, fields)
        return cls(
            dataset, image_processor, bands, spec, has_gaps(dataset, bands), transparency(dataset, bands, fields)
        )

    def read(self, top: int, bottom: int) -> torch.Tensor:
        """Return rows as in training, `(1, bands, bottom - top, width)`, with transparent pixels in white."""
        pixels = read_colors(self.dataset, self.bands, self.alpha, window=whole_rows(self.dataset, top, bottom))
        if self.is_masked and self.input_spec is None and (self.dataset.driver, pixels.dtype) == ("PNG", np.uint8):
            pixels[:, self.has_no_data(top, bottom)] = 255  # A PNG may have one transparent color.
        return torch.from_numpy(pixels)[None]

    def inputs(self, windows: torch.Tensor, **options) -> BatchFeature:
        """Apply the image processor to windows.

        Args:
            windows: windows of shape `(batch, bands, height, width)`.
            options: options of the image processor.
        """
        return self.image_processor(
            list(windows),
            input_spec=self.input_spec,
            input_data_format="channels_first",
            return_tensors="pt",
            **options,
        )

    def has_no_data(self, top: int, bottom: int) -> np.ndarray:
        """Return which pixels of rows have no data, bool of shape `(bottom - top, width)`."""
        return self.dataset.dataset_mask(window=whole_rows(self.dataset, top, bottom)) == 0


@contextmanager
def open_images(paths: Sequence[Path], image_processor: BaseImageProcessor) -> Iterator[list[LargeImage]]:
    """Open images of the same area.

    Raises:
        IsADirectoryError: if a path is a folder.
        ValueError: if the bands do not match the input spec, the images differ in size or georeference, or an image has
            an orientation tag (TIFF or EXIF) other than upright or does not store colors.
    """
    for path in paths:
        if path.is_dir():
            raise IsADirectoryError(f"Expected an image file, got the folder {path}.")
    with ExitStack() as stack:
        stack.enter_context(rasterio.Env(GDAL_CACHEMAX=CACHE))
        images = [LargeImage.open(stack.enter_context(open_raster(path)), image_processor) for path in paths]
        for path in paths:  # GDAL returns pixels in stored orientation, but training uses upright images.
            check_upright(path)
            with path.open("rb") as file:
                if path.suffix.lower() == ".png" and lacks_end(file):  # GDAL reads its missing rows as zeros.
                    raise ValueError(f"{path} cannot be read: the file is truncated. Save or download it again.")
        if not InputSpec.from_dict(image_processor.input_spec).takes_bands:
            for path in filter(is_tiff, paths):
                with path.open("rb") as file:
                    check_colors(path, tiff_tags(file))
        check_same_ground([image.dataset for image in images])
        yield images


def whole_rows(dataset: DatasetReader, top: int, bottom: int) -> tuple[tuple[int, int], tuple[int, int]]:
    """Return a window for rasterio: the ranges of rows and of columns."""
    return (top, bottom), (0, dataset.width)


def chosen_bands(dataset: DatasetReader, spec: InputSpec) -> list[int]:
    """Return the indices of the bands that a spec selects, from 1."""
    if spec.bands is not None:
        missing = [band for band in spec.bands if band >= dataset.count]
        if missing:
            raise ValueError(
                f"The input spec selects the bands {missing} (from 0), {dataset.name} has {dataset.count} band(s)."
            )
        return [band + 1 for band in spec.bands]
    return [
        band
        for band, color in zip(dataset.indexes, dataset.colorinterp)
        if color != ColorInterp.alpha or (spec.takes_bands and dataset.driver not in PICTURES)
    ]


def transparency(dataset: DatasetReader, bands: list[int], spec: InputSpec) -> int | None:
    """Return the index of the transparency band, from 1, or `None`. Transparent pixels are white in training."""
    if dataset.driver not in PICTURES and (spec.takes_bands or dataset.dtypes[0] != "uint8"):
        return None
    pairs = zip(dataset.indexes, dataset.colorinterp)
    return next((band for band, color in pairs if color == ColorInterp.alpha and band not in bands), None)


def read_colors(dataset: DatasetReader, bands: list[int], alpha: int | None, **options) -> np.ndarray:
    """Read bands, `(bands, height, width)`, with transparent pixels in white.

    Args:
        dataset: open file.
        bands: indices of the bands, from 1.
        alpha: index of the transparency band, see [`transparency`].
        options: options of rasterio that select the pixels.
    """
    is_small = dataset.width * dataset.height <= (PIL.Image.MAX_IMAGE_PIXELS or math.inf)
    if dataset.driver == "JPEG" and "window" in options and is_small:
        # GDAL interpolates subsampled colors in another way than Pillow, which reads the images of training.
        (top, bottom), (left, right) = options["window"]
        pixels = jpeg_pixels(Path(dataset.name), os.stat(dataset.name).st_mtime_ns)
        return pixels[[band - 1 for band in bands], top:bottom, left:right]
    pixels = dataset.read(bands, **options)
    if dataset.driver == "PNG":  # GDAL returns values of 1, 2 and 4 bits without scaling them to 8 bits.
        bits = int(dataset.tags(bands[0], ns="IMAGE_STRUCTURE").get("NBITS", 8))
        pixels *= 255 // (2**bits - 1)
    if alpha is not None:
        for row, shares in enumerate(dataset.read(alpha, **options)):
            pixels[:, row] = over_white(pixels[:, row], shares)
    return pixels


@lru_cache(maxsize=2)
def jpeg_pixels(path: Path, modified: int) -> np.ndarray:
    """Return the pixels of a JPEG as in training, `(bands, height, width)`, kept until the file is modified."""
    return to_pixels(decode(path), None).numpy()


def has_gaps(dataset: DatasetReader, bands: list[int]) -> bool:
    """Return whether the image may have pixels without data."""
    # GDAL always marks the fourth 8-bit band as transparency.
    is_data = any(dataset.colorinterp[band - 1] == ColorInterp.alpha for band in bands)
    return any(
        MaskFlags.all_valid not in flags and not (is_data and MaskFlags.alpha in flags)
        for flags in dataset.mask_flag_enums
    )


def sampled_windows(dataset: DatasetReader, bands: list[int], spec: InputSpec) -> list[list[float]]:
    """Return percentiles of each band over evenly spaced pixels, without pixels that have no data."""
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
                    f"{datasets[0].name} and {other.name} differ in {what}: {values[0]} and {values[1]}. Resample them "
                    "to one grid, for example with gdalwarp."
                )


def ranged(spec: InputSpec | None, image: Path | bytes, is_part: bool) -> InputSpec | None:
    """Replace the percentiles of a spec by the window that they give for the whole image, as in `predict_large`.

    Args:
        spec: input spec. A spec without percentiles is returned unchanged.
        image: path of the image, whose percentiles are cached, or its content.
        is_part: whether a window of the image is read.

    Raises:
        ValueError: if the file is broken.
        Exception: if the content is broken. The type depends on the decoder.
    """
    if spec is None or spec.percentiles is None:
        return spec
    if isinstance(image, bytes):
        return whole_range(spec, image, is_part)
    return whole_range_of_file(spec, image, is_part)


def whole_range(spec: InputSpec, image: Path | bytes, is_part: bool) -> InputSpec:
    if is_array(spec, image):
        with open_raster(image) as dataset:
            bands = chosen_bands(dataset, spec)
            spec.check_number(dataset.count if spec.bands is not None else len(bands))
            return spec.with_windows(sampled_windows(dataset, bands, spec))
    if not is_part:
        return spec
    picture = read_picture(image if isinstance(image, bytes) else image.read_bytes(), spec)
    layout = ChannelDimension.LAST if isinstance(picture, np.ndarray) else None
    return spec.with_range_of(IMAGE_PROCESSOR.stored_bands(picture, spec, layout))


@lru_cache(maxsize=100_000)
def whole_range_of_file(spec: InputSpec, path: Path, is_part: bool) -> InputSpec:
    with read_errors(path):
        return whole_range(spec, path, is_part)


def is_array(spec: InputSpec, image: Path | bytes) -> bool:
    """Return whether an image is a TIFF that is read with its stored values, or a PNG with transparency."""
    with io.BytesIO(image) if isinstance(image, bytes) else image.open("rb") as file:
        head = file.read(26)
        if head[:4] not in TIFF:
            return head.startswith(PNG) and head[25:] in (b"\4", b"\6")
        file.seek(0)
        return spec.takes_bands or stores_colors(tiff_tags(file))


class PartFile:
    """File of results that survives a killed run. An incomplete item at its end is removed when the file is opened.

    An empty file, of a run that was killed before its first result, takes any settings and inputs.

    Args:
        path: path of the file. `made_of` is stored in a JSON file beside it.
        made_of: settings and inputs on which the results depend.

    Raises:
        ValueError: if the file has results of other settings or inputs.
    """

    def __init__(self, path: Path, made_of: dict[str, Any]):
        self.path = path
        self.made_of = json.loads(json.dumps(made_of))
        self.made_of_path = path.with_name(path.name + ".json")

    def __enter__(self) -> Self:
        if self.path.exists() and self.path.stat().st_size:
            stored = json.loads(self.made_of_path.read_text())
            changed = [name for name, value in self.made_of.items() if stored.get(name) != value]
            if changed:
                raise ValueError(
                    f"{self.path} was started with different {', '.join(changed)}. Use the same values to resume, or "
                    "delete the file."
                )
        else:
            self.made_of_path.write_text(json.dumps(self.made_of))
        self.file = open(self.path, "a+b")
        self.file.truncate(self.whole_size())
        return self

    def __exit__(self, error_type: type[BaseException] | None, *_) -> None:
        self.file.close()
        if error_type is not None and issubclass(error_type, ValueError) and len(self) == 0:
            self.delete()  # A wrong argument. With this file, `part_path` would allow to replace an existing output.

    def whole_size(self) -> int:
        """Return the number of bytes of complete items."""
        raise NotImplementedError

    def __len__(self) -> int:
        """Return the number of complete items."""
        raise NotImplementedError

    def write(self, content: bytes | memoryview) -> None:
        """Append content to the file and wait until it is on the disk."""
        self.file.write(content)
        self.file.flush()
        os.fsync(self.file.fileno())

    def delete(self) -> None:
        self.path.unlink()
        self.made_of_path.unlink()


class RowFile(PartFile):
    """[`PartFile`] of uint8 rows of one shape.

    Args:
        path, made_of: see [`PartFile`].
        shape: shape of a row.
    """

    def __init__(self, path: Path, shape: tuple[int, ...], made_of: dict[str, Any]):
        super().__init__(path, made_of)
        self.shape = shape

    def whole_size(self) -> int:
        return len(self) * math.prod(self.shape)

    def __len__(self) -> int:
        return self.path.stat().st_size // math.prod(self.shape)

    def append(self, rows: np.ndarray) -> None:
        self.write(np.ascontiguousarray(rows).data)

    def whole(self) -> np.memmap:
        """Return all rows, `(rows, *shape)`, mapped from the file."""
        return np.memmap(self.path, np.uint8, "r", shape=(len(self), *self.shape))

    def read(self, count: int) -> Iterator[tuple[int, np.ndarray]]:
        """Yield the rows from the beginning in groups of `count`, each with the index of its first row."""
        self.file.seek(0)
        for top in range(0, len(self), count):
            values = np.frombuffer(self.file.read(count * math.prod(self.shape)), dtype=np.uint8)
            yield top, values.reshape(-1, *self.shape)


class LineFile(PartFile):
    """[`PartFile`] of values, stored as one line of JSON each."""

    def whole_size(self) -> int:
        return self.path.read_bytes().rfind(b"\n") + 1

    def __len__(self) -> int:
        return self.path.read_bytes().count(b"\n")

    def append(self, value: Any) -> None:
        self.write(json.dumps(value).encode() + b"\n")

    def __iter__(self) -> Iterator[Any]:
        with open(self.path, "rb") as file:
            yield from map(json.loads, file)


def part_path(outputs: Sequence[Path]) -> Path:
    """Return the path of the `PartFile` for output files, beside the first output.

    Raises:
        FileNotFoundError: if the folder of an output does not exist.
        FileExistsError: if an output exists without a `PartFile` of a killed run.
        ValueError: if two outputs are the same file.
    """
    if len({path.resolve() for path in outputs}) < len(outputs):
        raise ValueError(f"Expected different output files, got {outputs[0]} twice.")
    part = outputs[0].with_name(outputs[0].name + ".part")
    for path in outputs:
        if not path.parent.is_dir():
            raise FileNotFoundError(f"Folder of the output not found: {path.parent}.")
        if path.exists() and not part.exists():
            raise FileExistsError(f"{path} exists. Delete it, or use another name.")
    return part


@contextmanager
def appears_whole(path: Path) -> Iterator[Path]:
    """Yield a temporary path to write to, which is renamed to `path` when the file is complete."""
    unfinished = path.with_name(path.name + ".writing")
    yield unfinished
    unfinished.replace(path)


def file_stamp(path: Path) -> list:
    """Return path, size and modification time of a file."""
    status = path.stat()
    return [str(path.resolve()), status.st_size, status.st_mtime_ns]


def weights_digest(model: torch.nn.Module) -> str:
    """Return a hash of the weights of a model."""
    result = hashlib.blake2b(digest_size=16)
    for name, tensor in model.state_dict().items():
        result.update(name.encode())
        result.update(tensor.cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return result.hexdigest()
