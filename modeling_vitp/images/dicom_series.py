"""A DICOM series, one file a slice: its files in their order in space, its place, and its values."""

import tempfile
from pathlib import Path

import numpy as np
import pydicom

from .dicom import number_of_frames, open_dicom, read_frame
from .reading import is_dicom_file

TOLERANCE = 0.05  # of the distance of slices, by which a slice may lie beside its place
SAME = 1e-4  # of direction cosines and spacings, which files have with few digits


def series_files(folder: Path) -> list[Path]:
    """The DICOM files in a folder itself, whatever their names."""
    return [path for path in sorted(folder.iterdir()) if path.is_file() and is_dicom_file(path)]


def read_series(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """The values of a series in the units of its tags, and where they are.

    Returns:
        Float32 of shape `(columns, rows, slices)`, NaN where there is padding, mapped from an unnamed file, so that it
        takes no memory; and the affine from its indices to millimeters to the right, to the front and up, float64 of
        shape `(4, 4)`. Slices go along the normal of the image plane (DICOM PS3.3, C.7.6.2.1.1).

    Raises:
        ValueError: in one line that names the file, if there is no series, or more than one; slices are missing, are
            there twice, or differ in size, spacing or orientation; there is no spacing; a file has several frames or
            colors, is damaged, or is compressed without a decoder for it.
    """
    headers = read_headers(folder)
    check_alike(headers)
    headers, affine = in_order(headers)
    first = headers[0][1]
    shape = len(headers), first.Rows, first.Columns
    file = tempfile.TemporaryFile()
    values = np.memmap(file, np.float32, "w+", shape=shape)
    for place, (path, _) in enumerate(headers):
        try:
            values[place] = read_frame(open_dicom(path, path), path).values
        except ValueError as error:
            raise error if str(path) in str(error) else ValueError(f"{path} cannot be read: {error}") from error
        except Exception as error:  # of many kinds, for a broken file
            raise ValueError(f"{path} cannot be read: {error}") from error
    return values.transpose(2, 1, 0), affine


def read_headers(folder: Path) -> list[tuple[Path, pydicom.Dataset]]:
    """Of the files that have an image."""
    headers = []
    for path in series_files(folder):
        try:
            dataset = pydicom.dcmread(path, stop_before_pixels=True)
        except Exception as error:  # of many kinds, for a broken file
            raise ValueError(f"{path} cannot be read: {error}") from error
        if "Rows" in dataset and "Columns" in dataset:
            headers.append((path, dataset))
    if not headers:
        below = next(
            (path.parent for path in sorted(folder.rglob("*")) if path.is_file() and is_dicom_file(path)), None
        )
        found = f"; {below} has: give the folder of one series" if below else ""
        raise ValueError(f"{folder} has no DICOM image in it{found}.")
    return headers


def check_alike(headers: list[tuple[Path, pydicom.Dataset]]) -> None:
    first_path, first = headers[0]
    for path, dataset in headers:
        if number_of_frames(dataset) > 1 or dataset.get("SamplesPerPixel", 1) != 1:
            kind = "frames" if number_of_frames(dataset) > 1 else "colors"
            raise ValueError(f"{path} has several {kind}, not one grey slice: convert it to NIfTI, with dcm2niix say.")
        for tag in ("ImageOrientationPatient", "ImagePositionPatient", "PixelSpacing"):
            if not dataset.get(tag):
                raise ValueError(f"{path} has no {tag}, so its spacing and place are not known.")
        if min(dataset.PixelSpacing) <= 0:
            raise ValueError(f"{path} has no spacing: PixelSpacing is {list(map(float, dataset.PixelSpacing))}.")
        if dataset.get("SeriesInstanceUID") != first.get("SeriesInstanceUID"):
            raise ValueError(
                f"{path} is of another series than {first_path}: put each series into a folder of its own."
            )
        if (dataset.Rows, dataset.Columns) != (first.Rows, first.Columns):
            raise ValueError(
                f"{path} is {dataset.Columns} x {dataset.Rows} pixels, but {first_path} {first.Columns} x {first.Rows}."
            )
        for tag, what in (("ImageOrientationPatient", "orientation"), ("PixelSpacing", "spacing")):
            if not np.allclose(dataset[tag].value, first[tag].value, atol=SAME, rtol=0):
                raise ValueError(
                    f"{path} has another {what} than {first_path}, {numbers(dataset[tag].value)} and "
                    f"{numbers(first[tag].value)}: they are no slices of one volume."
                )


def in_order(headers: list[tuple[Path, pydicom.Dataset]]) -> tuple[list[tuple[Path, pydicom.Dataset]], np.ndarray]:
    """The slices along their normal, and the affine of `(column, row, slice)`."""
    first = headers[0][1]
    along_row, along_column = np.array(first.ImageOrientationPatient, dtype=np.float64).reshape(2, 3)
    normal = np.cross(along_row, along_column)
    headers = sorted(headers, key=lambda header: normal @ np.array(header[1].ImagePositionPatient, dtype=np.float64))
    positions = np.array([dataset.ImagePositionPatient for _, dataset in headers], dtype=np.float64)
    if len(headers) == 1:
        path, dataset = headers[0]
        thickness = float(dataset.get("SpacingBetweenSlices") or dataset.get("SliceThickness") or 0)
        if thickness <= 0:
            raise ValueError(f"{path} is one slice without SliceThickness, so its spacing is not known.")
        step = thickness * normal
    else:
        check_steps(headers, positions @ normal)
        step = (positions[-1] - positions[0]) / (len(headers) - 1)
        beside = np.linalg.norm(positions - positions[0] - np.arange(len(headers))[:, None] * step, axis=1)
        worst = int(beside.argmax())
        if beside[worst] > TOLERANCE * np.linalg.norm(step):
            raise ValueError(f"{headers[worst][0]} lies {beside[worst]:.2f} mm beside the line of the other slices.")
    between_rows, between_columns = map(float, first.PixelSpacing)
    affine = np.eye(4)
    affine[:3] = np.stack([between_columns * along_row, between_rows * along_column, step, positions[0]], axis=1)
    # DICOM's axes go to the left and to the back, NIfTI's to the right and to the front.
    return headers, np.diag([-1.0, -1.0, 1.0, 1.0]) @ affine


def check_steps(headers: list[tuple[Path, pydicom.Dataset]], places: np.ndarray) -> None:
    """Slices may be neither missing nor there twice."""
    steps = np.diff(places)
    usual = np.median(steps)
    for index, step in enumerate(steps):
        before, after = headers[index][0], headers[index + 1][0]
        if step <= TOLERANCE * usual or step <= SAME:
            raise ValueError(f"{before} and {after} are at the same place: a series has one file for each slice.")
        if abs(step - usual) > TOLERANCE * usual:
            raise ValueError(
                f"{before} and {after} are {step:.2f} mm apart, but most neighbors {usual:.2f} mm: slices are missing."
            )


def numbers(values) -> str:
    return ", ".join(f"{float(value):.4g}" for value in values)
