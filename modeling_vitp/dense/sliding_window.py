"""Prediction in overlapping windows, and test-time augmentation, for models that label every pixel."""

import math
from collections.abc import Callable, Iterator, Sequence

import torch
from torch.nn import functional as F

from ..images.windows import window_starts

# One image, or several of the same ground (before and after), to logits: `(batch, channels, height, width)` each, to
# `(batch, classes, height, width)`.
Predict = Callable[..., torch.Tensor]


def sliding_window(
    predict: Predict,
    images: torch.Tensor | Sequence[torch.Tensor],
    window: int | tuple[int, int],
    stride: int | tuple[int, int],
    batch_size: int = 4,
) -> torch.Tensor:
    """Logits of images of any size from a model that sees one window at a time; the mean where windows overlap.

    Windows start at every multiple of the stride. The last one of a row or column is shifted back to end at the border,
    as in mmsegmentation's slide inference, so that every window is full. In a direction in which the image is smaller
    than the window, the window is the image.

    Args:
        predict: maps windows to logits, at the windows' size. It gets as many arguments as there are `images`, each of
            shape `(at most batch_size * batch, channels, window height, window width)`.
        images: of shape `(batch, channels, height, width)`, or several such of the same size: before and after.
        window, stride: height and width in pixels; a number is both. The stride is at most the window.
        batch_size: windows of each image that go through `predict` together, all of one row of windows.

    Returns:
        float32 of shape `(batch, classes, height, width)`, on the device of the logits.

    Raises:
        ValueError: if the stride is larger than the window or below 1, `batch_size` is below 1, the images differ in
            size, or `predict` gives another size than it got.
    """
    images = (images,) if isinstance(images, torch.Tensor) else tuple(images)
    sizes = [tuple(image.shape) for image in images]
    if len({(len(size), size[0], size[-2:]) for size in sizes}) != 1 or len(sizes[0]) != 4:
        raise ValueError(f"images have shapes {sizes}: (batch, channels, height, width) is needed, the same for all.")
    bands = predict_bands(
        predict,
        lambda top, bottom: tuple(image[:, :, top:bottom] for image in images),
        sizes[0][-2:],
        window,
        stride,
        batch_size,
    )
    return torch.cat([logits for _, logits in bands], dim=2)


def predict_bands(
    predict: Predict,
    read: Callable[[int, int], tuple[torch.Tensor, ...]],
    size: tuple[int, int],
    window: int | tuple[int, int],
    stride: int | tuple[int, int],
    batch_size: int = 4,
    start: int = 0,
) -> Iterator[tuple[int, torch.Tensor]]:
    """[`sliding_window`] from top to bottom over an image that need not fit into memory.

    Args:
        predict, window, stride, batch_size: as for [`sliding_window`].
        read: `read(top, bottom)` gives these rows of each image, `(batch, channels, bottom - top, width)`.
        size: height and width of the images.
        start: the row to begin at. What follows does not depend on it: windows above that reach below it are predicted
            again.

    Yields:
        `top, logits`: the image's next rows, from `top`, that no further window reaches; float32 of shape
        `(batch, classes, rows, width)`. One such band, and one row of windows, is in memory at a time.
    """
    window, stride = as_pair(window), as_pair(stride)
    if not all(1 <= step <= length for step, length in zip(stride, window)):
        raise ValueError(f"stride {stride} must be at least 1 and at most the window, {window}, to cover every pixel.")
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size} must be at least 1.")
    height, width = (min(length, extent) for length, extent in zip(window, size))
    tops, lefts = (window_starts(*lengths) for lengths in zip(size, (height, width), stride))
    row_counts, column_counts = times_covered(size[0], tops, height), times_covered(size[1], lefts, width)

    tops = [top for top in tops if top + height > start]
    sums = None  # of the logits, in the rows of the current windows
    for top, next_top in zip(tops, [*tops[1:], size[0]]):
        rows = read(top, top + height)
        for first in range(0, len(lefts), batch_size):
            batch = lefts[first : first + batch_size]
            windows = [torch.cat([image[..., left : left + width] for left in batch]) for image in rows]
            logits = predict(*windows)
            if logits.shape[-2:] != (height, width):
                raise ValueError(
                    f"predict gave logits of shape {tuple(logits.shape)} for windows of {height} x {width} pixels: "
                    "resize them to the windows."
                )
            if sums is None:
                sums = logits.new_zeros(len(rows[0]), logits.shape[1], height, size[1], dtype=torch.float32)
            for left, part in zip(batch, logits.chunk(len(batch))):
                sums[..., left : left + width] += part
        if next_top > start:
            skipped = max(start - top, 0)
            counts = (row_counts[top + skipped : next_top, None] * column_counts).to(sums.device)
            yield top + skipped, sums[:, :, skipped : next_top - top] / counts
        finished = next_top - top
        sums = torch.cat([sums[:, :, finished:], torch.zeros_like(sums[:, :, :finished])], dim=2)


def default_stride(window: int | tuple[int, int]) -> tuple[int, int]:
    """Three quarters of the window, 384 of 512."""
    height, width = as_pair(window)
    return max(3 * height // 4, 1), max(3 * width // 4, 1)


def as_pair(value: int | tuple[int, int]) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else tuple(value)


def times_covered(length: int, starts: list[int], window: int) -> torch.Tensor:
    """How many of the windows each place of an axis lies in."""
    counts = torch.zeros(length)
    for start in starts:
        counts[start : start + window] += 1
    return counts


def augmented(predict: Predict, scales: Sequence[float] = (1.0,), flip: bool = False) -> Predict:
    """Test-time augmentation: a `predict` that averages another's class probabilities over scales and mirror images.

    Probabilities (softmax of the logits), not logits, are averaged, each at the size of the input, as in
    mmsegmentation's test-time augmentation. Images are resampled bilinearly, with antialiasing when they shrink, and
    logits bilinearly.

    To augment whole images, as benchmarks do, put the windows inside:

    ```python
    predict = augmented(lambda images: sliding_window(logits_of, images, 512, 384), scales=(0.75, 1.0, 1.25), flip=True)
    ```

    Args:
        predict: maps one or several `(batch, channels, height, width)` to logits `(batch, classes, height, width)`.
        scales: factors of height and width, which are rounded to pixels.
        flip: whether to predict the image mirrored left to right, too.

    Returns:
        A function of the same arguments, which gives the log of the mean probabilities: logits, of which the softmax
        is that mean; float32.

    Raises:
        ValueError: if there is no scale, or one that is not positive.
    """
    if not scales or min(scales) <= 0:
        raise ValueError(f"scales={tuple(scales)}: one or more positive factors are needed.")

    def predict_augmented(*images: torch.Tensor) -> torch.Tensor:
        size = images[0].shape[-2:]
        total, count = None, 0
        for scale in scales:
            scaled_size = [max(round(length * scale), 1) for length in size]
            scaled = [
                image
                if list(image.shape[-2:]) == scaled_size
                else F.interpolate(image, scaled_size, mode="bilinear", antialias=scale < 1)
                for image in images
            ]
            for mirror in (False, True) if flip else (False,):
                logits = predict(*(image.flip(-1) if mirror else image for image in scaled)).float()
                logits = F.interpolate(logits.flip(-1) if mirror else logits, size, mode="bilinear")
                log_probabilities = logits.log_softmax(dim=1)
                total = log_probabilities if total is None else torch.logaddexp(total, log_probabilities)
                count += 1
        return total - math.log(count)

    return predict_augmented


__all__ = ["augmented", "predict_bands", "sliding_window"]
