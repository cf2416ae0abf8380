"""Prediction for a GeoTIFF or PNG that need not fit into memory, to a GeoTIFF of classes on the same ground."""

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import matplotlib
import numpy as np
import rasterio
import torch
from rasterio.io import DatasetReader, DatasetWriter
from tqdm.auto import tqdm
from transformers import BaseImageProcessor, PreTrainedModel

from ..images.large import open_images, whole_rows
from ..images.reading import is_tiff
from ..images.unfinished import RowFile, appears_whole, digest, fingerprint, part_of
from .sliding_window import augmented, default_stride, predict_bands

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
        output: GeoTIFF to write (`.tif` or `.tiff`): class indices, uint8, with a colour table, the georeference of the
            (first) image and the names of the classes as tag `classes`. 255 where an image has no data (its nodata
            value, its mask, or an alpha of 0; to the model what is transparent is white, as in training).
        window, stride, batch_size: see [`~modeling_vitp.dense.sliding_window.sliding_window`]; windows overlap by a
            quarter if no stride is given.
        scales, flip: test-time augmentation of each window, see [`~modeling_vitp.dense.sliding_window.augmented`].
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
    part = part_of(outputs)
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


@contextmanager
def write_whole(path: Path, like: DatasetReader, **profile) -> Iterator[DatasetWriter]:
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
