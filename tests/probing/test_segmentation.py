"""Patches and their pixels."""

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from modeling_vitp.probing.segmentation import interpolate, pixels_by_patch


@given(st.integers(1, 9), st.integers(1, 9), st.integers(1, 4), st.integers(1, 4))
@settings(deadline=None)
def test_pixels_are_counted_by_patch_as_in_a_loop(height, width, rows, columns):
    mask = np.random.default_rng(height * 10 + width).choice([0, 1, 2, 255], (height, width)).astype(np.uint8)
    expected = np.zeros((rows, columns, 3))
    for y in range(height):
        for x in range(width):
            if mask[y, x] != 255:
                expected[int((y + 0.5) / height * rows), int((x + 0.5) / width * columns), mask[y, x]] += 1
    assert np.array_equal(pixels_by_patch(mask, (rows, columns), 3), expected)


def test_logits_of_patches_are_interpolated():
    logits = torch.tensor([[[2.0, 0.0], [0.0, 1.0]]])  # one row, two columns
    # Between the patches' centres the first class falls from 2 to 0, the second rises from 0 to 1.
    assert interpolate(logits, (1, 8)).argmax(0).tolist() == [[0, 0, 0, 0, 0, 1, 1, 1]]
