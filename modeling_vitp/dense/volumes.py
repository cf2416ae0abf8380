"""NIfTI volumes as slices: cut once in a chosen plane, windowed to 8 bits, and kept in the cache of `datasets`."""

from collections.abc import Iterator, Mapping, Sequence

import datasets
import nibabel
import numpy as np
import PIL.Image

from ..training.files import FileSample
from .classes import LabelEncoding

PLANES = {"sagittal": 0, "coronal": 1, "axial": 2}


def slice_volumes(
    samples: Sequence[FileSample],
    encoding: LabelEncoding,
    plane: str = "axial",
    window: Sequence[float] | None = None,
    percentiles: Sequence[float] | None = None,
    foreground_only: bool = False,
    num_proc: int | None = None,
) -> datasets.Dataset:
    """The slices of volumes as rows with `id`, `case`, `image` and, if there are masks, `mask`.

    Volumes are turned to the closest canonical axes (right, anterior, superior). In a slice, the last axis of the two
    that are left points up and the first one to the right.

    Args:
        samples: with one file, whose values become grey, or three, which become the channels of an image.
        encoding: by which it is told whether a slice has foreground.
        plane: `"axial"`, `"coronal"` or `"sagittal"`.
        window: low and high value of the volume's own units, which become black and white.
        percentiles: instead, low and high in [0, 100] of each volume's values that are not 0.
        foreground_only: leaves out slices without a pixel of a class other than the first.
        num_proc: processes that cut.

    Raises:
        ValueError: names the volume that cannot be read, has values that are not finite, is of another shape or
            place than its mask or the other channels, or has a mask that is not of whole numbers.
    """
    if plane not in PLANES:
        raise ValueError(f"plane={plane!r} is none of {sorted(PLANES)}.")
    if (window is None) == (percentiles is None):
        raise ValueError("Volumes need either `window` or `percentiles`: which values become black and white.")
    features = {"id": datasets.Value("string"), "case": datasets.Value("string"), "image": datasets.Image()}
    if samples[0].mask is not None:
        features["mask"] = datasets.Image()
    # With times of change, so that the cache is not used for files that are no longer the same.
    files = [(sample, [path.stat().st_mtime_ns for path in sample.images]) for sample in samples]
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
    for sample, _ in files:
        volumes = [read_volume(path) for path in sample.images]
        masks = [] if sample.mask is None else [read_volume(sample.mask)]
        for path, volume in zip([*sample.images, sample.mask], volumes + masks):
            if volume.shape != volumes[0].shape:
                raise ValueError(f"{path} has shape {volume.shape}, but {sample.images[0]} {volumes[0].shape}.")
            if not np.allclose(volume.affine, volumes[0].affine, atol=1e-2):
                raise ValueError(f"{path} lies elsewhere than {sample.images[0]}: their affines differ.")
        channels = [to_grey(volume, path, settings) for volume, path in zip(volumes, sample.images)]
        labels = [whole_numbers(mask, sample.mask) for mask in masks]
        axis = PLANES[settings["plane"]]
        for index in range(volumes[0].shape[axis]):
            row = {"id": f"{sample.id}/{settings['plane']}_{index:04d}", "case": sample.case}
            # The first axis to the right, the last one up.
            cut = [np.ascontiguousarray(np.rot90(values.take(index, axis))) for values in channels + labels]
            row["image"] = PIL.Image.fromarray(cut[0] if len(channels) == 1 else np.stack(cut[: len(channels)], -1))
            if labels:
                indices = encoding.encode(cut[-1].astype(np.int32), str(sample.mask))
                if settings["foreground_only"] and not ((indices > 0) & (indices < len(classes))).any():
                    continue
                row["mask"] = PIL.Image.fromarray(cut[-1])
            yield row


def read_volume(path) -> nibabel.Nifti1Image:
    try:
        volume = nibabel.as_closest_canonical(nibabel.load(path))
        values = volume.get_fdata(dtype=np.float32)
    except Exception as error:  # nibabel raises many kinds for a broken file
        raise ValueError(f"{path} cannot be read: {error}") from error
    if values.ndim != 3:
        raise ValueError(f"{path} has {values.ndim} axes, but a volume has three.")
    finite = np.isfinite(values)
    if not finite.all():
        raise ValueError(f"{path} has {(~finite).sum()} values that are NaN or infinite: repair or remove it.")
    return volume


def to_grey(volume: nibabel.Nifti1Image, path, settings: Mapping) -> np.ndarray:
    values = volume.get_fdata(dtype=np.float32)
    low_high = settings["window"]
    if low_high is None:
        inside = values[values != 0]
        if not inside.size:
            raise ValueError(f"{path} is 0 everywhere.")
        low_high = np.percentile(inside, settings["percentiles"])
    low, high = low_high
    if not low < high:
        raise ValueError(f"{path}: the window from {low} to {high} is empty.")
    return (255 * np.clip((values - low) / (high - low), 0, 1)).round().astype(np.uint8)


def whole_numbers(mask: nibabel.Nifti1Image, path) -> np.ndarray:
    values = mask.get_fdata(dtype=np.float32)
    labels = values.astype(np.uint8)
    if (labels != values).any():
        raise ValueError(f"The mask {path} has values that are no whole numbers from 0 to 255.")
    return labels
