"""Reading of uploaded files, written with Pillow, rasterio and pydicom or part of pydicom, compared with NumPy."""

import io
import struct
import time
import zlib

import numpy as np
import pydicom
import pytest
import rasterio
from pictures import picture
from PIL import Image
from pydicom.data import get_testdata_file
from pydicom.dataset import FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian, generate_uid
from reading import UnreadableImage, read_image

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


def dicom(path, pixels, photometric="MONOCHROME2", **tags):
    dataset = pydicom.Dataset()
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    dataset.file_meta.MediaStorageSOPClassUID = "1.2.840.10008.5.1.4.1.1.7"
    dataset.file_meta.MediaStorageSOPInstanceUID = generate_uid()
    dataset.SOPClassUID, dataset.SOPInstanceUID = "1.2.840.10008.5.1.4.1.1.7", generate_uid()
    dataset.Modality = tags.pop("Modality", "DX")
    dataset.SamplesPerPixel, dataset.PhotometricInterpretation = 1, photometric
    frames = pixels.shape[0] if pixels.ndim == 3 else None
    if frames:
        dataset.NumberOfFrames = frames
    dataset.Rows, dataset.Columns = pixels.shape[-2:]
    dataset.BitsAllocated = dataset.BitsStored = 8 * pixels.dtype.itemsize
    dataset.HighBit, dataset.PixelRepresentation = dataset.BitsStored - 1, int(pixels.dtype.kind == "i")
    for tag, value in tags.items():
        setattr(dataset, tag, value)
    dataset.PixelData = pixels.tobytes()
    dataset.save_as(path, enforce_file_format=True)
    return path


def windowed(array, low, high):
    """Scale values to [0, 255]; `low` and `high` are numbers, or one for each band."""
    low, high = (np.asarray(value, dtype=np.float64).reshape(-1, 1, 1) for value in (low, high))
    scaled = np.clip((array.astype(np.float64) - low) / (high - low), 0, 1)
    return 255 * np.where(np.isnan(scaled), 0, scaled)


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


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp"])
def test_photographs(tmp_path, suffix):
    path = tmp_path / f"photo.{suffix}"
    picture(WIDTH, HEIGHT).save(path)
    reading = read_image(path)
    assert reading.note == f"{ {'jpg': 'JPEG'}.get(suffix, suffix.upper()) }, RGB, 44 × 30 pixels"
    assert_shows(reading, np.asarray(Image.open(path)).transpose(2, 0, 1))


def test_format_is_detected_from_content(tmp_path):
    path = tmp_path / "photo.dcm"
    picture(WIDTH, HEIGHT).save(path, "PNG")
    assert read_image(path).note.startswith("PNG")


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA"])
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
    assert_shows(read_image(tmp_path / "turned.png"), np.rot90(np.asarray(image), -1).transpose(2, 0, 1))


def test_large_jpeg_is_reduced_during_decoding(tmp_path, monkeypatch):
    path = tmp_path / "large.jpg"
    picture(500, 375).resize((4000, 3000), Image.Resampling.BICUBIC).save(path, quality=90)
    drafts = []
    draft = Image.Image.draft
    monkeypatch.setattr(
        "PIL.JpegImagePlugin.JpegImageFile.draft",
        lambda self, *args: drafts.append(args) or draft(self, *args),
    )
    start = time.process_time()
    reading = read_image(path, max_side=800)
    assert time.process_time() - start < 2
    assert reading.image.size == (800, 600) and drafts
    assert reading.note == "JPEG, RGB, 4000 × 3000 pixels, reduced to 800 × 600"
    expected = np.asarray(Image.open(path).resize((800, 600), Image.Resampling.BICUBIC)).astype(float)
    assert np.abs(np.asarray(reading.image) - expected).mean() < 3


def test_sixteen_bit_png(tmp_path):
    array = values()
    Image.fromarray(array[0]).save(tmp_path / "gray.png")
    reading = read_image(tmp_path / "gray.png")
    assert reading.note == "PNG, uint16, 44 × 30 pixels, percentiles 2 to 98"
    assert_shows(reading, windowed(array, *np.percentile(array, (2, 98))))
    colors = values(3)
    with rasterio.open(tmp_path / "rgb.png", "w", driver="PNG", width=44, height=30, count=3, dtype="uint16") as file:
        file.write(colors)
    low, high = np.percentile(colors, (2, 98), axis=(1, 2))
    assert_shows(read_image(tmp_path / "rgb.png"), windowed(colors, low, high))


# TIFF


def test_plain_tiff(tmp_path):
    for mode in ("RGB", "L", "1", "P"):
        image = picture(WIDTH, HEIGHT).convert(mode)
        image.save(tmp_path / "plain.tif")
        reading = read_image(tmp_path / "plain.tif")
        assert reading.input_spec is None and reading.note.startswith("TIFF, uint8, 44 × 30 pixels")
        assert_shows(reading, np.asarray(image.convert("RGB")).transpose(2, 0, 1))


@pytest.mark.parametrize("dtype", ["uint16", "int16", "uint32", "float32", "float64"])
def test_deep_tiff(tmp_path, dtype):
    array = values(dtype=dtype, low=0 if dtype.startswith("u") else -500)
    reading = read_image(geotiff(tmp_path / "deep.tif", array))
    assert reading.note == f"TIFF, {dtype}, 44 × 30 pixels, percentiles 2 to 98"
    assert_shows(reading, windowed(array, *np.percentile(array, (2, 98))))


def test_bands_are_found_by_color_name_or_order(tmp_path):
    array = values(6)
    shown = {
        "first": (None, None, [0, 1, 2], "bands 1, 2, 3 of 6"),
        "sentinel": (("B1", "B2", "B3", "B4", "B5", "B8"), None, [3, 2, 1], "bands 4, 3, 2 of 6"),
        "names": (("nir", "Blue", "Green", "Red", "swir", None), None, [3, 2, 1], "bands 4, 3, 2 of 6"),
        "colors": (None, ("undefined", "blue", "green", "undefined", "red", "undefined"), [4, 2, 1], "bands 5, 3, 2"),
    }
    for name, (descriptions, colors, bands, note) in shown.items():
        colors = colors and tuple(rasterio.enums.ColorInterp[color] for color in colors)
        path = geotiff(tmp_path / f"{name}.tif", array, descriptions, colors, photometric="minisblack")
        reading = read_image(path)
        assert note in reading.note
        low, high = np.percentile(array[bands], (2, 98), axis=(1, 2))
        assert_shows(reading, windowed(array[bands], low, high))
    two = values(2, "float32")
    reading = read_image(geotiff(tmp_path / "two.tif", two))
    assert "band 1 of 2" in reading.note
    assert_shows(reading, windowed(two[:1], *np.percentile(two[0], (2, 98))))


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


def test_invalid_input_spec_raises_value_error(tmp_path):
    path = geotiff(tmp_path / "deep.tif", values())
    with pytest.raises(ValueError, match=r"^input_spec: window \(5, 5\) is empty"):
        read_image(path, input_spec={"window": [5, 5]})


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


@pytest.mark.parametrize("shape", [(1, 50), (50, 1), (1, 1), (3, 5000)])
def test_extreme_shapes(tmp_path, shape):
    array = np.random.default_rng(0).integers(0, 5000, (1, *shape)).astype("uint16")
    reading = read_image(geotiff(tmp_path / "thin.tif", array))
    width, height = reading.to_rgb().size
    scale = min(1, 2048 / max(shape))
    assert (height, width) == (max(1, round(shape[0] * scale)), max(1, round(shape[1] * scale)))


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
    reading = read_image(path, input_spec={"window": [-160, 240]})
    assert reading.note.endswith("window -160 to 240")
    assert_shows(reading, windowed(units, -160, 240))


def test_mr_uses_window_of_its_tags():
    path = get_testdata_file("MR_small.dcm")
    stored = pydicom.dcmread(path).pixel_array[None]
    reading = read_image(path)  # center 600, width 1600: from 600 - 0.5 - 799.5 to 600 - 0.5 + 799.5
    assert reading.note == "DICOM, MR, 64 × 64 pixels, window -200 to 1399"
    assert_shows(reading, windowed(stored, -200, 1399))


@pytest.mark.parametrize("name", ["MR_small_RLE.dcm", "MR_small_bigendian.dcm", "MR_small_implicit.dcm"])
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
    tags = {"WindowCenter": 2000.5, "WindowWidth": 2001}
    reading = read_image(dicom(tmp_path / "x.dcm", pixels, "MONOCHROME1", **tags))
    assert reading.note == "DICOM, DX, 44 × 30 pixels, window 1000 to 3000, inverted (MONOCHROME1)"
    assert_shows(reading, 255 - windowed(pixels[None], 1000, 3000))
    reading = read_image(dicom(tmp_path / "y.dcm", pixels, "MONOCHROME1"), input_spec={"percentiles": [1, 90]})
    assert_shows(reading, 255 - windowed(pixels[None], *np.percentile(pixels, (1, 90))))


def test_padding_is_ignored(tmp_path):
    pixels = values(dtype="int16")[0]
    pixels[:5] = -2000
    path = dicom(tmp_path / "padded.dcm", pixels, PixelPaddingValue=-2000, RescaleSlope=2, RescaleIntercept=10)
    valid = np.where(pixels == -2000, np.nan, 2.0 * pixels + 10)[None]
    assert_shows(read_image(path), windowed(valid, *np.nanpercentile(valid, (2, 98))))


def test_middle_frame_is_read(tmp_path):
    frames = np.stack([np.full((HEIGHT, WIDTH), 100 * frame, np.uint16) for frame in range(5)])
    reading = read_image(dicom(tmp_path / "cine.dcm", frames), input_spec={"window": [0, 400]})
    assert "frame 3 of 5" in reading.note
    assert_shows(reading, np.full((1, HEIGHT, WIDTH), 127.5))


@pytest.mark.parametrize("name", ["examples_rgb_color.dcm", "SC_rgb_dcmtk_+eb+cy+np.dcm", "SC_rgb_rle_16bit.dcm"])
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


def test_large_dicom_is_reduced_by_averaging(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 4000, (200, 400)).astype(np.uint16)
    reading = read_image(dicom(tmp_path / "x.dcm", pixels), max_side=100)
    means = pixels.reshape(50, 4, 100, 4).mean((1, 3))
    np.testing.assert_allclose(reading.image[0], means)
    assert "400 × 200 pixels, reduced to 100 × 50" in reading.note


# Files that cannot be opened


def png_header(width, height):
    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    body = zlib.compress(b"\0" * 1000)
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", body) + chunk(b"IEND", b"")


def png(image=None, keep=1.0):
    buffer = io.BytesIO()
    (image or picture(200, 150)).save(buffer, "PNG")
    return buffer.getvalue()[: int(keep * len(buffer.getvalue()))]


def jpeg(keep):
    buffer = io.BytesIO()
    picture(200, 150).save(buffer, "JPEG")
    return buffer.getvalue()[: int(keep * len(buffer.getvalue()))]


BAD_FILES = {
    "text.jpg": (b"this is not an image\n" * 20, "text.jpg cannot be opened"),
    "page.png": (b"<html><script>alert(1)</script></html>", "page.png cannot be opened"),
    "empty.png": (b"", r"empty.png is empty \(0 bytes\)"),
    "truncated.png": (png(keep=0.5), "truncated.png is damaged, incomplete"),
    "start.png": (png(keep=0.0005) + b"\x89PNG\r\n\x1a\n"[1:], "start.png (cannot be opened|is damaged)"),
    "truncated.jpg": (jpeg(0.4), "truncated.jpg is damaged, incomplete"),
    "bomb.png": (png_header(60_000, 60_000), "bomb.png is too large to be opened"),
    "large.png": (png_header(12_000, 11_000), "large.png has 12,000 × 11,000 pixels. At most 20,000 on a side and 128"),
    "wide.png": (png_header(30_000, 20), "wide.png has 30,000 × 20 pixels. At most 20,000 on a side"),
    "zero.png": (png_header(0, 20), "zero.png cannot be opened"),
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


def test_truncated_and_large_tiffs(tmp_path):
    path = geotiff(tmp_path / "half.tif", np.random.default_rng(0).integers(0, 9999, (3, 300, 300)).astype("uint16"))
    path.write_bytes(path.read_bytes()[:200_000])
    with pytest.raises(UnreadableImage, match="half.tif is damaged"):
        read_image(path)
    with rasterio.open(
        tmp_path / "wide.tif", "w", driver="GTiff", width=30_000, height=10, count=1, dtype="uint8", sparse_ok=True
    ):
        pass
    with pytest.raises(UnreadableImage, match="wide.tif has 30,000 × 10 pixels"):
        read_image(tmp_path / "wide.tif")


def test_dicom_that_cannot_be_shown(tmp_path):
    path = dicom(tmp_path / "report.dcm", values(dtype="uint16")[0], Modality="SR")
    report = pydicom.dcmread(path)
    del report.PixelData
    report.save_as(path)
    with pytest.raises(UnreadableImage, match=r"report.dcm is DICOM without an image \(modality SR\)"):
        read_image(path)
    with pytest.raises(UnreadableImage, match="MR_truncated.dcm is damaged"):
        read_image(get_testdata_file("MR_truncated.dcm"))
    path = dicom(tmp_path / "big.dcm", values(dtype="uint16")[0], Rows=65_000, Columns=65_000)
    with pytest.raises(UnreadableImage, match="big.dcm has 65,000 × 65,000 pixels"):
        read_image(path)


def test_folder_and_missing_file_raise(tmp_path):
    for path in (tmp_path, tmp_path / "missing.png"):
        with pytest.raises(UnreadableImage, match="not found"):
            read_image(path)
