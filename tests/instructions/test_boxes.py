"""Boxes in texts."""

import pytest
from annotated_images import same_place
from hypothesis import given, settings
from hypothesis import strategies as st

from modeling_vitp.data.boxes import iou
from modeling_vitp.instructions.boxes import GridBox, grid_box, is_box, read_boxes, write_boxes, wrong_boxes


@settings(max_examples=100, deadline=None)
@given(
    st.floats(0, 4999),
    st.floats(0, 4999),
    st.floats(1e-3, 5000),
    st.floats(1e-3, 5000),
    st.integers(1, 5000),
    st.integers(1, 5000),
)
def test_grid_boxes_have_an_area(x, y, w, h, width, height):
    left, top = min(x, width - 1e-3), min(y, height - 1e-3)
    box = (left, top, min(left + w, width), min(top + h, height))
    assert same_place(grid_box(box, (height, width)), box, width, height)


@settings(deadline=None)
@given(st.lists(st.integers(-50, 1050), min_size=4, max_size=4))
def test_box_needs_grid_and_area(corners):
    left, top, right, bottom = corners
    expected = all(corner in range(1001) for corner in corners) and right - left > 0 and bottom - top > 0
    assert is_box(tuple(map(str, corners))) == expected
    for text in (f"<ref>a</ref><box>[{corners}]</box>", f"<box>[[1, 2, 3, 4], {corners}]</box>"):
        assert (wrong_boxes(text) == ([], [])) == expected
    assert (wrong_boxes(f"It is at {corners}.") == ([], [])) == expected


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("It is at [0, 20, 1000, 40].", [(0, 20, 1000, 40, "")]),
        ("[1,2,3,4] and [ 5 , 6,7, 8 ]", [(1, 2, 3, 4, ""), (5, 6, 7, 8, "")]),
        ("<ref>ship</ref><box>[[102, 640, 231, 707]]</box>", [(102, 640, 231, 707, "ship")]),
        (
            "<ref>a red  roof</ref><box>[[1, 2, 3, 4], [5, 6, 7, 8]]</box> by <ref>trees</ref><box>[[0, 0, 9, 9]]</box>"
            ", and [10, 10, 20, 20]",
            [
                (1, 2, 3, 4, "a red roof"),
                (5, 6, 7, 8, "a red roof"),
                (0, 0, 9, 9, "trees"),
                (10, 10, 20, 20, ""),
            ],
        ),
        ("<box>[[1, 2, 3, 4]]</box>", [(1, 2, 3, 4, "")]),
        ("<ref>half</ref><box>[[1, 2, 3", []),
        ("No ship: [1, 2, 3], [1, 2, 3, 4, 5], [0.1, 0.2, 0.3, 0.4], (1, 2, 3, 4)", []),
        ("", []),
    ],
)
def test_boxes_are_read_in_both_forms(text, wanted):
    assert read_boxes(text) == ([GridBox(*box) for box in wanted], [])


@pytest.mark.parametrize("wrong", ["[0, 0, 1001, 5]", "[5, 0, 5, 9]", "[9, 0, 5, 9]", "[0, 9, 5, 2]"])
def test_wrong_box_is_named(wrong):
    assert read_boxes(f"<ref>x</ref><box>[{wrong}]</box> [1, 2, 3, 4]") == ([GridBox(1, 2, 3, 4)], [wrong])


@st.composite
def images_with_boxes(draw):
    """Draw height and width of an image, and boxes of any size from a thousandth of a pixel."""
    height, width = draw(st.integers(1, 6000)), draw(st.integers(1, 6000))

    def side(length):
        low = draw(st.floats(0, length - 1e-3))
        return low, min(low + draw(st.floats(1e-3, length)), length)

    boxes = []
    for _ in range(draw(st.integers(1, 4))):
        (left, right), (top, bottom) = side(width), side(height)
        boxes.append((left, top, right, bottom))
    return (height, width), boxes


@settings(deadline=None, max_examples=100)
@given(images_with_boxes(), st.sampled_from(["", "ship", "the largest storage tank"]))
def test_written_boxes_are_read_within_a_cell(image, phrase):
    size, boxes = image
    found, wrong = read_boxes(write_boxes(boxes, size, phrase))
    assert wrong == [] and [box.phrase for box in found] == [phrase] * len(boxes)
    assert wrong_boxes(write_boxes(boxes, size, phrase)) == ([], [])
    cells = [size[1] / 1000, size[0] / 1000] * 2
    for box, read in zip(boxes, (box.in_pixels(size) for box in found), strict=True):
        assert read[0] < read[2] and read[1] < read[3]
        for low, high in ((0, 2), (1, 3)):
            is_covered = read[low] <= box[low] + 1e-6 and box[high] <= read[high] + 1e-6
            is_rounded = all(abs(read[end] - box[end]) <= cells[end] / 2 + 1e-6 for end in (low, high))
            assert is_covered or is_rounded
            assert all(abs(read[end] - box[end]) <= cells[end] + 1e-6 for end in (low, high))


@given(st.lists(st.integers(0, 1000), min_size=4, max_size=4))
def test_box_on_grid_sized_image_is_kept(corners):
    if is_box(list(map(str, corners))):
        assert grid_box(corners, (1000, 1000)) == corners
        assert write_boxes([corners], (1000, 1000), "ship") == f"<ref>ship</ref><box>[{corners}]</box>"
        assert write_boxes([corners], (1000, 1000)) == f"<box>[{corners}]</box>"


def test_huge_number_is_not_a_box():
    """Read a number of more than 4300 digits, which Python does not convert to an integer."""
    text = f"[1, 2, {'9' * 5000}, 4]"
    assert read_boxes(text) == ([], []) and wrong_boxes(text) == ([], [text])
    assert wrong_boxes(f"<box>[{text}]</box>") == ([text], [])


def test_empty_boxes_have_zero_iou():
    assert iou((1, 2, 1, 5), (1, 2, 1, 5)) == 0.0 and iou((5, 5, 1, 1), (0, 0, 9, 9)) == 0.0
