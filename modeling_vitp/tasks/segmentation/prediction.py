"""Segmentation of tensors, large images and volumes in overlapping windows, with test-time augmentation."""

import gzip
import json
import math
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib
import nibabel
import numpy as np
import PIL.Image
import rasterio
import torch
from rasterio.io import DatasetReader, DatasetWriter
from torch.nn import functional as F
from tqdm.auto import tqdm
from transformers import BaseImageProcessor, PreTrainedModel

from ...command.paths import Shard
from ...data.files import fill
from ...images.large import (
    LargeImage,
    RowFile,
    appears_whole,
    file_stamp,
    open_images,
    part_path,
    weights_digest,
    whole_rows,
)
from ...images.reading import is_tiff, window_starts
from ...images.seen import report_images
from ...images.volumes import NIFTI, Volume, VolumeSlices, check_cut, files_of
from ...input_spec import InputSpec

if TYPE_CHECKING:
    from .data import DenseData
    from .trainer import ViTPSegmentationTrainer

NO_CLASS = 255  # Value of pixels without data in the output.
MAX_CLASSES = 256  # Of volumes, which have a class in every voxel.
BLOCK = 512  # Block size of the GeoTIFFs in pixels, which are written one row of blocks at a time.
# Function from one or several images of shape `(batch, channels, height, width)` to logits of shape
# `(batch, classes, height, width)`.
Predict = Callable[..., torch.Tensor]


def sliding_window(
    predict: Predict,
    images: torch.Tensor | Sequence[torch.Tensor],
    window: int | tuple[int, int],
    stride: int | tuple[int, int],
    batch_size: int = 4,
) -> torch.Tensor:
    """Return logits of images of any size by sliding-window inference. Overlapping windows are averaged.

    Windows start at every multiple of the stride. The last window of a row or column is shifted back to end at the
    border, as in the slide inference of mmsegmentation, so that every window is full. If the image is smaller than the
    window in a direction, the window has the size of the image in that direction.

    Args:
        predict: function from windows to logits of the same height and width. The number of arguments is the number of
            `images`, each of shape `(at most batch_size * batch, channels, window height, window width)`.
        images: tensor of shape `(batch, channels, height, width)`, or several of the same size, such as before and
            after.
        window, stride: height and width in pixels, or one number for both. The stride is at most the window.
        batch_size: number of windows per image in one call of `predict`, all from the same row of windows.

    Returns:
        Logits, float32 of shape `(batch, classes, height, width)`, on the device of the output of `predict`.

    Raises:
        ValueError: if the stride is larger than the window or below 1, `batch_size` is below 1, the images differ in
            size, or `predict` returns logits of a different size than its input.
    """
    if isinstance(images, torch.Tensor):
        images = [images]
    sizes = [tuple(image.shape) for image in images]
    batches_and_sizes = {(size[0], size[-2:]) for size in sizes}
    have_four_axes = all(len(size) == 4 for size in sizes)
    if not have_four_axes or len(batches_and_sizes) != 1:
        raise ValueError(
            f"Expected images of shape (batch, channels, height, width) with the same batch and size, got {sizes}."
        )

    def read(top: int, bottom: int) -> tuple[torch.Tensor, ...]:
        return tuple(image[:, :, top:bottom] for image in images)

    bands = predict_bands(
        predict,
        read,
        sizes[0][-2:],
        window,
        stride,
        batch_size,
    )
    return torch.cat([logits for _, logits in bands], dim=2)


def predict_bands(
    predict: Predict,
    read: Callable[[int, int], tuple[torch.Tensor, ...]],
    size: tuple[int, int],
    window: int | tuple[int, int],
    stride: int | tuple[int, int],
    batch_size: int = 4,
    start: int = 0,
    stop: int | None = None,
) -> Iterator[tuple[int, torch.Tensor]]:
    """Run [`sliding_window`] from top to bottom over an image that does not need to fit into memory.

    Args:
        predict, window, stride, batch_size: see [`sliding_window`].
        read: function `read(top, bottom)` that returns these rows of each image, of shape
            `(batch, channels, bottom - top, width)`.
        size: height and width of the images.
        start, stop: first row to return, and the row after the last one. Windows that begin above `start` and reach
            below it are predicted again, so the logits do not depend on `start`.

    Yields:
        `top, logits`: the finished rows from `top`, which no further window reaches, float32 of shape
        `(batch, classes, rows, width)`. One row of windows and its finished rows are in memory at a time.
    """
    window = as_pair(window)
    stride = as_pair(stride)
    if not all(1 <= step <= length for step, length in zip(stride, window)):
        raise ValueError(f"`stride` must be at least 1 and at most the window {window}, got {stride}.")
    if batch_size < 1:
        raise ValueError(f"`batch_size` must be at least 1, got {batch_size}.")
    image_height, image_width = size
    height = min(window[0], image_height)
    width = min(window[1], image_width)
    tops = window_starts(image_height, height, stride[0])
    lefts = window_starts(image_width, width, stride[1])
    row_counts = times_covered(image_height, tops, height)
    column_counts = times_covered(image_width, lefts, width)

    stop = image_height if stop is None else stop
    tops = [top for top in tops if start - height < top < stop]
    next_tops = [*tops[1:], stop]
    sums = None  # Sums of the logits over windows, for the rows of the current windows.
    for top, next_top in zip(tops, next_tops):
        rows = read(top, top + height)
        sums = add_windows(sums, predict, rows, lefts, width, batch_size)
        if next_top > start:
            skipped = max(start - top, 0)
            counts = row_counts[top + skipped : next_top, None] * column_counts
            yield top + skipped, sums[:, :, skipped : next_top - top] / counts.to(sums.device)
        finished = next_top - top
        next_rows = torch.zeros_like(sums[:, :, :finished])
        sums = torch.cat([sums[:, :, finished:], next_rows], dim=2)


def add_windows(
    sums: torch.Tensor | None,
    predict: Predict,
    rows: Sequence[torch.Tensor],
    lefts: Sequence[int],
    width: int,
    batch_size: int,
) -> torch.Tensor:
    """Add the logits of all windows of the same rows to their sums, and return the sums.

    Args:
        sums: sums so far, float32 of shape `(batch, classes, window height, image width)`, or `None` for zeros. Their
            number of classes is known after the first prediction.
        predict, batch_size: see [`sliding_window`].
        rows, lefts, width: see [`predict_windows`].
    """
    for first in range(0, len(lefts), batch_size):
        batch_lefts = lefts[first : first + batch_size]
        logits = predict_windows(predict, rows, batch_lefts, width)
        if sums is None:
            images, _, height, image_width = rows[0].shape
            sums = logits.new_zeros(images, logits.shape[1], height, image_width, dtype=torch.float32)
        for left, window_logits in zip(batch_lefts, logits.chunk(len(batch_lefts))):
            sums[..., left : left + width] += window_logits
    return sums


def predict_windows(
    predict: Predict,
    rows: Sequence[torch.Tensor],
    lefts: Sequence[int],
    width: int,
) -> torch.Tensor:
    """Return the logits of windows of the same rows, one after the other along the batch axis.

    Args:
        predict: see [`sliding_window`].
        rows: rows of each image, of shape `(batch, channels, window height, image width)`.
        lefts: first column of each window.
        width: width of the windows.
    """
    windows = []
    for image_rows in rows:
        image_windows = [image_rows[..., left : left + width] for left in lefts]
        windows.append(torch.cat(image_windows))
    logits = predict(*windows)
    height = rows[0].shape[-2]
    if logits.shape[-2:] != (height, width):
        raise ValueError(
            f"Expected `predict` to return logits of the window size ({height}, {width}), got shape "
            f"{tuple(logits.shape)}. Resize the logits to the window."
        )
    return logits


def default_stride(window: int | tuple[int, int]) -> tuple[int, int]:
    """Return the default stride, three quarters of the window: 384 for a window of 512."""
    height, width = as_pair(window)
    row_stride = max(3 * height // 4, 1)
    column_stride = max(3 * width // 4, 1)
    return row_stride, column_stride


def as_pair(value: int | tuple[int, int]) -> tuple[int, int]:
    if isinstance(value, int):
        return value, value
    return tuple(value)


def times_covered(length: int, starts: list[int], window: int) -> torch.Tensor:
    """Return the number of windows that cover each position of an axis."""
    counts = torch.zeros(length)
    for start in starts:
        counts[start : start + window] += 1
    return counts


def augmented(
    predict: Predict,
    scales: Sequence[float] = (1.0,),
    flip: bool = False,
) -> Predict:
    """Return a `predict` function with test-time augmentation, averaged over scales and mirrored images.

    The average is over probabilities (softmax of the logits) at the size of the input, as in the test-time augmentation
    of mmsegmentation. Images and logits are resampled bilinearly, with antialiasing for images that are made smaller.

    To augment whole images, as benchmarks do, call the sliding window inside:

    ```python
    predict = augmented(lambda images: sliding_window(logits_of, images, 512, 384), scales=(0.75, 1.0, 1.25), flip=True)
    ```

    Args:
        predict: function from one or several images `(batch, channels, height, width)` to logits
            `(batch, classes, height, width)`.
        scales: scale factors of height and width. The scaled size is rounded to pixels.
        flip: whether to predict the horizontally mirrored image too.

    Returns:
        Function with the arguments of `predict`. It returns the logarithm of the mean probabilities, float32. The
        softmax of this result is the mean.

    Raises:
        ValueError: if `scales` is empty or has a factor that is not positive.
    """
    if not scales or min(scales) <= 0:
        raise ValueError(f"`scales` must be one or more positive factors, got {tuple(scales)}.")
    mirrorings = (False, True) if flip else (False,)

    def predict_augmented(*images: torch.Tensor) -> torch.Tensor:
        size = images[0].shape[-2:]
        log_sum = None  # Logarithm of the sum of the probabilities.
        for scale in scales:
            scaled_images = scaled(images, scale)
            for is_mirrored in mirrorings:
                logits = predict_mirrored(predict, scaled_images) if is_mirrored else predict(*scaled_images)
                logits = F.interpolate(logits.float(), size, mode="bilinear")
                log_probabilities = logits.log_softmax(dim=1)
                log_sum = log_probabilities if log_sum is None else torch.logaddexp(log_sum, log_probabilities)
        return log_sum - math.log(len(scales) * len(mirrorings))

    return predict_augmented


def scaled(images: Sequence[torch.Tensor], scale: float) -> list[torch.Tensor]:
    """Return images of the same size at a scale; the scaled size is rounded to pixels."""
    height, width = images[0].shape[-2:]
    scaled_size = [
        max(round(height * scale), 1),
        max(round(width * scale), 1),
    ]
    scaled_images = []
    for image in images:
        if list(image.shape[-2:]) != scaled_size:
            image = F.interpolate(
                image,
                scaled_size,
                mode="bilinear",
                antialias=scale < 1,
            )
        scaled_images.append(image)
    return scaled_images


def predict_mirrored(predict: Predict, images: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return the logits of the mirrored images, mirrored back."""
    mirrored_images = [image.flip(-1) for image in images]
    return predict(*mirrored_images).flip(-1)


def logits_of(model: PreTrainedModel) -> Predict:
    """Return a function from pixel values, on any device, to the logits of a model in evaluation mode."""
    model.eval()

    def predict(*pixel_values: torch.Tensor) -> torch.Tensor:
        inputs = [values.to(model.device, model.dtype) for values in pixel_values]
        return model(*inputs).logits

    return predict


def layers_of(logits: torch.Tensor, with_probabilities: bool) -> np.ndarray:
    """Return the class indices and, with probabilities, a layer of 255 times the probability for each class.

    Args:
        logits: logits of shape `(classes, height, width)`.
        with_probabilities: whether to return the probabilities.

    Returns:
        uint8 of shape `(1, height, width)` or `(1 + classes, height, width)`.
    """
    layers = logits.max(0, keepdim=True).indices  # On the CPU, `argmax` is ten times slower.
    if with_probabilities:
        probabilities = (logits.softmax(0) * 255).round()
        layers = torch.cat([layers, probabilities])
    return layers.to(torch.uint8).cpu().numpy()


def as_paths(paths: str | os.PathLike | Sequence[str | os.PathLike]) -> list[Path]:
    if isinstance(paths, (str, os.PathLike)):
        paths = [paths]
    return [Path(path) for path in paths]


def output_paths(
    output: str | os.PathLike,
    probabilities: str | os.PathLike | None,
    has_suffix: Callable[[Path], bool],
    expected: str,
) -> list[Path]:
    """Return the path of the classes and, if given, that of the probabilities.

    Args:
        output, probabilities: see [`predict_large`].
        has_suffix: function that returns whether a path has a suffix of the format.
        expected: description of the format in errors.

    Raises:
        ValueError: if a path has another suffix.
    """
    paths = [Path(output)]
    if probabilities is not None:
        paths.append(Path(probabilities))
    for path in paths:
        if not has_suffix(path):
            raise ValueError(f"Expected {expected}, got {path}.")
    return paths


def check_num_labels(model: PreTrainedModel, most: int) -> None:
    """Raise a `ValueError` if the class indices of a model do not fit into the output."""
    if model.config.num_labels > most:
        raise ValueError(
            f"Expected a model with at most {most} classes for a uint8 output, got {model.config.num_labels}."
        )


def class_names_of(model: PreTrainedModel) -> list[str]:
    return [model.config.id2label[index] for index in range(model.config.num_labels)]


@torch.inference_mode()
def predict_large(
    model: PreTrainedModel,
    image_processor: BaseImageProcessor,
    images: str | os.PathLike | Sequence[str | os.PathLike],
    output: str | os.PathLike,
    *,
    window: int | tuple[int, int] = 512,
    stride: int | tuple[int, int] | None = None,
    batch_size: int = 4,
    scales: Sequence[float] = (1.0,),
    flip: bool = False,
    probabilities: str | os.PathLike | None = None,
    colors: Sequence[tuple[int, int, int]] | None = None,
    shard: Shard | None = None,
) -> None:
    """Predict the class of every pixel of an image of any size, or of an image pair, and write a GeoTIFF.

    The result is that of [`sliding_window`] over the whole image at its original
    resolution. One row of windows and the sums of its logits are in memory at a time: about 8 bytes x classes x window
    height x image width.

    Finished rows are written to `output` + `.part`. If a run is killed and started again with the same arguments, it
    resumes after the last complete row and writes the same file, byte for byte, if the operations of the device are
    deterministic. The GeoTIFF appears under its name when it is complete.

    The input spec of the image processor converts bands and 16-bit values to channels. With `percentiles`, the
    percentiles are computed once per image from a sample of at most 2048 x 2048 evenly spaced pixels with data, never
    per window, so equal values have equal brightness in the whole image.

    Args:
        model: [`ViTPForSemanticSegmentation`], or [`ViTPForChangeDetection`] for a pair, on the device to use.
        image_processor: image processor of the model. Its resizing is not applied.
        images: path of an image that GDAL reads (GeoTIFF, PNG, ...), or two paths: before and after.
        output: path of the GeoTIFF to write (`.tif` or `.tiff`): class indices, uint8, with a color table, the
            georeference of the (first) image and the class names in the tag `classes`. Pixels without data (nodata
            value, mask, or alpha of 0) are 255. The model sees transparent pixels as white, as in training.
        window, stride, batch_size: see [`sliding_window`]. Default stride: three
            quarters of the window.
        scales, flip: test-time augmentation of each window, see [`augmented`].
        probabilities: path of a second GeoTIFF with one band of probabilities per class, uint8 with a scale of 1/255.
            Pixels without data are 0, and not valid in its mask.
        colors: red, green and blue in [0, 255] of each class. Default: `tab20` of matplotlib.
        shard: part of the rows to predict, such as `Shard(3, 8)`. The result is stored beside `output`. When all shards
            are finished, the same call without a shard writes `output`.

    Raises:
        ValueError: if an output has a wrong suffix, the number of images does not match the model, the images of a pair
            differ in size or georeference, the bands do not match the input spec, the model has more than 255 classes,
            an image has an orientation tag (TIFF or EXIF) other than upright, an unfinished run had different
            arguments, or a shard is not finished.
        FileExistsError: if `output` or `probabilities` exists.
        RunStopped: if another run writes `output`, or the shard.
    """
    paths = as_paths(images)
    outputs = output_paths(output, probabilities, is_tiff, "a GeoTIFF with the suffix .tif as output for an image")
    part_path(outputs)  # Raises an error before the computation starts.
    if stride is None:
        stride = default_stride(window)
    check_num_labels(model, NO_CLASS)
    if getattr(model.config, "volume_plane", None) is not None:
        raise ValueError(
            f"Expected a NIfTI file or DICOM folder for a model of {model.config.volume_plane} slices, got {paths[0]}."
        )
    if len(paths) != model.images_per_sample:
        raise ValueError(f"Expected {model.images_per_sample} image(s) for {type(model).__name__}, got {len(paths)}.")
    predict = logits_of(model)
    if flip or tuple(scales) != (1.0,):
        predict = augmented(predict, scales, flip)
    num_layers = 1 if probabilities is None else 1 + model.config.num_labels
    with open_images(paths, image_processor) as sources:
        report_images(len(paths), paths.__getitem__, InputSpec.from_dict(image_processor.input_spec))
        made_of = {
            "images": [file_stamp(path) for path in paths],
            "model": weights_digest(model),
            "image processor": image_processor.to_json_string(),
            "window": window,
            "stride": stride,
            "batch_size": batch_size,
            "scales": list(scales),
            "flip": flip,
            "probabilities": probabilities is not None,
        }
        height, width = sources[0].dataset.shape
        with RowFile(outputs, made_of, height, shard, shape=(num_layers, width)) as rows:
            predict_rows(
                predict,
                sources,
                rows,
                window,
                stride,
                batch_size,
                outputs[0].name,
            )
            if shard is None:
                write_geotiffs(
                    outputs,
                    rows,
                    sources,
                    class_names_of(model),
                    colors,
                )
                rows.delete()


def predict_rows(
    predict: Predict,
    sources: Sequence[LargeImage],
    rows: RowFile,
    window: int | tuple[int, int],
    stride: int | tuple[int, int],
    batch_size: int,
    description: str,
) -> None:
    """Append the layers of [`layers_of`] to `rows`, from the first row of the images that it lacks.

    Args:
        predict, window, stride, batch_size: see [`sliding_window`].
        sources: image, or the two of a pair.
        rows: file of the finished rows, each of shape `(layers, width)`.
        description: text beside the progress bar.
    """
    first_image = sources[0].dataset
    remaining = rows.indices[len(rows) :]
    if not remaining:
        return
    num_layers, _ = rows.shape

    def predict_processed(*windows: torch.Tensor) -> torch.Tensor:
        inputs = []
        for source, source_windows in zip(sources, windows):
            inputs.append(source.inputs(source_windows, do_resize=False).pixel_values)
        return predict(*inputs)

    def read(top: int, bottom: int) -> tuple[torch.Tensor, ...]:
        return tuple(source.read(top, bottom) for source in sources)

    bands = predict_bands(
        predict_processed,
        read,
        size=(first_image.height, first_image.width),
        window=window,
        stride=stride,
        batch_size=batch_size,
        start=remaining.start,
        stop=remaining.stop,
    )
    with tqdm(
        total=len(rows.indices),
        initial=len(rows),
        unit="row",
        desc=description,
    ) as progress:
        for top, band in bands:
            layers = layers_of(band[0], with_probabilities=num_layers > 1)
            height = band.shape[2]
            no_data = [source.has_no_data(top, top + height) for source in sources if source.is_masked]
            if no_data:
                is_empty = np.logical_or.reduce(no_data)
                layers[:, is_empty] = 0
                layers[0, is_empty] = NO_CLASS
            rows.append(layers.swapaxes(0, 1))
            progress.update(height)


def write_geotiffs(
    outputs: Sequence[Path],
    rows: RowFile,
    sources: Sequence[LargeImage],
    class_names: Sequence[str],
    colors: Sequence[tuple[int, int, int]] | None,
) -> None:
    """Write the GeoTIFF of the classes and, if `outputs` has a second path, that of the probabilities."""
    first_image = sources[0].dataset
    is_masked = any(source.is_masked for source in sources)
    if len(outputs) > 1:
        num_labels = len(class_names)
        # The mask is a part of the file, because a file beside it would not be renamed with it.
        with (
            rasterio.Env(GDAL_TIFF_INTERNAL_MASK=True),
            open_geotiff(outputs[1], first_image, count=num_labels) as file,
        ):
            file.scales = [1 / 255] * num_labels
            file.descriptions = class_names
            for top, layers in rows.read(BLOCK):
                area = whole_rows(first_image, top, top + len(layers))
                file.write(layers[:, 1:].swapaxes(0, 1), window=area)
                if is_masked:
                    file.write_mask(layers[:, 0] != NO_CLASS, window=area)
    with open_geotiff(
        outputs[0],
        first_image,
        count=1,
        nodata=NO_CLASS if is_masked else None,
    ) as file:
        colors = colors or default_colors(len(class_names))
        file.write_colormap(1, dict(enumerate(colors)))
        file.update_tags(classes=json.dumps(class_names))
        for top, layers in rows.read(BLOCK):
            area = whole_rows(first_image, top, top + len(layers))
            file.write(layers[:, 0], 1, window=area)


def default_colors(num_labels: int) -> list[tuple[int, int, int]]:
    """Return red, green and blue in [0, 255] of each class, from the 20 colors of `tab20`."""
    tab20 = matplotlib.colormaps["tab20"]
    colors = []
    for index in range(num_labels):
        red, green, blue, _ = tab20(index % 20)
        colors.append((round(255 * red), round(255 * green), round(255 * blue)))
    return colors


@contextmanager
def open_geotiff(path: Path, like: DatasetReader, **profile) -> Iterator[DatasetWriter]:
    """Open a uint8 GeoTIFF for writing, with the georeference of another file. It appears when it is complete."""
    points, points_crs = like.gcps
    if points:
        profile["gcps"] = points
        profile["crs"] = points_crs
    elif not like.transform.is_identity:
        profile["transform"] = like.transform
        profile["crs"] = like.crs
    if like.rpcs:
        profile["rpcs"] = like.rpcs
    with (
        appears_whole(path) as unfinished,
        rasterio.open(
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
        ) as file,
    ):
        yield file


@torch.inference_mode()
def predict_volume(
    model: PreTrainedModel,
    image_processor: BaseImageProcessor,
    volumes: str | os.PathLike | Sequence[str | os.PathLike],
    output: str | os.PathLike,
    *,
    plane: str | None = None,
    intensities: Sequence[float] | None = None,
    percentiles: Sequence[float] | None = None,
    window: int | tuple[int, int] = 512,
    stride: int | tuple[int, int] | None = None,
    batch_size: int = 4,
    scales: Sequence[float] = (1.0,),
    flip: bool = False,
    probabilities: str | os.PathLike | None = None,
    shard: Shard | None = None,
) -> None:
    """Predict the class of every voxel of a volume and write a NIfTI file.

    The volume is cut into slices as in fine-tuning ([`~modeling_vitp.tasks.segmentation.data.slice_volumes`]), and the
    slices are predicted one at a time. One slice and its logits are in memory at a time. With percentiles, at most 16
    million values of the volume are in memory once. A compressed volume is unpacked to the disk.

    Finished slices are written to `output` + `.part`. If a run is killed and started again with the same arguments, it
    resumes after the last complete slice and writes the same file, byte for byte, if the operations of the device are
    deterministic. The output appears under its name when it is complete.

    Args:
        model: [`ViTPForSemanticSegmentation`], on the device to use.
        image_processor: image processor of the model. The window or percentiles of its input spec are the defaults of
            `intensities` and `percentiles`.
        volumes: path of a NIfTI file or of the folder of a DICOM series; or three paths of volumes at the same
            position, the channels of an image.
        output: path of the NIfTI file to write (`.nii.gz` or `.nii`): class indices, uint8, in the voxel grid of the
            (first) volume. The header of a NIfTI volume is kept, except for the data type, value range and intent
            (label). For a DICOM series, the affine has the position, orientation and spacing of the series. The class
            names are stored in a header extension, a comment in JSON.
        plane: plane in which the model was trained. Default: the plane in the configuration of the model.
        intensities: low and high value in the units of the volume (Hounsfield units for CT), mapped to black and white.
        percentiles: low and high percentile of the non-zero values of the volume, instead of `intensities`.
        window, stride, batch_size: see [`sliding_window`]. Default stride: three
            quarters of the window.
        scales, flip: test-time augmentation of each slice, see [`augmented`].
        probabilities: path of a second NIfTI file with a fourth axis of class probabilities, uint8 with a slope of
            1/255 in the header.
        shard: part of the slices to predict, see [`predict_large`].

    Raises:
        ValueError: if a volume cannot be read (see [`~modeling_vitp.images.volumes.open_volume`]), the channels differ
            in shape or position, neither `intensities` nor `percentiles` are known, the plane is unknown or not that of
            the training, the model takes image pairs, an unfinished run had different arguments, or a shard is
            not finished.
        FileExistsError: if `output` or `probabilities` exists.
        RunStopped: if another run writes `output`, or the shard.
    """
    paths = as_paths(volumes)
    expected = "a NIfTI file with the suffix .nii.gz as output for a volume (NIfTI file or DICOM folder)"
    outputs = output_paths(output, probabilities, is_nifti, expected)
    part_path(outputs)  # Raises an error before the computation starts.
    if stride is None:
        stride = default_stride(window)
    check_volume_model(model, plane)
    plane = plane or model.config.volume_plane
    if intensities is None and percentiles is None:
        intensities, percentiles = intensities_of_training(image_processor)
    check_cut(plane, intensities, percentiles)
    slices = VolumeSlices(paths, plane, intensities, percentiles)
    logits = logits_of(model)

    def predict(pixel_values: torch.Tensor) -> torch.Tensor:
        return sliding_window(
            logits,
            pixel_values,
            window,
            stride,
            batch_size,
        )

    if flip or tuple(scales) != (1.0,):
        predict = augmented(predict, scales, flip)
    made_of = {
        "volumes": stamps_of_volumes(paths),
        "model": weights_digest(model),
        "image processor": image_processor.to_json_string(),
        "plane": plane,
        "intensities": intensities,
        "percentiles": percentiles,
        "window": window,
        "stride": stride,
        "batch_size": batch_size,
        "scales": list(scales),
        "flip": flip,
        "probabilities": probabilities is not None,
    }
    num_layers = 1 if probabilities is None else 1 + model.config.num_labels
    slice_shape = slices.volumes[0].size(plane)
    with RowFile(outputs, made_of, len(slices), shard, shape=(num_layers, *slice_shape)) as rows:
        predict_slices(predict, image_processor, slices, rows, outputs[0].name)
        if shard is None:
            write_niftis(outputs, rows, slices.volumes[0], plane, class_names_of(model))
            rows.delete()


def is_nifti(path: Path) -> bool:
    return path.name.lower().endswith(NIFTI)


def check_volume_model(model: PreTrainedModel, plane: str | None) -> None:
    """Raise a `ValueError` if a model cannot predict slices of this plane, by default that of its training."""
    if model.images_per_sample != 1:
        raise ValueError(
            f"Expected a model that takes one image for a volume, {type(model).__name__} takes "
            f"{model.images_per_sample}."
        )
    check_num_labels(model, MAX_CLASSES)
    trained_plane = model.config.volume_plane
    if plane is None and trained_plane is None:
        raise ValueError("The plane of the training is unknown. Set `plane` to axial, coronal or sagittal.")
    if plane is not None and trained_plane is not None and plane != trained_plane:
        raise ValueError(f"Expected the `plane` of the training, {trained_plane}, got {plane}. Remove `plane`.")


def intensities_of_training(
    image_processor: BaseImageProcessor,
) -> tuple[Sequence[float] | None, Sequence[float] | None]:
    """Return the intensity window and the percentiles of the input spec, one of which is `None`."""
    spec = image_processor.input_spec or {}
    intensities = spec.get("window")
    percentiles = spec.get("percentiles")
    if intensities is None and percentiles is None:
        raise ValueError(
            "The image processor has no intensity window or percentiles for volumes. Set `intensities`, such as "
            "-160 240, or `percentiles` to the values used in training."
        )
    return intensities, percentiles


def stamps_of_volumes(paths: Sequence[Path]) -> list[list]:
    """Return the stamp of each file of each volume."""
    stamps = []
    for path in paths:
        stamps.append([file_stamp(file) for file in files_of(path)])
    return stamps


def predict_slices(
    predict: Predict,
    image_processor: BaseImageProcessor,
    slices: VolumeSlices,
    rows: RowFile,
    description: str,
) -> None:
    """Append the layers of [`layers_of`] to `rows`, from the first slice that it lacks."""
    num_layers = rows.shape[0]
    for index in tqdm(
        rows.indices[len(rows) :],
        initial=len(rows),
        total=len(rows.indices),
        desc=description,
    ):
        inputs = image_processor(
            slices.image(index),
            do_resize=False,
            input_spec=None,
            return_tensors="pt",
        )
        logits = predict(inputs.pixel_values)[0]
        layers = layers_of(logits, with_probabilities=num_layers > 1)
        rows.append(layers[None])


def write_niftis(
    outputs: Sequence[Path],
    rows: RowFile,
    volume: Volume,
    plane: str,
    class_names: Sequence[str],
) -> None:
    """Write the NIfTI file of the classes and, if `outputs` has a second path, that of the probabilities."""
    slices_with_layers_last = np.moveaxis(rows.whole(), 1, -1)
    layers = volume.uncut(slices_with_layers_last, plane)
    if len(outputs) > 1:
        save(
            layers[..., 1:],
            volume,
            outputs[1],
            class_names,
            "estimate",
            slope=1 / 255,
        )
    save(
        layers[..., 0],
        volume,
        outputs[0],
        class_names,
        "label",
    )


def save(
    values: np.ndarray,
    volume: Volume,
    path: Path,
    names: Sequence[str],
    intent: str,
    slope: float = 1.0,
) -> None:
    """Save a NIfTI file with the position of a volume. It appears under its name when it is complete.

    Args:
        values: uint8 of shape `(i, j, k, …)`.
        volume: volume with the header and the affine.
        path: path of the file to write.
        names: names of the classes.
        intent: NIfTI intent code of the values.
        slope: factor by which the values are multiplied on reading.
    """
    header = volume.header.copy()
    header.set_data_dtype(np.uint8)
    header.set_data_offset(0)
    header.set_intent(intent)
    header["cal_min"] = 0
    header["cal_max"] = 0
    comment = json.dumps({"classes": names}).encode()
    header.extensions.append(nibabel.nifti1.Nifti1Extension("comment", comment))
    image_class = nibabel.Nifti2Image if isinstance(header, nibabel.Nifti2Header) else nibabel.Nifti1Image
    image = image_class(values, volume.affine, header)
    image.header.set_slope_inter(slope, 0)
    with appears_whole(path) as unfinished, unfinished.open("wb") as file:
        if path.suffix.lower() == ".gz":
            # Python's default level of 9 takes most of the time of a prediction.
            level = nibabel.openers.Opener.default_compresslevel
            with gzip.GzipFile(
                "",
                "wb",
                level,
                file,
                mtime=0,
            ) as compressed_file:
                image.to_stream(compressed_file)
        else:
            image.to_stream(file)


def write_submission(
    trainer: "ViTPSegmentationTrainer",
    data: "DenseData",
    settings: dict[str, Any],
) -> None:
    """Predict the masks of a split with test-time augmentation, and write them to `submission` in the output folder.

    Args:
        trainer: trainer of the model.
        data: data set with the split.
        settings: `split`; `file`, the path pattern of a mask with the fields of the images of the split; and
            `encoding`, `"mask"` for the encoding of the data set (default) or `"index"` for class indices from 0.
    """
    folder = Path(trainer.args.output_dir) / "submission"
    shutil.rmtree(folder, ignore_errors=True)
    has_class_indices = settings.get("encoding", "mask") == "index"
    samples = data.open([settings["split"]])
    for index, (sample, _) in enumerate(tqdm(samples.rows, desc="Writing masks")):
        mask = trainer.predict_labels(samples[index]["images"], is_test=True)
        if not has_class_indices:
            mask = data.encoding.decode(mask)
        path = folder / fill(settings["file"], sample.fields)
        path.parent.mkdir(parents=True, exist_ok=True)
        PIL.Image.fromarray(mask).save(path)
    archive = shutil.make_archive(str(folder), "zip", folder)
    print(f"Submission for the benchmark server: {archive}")
