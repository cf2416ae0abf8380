"""Anchors, coders and matching, against mmdet's and mmrotate's (fixture `rotated_ops`) and plain loops."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from paths import FIXTURES
from safetensors.torch import load_file

from modeling_vitp.detection_boxes import (
    BACKGROUND,
    IGNORED,
    BoxCoder,
    MidpointCoder,
    RotatedBoxCoder,
    make_anchors,
    match,
    nms_by_label,
    of_class,
    sample,
    trained_anchors,
)
from modeling_vitp.rotated_boxes import corners, enclosing_boxes, rotated_iou

CODERS = {
    "delta": (BoxCoder((0.1, 0.1, 0.2, 0.2)), "proposals"),
    "rotated_delta": (RotatedBoxCoder(), "proposals"),
    "midpoint": (MidpointCoder(), "anchors"),
}
SIZE = torch.tensor([128.0, 150.0])  # of the image that the fixture's boxes are held in


@pytest.mark.parametrize("name", CODERS)
def test_deltas_are_made_and_applied_as_in_the_original_code(name):
    expected = load_file(FIXTURES / "rotated_ops" / "expected.safetensors")
    coder, kind = CODERS[name]
    boxes = expected[f"{name}.{kind}"]
    encoded = coder.encode(boxes, expected[f"{name}.gt"])  # to two units in the last place, which differ by the CPU
    torch.testing.assert_close(encoded, expected[f"{name}.encoded"], rtol=2.4e-7, atol=0)
    decoded = coder.decode(boxes, expected[f"{name}.deltas"], SIZE)
    torch.testing.assert_close(decoded, expected[f"{name}.decoded"], rtol=1e-5, atol=1e-5)


def random_boxes(number: int, seed: int) -> torch.Tensor:
    """Rotated boxes whose sides differ by a pixel at least and whose middles are in an image of 200 pixels."""
    draws = torch.rand(number, 5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    boxes = draws * torch.tensor([160.0, 160.0, 30.0, 20.0, math.pi - 1e-3]) + torch.tensor([20.0, 20, 22, 1, 0])
    boxes[:, 4] -= math.pi / 2
    return boxes


@pytest.mark.parametrize("seed", range(3))
def test_deltas_lead_to_the_boxes_that_they_were_made_of(seed):
    boxes, targets = random_boxes(50, seed), random_boxes(50, seed + 10)
    size = torch.tensor([200.0, 200.0])
    upright, upright_targets = enclosing_boxes(corners(boxes)), enclosing_boxes(corners(targets))
    found = BoxCoder().decode(upright, BoxCoder().encode(upright, upright_targets), size)
    torch.testing.assert_close(found, upright_targets.clamp(0, 200))
    found = RotatedBoxCoder().decode(boxes, RotatedBoxCoder().encode(boxes, targets), size)
    torch.testing.assert_close(rotated_iou(found, targets).diagonal(), torch.ones(50).double())
    found = MidpointCoder().decode(upright, MidpointCoder().encode(upright, targets), size)
    torch.testing.assert_close(rotated_iou(found, targets).diagonal(), torch.ones(50).double())


def test_anchors_are_placed_by_a_loop_over_cells_and_ratios():
    anchors = make_anchors([(2, 3), (1, 2)], 8, (0.5, 1.0, 2.0), torch.device("cpu"))
    wanted = []
    for rows, columns, stride in ((2, 3, 4), (1, 2, 8)):
        for row in range(rows):
            for column in range(columns):
                for ratio in (0.5, 1.0, 2.0):
                    width, height = 8 * stride / ratio**0.5, 8 * stride * ratio**0.5
                    x, y = column * stride, row * stride
                    wanted.append([x - width / 2, y - height / 2, x + width / 2, y + height / 2])
    torch.testing.assert_close(torch.cat(anchors), torch.tensor(wanted))


def test_anchors_that_leave_the_image_or_its_padding_are_not_trained_on():
    anchors = torch.tensor([[0.0, 0, 10, 10], [-0.1, 0, 9, 9], [80, 0, 90, 10], [80, 0, 89, 10], [90, 70, 106, 96]])
    assert trained_anchors(anchors, torch.tensor([80.0, 90.0]), False).tolist() == [0, 3]
    assert trained_anchors(anchors, torch.tensor([80.0, 90.0]), True).tolist() == [0, 1, 2, 3]  # to 96 x 96
    assert trained_anchors(anchors, torch.tensor([80.0, 97.0]), True).tolist() == [0, 1, 2, 3, 4]


def looped_match(overlaps: list[list[float]], positive: float, negative: float, low: float | None) -> list[int]:
    number = len(overlaps[0])
    matched = []
    for box in range(number):
        column = [row[box] for row in overlaps]
        best = max(column)
        matched.append(column.index(best) if best >= positive else BACKGROUND if best < negative else IGNORED)
    for index, row in enumerate(overlaps):
        if low is not None and max(row) >= low:
            matched = [index if row[box] == max(row) else matched[box] for box in range(number)]
    return matched


overlap = st.sampled_from([0.0, 0.1, 0.3, 0.4, 0.5, 0.7, 0.9])  # ties among them


@given(st.integers(1, 5).flatmap(lambda n: st.lists(st.lists(overlap, min_size=n, max_size=n), min_size=1, max_size=5)))
@settings(max_examples=200, deadline=None)
def test_boxes_are_matched_as_by_a_loop(overlaps):
    for low in (None, 0.3):
        found = match(torch.tensor(overlaps, dtype=torch.float64), 0.7, 0.3, low)
        assert found.tolist() == looped_match(overlaps, 0.7, 0.3, low)


def test_without_objects_all_is_background_and_without_boxes_nothing_is_matched():
    assert match(torch.zeros(0, 3), 0.5, 0.5, 0.5).tolist() == [BACKGROUND] * 3
    assert match(torch.zeros(2, 0), 0.5, 0.5, 0.5).tolist() == []


@given(st.lists(st.sampled_from([0, 1, BACKGROUND, IGNORED]), max_size=40), st.integers(0, 20), st.floats(0, 1))
@settings(max_examples=200, deadline=None)
def test_samples_are_of_the_right_kind_and_number(matched, number, share):
    matched = torch.tensor(matched, dtype=torch.long)
    positives, negatives = sample(matched, number, share)
    assert (matched[positives] >= 0).all() and (matched[negatives] == BACKGROUND).all()
    assert len(positives) == min(int(number * share), (matched >= 0).sum())
    assert len(negatives) == min(number - len(positives), (matched == BACKGROUND).sum())
    assert len(positives.unique()) == len(positives) and len(negatives.unique()) == len(negatives)


def test_every_box_is_drawn_as_often_as_another():
    torch.manual_seed(0)
    matched = torch.tensor([0] * 10 + [BACKGROUND] * 10)
    counts = torch.zeros(20)
    for _ in range(2000):
        for drawn in sample(matched, 8, 0.5):
            counts[drawn] += 1
    assert (counts / 2000 - 0.4).abs().max() < 0.05


def test_labels_are_suppressed_apart_however_far_out_the_boxes_are():
    """Without the shift of each label's boxes that costs float32 its precision."""
    boxes = torch.tensor(
        [[0.0, 0, 10, 10], [1, 0, 11, 10], [0, 0, 10, 10], [30000, 0, 30010, 10], [30001, 0, 30011, 10]]
    )
    scores, labels = torch.tensor([0.5, 0.9, 0.8, 0.7, 0.6]), torch.tensor([0, 0, 1, 1, 1])
    assert nms_by_label(boxes, scores, 0.5, labels).tolist() == [1, 2, 3]
    assert nms_by_label(boxes[:0], scores[:0], 0.5, labels[:0]).tolist() == []


def test_the_values_of_a_class_are_taken_or_the_only_ones():
    values = torch.arange(12.0).view(3, 2, 2)
    assert torch.equal(of_class(values, torch.tensor([1, 0, 1])), values[[0, 1, 2], [1, 0, 1]])
    assert torch.equal(of_class(values[:, :1], torch.tensor([7, 0, 3])), values[:, 0])
