"""What percentiles make black and white where parts of an image are read, or some of it has no data."""

import numpy as np
import pytest
import rasterio
import torch
from datasets import Dataset, Features, Image
from PIL import Image as Pillow

from modeling_vitp import ViTPSegmentationImageProcessor
from modeling_vitp.dense.data import ImageFiles, LabelEncoding, Rows
from modeling_vitp.detection.data import ObjectImages, Place
from modeling_vitp.images.large import open_images
from modeling_vitp.training.files import FileSample

RNG = np.random.default_rng(0)
SPEC = {"percentiles": [2, 98]}
ENCODING = LabelEncoding([{"name": "a"}, {"name": "b"}])


def write_tiff(path, pixels, **profile):
    height, width = pixels.shape
    profile = {"driver": "GTiff", "height": height, "width": width, "count": 1, "dtype": pixels.dtype, **profile}
    with rasterio.open(path, "w", **profile) as file:
        file.write(pixels, 1)
    return path


def predicted(path):
    """Grey as `predict_large` shows the file to a model."""
    processor = ViTPSegmentationImageProcessor(input_spec=SPEC, do_normalize=False)
    with open_images([path], processor) as (image,):
        return 255 * image.inputs(image.read(0, image.dataset.height))["pixel_values"][0, 0]


def water_and_land():
    """Of 64 x 128 pixels; each half for itself has values that differ little."""
    return np.concatenate([RNG.normal(300, 20, (64, 64)), RNG.normal(3000, 20, (64, 64))], axis=1).astype(np.uint16)


def windowed(pixels, valid=None):
    low, high = np.percentile(pixels[valid] if valid is not None else pixels, (2, 98))
    return 255 * np.clip((pixels - low) / (high - low), 0, 1)


@pytest.mark.parametrize("suffix", ["tif", "png"])
def test_a_tile_has_the_percentiles_of_its_image(tmp_path, suffix):
    pixels = water_and_land()
    path = tmp_path / f"a.{suffix}"
    write_tiff(path, pixels) if suffix == "tif" else Pillow.fromarray(pixels).save(path)
    samples = ImageFiles([FileSample("a", {}, (path,), None)], ENCODING, SPEC, {"size": 64, "overlap": 0})
    tiles = torch.cat([samples[index]["images"][0][0] for index in range(len(samples))], dim=1).float()
    np.testing.assert_allclose(tiles, windowed(pixels), atol=0.51)
    np.testing.assert_allclose(tiles, predicted(path), atol=0.51)
    places = [Place("a", "a", path, (64, 128), window, None) for window in [(0, 0, 64, 64), (64, 0, 128, 64)]]
    images = ObjectImages(places, SPEC)
    assert torch.cat([images.image(index)[0] for index in range(2)], dim=1).float().equal(tiles)
    rows = Dataset.from_dict({"image": [str(path)]}, features=Features({"image": Image(decode=False)}))
    images = ObjectImages([Place("a", "a", 0, (64, 128), place.window, None) for place in places], SPEC, rows=rows)
    assert torch.cat([images.image(index)[0] for index in range(2)], dim=1).float().equal(tiles)


@pytest.mark.parametrize(("dtype", "nodata"), [("float32", -9999), ("float32", np.nan), ("uint16", 65535)])
def test_pixels_without_data_count_as_little_in_training_as_in_prediction(tmp_path, dtype, nodata):
    pixels = RNG.normal(500, 100, (64, 96)).clip(0).astype(dtype)
    pixels[:, :10] = nodata
    path = write_tiff(tmp_path / "a.tif", pixels, nodata=nodata)
    valid = np.zeros(pixels.shape, dtype=bool)
    valid[:, 10:] = True
    files = ImageFiles([FileSample("a", {}, (path,), None)], ENCODING, SPEC)
    stored = Dataset.from_dict({"image": [str(path)]}, features=Features({"image": Image(decode=False)}))
    for samples in (files, Rows(stored, ENCODING, SPEC)):
        found = samples[0]["images"][0][0].float()
        np.testing.assert_allclose(found[valid], windowed(pixels, valid)[valid], atol=0.51)
        np.testing.assert_allclose(found, predicted(path), atol=0.51)
