"""Tests of the twelve corruptions against Pillow, OpenCV and numpy, of undoing their motion, and of moved masks."""

import io
import math

import cv2
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from modeling_vitp.images.corruptions import (
    SEVERITIES,
    CorruptedImages,
    corrupt,
    motion,
    move_labels,
    undo_motion,
)

GEOMETRIC = ("rotation", "scale", "translation")
RANDOM = ("cloud", "data_gaps", "gaussian_noise", "salt_and_pepper", "translation")
LEVELS = range(1, 6)


def noise_image(height=120, width=150, low=0, high=256, seed=0):
    return np.random.default_rng(seed).integers(low, high, (height, width, 3), dtype=np.uint8)


def gray(value, height=400, width=500):
    return np.full((height, width, 3), value, dtype=np.uint8)


@pytest.mark.parametrize("name", SEVERITIES)
@given(
    height=st.integers(1, 40),
    width=st.integers(1, 40),
    severity=st.integers(1, 5),
    seed=st.integers(0, 2**31),
)
@settings(max_examples=10, deadline=None)
def test_corruptions_keep_type_and_are_deterministic(name, height, width, severity, seed):
    image = noise_image(height, width, seed=seed)
    original = image.copy()
    corrupted = corrupt(image, name, severity, seed)
    assert corrupted.dtype == np.uint8 and corrupted.shape == image.shape and corrupted.flags.c_contiguous
    np.testing.assert_array_equal(image, original)
    torch.rand(1)
    tensor = corrupt(torch.from_numpy(image).movedim(-1, 0), name, severity, seed)
    np.testing.assert_array_equal(tensor.movedim(0, -1).numpy(), corrupted)


@pytest.mark.parametrize("name", SEVERITIES)
def test_seed_changes_only_random_corruptions(name):
    image = noise_image()
    images = {corrupt(image, name, 5, seed).tobytes() for seed in range(8)}
    assert (len(images) > 1) == (name in RANDOM)


def test_global_random_state_is_unchanged():
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    for name in SEVERITIES:
        corrupt(noise_image(20, 20), name, 2)
    assert torch.equal(torch.rand(4), expected)


@pytest.mark.parametrize("severity", LEVELS)
def test_values_equal_formula(severity):
    image = noise_image(17, 23)
    unit = image / 255.0
    brightness, contrast = [0, 0.1, 0.2, 0.3, 0.4][severity - 1], [1, 0.8, 0.6, 0.4, 0.2][severity - 1]
    expected = 255 * np.clip(unit * contrast + brightness, 0, 1)
    assert np.abs(corrupt(image, "brightness_contrast", severity) - expected).max() <= 0.5 + 1e-3
    opacity = [0.2, 0.3, 0.4, 0.5, 0.6][severity - 1]
    assert np.abs(corrupt(image, "haze", severity) - (image * (1 - opacity) + 255 * opacity)).max() <= 0.5 + 1e-3


@pytest.mark.parametrize("severity", LEVELS)
def test_jpeg_equals_pillow(severity):
    image = noise_image()
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "JPEG", quality=[30, 25, 20, 15, 10][severity - 1])
    np.testing.assert_array_equal(corrupt(image, "compression_artefacts", severity), np.asarray(Image.open(buffer)))


def test_corrupted_images_are_saved_as_jpeg():
    """As REOBench does for all of its corruptions."""
    image = noise_image()
    sample = {"id": "a", "image": torch.from_numpy(image).movedim(-1, 0)}
    plain = CorruptedImages([sample], "haze", 3, 0)[0]["image"]
    saved = CorruptedImages([sample], "haze", 3, 0, jpeg_quality=75)[0]["image"]
    buffer = io.BytesIO()
    Image.fromarray(plain.movedim(0, -1).numpy()).save(buffer, "JPEG", quality=75)
    np.testing.assert_array_equal(saved.movedim(0, -1), np.asarray(Image.open(buffer)))


@pytest.mark.parametrize("severity", LEVELS)
def test_blur_equals_opencv(severity):
    image = noise_image()
    size = 2 * severity + 1
    sigma = 0.3 * ((size - 1) * 0.5 - 1) + 0.8
    expected = cv2.GaussianBlur(image.astype(np.float64), (size, size), sigma)
    assert np.abs(corrupt(image, "gaussian_blur", severity) - expected).max() <= 0.5 + 1e-3
    expected = cv2.blur(image.astype(np.float64), (2 * severity, 1))
    assert np.abs(corrupt(image, "motion_blur", severity) - expected).max() <= 0.5 + 1e-3


def test_blur_may_be_wider_than_image():
    image = noise_image(1, 3)
    period = [0, 1, 2, 1]
    expected = [np.mean([image[0, period[(x + tap) % 4]] for tap in range(-5, 5)], axis=0) for x in range(3)]
    assert np.abs(corrupt(image, "motion_blur", 5)[0] - expected).max() <= 0.5 + 1e-3


@pytest.mark.parametrize("severity", LEVELS)
def test_noise_has_standard_deviation(severity):
    difference = corrupt(gray(128), "gaussian_noise", severity, seed=severity).astype(float) - 128
    sigma = 255 * [0.04, 0.05, 0.06, 0.07, 0.08][severity - 1]
    assert abs(difference.mean()) < 5 * sigma / math.sqrt(difference.size)
    # Rounding adds the variance of a uniform value. The tolerance is five standard errors.
    assert difference.std() == pytest.approx(math.sqrt(sigma**2 + 1 / 12), rel=5 / math.sqrt(2 * difference.size))
    assert abs(np.corrcoef(difference[..., 0].ravel(), difference[..., 1].ravel())[0, 1]) < 0.02


@pytest.mark.parametrize("severity", LEVELS)
def test_salt_and_pepper_have_amount(severity):
    corrupted = corrupt(gray(128), "salt_and_pepper", severity, seed=severity)
    assert set(np.unique(corrupted)) == {0, 128, 255}
    share, count = [0.005, 0.01, 0.02, 0.03, 0.05][severity - 1], corrupted.size
    for value in (0, 255):
        half = share / 2
        assert (corrupted == value).mean() == pytest.approx(half, abs=5 * math.sqrt(half * (1 - half) / count))
    assert ((corrupted == 255).any(-1) & (corrupted == 128).any(-1)).any(), "channels are drawn by themselves"


@pytest.mark.parametrize("severity", LEVELS)
def test_gaps_are_straight_stripes(severity):
    stripes, width = [2, 3, 4, 5, 6][severity - 1], [3, 4, 5, 6, 7][severity - 1]
    spacing = math.hypot(400, 500) / stripes
    for seed in range(3):
        corrupted = corrupt(gray(200), "data_gaps", severity, seed)
        assert set(np.unique(corrupted)) == {0, 200}
        gap = (corrupted == 0).all(-1)
        assert gap.mean() == pytest.approx(width / spacing, rel=0.35)
        _, labels = cv2.connectedComponents(gap.astype(np.uint8))
        rectangles = [cv2.minAreaRect(np.argwhere(labels == label)) for label in range(1, labels.max() + 1)]
        full = [rectangle for rectangle in rectangles if max(rectangle[1]) > 100]
        assert full, "stripes go through the image"
        angles = [(angle if size[0] > size[1] else angle + 90) % 180 for _, size, angle in full]
        directions = [np.array([math.cos(math.radians(angle)), math.sin(math.radians(angle))]) for angle in angles]
        for (center, size, _), direction in zip(full, directions):
            assert abs(direction @ directions[0]) > math.cos(math.radians(2)), "parallel"
            assert min(size) + 1 == pytest.approx(width, abs=1.5)
            distance = abs(np.cross([*directions[0], 0], [*np.subtract(center, full[0][0]), 0])[2])
            assert distance / spacing == pytest.approx(round(distance / spacing), abs=0.05)


def test_clouds_grow_with_severity():
    previous = np.zeros((400, 500))
    for severity in LEVELS:
        corrupted = corrupt(gray(0), "cloud", severity, seed=1)
        assert (corrupted[..., :1] == corrupted).all()
        opacity = corrupted[..., 0] / 255
        assert opacity.min() == 0 and opacity.max() == pytest.approx(0.9, abs=0.002)
        assert (opacity >= previous - 0.003).all() and opacity.mean() > previous.mean()
        assert np.abs(np.diff(opacity, axis=1)).max() < 0.9 / 4
        previous = opacity
    assert 0.02 < previous.mean() < 0.5


def test_rotation_by_90_degrees_equals_rot90():
    for side in (1, 2, 63, 64):
        image = noise_image(side, side)
        np.testing.assert_array_equal(corrupt(image, "rotation", 5), np.rot90(image))


@pytest.mark.parametrize("severity", LEVELS)
def test_rotation_and_scale_equal_opencv(severity):
    """Check a smooth image, because OpenCV rounds positions to 1/32 of a pixel."""
    image = cv2.GaussianBlur(noise_image(101, 141), (31, 31), 6)
    center = (70.0, 50.0)
    matrix = cv2.getRotationMatrix2D(center, [30, 45, 60, 75, 90][severity - 1], 1.0)
    expected = cv2.warpAffine(image, matrix, (141, 101), borderMode=cv2.BORDER_REFLECT)
    assert np.abs(corrupt(image, "rotation", severity).astype(int) - expected).max() <= 1
    matrix = cv2.getRotationMatrix2D(center, 0, [0.9, 0.8, 0.7, 0.6, 0.5][severity - 1])
    expected = cv2.warpAffine(image, matrix, (141, 101), borderMode=cv2.BORDER_CONSTANT)
    inside = cv2.erode(cv2.warpAffine(np.ones((101, 141), np.uint8), matrix, (141, 101)), np.ones((3, 3))) == 1
    outside = cv2.dilate(cv2.warpAffine(np.ones((101, 141), np.uint8), matrix, (141, 101)), np.ones((3, 3))) == 0
    found = corrupt(image, "scale", severity)
    assert np.abs(found.astype(int) - expected)[inside].max() <= 1
    assert (found[outside] == 0).all()


@pytest.mark.parametrize("severity", LEVELS)
@pytest.mark.parametrize("shape", [(120, 150), (40, 50), (7, 150)])
def test_translation_is_exact_shift_with_reflection(severity, shape):
    shift = [15, 20, 25, 30, 35][severity - 1]
    image = noise_image(*shape)
    padded = np.pad(image, ((shift, shift), (shift, shift), (0, 0)), mode="symmetric")
    directions = set()
    for seed in range(12):
        dx, dy = (motion("translation", severity, *shape, seed=seed)[:, 2] / 2 * torch.tensor(shape[::-1])).tolist()
        dx, dy = round(dx), round(dy)
        assert {abs(dx), abs(dy)} == {shift}
        expected = padded[shift - dy : shift - dy + shape[0], shift - dx : shift - dx + shape[1]]
        np.testing.assert_array_equal(corrupt(image, "translation", severity, seed), expected)
        directions.add((dx > 0, dy > 0))
    assert len(directions) == 4


@pytest.mark.parametrize("name", GEOMETRIC)
@given(
    rows=st.integers(1, 30),
    columns=st.integers(1, 30),
    severity=st.integers(1, 5),
    seed=st.integers(0, 100),
)
@settings(max_examples=25, deadline=None)
def test_undo_motion_of_coordinates_is_identity(name, rows, columns, severity, seed):
    """Check that a map of clean positions at the corrupted positions becomes the identity."""
    matrix = motion(name, severity, 224, 280, seed)
    y = (np.arange(rows) + 0.5) / rows * 2 - 1
    x = (np.arange(columns) + 0.5) / columns * 2 - 1
    places = np.stack([*np.meshgrid(x, y), np.ones((rows, columns))])
    inverse = np.linalg.inv(np.vstack([matrix.numpy(), [0, 0, 1]]))
    ramp = np.einsum("ij,jyx->iyx", inverse, places)[:2]
    undone, valid = undo_motion(torch.from_numpy(ramp), matrix)
    went = np.einsum("ij,jyx->iyx", matrix.numpy(), places)
    expected = (np.abs(went[0]) < x[-1] + 1e-7) & (np.abs(went[1]) < y[-1] + 1e-7)
    np.testing.assert_array_equal(valid.numpy(), expected)
    np.testing.assert_allclose(undone.numpy()[:, expected], places[:2][:, expected], atol=1e-6)


def test_undo_motion_restores_image():
    """Check that a smooth image is restored except at its edge, which the mask marks as invalid."""
    image = cv2.GaussianBlur(noise_image(96, 128), (41, 41), 8)
    for name in GEOMETRIC:
        corrupted = torch.from_numpy(corrupt(image, name, 3, seed=1)).movedim(-1, 0).float()
        undone, valid = undo_motion(corrupted, motion(name, 3, 96, 128, seed=1))
        difference = np.abs(undone.movedim(0, -1).numpy() - image).max(-1)
        assert difference[2:-2, 2:-2][valid[2:-2, 2:-2].numpy()].max() < 2.5
        assert 0.4 < valid.float().mean() and valid.all() == (name == "scale")


OUTSIDE = 255


def moved(labels, name, severity, seed):
    matrix = motion(name, severity, *labels.shape, seed=seed)
    return move_labels(torch.from_numpy(labels), matrix, OUTSIDE).numpy()


@pytest.mark.parametrize("name", GEOMETRIC)
@given(height=st.integers(1, 40), width=st.integers(1, 40), severity=st.integers(1, 5), seed=st.integers(0, 100))
@settings(max_examples=25, deadline=None)
def test_moved_labels_equal_loop(name, height, width, severity, seed):
    labels = np.random.default_rng(seed).integers(0, 200, (height, width)).astype(np.uint8)
    found = moved(labels, name, severity, seed)
    matrix = motion(name, severity, height, width, seed=seed)
    angle = math.radians([30, 45, 60, 75, 90][severity - 1])
    factor = [0.9, 0.8, 0.7, 0.6, 0.5][severity - 1]
    shift = [15, 20, 25, 30, 35][severity - 1]
    for row in range(height):
        for column in range(width):
            x, y = column + 0.5 - width / 2, row + 0.5 - height / 2
            if name == "rotation":  # The inverse, clockwise rotation, with y down.
                x, y = x * math.cos(angle) - y * math.sin(angle), x * math.sin(angle) + y * math.cos(angle)
            elif name == "scale":
                x, y = x / factor, y / factor
            else:
                x, y = x - math.copysign(shift, matrix[0, 2]), y - math.copysign(shift, matrix[1, 2])
            x, y = x + width / 2, y + height / 2
            if min(abs(x - round(x)), abs(y - round(y))) < 1e-6:
                continue  # Between two pixels, both are correct.
            inside = 0 <= x < width and 0 <= y < height
            assert found[row, column] == (labels[int(y), int(x)] if inside else OUTSIDE)


def test_rotated_labels_equal_rot90():
    for side in (1, 2, 63, 64):
        labels = noise_image(side, side, high=200)[..., 0]
        np.testing.assert_array_equal(moved(labels, "rotation", 5, 0), np.rot90(labels))


def test_bad_arguments_are_refused():
    image = noise_image(8, 8)
    for name, severity, named in (("snow", 1, "'snow'"), ("haze", 6, "severity.*6")):
        with pytest.raises(ValueError, match=named):
            corrupt(image, name, severity)
    for wrong in (image.astype(np.float32), image[..., 0], image[:, :0], torch.from_numpy(image)):
        with pytest.raises(ValueError, match="uint8"):
            corrupt(wrong, "haze", 1)
