"""Volumes, NIfTI or DICOM, as slices: cut once in a plane, windowed to 8 bits, in the cache of `datasets`."""

from collections.abc import Iterator, Mapping, Sequence

import datasets
import numpy as np
import PIL.Image

from ..images.slices import VolumeSlices, check_cut
from ..images.volumes import files_of
from ..training.files import FileSample
from .classes import LabelEncoding


def slice_volumes(
    samples: Sequence[FileSample],
    encoding: LabelEncoding,
    plane: str = "axial",
    window: Sequence[float] | None = None,
    percentiles: Sequence[float] | None = None,
    foreground_only: bool = False,
    num_proc: int | None = None,
) -> datasets.Dataset:
    """The slices of volumes as rows with `id`, `case`, the volume's id, `image`, if there are masks `mask`, and unless
    only those with foreground are there, `place` among the slices of the volume and `spacing` (see
    [`~modeling_vitp.images.volumes.Volume.spacing`]).

    A slice is as [`~modeling_vitp.images.volumes.Volume`] cuts it.

    Args:
        samples: with one file (NIfTI, or the folder of a DICOM series), whose values become grey, or three, which
            become the channels of an image.
        encoding: by which it is told whether a slice has foreground.
        plane: `"axial"`, `"coronal"` or `"sagittal"`.
        window: low and high value of the volume's own units, which become black and white.
        percentiles: instead, low and high in [0, 100] of each volume's values that are not 0.
        foreground_only: leaves out slices without a pixel of a class other than the first.
        num_proc: processes that cut.

    Raises:
        ValueError: names the volume that cannot be read (see [`~modeling_vitp.images.volumes.open_volume`]), is of
            another shape or place than its mask or the other channels, or has a mask that is not of whole numbers.
    """
    check_cut(plane, window, percentiles)
    features = {"id": datasets.Value("string"), "case": datasets.Value("string"), "image": datasets.Image()}
    if samples[0].mask is not None:
        features["mask"] = datasets.Image()
    if not foreground_only:
        features |= {"place": datasets.Value("int32"), "spacing": datasets.List(datasets.Value("float64"), length=3)}
    # With times of change, so that the cache is not used for files that are no longer the same.
    files = [
        (sample, [file.stat().st_mtime_ns for path in (*sample.images, sample.mask) if path for file in files_of(path)])
        for sample in samples
    ]
    settings = {"plane": plane, "window": window, "percentiles": percentiles, "foreground_only": foreground_only}
    settings |= {"classes": [(item.value, item.name) for item in encoding.classes], "ignore": encoding.ignore}
    try:
        return datasets.Dataset.from_generator(
            slices,
            features=datasets.Features(features),
            gen_kwargs={"files": files, "settings": settings},
            num_proc=min(num_proc, len(files)) if num_proc else None,
        )
    except datasets.exceptions.DatasetGenerationError as error:
        raise error.__cause__ from None


def slices(files: list[tuple[FileSample, list[int]]], settings: Mapping) -> Iterator[dict]:
    classes = [{"name": name, "value": value} for value, name in settings["classes"]]
    encoding = LabelEncoding(classes, ignore=settings["ignore"])
    plane = settings["plane"]
    for sample, _ in files:
        cuts = VolumeSlices(sample.images, plane, settings["window"], settings["percentiles"], sample.mask)
        for index in range(len(cuts)):
            row = {"id": f"{sample.id}/{plane}_{index:04d}", "case": sample.id, "image": cuts.image(index)}
            if sample.mask is not None:
                labels = cuts.mask(index)
                indices = encoding.encode(labels.astype(np.int32), str(sample.mask))
                if settings["foreground_only"] and not ((indices > 0) & (indices < len(classes))).any():
                    continue
                row["mask"] = PIL.Image.fromarray(labels)
            if not settings["foreground_only"]:
                row |= {"place": index, "spacing": cuts.volumes[0].spacing(plane)}
            yield row
