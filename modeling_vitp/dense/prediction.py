"""Prediction in overlapping windows and with test-time augmentation: tensors, large images, volumes, submissions."""

import gzip
import json
import math
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
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

from ..images.large import RowFile, appears_whole, file_stamp, open_images, part_path, weights_digest, whole_rows
from ..images.reading import is_tiff, window_starts
from ..images.volumes import NIFTI, Volume, VolumeSlices, check_cut, files_of
from ..training.fine_tuning_data import fill

if TYPE_CHECKING:
    from .data import DenseData, ImageFiles, LabelEncoding
    from .trainer import ViTPSegmentationTrainer

# One image, or several of the same ground (before and after), to logits: `(batch, channels, height, width)` each, to
# `(batch, classes, height, width)`.
Predict = Callable[..., torch.Tensor]


def sliding_window(
    predict: Predict,
    images: torch.Tensor | Sequence[torch.Tensor],
    window: int | tuple[int, int],
    stride: int | tuple[int, int],
    batch_size: int = 4,
) -> torch.Tensor:
    """Logits of images of any size from a model that sees one window at a time; the mean where windows overlap.

    Windows start at every multiple of the stride. The last one of a row or column is shifted back to end at the border,
    as in mmsegmentation's slide inference, so that every window is full. In a direction in which the image is smaller
    than the window, the window is the image.

    Args:
        predict: maps windows to logits, at the windows' size. It gets as many arguments as there are `images`, each of
            shape `(at most batch_size * batch, channels, window height, window width)`.
        images: of shape `(batch, channels, height, width)`, or several such of the same size: before and after.
        window, stride: height and width in pixels; a number is both. The stride is at most the window.
        batch_size: windows of each image that go through `predict` together, all of one row of windows.

    Returns:
        float32 of shape `(batch, classes, height, width)`, on the device of the logits.

    Raises:
        ValueError: if the stride is larger than the window or below 1, `batch_size` is below 1, the images differ in
            size, or `predict` gives another size than it got.
    """
    images = (images,) if isinstance(images, torch.Tensor) else tuple(images)
    sizes = [tuple(image.shape) for image in images]
    if len({(len(size), size[0], size[-2:]) for size in sizes}) != 1 or len(sizes[0]) != 4:
        raise ValueError(f"images have shapes {sizes}: (batch, channels, height, width) is needed, the same for all.")
    bands = predict_bands(
        predict,
        lambda top, bottom: tuple(image[:, :, top:bottom] for image in images),
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
) -> Iterator[tuple[int, torch.Tensor]]:
    """[`sliding_window`] from top to bottom over an image that need not fit into memory.

    Args:
        predict, window, stride, batch_size: as for [`sliding_window`].
        read: `read(top, bottom)` gives these rows of each image, `(batch, channels, bottom - top, width)`.
        size: height and width of the images.
        start: the row to begin at. What follows does not depend on it: windows above that reach below it are predicted
            again.

    Yields:
        `top, logits`: the image's next rows, from `top`, that no further window reaches; float32 of shape
        `(batch, classes, rows, width)`. One such band, and one row of windows, is in memory at a time.
    """
    window, stride = as_pair(window), as_pair(stride)
    if not all(1 <= step <= length for step, length in zip(stride, window)):
        raise ValueError(f"stride {stride} must be at least 1 and at most the window, {window}, to cover every pixel.")
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size} must be at least 1.")
    height, width = (min(length, extent) for length, extent in zip(window, size))
    tops, lefts = (window_starts(*lengths) for lengths in zip(size, (height, width), stride))
    row_counts, column_counts = times_covered(size[0], tops, height), times_covered(size[1], lefts, width)

    tops = [top for top in tops if top + height > start]
    sums = None  # of the logits, in the rows of the current windows
    for top, next_top in zip(tops, [*tops[1:], size[0]]):
        rows = read(top, top + height)
        for first in range(0, len(lefts), batch_size):
            batch = lefts[first : first + batch_size]
            windows = [torch.cat([image[..., left : left + width] for left in batch]) for image in rows]
            logits = predict(*windows)
            if logits.shape[-2:] != (height, width):
                raise ValueError(
                    f"predict gave logits of shape {tuple(logits.shape)} for windows of {height} x {width} pixels: "
                    "resize them to the windows."
                )
            if sums is None:
                sums = logits.new_zeros(len(rows[0]), logits.shape[1], height, size[1], dtype=torch.float32)
            for left, part in zip(batch, logits.chunk(len(batch))):
                sums[..., left : left + width] += part
        if next_top > start:
            skipped = max(start - top, 0)
            counts = (row_counts[top + skipped : next_top, None] * column_counts).to(sums.device)
            yield top + skipped, sums[:, :, skipped : next_top - top] / counts
        finished = next_top - top
        sums = torch.cat([sums[:, :, finished:], torch.zeros_like(sums[:, :, :finished])], dim=2)


def default_stride(window: int | tuple[int, int]) -> tuple[int, int]:
    """Three quarters of the window, 384 of 512."""
    height, width = as_pair(window)
    return max(3 * height // 4, 1), max(3 * width // 4, 1)


def as_pair(value: int | tuple[int, int]) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else tuple(value)


def times_covered(length: int, starts: list[int], window: int) -> torch.Tensor:
    """How many of the windows each place of an axis lies in."""
    counts = torch.zeros(length)
    for start in starts:
        counts[start : start + window] += 1
    return counts


def augmented(predict: Predict, scales: Sequence[float] = (1.0,), flip: bool = False) -> Predict:
    """Test-time augmentation: a `predict` that averages another's class probabilities over scales and mirror images.

    Probabilities (softmax of the logits), not logits, are averaged, each at the size of the input, as in
    mmsegmentation's test-time augmentation. Images are resampled bilinearly, with antialiasing when they shrink, and
    logits bilinearly.

    To augment whole images, as benchmarks do, put the windows inside:

    ```python
    predict = augmented(lambda images: sliding_window(logits_of, images, 512, 384), scales=(0.75, 1.0, 1.25), flip=True)
    ```

    Args:
        predict: maps one or several `(batch, channels, height, width)` to logits `(batch, classes, height, width)`.
        scales: factors of height and width, which are rounded to pixels.
        flip: whether to predict the image mirrored left to right, too.

    Returns:
        A function of the same arguments, which gives the log of the mean probabilities: logits, of which the softmax
        is that mean; float32.

    Raises:
        ValueError: if there is no scale, or one that is not positive.
    """
    if not scales or min(scales) <= 0:
        raise ValueError(f"scales={tuple(scales)}: one or more positive factors are needed.")

    def predict_augmented(*images: torch.Tensor) -> torch.Tensor:
        size = images[0].shape[-2:]
        total, count = None, 0
        for scale in scales:
            scaled_size = [max(round(length * scale), 1) for length in size]
            scaled = [
                image
                if list(image.shape[-2:]) == scaled_size
                else F.interpolate(image, scaled_size, mode="bilinear", antialias=scale < 1)
                for image in images
            ]
            for mirror in (False, True) if flip else (False,):
                logits = predict(*(image.flip(-1) if mirror else image for image in scaled)).float()
                logits = F.interpolate(logits.flip(-1) if mirror else logits, size, mode="bilinear")
                log_probabilities = logits.log_softmax(dim=1)
                total = log_probabilities if total is None else torch.logaddexp(total, log_probabilities)
                count += 1
        return total - math.log(count)

    return predict_augmented


__all__ = ["augmented", "predict_bands", "sliding_window"]


NO_CLASS = 255  # where the image has no data
BLOCK = 512  # of the GeoTIFFs, which are written in rows of blocks


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
) -> None:
    """Classes of every pixel of an image of any size, or of a pair of images of the same ground.

    The result is that of [`~modeling_vitp.dense.prediction.sliding_window`] over the whole image. One row of
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
        output: GeoTIFF to write (`.tif` or `.tiff`): class indices, uint8, with a colour table, the georeference of the
            (first) image and the names of the classes as tag `classes`. 255 where an image has no data (its nodata
            value, its mask, or an alpha of 0; to the model what is transparent is white, as in training).
        window, stride, batch_size: see [`~modeling_vitp.dense.prediction.sliding_window`]; windows overlap by a
            quarter if no stride is given.
        scales, flip: test-time augmentation of each window, see [`~modeling_vitp.dense.prediction.augmented`].
        probabilities: another GeoTIFF, with a band for each class: probabilities in steps of 1/255, which is the
            bands' scale.
        colors: red, green and blue, 0 to 255, of each class; matplotlib's `tab20` by default.

    Raises:
        ValueError: if the suffix of an output is another, the model takes another number of images, the two of a pair
            differ in size or georeference, the bands are not what the input spec needs, there are more than 255
            classes, an image is stored with an orientation (a tag of TIFF or EXIF) other than upright, or an unfinished
            run had other arguments.
        FileExistsError: if `output` or `probabilities` exists.
    """
    paths = [Path(image) for image in ([images] if isinstance(images, (str, os.PathLike)) else images)]
    outputs = [Path(path) for path in (output, probabilities) if path is not None]
    wrong = next((path for path in outputs if not is_tiff(path)), None)
    if wrong is not None:
        raise ValueError(f"{wrong}: what is predicted for an image is GeoTIFF, so name it .tif.")
    part = part_path(outputs)
    stride = default_stride(window) if stride is None else stride
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
        sources = stack.enter_context(open_images(paths, image_processor))
        first = sources[0].dataset
        rows = stack.enter_context(
            RowFile(
                part,
                shape=(1 if probabilities is None else 1 + num_labels, first.width),
                made_of={
                    "images": [file_stamp(path) for path in paths],
                    "model": weights_digest(model),
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
                lambda *windows: predict(
                    *(source.inputs(each, do_resize=False).pixel_values for source, each in zip(sources, windows))
                ),
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
            with open_geotiff(outputs[1], first, count=num_labels) as file:
                file.scales = [1 / 255] * num_labels
                file.descriptions = names
                for top, layers in rows.read(BLOCK):
                    file.write(layers[:, 1:].swapaxes(0, 1), window=whole_rows(first, top, top + len(layers)))
        nodata = NO_CLASS if any(source.is_masked for source in sources) else None
        with open_geotiff(outputs[0], first, count=1, nodata=nodata) as file:
            file.write_colormap(1, dict(enumerate(colors)))
            file.update_tags(classes=json.dumps(names))
            for top, layers in rows.read(BLOCK):
                file.write(layers[:, 0], 1, window=whole_rows(first, top, top + len(layers)))
    rows.delete()


@contextmanager
def open_geotiff(path: Path, like: DatasetReader, **profile) -> Iterator[DatasetWriter]:
    """A GeoTIFF of uint8 on the ground of another file, which appears under its name when it is whole."""
    points, points_crs = like.gcps
    if points:
        profile |= {"gcps": points, "crs": points_crs}
    elif not like.transform.is_identity:
        profile |= {"transform": like.transform, "crs": like.crs}
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


__all__ = ["predict_large"]


MAX_CLASSES = 256


@torch.inference_mode()
def predict_volume(
    model: PreTrainedModel,
    image_processor: BaseImageProcessor,
    volumes: str | os.PathLike | Sequence[str | os.PathLike],
    output: str | os.PathLike,
    *,
    plane: str = "axial",
    intensities: Sequence[float] | None = None,
    percentiles: Sequence[float] | None = None,
    window: int | tuple[int, int] = 512,
    stride: int | tuple[int, int] | None = None,
    batch_size: int = 4,
    scales: Sequence[float] = (1.0,),
    flip: bool = False,
    probabilities: str | os.PathLike | None = None,
) -> None:
    """Classes of every voxel of a volume.

    Slices are cut and windowed as those that fine-tuning trains on and scores
    ([`~modeling_vitp.dense.data.slice_volumes`]), and predicted one after the other as it predicts them. A slice and
    its logits are in memory, and nothing of the volume (of one shown by percentiles, at most 16 million values, once);
    it is unpacked to the disk if it is compressed.

    Slices that are finished go to `output` + `.part`. A run that was killed and is started again, with the same
    arguments, goes on after the last whole slice and ends with the same file, byte for byte, where the device's
    operations are deterministic. The result appears, under its name, when it is whole.

    Args:
        model: [`ViTPForSemanticSegmentation`], on the device to use.
        image_processor: the model's. Of its input spec the window or percentiles apply, where none are given.
        volumes: a NIfTI file, or the folder of a DICOM series; three of the same place are the channels of an image.
        output: NIfTI to write (`.nii.gz` or `.nii`): class indices, uint8, each where its voxel is in the (first)
            volume. Of NIfTI the header is kept, but for the type and range of the values and the intent, which is
            that of labels; of a DICOM series the affine has its position, orientation and spacing. The names of the
            classes are in a header extension, a comment in JSON.
        plane: that the model was trained in.
        intensities: low and high value in the volume's own units (Hounsfield units of CT), which are black and white.
        percentiles: instead, of the volume's values that are not 0.
        window, stride, batch_size: see [`~modeling_vitp.dense.prediction.sliding_window`]; windows overlap by a
            quarter if no stride is given.
        scales, flip: test-time augmentation of each slice, see [`~modeling_vitp.dense.prediction.augmented`].
        probabilities: another NIfTI, with a fourth axis of the classes: probabilities in steps of 1/255, which is the
            slope in its header.

    Raises:
        ValueError: in one line that names the file, if a volume cannot be read (see
            [`~modeling_vitp.images.volumes.open_volume`]), or the channels differ in shape or place; if it is not
            known what is black and white, the model takes pairs, or an unfinished run had other arguments.
        FileExistsError: if `output` or `probabilities` exists.
    """
    paths = [Path(path) for path in ([volumes] if isinstance(volumes, (str, os.PathLike)) else volumes)]
    outputs = [Path(path) for path in (output, probabilities) if path is not None]
    wrong = next((path for path in outputs if not path.name.lower().endswith(NIFTI)), None)
    if wrong is not None:
        raise ValueError(f"{wrong}: what is predicted for a volume is NIfTI, so name it .nii.gz.")
    part = part_path(outputs)
    stride = default_stride(window) if stride is None else stride
    if model.images_per_sample != 1:
        raise ValueError(f"{type(model).__name__} takes {model.images_per_sample} images, and not a volume.")
    num_labels = model.config.num_labels
    if num_labels > MAX_CLASSES:
        raise ValueError(f"the model has {num_labels} classes, but a voxel has room for {MAX_CLASSES}.")
    if intensities is None and percentiles is None:
        spec = image_processor.input_spec or {}
        intensities, percentiles = spec.get("window"), spec.get("percentiles")
        if intensities is None and percentiles is None:
            raise ValueError(
                "the image processor does not say which values of a volume are black and white: give intensities, such "
                "as -160 240, or percentiles, those of the training."
            )
    check_cut(plane, intensities, percentiles)
    slices = VolumeSlices(paths, plane, intensities, percentiles)
    volume = slices.volumes[0]
    model.eval()

    def logits(pixel_values: torch.Tensor) -> torch.Tensor:
        return model(pixel_values.to(model.device, model.dtype)).logits

    def whole(pixel_values: torch.Tensor) -> torch.Tensor:
        return sliding_window(logits, pixel_values, window, stride, batch_size)

    predict = augmented(whole, scales, flip) if flip or tuple(scales) != (1.0,) else whole
    made_of = {
        "volumes": [[file_stamp(file) for file in files_of(path)] for path in paths],
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
    layers = 1 if probabilities is None else 1 + num_labels
    with RowFile(part, (layers, *volume.size(plane)), made_of) as rows:
        for index in tqdm(range(len(rows), len(slices)), initial=len(rows), total=len(slices), desc=outputs[0].name):
            pixels = image_processor(slices.image(index), do_resize=False, input_spec=None, return_tensors="pt")
            scores = predict(pixels.pixel_values)[0]
            labels = scores.argmax(0, keepdim=True)
            if probabilities is not None:
                labels = torch.cat([labels, (scores.softmax(0) * 255).round()])
            rows.append(labels.to(torch.uint8).cpu().numpy()[None])
        found = volume.uncut(np.moveaxis(rows.whole(), 1, -1), plane)
        names = [model.config.id2label[index] for index in range(num_labels)]
        if probabilities is not None:
            save(found[..., 1:], volume, outputs[1], names, "estimate", slope=1 / 255)
        save(found[..., 0], volume, outputs[0], names, "label")
    rows.delete()


def save(values: np.ndarray, volume: Volume, path: Path, names: Sequence[str], intent: str, slope: float = 1.0) -> None:
    """A NIfTI in the place of a volume, which appears under its name when it is whole.

    Args:
        values: uint8 of shape `(i, j, k, …)`.
        slope: by which they are multiplied when they are read.
    """
    header = volume.header.copy()
    header.set_data_dtype(np.uint8)
    header.set_data_offset(0)
    header.set_intent(intent)
    header["cal_min"] = header["cal_max"] = 0
    header.extensions.append(nibabel.nifti1.Nifti1Extension("comment", json.dumps({"classes": names}).encode()))
    kind = nibabel.Nifti2Image if isinstance(header, nibabel.Nifti2Header) else nibabel.Nifti1Image
    image = kind(values, volume.affine, header)
    image.header.set_slope_inter(slope, 0)
    with appears_whole(path) as unfinished, unfinished.open("wb") as file:
        if path.suffix.lower() == ".gz":
            with gzip.GzipFile("", "wb", fileobj=file, mtime=0) as packed:
                image.to_stream(packed)
        else:
            image.to_stream(file)


def write_submission(trainer: "ViTPSegmentationTrainer", data: "DenseData", settings: dict[str, Any]) -> None:
    """The masks of a split in `submission` in the output folder, see [`write_masks`]."""
    folder = Path(trainer.args.output_dir) / "submission"
    write_masks(data.open([settings["split"]]), trainer, data.encoding, settings, folder)
    print(f"For the server: {folder}.zip")


def write_masks(
    samples: "ImageFiles",
    trainer: "ViTPSegmentationTrainer",
    encoding: "LabelEncoding",
    settings: Mapping,
    folder: Path,
) -> Path:
    """Predicts each sample, with test-time augmentation, and writes the masks to a folder and to a zip beside it.

    Args:
        samples: of the split that the server scores.
        trainer: of the model.
        encoding: the classes.
        settings: `file`, where a mask belongs: a pattern with the fields of the split's images; `encoding`: `"mask"`,
            as the data set's own masks (by default), or `"index"`, the place among the classes from 0.
        folder: is created, or replaced.

    Returns:
        The folder.

    Raises:
        ValueError: if the split is cut into windows, which a server does not score.
    """
    if any(box is not None for _, box in samples.rows):
        raise ValueError("submission: a server scores whole images, so its split may not have `tile`.")
    shutil.rmtree(folder, ignore_errors=True)
    for index, (sample, _) in enumerate(tqdm(samples.rows, desc="Masks for the server")):
        prediction = trainer.predict_labels(samples[index]["images"], is_test=True)
        path = folder / fill(settings["file"], sample.fields)
        path.parent.mkdir(parents=True, exist_ok=True)
        mask = prediction if settings.get("encoding", "mask") == "index" else encoding.decode(prediction)
        PIL.Image.fromarray(mask).save(path)
    shutil.make_archive(str(folder), "zip", folder)
    return folder
