"""Checks of images by their headers, before memory is allocated."""

import gzip
import struct
import tracemalloc
from contextlib import nullcontext

import limits
import nibabel
import numpy as np
import pydicom
import pytest
import rasterio
from checking import check_header
from pictures import picture, png_file
from pydicom.data import get_testdata_file
from reading import UnreadableImage


def test_large_png_is_not_decoded(tmp_path):
    (tmp_path / "a.png").write_bytes(png_file(13_300, 13_300, color=6, num_bytes=10**7))
    tracemalloc.start()
    with pytest.raises(UnreadableImage, match="13,300 × 13,300 pixels"):
        check_header(tmp_path / "a.png")
    assert tracemalloc.get_traced_memory()[1] < 20e6
    tracemalloc.stop()


def test_deep_png_with_alpha_is_limited(tmp_path):
    for color, refused in ((2, False), (6, True)):
        (tmp_path / "a.png").write_bytes(png_file(2500, 2500, depth=16, color=color))
        with pytest.raises(UnreadableImage, match="2,500 × 2,500") if refused else nullcontext():
            check_header(tmp_path / "a.png")


def test_tiff_block_size_is_limited(tmp_path, monkeypatch):
    picture(600, 512).save(tmp_path / "strip.tif", compression="tiff_deflate", strip_size=10**9)
    tiled = {"tiled": True, "blockxsize": 128, "blockysize": 128, "interleave": "pixel"}
    with rasterio.open(
        tmp_path / "tiles.tif", "w", driver="GTiff", height=512, width=600, count=4, dtype="uint16", **tiled
    ) as target:
        target.write(np.ones((4, 512, 600), np.uint16))
    monkeypatch.setattr(limits, "BLOCK_BYTES", 500_000)
    check_header(tmp_path / "tiles.tif")
    with pytest.raises(UnreadableImage, match="512 × 600 pixels, 1 MB"):
        check_header(tmp_path / "strip.tif")


@pytest.mark.parametrize(("levels", "refused"), [([], True), ([32], True), ([2, 4, 8, 16, 32], False)])
def test_pixels_of_a_scene_are_limited(tmp_path, monkeypatch, levels, refused):
    """GDAL decodes all tiles of the level that it reads."""
    options = {"driver": "GTiff", "tiled": True, "sparse_ok": True, "height": 8192, "width": 8192, "count": 1}
    with rasterio.open(tmp_path / "scene.tif", "w", dtype="uint8", **options) as target:
        target.build_overviews(levels)
    monkeypatch.setattr(limits, "SCENE_PIXELS", 5000**2)
    with pytest.raises(UnreadableImage, match="to decode") if refused else nullcontext():
        check_header(tmp_path / "scene.tif")


def test_deflated_dicom_size_is_limited(tmp_path, monkeypatch):
    plain = pydicom.dcmread(get_testdata_file("CT_small.dcm", download=False))
    plain.file_meta.TransferSyntaxUID = pydicom.uid.DeflatedExplicitVRLittleEndian
    plain.save_as(tmp_path / "deflated.dcm", enforce_file_format=True)
    check_header(tmp_path / "deflated.dcm")
    monkeypatch.setattr(limits, "BLOCK_BYTES", 10_000)
    with pytest.raises(UnreadableImage, match="more than 0 MB when inflated"):
        check_header(tmp_path / "deflated.dcm")


def test_dicom_frame_size_is_limited(tmp_path):
    """A compressed frame may be much larger than its file."""
    frame = pydicom.dcmread(get_testdata_file("CT_small.dcm", download=False))
    frame.Rows, frame.Columns = 60_000, 50_000
    frame.save_as(tmp_path / "large.dcm", enforce_file_format=True)
    with pytest.raises(UnreadableImage, match="50,000 × 60,000 pixels"):
        check_header(tmp_path / "large.dcm")


def test_jpeg_2000_limit_counts_all_bands(tmp_path, monkeypatch):
    """All bands are decoded, even if only some are read."""
    for bands, size in ((3, 64), (5, 64), (3, 128)):
        with rasterio.open(
            tmp_path / "a.jp2", "w", driver="JP2OpenJPEG", height=size, width=size, count=bands, dtype="uint8"
        ) as target:
            target.write(np.ones((bands, size, size), np.uint8))
        monkeypatch.setattr(limits, "JPEG_2000_BYTES", 4 * 3 * 64**2)
        if (bands, size) == (3, 64):
            check_header(tmp_path / "a.jp2")
            continue
        with pytest.raises(UnreadableImage, match=rf"{size} × {size} pixels in {bands} band"):
            check_header(tmp_path / "a.jp2")


@pytest.mark.parametrize(("order", "suffix"), [("<", ".nii.gz"), (">", ".nii")])
def test_nifti_header_size_is_limited(tmp_path, order, suffix):
    """A megabyte of zeros is compressed to a kilobyte, but nibabel reads it whole."""
    volume = nibabel.Nifti1Image(np.zeros((4, 4, 4), np.uint8), np.eye(4))
    volume.header.extensions.append(nibabel.nifti1.Nifti1Extension(6, b"text"))
    if order == ">":
        volume = nibabel.Nifti1Image(volume.dataobj, np.eye(4), volume.header.as_byteswapped(">"))
    nibabel.save(volume, tmp_path / f"a{suffix}")
    check_header(tmp_path / f"a{suffix}")
    content = gzip.decompress((tmp_path / "a.nii.gz").read_bytes()) if suffix == ".nii.gz" else b""
    content = bytearray(content or (tmp_path / "a.nii").read_bytes())
    struct.pack_into(f"{order}f", content, 108, 352 + 64e6)
    (tmp_path / f"b{suffix}").write_bytes(gzip.compress(content) if suffix == ".nii.gz" else bytes(content))
    tracemalloc.start()
    with pytest.raises(UnreadableImage, match="more than 1 MB before its values"):
        check_header(tmp_path / f"b{suffix}")
    assert tracemalloc.get_traced_memory()[1] < 5e6
    tracemalloc.stop()
