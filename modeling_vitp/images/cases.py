"""Which patient an image is of, where its file says so, and whether two files hold the same volume."""

import gzip
import hashlib
from pathlib import Path

from .reading import is_dicom_file


def patient_of(path: Path) -> str | None:
    """What DICOM's tags say: the patient, or else the study or series. `None` of other files.

    Args:
        path: of a file, or of the folder of a series.
    """
    if path.is_dir():
        path = next((file for file in sorted(path.iterdir()) if file.is_file() and is_dicom_file(file)), path)
    if not path.is_file() or not is_dicom_file(path):
        return None
    import pydicom

    tags = ("PatientID", "StudyInstanceUID", "SeriesInstanceUID")
    try:
        dataset = pydicom.dcmread(path, specific_tags=list(tags), stop_before_pixels=True)
    except Exception:  # of many kinds, for a broken file, which is named where it is read
        return None
    return next((f"{tag} {dataset[tag].value}" for tag in tags if str(dataset.get(tag) or "").strip()), None)


def content_digest(path: Path) -> bytes:
    """Of a file, unpacked if it is NIfTI in gzip, or of all files of a folder."""
    digest = hashlib.sha256()
    if path.is_dir():
        for part in sorted(content_digest(file) for file in path.iterdir() if file.is_file()):
            digest.update(part)
        return digest.digest()
    with gzip.open(path) if path.name.lower().endswith(".nii.gz") else path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.digest()


def packed_key(path: Path) -> int:
    """The size of a file; of one in gzip the checksum and size of what is packed, whatever packed it."""
    with path.open("rb") as file:
        if file.read(2) != b"\x1f\x8b":
            return path.stat().st_size
        file.seek(-8, 2)
        return int.from_bytes(file.read(8), "little")
