"""Tests of the figures of detections."""

import numpy as np
import torch
from matplotlib.figure import Figure

from modeling_vitp.tasks.detection.pictures import draw_detections

SIDE = 64


def test_outline_and_mask_are_at_borders_of_pixels(tmp_path, monkeypatch):
    """A box around the pixels 10 to 19 lies on their outer borders, in the units of the axis."""
    mask = np.zeros((SIDE, SIDE), np.uint8)
    mask[10:20, 10:20] = 1
    figures = []
    monkeypatch.setattr(Figure, "savefig", lambda self, *args, **more: figures.append(self))
    labels, image = torch.zeros(1, dtype=torch.int64), torch.from_numpy(mask * 255).expand(3, -1, -1)
    found = {"labels": labels, "boxes": torch.tensor([[10.0, 10, 20, 20]]), "masks": [mask]}
    draw_detections([{"image": image, "id": "a"}], [found], ["ship"], tmp_path / "one.png")
    (axis,) = figures[0].axes
    assert axis.patches[0].get_xy()[:4].tolist() == [[10, 10], [20, 10], [20, 20], [10, 20]]
    for picture in axis.images:
        left, right, bottom, top = picture.get_extent()
        shown = np.asarray(picture.get_array())[..., -1 if picture is axis.images[1] else 0] > 0
        rows, columns = shown.nonzero()
        width = (right - left) / SIDE
        assert (left + columns.min() * width, left + (columns.max() + 1) * width) == (10, 20)
        assert (top + rows.min() * width, top + (rows.max() + 1) * width) == (10, 20)
    assert len(axis.images) == 2
