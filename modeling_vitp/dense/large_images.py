"""Prediction for a GeoTIFF or PNG that need not fit into memory, to a GeoTIFF of classes on the same ground."""

import hashlib
import json
import math
import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import rasterio
import torch
from rasterio.enums import ColorInterp, MaskFlags
from rasterio.errors import NotGeoreferencedWarning
from rasterio.io import DatasetReader, DatasetWriter
from tqdm.auto import tqdm
from transformers import BaseImageProcessor, PreTrainedModel

from ..image_processing_vitp import InputSpec, band_percentiles
from ..images.reading import stored_orientation
from .sliding_window import augmented, predict_bands

NO_CLASS = 255  # where the image has no data
SAMPLE_SIZE = 2048  # longest side of the sample that percentiles are taken from
BLOCK = 512  # of the GeoTIFFs, which are written in rows of blocks
CACHE = 256  # of GDAL, in MiB: more than one row of windows, so that a PNG, which is read from the top, is read once


@torch.inference_mode()
def predict_large(
    model: PreTrainedModel,
    image_processor: BaseImageProcessor,
    images: str | os.PathLike | Sequence[str | os.PathLike],
    output: str | os.PathLike,
    *,
    window: int | tuple[int, int] = 512,
    stride: int | tuple[int, int] = 384,
    batch_size: int = 4,
    scales: Sequence[float] = (1.0,),
    flip: bool = False,
    probabilities: str | os.PathLike | None = None,
    colors: Sequence[tuple[int, int, int]] | None = None,
) -> None:
    """Classes of every pixel of an image of any size, or of a pair of images of the same ground.

    The result is that of [`~modeling_vitp.dense.sliding_window.sliding_window`] over the whole image. One row of
    windows is in memory at a time, with the sums of its logits: about 8 bytes x classes x window height x image width.
    The image is predicted at its own resolution.

    Rows that are finished go to `output` + `.part`, to the disk itself, one row after the other. A run that was killed
    and is started again, with the same arguments, goes on from the last whole row (windows that reach into it are
    predicted again) and ends with the same file, byte for byte, where the device's operations are deterministic. The
    GeoTIFF appears, under its name, when it is whole.

    Bands, 16-bit values and the like become three channels by the image processor's input spec. With `percentiles`,
    they are taken once, of the whole image (of a sample of at most 2048 x 2048 of its pixels, evenly spread, without
    those that have no data), never of a window, so that the same value looks the same everywhere; each image of a pair
    has its own.

    Args:
        model: [`ViTPForSemanticSegmentation`], or [`ViTPForChangeDetection`] for a pair, on the device to use.
        image_processor: the model's. Its resizing is not applied.
        images: a file that GDAL reads (GeoTIFF, PNG ...), or two: before and after.
        output: GeoTIFF to write: class indices, uint8, with a colour table, the georeference of the (first) image and
            the names of the classes as tag `classes`. 255 where an image has no data (its nodata value, its mask, or
            an alpha of 0).
        window, stride, batch_size: see [`~modeling_vitp.dense.sliding_window.sliding_window`].
        scales, flip: test-time augmentation of each window, see [`~modeling_vitp.dense.sliding_window.augmented`].
        probabilities: another GeoTIFF, with a band for each class: probabilities in steps of 1/255, which is the
            bands' scale.
        colors: red, green and blue, 0 to 255, of each class; matplotlib's `tab20` by default.

    Raises:
        ValueError: if the model takes another number of images, the two of a pair differ in size or georeference, the
            bands are not what the input spec needs, there are more than 255 classes, an image is stored with an
            orientation (a tag of TIFF or EXIF) other than upright, or an unfinished run had other arguments.
        FileExistsError: if `output` or `probabilities` exists.
    """
    paths = [Path(image) for image in ([images] if isinstance(images, (str, os.PathLike)) else images)]
    outputs = [Path(path) for path in (output, probabilities) if path is not None]
    part = outputs[0].with_name(outputs[0].name + ".part")
    for path in outputs:
        if path.exists() and not part.exists():
            raise FileExistsError(f"{path} exists: delete it, or give another name.")
    num_labels = model.config.num_labels
    if num_labels > NO_CLASS:
        raise ValueError(f"the model has {num_labels} classes, but the map has room for {NO_CLASS}.")
    if len(paths) != model.images_per_sample:
        raise ValueError(f"{type(model).__name__} takes {model.images_per_sample} image(s), but {len(paths)} given.")
    model.eval()

    def logits(*pixel_values: torch.Tensor) -> torch.Tensor:
        return model(*(values.to(model.device, model.dtype) for values in pixel_values)).logits

    predict = augmented(logits, scales, flip) if flip or tuple(scales) != (1.0,) else logits

    with ExitStack() as stack:
        stack.enter_context(rasterio.Env(GDAL_CACHEMAX=CACHE))
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore", NotGeoreferencedWarning)  # a PNG need not be
        sources = [LargeImage.open(stack.enter_context(rasterio.open(path)), image_processor) for path in paths]
        first = sources[0].dataset
        check_upright(paths)
        check_same_ground([source.dataset for source in sources])
        rows = stack.enter_context(
            RowFile(
                part,
                shape=(1 if probabilities is None else 1 + num_labels, first.width),
                made_of={
                    "images": [fingerprint(path) for path in paths],
                    "model": digest(model),
                    "image processor": image_processor.to_json_string(),
                    "window": window,
                    "stride": stride,
                    "batch_size": batch_size,
                    "scales": list(scales),
                    "flip": flip,
                    "probabilities": probabilities is not None,
                },
            )
        )
        progress = stack.enter_context(tqdm(total=first.height, initial=len(rows), unit="row", desc=outputs[0].name))
        if len(rows) < first.height:
            bands = predict_bands(
                lambda *windows: predict(*(source.normalize(each) for source, each in zip(sources, windows))),
                lambda top, bottom: tuple(source.read(top, bottom) for source in sources),
                (first.height, first.width),
                window,
                stride,
                batch_size,
                start=len(rows),
            )
            for top, band in bands:
                layers = band.argmax(1)
                if probabilities is not None:
                    layers = torch.cat([layers, (band[0].softmax(0) * 255).round()])
                layers = layers.to(torch.uint8).cpu().numpy()
                no_data = [source.has_no_data(top, top + band.shape[2]) for source in sources if source.is_masked]
                if no_data:
                    layers[0][np.logical_or.reduce(no_data)] = NO_CLASS
                rows.append(layers.swapaxes(0, 1))
                progress.update(band.shape[2])

        names = [model.config.id2label[index] for index in range(num_labels)]
        tab20 = matplotlib.colormaps["tab20"]
        colors = colors or [tuple(round(255 * part) for part in tab20(index % 20)[:3]) for index in range(num_labels)]
        if probabilities is not None:
            with write_whole(outputs[1], first, count=num_labels) as file:
                file.scales = [1 / 255] * num_labels
                file.descriptions = names
                for top, layers in rows.read(BLOCK):
                    file.write(layers[:, 1:].swapaxes(0, 1), window=whole_rows(first, top, top + len(layers)))
        nodata = NO_CLASS if any(source.is_masked for source in sources) else None
        with write_whole(outputs[0], first, count=1, nodata=nodata) as file:
            file.write_colormap(1, dict(enumerate(colors)))
            file.update_tags(classes=json.dumps(names))
            for top, layers in rows.read(BLOCK):
                file.write(layers[:, 0], 1, window=whole_rows(first, top, top + len(layers)))
    rows.delete()


@dataclass
class LargeImage:
    """An image file as the model is to see it.

    Args:
        dataset: the open file.
        image_processor: the model's.
        bands: those that are read, from 1.
        input_spec: for these bands, the same for every window.
        is_masked: whether there may be pixels without data.
    """

    dataset: DatasetReader
    image_processor: BaseImageProcessor
    bands: list[int]
    input_spec: dict[str, Any] | None
    is_masked: bool

    @classmethod
    def open(cls, dataset: DatasetReader, image_processor: BaseImageProcessor) -> "LargeImage":
        spec = image_processor.input_spec
        fields = InputSpec.from_dict(spec)
        colors = dataset.colorinterp
        bands = [band for band in dataset.indexes if colors[band - 1] != ColorInterp.alpha]
        if fields.bands is not None:
            missing = [band for band in fields.bands if band >= dataset.count]
            if missing:
                raise ValueError(f"{dataset.name} has {dataset.count} band(s), but the input spec asks for {missing}.")
            bands = [band + 1 for band in fields.bands]
        if len(bands) not in (1, 3):
            raise ValueError(
                f"{dataset.name} has {len(bands)} bands: name the one or three to use in the image processor, for "
                "example input_spec={'bands': [3, 2, 1]}."
            )
        if any(colors[band - 1] == ColorInterp.palette for band in bands):
            raise ValueError(f"{dataset.name} has a palette: expand it with gdal_translate -expand rgb.")
        is_masked = any(MaskFlags.all_valid not in flags for flags in dataset.mask_flag_enums)
        if spec is not None:
            spec = {name: value for name, value in spec.items() if name not in ("bands", "percentiles")}
            if fields.percentiles is not None:
                spec["window"] = sampled_windows(dataset, bands, fields.percentiles)
        return cls(dataset, image_processor, bands, spec, is_masked)

    def read(self, top: int, bottom: int) -> torch.Tensor:
        """Rows as they are stored, `(1, bands, bottom - top, width)`."""
        return torch.from_numpy(self.dataset.read(self.bands, window=whole_rows(self.dataset, top, bottom)))[None]

    def normalize(self, windows: torch.Tensor) -> torch.Tensor:
        """Windows, `(batch, bands, height, width)`, as the model takes them: `(batch, 3, height, width)`."""
        return self.image_processor(
            list(windows),
            input_spec=self.input_spec,
            do_resize=False,
            input_data_format="channels_first",
            return_tensors="pt",
        ).pixel_values

    def has_no_data(self, top: int, bottom: int) -> np.ndarray:
        """bool of shape `(bottom - top, width)`."""
        return self.dataset.dataset_mask(window=whole_rows(self.dataset, top, bottom)) == 0


def whole_rows(dataset: DatasetReader, top: int, bottom: int) -> tuple[tuple[int, int], tuple[int, int]]:
    """As rasterio takes a window: the ranges of rows and of columns."""
    return (top, bottom), (0, dataset.width)


def sampled_windows(dataset: DatasetReader, bands: list[int], percentiles: tuple[float, float]) -> list[list[float]]:
    """Percentiles of each band over evenly spread pixels that have data."""
    shape = [min(length, SAMPLE_SIZE) for length in dataset.shape]
    sample = dataset.read(bands, out_shape=(len(bands), *shape), masked=True).astype(np.float64).filled(np.nan)
    try:
        windows = [band_percentiles(torch.from_numpy(band), percentiles) for band in sample]
    except ValueError as error:
        raise ValueError(f"{dataset.name}: {error}") from error
    return [[low, high if high > low else low + 1] for low, high in windows]


def check_upright(paths: Sequence[Path]) -> None:
    """GDAL gives pixels as they are stored, in training they are as they are to be seen."""
    for path in paths:
        orientation = stored_orientation(path)
        if orientation != 1:
            raise ValueError(
                f"{path} is stored with orientation {orientation}, so not as it is to be seen: turn its pixels (as "
                "ImageMagick's -auto-orient does), or take the tag away if they are upright as they are."
            )


def check_same_ground(datasets: list[DatasetReader]) -> None:
    for other in datasets[1:]:
        for what in ("shape", "crs", "transform"):
            values = getattr(datasets[0], what), getattr(other, what)
            if values[0] != values[1]:
                raise ValueError(
                    f"{datasets[0].name} and {other.name} differ in {what}: {values[0]} and {values[1]}. Bring them "
                    "onto one grid, for example with gdalwarp."
                )


@contextmanager
def write_whole(path: Path, like: DatasetReader, **profile) -> Iterator[DatasetWriter]:
    """A GeoTIFF of uint8 on the ground of another file, which appears under its name when it is whole."""
    unfinished = path.with_name(path.name + ".writing")
    points, points_crs = like.gcps
    if points:
        profile |= {"gcps": points, "crs": points_crs}
    elif not like.transform.is_identity:
        profile |= {"transform": like.transform, "crs": like.crs}
    with rasterio.open(
        unfinished,
        "w",
        driver="GTiff",
        dtype="uint8",
        height=like.height,
        width=like.width,
        tiled=True,
        blockxsize=BLOCK,
        blockysize=BLOCK,
        compress="deflate",
        BIGTIFF="IF_SAFER",
        **profile,
    ) as file:
        yield file
    unfinished.replace(path)


class RowFile:
    """Rows of uint8, all of one shape, in a file that is added to and survives a kill.

    Args:
        path: of the file; what it is made of stands in a file beside it.
        shape: of a row.
        made_of: what the rows depend on, as JSON has it.

    Raises:
        ValueError: if the file is there, but made of something else.
    """

    def __init__(self, path: Path, shape: tuple[int, ...], made_of: dict[str, Any]):
        self.path, self.shape = path, shape
        self.made_of = json.loads(json.dumps(made_of))
        self.made_of_path = path.with_name(path.name + ".json")

    def __enter__(self) -> "RowFile":
        if self.path.exists():
            begun_with = json.loads(self.made_of_path.read_text())
            changed = [name for name, value in self.made_of.items() if begun_with.get(name) != value]
            if changed:
                raise ValueError(
                    f"{self.path} was begun with other {', '.join(changed)}: go on with the same, or delete it."
                )
        else:
            self.made_of_path.write_text(json.dumps(self.made_of))
        self.file = open(self.path, "a+b")
        self.file.truncate(len(self) * math.prod(self.shape))
        return self

    def __exit__(self, *_) -> None:
        self.file.close()

    def __len__(self) -> int:
        """Whole rows."""
        return self.path.stat().st_size // math.prod(self.shape)

    def append(self, rows: np.ndarray) -> None:
        self.file.write(np.ascontiguousarray(rows).data)
        self.file.flush()
        os.fsync(self.file.fileno())

    def read(self, count: int) -> Iterator[tuple[int, np.ndarray]]:
        """The place of the first of `count` rows (at the end fewer), and the rows, from the beginning."""
        self.file.seek(0)
        for top in range(0, len(self), count):
            values = np.frombuffer(self.file.read(count * math.prod(self.shape)), dtype=np.uint8)
            yield top, values.reshape(-1, *self.shape)

    def delete(self) -> None:
        self.path.unlink()
        self.made_of_path.unlink()


def fingerprint(path: Path) -> list:
    status = path.stat()
    return [str(path.resolve()), status.st_size, status.st_mtime_ns]


def digest(model: PreTrainedModel) -> str:
    """Hash of the weights."""
    result = hashlib.blake2b(digest_size=16)
    for name, tensor in model.state_dict().items():
        result.update(name.encode())
        result.update(tensor.cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return result.hexdigest()


__all__ = ["predict_large"]
