"""Tests of the windows of large images, as in DOTA, and of the merging of their detections."""

import json

import numpy as np
import pytest
import shapely
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from paths import FIXTURES
from torchvision.ops import nms

from modeling_vitp.data.layouts.dota import dota_objects
from modeling_vitp.data.windows import inside, object_windows, shares_inside
from modeling_vitp.tasks.detection.prediction import merge

SPLIT = json.loads((FIXTURES / "dota_split" / "expected.json").read_text())


@pytest.mark.parametrize("name", SPLIT["sizes"])
def test_windows_equal_mmrotate_splitter(name):
    width, height = SPLIT["sizes"][name]
    found = dota_objects("\n".join(SPLIT["labels"][name]), name)
    corners = np.array([item.corners for item in found])
    windows = object_windows((height, width), size=1024, overlap=200)
    named = {f"{name}__1024__{left}___{top}": (left, top, right, bottom) for left, top, right, bottom in windows}
    assert set(named) == {patch for patch in SPLIT["patches"] if patch.startswith(name)}
    for patch, window in named.items():
        lines = [line.split() for line in SPLIT["patches"][patch]]
        places = np.flatnonzero(inside(corners, window, 1024))
        assert [found[place].label for place in places] == [line[8] for line in lines]
        expected = np.array([line[:8] for line in lines], float).reshape(-1, 4, 2)
        np.testing.assert_allclose(corners[places] - window[:2], expected, rtol=0, atol=1e-4)  # mmrotate uses float32.


@settings(deadline=None, max_examples=60)
@given(seed=st.integers(0, 2**32 - 1))
def test_share_inside_equals_shapely(seed):
    random = np.random.default_rng(seed)
    size = int(random.integers(1, 30))
    start = tuple(random.integers(-5, 20, 2).tolist())
    whole_numbers = random.random() < 0.3  # Integers, so that sides coincide with those of the window.
    polygons = []
    while len(polygons) < 5:
        points = random.integers(-5, 40, (4, 2)) if whole_numbers else random.uniform(-5, 40, (4, 2))
        polygon = shapely.Polygon(points)
        if polygon.is_valid and polygon.area > 0.1:
            polygons.append(points.astype(float))
    square = shapely.box(*start, start[0] + size, start[1] + size)
    expected = [shapely.Polygon(points).intersection(square).area / shapely.Polygon(points).area for points in polygons]
    np.testing.assert_allclose(shares_inside(np.stack(polygons), start, size), expected, rtol=0, atol=1e-9)


def test_small_images_have_one_window():
    assert object_windows((500, 600), 1024, 200) == [(0, 0, 600, 500)]
    # 1,200 pixels wide and 300 high: no window has more than 60% image, so both are kept.
    assert object_windows((300, 1200), 1024, 200) == [(0, 0, 1024, 300), (176, 0, 1200, 300)]
    assert object_windows((300, 1200), 1024, 200, min_image_share=0.2) == [(0, 0, 1024, 300), (176, 0, 1200, 300)]
    assert len(object_windows((3000, 3000), 1024, 200)) == 16


def test_window_detections_are_merged():
    random = np.random.default_rng(0)
    low = random.uniform(0, 180, (60, 2))
    boxes = torch.from_numpy(np.concatenate([low, low + random.uniform(5, 30, (60, 2))], 1)).float()
    scores, labels = torch.rand(60), torch.randint(0, 2, (60,))
    windows = object_windows((210, 210), 100, 45)
    parts, starts = [], []
    for left, top, right, bottom in windows:
        mine = (boxes[:, 0] >= left) & (boxes[:, 1] >= top) & (boxes[:, 2] <= right) & (boxes[:, 3] <= bottom)
        offset = torch.tensor([left, top, left, top])
        parts.append({"boxes": boxes[mine] - offset, "scores": scores[mine], "labels": labels[mine]})
        starts.append((left, top))
    assert sum(len(part["scores"]) for part in parts) > len(boxes)  # Many objects are in several windows.
    merged = merge(parts, starts, nms_threshold=0.3)
    kept = [
        torch.arange(60)[labels == label][nms(boxes[labels == label], scores[labels == label], 0.3)] for label in (0, 1)
    ]
    kept = torch.cat(kept)
    kept = kept[scores[kept].argsort(descending=True)]
    torch.testing.assert_close(merged["boxes"], boxes[kept])
    assert torch.equal(merged["scores"], scores[kept]) and torch.equal(merged["labels"], labels[kept])
