"""Images are refused by what their headers say, before they take any memory."""

import gzip
import io
import struct
import tracemalloc
import zlib

import limits
import nibabel
import numpy as np
import pydicom
import pytest
import rasterio
from headers import check_header
from pictures import picture
from PIL import Image
from pydicom.data import get_testdata_file
from reading import UnreadableImage


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


@pytest.mark.parametrize("side", [13_300, 60_000])
def test_a_png_that_would_take_gigabytes_is_not_decoded(tmp_path, side):
    header = struct.pack(">IIBBBBB", side, side, 8, 6, 0, 0, 0)
    rows = zlib.compress(b"\0" * 10**7)
    (tmp_path / "a.png").write_bytes(
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")
    )
    tracemalloc.start()
    try:
        check_header(tmp_path / "a.png")
    except UnreadableImage as error:
        assert f"{side:,} × {side:,} pixels" in str(error) and "64 million" in str(error)
    else:
        assert side == 60_000  # which Pillow refuses by itself, when it is read
    assert tracemalloc.get_traced_memory()[1] < 20e6
    tracemalloc.stop()


def test_a_tiff_is_read_in_pieces_that_are_limited(tmp_path, monkeypatch):
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


def test_a_deflated_dicom_is_counted_without_being_kept(tmp_path, monkeypatch):
    plain = pydicom.dcmread(get_testdata_file("CT_small.dcm", download=False))
    plain.file_meta.TransferSyntaxUID = pydicom.uid.DeflatedExplicitVRLittleEndian
    plain.save_as(tmp_path / "deflated.dcm", enforce_file_format=True)
    check_header(tmp_path / "deflated.dcm")
    monkeypatch.setattr(limits, "BLOCK_BYTES", 10_000)
    with pytest.raises(UnreadableImage, match="more than 0 MB when inflated"):
        check_header(tmp_path / "deflated.dcm")


def test_all_bands_of_a_jpeg_2000_count(tmp_path, monkeypatch):
    """They are all decoded, whichever are read."""
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


@pytest.mark.parametrize("order", "<>")
@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
def test_what_comes_before_the_values_of_a_volume_is_limited(tmp_path, order, suffix):
    """A megabyte of zeros is packed in a kilobyte, and nibabel reads all of it."""
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


def test_what_is_no_image_is_left_to_the_reader_and_what_is_one_passes(tmp_path):
    for name, content in (("a.jpg", b"text"), ("b.tif", b"II*\0"), ("c.dcm", bytes(128) + b"DICM")):
        (tmp_path / name).write_bytes(content)
        check_header(tmp_path / name)
    buffer = io.BytesIO()
    picture(60, 50).save(buffer, "PNG")
    (tmp_path / "d.png").write_bytes(buffer.getvalue())
    check_header(tmp_path / "d.png")
    assert Image.open(tmp_path / "d.png").size == (60, 50)
