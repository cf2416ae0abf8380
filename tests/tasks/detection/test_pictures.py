"""Tests of the figures of detections with boxes over the image border."""

import warnings

import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.text import Text

from modeling_vitp.tasks.detection.pictures import draw_detections

SIDE = 64


def drawn(path, monkeypatch, corners) -> Figure:
    """Draw and save the figure of two samples, with warnings as errors."""
    figures = []
    save = Figure.savefig
    monkeypatch.setattr(
        Figure, "savefig", lambda self, *args, **more: (figures.append(self), save(self, *args, **more))
    )
    labels = torch.zeros(len(corners), dtype=torch.int64)
    sample = {"image": torch.full((3, SIDE, SIDE), 255, dtype=torch.uint8), "id": "a"}
    sample |= {"labels": labels[:0], "corners": torch.zeros(0, 4, 2)}
    found = {"labels": labels, "scores": torch.full((len(corners),), 0.5), "corners": corners}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        draw_detections([sample] * 2, [found] * 2, ["ship"], path)
    return figures[0]


def test_boxes_over_border_keep_panels(tmp_path, monkeypatch):
    box = torch.tensor([[0.0, 0.0], [20.0, 5.0], [18.0, 12.0], [-2.0, 7.0]])
    far = torch.stack([box + torch.tensor([dx, dy]) for dx in (-90.0, 20.0, 900.0) for dy in (-600.0, 20.0, 500.0)])
    with monkeypatch.context() as patch:
        alone = drawn(tmp_path / "alone.png", patch, torch.zeros(0, 4, 2))
    crossing = drawn(tmp_path / "crossing.png", monkeypatch, far)
    for axis, same in zip(crossing.axes, alone.axes, strict=True):
        np.testing.assert_allclose(axis.get_position().bounds, same.get_position().bounds, atol=1e-6)
        assert axis.get_xlim() == (0, SIDE) and axis.get_ylim() == (SIDE, 0)
        panel = axis.get_window_extent()
        for label in axis.texts:
            assert isinstance(label, Text) and label.get_clip_on() and label.get_bbox_patch().get_clip_on()
            x, y = label.get_transform().transform(label.get_position())
            assert panel.x0 - 1 <= x <= panel.x1 + 1 and panel.y0 - 1 <= y <= panel.y1 + 1
    assert len(crossing.axes[1].texts) == len(far)


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
