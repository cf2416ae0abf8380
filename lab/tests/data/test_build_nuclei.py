"""Tests of the nuclei data set: rows with oriented boxes and masks."""

import io
import zipfile

import cv2
import numpy as np
import pytest
import rasterio
from shapely import Polygon

from lab.data.build_nuclei import main
from modeling_vitp.tasks.detection.data import DetectionData


@pytest.fixture
def made(tmp_path):
    """Write twelve ellipses in an image of the original size, and return the folder and the labels."""
    random, labels = np.random.default_rng(0), np.zeros((512, 512), np.uint16)
    for label in range(1, 13):
        center = (128 * ((label - 1) % 4) + 64, 170 * ((label - 1) // 4) + 60)
        cv2.ellipse(labels, center, (random.integers(14, 22), 9), random.uniform(0, 180), 0, 360, label, -1)
    image = np.where(labels, 110, 20).astype(np.uint16)
    with zipfile.ZipFile(tmp_path / "stardist.whl", "w") as wheel:
        for name, values in (("img2d", image), ("mask2d", labels)):
            with rasterio.MemoryFile() as memory:
                with memory.open(driver="GTiff", height=512, width=512, count=1, dtype="uint16") as file:
                    file.write(values, 1)
                wheel.writestr(f"stardist/data/images/{name}.tif", io.BytesIO(memory.read()).getvalue())
    assert main(["--output_dir", str(tmp_path / "nuclei"), "--wheel", str(tmp_path / "stardist.whl")]) == 0
    return tmp_path / "nuclei", labels


@pytest.mark.filterwarnings("ignore::rasterio.errors.NotGeoreferencedWarning")
def test_windows_have_their_nuclei(made):
    folder, labels = made
    described = {"dataset_name": str(folder), "classes": ["nucleus"], "splits": {"train": "train", "test": "test"}}
    data = DetectionData.from_dict(described)
    for split, columns in (("train", (0, 256)), ("test", (256, 512))):
        samples = data.open([split], "instances")
        oriented = data.open([split], "oriented")
        assert len(samples) == {"train": 13 * 5, "test": 4 * 2}[split]
        for index in range(0, len(samples), 7):
            item, turned = samples[index], oriented[index]
            left, top = (int(part) for part in item["id"].split("/")[1].split("_"))
            assert columns[0] <= left and left + 128 <= columns[1]
            window = labels[top : top + 128, left : left + 128]
            sizes, inside = np.bincount(labels.flatten()), np.bincount(window.flatten(), minlength=13)
            mine = [label for label in range(1, 13) if inside[label] and 2 * inside[label] >= sizes[label]]
            assert len(item["masks"]) == len(mine)
            for label, mask, corners in zip(mine, item["masks"].numpy(), turned["corners"].numpy()):
                assert np.array_equal(mask > 0, window == label)
                rows, places = np.nonzero(mask)
                box = Polygon(corners).buffer(1e-2)
                assert all(
                    box.covers(Polygon([(x, y), (x + 1, y), (x + 1, y + 1), (x, y + 1)])) for x, y in zip(places, rows)
                )
                assert box.area < 1.6 * mask.sum()
