"""Reading of images with a visitor's slice, window and bands; volumes and JPEG 2000."""

import gzip
import os
import subprocess
import sys

import limits
import nibabel
import numpy as np
import pydicom
import pytest
import rasterio
from adjusting import PRESETS, Adjustment, adjustment_of
from headers import check_header
from paths import ROOT
from pictures import picture
from PIL import Image
from pydicom.data import get_testdata_file
from reading import UnreadableImage
from uploading import open_pixels, open_upload


@pytest.fixture
def volume(tmp_path):
    """Return the values i + 10 * j + 100 * k, with axes to the right, to the front and up, and their file."""
    values = np.add.outer(np.add.outer(np.arange(6), 10 * np.arange(8)), 100 * np.arange(4)).astype(np.int16)
    path = tmp_path / "brain.nii.gz"
    nibabel.save(nibabel.Nifti1Image(values, np.eye(4)), path)
    return values, path


@pytest.mark.parametrize(("position", "index"), [(0, 0), (49, 1), (50, 2), (100, 3)])
def test_volume_slice_is_seen_from_the_feet(volume, position, index):
    values, path = volume
    reading = open_upload(str(path), adjustment=Adjustment(position=position))
    np.testing.assert_array_equal(reading.image[0], values[:, ::-1, index].T)
    assert f"NIfTI, slice {index + 1} of 4, 6 × 8 pixels, percentiles 2 to 98" in reading.note
    rgb, note = open_pixels(str(path), max_side=4)
    assert rgb.shape == (4, 3, 3) and note.startswith("brain.nii.gz: ")


def test_large_and_invalid_volumes_are_rejected(volume, tmp_path, monkeypatch):
    _, path = volume
    check_header(path)
    (tmp_path / "bomb.nii.gz").write_bytes(gzip.compress(gzip.decompress(path.read_bytes()) + bytes(5_000_000)))
    monkeypatch.setattr(limits, "VOLUME_BYTES", 2_000_000)
    with pytest.raises(UnreadableImage, match="bomb.nii.gz has . MB when unpacked"):
        check_header(tmp_path / "bomb.nii.gz")
    (tmp_path / "text.nii").write_text("no volume")
    with pytest.raises(Exception, match="text.nii cannot be read") as caught:
        open_upload(str(tmp_path / "text.nii"))
    assert str(tmp_path) not in str(caught.value)


@pytest.mark.parametrize("preset", PRESETS)
def test_ct_windows_use_hounsfield_units(preset):
    path = get_testdata_file("CT_small.dcm", download=False)
    dataset = pydicom.dcmread(path)
    units = dataset.pixel_array * float(dataset.RescaleSlope) + float(dataset.RescaleIntercept)
    low, high = PRESETS[preset]
    expected = 255 * np.clip((units - low) / (high - low), 0, 1)
    rgb, note = open_pixels(path, adjustment=Adjustment(preset=preset))
    assert np.abs(rgb[..., 0] - expected).max() <= 0.5 + 1e-6
    assert f"window {low:g} to {high:g}" in note


def test_bands_and_percentiles_follow_the_controls(tmp_path):
    data = np.random.default_rng(0).integers(0, 4000, (5, 20, 30)).astype(np.uint16)
    with rasterio.open(tmp_path / "a.tif", "w", driver="GTiff", height=20, width=30, count=5, dtype="uint16") as target:
        target.write(data)
    rgb, note = open_pixels(
        str(tmp_path / "a.tif"), adjustment=adjustment_of(50, "as the file says", "5, 1, 2", 10, 90)
    )
    for channel, band in enumerate((4, 0, 1)):
        low, high = np.percentile(data[band], (10, 90))
        expected = 255 * np.clip((data[band] - low) / (high - low), 0, 1)
        assert np.abs(rgb[..., channel] - expected).max() <= 1
    assert "bands 5, 1, 2 of 5" in note and "percentiles 10 to 90" in note
    for bands in ("1, 2", "0", "red", "1;2;3;4"):
        with pytest.raises(ValueError, match="band numbers"):
            adjustment_of(50, "as the file says", bands, 2, 98)


def test_jpeg_2000_is_read(tmp_path):
    pixels = np.asarray(picture(64, 48)).transpose(2, 0, 1)
    options = {"driver": "JP2OpenJPEG", "height": 48, "width": 64, "count": 3, "dtype": "uint8"}
    with rasterio.open(tmp_path / "a.jp2", "w", **options, QUALITY="100", REVERSIBLE="YES") as target:
        target.write(pixels)
    rgb, note = open_pixels(str(tmp_path / "a.jp2"))
    np.testing.assert_array_equal(rgb, pixels.transpose(1, 2, 0))
    assert "a.jp2: JPEG 2000, uint8, 64 × 48 pixels" in note


def scene_of(path, values, **options):
    """Write a tiled GeoTIFF of one band."""
    height, width = values.shape
    options |= {"tiled": True, "blockxsize": 256, "blockysize": 256, "compress": "deflate"}
    with rasterio.open(
        path, "w", driver="GTiff", height=height, width=width, count=1, dtype="uint8", **options
    ) as file:
        file.write(values[None])
    return str(path)


@pytest.mark.parametrize("suffix", ["tif", "png"])
def test_scene_window_is_read_at_full_resolution(tmp_path, suffix):
    values = np.random.default_rng(0).integers(0, 255, (400, 600)).astype(np.uint8)
    path = str(tmp_path / f"scene.{suffix}")
    scene_of(path, values) if suffix == "tif" else Image.fromarray(values).save(path)
    rgb, note = open_pixels(path, max_side=60, adjustment=Adjustment(part=10, center=(50, 25)))
    np.testing.assert_array_equal(rgb[..., 0], values[80:120, 270:330])
    assert "60 × 40 pixels" in note and "window from 270, 80" in note
    corner, _ = open_pixels(path, max_side=60, adjustment=Adjustment(part=10, center=(100, 0)))
    np.testing.assert_array_equal(corner[..., 0], values[:40, 540:])
    assert open_pixels(path, max_side=60)[0].shape == (40, 60, 3)


@pytest.mark.parametrize("frame", [1, 2, 5])
def test_position_selects_dicom_frame(tmp_path, frame):
    dataset = pydicom.dcmread(get_testdata_file("CT_small.dcm", download=False))
    first = dataset.pixel_array
    frames = np.stack([first + 10 * index for index in range(5)])
    dataset.NumberOfFrames, dataset.PixelData = 5, frames.tobytes()
    dataset.save_as(tmp_path / "cine.dcm")
    reading = open_upload(str(tmp_path / "cine.dcm"), adjustment=Adjustment(position=100 * (frame - 0.5) / 5))
    units = frames[frame - 1] * float(dataset.RescaleSlope) + float(dataset.RescaleIntercept)
    kept = np.isfinite(reading.image[0])
    np.testing.assert_allclose(reading.image[0][kept], units[kept])
    assert kept.mean() > 0.5 and f"frame {frame} of 5" in reading.note


LARGE = """
import sys, re
from pathlib import Path
import numpy, torch, rasterio, PIL.Image
from adjusting import Adjustment
from uploading import open_pixels
Path("/proc/self/clear_refs").write_text("5")
memory = lambda kind: int(re.search(kind + r":\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) / 1e3
before = memory("VmRSS")
whole, _ = open_pixels(sys.argv[1])
part, note = open_pixels(sys.argv[1], adjustment=Adjustment(part=5, center=(90.0, 90.0)))
assert whole.shape == (2048, 2048, 3) and part.shape == (500, 500, 3)
assert abs(whole[1843, 1843, 0] - 255 * 0.9) < 2 and abs(part[250, 250, 0] - 255 * 0.9) < 2, note
print(memory("VmHWM") - before)
"""


@pytest.mark.slow
def test_large_scene_is_read_with_little_memory(tmp_path):
    """The overview and a window are read; the decoded scene has 100 MB in each of three bands."""
    row = np.linspace(0, 255, 10_000).round().astype(np.uint8)
    options = {"width": 10_000, "height": 10_000, "count": 3, "dtype": "uint8", "photometric": "rgb"}
    options |= {"tiled": True, "blockxsize": 512, "blockysize": 512, "compress": "deflate"}
    path = tmp_path / "scene.tif"
    with rasterio.open(path, "w", driver="GTiff", **options) as file:
        for top in range(0, 10_000, 1000):
            rows = np.broadcast_to(row, (3, 1000, 10_000))
            file.write(rows, window=rasterio.windows.Window(0, top, 10_000, 1000))
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "space")])}
    run = subprocess.run([sys.executable, "-c", LARGE, path], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    print(f"a scene of 10,000 × 10,000 pixels took {float(run.stdout):.0f} MB")
    assert float(run.stdout) < 250
