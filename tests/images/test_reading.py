"""Tests of the image readers: whole images and windows, bits, bands, orientation and URLs."""

import io
import json
import os
import socket
import threading
import time
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import cv2
import dense_data
import huggingface_hub
import numpy as np
import PIL.Image
import PIL.ImageOps
import pytest
import rasterio
from datasets import Dataset, Features
from datasets import Image as ImageFeature
from dense_data import TWO, labelled_folder, small_mask
from hypothesis import given
from hypothesis import strategies as st
from pictures import picture, write_bands
from rasterio.enums import ColorInterp
from sample_rows import ANSWER, USER, encoded_image
from transformers.image_utils import ChannelDimension

from modeling_vitp import InputSpec, ViTPDataCollator, ViTPSegmentationImageProcessor
from modeling_vitp.data.rows import image_size
from modeling_vitp.image_decoding import open_raster, turn
from modeling_vitp.images import reading
from modeling_vitp.images.large import open_images
from modeling_vitp.images.pixels import to_pixels
from modeling_vitp.images.reading import (
    check_file,
    check_whole,
    image_files,
    read_image,
    read_picture,
    stored_size,
    window_starts,
    windows,
)
from modeling_vitp.instructions.rows import SourceSettings, load_images
from modeling_vitp.instructions.sample_length import SampleLength
from modeling_vitp.instructions.sources import Source, read_source
from modeling_vitp.tasks.segmentation.data import DenseData


def test_multi_band_tiff_is_read_in_windows(tmp_path):
    rng = np.random.default_rng(0)
    bands, labels = rng.integers(0, 4000, (5, 20, 24), dtype=np.uint16), rng.integers(0, 2, (1, 20, 24), dtype=np.uint8)
    for name, array in (("image", bands), ("mask", labels)):
        write_bands(tmp_path / f"{name}_1.tif", array)
    split = {"image": "image_{n}.tif", "mask": "mask_{n}.tif", "tile": {"size": 16, "overlap": 4}}
    spec = {"bands": [3, 2, 1], "window": [0, 3000]}
    samples = DenseData(classes=TWO, splits={"train": split}, root=str(tmp_path), input_spec=spec).open(["train"])
    sample = samples[3]
    assert sample["id"] == "1/8_4"
    expected = np.round(255 * np.clip(bands[[3, 2, 1], 4:, 8:] / 3000, 0, 1))
    assert np.abs(sample["images"][0].numpy() - expected).max() <= 1
    assert np.array_equal(sample["mask"], labels[0, 4:, 8:])


def test_too_large_image_is_refused_with_remedy(tmp_path, monkeypatch):
    picture(60, 40).save(tmp_path / "a.png")
    monkeypatch.setattr(PIL.Image, "MAX_IMAGE_PIXELS", 60 * 40 // 4)
    for read in (lambda path: read_image(path, None), stored_size, check_file, ViTPSegmentationImageProcessor()):
        with pytest.raises(ValueError, match="a.png.*2400 pixels"):
            read(tmp_path / "a.png")


@pytest.mark.parametrize(("suffix", "tail"), [("png", 20), ("jpeg", 0)])
def test_truncated_file_is_refused(suffix, tail):
    """Check that truncated files are refused, except for data after the last pixel."""
    file = io.BytesIO()
    picture(60, 40).save(file, suffix)
    content = file.getvalue()
    for whole in (content, content[: len(content) - tail], content + b"\0" * 5000):
        check_whole(io.BytesIO(whole))
    for size in [*range(0, len(content) - tail, 7), len(content) - tail - 1]:
        with pytest.raises((OSError, SyntaxError)):
            check_whole(io.BytesIO(content[:size]))


RNG = np.random.default_rng(0)


def write_deep_png(path, pixels):
    """Write 16-bit RGB or RGBA with OpenCV, which has blue first."""
    assert cv2.imwrite(str(path), pixels[..., [2, 1, 0, 3][: pixels.shape[-1]]])


def encode(processor, path, spec=None):
    """Return the tiles of a row with this image, and the tiles of the array that was written."""
    settings = {"s": SourceSettings(input_spec=spec)}
    row = {"id": 1, "source": "s", "images": [str(path)], "messages": [USER, ANSWER]}
    return ViTPDataCollator(processor, source_settings=settings)([row])["pixel_values"]


def expected(processor, bands, spec=None):
    kwargs = {"input_data_format": ChannelDimension.FIRST, "return_tensors": "pt", "crop_to_patches": True}
    return processor.image_processor(bands, input_spec=spec, **kwargs)["pixel_values"]


def test_16_bit_png_keeps_bits(tmp_path, processor):
    pixels = RNG.integers(20000, 20255, (40, 60, 3), dtype=np.uint16)  # The high bytes are nearly constant.
    write_deep_png(tmp_path / "a.png", pixels)
    bands = pixels.transpose(2, 0, 1)
    spec = {"window": [20000, 20255]}
    assert np.array_equal(load_images({"images": [str(tmp_path / "a.png")]})[0], bands)
    assert image_size(str(tmp_path / "a.png")) == (40, 60)
    tiles = encode(processor, tmp_path / "a.png", spec)
    assert tiles.equal(expected(processor, bands, spec)) and tiles.std() > 0.5
    assert np.array_equal(read_image(tmp_path / "a.png", None), pixels)
    assert np.array_equal(read_image(tmp_path / "a.png", (10, 5, 30, 25)), pixels[5:25, 10:30])

    alpha = RNG.integers(0, 65536, (40, 60, 1), dtype=np.uint16)
    write_deep_png(tmp_path / "b.png", np.concatenate([pixels, alpha], axis=-1))
    share = alpha / 65535
    flat = np.round(pixels * share + 65535 * (1 - share))
    assert np.array_equal(read_image(tmp_path / "b.png", None), flat)


@pytest.mark.parametrize(
    ("dtype", "count"),
    [("uint8", 1), ("uint8", 4), ("uint16", 3), ("uint16", 13), ("int16", 1), ("int16", 4), ("float32", 3)],
)
def test_tiff_of_any_type_reaches_input_spec(tmp_path, processor, dtype, count):
    bands = RNG.integers(0, 120, (count, 40, 60)).astype(dtype)
    if dtype == "float32":
        bands += 0.25
    write_bands(tmp_path / "a.tif", bands)
    spec = {"bands": [0] if count == 1 else [count - 1, 1, 0], "window": [0, 120]}
    path = tmp_path / "a.tif"
    tiles = encode(processor, path, spec)
    assert (tiles - expected(processor, bands, spec)).abs().max() < (0.02 if dtype == "uint8" else 1e-6)
    assert image_size(str(path)) == stored_size(path) == (40, 60)
    images = load_images({"images": [str(path)]}, InputSpec(bands=(0, 1, 2)))
    (square,) = SourceSettings(image_size=28).apply(images, None)
    assert image_size(square) == (28, 28)
    if count > 4:
        with pytest.raises(ValueError, match="13 bands"):
            encode(processor, path)


@pytest.mark.parametrize("image_format", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(tmp_path, image_format, orientation):
    exif = PIL.Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / f"a.{image_format.lower()}"
    picture(30, 20).save(path, image_format, exif=exif)
    upright = PIL.ImageOps.exif_transpose(PIL.Image.open(path))
    assert np.array_equal(load_images({"images": [str(path)]})[0], upright)
    assert np.array_equal(read_image(path, None), upright)
    assert np.array_equal(read_image(path, (2, 3, 12, 13)), np.asarray(upright)[3:13, 2:12])
    assert stored_size(path) == image_size(str(path)) == upright.size[::-1]


@pytest.mark.parametrize("orientation", range(1, 9))
def test_tiff_orientation_is_applied(tmp_path, orientation):
    deep = RNG.integers(0, 65536, (20, 30), dtype=np.uint16)
    shallow = np.asarray(picture(30, 20))
    for name, array in (("deep", deep), ("shallow", shallow)):
        path = tmp_path / f"{name}.tif"
        PIL.Image.fromarray(array).save(path, tiffinfo={274: orientation})
        exif = PIL.Image.Exif()
        exif[0x0112] = orientation
        file = io.BytesIO()
        picture(30, 20).save(file, "PNG", exif=exif)
        upright = np.asarray(PIL.ImageOps.exif_transpose(PIL.Image.open(file)))
        assert np.array_equal(turn(shallow, orientation), upright)  # Rotation by Pillow.
        whole = turn(array, orientation)
        assert np.array_equal(read_image(path, None), whole)
        assert np.array_equal(read_image(path, (2, 3, 12, 13)), whole[3:13, 2:12])
        assert np.array_equal(np.asarray(read_picture(path.read_bytes())), whole)
        assert stored_size(path) == image_size(str(path)) == whole.shape[:2]


def test_images_in_rows_keep_bits(tmp_path):
    pixels = RNG.integers(20000, 20255, (6, 8, 3), dtype=np.uint16)
    write_deep_png(tmp_path / "a.png", pixels)
    stored = {"bytes": (tmp_path / "a.png").read_bytes(), "path": None}
    mask = io.BytesIO()
    PIL.Image.fromarray(small_mask(0, 1)).save(mask, "PNG")
    columns = {"image": [stored], "mask": [{"bytes": mask.getvalue(), "path": None}]}
    (tmp_path / "data").mkdir()
    features = Features({name: ImageFeature() for name in columns})
    Dataset.from_dict(columns, features=features).to_parquet(tmp_path / "data" / "train.parquet")
    spec = {"window": [20000, 20255]}
    data = DenseData(classes=TWO, splits={"train": "train"}, dataset_name=str(tmp_path / "data"), input_spec=spec).open(
        ["train"]
    )
    assert np.array_equal(data[0]["images"][0].permute(1, 2, 0).numpy(), pixels - 20000)


def test_float_mask_must_have_integers(tmp_path):
    data = labelled_folder(tmp_path, {"a": None})
    data.splits["train"]["mask"] = "masks/{name}.tiff"
    mask = small_mask(0, 1, 1).astype(np.float32)
    dense_data.save(PIL.Image.fromarray(mask), tmp_path / "masks/a.tiff")
    assert np.array_equal(data.open(["train"])[0]["mask"], mask)
    for value in (0.5, float("nan"), -1.0, 3e9):
        mask[0, 1] = value
        dense_data.save(PIL.Image.fromarray(mask), tmp_path / "masks/a.tiff")
        with pytest.raises(ValueError, match="masks/a.tiff "):
            data.open(["train"])[0]


def save_in(kind, path):
    """Return an image as a TIFF may store it, and its colors."""
    image = picture(40, 30)
    if kind == "palette":
        image = image.quantize(17)
    elif kind in ("1", "L", "LA", "RGBA", "CMYK"):
        image = image.convert(kind)
    if kind in ("LA", "RGBA"):
        image.putalpha(PIL.Image.fromarray(RNG.integers(0, 256, (30, 40), dtype=np.uint8)))
    image.save(path)
    return image


@pytest.mark.parametrize("kind", ["RGB", "L", "palette", "1", "LA", "RGBA", "CMYK", "white is zero"])
def test_tiff_equals_pillow_in_rows_and_files(tmp_path, kind):
    path = tmp_path / "a.tif"
    if kind == "white is zero":
        write_bands(path, np.asarray(picture(40, 30).convert("L"))[None], photometric="MINISWHITE")
    else:
        save_in(kind, path)
    shown = to_pixels(PIL.Image.open(path), None)
    assert to_pixels(read_image(path, None), None).equal(shown)
    assert to_pixels(read_picture(path.read_bytes()), None).equal(shown)
    if kind in ("RGB", "L", "LA", "RGBA"):
        found = to_pixels(read_image(path, (3, 5, 30, 29)), None)
        assert (found.int() - shown[:, 5:29, 3:30].int()).abs().max() <= 1
    else:
        with pytest.raises(ValueError, match="a.tif stores"):
            read_image(path, (3, 5, 30, 29))
    if kind == "palette":  # Masks are read as palette indices.
        assert np.array_equal(read_image(path, None, as_stored=True), np.asarray(PIL.Image.open(path)))


@pytest.mark.parametrize("bits", [8, 12, 15, 16])
@pytest.mark.parametrize(("count", "has_colors"), [(1, False), (2, False), (3, True), (4, False), (4, True)])
def test_jpeg_2000_keeps_units(tmp_path, bits, count, has_colors):
    """Check that near infrared is not transparency, and that 16 bits, and 15 as in Sentinel-2, are kept."""
    dtype = "uint8" if bits == 8 else "uint16"
    bands = RNG.integers(0, 200, (count, 24, 32)).astype(dtype)
    path = tmp_path / "a.jp2"
    profile = {"driver": "JP2OpenJPEG", "count": count, "height": 24, "width": 32, "dtype": dtype}
    with rasterio.open(path, "w", **profile, NBITS=bits, REVERSIBLE="YES", QUALITY=100) as file:
        file.write(bands)
        if has_colors:
            names = ColorInterp.red, ColorInterp.green, ColorInterp.blue, ColorInterp.undefined
            file.colorinterp = names[:count]
    assert image_files(tmp_path) == [path]
    if count == 1 or (count == 4 and bits > 8):  # Pillow reads the fourth band of 8 bits as transparency.
        stored = bands[0] if count == 1 else bands.transpose(1, 2, 0)
        assert np.array_equal(np.asarray(read_image(path, None)), stored)
        assert np.array_equal(np.asarray(read_image(path, (8, 4, 30, 20))), stored[4:20, 8:30])
    for chosen in [[count - 1], [min(count - 1, 2), 0, count - 1]]:
        spec = {"window": [0, 200], "bands": chosen}
        wanted = bands[chosen] / 200
        processor = ViTPSegmentationImageProcessor(input_spec=spec, do_normalize=False)
        found = processor(str(path), return_tensors="pt")["pixel_values"][0]
        assert np.allclose(found, np.broadcast_to(wanted, found.shape), atol=1e-3)
        trained = to_pixels(read_image(path, None, InputSpec.from_dict(spec)), InputSpec.from_dict(spec))
        assert np.abs(trained.numpy() - 255 * wanted).max() <= 0.51


@pytest.mark.parametrize("count", [1, 2, 3, 4, 13])
@pytest.mark.parametrize(
    ("dtype", "interleave", "alpha"),
    [("uint8", "band", "YES"), ("uint8", "pixel", "NO"), ("uint16", "pixel", "YES"), ("float32", "band", "YES")]
    + [("int8", "band", "NO"), ("int16", "band", "NO"), ("int32", "pixel", "NO"), ("uint32", "pixel", "NO")],
)
def test_processor_reads_tiff_like_training(tmp_path, count, dtype, interleave, alpha):
    """Check that a TIFF is read like its array, also with values of the whole range of a type."""
    lowest, highest = 0, 200
    if dtype in ("int8", "int16", "int32", "uint32"):
        lowest, highest = np.iinfo(dtype).min, np.iinfo(dtype).max
    bands = RNG.integers(lowest, highest, (count, 24, 32)).astype(dtype)
    path = tmp_path / "a.tif"
    write_bands(path, bands, compress="deflate", interleave=interleave, alpha=alpha)
    spec = {"window": [float(lowest), float(highest)], "bands": [0] if count == 1 else [count - 1, 0, 1]}
    processor = ViTPSegmentationImageProcessor(input_spec=spec, do_normalize=False)
    wanted = (bands[spec["bands"]].astype(float) - lowest) / (highest - lowest)
    found = processor(str(path), return_tensors="pt")["pixel_values"][0]
    assert np.allclose(found, np.broadcast_to(wanted, found.shape), atol=1e-3)
    trained = to_pixels(read_image(path, None, InputSpec.from_dict(spec)), InputSpec.from_dict(spec))
    assert np.abs(trained.numpy() - 255 * wanted).max() <= 0.51
    again = ViTPSegmentationImageProcessor(do_normalize=False)(str(path), input_spec=spec, return_tensors="pt")
    assert again["pixel_values"][0].equal(found)


@pytest.mark.parametrize("has_alpha", [False, True])
def test_processor_reads_png_like_training(tmp_path, has_alpha):
    pixels = RNG.integers(0, 3000, (24, 32, 4 if has_alpha else 3), dtype=np.uint16)
    write_deep_png(tmp_path / "a.png", pixels)
    spec = {"window": [0, 3000]}
    processor = ViTPSegmentationImageProcessor(input_spec=spec, do_normalize=False)
    found = 255 * processor(tmp_path / "a.png", return_tensors="pt")["pixel_values"][0]
    trained = to_pixels(read_image(tmp_path / "a.png", None), InputSpec.from_dict(spec))
    assert (found - trained).abs().max() <= 0.51
    if not has_alpha:
        assert np.allclose(found, pixels.transpose(2, 0, 1) / 3000 * 255, atol=0.01)


@pytest.mark.parametrize("spec", [None, {"bands": [0]}, {"band_names": ["VV"]}])
def test_processor_turns_deep_tiff_like_training(tmp_path, spec):
    processor = ViTPSegmentationImageProcessor(input_spec=spec, do_normalize=False)
    for orientation in range(1, 9):
        pixels = RNG.integers(0, 65536, (20, 30), dtype=np.uint16)
        PIL.Image.fromarray(pixels).save(tmp_path / "a.tif", tiffinfo={274: orientation})
        found = processor(str(tmp_path / "a.tif"), return_tensors="pt")["pixel_values"][0, 0]
        assert np.allclose(found, turn(pixels, orientation) / 65535, atol=1e-6)


def test_named_bands_use_spec_of_call(tmp_path):
    bands = RNG.integers(0, 200, (3, 24, 32), dtype=np.uint16)
    write_bands(tmp_path / "a.tif", bands)
    mask = RNG.integers(0, 3, (24, 32), dtype=np.uint8)
    PIL.Image.fromarray(mask).save(tmp_path / "m.png")
    processor = ViTPSegmentationImageProcessor(input_spec={"band_names": ["VV", "VH"]}, do_normalize=False)
    spec = {"bands": [0, 2], "window": [0, 200]}
    found = processor(str(tmp_path / "a.tif"), str(tmp_path / "m.png"), input_spec=spec, return_tensors="pt")
    assert np.allclose(found["pixel_values"][0], bands[[0, 2]] / 200, atol=1e-3)
    assert np.array_equal(found["labels"][0], mask)


def test_gdal_virtual_file_is_not_followed(tmp_path):
    write_bands(tmp_path / "a.tif", RNG.integers(0, 200, (1, 24, 32), dtype=np.uint8))
    source = f"<SourceFilename>{tmp_path / 'a.tif'}</SourceFilename><SourceBand>1</SourceBand>"
    band = f'<VRTRasterBand dataType="Byte" band="1"><SimpleSource>{source}</SimpleSource></VRTRasterBand>'
    (tmp_path / "b.png").write_text(f'<VRTDataset rasterXSize="32" rasterYSize="24">{band}</VRTDataset>')
    with rasterio.open(tmp_path / "b.png") as file:
        assert file.driver == "VRT"
    with pytest.raises(ValueError, match="b.png.* cannot identify image file"):
        ViTPSegmentationImageProcessor()(str(tmp_path / "b.png"))
    of_bands = ViTPSegmentationImageProcessor(input_spec={"band_names": ["VV"]})
    for read in (of_bands, lambda path: open_images([Path(path)], of_bands).__enter__()):
        with pytest.raises(ValueError, match="b.png.* expected a TIFF"):
            read(str(tmp_path / "b.png"))


@pytest.mark.parametrize("overview", ["VRT", "TIFF"])
def test_overview_in_another_file_is_refused(tmp_path, overview):
    profile = {"driver": "GTiff", "width": 512, "height": 512, "count": 1, "dtype": "uint8"}
    for name in ("image.tif", "other.tif"):
        with rasterio.open(tmp_path / name, "w", **profile) as file:
            file.write(np.full((1, 512, 512), name == "other.tif", np.uint8))
    if overview == "VRT":
        source = f"<SourceFilename>{tmp_path / 'other.tif'}</SourceFilename><SourceBand>1</SourceBand>"
        band = f'<VRTRasterBand dataType="Byte" band="1"><SimpleSource>{source}</SimpleSource></VRTRasterBand>'
        (tmp_path / "image.tif.ovr").write_text(f'<VRTDataset rasterXSize="256" rasterYSize="256">{band}</VRTDataset>')
        with pytest.raises(ValueError, match="image.tif.ovr.* expected a TIFF"), open_raster(tmp_path / "image.tif"):
            pass
        return
    with rasterio.open(tmp_path / "image.tif", "r+") as file:
        file.update_tags(ns="OVERVIEWS", OVERVIEW_FILE=str(tmp_path / "other.tif"))
    for source in (tmp_path / "image.tif", (tmp_path / "image.tif").read_bytes()):
        with pytest.raises(ValueError, match="another file"), open_raster(source):
            pass


def test_too_many_bands_are_refused_before_decoding(tmp_path):
    path, profile = tmp_path / "a.tif", {"driver": "GTiff", "dtype": "uint8", "sparse_ok": True}
    with rasterio.open(path, "w", **profile, width=1000, height=1000, count=500):  # half a gigabyte
        pass
    assert path.stat().st_size < 30_000
    readers = (lambda: read_image(path, None, InputSpec()), lambda: read_picture(path.read_bytes(), InputSpec()))
    for read in (*readers, lambda: ViTPSegmentationImageProcessor()(str(path))):
        start = time.process_time()
        with pytest.raises(ValueError, match="500 bands"):
            read()
        assert time.process_time() - start < 0.5


def test_pipe_is_refused(tmp_path):
    os.mkfifo(tmp_path / "a.png")
    pipe = {"path": str(tmp_path / "a.png"), "bytes": None}
    readers = (lambda path: read_image(path, None), lambda _: load_images({"images": [pipe]}), check_file)
    for read in readers:
        with pytest.raises(ValueError, match="a.png.* pipe"):
            read(tmp_path / "a.png")


@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 20), st.data())
def test_windows_cover_an_image(width, height, size, data):
    overlap = data.draw(st.integers(0, size - 1))
    covered = np.zeros((height, width), dtype=int)
    boxes = windows((height, width), size, overlap)
    for box in boxes:
        left, top, right, bottom = box or (0, 0, width, height)
        assert 0 <= left < right <= width and 0 <= top < bottom <= height
        assert right - left == min(size, width) and bottom - top == min(size, height)
        covered[top:bottom, left:right] += 1
    assert covered.min() >= 1
    assert len(set(boxes)) == len(boxes)


@given(st.integers(1, 300), st.integers(1, 300), st.data())
def test_windows_cover_axis_and_end_with_it(length, window, data):
    stride = data.draw(st.integers(1, window))
    starts = window_starts(length, window, stride)
    covered = np.zeros(length, dtype=int)
    for start in starts:
        covered[start : start + window] += 1
    assert covered.min() >= 1
    assert starts[0] == 0 and starts[-1] + min(window, length) == length
    assert starts == sorted(set(starts)) and all(start == index * stride for index, start in enumerate(starts[:-1]))
    assert len(starts) == 1 + -(-max(length - window, 0) // stride)  # The smallest possible number of windows.


PNG = encoded_image(picture(30, 20))


@pytest.fixture
def server():
    """Serve an image, an endless one, a slow one and a redirect, and count the requests."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            server.asked.append(self.path)
            if self.path == "/none":
                return self.send_error(404)
            if self.path == "/moved":
                self.send_response(302)
                self.send_header("Location", "file:///etc/passwd")
                return self.end_headers()
            self.send_response(200)
            self.end_headers()
            try:
                while self.path == "/endless":
                    self.wfile.write(b"x" * 4096)
                while self.path == "/slow":
                    self.wfile.write(b"x")
                    self.wfile.flush()
                    threading.Event().wait(0.05)
                self.wfile.write(PNG)
            except OSError:
                pass  # The client closed the connection.

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.asked, server.daemon_threads = [], True
    server.url = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def asked_for(monkeypatch):
    monkeypatch.setenv(reading.FETCH_VARIABLE, "1")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)


def rows_of(url):
    part = {"type": "image"}
    answer = {"role": "assistant", "content": "3"}
    messages = [{"role": "user", "content": [part, {"type": "text", "text": "How many?"}]}, answer]
    rows = [{"images": [url], "messages": messages}, {"image": {"path": url, "bytes": None}, "messages": messages}]
    parts = ({"type": "image_url", "image_url": {"url": url}}, {"type": "image", "url": url})
    for odd in (*parts, {"type": "image", "image": url}):
        question = {"role": "user", "content": [odd, {"type": "text", "text": "?"}]}
        rows.append({"images": [], "messages": [question, answer]})
    return rows


@pytest.mark.parametrize("offline", [False, True])
def test_urls_are_not_fetched_by_default(server, processor, monkeypatch, offline):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", offline)
    if offline:
        monkeypatch.setenv(reading.FETCH_VARIABLE, "1")
    collator = ViTPDataCollator(processor)
    for row in rows_of(f"{server.url}/a.png"):
        with pytest.raises(ValueError, match="URL|image"):
            collator([row])
        SampleLength.of(collator)(row)
    assert server.asked == []


@pytest.mark.parametrize("path", ["file:///etc/passwd", "ftp://x/a.png", "s3://b/a.png", "zip://a.png::http://x/a.zip"])
def test_only_http_urls_are_fetched(asked_for, path):
    with pytest.raises(ValueError, match="http"):
        load_images({"images": [path]})


def test_enabled_urls_are_fetched(server, asked_for, processor):
    url = f"{server.url}/a.png"
    (image,) = load_images({"images": [url]})
    assert image.tobytes() == picture(30, 20).tobytes()
    assert image_size(url) == (20, 30)
    for row in rows_of(url)[:2]:
        assert "pixel_values" in ViTPDataCollator(processor)([row])


def test_fetching_has_limits(server, asked_for, monkeypatch):
    monkeypatch.setattr(reading, "FETCH_SECONDS", 1)
    monkeypatch.setattr(reading, "FETCH_BYTES", 3 << 20)
    for name, said in (("endless", "more than 3 MiB"), ("slow", "after 1 s"), ("none", "404"), ("moved", "fetched")):
        start = time.monotonic()
        with pytest.raises(ValueError, match=f"{server.url}/{name}.*{said}"):
            load_images({"images": [f"{server.url}/{name}"]})
        assert time.monotonic() - start < 5
    with socket.create_server(("127.0.0.1", 0)) as mute:
        url = f"http://127.0.0.1:{mute.getsockname()[1]}/a.png"
        with pytest.raises(ValueError, match=rf"{url}.*after 1 s|{url} cannot be fetched"):
            load_images({"images": [url]})


@pytest.mark.parametrize("streaming", [False, True])
def test_image_path_in_part_is_refused(tmp_path, streaming):
    rows = [{"conversations": row["messages"]} for row in rows_of("https://example.org/a.png")[2:]]
    rows += [{"image": "hf://datasets/a/b/c.png", "conversations": rows_of("")[0]["messages"]}]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    source = Source("s", annotation=str(tmp_path / "a.jsonl"), streaming=streaming, rows=4)
    errors = [row["error"] for row in read_source(source)]
    assert all("part" in error for error in errors[:3]) and "path or an HTTP URL" in errors[3]


def test_threads_restore_the_limit_of_pillow(monkeypatch):
    barrier, limit = threading.Barrier(2), PIL.Image.MAX_IMAGE_PIXELS

    def wait(path):
        with suppress(threading.BrokenBarrierError):
            if barrier.wait(0.5) == 1:  # the thread that came last
                time.sleep(0.2)
        return True

    monkeypatch.setattr(reading, "is_dicom_file", wait)
    threads = [threading.Thread(target=reading.stored_orientation, args=["a.png"]) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert PIL.Image.MAX_IMAGE_PIXELS == limit
