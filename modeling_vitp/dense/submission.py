"""Predictions as a benchmark's server takes them: masks in the data set's own encoding, in a zip archive."""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import PIL.Image
from tqdm import tqdm

from ..training.files import fill
from .classes import LabelEncoding
from .data import DenseData
from .samples import ImageFiles
from .trainer import DenseTrainer


def write_submission(trainer: DenseTrainer, data: DenseData, settings: dict[str, Any]) -> None:
    """The masks of a split in `submission` in the output folder, see [`write_masks`]."""
    folder = Path(trainer.args.output_dir) / "submission"
    write_masks(data.open([settings["split"]]), trainer, data.encoding, settings, folder)
    print(f"For the server: {folder}.zip")


def write_masks(
    samples: ImageFiles, trainer: DenseTrainer, encoding: LabelEncoding, settings: Mapping, folder: Path
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
