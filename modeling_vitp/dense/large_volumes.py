"""Prediction for a NIfTI volume or a DICOM series, slice by slice, to a NIfTI of classes in the same place."""

import gzip
import json
import os
from collections.abc import Sequence
from pathlib import Path

import nibabel
import numpy as np
import torch
from tqdm.auto import tqdm
from transformers import BaseImageProcessor, PreTrainedModel

from ..images.slices import VolumeSlices, check_cut
from ..images.unfinished import RowFile, appears_whole, digest, fingerprint, part_of
from ..images.volumes import NIFTI, Volume, files_of
from .sliding_window import augmented, default_stride, sliding_window

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
    ([`~modeling_vitp.dense.volumes.slice_volumes`]), and predicted one after the other as it predicts them. A slice and
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
        window, stride, batch_size: see [`~modeling_vitp.dense.sliding_window.sliding_window`]; windows overlap by a
            quarter if no stride is given.
        scales, flip: test-time augmentation of each slice, see [`~modeling_vitp.dense.sliding_window.augmented`].
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
    part = part_of(outputs)
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
        "volumes": [[fingerprint(file) for file in files_of(path)] for path in paths],
        "model": digest(model),
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
