"""The task of counting trees: views, instructions, answers, scores, labels and masks."""

import io
import re

import numpy as np
import pytest
import torch
from datasets import Dataset, Features, List, Value, load_dataset
from datasets import Image as ImageFeature
from hypothesis import given, settings
from hypothesis import strategies as st
from paths import AERIAL_TREES
from PIL import Image

from lab.data.build_tree_masks import (
    REACH,
    TREE,
    UNKNOWN,
    check_apart,
    row_boxes,
    side_by_side,
    tree_mask,
    write_test,
)
from lab.trees import answers as asking
from lab.trees import evaluation, instructions, views
from lab.trees.answers import losses_with_own_and_other_images
from lab.trees.downstream import (
    crops_of,
    halves_of,
    label_subset,
    labeled_rows,
    rows_without,
    split_held_out,
    write_splits,
)
from modeling_vitp.data.boxes import iou
from modeling_vitp.images.pixels import ColorJitter
from modeling_vitp.instructions.collator import ViTPDataCollator
from modeling_vitp.vrl import keyed_generator

WORDS = {"top left": (0, 0), "top right": (0, 1), "bottom left": (1, 0), "bottom right": (1, 1)}


@pytest.fixture(scope="module")
def aerial_trees(tmp_path_factory):
    return load_dataset(str(AERIAL_TREES), cache_dir=str(tmp_path_factory.mktemp("cache")))


def painted(boxes, size):
    """Return a black image with one pixel of a unique color at the center of each box."""
    pixels = np.zeros((size, size, 3), dtype=np.uint8)
    for index, (left, top, right, bottom) in enumerate(boxes):
        pixels[(top + bottom) // 2, (left + right) // 2] = (index + 1, 255, 255)
    return Image.fromarray(pixels)


def painted_centers(image):
    """Return (index, column, row) of each painted box in the image; a mosaic may repeat a box."""
    pixels = np.asarray(image)
    rows, columns = np.nonzero(pixels[..., 1])
    return [(int(pixels[r, c, 0]) - 1, int(c), int(r)) for r, c in zip(rows, columns)]


odd_boxes = st.lists(
    st.tuples(st.integers(5, 290), st.integers(5, 290), st.integers(1, 20), st.integers(1, 20)),
    min_size=0,
    max_size=12,
    unique_by=lambda box: box[:2],
)


@settings(max_examples=100, deadline=None)
@given(boxes=odd_boxes, key=st.integers(0, 10**6), kind=st.sampled_from(["crop", "mosaic", "collage"]))
def test_boxes_and_crowns_follow_pixels(boxes, key, kind):
    """Boxes of odd sides have a painted center pixel, which must be at the center of the box in the view."""
    boxes = [[x - a, y - b, x + a + 1, y + b + 1] for x, y, a, b in boxes]
    ground = views.TreeScene.of(painted(boxes, 300), boxes)
    ground.pixels[..., 2] = 100 + 100 * ground.crowns
    rng = np.random.default_rng(key)
    view = (
        views.collage([ground, ground], rng)
        if kind == "collage"
        else views.view_of(ground, 1 + (kind == "mosaic"), rng)
    )
    assert np.array_equal(view.pixels[..., 2] == 200, view.crowns)
    assert len(set(view.crowns.shape)) == 1
    seen = painted_centers(view.image)
    assert len(seen) == len(view.boxes)
    expected = {
        (column, row, *sorted((boxes[index][2] - boxes[index][0], boxes[index][3] - boxes[index][1])))
        for index, column, row in seen
    }
    actual = {((x0 + x1) // 2, (y0 + y1) // 2, *sorted((x1 - x0, y1 - y0))) for x0, y0, x1, y1 in view.boxes.tolist()}
    assert actual == expected
    parts = {"crop": 1, "mosaic": 2, "collage": views.COLLAGE_PARTS}[kind]
    side = view.size // parts
    for box, shown in zip(view.boxes, view.seen, strict=True):
        piece = np.floor_divide(box[:2] + box[2:], 2 * side)  # the piece of its center
        low, high = np.tile(piece * side, 2), np.tile((piece + 1) * side, 2)
        assert np.array_equal(shown, box.clip(low, high))
        left, top, right, bottom = shown
        assert view.crowns[top:bottom, left:right].all()


def test_crowns_equal_loop():
    boxes = [[-4, 2, 6, 9], [3, 3, 12, 40], [15, 15, 18, 17]]
    crowns = views.TreeScene.of(Image.new("RGB", (20, 30)), boxes).crowns
    for y, x in np.ndindex(30, 20):
        assert crowns[y, x] == any(x0 <= x < x1 and y0 <= y < y1 for x0, y0, x1, y1 in boxes)


@pytest.mark.parametrize("kind", ["crop", "mosaic", "collage"])
def test_views_come_from_anywhere_in_eight_orientations(kind):
    """Pixel values encode their position, and so the corners and the orientation of the parts."""
    y, x = np.mgrid[:400, :400]
    pixels = np.stack([x // 2, y // 2, np.zeros_like(x)], -1).astype(np.uint8)
    ground = views.TreeScene(pixels, np.zeros((400, 400), bool), np.zeros((0, 4), int))
    other = views.TreeScene(pixels + np.uint8([0, 0, 9]), ground.crowns, ground.boxes)
    rng, turns, lefts, whose = np.random.default_rng(0), set(), [], set()
    parts = {"crop": 1, "mosaic": 2, "collage": 7}[kind]
    for _ in range(60):
        view = views.collage([ground, other], rng) if kind == "collage" else views.view_of(ground, parts, rng)
        size = view.size // parts
        assert 0.85 * 224 - parts <= view.size <= 1.15 * 224
        for row, column in np.ndindex(parts, parts):
            part = view.pixels[row * size : (row + 1) * size, column * size : (column + 1) * size].astype(int)
            right, down = part[0, -1, :2] - part[0, 0, :2], part[-1, 0, :2] - part[0, 0, :2]
            turns.add((*np.sign(right), *np.sign(down)))
            lefts.append(part[..., 0].min())
            whose.add(int(part[0, 0, 2]))
    assert len(turns) == 8
    assert min(lefts) < 20 and max(lefts) > (400 - view.size // parts) / 2 - 20
    assert whose == ({0, 9} if kind == "collage" else {0})


@settings(max_examples=15, deadline=None)
@given(key=st.integers(0, 10**6), size=st.integers(150, 260))
def test_map_equals_loop_over_cells(key, size):
    rng = np.random.default_rng(key)
    corners = rng.integers(-20, size - 5, (12, 2))
    boxes = np.concatenate([corners, corners + rng.integers(5, 70, corners.shape)], 1)
    view = views.TreeScene.of(Image.new("RGB", (size, size)), boxes[views.is_inside(boxes, size)])
    words = instructions.write_map(view).split()
    assert len(words) == 49
    for index, word in enumerate(words):
        row, column = divmod(index, 7)
        quarters = 0
        for quarter in range(4):
            y, x = 2 * row + quarter // 2, 2 * column + quarter % 2
            inside = [
                view.crowns[a, b]
                for a in range(size)
                if y <= (a + 0.5) / size * 14 < y + 1
                for b in range(size)
                if x <= (b + 0.5) / size * 14 < x + 1
            ]
            quarters += (np.mean(inside) > 0.5) * 2**quarter
        assert word.lower() == "abcdefghijklmnop"[quarters]
        centered = any(
            column <= (x0 + x1) / 2 / size * 7 < column + 1 and row <= (y0 + y1) / 2 / size * 7 < row + 1
            for x0, y0, x1, y1 in view.boxes.tolist()
        )
        assert word.isupper() == centered


@settings(max_examples=50, deadline=None)
@given(key=st.integers(0, 10**6), share=st.floats(0, 1))
def test_written_map_is_read_back(key, share):
    """Quarters have 5 x 5 pixels; missing and unknown words of a map are ignored."""
    quarters = np.random.default_rng(key).random((14, 14)) < share
    view = views.TreeScene(np.zeros((70, 70, 3), np.uint8), np.kron(quarters, np.ones((5, 5), bool)), np.zeros((0, 4)))
    written = instructions.write_map(view)
    assert np.array_equal(instructions.read_map(written), quarters)
    assert np.array_equal(instructions.read_map(written.upper() + " p p"), quarters)
    words = written.split()
    assert np.array_equal(instructions.read_map(" ".join(words[:21])), quarters * (np.arange(14) < 6)[:, None])
    words[0] = "There"
    cell = np.zeros((14, 14), bool)
    cell[:2, :2] = True
    assert np.array_equal(instructions.read_map(" ".join(words)), quarters & ~cell)
    assert not instructions.read_map("").any()


@settings(max_examples=100, deadline=None)
@given(key=st.integers(0, 10**6), share=st.floats(0, 0.7))
def test_box_of_map_bounds_largest_part(key, share):
    """The box equals that of a flood fill."""
    quarters = np.random.default_rng(key).random((14, 14)) < share
    view = views.TreeScene(
        np.zeros((140, 140, 3), np.uint8), np.kron(quarters, np.ones((10, 10), bool)), np.zeros((0, 4))
    )
    parts, left = [], {(int(row), int(column)) for row, column in np.argwhere(quarters)}
    while left:
        part, edge = set(), [left.pop()]
        while edge:
            row, column = edge.pop()
            part.add((row, column))
            near = {(row + 1, column), (row - 1, column), (row, column + 1), (row, column - 1)} & left
            left -= near
            edge += near
        parts.append(part)
    box = asking.map_box(instructions.write_map(view), 280)
    most = max(map(len, parts), default=0)
    largest = [np.array(sorted(part)) for part in parts if len(part) == most]
    bounds = [(*20 * part.min(0)[::-1], *20 * (part.max(0)[::-1] + 1)) for part in largest]
    assert box is None if not parts else box in bounds


def test_jitter_changes_pixels_alone_and_all_alike():
    ground = views.TreeScene(
        np.arange(256, dtype=np.uint8).repeat(3).reshape(16, 16, 3), np.zeros((16, 16), bool), np.zeros((0, 4))
    )
    seen = [ground.jittered(np.random.default_rng(seed)) for seed in range(20)]
    for view in seen:
        levels = view.pixels.reshape(-1, 3)
        assert (levels == levels[:, :1]).all() and (np.diff(levels[:, 0].astype(int)) >= 0).all()
    middles = [view.pixels.reshape(-1, 3)[128, 0] for view in seen]
    assert min(middles) < 115 and max(middles) > 140
    first, again = (ground.jittered(np.random.default_rng(3)).pixels for _ in range(2))
    assert np.array_equal(first, again)


def check_answer(question, answer, boxes, size):
    """Recompute every kind of answer with plain loops."""
    quarters = dict.fromkeys(WORDS, 0)
    for left, top, right, bottom in boxes:
        place = (int((top + bottom) / 2 >= size / 2), int((left + right) / 2 >= size / 2))
        quarters[next(name for name, value in WORDS.items() if value == place)] += 1
    if question == "How many trees are there?":
        assert int(answer) == len(boxes)
    elif question.startswith("How many trees are in the "):
        name = re.fullmatch(r"How many trees are in the (.*) quarter\?", question).group(1)
        assert int(answer) == quarters[name]
    elif question == "How many trees are in each quarter?":
        counts = {name: int(count) for name, count in re.findall(r"(\w+ \w+) (\d+)", answer)}
        assert counts == quarters
    elif question.startswith("Are there more than "):
        number = int(re.fullmatch(r"Are there more than (\d+) trees\?", question).group(1))
        assert answer == ("yes" if len(boxes) > number else "no")
    elif question.startswith("Is there a tree in the "):
        name = re.fullmatch(r"Is there a tree in the (.*) quarter\?", question).group(1)
        assert answer == ("yes" if quarters[name] > 0 else "no")
    elif question == "Where is the largest tree?":
        if not boxes:
            assert answer == "There is no tree."
            return
        corners = [int(number) for number in re.findall(r"\d+", answer)]
        assert answer == "<ref>tree</ref><box>[[" + ", ".join(map(str, corners)) + "]]</box>"
        assert all(corner % 20 == 0 for corner in corners)
        visible = [[min(max(side, 0), size) for side in box] for box in boxes]
        areas = [(x1 - x0) * (y1 - y0) for x0, y0, x1, y1 in visible]
        best = [box for box, area in zip(visible, areas) if area == max(areas)]
        assert any(
            all(abs(c * size / 1000 - side) <= 21 * size / 2000 + 1e-9 for c, side in zip(corners, box)) for box in best
        )
        assert all(0 <= corner <= 1000 for corner in corners)
    elif question == "How dense is the forest?":
        per_crop = len(boxes) * 224**2 / size**2
        bounds = {"no": (0, 0), "open": (0, 4), "sparse": (4, 12), "dense": (12, 10**9)}[answer]
        assert per_crop == 0 if answer == "no" else bounds[0] <= per_crop < bounds[1] and boxes
    else:
        assert question == "Describe the image."
        if not boxes:
            assert "without trees" in answer
            return
        named = re.search(r"most trees in the (.*)\.", answer).group(1)
        assert quarters[named] == max(quarters.values())


@settings(max_examples=300, deadline=None)
@given(key=st.integers(0, 10**9))
def test_every_answer_is_true_of_the_view(key):
    generator = np.random.default_rng(key)
    size = int(generator.integers(200, 300))
    corner = generator.integers(-10, size - 20, (int(generator.integers(0, 15)), 2))
    boxes = np.concatenate([corner, corner + generator.integers(12, 60, corner.shape)], axis=1)
    boxes = boxes[views.is_inside(boxes, size)]
    view = views.TreeScene(np.zeros((size, size, 3), np.uint8), np.zeros((size, size), bool), boxes)
    messages = instructions.converse(view, instructions.SHARES, generator)
    assert [message["role"] for message in messages] == ["user", "assistant"] * 5
    for question, answer in zip(messages[::2], messages[1::2]):
        check_answer(question["content"], answer["content"], boxes.tolist(), size)


def test_largest_tree_is_clipped_to_mosaic_piece():
    """Only the visible part of a crown counts in a mosaic."""
    pieces = [
        views.TreeScene.of(Image.new("RGB", (100, 100)), boxes) for boxes in ([[40, 12, 130, 60]], [[10, 10, 60, 60]])
    ]
    view = views.assemble([pieces[0], pieces[1], pieces[1], pieces[1]], 2)
    assert view.seen[0].tolist() == [40, 12, 100, 60] and view.boxes[0].tolist() == [40, 12, 130, 60]
    _, answer = instructions.ask_location(view, None)
    assert answer == "<ref>tree</ref><box>[[200, 60, 500, 300]]</box>"


def test_all_questions_are_asked_and_balanced():
    boxes = np.array([[10, 10, 30, 30], [150, 20, 180, 50], *[[150, 30, 180, 60]] * 4])
    answers = {}
    view = views.TreeScene.of(Image.new("RGB", (224, 224)), boxes)
    for key in range(600):
        messages = instructions.converse(view, instructions.SHARES, np.random.default_rng(key))
        for question, answer in zip(messages[::2], messages[1::2]):
            kind = re.sub("|".join([*WORDS, r"\d+"]), "…", question["content"])
            answers.setdefault(kind, []).append(answer["content"])
    assert len(answers) == 1 + len(instructions.KINDS) == 8
    for kind in ("Is there a tree in the … quarter?", "Are there more than … trees?"):
        assert 0.4 < answers[kind].count("yes") / len(answers[kind]) < 0.6, kind


def test_transform_depends_on_generator_alone(aerial_trees):
    row = aerial_trees["train"][0]
    transform = instructions.TreeInstructions(aerial_trees["train"].select(range(3)))
    kinds = set()
    for key in range(30):
        first, again, other = (transform(row, keyed_generator(number)) for number in (key, key, key + 100))
        assert first["messages"] == again["messages"]
        assert first["images"][0].tobytes() == again["images"][0].tobytes()
        assert first["images"][0].tobytes() != other["images"][0].tobytes()
        kinds.add(first["messages"][0]["content"] == instructions.MAP)
    assert kinds == {True, False}


def test_the_mix_of_tasks_can_be_set(aerial_trees):
    """Shares of 0, a single kind, and invalid shares and kinds are tested."""
    rows = aerial_trees["train"].select([0])
    row = rows[0]
    kinds = dict.fromkeys(instructions.KINDS, 0.0) | {"presence": 1.0}
    transform = instructions.TreeInstructions(rows, collage_share=0, map_share=0, kinds=kinds)
    for key in range(20):
        asked = [message["content"] for message in transform(row, keyed_generator(key))["messages"][::2]]
        assert sum(question == instructions.COUNT for question in asked) == 1
        assert sum(question.startswith("Is there a tree in the") for question in asked) == 4
    maps = instructions.TreeInstructions(rows, collage_share=0.5, map_share=0.5)
    assert all(maps(row, keyed_generator(key))["messages"][0]["content"] == instructions.MAP for key in range(20))
    for wrong in ({"collage_share": 1.1}, {"collage_share": 0.7, "map_share": 0.6}, {"kinds": {"color": 1.0}}):
        with pytest.raises(ValueError, match="task_options"):
            instructions.TreeInstructions(rows, **wrong)


def test_test_ground_is_apart_from_training(aerial_trees):
    train = [row for row in aerial_trees["train"] if row["scene"] == "yellowstone"]
    train_end = max(row["left"] + row["image"].size[0] for row in train)
    test_start = min(row["left"] for row in aerial_trees["test"])
    largest_crop = views.CROP * max(views.SCALES)
    assert test_start - train_end >= largest_crop
    assert {row["scene"] for row in aerial_trees["test"]} == {"yellowstone"}
    assert "yellowstone_2" not in set(aerial_trees["train"]["scene"])
    assert all(row["image"].size == (224, 224) for split in ("test", "second_scene") for row in aerial_trees[split])


@pytest.mark.parametrize("split", ["test", "second_scene"])
def test_overlapping_ground_is_refused(aerial_trees, split):
    """A training window is moved to overlap a test crop by one pixel; its id does not matter."""
    moved = aerial_trees["train"][3]
    crop = aerial_trees[split][7]
    place = {"scene": crop["scene"], "left": crop["left"] + crop["image"].size[0] - 1, "top": crop["top"] + 5}
    train = [{**row, **place} if row["id"] == moved["id"] else row for row in aerial_trees["train"]]
    leaking = {**aerial_trees, "train": Dataset.from_list(train, features=aerial_trees["train"].features)}
    with pytest.raises(ValueError, match=moved["id"]):
        instructions.prepare(leaking)
    place["left"] += 1000
    train = [{**row, **place} if row["id"] == moved["id"] else row for row in aerial_trees["train"]]
    instructions.prepare({**leaking, "train": Dataset.from_list(train, features=aerial_trees["train"].features)})


def test_training_rows_are_repeated_under_own_ids(aerial_trees):
    train, test = instructions.prepare(aerial_trees)
    assert len(train) == len(set(train["id"])) == 64 * len(aerial_trees["train"])
    assert [int(messages[1]["content"]) for messages in test["messages"]] == [
        len(b) for b in aerial_trees["test"]["boxes"]
    ]


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 20), min_size=8, max_size=8))
def test_iou_equals_counting_pixels(numbers):
    first, second = (
        np.array([*np.minimum(a[:2], a[2:]), *np.maximum(a[:2], a[2:])]) for a in np.reshape(numbers, (2, 4))
    )
    masks = []
    for left, top, right, bottom in (first, second):
        mask = np.zeros((21, 21), dtype=bool)
        mask[top:bottom, left:right] = True
        masks.append(mask)
    union = (masks[0] | masks[1]).sum()
    expected = (masks[0] & masks[1]).sum() / union if union else 0.0
    assert iou(first, second) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("<ref>tree</ref><box>[[100, 200, 300, 400]]</box>", [25.6, 51.2, 76.8, 102.4]),
        ("tree[[0, 0, 1000, 1000]]", [0, 0, 256, 256]),
        ("[10, 20, 30, 40]", [2.56, 5.12, 7.68, 10.24]),
        ("There is no tree.", None),
        ("[[1, 2", None),
    ],
)
def test_boxes_are_read_from_answers(answer, expected):
    box = asking.first_box(answer, 256)
    assert box is None if expected is None else list(box) == pytest.approx(expected)


def test_count_scores_equal_a_loop():
    true = [3, 5, 0, 9]
    dataset = {"boxes": [[[0, 0, 1, 1]] * count for count in true]}
    scores = asking.score_counts(["3", "There are 7.", "none", "4"], dataset, constant=4.0)
    predicted = [3, 7, 4, 4]
    assert scores["mean_error"] == sum(abs(p - t) for p, t in zip(predicted, true)) / 4
    assert scores["mean_error_swapped_images"] == sum(abs(predicted[(i + 2) % 4] - t) for i, t in enumerate(true)) / 4
    assert scores["mean_error_constant_median"] == sum(abs(4 - t) for t in true) / 4
    assert scores["answers_without_number"] == 1
    assert scores["correlation"] == pytest.approx(np.corrcoef(predicted, true)[0, 1])


@settings(max_examples=100, deadline=None)
@given(st.lists(st.one_of(st.integers(0, 40).map(str), st.just("none")), min_size=1, max_size=15))
def test_the_median_answer_has_the_least_absolute_error(answers):
    chosen = asking.median_answer(answers)
    numbers = [int(answer) for answer in answers if answer != "none"]
    if not numbers:
        assert chosen == answers[0]
        return
    errors = [sum(abs(number - other) for other in numbers) for number in numbers]
    assert sum(abs(int(chosen) - other) for other in numbers) == min(errors)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.one_of(st.none(), st.tuples(*[st.integers(0, 9)] * 2)), max_size=8))
def test_the_central_box_has_the_greatest_mean_overlap(corners):
    boxes = [corner and (*corner, corner[0] + 4, corner[1] + 3) for corner in corners]
    found, chosen = [box for box in boxes if box], asking.central_box(boxes)
    if not found:
        assert chosen is None
        return
    means = {box: np.mean([iou(box, other) for other in found]) for box in found}
    assert means[chosen] == pytest.approx(max(means.values()))


def test_box_scores_equal_a_loop():
    """Images without a tree are skipped, and a missing box scores 0."""
    image = Image.new("RGB", (100, 100))
    trees = [[[0, 0, 9, 9], [10, 10, 30, 30]], [[50, 50, 90, 90]], [], [[0, 0, 9, 9]]]
    rows = [{"image": image, "boxes": boxes} for boxes in trees]
    predicted = [(10, 10, 30, 20), (50, 50, 90, 90), (10, 10, 20, 30), None]
    scores = asking.score_largest(predicted, rows, np.array([0.5, 0.5, 0.9, 0.7]))
    assert scores == {
        "mean_iou": pytest.approx((0.5 + 1 + 0) / 3),
        "mean_iou_swapped_images": pytest.approx(0.5 / 3),
        "mean_iou_blind_constant": pytest.approx((0 + 0.5 + 0) / 3),
        "answers_without_box": 1,
    }


@pytest.mark.parametrize(
    ("changed", "passed"),
    [
        ({}, True),
        ({"grounding_by_map": {"mean_iou": 0.1}}, False),
        ({"grounding_by_map": {"mean_iou_swapped_images": 0.3}}, False),
        ({"count": {"mean_error": 2.1}}, False),
        ({"backbone": {"gains": {"linear": {"pixels": 0.03, "random": 0.01}, "nonlinear": {"pixels": 0.03}}}}, False),
    ],
)
def test_the_gate_asks_for_every_control(changed, passed):
    scores = {
        "count": {"mean_error": 1.9, "mean_error_constant_median": 2.5, "mean_error_swapped_images": 3.0},
        "grounding_by_map": {"mean_iou": 0.2, "mean_iou_blind_constant": 0.1, "mean_iou_swapped_images": 0.05},
        "backbone": {"gains": {"linear": {"pixels": 0.03, "random": 0.04}, "nonlinear": {"pixels": 0.03}}},
    }
    assert evaluation.gate({name: value | changed.get(name, {}) for name, value in scores.items()})["passed"] is passed


def test_the_data_set_is_what_the_script_builds():
    """Windows are cut as documented and have the boxes whose centers lie in them."""
    from lab.data import build_aerial_trees

    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (600, 700, 3), dtype=np.uint8))
    boxes = [[10, 10, 30, 30], [250, 240, 270, 268], [690, 590, 710, 610]]
    rows = build_aerial_trees.cut(image, boxes, "scene", (0, 0, 700, 600), 256, 200)
    assert sorted({row["left"] for row in rows}) == [0, 200, 400, 444]
    assert sorted({row["top"] for row in rows}) == [0, 200, 344]
    for row in rows:
        assert Image.open(io.BytesIO(row["image"]["bytes"])).size == (256, 256)
        expected = []
        for left, top, right, bottom in boxes:
            x, y = (left + right) / 2 - row["left"], (top + bottom) / 2 - row["top"]
            if 0 <= x < 256 and 0 <= y < 256:
                expected.append([left - row["left"], top - row["top"], right - row["left"], bottom - row["top"]])
        assert row["boxes"] == expected


def test_answers_are_asked_for_without_dropping(aerial_trees, monkeypatch, model_and_processor):
    model, processor = model_and_processor
    seen = []
    generate = type(model).generate

    def recording(self, **inputs):
        seen.append(set(inputs))
        return generate(self, **{**inputs, "max_new_tokens": 2})

    monkeypatch.setattr(type(model), "generate", recording)
    answers = asking.ask_about(
        model, processor, aerial_trees["second_scene"].select(range(3)), "How many trees are there?"
    )
    assert len(answers) == 3
    assert all("visual_token_indices" not in inputs for inputs in seen)
    assert torch.is_grad_enabled()


def test_colors_of_probe_views_change_and_masks_stay(aerial_trees, tmp_path):
    rows = aerial_trees["train"].select([0])
    for name, jitter in (("plain", None), ("same", ColorJitter(0, 0, 0, 0)), ("gray", ColorJitter(0, 0, 0, 1.0))):
        evaluation.write_views(rows, tmp_path / name, 3, jitter)
    images = sorted(path.name for path in (tmp_path / "plain" / "images").iterdir())
    assert len(images) == evaluation.PROBE_VIEWS
    for image in images:
        plain, same, gray = (
            np.array(Image.open(tmp_path / name / "images" / image)) for name in ("plain", "same", "gray")
        )
        assert np.array_equal(same, plain)
        assert (gray == gray[..., :1]).all()
        assert np.abs(gray[..., 0] - plain.mean(-1)).max() <= 1
        masks = [(tmp_path / name / "masks" / image).read_bytes() for name in ("plain", "gray")]
        assert masks[0] == masks[1]


def test_scenes_are_left_out(aerial_trees):
    train = aerial_trees["train"]
    rows = rows_without(train, ["osbs_029", "soap_061"])
    assert len(rows) == 18 and set(rows["scene"]) == {"yellowstone"}
    with pytest.raises(ValueError, match="osbs_29"):
        rows_without(train, ["osbs_29"])
    with pytest.raises(ValueError, match="yellowstone.* 18"):
        crops_of(train, "yellowstone")


def test_crops_of_a_scene_cover_it(aerial_trees, tmp_path):
    (row,) = aerial_trees["train"].filter(lambda scene: scene == "osbs_029", input_columns="scene")
    crops = crops_of(aerial_trees["train"], "osbs_029")
    truth = np.full((400, 400), 255)
    truth[32:368, 32:368] = 0
    for left, top, right, bottom in row["boxes"]:
        truth[max(top, 0) : bottom, max(left, 0) : right] = 1
    write_test(crops, tmp_path)
    masks, pixels = np.full((400, 400), -1), np.zeros((400, 400, 3))
    for crop in crops:
        left, top = crop["left"], crop["top"]
        mask = Image.open(tmp_path / "masks" / f"osbs_029_{left}_{top}.png")
        masks[top : top + 200, left : left + 200] = np.array(mask)
        pixels[top : top + 200, left : left + 200] = np.array(crop["image"])
    assert (masks == truth).all() and np.abs(pixels - np.array(row["image"])).mean() < 2
    assert sum(len(boxes) for boxes in crops["boxes"]) == len(row["boxes"])
    left, right = halves_of(crops)
    assert (set(left["left"]), set(right["left"])) == ({0}, {200})
    left, right = halves_of(aerial_trees["second_scene"])
    assert max(left["left"]) + 224 <= min(right["left"]) and len(left) == len(right) == 15


def test_label_subset_has_share_of_windows_and_trees(aerial_trees):
    trees = [len(boxes) for boxes in aerial_trees["train"]["boxes"]]
    draws = [label_subset(trees, 0.1, seed) for seed in range(20)]
    assert draws == [label_subset(trees, 0.1, seed) for seed in range(20)]
    assert len(set(map(tuple, draws))) > 10
    for chosen in draws:
        assert len(set(chosen)) == 2 == len(trees) * 0.1
        assert 0.08 <= sum(trees[index] for index in chosen) / sum(trees) <= 0.12
    assert label_subset(trees, 1.0, 3) == list(range(20))
    assert len(label_subset(trees, 0.05, 0)) == 1
    with pytest.raises(ValueError, match="no 5% of the windows"):
        label_subset([0, 100] * 10, 0.05, 0)


def test_held_out_ground_is_in_no_window(aerial_trees):
    rows, held_out = split_held_out(aerial_trees["train"], "yellowstone", 1960)
    assert held_out["id"][:] == ["yellowstone/0_1960", "yellowstone/392_1960", "yellowstone/777_1960"]
    assert len(rows) == 14
    check_apart(rows, held_out)
    with pytest.raises(ValueError, match="gives 0 training"):
        split_held_out(aerial_trees["second_scene"], "yellowstone_2", 0)


def test_part_is_written_once_with_images(aerial_trees, tmp_path):
    part = {
        "train": labeled_rows(aerial_trees["train"], 0.1, 2),
        "second_scene": aerial_trees["test"].select(range(2)),
    }
    folder = write_splits(part, tmp_path / "part")
    assert write_splits({}, tmp_path / "part") == folder
    read = load_dataset(folder)
    assert set(read) == set(part)
    for name, rows in part.items():
        assert read[name]["id"][:] == rows["id"][:] and read[name]["boxes"][:] == rows["boxes"][:]
        assert (np.array(read[name][0]["image"]) == np.array(rows[0]["image"])).all()


def ground(rows) -> dict[str, set[tuple[int, int]]]:
    """Return every fourth pixel of the rows, by scene."""
    shown = {}
    for row in rows:
        width, height = row["image"].size
        pixels = shown.setdefault(row["scene"], set())
        for x in range(row["left"], row["left"] + width):
            if x % 4 == 0:
                pixels.update((x, y) for y in range(row["top"], row["top"] + height) if y % 4 == 0)
    return shown


def test_masks_equal_a_loop_over_pixels():
    where, known = (100, 40, 220, 130), (90, 0, 400, 120)
    boxes = [(80, 30, 110, 60), (150, 90, 161, 99), (210, 100, 260, 140), (0, 0, 20, 20)]
    mask = tree_mask(where, boxes, known)
    assert mask.shape == (90, 120) and mask.dtype == np.uint8
    for y in range(90):
        for x in range(120):
            column, row = x + 100, y + 40
            is_tree = any(x0 <= column < x1 and y0 <= row < y1 for x0, y0, x1, y1 in boxes)
            distance = min(column - 90, row - 0, 399 - column, 119 - row)
            assert mask[y, x] == (TREE if is_tree else UNKNOWN if distance < REACH else 0)


def test_test_pixels_are_scored_once(aerial_trees, tmp_path):
    kept = aerial_trees["test"].select(side_by_side(row_boxes(aerial_trees["test"])))
    assert sum(len(pixels) for pixels in ground(kept).values()) == pytest.approx(
        sum(len(ground([row])["yellowstone"]) for row in kept)
    )
    assert len(kept) == 33
    write_test(aerial_trees["test"], tmp_path)
    assert len(list((tmp_path / "masks").iterdir())) == 33
    # A crown whose center lies in the neighboring row is a tree here too.
    row = next(row for row in kept if row["left"] == 1833 and row["top"] == 448)
    mask = np.array(Image.open(tmp_path / "masks/yellowstone_1833_448.png"))
    inside = {(x0 + 1833, y0 + 448, x1 + 1833, y1 + 448) for x0, y0, x1, y1 in row["boxes"]}
    reaching_in = {
        (x0 + other["left"] - 1833, y0 + other["top"] - 448, x1 + other["left"] - 1833, y1 + other["top"] - 448)
        for other in aerial_trees["test"]
        for x0, y0, x1, y1 in other["boxes"]
        if (x0 + other["left"], y0 + other["top"], x1 + other["left"], y1 + other["top"]) not in inside
    }
    expected = np.zeros((224, 224), dtype=bool)
    for left, top, right, bottom in {*map(tuple, row["boxes"]), *reaching_in}:
        expected[max(top, 0) : max(bottom, 0), max(left, 0) : max(right, 0)] = True
    assert ((mask == TREE) == expected).all() and not (mask == UNKNOWN).any()
    with pytest.raises(ValueError, match="one scene"):
        write_test(aerial_trees["train"], tmp_path)


def test_training_on_tested_ground_is_refused(aerial_trees):
    check_apart(aerial_trees["train"], aerial_trees["test"])
    with pytest.raises(ValueError, match="yellowstone/1609_0"):
        check_apart(aerial_trees["test"], aerial_trees["test"])


def test_losses_are_means_over_answer_tokens(model, processor, picture_rows):
    rows = picture_rows
    collator = ViTPDataCollator(processor)
    measured = losses_with_own_and_other_images(model, collator, rows, batch_size=2)

    def oracle(shift: int) -> float:
        total = number = 0
        for index in range(len(rows)):
            image = rows[(index + shift) % len(rows)]["image"]
            batch = collator([{"id": index, "messages": rows[index]["messages"], "image": image}])
            with torch.no_grad():
                logits = model.eval()(**{key: value for key, value in batch.items() if key != "labels"}).logits[0, :-1]
            targets = batch["labels"][0, 1:]
            for place in torch.nonzero(targets != -100)[:, 0]:
                total -= logits[place].log_softmax(-1)[targets[place]].item()
                number += 1
        return total / number

    assert measured["loss"] == pytest.approx(oracle(0), rel=1e-5)
    assert measured["loss_swapped_images"] == pytest.approx(oracle(len(rows) // 2), rel=1e-5)
    assert measured["loss"] != pytest.approx(measured["loss_swapped_images"], rel=1e-6)


def test_model_keeps_its_mode(model, processor, picture_rows):
    model.train()
    losses_with_own_and_other_images(model, ViTPDataCollator(processor), picture_rows.select([0, 1]))
    assert model.training


@pytest.fixture
def picture_rows():
    rng = np.random.default_rng(0)
    pictures = [rng.integers(0, 256, (56, 56, 3), dtype=np.uint8) for _ in range(5)]
    messages = [
        [{"role": "user", "content": "What is it?"}, {"role": "assistant", "content": "a " + "b " * number}]
        for number in range(5)
    ]
    features = Features(
        {"image": ImageFeature(), "messages": List({"role": Value("string"), "content": Value("string")})}
    )
    return Dataset.from_dict({"image": pictures, "messages": messages}, features=features)
