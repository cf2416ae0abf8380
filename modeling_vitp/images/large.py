"""Images that do not need to fit into memory, read row by row, and files that keep finished results."""

import copy
import glob
import hashlib
import io
import json
import math
import os
import re
import shutil
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
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

from ..command.locks import FolderLock
from ..command.paths import Shard
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
SHARD_COUNT = re.compile(r"-of-(\d+)\.part")  # in the name of the file of a shard
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
        spec = InputSpec.from_dict(image_processor.input_spec)
        bands = chosen_bands(dataset, spec)
        if spec.bands is None:
            with read_errors(dataset.name):
                spec.check_number(len(bands))
        band_colors = [dataset.colorinterp[band - 1] for band in bands]
        if ColorInterp.palette in band_colors:
            raise ValueError(f"{dataset.name} has a palette. Convert it to RGB with gdal_translate -expand rgb.")

        spec_of_windows = None
        if image_processor.input_spec is not None:
            spec_of_windows = dict(image_processor.input_spec)
            spec_of_windows.pop("bands", None)
            spec_of_windows.pop("percentiles", None)
            if spec.percentiles is not None:
                spec_of_windows["window"] = sampled_windows(dataset, bands, spec)
        return cls(
            dataset=dataset,
            image_processor=image_processor,
            bands=bands,
            input_spec=spec_of_windows,
            is_masked=has_gaps(dataset, bands),
            alpha=transparency(dataset, bands, spec),
        )

    def read(self, top: int, bottom: int) -> torch.Tensor:
        """Return rows as in training, `(1, bands, bottom - top, width)`, with transparent pixels in white."""
        window = whole_rows(self.dataset, top, bottom)
        with read_errors(self.dataset.name):
            pixels = read_colors(self.dataset, self.bands, self.alpha, window=window)
        is_png_of_8_bits = self.dataset.driver == "PNG" and pixels.dtype == np.uint8
        if is_png_of_8_bits and self.is_masked and self.input_spec is None:
            is_transparent = self.has_no_data(top, bottom)
            pixels[:, is_transparent] = 255  # A PNG may have one transparent color.
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
        window = whole_rows(self.dataset, top, bottom)
        with read_errors(self.dataset.name):
            valid = self.dataset.dataset_mask(window=window)
        return valid == 0


@contextmanager
def open_images(paths: Sequence[Path], image_processor: BaseImageProcessor) -> Iterator[list[LargeImage]]:
    """Open images of the same area.

    Raises:
        ValueError: if a path is not that of an image, the bands do not match the input spec, the images differ in size
            or georeference, or an image is truncated, has an orientation tag (TIFF or EXIF) other than upright or does
            not store colors.
    """
    spec = InputSpec.from_dict(image_processor.input_spec)
    with ExitStack() as stack:
        stack.enter_context(rasterio.Env(GDAL_CACHEMAX=CACHE))
        images = []
        for path in paths:
            dataset = stack.enter_context(open_raster(path))
            images.append(LargeImage.open(dataset, image_processor))
        for path in paths:
            check_pixels_of_gdal(path, spec)
        check_same_ground([image.dataset for image in images])
        yield images


def check_pixels_of_gdal(path: Path, spec: InputSpec) -> None:
    """Raise a `ValueError` if GDAL returns other pixels of an image than those of training."""
    check_upright(path)  # GDAL returns pixels in stored orientation, but training uses upright images.
    is_png = path.suffix.lower() == ".png"
    with path.open("rb") as file:
        if is_png and lacks_end(file):  # GDAL reads its missing rows as zeros.
            raise ValueError(f"{path} cannot be read: the file is truncated. Save or download it again.")
        if is_tiff(path) and not spec.takes_bands:
            check_colors(path, tiff_tags(file))


def whole_rows(dataset: DatasetReader, top: int, bottom: int) -> tuple[tuple[int, int], tuple[int, int]]:
    """Return a window for rasterio: the ranges of rows and of columns."""
    rows = (top, bottom)
    columns = (0, dataset.width)
    return rows, columns


def chosen_bands(dataset: DatasetReader, spec: InputSpec) -> list[int]:
    """Return the indices of the bands that a spec selects, from 1."""
    if spec.bands is not None:
        with read_errors(dataset.name):
            spec.check_number(dataset.count)
        return [band + 1 for band in spec.bands]
    if spec.takes_bands and dataset.driver not in PICTURES:
        return list(dataset.indexes)
    opaque_bands = []
    for band, color in zip(dataset.indexes, dataset.colorinterp):
        if color != ColorInterp.alpha:
            opaque_bands.append(band)
    return opaque_bands


def transparency(dataset: DatasetReader, bands: list[int], spec: InputSpec) -> int | None:
    """Return the index of the transparency band, from 1, or `None`. Transparent pixels are white in training."""
    is_stored = spec.takes_bands or dataset.dtypes[0] != "uint8"
    if is_stored and dataset.driver not in PICTURES:
        return None
    for band, color in zip(dataset.indexes, dataset.colorinterp):
        if color == ColorInterp.alpha and band not in bands:
            return band
    return None


def read_colors(
    dataset: DatasetReader,
    bands: list[int],
    alpha: int | None,
    **options,
) -> np.ndarray:
    """Read bands, `(bands, height, width)`, with transparent pixels in white.

    Args:
        dataset: open file.
        bands: indices of the bands, from 1.
        alpha: index of the transparency band, see [`transparency`].
        options: options of rasterio that select the pixels.
    """
    largest_picture = PIL.Image.MAX_IMAGE_PIXELS or math.inf
    num_pixels = dataset.width * dataset.height
    fits_into_memory = num_pixels <= largest_picture
    if dataset.driver == "JPEG" and "window" in options and fits_into_memory:
        # GDAL interpolates subsampled colors in another way than Pillow, which reads the images of training.
        (top, bottom), (left, right) = options["window"]
        modified = os.stat(dataset.name).st_mtime_ns
        pixels = jpeg_pixels(Path(dataset.name), modified)
        indices = [band - 1 for band in bands]
        return pixels[indices, top:bottom, left:right]

    pixels = dataset.read(bands, **options)
    if dataset.driver == "PNG":  # GDAL returns values of 1, 2 and 4 bits without scaling them to 8 bits.
        tags = dataset.tags(bands[0], ns="IMAGE_STRUCTURE")
        bits = int(tags.get("NBITS", 8))
        highest_value = 2**bits - 1
        pixels *= 255 // highest_value
    if alpha is not None:
        opacities = dataset.read(alpha, **options)
        for row, opacity in enumerate(opacities):  # The blending of a single row takes little memory.
            colors = pixels[:, row]
            pixels[:, row] = over_white(colors, opacity)
    return pixels


@lru_cache(maxsize=2)
def jpeg_pixels(path: Path, modified: int) -> np.ndarray:
    """Return the pixels of a JPEG as in training, `(bands, height, width)`, kept until the file is modified."""
    picture = decode(path)
    return to_pixels(picture, None).numpy()


def has_gaps(dataset: DatasetReader, bands: list[int]) -> bool:
    """Return whether the image may have pixels without data."""
    # GDAL marks every fourth 8-bit band as transparency, also if the band is one of those that are read.
    reads_alpha = any(dataset.colorinterp[band - 1] == ColorInterp.alpha for band in bands)
    for flags in dataset.mask_flag_enums:
        if MaskFlags.all_valid in flags:
            continue
        if MaskFlags.alpha in flags and reads_alpha:
            continue
        return True
    return False


def sampled_windows(dataset: DatasetReader, bands: list[int], spec: InputSpec) -> list[list[float]]:
    """Return percentiles of each band over evenly spaced pixels, without pixels that have no data."""
    shape = tuple(min(length, SAMPLE_SIZE) for length in dataset.shape)
    alpha = transparency(dataset, bands, spec)
    windows = []
    with read_errors(dataset.name):
        sample = read_colors(dataset, bands, alpha, out_shape=shape)
        sample = sample.astype(np.float64)
        if has_gaps(dataset, bands):
            valid = dataset.read_masks(bands, out_shape=shape)
            sample[valid == 0] = np.nan
        for band in sample:
            values = torch.from_numpy(band)
            low, high = band_percentiles(values, spec.percentiles)
            if high <= low:
                high = low + 1
            windows.append([low, high])
    return windows


def check_same_ground(datasets: list[DatasetReader]) -> None:
    first = datasets[0]
    for dataset in datasets[1:]:
        for attribute in ("shape", "crs", "transform"):
            first_value = getattr(first, attribute)
            value = getattr(dataset, attribute)
            if value != first_value:
                raise ValueError(
                    f"{first.name} and {dataset.name} differ in {attribute}: {first_value} and {value}. Resample them "
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
            if spec.bands is None:
                spec.check_number(len(bands))
            windows = sampled_windows(dataset, bands, spec)
            return spec.with_windows(windows)
    if not is_part:
        return spec
    content = image if isinstance(image, bytes) else image.read_bytes()
    picture = read_picture(content, spec)
    layout = ChannelDimension.LAST if isinstance(picture, np.ndarray) else None
    stored_bands = IMAGE_PROCESSOR.stored_bands(picture, spec, layout)
    return spec.with_range_of(stored_bands)


@lru_cache(maxsize=100_000)
def whole_range_of_file(spec: InputSpec, path: Path, is_part: bool) -> InputSpec:
    with read_errors(path):
        return whole_range(spec, path, is_part)


def is_array(spec: InputSpec, image: Path | bytes) -> bool:
    """Return whether an image is a TIFF that is read with its stored values, or a PNG with transparency."""
    if isinstance(image, bytes):
        file = io.BytesIO(image)
    else:
        file = image.open("rb")
    with file:
        header = file.read(26)
        if header[:4] in TIFF:
            file.seek(0)
            return spec.takes_bands or stores_colors(tiff_tags(file))
    has_transparency = header[25:] in (b"\4", b"\6")
    return header.startswith(PNG) and has_transparency


@dataclass(eq=False)
class PartFile(ABC):
    """File of finished results beside an output. One run at a time writes it, and it survives a killed run.

    An incomplete item at its end is removed when the file is opened. An empty file, of a run that was killed before its
    first result, takes any settings and inputs. The results of a shard are in a file of their own; the file of all
    results joins the files of the shards when it is opened.

    Args:
        outputs: files to write from the results. The file is beside the first one, whose name it has, with `.part`.
        made_of: settings and inputs on which the results depend, stored in a JSON file beside it.
        length: number of items, of all shards together.
        shard: part of the items. Default: all items.
        unit: number of consecutive items that stay in one shard.

    Raises:
        ValueError: if the file has results of other settings or inputs, or too many, or a shard is not finished.
        FileExistsError: see [`part_path`].
        RunStopped: if another run writes the file.
    """

    outputs: Sequence[Path]
    made_of: dict[str, Any]
    length: int
    shard: Shard | None = None
    unit: int = 1

    def __post_init__(self):
        self.made_of = json.loads(json.dumps(self.made_of))
        self.file = None
        self.select(self.shard)

    def select(self, shard: Shard | None) -> None:
        self.path = part_path(self.outputs)
        if shard is not None:
            self.path = self.path.with_suffix(f".{shard.number}-of-{shard.count}.part")
        self.made_of_path = self.path.with_name(self.path.name + ".json")
        self.indices = (shard or Shard(1, 1)).part(self.length, self.unit)

    def __enter__(self) -> Self:
        self.lock = FolderLock(self.path.parent, self.path.name)
        self.lock.acquire()
        try:
            self.open()
        except BaseException as error:
            self.__exit__(type(error))
            raise
        return self

    def open(self) -> None:
        part_path(self.outputs)  # Again, because another run may have finished before the lock was acquired.
        self.file = open(self.path, "a+b")
        if self.path.stat().st_size > 0:
            self.check_made_of()
        else:
            self.made_of_path.write_text(json.dumps(self.made_of))
        if self.shard is None and len(self) < self.length:
            self.join_shards()
        if len(self) > len(self.indices):
            raise ValueError(f"Expected {len(self.indices)} results in {self.path}, got {len(self)}. Delete the file.")
        self.file.truncate(self.whole_size())

    def check_made_of(self) -> None:
        stored = json.loads(self.made_of_path.read_text())
        changed_settings = []
        for name, value in self.made_of.items():
            if stored.get(name) != value:
                changed_settings.append(name)
        if changed_settings:
            changes = ", ".join(changed_settings)
            raise ValueError(
                f"{self.path} was started with different {changes}. Use the same values to resume, or delete the file."
            )

    def shard_paths(self) -> list[Path]:
        """Return the files of the shards of the output, with those of their settings."""
        output = self.outputs[0]
        return sorted(output.parent.glob(f"{glob.escape(output.name)}.*-of-*.part*"))

    def join_shards(self) -> None:
        """Replace the results by those of all shards, in order, if there are files of shards."""
        num_shards = 0
        for path in self.shard_paths():
            count = SHARD_COUNT.search(path.name)[1]
            num_shards = max(num_shards, int(count))
        shard_files = []
        for shard in Shard.all_of(num_shards):
            shard_file = copy.copy(self)
            shard_file.select(shard)
            if not shard_file.path.exists() or len(shard_file) != len(shard_file.indices):
                raise ValueError(
                    f"{shard_file.path} is not finished. Run --shard {shard}, or delete the files of the shards."
                )
            shard_file.check_made_of()
            shard_files.append(shard_file)
        if shard_files:
            self.file.truncate(0)
        for shard_file in shard_files:
            with shard_file.path.open("rb") as content:
                shutil.copyfileobj(content, self.file)
        self.file.flush()

    def __exit__(self, error_type: type[BaseException] | None, *_) -> None:
        if self.file is not None:
            self.file.close()
        is_wrong_argument = error_type is not None and issubclass(error_type, ValueError)
        if is_wrong_argument and len(self) == 0:  # With this file, `part_path` would allow to replace an output.
            self.path.unlink()
            self.made_of_path.unlink()
        self.lock.path.unlink(missing_ok=True)
        self.lock.release()

    @abstractmethod
    def whole_size(self) -> int:
        """Return the number of bytes of complete items."""

    @abstractmethod
    def __len__(self) -> int:
        """Return the number of complete items."""

    def write(self, content: bytes | memoryview) -> None:
        """Append content to the file and wait until it is on the disk."""
        self.file.write(content)
        self.file.flush()
        os.fsync(self.file.fileno())

    def delete(self) -> None:
        """Delete the file and those of the shards, when the outputs are written."""
        for path in (self.path, self.made_of_path, *self.shard_paths()):
            path.unlink()
            FolderLock(path.parent, path.name).path.unlink(missing_ok=True)  # That of a killed run is left.


@dataclass(eq=False)
class RowFile(PartFile):
    """[`PartFile`] of uint8 rows of one shape.

    Args:
        outputs, made_of, length, shard, unit: see [`PartFile`].
        shape: shape of a row.
    """

    shape: tuple[int, ...] = field(kw_only=True)

    def whole_size(self) -> int:
        return len(self) * math.prod(self.shape)

    def __len__(self) -> int:
        return self.path.stat().st_size // math.prod(self.shape)

    def append(self, rows: np.ndarray) -> None:
        self.write(np.ascontiguousarray(rows).data)

    def whole(self) -> np.memmap:
        """Return all rows, `(rows, *shape)`, mapped from the file."""
        shape = (len(self), *self.shape)
        return np.memmap(self.path, np.uint8, "r", shape=shape)

    def read(self, count: int) -> Iterator[tuple[int, np.ndarray]]:
        """Yield the rows from the beginning in groups of `count`, each with the index of its first row."""
        row_size = math.prod(self.shape)
        group_size = count * row_size
        self.file.seek(0)
        for top in range(0, len(self), count):
            content = self.file.read(group_size)
            flat_rows = np.frombuffer(content, dtype=np.uint8)
            rows = flat_rows.reshape(-1, *self.shape)
            yield top, rows


class LineFile(PartFile):
    """[`PartFile`] of values, stored as one line of JSON each."""

    def whole_size(self) -> int:
        return self.path.read_bytes().rfind(b"\n") + 1

    def __len__(self) -> int:
        return self.path.read_bytes().count(b"\n")

    def append(self, value: Any) -> None:
        line = json.dumps(value).encode()
        self.write(line + b"\n")

    def __iter__(self) -> Iterator[Any]:
        with open(self.path, "rb") as file:
            for line in file:
                yield json.loads(line)


def part_path(outputs: Sequence[Path]) -> Path:
    """Return the path of the `PartFile` for output files, beside the first output.

    Raises:
        FileNotFoundError: if the folder of an output does not exist.
        FileExistsError: if an output exists without a `PartFile` of a killed run.
        ValueError: if two outputs are the same file.
    """
    distinct_paths = {path.resolve() for path in outputs}
    if len(distinct_paths) < len(outputs):
        raise ValueError(f"Expected different output files, got {outputs[0]} twice.")
    unfinished_results = outputs[0].with_name(outputs[0].name + ".part")
    for path in outputs:
        if not path.parent.is_dir():
            raise FileNotFoundError(f"Folder of the output not found: {path.parent}.")
        if path.exists() and not unfinished_results.exists():
            raise FileExistsError(f"{path} exists. Delete it, or use another name.")
    return unfinished_results


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
    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in model.state_dict().items():
        flat_tensor = tensor.cpu().contiguous().flatten()
        flat_bytes = flat_tensor.view(torch.uint8)
        content = flat_bytes.numpy()
        digest.update(name.encode())
        digest.update(content.data)
    return digest.hexdigest()
