"""Tests that images read row by row for `predict_large` equal the images of training."""

import struct
import zlib

import numpy as np
import pytest
import torch
from datasets import Dataset, Features
from datasets import Image as ImageFeature
from pictures import write_bands
from PIL import Image

from modeling_vitp import InputSpec, ViTPSegmentationImageProcessor
from modeling_vitp.data.classes import LabelEncoding
from modeling_vitp.data.files import FileSample
from modeling_vitp.images.large import LineFile, RowFile, appears_whole, open_images, part_path, ranged, weights_digest
from modeling_vitp.images.pixels import to_pixels
from modeling_vitp.images.reading import read_image
from modeling_vitp.tasks.detection.data import ObjectImages, Place
from modeling_vitp.tasks.segmentation.data import ImageFiles, Rows

HEIGHT, WIDTH = 24, 36
RNG = np.random.default_rng(0)
COLORS = RNG.integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)
ALPHA = np.full((HEIGHT, WIDTH), 255, dtype=np.uint8)
ALPHA[:8] = RNG.integers(0, 256, (8, WIDTH))
ALPHA[:, :9] = 0
COLORS[ALPHA == 0] = 0  # Mosaics have 0 in transparent pixels.
SPEC = {"percentiles": [2, 98]}
ENCODING = LabelEncoding([{"name": "a"}, {"name": "b"}])
RGBA, LA = np.dstack([COLORS, ALPHA]), np.dstack([COLORS[..., 0], ALPHA])


def write_png(path, pixels, bits, color, chunks=()):
    """Write a PNG of shape `(height, width, samples)` with bit depths and chunks that Pillow does not support."""

    def chunk(name, content):
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    height, width = pixels.shape[:2]
    values = pixels.reshape(height, -1, 1).astype(">u2").view(np.uint8)
    rows = np.packbits(np.unpackbits(values, axis=-1)[..., 16 - bits :].reshape(height, -1), axis=-1)
    stored = zlib.compress(np.pad(rows, ((0, 0), (1, 0))).tobytes())
    header = struct.pack(">IIBBBBB", width, height, bits, color, 0, 0, 0)
    parts = [(b"IHDR", header), *chunks, (b"IDAT", stored), (b"IEND", b"")]
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in parts))


def write_tiff(path, pixels, **profile):
    return write_bands(path, np.atleast_3d(pixels).transpose(2, 0, 1), **profile)


def in_training(path, spec):
    spec = None if spec is None else InputSpec.from_dict(spec)
    return to_pixels(read_image(path, None, spec), ranged(spec, path, False)).float().numpy()


def in_rows(path, spec):
    processor = ViTPSegmentationImageProcessor(do_normalize=False, input_spec=spec)
    with open_images([path], processor) as (image,):
        parts = [image.read(top, bottom) for top, bottom in ((0, 5), (5, 12), (12, HEIGHT))]
        pixels = [image.inputs(part, do_resize=False).pixel_values[0].numpy() for part in parts]
        no_data = np.concatenate([image.has_no_data(0, 12), image.has_no_data(12, HEIGHT)])
        return 255 * np.concatenate(pixels, axis=1), no_data, image.is_masked


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize("subsampling", [0, 2])
def test_jpeg_has_pixels_of_training(tmp_path, mode, subsampling):
    colors = np.random.default_rng(0).integers(0, 256, (HEIGHT // 4 + 1, 10, 3), dtype=np.uint8)
    image = Image.fromarray(colors.repeat(4, 0)[:HEIGHT].repeat(4, 1))
    image.convert(mode).save(tmp_path / "a.jpg", quality=90, subsampling=subsampling)
    expected = np.asarray(Image.open(tmp_path / "a.jpg").convert("RGB")).transpose(2, 0, 1)
    found, _, _ = in_rows(tmp_path / "a.jpg", None)
    np.testing.assert_allclose(found, np.broadcast_to(expected, found.shape), atol=1e-3)


def test_pixel_limit_of_pillow_may_be_removed(tmp_path, monkeypatch):
    write_tiff(tmp_path / "a.tif", COLORS)
    expected, _, _ = in_rows(tmp_path / "a.tif", None)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    np.testing.assert_array_equal(in_rows(tmp_path / "a.tif", None)[0], expected)


TRANSPARENT = {
    "default.tif": lambda path: write_tiff(path, RGBA),
    "rgba.tif": lambda path: write_tiff(path, RGBA, photometric="RGB", alpha="YES"),
    "la.tif": lambda path: write_tiff(path, LA, photometric="MINISBLACK", alpha="YES"),
    "rgba.png": lambda path: Image.fromarray(RGBA).save(path),
    "la.png": lambda path: Image.fromarray(LA, "LA").save(path),
    "rgba.webp": lambda path: Image.fromarray(RGBA).save(path, lossless=True, exact=True),
    "rgba.jp2": lambda path: Image.fromarray(RGBA).save(path),
    "rgba_of_16_bits.png": lambda path: write_png(path, 257 * RGBA.astype(int), 16, 6),
    "la_of_16_bits.png": lambda path: write_png(path, 257 * LA.astype(int), 16, 4),
}


# Training computes percentiles of WebP and JPEG 2000 from all pixels.
WITHOUT_PERCENTILES = [(name, spec) for name in TRANSPARENT for spec in (None, {"window": [20, 180]}, {"bands": [0]})]
WITH_PERCENTILES = [(name, {"percentiles": [10, 90]}) for name in TRANSPARENT if name.endswith(("tif", "png"))]


@pytest.mark.parametrize(("name", "spec"), WITHOUT_PERCENTILES + WITH_PERCENTILES)
def test_transparent_pixels_are_white(tmp_path, name, spec):
    """Check transparency on white, and bands of a spec, which are read as stored except in PNG and WebP."""
    TRANSPARENT[name](tmp_path / name)
    seen, no_data, is_masked = in_rows(tmp_path / name, spec)
    np.testing.assert_allclose(seen, in_training(tmp_path / name, spec), atol=0.51)
    assert is_masked
    np.testing.assert_array_equal(no_data, ALPHA == 0)
    is_stored = spec is not None and "bands" in spec and not name.endswith(("png", "webp"))
    assert (seen[:, ALPHA == 0] == (0 if is_stored else 255)).all()


@pytest.mark.parametrize("samples", [1, 3])
def test_transparent_color_is_white(tmp_path, samples):
    key = struct.pack(f">{samples}H", *[0] * samples)
    write_png(tmp_path / "a.png", COLORS[..., :samples], 8, {1: 0, 3: 2}[samples], [(b"tRNS", key)])
    seen, no_data, _ = in_rows(tmp_path / "a.png", None)
    np.testing.assert_array_equal(no_data, (COLORS[..., :samples] == 0).all(-1))
    np.testing.assert_allclose(seen, in_training(tmp_path / "a.png", None), atol=1e-3)


@pytest.mark.parametrize("spec", [None, {"window": [20, 180]}, {"percentiles": [10, 90]}, {"bands": [0]}], ids=str)
@pytest.mark.parametrize("bits", [1, 2, 4, 8, 16])
def test_gray_spans_black_to_white(tmp_path, bits, spec):
    gray = RNG.integers(0, 2**bits, (HEIGHT, WIDTH, 1))
    write_png(tmp_path / "a.png", gray, bits, 0)
    seen, _, is_masked = in_rows(tmp_path / "a.png", spec)
    np.testing.assert_allclose(seen, in_training(tmp_path / "a.png", spec), atol=0.51)
    assert not is_masked
    if spec is None:
        np.testing.assert_allclose(seen, np.broadcast_to(255 / (2**bits - 1) * gray[..., 0], seen.shape), atol=1e-3)


@pytest.mark.parametrize("bits", [1, 8])
def test_palette_is_refused(tmp_path, bits):
    palette = b"PLTE", RNG.integers(0, 256, 3 * 2**bits, dtype=np.uint8).tobytes()
    write_png(tmp_path / "a.png", RNG.integers(0, 2**bits, (HEIGHT, WIDTH, 1)), bits, 3, [palette, (b"tRNS", b"\0")])
    with pytest.raises(ValueError, match="a.png has a palette"):
        in_rows(tmp_path / "a.png", None)


def test_16_bit_colors_are_read_as_stored(tmp_path):
    """Check that 16-bit colors are read as stored, because training refuses them with transparency."""
    write_tiff(tmp_path / "a.tif", 257 * RGBA.astype(np.uint16), photometric="RGB", alpha="YES")
    seen, no_data, _ = in_rows(tmp_path / "a.tif", None)
    np.testing.assert_allclose(seen, COLORS.transpose(2, 0, 1), atol=1e-3)
    np.testing.assert_array_equal(no_data, ALPHA == 0)


def predicted(path):
    """Return the gray values that `predict_large` reads from a file."""
    processor = ViTPSegmentationImageProcessor(input_spec=SPEC, do_normalize=False)
    with open_images([path], processor) as (image,):
        return 255 * image.inputs(image.read(0, image.dataset.height))["pixel_values"][0, 0]


def water_and_land():
    """Write an image of 64 x 128 pixels whose halves each have a small range of values."""
    return np.concatenate([RNG.normal(300, 20, (64, 64)), RNG.normal(3000, 20, (64, 64))], axis=1).astype(np.uint16)


def windowed(pixels, valid=None):
    low, high = np.percentile(pixels[valid] if valid is not None else pixels, (2, 98))
    return 255 * np.clip((pixels - low) / (high - low), 0, 1)


@pytest.mark.parametrize("suffix", ["tif", "png"])
def test_tile_uses_percentiles_of_image(tmp_path, suffix):
    pixels = water_and_land()
    path = tmp_path / f"a.{suffix}"
    write_tiff(path, pixels) if suffix == "tif" else Image.fromarray(pixels).save(path)
    samples = ImageFiles([FileSample("a", {}, (path,), None)], ENCODING, SPEC, {"size": 64, "overlap": 0})
    tiles = torch.cat([samples[index]["images"][0][0] for index in range(len(samples))], dim=1).float()
    np.testing.assert_allclose(tiles, windowed(pixels), atol=0.51)
    np.testing.assert_allclose(tiles, predicted(path), atol=0.51)
    places = [Place("a", "a", path, (64, 128), window, None, "a") for window in [(0, 0, 64, 64), (64, 0, 128, 64)]]
    images = ObjectImages(places, SPEC)
    assert torch.cat([images.image(index)[0] for index in range(2)], dim=1).float().equal(tiles)
    rows = Dataset.from_dict({"image": [str(path)]}, features=Features({"image": ImageFeature(decode=False)}))
    images = ObjectImages([Place("a", "a", 0, (64, 128), place.window, None, "a") for place in places], SPEC, rows=rows)
    assert torch.cat([images.image(index)[0] for index in range(2)], dim=1).float().equal(tiles)


@pytest.mark.parametrize(("dtype", "nodata"), [("float32", -9999), ("float32", np.nan), ("uint16", 65535)])
def test_nodata_is_ignored_in_training_and_prediction(tmp_path, dtype, nodata):
    pixels = RNG.normal(500, 100, (64, 96)).clip(0).astype(dtype)
    pixels[:, :10] = nodata
    path = write_tiff(tmp_path / "a.tif", pixels, nodata=nodata)
    valid = np.zeros(pixels.shape, dtype=bool)
    valid[:, 10:] = True
    files = ImageFiles([FileSample("a", {}, (path,), None)], ENCODING, SPEC)
    stored = Dataset.from_dict({"image": [str(path)]}, features=Features({"image": ImageFeature(decode=False)}))
    for samples in (files, Rows(stored, ENCODING, SPEC)):
        found = samples[0]["images"][0][0].float()
        np.testing.assert_allclose(found[valid], windowed(pixels, valid)[valid], atol=0.51)
        np.testing.assert_allclose(found, predicted(path), atol=0.51)


def test_incomplete_lines_and_rows_are_removed(tmp_path):
    with LineFile(tmp_path / "lines", {"of": 1}) as lines:
        lines.append([{"a": 1}, "ü"])
        lines.append([])
    with RowFile(tmp_path / "rows", (2, 3), {"of": 1}) as rows:
        rows.append(np.arange(12, dtype=np.uint8).reshape(2, 2, 3))
    for name in ("lines", "rows"):
        with open(tmp_path / name, "ab") as file:
            file.write(b'[{"a"')
    with LineFile(tmp_path / "lines", {"of": 1}) as lines, RowFile(tmp_path / "rows", (2, 3), {"of": 1}) as rows:
        assert len(lines) == len(rows) == 2
        lines.append({"b": 0.1})
        rows.append(np.full((1, 2, 3), 7, dtype=np.uint8))
        assert list(lines) == list(lines) == [[{"a": 1}, "ü"], [], {"b": 0.1}]
        assert [top for top, _ in rows.read(2)] == [0, 2]
        np.testing.assert_array_equal(
            np.concatenate([part for _, part in rows.read(2)]).ravel(), [*range(12), *[7] * 6]
        )
        lines.delete()
        rows.delete()
    assert list(tmp_path.iterdir()) == []


def test_part_file_with_other_settings_is_refused(tmp_path):
    with LineFile(tmp_path / "lines", {"of": [1, 2], "by": (2,)}):
        pass
    with LineFile(tmp_path / "lines", {"of": [1, 2], "by": (3,)}) as lines:  # The file has no results yet.
        lines.append(0)
    with LineFile(tmp_path / "lines", {"of": [1, 2], "by": [3]}):
        pass
    with pytest.raises(ValueError, match="lines .*different by"):
        LineFile(tmp_path / "lines", {"of": [1, 2], "by": [4]}).__enter__()


def test_failed_file_does_not_appear(tmp_path):
    path = tmp_path / "result"
    with pytest.raises(ZeroDivisionError), appears_whole(path) as unfinished:
        unfinished.write_text(str(1 / 0))
    assert not path.exists()
    assert part_path([path]) == tmp_path / "result.part"
    with appears_whole(path) as unfinished:
        unfinished.write_text("whole")
        assert not path.exists()
    assert path.read_text() == "whole" and list(tmp_path.iterdir()) == [path]
    with pytest.raises(FileExistsError, match="result"):
        part_path([tmp_path / "other", path])


def test_weights_digest_depends_on_weights():
    torch.manual_seed(0)
    one, other = torch.nn.Linear(3, 2), torch.nn.Linear(3, 2)
    assert weights_digest(one) != weights_digest(other)
    other.load_state_dict(one.state_dict())
    assert weights_digest(one) == weights_digest(other) != weights_digest(other.to(torch.bfloat16))
