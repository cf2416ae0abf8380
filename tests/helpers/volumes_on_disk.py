"""Volumes on disk: generated DICOM series, and those of pydicom."""

from pathlib import Path

import numpy as np
import pydicom
from pydicom.data import get_testdata_file
from pydicom.dataset import FileMetaDataset
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, generate_uid

# A patient in pydicom's wheel: five slices of CT with 16 x 16 pixels, 2.5 mm apart.
CT_SERIES = Path(get_testdata_file("DICOMDIR")).parent / "98892001" / "CT5N"
OBLIQUE = [0.8, 0.6, 0.0, 0.0, 0.0, -1.0]  # direction cosines of a row and of a column


def write_series(
    folder: Path,
    values: np.ndarray,
    orientation=(1.0, 0.0, 0.0, 0.0, 1.0, 0.0),
    position=(-20.0, -30.0, 5.0),
    spacing=(2.0, 0.5, 0.75),
    patient: str = "patient",
    **tags,
) -> list[Path]:
    """Write a file for each slice of CT; the order of the file names differs from that in space.

    Args:
        values: int16 of shape `(slices, rows, columns)`, in Hounsfield units.
        spacing: distances between slices, rows and columns.
        tags: tags of all files; `None` removes a tag.
    """
    folder.mkdir(parents=True, exist_ok=True)
    normal = np.cross(orientation[:3], orientation[3:])
    series, names, paths = generate_uid(), np.random.default_rng(0).permutation(len(values)), []
    for index, pixels in enumerate(values):
        dataset = pydicom.Dataset()
        dataset.file_meta = FileMetaDataset()
        dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
        dataset.SOPClassUID, dataset.SOPInstanceUID = CTImageStorage, generate_uid()
        dataset.file_meta.MediaStorageSOPClassUID = CTImageStorage
        dataset.file_meta.MediaStorageSOPInstanceUID = dataset.SOPInstanceUID
        dataset.Modality, dataset.PatientID, dataset.SeriesInstanceUID = "CT", patient, series
        dataset.SamplesPerPixel, dataset.PhotometricInterpretation = 1, "MONOCHROME2"
        dataset.Rows, dataset.Columns = pixels.shape
        dataset.BitsAllocated = dataset.BitsStored = 16
        dataset.HighBit, dataset.PixelRepresentation = 15, 0
        dataset.RescaleSlope, dataset.RescaleIntercept = 1, -1024
        dataset.PixelSpacing, dataset.SliceThickness = list(spacing[1:]), spacing[0]
        dataset.ImageOrientationPatient = list(orientation)
        dataset.ImagePositionPatient = [round(float(v), 6) for v in position + index * spacing[0] * normal]
        for tag, value in tags.items():
            if value is None:
                delattr(dataset, tag)
            else:
                setattr(dataset, tag, value)
        dataset.PixelData = (pixels + 1024).astype(np.uint16).tobytes()
        paths.append(folder / f"{names[index]:03d}")
        dataset.save_as(paths[-1], enforce_file_format=True)
    return paths


def check_geometry(affine: np.ndarray, folder: Path) -> None:
    """Check an affine of `(column, row, slice)` against the headers of a series (DICOM PS3.3, C.7.6.2.1.1)."""
    headers = [pydicom.dcmread(path) for path in folder.iterdir()]
    along_row, along_column = np.array(headers[0].ImageOrientationPatient, dtype=float).reshape(2, 3)
    headers.sort(key=lambda one: np.cross(along_row, along_column) @ np.array(one.ImagePositionPatient, dtype=float))
    for place, one in enumerate(headers):
        for column, row in ((0, 0), (one.Columns - 1, 0), (3, one.Rows - 1)):
            step_row, step_column = map(float, one.PixelSpacing)
            there = np.array(one.ImagePositionPatient, dtype=float)
            there += along_row * step_column * column + along_column * step_row * row
            right_anterior_superior = there * [-1, -1, 1]
            np.testing.assert_allclose(affine @ [column, row, place, 1], [*right_anterior_superior, 1], atol=1e-3)
