"""Box operations equal those of mmcv and mmrotate (fixture `rotated_ops`), shapely, torchvision, and plain loops."""

import math

import pytest
import shapely
import torch
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st
from paths import FIXTURES
from safetensors.torch import load_file
from torch.autograd import gradcheck

from modeling_vitp.detection_boxes import (
    BACKGROUND,
    IGNORED,
    BoxCoder,
    MidpointCoder,
    RotatedBoxCoder,
    match,
    nms_by_label,
    sample,
    trained_anchors,
)
from modeling_vitp.rotated_boxes import (
    corners,
    enclosing_boxes,
    intersections,
    rectangles,
    roi_align_rotated,
    rotated_iou,
    rotated_nms,
    smallest_rectangles,
    standard_form,
)


@pytest.fixture(scope="module")
def expected() -> dict[str, torch.Tensor]:
    return load_file(FIXTURES / "rotated_ops" / "expected.safetensors")


def random_boxes(number: int, seed: int, extent: float = 100.0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    draws = torch.rand(number, 5, generator=torch.Generator().manual_seed(seed), dtype=dtype)
    return draws * torch.tensor([extent, extent, 40, 25, 4 * math.pi], dtype=dtype) + torch.tensor([0, 0, 1, 1, -6.0])


coordinates = st.floats(-500, 500)
sides = st.floats(0.1, 500)
boxes_of_any_kind = st.lists(
    st.tuples(coordinates, coordinates, sides, sides, st.floats(-10, 10)), min_size=2, max_size=8
)


def test_corners_equal_original_code(expected):
    boxes = expected["convert.boxes"]
    assert torch.equal(corners(boxes).flatten(1), expected["convert.corners"])
    assert torch.equal(enclosing_boxes(corners(boxes)), expected["convert.enclosing"])
    found = rectangles(expected["convert.corners"].view(-1, 4, 2))
    torch.testing.assert_close(found, expected["convert.from_corners"], rtol=0, atol=5e-6)


def test_standard_form_angles_equal_original_code(expected):
    angles = expected["angles.in"]
    boxes = torch.tensor([0.0, 0.0, 2.0, 1.0, 0.0]).repeat(len(angles), 1)
    boxes[:, 4] = angles
    assert torch.equal(standard_form(boxes)[:, 4], expected["angles.le90"])


@given(boxes_of_any_kind)
@settings(max_examples=50, deadline=None)
def test_standard_form_is_recovered_from_corners(drawn):
    boxes = torch.tensor(drawn, dtype=torch.float64)
    normal = standard_form(boxes)
    assert (normal[:, 2] >= normal[:, 3]).all() and (normal[:, 4] >= -math.pi / 2).all()
    assert (normal[:, 4] < math.pi / 2).all()
    for form in (normal, rectangles(corners(boxes)), smallest_rectangles(corners(boxes))):
        distances = torch.cdist(corners(boxes), corners(form)).amin(-1)
        assert distances.max() < 1e-9


def test_smallest_rectangles_equal_opencv(expected):
    """`fit.valid` is false for boxes with a side below two pixels, which the original code omits."""
    quads, valid = expected["fit.quads"].view(-1, 4, 2), expected["fit.valid"]
    boxes = smallest_rectangles(quads)
    areas, theirs = boxes[valid, 2:4].prod(-1), expected["fit.boxes"][valid, 2:4].prod(-1)
    torch.testing.assert_close(areas, theirs, rtol=1e-6, atol=0)
    assert torch.equal(boxes[:, 3] >= 2, valid)
    for quad, box in zip(quads.double(), corners(smallest_rectangles(quads.double()))):
        assert shapely.distance(shapely.Polygon(box.numpy()), shapely.points(quad.numpy())).max() < 1e-9


@pytest.mark.parametrize("points", [[[3.0, 4.0]] * 4, [[0.0, 0.0], [0.0, 0.0], [2.0, 2.0], [2.0, 2.0]]])
def test_coinciding_points_have_rectangle_without_area(points):
    box = smallest_rectangles(torch.tensor(points))
    assert box.isfinite().all() and box[3].abs() < 1e-6
    torch.testing.assert_close(box[:2], torch.tensor(points).mean(0))


def test_overlaps_equal_original_code(expected):
    boxes1, boxes2 = expected["iou.boxes1"], expected["iou.boxes2"]
    torch.testing.assert_close(rotated_iou(boxes1, boxes2), expected["iou.iou"], rtol=0, atol=1e-6)
    pairs = boxes1.repeat_interleave(len(boxes2), 0), boxes2.repeat(len(boxes1), 1)
    shares = (intersections(*pairs) / pairs[0][:, 2:4].prod(-1)).view(len(boxes1), -1)
    torch.testing.assert_close(shares, expected["iou.iof"], rtol=0, atol=5e-6)


@given(boxes_of_any_kind)
@settings(max_examples=60, deadline=None)
def test_overlaps_equal_shapely(drawn):
    """Pairs with contradicting results of shapely are skipped.

    For long parallel boxes, one within the other, shapely computes an empty intersection and an empty difference.
    """
    boxes = torch.tensor(drawn, dtype=torch.float64)
    polygons = [shapely.Polygon(box) for box in corners(boxes).tolist()]
    found = rotated_iou(boxes, boxes)
    for row, one in enumerate(polygons):
        for column, other in enumerate(polygons):
            shared = one.intersection(other).area
            if all(
                abs(box.area - box.difference(rest).area - shared) < 1e-6 for box, rest in ((one, other), (other, one))
            ):
                assert abs(found[row, column] - shared / (one.area + other.area - shared)) < 1e-9


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-6)])
def test_overlaps_of_same_adjacent_and_nested_boxes(dtype, tolerance):
    for angle in torch.linspace(-2, 2, 21, dtype=dtype):
        along = torch.stack([angle.cos(), angle.sin()])
        box = torch.cat([torch.tensor([50, 50, 20, 10], dtype=dtype), angle[None]])
        beside, inner, turned = box.clone(), box.clone(), box.clone()
        beside[:2] += 20 * along
        inner[2:4] /= 2
        turned[2:] = torch.stack([box[3], box[2], angle + math.pi / 2])
        found = rotated_iou(box[None], torch.stack([box, turned, inner, beside]))[0]
        torch.testing.assert_close(found, torch.tensor([1, 1, 0.25, 0], dtype=dtype), rtol=0, atol=tolerance)


def test_overlaps_of_empty_boxes_are_zero():
    boxes = torch.tensor([[5.0, 5, 0, 0, 0], [5, 5, 4, 0, 1], [5, 5, 4, 2, 1]], requires_grad=True)
    overlaps = rotated_iou(boxes, boxes)
    assert torch.equal(overlaps[:2], torch.zeros(2, 3)) and overlaps[2, 2] == 1
    overlaps.sum().backward()
    assert boxes.grad.isfinite().all()
    assert rotated_iou(boxes[:0], boxes).shape == (0, 3) and rotated_iou(boxes, boxes[:0]).shape == (3, 0)


def test_gradients_of_overlaps_equal_finite_differences():
    boxes1 = random_boxes(6, seed=0, extent=30.0).requires_grad_()
    boxes2 = random_boxes(5, seed=1, extent=30.0).requires_grad_()
    assert (rotated_iou(boxes1, boxes2) > 0).sum() > 10
    assert gradcheck(rotated_iou, (boxes1, boxes2))
    assert gradcheck(lambda boxes: rectangles(corners(standard_form(boxes))), boxes1)


def greedy_nms(boxes: torch.Tensor, scores: torch.Tensor, threshold: float) -> list[int]:
    overlaps, kept = rotated_iou(boxes, boxes), []
    for index in scores.argsort(descending=True, stable=True).tolist():
        if all(overlaps[index, other] <= threshold for other in kept):
            kept.append(index)
    return kept


def test_nms_equals_original_code(expected):
    for threshold in (0.1, 0.5):
        kept = rotated_nms(expected["nms.boxes"], expected["nms.scores"], threshold)
        assert torch.equal(kept, expected[f"nms.keep_{threshold}"])
    boxes, scores = expected["multiclass_nms.boxes"], expected["multiclass_nms.scores"][:, :-1]
    proposals, labels = (scores > 0.05).nonzero().unbind(-1)
    kept = rotated_nms(boxes[proposals], scores[proposals, labels], 0.1, labels)[:100]
    found = torch.cat([boxes[proposals], scores[proposals, labels][:, None]], -1)[kept]
    assert torch.equal(found, expected["multiclass_nms.detections"])
    assert torch.equal(labels[kept], expected["multiclass_nms.labels"])


@pytest.mark.parametrize("extent, threshold", [(40.0, 0.1), (40.0, 0.5), (200.0, 0.1), (5.0, 0.7)])
def test_nms_equals_greedy_loop(extent, threshold):
    boxes = random_boxes(60, 0, extent)
    scores = torch.rand(60, generator=torch.Generator().manual_seed(0)).mul(20).round()  # ties among them
    assert rotated_nms(boxes, scores, threshold).tolist() == greedy_nms(boxes, scores, threshold)


def test_nms_keeps_labels_apart():
    boxes, scores = random_boxes(80, seed=3, extent=30.0), torch.rand(80, generator=torch.Generator().manual_seed(3))
    labels = torch.arange(80) % 3
    kept = rotated_nms(boxes, scores, 0.2, labels)
    assert scores[kept].tolist() == sorted(scores[kept].tolist(), reverse=True)
    for label in range(3):
        members = (labels == label).nonzero()[:, 0]
        alone = members[rotated_nms(boxes[members], scores[members], 0.2)]
        assert kept[labels[kept] == label].tolist() == alone.tolist()
    assert rotated_nms(boxes[:0], scores[:0], 0.2).tolist() == []
    assert rotated_nms(boxes[:0], scores[:0], 0.2, labels[:0]).tolist() == []


def test_pooling_and_gradient_equal_original_code(expected):
    features, rois = expected["roi_align.features"].clone().requires_grad_(), expected["roi_align.rois"]
    pooled = roi_align_rotated(features, rois[:, 1:], rois[:, 0].long(), 7, 0.25)
    torch.testing.assert_close(pooled, expected["roi_align.pooled"], rtol=0, atol=1e-5)
    pooled.backward(expected["roi_align.grad_pooled"])
    torch.testing.assert_close(features.grad, expected["roi_align.grad_features"], rtol=0, atol=1e-5)


def test_pooling_at_angle_zero_equals_torchvision():
    features = torch.randn(3, 4, 17, 1 + 22, generator=torch.Generator().manual_seed(0))
    boxes = random_boxes(50, seed=4, dtype=torch.float32)
    boxes[:, 4] = 0
    images = torch.arange(50) % 3
    upright = torch.cat([images[:, None].float(), enclosing_boxes(corners(boxes))], -1)
    pooled = roi_align_rotated(features, boxes, images, 5, 0.25, sampling_ratio=3)
    theirs = torchvision.ops.roi_align(features, upright, 5, 0.25, sampling_ratio=3, aligned=True)
    torch.testing.assert_close(pooled, theirs, rtol=0, atol=1e-5)


def test_pooling_in_parts_equals_pooling_at_once(monkeypatch):
    features, boxes = torch.randn(2, 3, 12, 12), random_boxes(11, seed=5, dtype=torch.float32)
    images = torch.arange(11) % 2
    whole = roi_align_rotated(features, boxes, images, 4)
    monkeypatch.setattr("modeling_vitp.rotated_boxes.ROIS_AT_ONCE", 2)
    torch.testing.assert_close(roi_align_rotated(features, boxes, images, 4), whole)
    assert roi_align_rotated(features, boxes[:0], images[:0], 4).shape == (0, 3, 4, 4)


def test_overlaps_in_parts_equal_overlaps_at_once(monkeypatch):
    boxes = random_boxes(40, seed=7)
    whole, kept = rotated_iou(boxes, boxes), rotated_nms(boxes, boxes[:, 0], 0.3)
    monkeypatch.setattr("modeling_vitp.rotated_boxes.PAIRS_AT_ONCE", 7)
    assert torch.equal(rotated_iou(boxes, boxes), whole)
    assert torch.equal(rotated_nms(boxes, boxes[:, 0], 0.3), kept)


CODERS = {
    "delta": (BoxCoder((0.1, 0.1, 0.2, 0.2)), "proposals"),
    "rotated_delta": (RotatedBoxCoder(), "proposals"),
    "midpoint": (MidpointCoder(), "anchors"),
}
SIZE = torch.tensor([128.0, 150.0])  # size of the fixture's image, to which boxes are clipped


@pytest.mark.parametrize("name", CODERS)
def test_deltas_equal_original_code(name):
    expected = load_file(FIXTURES / "rotated_ops" / "expected.safetensors")
    coder, kind = CODERS[name]
    boxes = expected[f"{name}.{kind}"]
    encoded = coder.encode(boxes, expected[f"{name}.gt"])  # CPUs differ in the last two units
    torch.testing.assert_close(encoded, expected[f"{name}.encoded"], rtol=2.4e-7, atol=0)
    decoded = coder.decode(boxes, expected[f"{name}.deltas"], SIZE)
    torch.testing.assert_close(decoded, expected[f"{name}.decoded"], rtol=1e-5, atol=1e-5)


def test_anchors_outside_image_are_not_trained():
    anchors = torch.tensor([[0.0, 0, 10, 10], [-0.1, 0, 9, 9], [80, 0, 90, 10], [80, 0, 89, 10], [90, 70, 106, 96]])
    assert trained_anchors(anchors, torch.tensor([80.0, 90.0]), False).tolist() == [0, 3]
    assert trained_anchors(anchors, torch.tensor([80.0, 90.0]), True).tolist() == [0, 1, 2, 3]  # padded to 96 x 96
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
@settings(max_examples=100, deadline=None)
def test_matching_equals_loop(overlaps):
    for low in (None, 0.3):
        found = match(torch.tensor(overlaps, dtype=torch.float64), 0.7, 0.3, low)
        assert found.tolist() == looped_match(overlaps, 0.7, 0.3, low)


def test_matching_without_objects_or_boxes():
    assert match(torch.zeros(0, 3), 0.5, 0.5, 0.5).tolist() == [BACKGROUND] * 3
    assert match(torch.zeros(2, 0), 0.5, 0.5, 0.5).tolist() == []


@given(st.lists(st.sampled_from([0, 1, BACKGROUND, IGNORED]), max_size=40), st.integers(0, 20), st.floats(0, 1))
@settings(max_examples=50, deadline=None)
def test_samples_have_requested_kinds_and_number(matched, number, share):
    matched = torch.tensor(matched, dtype=torch.long)
    positives, negatives = sample(matched, number, share)
    assert (matched[positives] >= 0).all() and (matched[negatives] == BACKGROUND).all()
    assert len(positives) == min(int(number * share), (matched >= 0).sum())
    assert len(negatives) == min(number - len(positives), (matched == BACKGROUND).sum())
    assert len(positives.unique()) == len(positives) and len(negatives.unique()) == len(negatives)


def test_every_box_is_sampled_equally_often():
    torch.manual_seed(0)
    matched = torch.tensor([0] * 10 + [BACKGROUND] * 10)
    counts = torch.zeros(20)
    for _ in range(1500):
        for drawn in sample(matched, 8, 0.5):
            counts[drawn] += 1
    assert (counts / 1500 - 0.4).abs().max() < 0.05


def test_nms_keeps_labels_apart_for_far_boxes():
    """Boxes of each label are not shifted, which would reduce the precision of float32."""
    boxes = torch.tensor(
        [[0.0, 0, 10, 10], [1, 0, 11, 10], [0, 0, 10, 10], [30000, 0, 30010, 10], [30001, 0, 30011, 10]]
    )
    scores, labels = torch.tensor([0.5, 0.9, 0.8, 0.7, 0.6]), torch.tensor([0, 0, 1, 1, 1])
    assert nms_by_label(boxes, scores, 0.5, labels).tolist() == [1, 2, 3]
    assert nms_by_label(boxes[:0], scores[:0], 0.5, labels[:0]).tolist() == []


def test_boxes_that_do_not_touch_are_kept_at_threshold_0():
    generator = torch.Generator().manual_seed(0)
    places = torch.rand(500, 2, 5, generator=generator, dtype=torch.float64)
    low, extent = torch.tensor([500.0, 500, 1, 1, -math.pi / 2]), torch.tensor([100, 100, 60, 20, math.pi])
    pairs = (places * extent + low).float()
    numbers = {True: 0, False: 0}
    for pair in pairs:
        one, other = map(shapely.Polygon, corners(pair.double()).tolist())
        shared = one.intersection(other).area / one.union(other).area
        if shared == 0 or shared > 1e-3:
            assert len(rotated_nms(pair, torch.tensor([0.9, 0.8]), 0.0)) == (2 if shared == 0 else 1)
            numbers[shared == 0] += 1
    assert min(numbers.values()) > 50
