"""Maps, held against a loop over the pixels of small images."""

from collections import Counter

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from modeling_vitp.instructions.from_annotations.annotations import AnnotatedImage, Labels, Region, regions_of
from modeling_vitp.instructions.from_annotations.questions import BACKGROUND, LETTERS, cell_covers, explained, signs_of

PHRASES = ("tree", "road", "storage tank")


@st.composite
def boxes(draw, size):
    ends = [sorted(draw(st.lists(st.floats(0, end), min_size=2, max_size=2, unique=True))) for end in size]
    (top, bottom), (left, right) = ends
    return left, top, right, bottom


@st.composite
def images(draw):
    """Height and width, regions, slivers and the side of the grid."""
    size = draw(st.tuples(st.integers(1, 24), st.integers(1, 24)))
    regions = st.lists(st.tuples(st.sampled_from(PHRASES), boxes(size)), max_size=6)
    return size, draw(regions), draw(regions), draw(st.integers(1, 8))


def by_a_loop(size, side, labels_at):
    counts = [Counter() for _ in range(side * side)]
    for y in range(size[0]):
        for x in range(size[1]):
            cell = int((2 * y + 1) * side // (2 * size[0])) * side + int((2 * x + 1) * side // (2 * size[1]))
            counts[cell].update(labels_at(x, y) or {None})
    return [max(sorted(count, key=lambda label: label or ""), key=count.get) for count in counts]


@settings(deadline=None)
@given(images())
def test_a_cell_is_what_most_of_its_pixels_lie_in(drawn):
    size, regions, slivers, side = drawn
    image = AnnotatedImage("x", (), size, regions_from(regions), slivers=regions_from(slivers))

    def labels_at(x, y):
        return {label for label, (x0, y0, x1, y1) in regions + slivers if x0 <= x + 0.5 < x1 and y0 <= y + 0.5 < y1}

    covers = cell_covers(image, side)
    assert covers == (None if min(size) < side else by_a_loop(size, side, labels_at))


def regions_from(pairs):
    return tuple(Region(label, box, 1.0) for label, box in pairs)


@settings(deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(7, 30), st.integers(7, 30), st.integers(1, 7))
def test_a_mask_says_it_by_itself(seed, height, width, side):
    numbers = np.random.default_rng(seed).integers(0, 4, (height, width), dtype=np.int32)
    labels = Labels(numbers, PHRASES)
    image = AnnotatedImage("x", (), (height, width), regions_of(labels), mask=lambda: labels)
    names = [None, *PHRASES]
    assert cell_covers(image, side) == by_a_loop((height, width), side, lambda x, y: {names[numbers[y, x]]} - {None})


@settings(deadline=None)
@given(images())
def test_a_map_of_the_transposed_image_is_the_map_transposed(drawn):
    size, regions, _, side = drawn
    if min(size) < side:
        return
    swapped = [(label, (y0, x0, y1, x1)) for label, (x0, y0, x1, y1) in regions]
    plain = np.array(cell_covers(AnnotatedImage("x", (), size, regions_from(regions)), side), dtype=object)
    swapped = cell_covers(AnnotatedImage("x", (), size[::-1], regions_from(swapped)), side)
    assert swapped == plain.reshape(side, side).T.flatten().tolist()


def test_what_is_not_clear_leaves_a_map_of_boxes_open_and_one_of_a_mask_not():
    crowd = (Region("tree", (0, 0, 9, 9), 81.0, is_clear=False),)
    labels = Labels(np.zeros((9, 9), dtype=np.int32), PHRASES)
    assert cell_covers(AnnotatedImage("x", (), (9, 9), crowd), 3) is None
    assert cell_covers(AnnotatedImage("x", (), (9, 9), slivers=crowd), 3) is None
    assert cell_covers(AnnotatedImage("x", (), (9, 9), crowd, mask=lambda: labels), 3) == [None] * 9


def test_a_class_is_one_word_or_a_letter_that_the_question_explains():
    assert signs_of(["road", "tree"]) == {"road": "road", "tree": "tree", None: BACKGROUND}
    assert explained(signs_of(["road", "tree"])) == ["road", "tree", BACKGROUND]
    assert signs_of(["road", "storage tank"]) == {"road": "A", "storage tank": "B", None: "none"}
    assert explained(signs_of(["road", "storage tank"])) == ["A for road", "B for storage tank", "none"]
    assert signs_of([BACKGROUND, "road"]) == {BACKGROUND: "A", "road": "B", None: "none"}
    assert len(set(signs_of(f"big {number}" for number in range(len(LETTERS))).values())) == len(LETTERS) + 1
    assert signs_of(f"big {number}" for number in range(len(LETTERS) + 1)) == {}
