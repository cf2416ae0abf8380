"""Tests of the figures of detections with boxes over the image border."""

import warnings

import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.text import Text

from modeling_vitp.detection.pictures import draw_detections

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
        assert axis.get_xlim() == (-0.5, SIDE - 0.5) and axis.get_ylim() == (SIDE - 0.5, -0.5)
        panel = axis.get_window_extent()
        for label in axis.texts:
            assert isinstance(label, Text) and label.get_clip_on() and label.get_bbox_patch().get_clip_on()
            x, y = label.get_transform().transform(label.get_position())
            assert panel.x0 - 1 <= x <= panel.x1 + 1 and panel.y0 - 1 <= y <= panel.y1 + 1
    assert len(crossing.axes[1].texts) == len(far)
