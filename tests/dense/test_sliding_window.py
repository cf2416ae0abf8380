import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from modeling_vitp.dense.prediction import augmented, predict_bands, sliding_window

SHAPES = {
    "height": st.integers(1, 40),
    "width": st.integers(1, 40),
    "window": st.tuples(st.integers(1, 16), st.integers(1, 16)),
    "shares": st.tuples(st.floats(0.2, 1), st.floats(0.2, 1)),
    "batch_size": st.integers(1, 5),
}


def strides(window, shares):
    return tuple(max(int(length * share), 1) for length, share in zip(window, shares))


def noise(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def make_pointwise(channels=3, classes=4):
    """A model without context: a 1 x 1 convolution."""
    torch.manual_seed(0)
    layer = torch.nn.Conv2d(channels, classes, 1).double()
    return lambda *images: layer(torch.cat(images, dim=1).double()).detach()


def with_context(*images):
    """The logits of a place depend on all of its window, and on where in it the place is."""
    (image,) = images
    places = torch.arange(image[0, 0].numel()).view(image.shape[-2:]) / 100
    return torch.cat([image * places, image.mean((2, 3), keepdim=True) - image**2], dim=1)


def loop(predict, image, window, stride):
    """One window after another, mmsegmentation's way: the grid is laid first, then each window is moved back."""
    height, width = image.shape[-2:]
    rows = max(height - window[0] + stride[0] - 1, 0) // stride[0] + 1
    columns = max(width - window[1] + stride[1] - 1, 0) // stride[1] + 1
    total, counts = 0, torch.zeros(height, width)
    for row in range(rows):
        for column in range(columns):
            bottom, right = min(row * stride[0] + window[0], height), min(column * stride[1] + window[1], width)
            top, left = max(bottom - window[0], 0), max(right - window[1], 0)
            logits = predict(image[:, :, top:bottom, left:right])
            total = total + F.pad(logits, (left, width - right, top, height - bottom))
            counts[top:bottom, left:right] += 1
    return total / counts


@settings(deadline=None, max_examples=60)
@given(**SHAPES)
def test_a_model_without_context_gives_the_full_images_logits(height, width, window, shares, batch_size):
    images = noise(2, 3, height, width)
    predict = make_pointwise()
    logits = sliding_window(predict, images, window, strides(window, shares), batch_size)
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits, predict(images).float(), rtol=1e-5, atol=1e-5)


@settings(deadline=None, max_examples=60)
@given(**SHAPES)
def test_logits_equal_a_loop_over_windows(height, width, window, shares, batch_size):
    images = noise(2, 3, height, width)
    stride = strides(window, shares)
    expected = loop(with_context, images, window, stride)
    actual = sliding_window(with_context, images, window, stride, batch_size)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


@settings(deadline=None, max_examples=60)
@given(**SHAPES, start=st.integers(0, 39))
def test_bands_follow_one_another_and_are_the_same_from_wherever_they_begin(
    height, width, window, shares, batch_size, start
):
    start = min(start, height - 1)
    image, stride = noise(1, 3, height, width), strides(window, shares)

    def bands(start):
        read = lambda top, bottom: (image[:, :, top:bottom],)  # noqa: E731
        return list(predict_bands(with_context, read, (height, width), window, stride, batch_size, start))

    row = start
    for top, logits in bands(start):
        assert top == row
        row += logits.shape[2]
    assert row == height
    whole = sliding_window(with_context, image, window, stride, batch_size)
    assert torch.equal(torch.cat([logits for _, logits in bands(start)], dim=2), whole[:, :, start:])


def test_pairs_go_through_the_model_together():
    before, after = noise(2, 2, 3, 21, 34)
    predict = make_pointwise(channels=6)
    logits = sliding_window(predict, (before, after), window=8, stride=5)
    torch.testing.assert_close(logits, predict(before, after).float(), rtol=1e-5, atol=1e-5)


def test_low_precision_logits_are_summed_in_float32():
    value = torch.tensor(3.015625)  # exact in bfloat16; its double and triple are not
    logits = sliding_window(lambda image: image.bfloat16(), torch.full((1, 1, 40, 40), value), window=20, stride=4)
    torch.testing.assert_close(logits, torch.full_like(logits, value), rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"window": 8, "stride": 9}, r"stride \(9, 9\) must be at least 1 and at most the window"),
        ({"window": 8, "stride": (4, 0)}, r"stride \(4, 0\) must be at least 1"),
        ({"window": 8, "stride": 4, "batch_size": 0}, "batch_size=0 must be at least 1"),
        ({"window": 8, "stride": 4, "predict": lambda image: image[..., ::2]}, r"windows of 8 x 8 pixels"),
        ({"window": 8, "stride": 4, "images": torch.zeros(3, 20, 20)}, r"\(batch, channels, height, width\)"),
        ({"window": 8, "stride": 4, "images": [torch.zeros(1, 3, 9, 9), torch.zeros(1, 3, 9, 8)]}, "the same for all"),
    ],
)
def test_what_cannot_be_covered_is_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        sliding_window(**{"predict": lambda image: image, "images": torch.zeros(1, 3, 20, 20), **arguments})


def test_augmentation_averages_probabilities_over_scales_and_mirror_images():
    image = noise(2, 3, 20, 30)
    scales = (0.5, 1.0, 1.5)
    actual = augmented(with_context, scales, flip=True)(image)
    expected = 0
    for scale, size in zip(scales, ((10, 15), (20, 30), (30, 45))):
        scaled = F.interpolate(image, size, mode="bilinear", antialias=scale == 0.5)
        plain, mirrored = with_context(scaled), with_context(scaled.flip(-1)).flip(-1)
        for logits in (plain, mirrored):
            expected = expected + F.interpolate(logits, (20, 30), mode="bilinear").softmax(1) / 6
    torch.testing.assert_close(actual.exp(), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(actual.softmax(1), expected, rtol=1e-5, atol=1e-6)


def test_augmentation_of_a_pair_mirrors_both():
    before, after = noise(2, 1, 3, 16, 24)
    predict = make_pointwise(channels=6)
    expected = predict(before, after).float().log_softmax(1)
    torch.testing.assert_close(augmented(predict, flip=True)(before, after), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("scales", [(), (1.0, 0.0)])
def test_scales_have_to_be_positive(scales):
    with pytest.raises(ValueError, match="one or more positive factors are needed"):
        augmented(with_context, scales)
