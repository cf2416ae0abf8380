"""Boxes as they stand in texts."""

from annotated_images import same_place
from hypothesis import given, settings
from hypothesis import strategies as st

from modeling_vitp.instructions.boxes import grid_box, is_box, wrong_boxes


@settings(max_examples=300, deadline=None)
@given(
    st.floats(0, 4999),
    st.floats(0, 4999),
    st.floats(1e-3, 5000),
    st.floats(1e-3, 5000),
    st.integers(1, 5000),
    st.integers(1, 5000),
)
def test_grid_boxes_always_have_an_area_and_are_on_the_grid(x, y, w, h, width, height):
    left, top = min(x, width - 1e-3), min(y, height - 1e-3)
    box = (left, top, min(left + w, width), min(top + h, height))
    assert same_place(grid_box(box, (height, width)), box, width, height)


@settings(deadline=None)
@given(st.lists(st.integers(-50, 1050), min_size=4, max_size=4))
def test_boxes_are_on_the_grid_and_have_an_area(corners):
    left, top, right, bottom = corners
    expected = all(corner in range(1001) for corner in corners) and right - left > 0 and bottom - top > 0
    assert is_box(tuple(map(str, corners))) == expected
    for text in (f"<ref>a</ref><box>[{corners}]</box>", f"<box>[[1, 2, 3, 4], {corners}]</box>"):
        assert (wrong_boxes(text) == ([], [])) == expected
    assert (wrong_boxes(f"It is at {corners}.") == ([], [])) == expected
