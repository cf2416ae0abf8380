"""A file that is read in rows, for `predict_large`, shows a model what the whole image does in training."""

import struct
import zlib

import numpy as np
import pytest
import rasterio
from PIL import Image

from modeling_vitp import InputSpec, ViTPSegmentationImageProcessor
from modeling_vitp.images.large import open_images, ranged
from modeling_vitp.images.pixels import to_pixels
from modeling_vitp.images.reading import read_image

HEIGHT, WIDTH = 24, 36
RNG = np.random.default_rng(0)
COLORS = RNG.integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)
ALPHA = np.full((HEIGHT, WIDTH), 255, dtype=np.uint8)
ALPHA[:8] = RNG.integers(0, 256, (8, WIDTH))
ALPHA[:, :9] = 0
COLORS[ALPHA == 0] = 0  # as mosaics have it
RGBA, LA = np.dstack([COLORS, ALPHA]), np.dstack([COLORS[..., 0], ALPHA])


def write_png(path, pixels, bits, color, chunks=()):
    """Of depths and chunks that Pillow does not write: `(height, width, samples)` of a color type of PNG."""

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
    size = {"height": HEIGHT, "width": WIDTH, "count": pixels.shape[2], "dtype": pixels.dtype}
    with rasterio.open(path, "w", driver="GTiff", **size, **profile) as file:
        file.write(pixels.transpose(2, 0, 1))


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


# Of WebP and JPEG 2000 training takes the percentiles of all pixels.
WITHOUT_PERCENTILES = [(name, spec) for name in TRANSPARENT for spec in (None, {"window": [20, 180]}, {"bands": [0]})]
WITH_PERCENTILES = [(name, {"percentiles": [10, 90]}) for name in TRANSPARENT if name.endswith(("tif", "png"))]


@pytest.mark.parametrize(("name", "spec"), WITHOUT_PERCENTILES + WITH_PERCENTILES)
def test_transparency_is_on_white_as_in_training(tmp_path, name, spec):
    """And bands that a spec asks for are as they are stored, but for files in which transparency is no band."""
    TRANSPARENT[name](tmp_path / name)
    seen, no_data, is_masked = in_rows(tmp_path / name, spec)
    np.testing.assert_allclose(seen, in_training(tmp_path / name, spec), atol=0.51)
    assert is_masked
    np.testing.assert_array_equal(no_data, ALPHA == 0)
    is_stored = spec is not None and "bands" in spec and not name.endswith(("png", "webp"))
    assert (seen[:, ALPHA == 0] == (0 if is_stored else 255)).all()


@pytest.mark.parametrize("samples", [1, 3])
def test_a_color_that_is_transparent_is_white(tmp_path, samples):
    key = struct.pack(f">{samples}H", *[0] * samples)
    write_png(tmp_path / "a.png", COLORS[..., :samples], 8, {1: 0, 3: 2}[samples], [(b"tRNS", key)])
    seen, no_data, _ = in_rows(tmp_path / "a.png", None)
    np.testing.assert_array_equal(no_data, (COLORS[..., :samples] == 0).all(-1))
    np.testing.assert_allclose(seen, in_training(tmp_path / "a.png", None), atol=1e-3)


@pytest.mark.parametrize("spec", [None, {"window": [20, 180]}, {"percentiles": [10, 90]}, {"bands": [0]}], ids=str)
@pytest.mark.parametrize("bits", [1, 2, 4, 8, 16])
def test_grey_of_any_depth_is_from_black_to_white(tmp_path, bits, spec):
    grey = RNG.integers(0, 2**bits, (HEIGHT, WIDTH, 1))
    write_png(tmp_path / "a.png", grey, bits, 0)
    seen, _, is_masked = in_rows(tmp_path / "a.png", spec)
    np.testing.assert_allclose(seen, in_training(tmp_path / "a.png", spec), atol=0.51)
    assert not is_masked
    if spec is None:
        np.testing.assert_allclose(seen, np.broadcast_to(255 / (2**bits - 1) * grey[..., 0], seen.shape), atol=1e-3)


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_a_palette_of_any_depth_is_refused(tmp_path, bits):
    palette = b"PLTE", RNG.integers(0, 256, 3 * 2**bits, dtype=np.uint8).tobytes()
    write_png(tmp_path / "a.png", RNG.integers(0, 2**bits, (HEIGHT, WIDTH, 1)), bits, 3, [palette, (b"tRNS", b"\0")])
    with pytest.raises(ValueError, match="a.png has a palette: expand it with gdal_translate -expand rgb"):
        in_rows(tmp_path / "a.png", None)


def test_colors_of_16_bits_are_as_they_are_stored(tmp_path):
    """Training does not take them with a transparency, so that they have no white that it would see."""
    write_tiff(tmp_path / "a.tif", 257 * RGBA.astype(np.uint16), photometric="RGB", alpha="YES")
    seen, no_data, _ = in_rows(tmp_path / "a.tif", None)
    np.testing.assert_allclose(seen, COLORS.transpose(2, 0, 1), atol=1e-3)
    np.testing.assert_array_equal(no_data, ALPHA == 0)
