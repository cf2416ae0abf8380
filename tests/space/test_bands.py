"""Automatic choice of the red, green and blue bands of satellite images."""

import numpy as np
import pytest
import rasterio
from bands import rgb_bands
from uploading import open_upload

SENTINEL_2 = ["B01", "B02", "B03", "B04", "B05", "B06", "B07", "B08", "B8A", "B09", "B11", "B12"]


def write(path, descriptions, count=None):
    """Write a GeoTIFF in which all pixels of band i are 100 * (i + 1), with nodata on the left."""
    count = count or len(descriptions)
    data = np.zeros((count, 16, 20), np.uint16)
    data[:, :, 10:] = 100 * (np.arange(count)[:, None, None] + 1)
    with rasterio.open(path, "w", driver="GTiff", height=16, width=20, count=count, dtype="uint16") as target:
        target.write(data)
        for index, name in enumerate(descriptions):
            target.set_band_description(index + 1, name)
    return path


@pytest.mark.parametrize(
    ("name", "descriptions", "wanted"),
    [
        ("scene", SENTINEL_2, [3, 2, 1]),
        ("scene", [f"{name} ({index * 50 + 440} nm)" for index, name in enumerate(SENTINEL_2)], [3, 2, 1]),
        ("LC08_L2SP_1", [f"SR_B{number}" for number in range(1, 8)], [3, 2, 1]),
        ("LE07_L2SP_1", ["SR_B1", "SR_B2", "SR_B3", "SR_B4", "SR_B5", "SR_B7"], [2, 1, 0]),
        ("LT05_1", ["Band 1", "Band 2", "Band 3", "Band 4"], [2, 1, 0]),
        ("planet", ["Coastal Blue", "Blue", "Green I", "Green", "Yellow", "Red", "Red Edge", "NIR"], None),
        ("naip", ["Red", "Green", "Blue", "NIR"], [0, 1, 2]),
        ("scene_B02_B03_B04_B08", ["", "", "", ""], [2, 1, 0]),
        ("scene_B02_B03", ["", "", "", ""], None),
        ("nothing", ["", "", "", "", ""], None),
        ("rgb", ["B04", "B03", "B02"], None),
    ],
)
def test_bands_are_found_by_name(tmp_path, name, descriptions, wanted):
    assert rgb_bands(write(tmp_path / f"{name}.tif", descriptions)) == wanted


def test_upload_uses_named_rgb_bands(tmp_path):
    path = write(tmp_path / "scene.tif", SENTINEL_2)
    reading = open_upload(str(path))
    np.testing.assert_array_equal(np.asarray(reading.image)[:, 0, -1], [400, 300, 200])
    assert "bands 4, 3, 2 of 12" in reading.note
    own = open_upload(str(path), input_spec={"bands": [0, 1, 2], "window": [0, 1000]})
    np.testing.assert_array_equal(np.asarray(own.image)[:, 0, -1], [100, 200, 300])
    assert rgb_bands(__file__) is None
