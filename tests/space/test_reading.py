"""Reading of uploaded files, written with Pillow, rasterio and pydicom or part of pydicom, compared with NumPy."""

import gzip
import io
import os
import subprocess
import sys

import limits
import nibabel
import numpy as np
import pydicom
import pytest
import rasterio
from checking import check_header
from paths import ROOT
from pictures import picture, png_file
from PIL import Image
from pydicom.data import get_testdata_file
from reading import PRESETS, Adjustment, UnreadableImage, read_image
from uploading import open_pixels, open_upload

from modeling_vitp import ViTPImageProcessor

HEIGHT, WIDTH = 30, 44


def values(bands=1, dtype="uint16", low=100, high=4000, seed=0):
    shape = (bands, HEIGHT, WIDTH)
    rng = np.random.default_rng(seed)
    if np.dtype(dtype).kind == "f":
        return rng.uniform(low, high, shape).astype(dtype)
    return rng.integers(low, high, shape).astype(dtype)


def geotiff(path, array, descriptions=None, colors=None, **profile):
    profile = {"driver": "GTiff", "crs": "EPSG:32633", "transform": rasterio.Affine(10, 0, 4e5, 0, -10, 5e6), **profile}
    with rasterio.open(
        path, "w", width=array.shape[2], height=array.shape[1], count=len(array), dtype=array.dtype, **profile
    ) as file:
        file.write(array)
        if descriptions:
            file.descriptions = descriptions
        if colors:
            file.colorinterp = colors
    return path


def dicom(path, pixels, **tags):
    """Write a CT with other pixels, and without the tags that change its values."""
    dataset = pydicom.dcmread(get_testdata_file("CT_small.dcm"))
    del dataset.PixelPaddingValue
    dataset.RescaleIntercept = 0
    dataset.PixelRepresentation = 0
    if pixels.ndim == 3:
        dataset.NumberOfFrames = len(pixels)
    dataset.Rows, dataset.Columns = pixels.shape[-2:]
    for tag, value in tags.items():
        setattr(dataset, tag, value)
    dataset.PixelData = pixels.tobytes()
    dataset.save_as(path)
    return path


def windowed(array, low, high):
    """Scale values to [0, 255]; `low` and `high` are numbers, or one for each band."""
    low, high = (np.asarray(value, dtype=np.float64).reshape(-1, 1, 1) for value in (low, high))
    scaled = np.clip((array.astype(np.float64) - low) / (high - low), 0, 1)
    return 255 * np.where(np.isnan(scaled), 0, scaled)


def stretched(array, low=2, high=98):
    """Scale each band from its percentiles to [0, 255]."""
    return windowed(array, *np.percentile(array, (low, high), axis=(1, 2)))


def assert_shows(reading, expected, tolerance=0.51):
    """Compare the displayed picture and the pixels of the image processor before normalization."""
    expected = np.broadcast_to(expected, (3, *expected.shape[1:]))
    rgb = np.asarray(reading.to_rgb()).transpose(2, 0, 1).astype(np.float64)
    assert rgb.shape == expected.shape
    assert np.abs(rgb - expected).max() <= tolerance
    processor = ViTPImageProcessor(
        size={"height": rgb.shape[1], "width": rgb.shape[2]}, image_mean=[0.0] * 3, image_std=[1.0] * 3
    )
    spec = {} if reading.input_spec is None else {"input_spec": reading.input_spec}
    arrays = {} if isinstance(reading.image, Image.Image) else {"input_data_format": "channels_first"}
    pixels = processor(reading.image, return_tensors="np", **spec, **arrays)["pixel_values"][0]
    assert np.abs(255 * pixels - expected).max() <= tolerance


# Photographs


@pytest.mark.parametrize("suffix", ["jpg", "gif", "avif"])
def test_photographs(tmp_path, suffix):
    path = tmp_path / f"photo.{suffix}"
    picture(WIDTH, HEIGHT).save(path)
    reading = read_image(path)
    kind = {"jpg": "JPEG, RGB", "gif": "GIF, P", "avif": "AVIF, RGB"}[suffix]
    assert reading.note == f"{kind}, 44 × 30 pixels"
    assert_shows(reading, np.asarray(Image.open(path).convert("RGB")).transpose(2, 0, 1))


@pytest.mark.parametrize("mode", ["1", "LA", "P", "RGBA"])
def test_modes_of_png(tmp_path, mode):
    path = tmp_path / "image.png"
    image = picture(WIDTH, HEIGHT)
    if mode == "RGBA":
        image.putalpha(picture(WIDTH, HEIGHT, seed=1).convert("L"))
    else:
        image = image.convert(mode)
    image.save(path)
    white = Image.new("RGBA", image.size, "white")
    expected = Image.alpha_composite(white, image.convert("RGBA")).convert("RGB")
    assert_shows(read_image(path), np.asarray(expected).transpose(2, 0, 1), tolerance=1)


def test_exif_orientation(tmp_path):
    image = picture(WIDTH, HEIGHT)
    exif = Image.Exif()
    exif[0x0112] = 6  # rotated clockwise
    image.save(tmp_path / "turned.png", exif=exif)
    reading = read_image(tmp_path / "turned.png")
    assert_shows(reading, np.rot90(np.asarray(image), -1).transpose(2, 0, 1))
    assert reading.note == "PNG, RGB, 30 × 44 pixels"
    part = read_image(tmp_path / "turned.png", window=(0, 0, 1, 0.5))
    assert part.note == "PNG, RGB, 30 × 22 pixels, window from 0, 0"


def test_large_jpeg_is_reduced_during_decoding(tmp_path, monkeypatch):
    path = tmp_path / "large.jpg"
    picture(500, 375).resize((4000, 3000), Image.Resampling.BICUBIC).save(path, quality=90)
    drafts = []
    draft = Image.Image.draft
    monkeypatch.setattr(
        "PIL.JpegImagePlugin.JpegImageFile.draft",
        lambda self, *args: drafts.append(args) or draft(self, *args),
    )
    reading = read_image(path, max_side=800)
    assert reading.image.size == (800, 600) and drafts
    assert reading.note == "JPEG, RGB, 4000 × 3000 pixels, reduced to 800 × 600"
    expected = np.asarray(Image.open(path).resize((800, 600), Image.Resampling.BICUBIC)).astype(float)
    assert np.abs(np.asarray(reading.image) - expected).mean() < 3


def test_sixteen_bit_png(tmp_path):
    array = values()
    Image.fromarray(array[0]).save(tmp_path / "gray.png")
    reading = read_image(tmp_path / "gray.png")
    assert reading.note == "PNG, uint16, 44 × 30 pixels, percentiles 2 to 98"
    assert_shows(reading, stretched(array))
    colors = values(3)
    with rasterio.open(tmp_path / "rgb.png", "w", driver="PNG", width=44, height=30, count=3, dtype="uint16") as file:
        file.write(colors)
    assert_shows(read_image(tmp_path / "rgb.png"), stretched(colors))


# TIFF


def test_plain_tiff(tmp_path):
    for mode in ("RGB", "1", "P"):
        image = picture(WIDTH, HEIGHT).convert(mode)
        image.save(tmp_path / "plain.tif")
        reading = read_image(tmp_path / "plain.tif")
        assert reading.input_spec is None and reading.note.startswith("TIFF, uint8, 44 × 30 pixels")
        assert_shows(reading, np.asarray(image.convert("RGB")).transpose(2, 0, 1))


def test_deep_tiff(tmp_path):
    for dtype, low in (("uint16", 0), ("int16", -500), ("float64", -500)):
        array = values(dtype=dtype, low=low)
        reading = read_image(geotiff(tmp_path / f"{dtype}.tif", array))
        assert reading.note == f"TIFF, {dtype}, 44 × 30 pixels, percentiles 2 to 98"
        assert_shows(reading, stretched(array))


S2 = ["B01", "B02", "B03", "B04", "B05", "B06", "B07", "B08", "B8A", "B09", "B11", "B12"]
BANDS = {
    "scene": (S2, [3, 2, 1]),
    "waves": ([f"{name} ({index * 50 + 440} nm)" for index, name in enumerate(S2)], [3, 2, 1]),
    "LC08_L2SP_1": ([f"SR_B{number}" for number in range(1, 8)], [3, 2, 1]),
    "LE07_L2SP_1": (["SR_B1", "SR_B2", "SR_B3", "SR_B4", "SR_B5", "SR_B7"], [2, 1, 0]),
    "LT05_1": (["Band 1", "Band 2", "Band 3", "Band 4"], [2, 1, 0]),
    "planet": (["Coastal Blue", "Blue", "Green I", "Green", "Yellow", "Red", "Red Edge", "NIR"], [0, 1, 2]),
    "words": (["nir", "Blue", "Green", "Red", "swir", ""], [3, 2, 1]),
    "scene_B02_B03_B04_B08": ([""] * 4, [2, 1, 0]),
    "scene_B02_B03": ([""] * 4, [0, 1, 2]),
    "nothing": ([""] * 5, [0, 1, 2]),
    "two": (["", ""], [0]),
}


def test_bands_are_found_by_name(tmp_path):
    for name, (descriptions, bands) in BANDS.items():
        array = values(len(descriptions))
        reading = open_upload(str(geotiff(tmp_path / f"{name}.tif", array, descriptions, photometric="minisblack")))
        assert f"{', '.join(str(band + 1) for band in bands)} of {len(array)}" in reading.note
        assert_shows(reading, stretched(array[bands]))


def test_bands_are_found_by_color(tmp_path):
    array = values(6)
    colors = [rasterio.enums.ColorInterp[name] for name in ("gray", "blue", "green", "undefined", "red", "undefined")]
    reading = read_image(geotiff(tmp_path / "colors.tif", array, colors=colors, photometric="minisblack"))
    assert "bands 5, 3, 2 of 6" in reading.note
    assert_shows(reading, stretched(array[[4, 2, 1]]))


def test_model_bands_precede_names(tmp_path):
    array = values(12)
    spec = {"bands": [0, 1, 2], "window": [0, 1000]}
    reading = open_upload(str(geotiff(tmp_path / "scene.tif", array, S2)), input_spec=spec)
    np.testing.assert_array_equal(reading.image, array[:3])


def test_input_spec_overrides_defaults(tmp_path):
    array = values(5)
    path = geotiff(tmp_path / "five.tif", array, photometric="minisblack")
    reading = read_image(path, input_spec={"bands": [4, 0, 2], "window": [0, 3000], "gamma": 0.5})
    assert reading.note.endswith("bands 5, 1, 3 of 5, window 0 to 3000, gamma 0.5")
    assert_shows(reading, 255 * (windowed(array[[4, 0, 2]], 0, 3000) / 255) ** 0.5)
    reading = read_image(path, input_spec={"bands": [3]})
    assert_shows(reading, windowed(array[3:4], *np.percentile(array[3], (2, 98))))
    with pytest.raises(UnreadableImage, match=r"five.tif has 5 band\(s\), but the input spec asks for band 8"):
        read_image(path, input_spec={"bands": [7]})
    picture(WIDTH, HEIGHT).save(tmp_path / "photo.png")
    reading = read_image(tmp_path / "photo.png", input_spec={"bands": [0]})
    assert_shows(reading, np.asarray(picture(WIDTH, HEIGHT))[None, ..., 0])


def test_nodata_is_ignored_and_black(tmp_path):
    array = values(dtype="uint16", low=1000, high=2000)
    array[0, :10] = 65535
    reading = read_image(geotiff(tmp_path / "nodata.tif", array, nodata=65535))
    valid = np.where(array == 65535, np.nan, array.astype(float))
    assert_shows(reading, windowed(valid, *np.nanpercentile(valid, (2, 98))))
    array[:] = 65535
    with pytest.raises(UnreadableImage, match="nothing.tif has no valid value"):
        read_image(geotiff(tmp_path / "nothing.tif", array, nodata=65535))


def test_complex_values_are_shown_by_magnitude(tmp_path):
    array = (values(dtype="float32") + 1j * values(dtype="float32", seed=1)).astype("complex64")
    reading = read_image(geotiff(tmp_path / "slc.tif", array))
    assert "magnitude of complex values" in reading.note
    assert_shows(reading, windowed(np.abs(array), *np.percentile(np.abs(array), (2, 98))))


def test_large_tiff_is_reduced_by_averaging(tmp_path):
    array = np.random.default_rng(0).integers(0, 5000, (4, 600, 1000)).astype("uint16")
    path = geotiff(tmp_path / "large.tif", array, photometric="minisblack", tiled=True, compress="deflate")
    reading = read_image(path, max_side=250)
    assert reading.image.shape == (3, 150, 250)
    means = array[:3].reshape(3, 150, 4, 250, 4).mean((2, 4))
    assert np.abs(reading.image - means).max() <= 0.51
    assert "1000 × 600 pixels, reduced to 250 × 150, bands 1, 2, 3 of 4" in reading.note


def test_file_cannot_reference_other_files(tmp_path):
    secret = geotiff(tmp_path / "secret.tif", values(1, "uint8", 0, 255))
    virtual = tmp_path / "innocent.tif"
    virtual.write_text(
        f'<VRTDataset rasterXSize="{WIDTH}" rasterYSize="{HEIGHT}"><VRTRasterBand dataType="Byte" band="1">'
        f"<SimpleSource><SourceFilename>{secret}</SourceFilename><SourceBand>1</SourceBand></SimpleSource>"
        "</VRTRasterBand></VRTDataset>"
    )
    with pytest.raises(UnreadableImage, match="innocent.tif cannot be opened"):
        read_image(virtual)
    with pytest.raises(UnreadableImage, match="not found"):
        read_image(f"/vsizip/{secret}")


def test_overview_on_a_server_is_refused(tmp_path):
    """GDAL would ask the server when the image is reduced."""
    path = geotiff(tmp_path / "innocent.tif", np.zeros((1, 300, 300), np.uint8))
    with rasterio.open(path, "r+") as file:
        file.update_tags(ns="OVERVIEWS", OVERVIEW_FILE="/vsicurl/http://localhost:9/secret.tif")
    check_header(path)
    with pytest.raises(UnreadableImage, match="innocent.tif is damaged.* another file"):
        read_image(path, max_side=50)


def test_files_beside_the_upload_are_not_read(tmp_path):
    path = geotiff(tmp_path / "image.tif", np.zeros((1, 300, 300), np.uint8))
    Image.fromarray(np.full((150, 150), 255, np.uint8)).save(tmp_path / "image.tif.ovr", format="TIFF")
    (tmp_path / "image.tif.msk").write_text("<VRTDataset>")
    assert not np.asarray(read_image(path, max_side=50).image).any()


# DICOM


def test_ct_in_hounsfield_units():
    path = get_testdata_file("CT_small.dcm")
    dataset = pydicom.dcmread(path)
    stored = dataset.pixel_array.astype(np.float64)
    assert (dataset.RescaleSlope, dataset.RescaleIntercept) == (1, -1024)
    units = np.where(dataset.pixel_array == dataset.PixelPaddingValue, np.nan, stored - 1024)[None]
    reading = read_image(path)
    assert reading.note == "DICOM, CT, 128 × 128 pixels, percentiles 2 to 98"
    assert_shows(reading, windowed(units, *np.nanpercentile(units, (2, 98))))


@pytest.mark.parametrize("name", ["MR_small.dcm", "MR_small_RLE.dcm", "MR_small_bigendian.dcm"])
def test_transfer_syntaxes(name):
    stored = pydicom.dcmread(get_testdata_file("MR_small.dcm")).pixel_array[None]
    assert_shows(read_image(get_testdata_file(name)), windowed(stored, -200, 1399))


def test_linear_exact_windows_and_several(tmp_path):
    pixels = values(dtype="uint16")[0]
    tags = {"RescaleSlope": 0.5, "RescaleIntercept": -100, "WindowCenter": [600, 40], "WindowWidth": [800, 400]}
    reading = read_image(dicom(tmp_path / "a.dcm", pixels, VOILUTFunction="LINEAR_EXACT", **tags))
    assert_shows(reading, windowed(0.5 * pixels[None] - 100, 200, 1000))
    reading = read_image(dicom(tmp_path / "b.dcm", pixels, VOILUTFunction="SIGMOID", **tags))
    assert reading.note.endswith("percentiles 2 to 98")


def test_monochrome1_is_inverted(tmp_path):
    pixels = values(dtype="uint16")[0]
    tags = {"PhotometricInterpretation": "MONOCHROME1"}
    path = dicom(tmp_path / "x.dcm", pixels, WindowCenter=2000.5, WindowWidth=2001, **tags)
    reading = read_image(path)
    assert reading.note == "DICOM, CT, 44 × 30 pixels, window 1000 to 3000, inverted (MONOCHROME1)"
    assert_shows(reading, 255 - windowed(pixels[None], 1000, 3000))
    reading = read_image(dicom(tmp_path / "y.dcm", pixels, **tags), input_spec={"percentiles": [1, 90]})
    assert_shows(reading, 255 - windowed(pixels[None], *np.percentile(pixels, (1, 90))))


def test_large_dicom_is_reduced_by_averaging(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 4000, (200, 400)).astype(np.uint16)
    reading = read_image(dicom(tmp_path / "x.dcm", pixels), max_side=100)
    means = pixels.reshape(50, 4, 100, 4).mean((1, 3))
    np.testing.assert_allclose(reading.image[0], means)
    assert "400 × 200 pixels, reduced to 100 × 50" in reading.note


@pytest.mark.parametrize("name", ["SC_rgb_dcmtk_+eb+cy+np.dcm", "SC_rgb_rle_16bit.dcm"])
def test_color_dicom(name):
    path = get_testdata_file(name)
    stored = pydicom.pixels.pixel_array(path).transpose(2, 0, 1)
    assert_shows(read_image(path), 255.0 * stored / np.iinfo(stored.dtype).max)


def test_palette_dicom():
    path = get_testdata_file("examples_palette.dcm")
    dataset = pydicom.dcmread(path)
    colors = pydicom.pixels.apply_color_lut(dataset.pixel_array, dataset).transpose(2, 0, 1)
    reading = read_image(path)
    assert "palette colors" in reading.note
    assert_shows(reading, 255.0 * colors / np.iinfo(colors.dtype).max)


# Files that cannot be opened


def half_of_picture(kind):
    buffer = io.BytesIO()
    picture(200, 150).save(buffer, kind)
    return buffer.getvalue()[: len(buffer.getvalue()) // 2]


BAD_FILES = {
    "text.jpg": (b"this is not an image\n" * 20, "text.jpg cannot be opened"),
    "empty.png": (b"", r"empty.png is empty \(0 bytes\)"),
    "truncated.png": (half_of_picture("PNG"), "truncated.png is damaged, incomplete"),
    "truncated.jpg": (half_of_picture("JPEG"), "truncated.jpg is damaged, incomplete"),
    "bomb.png": (png_file(60_000, 60_000), "bomb.png is too large to be opened"),
    "damaged.tif": (b"II*\0" + bytes(range(200)), "damaged.tif is damaged"),
    "damaged.dcm": (bytes(128) + b"DICM" + bytes(range(200)), "damaged.dcm is (damaged|DICOM without an image)"),
}


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("name", BAD_FILES)
def test_bad_files_raise_one_line(tmp_path, name):
    content, message = BAD_FILES[name]
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(UnreadableImage, match=message) as error:
        read_image(path)
    assert "\n" not in str(error.value) and str(tmp_path) not in str(error.value)


def test_dicom_that_cannot_be_shown(tmp_path):
    report = pydicom.dcmread(get_testdata_file("CT_small.dcm"))
    report.Modality = "SR"
    del report.PixelData
    report.save_as(tmp_path / "report.dcm")
    with pytest.raises(UnreadableImage, match=r"report.dcm is DICOM without an image \(modality SR\)"):
        read_image(tmp_path / "report.dcm")
    with pytest.raises(UnreadableImage, match="MR_truncated.dcm is damaged"):
        read_image(get_testdata_file("MR_truncated.dcm"))


# Controls of the page


@pytest.fixture
def volume(tmp_path):
    """Return the values i + 10 * j + 100 * k, with axes to the right, to the front and up, and their file."""
    values = np.add.outer(np.add.outer(np.arange(6), 10 * np.arange(8)), 100 * np.arange(4)).astype(np.int16)
    path = tmp_path / "brain.nii.gz"
    nibabel.save(nibabel.Nifti1Image(values, np.eye(4)), path)
    return values, path


@pytest.mark.parametrize(("position", "index"), [(0, 0), (49, 1), (100, 3)])
def test_volume_slice_is_seen_from_the_feet(volume, position, index):
    values, path = volume
    reading = open_upload(str(path), adjustment=Adjustment(position=position))
    np.testing.assert_array_equal(reading.image[0], values[::-1, ::-1, index].T)
    assert f"NIfTI, slice {index + 1} of 4, 6 × 8 pixels, percentiles 2 to 98" in reading.note
    rgb, note = open_pixels(str(path), max_side=4)
    assert rgb.shape == (4, 3, 3) and note.startswith("brain.nii.gz: ")


def test_large_volume_is_rejected(volume, tmp_path, monkeypatch):
    _, path = volume
    check_header(path)
    (tmp_path / "bomb.nii.gz").write_bytes(gzip.compress(gzip.decompress(path.read_bytes()) + bytes(5_000_000)))
    monkeypatch.setattr(limits, "VOLUME_BYTES", 2_000_000)
    with pytest.raises(UnreadableImage, match="bomb.nii.gz has . MB when unpacked"):
        check_header(tmp_path / "bomb.nii.gz")


def test_ct_windows_use_hounsfield_units():
    path = get_testdata_file("CT_small.dcm", download=False)
    dataset = pydicom.dcmread(path)
    units = dataset.pixel_array * float(dataset.RescaleSlope) + float(dataset.RescaleIntercept)
    for preset, (low, high) in PRESETS.items():
        expected = 255 * np.clip((units - low) / (high - low), 0, 1)
        rgb, note = open_pixels(path, adjustment=Adjustment(preset=preset))
        assert np.abs(rgb[..., 0] - expected).max() <= 0.5 + 1e-6
        assert f"window {low:g} to {high:g}" in note


def test_bands_and_percentiles_follow_the_controls(tmp_path):
    data = values(5, high=4000)
    path = str(geotiff(tmp_path / "a.tif", data))
    rgb, note = open_pixels(path, adjustment=Adjustment(bands="5, 1, 2", low=10, high=90))
    assert np.abs(rgb.transpose(2, 0, 1) - stretched(data[[4, 0, 1]], 10, 90)).max() <= 1
    assert "bands 5, 1, 2 of 5" in note and "percentiles 10 to 90" in note
    for bands in ("1, 2", "0", "red"):
        with pytest.raises(ValueError, match="band numbers"):
            Adjustment(bands=bands)


@pytest.mark.parametrize("suffix", ["jp2", "j2k"])
def test_jpeg_2000_is_read(tmp_path, suffix):
    pixels, path = np.asarray(picture(64, 48)), tmp_path / f"a.{suffix}"
    Image.fromarray(pixels).save(path, "JPEG2000", no_jp2=suffix == "j2k")
    rgb, note = open_pixels(str(path))
    np.testing.assert_array_equal(rgb, pixels)
    assert f"a.{suffix}: JPEG 2000, uint8, 64 × 48 pixels" in note


@pytest.mark.parametrize("suffix", ["tif", "png"])
def test_scene_window_is_read_at_full_resolution(tmp_path, suffix):
    values = np.random.default_rng(0).integers(0, 255, (400, 600)).astype(np.uint8)
    path = str(tmp_path / f"scene.{suffix}")
    options = {"tiled": True, "blockxsize": 256, "blockysize": 256, "compress": "deflate"}
    geotiff(path, values[None], **options) if suffix == "tif" else Image.fromarray(values).save(path)
    rgb, note = open_pixels(path, max_side=60, adjustment=Adjustment(window_percent=10, center_x=50, center_y=25))
    np.testing.assert_array_equal(rgb[..., 0], values[80:120, 270:330])
    assert "60 × 40 pixels" in note and "window from 270, 80" in note
    corner, _ = open_pixels(path, max_side=60, adjustment=Adjustment(window_percent=10, center_x=100, center_y=0))
    np.testing.assert_array_equal(corner[..., 0], values[:40, 540:])
    assert open_pixels(path, max_side=60)[0].shape == (40, 60, 3)


def test_position_selects_dicom_frame(tmp_path):
    frames = values(5)
    path = dicom(tmp_path / "cine.dcm", frames)
    for frame in (2, 5):
        reading = open_upload(str(path), adjustment=Adjustment(position=100 * (frame - 0.5) / 5))
        np.testing.assert_array_equal(reading.image[0], frames[frame - 1])
        assert f"frame {frame} of 5" in reading.note
    middle = read_image(path)
    np.testing.assert_array_equal(middle.image[0], frames[2])
    assert "frame 3 of 5" in middle.note


LARGE = """
import sys, re
from pathlib import Path
import numpy, torch, rasterio, PIL.Image
from reading import Adjustment
from uploading import open_pixels
Path("/proc/self/clear_refs").write_text("5")
memory = lambda kind: int(re.search(kind + r":\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) / 1e3
before = memory("VmRSS")
whole, _ = open_pixels(sys.argv[1])
part, note = open_pixels(sys.argv[1], adjustment=Adjustment(window_percent=5, center_x=90.0, center_y=90.0))
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
