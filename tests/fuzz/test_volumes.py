"""DICOM series and NIfTI volumes with changed tags or damaged bytes are read, or raise an error that names a file."""

import random
import shutil
from pathlib import Path

import nibabel
import numpy as np
import pydicom
import pytest
from fuzzing import check_outcomes, damage, limits, outcome
from volumes_on_disk import write_series

from modeling_vitp.images.volumes import open_volume

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore"),  # pydicom and nibabel warn about broken files.
]
VALUES = np.arange(4 * 6 * 8, dtype=np.int16).reshape(4, 6, 8)
# Texts of tags as they stand in a file, where pydicom does not check them.
TEXTS = ["", "x", "nan", "inf", "-1", "0", "1e300", "1\\x", "1", "1\\2", "1\\2\\3", "1\\2\\3\\4\\5\\6", "0\\0\\0", "\\"]
TAGS = [
    "PixelSpacing",
    "ImagePositionPatient",
    "ImageOrientationPatient",
    "SliceThickness",
    "RescaleSlope",
    "RescaleIntercept",
    "Modality",
    "SeriesInstanceUID",
    "PatientID",
]
NUMBERS = ["Rows", "Columns", "BitsAllocated", "BitsStored", "HighBit", "PixelRepresentation", "SamplesPerPixel"]


def change_tag(rng: random.Random, path: Path) -> None:
    """Remove a tag of a DICOM file, or replace its value."""
    dataset = pydicom.dcmread(path)
    name = rng.choice(TAGS + NUMBERS)
    if rng.random() < 0.3:
        delattr(dataset, name)
    elif name in NUMBERS:
        setattr(dataset, name, rng.choice([0, 1, 2, 7, 8, 16, 32, 65535]))
    else:
        element = dataset[name]
        # The text is written as it is: a setter would convert or refuse it.
        raw = pydicom.dataelem.RawDataElement(
            element.tag, element.VR, 0, rng.choice(TEXTS).encode(), 0, False, True, True
        )
        del dataset[name]
        dataset._dict[element.tag] = raw
    dataset.save_as(path)


def damage_slices(rng: random.Random, folder: Path) -> None:
    """Change a tag of one or of all slices, damage the bytes of one, or remove, repeat or replace one."""
    paths = sorted(folder.iterdir())
    path = rng.choice(paths)
    way = rng.choice(["tag"] * 5 + ["tags", "bytes", "bytes", "bytes", "remove", "repeat", "text"])
    if way == "tag":
        change_tag(rng, path)
    elif way == "tags":
        state = rng.getstate()
        for slice_path in paths:
            rng.setstate(state)
            change_tag(rng, slice_path)
    elif way == "bytes":
        path.write_bytes(damage(rng, path.read_bytes()))
    elif way == "remove":
        path.unlink()
    elif way == "repeat":
        shutil.copy(path, folder / "repeated")
    else:
        (folder / "notes.txt").write_text("scanned on Monday")


def read(path: Path) -> np.ndarray:
    volume = open_volume(path)
    return np.stack([np.asarray(volume.cut("axial", index)) for index in range(volume.number("axial"))])


def test_damaged_series_is_read_or_named(tmp_path):
    rng = random.Random(12)
    results = []
    with limits():
        for number in range(200):
            folder = tmp_path / f"series_{number}"
            write_series(folder, VALUES)
            damage_slices(rng, folder)
            result = outcome(lambda: read(folder), folder.name)  # noqa: B023 called at once
            results.append(result)
            shutil.rmtree(folder)
    check_outcomes(results, 20)


def test_damaged_nifti_is_read_or_named(tmp_path):
    rng = random.Random(13)
    results = []
    with limits():
        for number in range(150):
            path = tmp_path / f"volume_{number}.nii{rng.choice(['', '.gz'])}"
            nibabel.save(nibabel.Nifti1Image(VALUES, np.diag([0.5, 0.75, 2.0, 1.0])), path)
            path.write_bytes(damage(rng, path.read_bytes()))
            results.append(outcome(lambda: read(path), path.name))  # noqa: B023
            path.unlink()
    check_outcomes(results, 20)
