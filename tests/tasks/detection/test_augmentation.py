"""Tests of the joint augmentation of images, boxes and masks."""

import math
from collections import Counter

import cv2
import numpy as np
import pytest
import torch
from detection_data import build_augmentation
from hypothesis import given, settings
from hypothesis import strategies as st
from paths import FIXTURES
from safetensors.torch import load_file

from modeling_vitp.images.corruptions import motion, parameters
from modeling_vitp.rotated_boxes import corners, smallest_rectangles
from modeling_vitp.tasks.detection.augmentation import Sample, flipped, moved, resized, resized_size, targets, turned

MOVES = {
    "flip_horizontal": lambda sample: flipped(sample, True, False),
    "flip_vertical": lambda sample: flipped(sample, False, True),
    "flip_diagonal": lambda sample: flipped(sample, True, True),
    "resize_160_keep_ratio": lambda sample: resized(sample, 160),
    **{f"rotate_{angle}": lambda sample, angle=angle: turned(sample, angle) for angle in (37, -120, 90)},
}
# mmrotate flips boxes to width - x - 1, which is one pixel off in continuous coordinates.
ONE_OFF = {"flip_horizontal": (1, 0), "flip_vertical": (0, 1), "flip_diagonal": (1, 1)}


@pytest.mark.parametrize("name", MOVES)
def test_transforms_equal_mmrotate(name):
    fixture = load_file(FIXTURES / "rotated_transforms" / "expected.safetensors")
    image = fixture["image"].permute(2, 0, 1)
    sample = MOVES[name](Sample(image, corners(fixture["boxes"]), fixture["labels"]))
    assert torch.equal(sample.labels, fixture[f"{name}.labels"])
    expected = corners(fixture[f"{name}.boxes"]) + torch.tensor(ONE_OFF.get(name, (0, 0)))
    found = corners(smallest_rectangles(sample.corners))
    # Equal rectangles may start at different corners.
    apart = [(found.roll(start, 1) - expected).abs().amax((1, 2)) for start in range(4)]
    assert torch.stack(apart).amin(0).max() < 1e-4
    difference = (sample.image.float() - fixture[f"{name}.image"].permute(2, 0, 1).float()).abs().mean()
    assert difference < 0.2  # Gray levels. OpenCV interpolates in steps of 1/32.


def black_image(points: torch.Tensor, height: int, width: int, masks: torch.Tensor | None = None) -> Sample:
    """Return a black image with objects of the classes 0, 1, …."""
    return Sample(torch.zeros(3, height, width, dtype=torch.uint8), points, torch.arange(len(points)), masks)


def painted(points: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Return the mask of a quadrilateral."""
    y, x = torch.meshgrid(torch.arange(height) + 0.5, torch.arange(width) + 0.5, indexing="ij")
    mask = torch.ones(height, width, dtype=torch.bool)
    for (x1, y1), (x2, y2) in zip(points.tolist(), points.roll(-1, 0).tolist()):
        mask &= (x2 - x1) * (y - y1) - (y2 - y1) * (x - x1) >= 0
    return mask.to(torch.uint8)


@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 2**32 - 1), keep_ratio=st.booleans())
def test_image_corners_and_mask_agree(seed, keep_ratio):
    generator = torch.Generator().manual_seed(seed)
    angle, side, other = (torch.rand(3, generator=generator) * torch.tensor([math.pi, 30, 15])).tolist()
    points = corners(torch.tensor([[60.0, 50, 15 + side, 15 + other, angle]]))
    mask = painted(points[0], 100, 130)
    sample = Sample(mask.expand(3, -1, -1) * 255, points, torch.tensor([0]), mask[None])
    augment, state = build_augmentation(110, keep_ratio, (0.25, 0.25, 0.25), rotation=0.7), generator.get_state()
    moved = augment(sample, generator)
    assert moved.size == resized_size((100, 130), 110, keep_ratio)
    # With masks, a rotated box becomes the upright one around its mask.
    (points,) = augment(Sample(sample.image, points, sample.labels), generator.set_state(state)).corners
    assert len(moved.corners) == len(moved.masks) == 1
    again = painted(points if clockwise(points) else points.flip(0), *moved.size)
    seen = moved.image[0] > 127
    for one in (seen, moved.masks[0] > 0):
        shared, either = (one & (again > 0)).sum(), (one | (again > 0)).sum()
        assert shared / either > 0.85


def clockwise(points: torch.Tensor) -> bool:
    x, y = points.T
    return bool((x * y.roll(-1) - y * x.roll(-1)).sum() > 0)


def test_augmentation_depends_on_generator_alone():
    image = torch.randint(0, 256, (3, 60, 80), dtype=torch.uint8)
    sample = Sample(image, corners(torch.tensor([[40.0, 30, 20, 10, 0.3]])), torch.tensor([0]))
    augmentation = build_augmentation(64, flips=(0.25, 0.25, 0.25), rotation=0.5)
    results = []
    for global_seed in (0, 1):
        torch.manual_seed(global_seed)
        results.append([augmentation(sample, torch.Generator().manual_seed(seed)) for seed in range(20)])
    for one, other in zip(*results):
        assert torch.equal(one.image, other.image) and torch.equal(one.corners, other.corners)
    assert len({tuple(one.corners.flatten().tolist()) for one in results[0]}) > 8


def test_flips_have_their_probabilities():
    sample = black_image(torch.tensor([[[1.0, 2], [4, 2], [4, 3], [1, 3]]]), 10, 10)
    augmentation = build_augmentation(10, flips=(0.2, 0.3, 0.4))
    generator, counts = torch.Generator().manual_seed(0), Counter()
    for _ in range(2000):
        middle = augmentation(sample, generator).corners.mean((0, 1))
        counts[tuple(middle.tolist())] += 1
    shares = {(2.5, 2.5): 0.1, (7.5, 2.5): 0.2, (2.5, 7.5): 0.3, (7.5, 7.5): 0.4}
    assert set(counts) == set(shares)
    for middle, share in shares.items():
        assert abs(counts[middle] / 2000 - share) < 4 * (share * (1 - share) / 2000) ** 0.5


def test_some_classes_rotate_by_right_angles():
    sample = black_image(corners(torch.tensor([[40.0, 40, 30, 10, 0.0], [40, 40, 10, 10, 0]])), 80, 80)
    generator = torch.Generator().manual_seed(0)

    def first_side(right_angle_class):
        augmentation = build_augmentation(80, flips=(0, 0, 0), rotation=1.0, right_angle_classes=[right_angle_class])
        points = augmentation(sample, generator).corners[0]
        return points[1] - points[0]

    angles = Counter()
    for _ in range(1000):
        x, y = first_side("1")
        angles[round(math.degrees(math.atan2(y, x))) % 360] += 1
    assert set(angles) == {90, 180, 270}  # never 0
    for angle, share in ((90, 0.25), (180, 0.5), (270, 0.25)):
        assert abs(angles[angle] / 1000 - share) < 4 * (share * (1 - share) / 1000) ** 0.5
    assert min(abs(first_side("7"))) > 0.1


@pytest.mark.parametrize("rotation", [0.0, 1e-6, 0.5])
def test_small_and_cut_objects_are_removed_from_all_samples(rotation):
    """Without a rotation in the settings, all objects stay."""
    boxes = torch.tensor(
        [
            [40.0, 40, 30, 10, 0],
            [40, 40, 30, 5, 0],  # a side of 5 pixels
            [40, 40, 30, 5.5, 0],
            [81, 40, 30, 10, 0],  # its center is outside
            [40, 79, 30, 10, 0],
        ]
    )
    sample = black_image(corners(boxes), 80, 80)
    augmentation = build_augmentation(80, flips=(0, 0, 0), rotation=rotation)
    generator = torch.Generator().manual_seed(0)
    results = [augmentation(sample, generator) for _ in range(20)]
    unturned = [result for result in results if torch.equal(result.corners[0], sample.corners[0])]
    assert (len(unturned) < 20) == (rotation == 0.5)
    for result in unturned:
        kept = [0, 1, 2, 3, 4] if rotation == 0 else [0, 2, 4]
        assert torch.equal(result.corners, sample.corners[kept])


def test_rotation_that_removes_all_is_skipped():
    sample = black_image(corners(torch.tensor([[3.0, 3, 5.5, 5.5, 0]])), 80, 80)
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        assert len(build_augmentation(80, rotation=1.0)(sample, generator).labels) == 1
    nothing = black_image(torch.zeros(0, 4, 2), 80, 80)
    assert build_augmentation(40, rotation=1.0)(nothing, generator).corners.shape == (0, 4, 2)


@pytest.mark.parametrize("angle", [30, 90])
def test_rotated_box_of_disc_fits_its_mask(angle):
    y, x = torch.meshgrid(torch.arange(200) + 0.5, torch.arange(200) + 0.5, indexing="ij")
    centers = [(100, 100), (60, 120), (190, 105)]  # the last one is cut by the border
    masks = torch.stack([(x - cx) ** 2 + (y - cy) ** 2 < 30**2 for cx, cy in centers]).to(torch.uint8)
    sample = black_image(corners(torch.tensor([[cx, cy, 60.0, 60, 0] for cx, cy in centers])), 200, 200, masks)
    moved = turned(sample, angle)
    boxes = targets(moved, is_oriented=False)["boxes"] * 200
    for label, (cx, cy, width, height), mask in zip(moved.labels.tolist(), boxes, moved.masks.numpy()):
        rows, columns = mask.nonzero()
        expected = torch.tensor([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]).float()
        found = torch.stack([cx - width / 2, cy - height / 2, cx + width / 2, cy + height / 2])
        torch.testing.assert_close(found, expected, atol=1e-3, rtol=0)
        if label < 2:  # a whole disc keeps its extent
            assert abs(width - 60) <= 1.5 and abs(height - 60) <= 1.5
    assert moved.labels.tolist()[:2] == [0, 1]
    nothing = turned(sample.take(torch.zeros(3, dtype=torch.bool)), angle)
    assert nothing.corners.shape == (0, 4, 2) and nothing.masks.shape == (0, 200, 200)


def test_targets_are_relative_and_upright_ones_are_clipped():
    points = torch.tensor([[[-10.0, 5], [30, 5], [30, 25], [-10, 25]], [[90, 40], [120, 40], [120, 70], [90, 70]]])
    sample = black_image(points, 50, 100)
    found = targets(sample, is_oriented=False)
    assert found["class_labels"].tolist() == [0, 1] and set(found) == {"class_labels", "boxes"}
    torch.testing.assert_close(found["boxes"], torch.tensor([[0.15, 0.3, 0.3, 0.4], [0.95, 0.9, 0.1, 0.2]]))
    whole = targets(sample, is_oriented=True)["corners"] * torch.tensor([100, 50])
    torch.testing.assert_close(whole, points)
    nothing = sample.take(torch.zeros(2, dtype=torch.bool))
    assert targets(nothing, False)["boxes"].shape == (0, 4) and targets(nothing, True)["corners"].shape == (0, 4, 2)


def item_of(corners: np.ndarray, height: int, width: int, **more) -> dict:
    number = len(corners)
    nothing = torch.zeros(number, dtype=torch.bool)
    return {
        "image": torch.zeros(3, height, width, dtype=torch.uint8),
        "corners": torch.from_numpy(corners).float(),
        "labels": torch.arange(number),
        "difficult": nothing,
        "crowd": nothing,
        "area": torch.arange(1.0, number + 1).double(),
        **more,
    }


@pytest.mark.parametrize("name", ["rotation", "scale", "translation"])
@pytest.mark.parametrize("severity", [1, 4])
def test_moved_objects_match_opencv(name, severity):
    """Compare corners with a matrix of OpenCV, and masks with the image that is moved by it."""
    height, width = 150, 220
    random = np.random.default_rng(severity)
    centers, halves = random.uniform((60, 45), (160, 105), (6, 2)), random.uniform(6, 16, (6, 2))
    angles = random.uniform(0, 180, 6)
    corners = np.stack([cv2.boxPoints((c, 2 * h, a)) for c, h, a in zip(centers, halves, angles)]).astype(float)
    masks = np.stack(
        [cv2.fillPoly(np.zeros((height, width), np.uint8), [(c - 0.5).round().astype(int)], 1) for c in corners]
    )
    matrix = motion(name, severity, height, width, seed=3)
    if name == "translation":
        ours = np.array([[1, 0, 0], [0, 1, 0]], float)
        ours[:, 2] = np.sign(matrix[:, 2].numpy()) * parameters(name, severity)["shift"]
    else:
        angle, factor = (parameters(name, severity).get(key, other) for key, other in (("degrees", 0), ("factor", 1)))
        ours = cv2.getRotationMatrix2D((width / 2, height / 2), angle, factor)
    expected = cv2.transform(corners, ours)
    item = item_of(corners, height, width, masks=torch.from_numpy(masks))
    found = moved(item, matrix, is_oriented=True)
    kept = found["labels"].numpy()
    inside = ((expected.mean(1) > 0) & (expected.mean(1) < [width, height])).all(1)
    assert kept.tolist() == np.flatnonzero(inside).tolist() and len(kept) > 2
    np.testing.assert_allclose(found["corners"], expected[kept], atol=1e-3)

    found = moved({key: value for key, value in item.items() if key != "masks"}, matrix, is_oriented=False)
    boxes = np.concatenate([expected.min(1), expected.max(1)], 1)[kept].clip(0, [width, height, width, height])
    np.testing.assert_allclose(found["corners"][:, [0, 2]].flatten(1), boxes, atol=1e-3)

    found = moved(item, matrix, is_oriented=False)
    shifted = np.array([[1, 0, 0.5], [0, 1, 0.5], [0, 0, 1]])  # OpenCV counts from the centers of pixels.
    ours = (np.linalg.inv(shifted) @ np.vstack([ours, [0, 0, 1]]) @ shifted)[:2]
    for mask, box, index in zip(found["masks"].numpy(), found["corners"][:, [0, 2]].flatten(1), kept):
        warped = cv2.warpAffine(masks[index], ours, (width, height), flags=cv2.INTER_NEAREST)
        assert (mask & warped).sum() > 0.9 * (mask | warped).sum()
        y, x = np.nonzero(mask)
        assert box.tolist() == [x.min(), y.min(), x.max() + 1, y.max() + 1]


def test_objects_that_leave_the_image_are_removed():
    squares = np.array([[x, y] for x, y in ((100, 10), (9, 10), (96, 40), (4, 60))], float)
    corners = squares[:, None] + np.array([[-8, -8], [8, -8], [8, 8], [-8, 8]], float)
    crowd = torch.tensor([False, False, False, True])
    matrix = torch.tensor([[1, 0, 2 * -10 / 120], [0, 1, 0]], dtype=torch.float64)  # ten pixels to the left
    item = item_of(corners, 80, 120, crowd=crowd)
    found = moved(item, matrix, is_oriented=False)
    # The fourth one is a crowd region.
    assert found["labels"].tolist() == [0, 2, 3]
    expected = [[82, 2, 98, 18], [78, 32, 94, 48], [0, 52, 2, 68]]
    np.testing.assert_allclose(found["corners"][:, [0, 2]].flatten(1), expected, atol=1e-4)
    assert found["area"].tolist()[:2] == [1, 3] and found["area"].isnan().tolist() == [False, False, True]
    assert found["valid"].sum(0).tolist() == [80] * 110 + [0] * 10
    oriented = moved(item, matrix, is_oriented=True)
    np.testing.assert_allclose(oriented["corners"][2, :, 0], [-14, 2, 2, -14], atol=1e-4)
    nothing = moved(item_of(corners[:0], 80, 120, masks=torch.zeros(0, 80, 120, dtype=torch.uint8)), matrix, False)
    assert nothing["corners"].shape == (0, 4, 2) and nothing["masks"].shape == (0, 80, 120)
    half = moved(item, motion("scale", 5, 80, 120), is_oriented=True)
    assert half["area"].tolist() == [0.25, 0.5, 0.75, 1.0]
