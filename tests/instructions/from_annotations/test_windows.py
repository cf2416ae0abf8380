"""Windows of scenes, encoded for rows."""

import numpy as np
import PIL.Image
import pytest
import rasterio
from pictures import write_bands
from rasterio.enums import ColorInterp

from modeling_vitp import InputSpec
from modeling_vitp.data.annotations import AnnotatedImage, upright_size
from modeling_vitp.data.windows import windows_of
from modeling_vitp.images.reading import read_picture
from modeling_vitp.instructions.from_annotations.encoding import image_bytes


@pytest.mark.parametrize(("bands", "dtype"), [(12, "uint16"), (2, "float32"), (4, "uint8"), (3, "uint8")])
def test_windows_keep_bands_and_depth(tmp_path, bands, dtype):
    scene = np.random.default_rng(0).integers(0, 250, (bands, 50, 70)).astype(dtype)
    path = write_bands(tmp_path / "scene.tif", scene)
    image = AnnotatedImage("scene", (path,), upright_size(path))
    assert image.size == (50, 70)
    found = windows_of(image, 40, 10)
    assert len(found) == 4
    for window in found:
        (stored,) = image_bytes(window)
        left, top, right, bottom = window.window
        pixels = np.asarray(read_picture(stored["bytes"], InputSpec(bands=(0, 1, 2)))).transpose(2, 0, 1)
        assert pixels.dtype == dtype and np.array_equal(pixels, scene[:, top:bottom, left:right])
        assert stored["path"] == ("scene.png" if bands == 3 else "scene.tif")


@pytest.mark.parametrize("fourth", [ColorInterp.undefined, ColorInterp.alpha])
def test_windows_have_transparency_only_if_the_scene_has(tmp_path, fourth):
    """GDAL marks a fourth 8-bit band of a new file as transparency, also if it is near infrared."""
    path = write_bands(tmp_path / "scene.tif", np.full((4, 50, 70), 30, np.uint8))
    with rasterio.open(path, "r+") as file:
        file.colorinterp = (*file.colorinterp[:3], fourth)
    for window in windows_of(AnnotatedImage("scene", (path,), (50, 70)), 40, 10):
        (stored,) = image_bytes(window)
        with rasterio.MemoryFile(stored["bytes"]) as memory, memory.open() as file:
            assert file.colorinterp[3] == fourth


def test_windows_of_16_bit_png_colors_are_refused(tmp_path):
    path = write_bands(tmp_path / "scene.png", np.zeros((3, 50, 70), np.uint16))
    with pytest.raises(ValueError, match="scene.png .*bits"):
        image_bytes(windows_of(AnnotatedImage("scene", (path,), (50, 70)), 40, 10)[0])


@pytest.mark.parametrize("name", ["scene.png", "scene.jpg", "scene.tif"])
def test_truncated_scene_is_named(tmp_path, name):
    pixels = np.random.default_rng(0).integers(0, 250, (70, 70, 4 if name == "scene.tif" else 3)).astype(np.uint8)
    path = tmp_path / name
    PIL.Image.fromarray(pixels).save(path)
    window = windows_of(AnnotatedImage("scene", (path,), (70, 70)), 40, 10)[-1]
    path.write_bytes(path.read_bytes()[:3000])
    with pytest.raises(ValueError, match=name):
        image_bytes(window)


def test_windows_of_huge_scene_are_read_separately(tmp_path, monkeypatch):
    """Follow the advice in the error for large images: use a TIFF."""
    scene = np.random.default_rng(0).integers(0, 250, (3, 50, 70)).astype(np.uint8)
    path = write_bands(tmp_path / "scene.tif", scene)
    monkeypatch.setattr(PIL.Image, "MAX_IMAGE_PIXELS", 50 * 70 // 4)
    for window in windows_of(AnnotatedImage("scene", (path,), (50, 70)), 25, 0):
        (stored,) = image_bytes(window)
        left, top, right, bottom = window.window
        pixels = np.asarray(read_picture(stored["bytes"])).transpose(2, 0, 1)
        assert np.array_equal(pixels, scene[:, top:bottom, left:right])
