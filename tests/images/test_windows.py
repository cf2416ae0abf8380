"""Windows of large images."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from modeling_vitp.images.reading import window_starts, windows


@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 20), st.data())
def test_windows_cover_an_image(width, height, size, data):
    overlap = data.draw(st.integers(0, size - 1))
    covered = np.zeros((height, width), dtype=int)
    boxes = windows((height, width), size, overlap)
    for box in boxes:
        left, top, right, bottom = box or (0, 0, width, height)
        assert 0 <= left < right <= width and 0 <= top < bottom <= height
        assert right - left == min(size, width) and bottom - top == min(size, height)
        covered[top:bottom, left:right] += 1
    assert covered.min() >= 1
    assert len(set(boxes)) == len(boxes)


@given(st.integers(1, 300), st.integers(1, 300), st.data())
def test_windows_along_an_axis_cover_it_and_the_last_ends_with_it(length, window, data):
    stride = data.draw(st.integers(1, window))
    starts = window_starts(length, window, stride)
    covered = np.zeros(length, dtype=int)
    for start in starts:
        covered[start : start + window] += 1
    assert covered.min() >= 1
    assert starts[0] == 0 and starts[-1] + min(window, length) == length
    assert starts == sorted(set(starts)) and all(start == index * stride for index, start in enumerate(starts[:-1]))
    assert len(starts) == 1 + -(-max(length - window, 0) // stride)  # no more than are needed
