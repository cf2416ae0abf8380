"""Conversations about annotated images, each answer recomputed from the raw annotation."""

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from annotated_images import (
    KINDS,
    LAYOUTS,
    NAMES,
    SINGULAR,
    check,
    kind_of,
    make,
    reader_of,
    scene,
    turns_of,
    write_coco,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from modeling_vitp.data.annotations import AnnotatedImage, LabelMap, Region, regions_of
from modeling_vitp.images.reading import window_starts
from modeling_vitp.instructions.from_annotations.questions import (
    BACKGROUND,
    LETTERS,
    cell_covers,
    explained,
    plural,
    signs_of,
)

NUM_IMAGES = 30


@pytest.fixture(scope="module", params=["coco", "geojson"])
def annotated(request, tmp_path_factory):
    """Return layout, its folder and its independent reader."""
    root = tmp_path_factory.mktemp(request.param)
    write, _ = LAYOUTS[request.param]
    write(root, "train", NAMES["train"][:NUM_IMAGES])
    write(root, "test", NAMES["test"][:1])
    return request.param, root, reader_of(request.param, root)


def test_answers_follow_from_raw_annotation(annotated, tmp_path):
    layout, root, objects = annotated
    rows = make(layout, root, tmp_path, "--turns", 10)["train"]
    kinds, answers = Counter(), {}
    for row in rows:
        name = Path(row["id"]).stem
        assert name in NAMES["train"]
        assert row["images"][0].tobytes() == scene(root, name).tobytes()
        for question, answer in turns_of(row):
            kinds[check(question, answer, objects(name))] += 1
            kind, subject = kind_of(question)
            answers.setdefault((kind, subject), Counter())[answer] += 1
    assert set(kinds) == KINDS
    assert min(kinds.values()) >= 5, kinds
    yes_and_no = {key: counts for key, counts in answers.items() if key[0] == "presence"}
    assert {subject for _, subject in yes_and_no} == {"plane", "ship", "storage tank", "bus"}
    assert all(counts["yes"] == counts["no"] > 0 for counts in yes_and_no.values()), yes_and_no
    zeros = sum(counts["0"] for (kind, _), counts in answers.items() if kind == "counting")
    assert 0.05 < zeros / kinds["counting"] < 0.6


def test_half_visible_object_belongs_to_window(tmp_path):
    root = tmp_path / "data"
    write_coco(root, "train", NAMES["train"][:16])
    objects = reader_of("coco", root)
    rows = make("coco", root, tmp_path / "out", "--turns", 10, "--window", 200, "--overlap", 40)["train"]
    assert window_starts(320, 128, 100) == [0, 100, 192]
    seen = Counter()
    for row in rows:
        *_, name, place = row["id"].replace(".png", "").split("/")
        x, y = map(int, place.split("_"))
        assert (x, y) in {(0, 0), (120, 0), (0, 40), (120, 40)}
        crop = scene(root, name).crop((x, y, x + 200, y + 200))
        assert row["images"][0].tobytes() == crop.tobytes()
        inside, slivers, parts = [], set(), []
        for label, (x0, y0, x1, y1), area in objects(name):
            cut = [min(max(side - start, 0), 200) for side, start in zip((x0, y0, x1, y1), (x, y, x, y))]
            share = (cut[2] - cut[0]) * (cut[3] - cut[1]) / ((x1 - x0) * (y1 - y0))
            parts += [(label, cut)] if share > 0 else []
            if share >= 0.5:
                inside.append((label, cut, min(area * share, (cut[2] - cut[0]) * (cut[3] - cut[1]))))
            elif share > 0:
                slivers.add(label)
        for question, answer in turns_of(row):
            kind, subject = kind_of(question)
            seen[check(question, answer, inside, 200, 200, parts)] += 1
            if answer in ("no", "0") or answer.startswith("There is no"):
                assert SINGULAR.get(subject, subject) not in slivers or answer == "0" and inside
            if kind == "one":
                assert not any(subject.endswith(label) for label in slivers)
    assert len(seen) == 10


def test_unclear_objects_have_no_questions(tmp_path):
    names = NAMES["train"][:30]
    write_coco(tmp_path / "data", "train", names)
    path = tmp_path / "data" / "annotations" / "instances_train2017.json"
    contents = json.loads(path.read_text())
    contents["annotations"] += [
        {"id": 10**6 + index, "image_id": index, "category_id": 0, "bbox": [5, 5, 90, 50], "iscrowd": 1}
        for index in range(30)
    ]
    path.write_text(json.dumps(contents))
    for row in make("coco", tmp_path / "data", tmp_path / "out", "--turns", 10)["train"]:
        for question, answer in turns_of(row):
            kind, subject = kind_of(question)
            if kind != "caption":
                assert not subject.endswith(("plane", "planes")), (question, answer)


PHRASES = ("tree", "road", "storage tank")


@st.composite
def boxes(draw, size):
    ends = [sorted(draw(st.lists(st.floats(0, end), min_size=2, max_size=2, unique=True))) for end in size]
    (top, bottom), (left, right) = ends
    return left, top, right, bottom


@st.composite
def images(draw):
    """Draw height and width, regions, slivers and the side of the grid."""
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
def test_map_cell_is_majority_class(drawn):
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
def test_map_cells_match_mask(seed, height, width, side):
    numbers = np.random.default_rng(seed).integers(0, 4, (height, width), dtype=np.int32)
    labels = LabelMap(numbers, PHRASES)
    image = AnnotatedImage("x", (), (height, width), regions_of(labels), mask=lambda: labels)
    names = [None, *PHRASES]
    assert cell_covers(image, side) == by_a_loop((height, width), side, lambda x, y: {names[numbers[y, x]]} - {None})


@settings(deadline=None)
@given(images())
def test_map_of_transposed_image_is_transposed(drawn):
    size, regions, _, side = drawn
    if min(size) < side:
        return
    swapped = [(label, (y0, x0, y1, x1)) for label, (x0, y0, x1, y1) in regions]
    plain = np.array(cell_covers(AnnotatedImage("x", (), size, regions_from(regions)), side), dtype=object)
    swapped = cell_covers(AnnotatedImage("x", (), size[::-1], regions_from(swapped)), side)
    assert swapped == plain.reshape(side, side).T.flatten().tolist()


def test_unclear_boxes_prevent_map():
    crowd = (Region("tree", (0, 0, 9, 9), 81.0, is_clear=False),)
    labels = LabelMap(np.zeros((9, 9), dtype=np.int32), PHRASES)
    assert cell_covers(AnnotatedImage("x", (), (9, 9), crowd), 3) is None
    assert cell_covers(AnnotatedImage("x", (), (9, 9), slivers=crowd), 3) is None
    assert cell_covers(AnnotatedImage("x", (), (9, 9), crowd, mask=lambda: labels), 3) == [None] * 9


def test_map_words_are_classes_or_letters():
    assert signs_of(["road", "tree"]) == {"road": "road", "tree": "tree", None: BACKGROUND}
    assert explained(signs_of(["road", "tree"])) == ["road", "tree", BACKGROUND]
    assert signs_of(["road", "storage tank"]) == {"road": "A", "storage tank": "B", None: "none"}
    assert explained(signs_of(["road", "storage tank"])) == ["A for road", "B for storage tank", "none"]
    assert signs_of([BACKGROUND, "road"]) == {BACKGROUND: "A", "road": "B", None: "none"}
    assert len(set(signs_of(f"big {number}" for number in range(len(LETTERS))).values())) == len(LETTERS) + 1
    assert signs_of(f"big {number}" for number in range(len(LETTERS) + 1)) == {}


def test_plurals():
    words = {"tree": "trees", "bus": "buses", "bridge": "bridges", "factory": "factories", "railway": "railways"}
    words |= {"fish": "fish", "series": "series", "glass": "glasses", "large buildings": "large buildings"}
    words |= {"storage tank": "storage tanks", "class 1": "class 1"}
    assert {word: plural(word) for word in words} == words
