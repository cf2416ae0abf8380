import io
import re

import numpy as np
import pytest
import torch
from datasets import load_dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from paths import AERIAL_TREES
from PIL import Image

from modeling_vitp.recipes.tasks.trees import evaluation, instructions
from modeling_vitp.vrl import keyed_generator

WORDS = {"top left": (0, 0), "top right": (0, 1), "bottom left": (1, 0), "bottom right": (1, 1)}


@pytest.fixture(scope="module")
def aerial_trees(tmp_path_factory):
    return load_dataset(str(AERIAL_TREES), cache_dir=str(tmp_path_factory.mktemp("cache")))


def painted(boxes, size):
    """An image that is black but for one pixel of a colour of its own at the centre of each box."""
    pixels = np.zeros((size, size, 3), dtype=np.uint8)
    for index, (left, top, right, bottom) in enumerate(boxes):
        pixels[(top + bottom) // 2, (left + right) // 2] = (index + 1, 255, 255)
    return Image.fromarray(pixels)


def centres_seen(image):
    """(index, column, row) of each painted box in the image; a mosaic may show one several times."""
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
@given(boxes=odd_boxes, key=st.integers(0, 10**6))
def test_boxes_follow_the_pixels_through_crops_mosaics_flips_and_turns(boxes, key):
    """Boxes of odd sides have a centre pixel: painted, cropped and turned with the image, it must lie where the box
    of the view says."""
    boxes = [[x - a, y - b, x + a + 1, y + b + 1] for x, y, a, b in boxes]
    view, seen_boxes = instructions.random_view(painted(boxes, 300), boxes, keyed_generator(key))
    seen = centres_seen(view)
    assert len(seen) == len(seen_boxes)
    expected = {
        (column, row, *sorted((boxes[index][2] - boxes[index][0], boxes[index][3] - boxes[index][1])))
        for index, column, row in seen
    }
    actual = {((x0 + x1) // 2, (y0 + y1) // 2, *sorted((x1 - x0, y1 - y0))) for x0, y0, x1, y1 in seen_boxes.tolist()}
    assert actual == expected


def check_answer(question, answer, boxes, size):
    """Recomputes every kind of answer with plain loops."""
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
        visible = [[min(max(side, 0), size) for side in box] for box in boxes]
        areas = [(x1 - x0) * (y1 - y0) for x0, y0, x1, y1 in visible]
        best = [box for box, area in zip(visible, areas) if area == max(areas)]
        assert any(
            all(abs(c * size / 1000 - side) <= size / 2000 + 1e-9 for c, side in zip(corners, box)) for box in best
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
    boxes = boxes[instructions.is_inside(boxes, size)]
    messages = instructions.converse(boxes, size, keyed_generator(key))
    assert [message["role"] for message in messages] == ["user", "assistant"] * 5
    for question, answer in zip(messages[::2], messages[1::2]):
        check_answer(question["content"], answer["content"], boxes.tolist(), size)


def test_all_kinds_of_questions_are_asked_and_yes_and_no_are_balanced():
    boxes = np.array([[10, 10, 30, 30], [150, 20, 180, 50], *[[150, 30, 180, 60]] * 4])
    answers = {}
    for key in range(600):
        messages = instructions.converse(boxes, 224, keyed_generator(key))
        for question, answer in zip(messages[::2], messages[1::2]):
            kind = re.sub("|".join([*WORDS, r"\d+"]), "…", question["content"])
            answers.setdefault(kind, []).append(answer["content"])
    assert len(answers) == 1 + len(instructions.KINDS) == 8
    for kind in ("Is there a tree in the … quarter?", "Are there more than … trees?"):
        assert 0.4 < answers[kind].count("yes") / len(answers[kind]) < 0.6, kind


def test_the_transform_is_a_pure_function_of_its_generator(aerial_trees):
    row = {**aerial_trees["train"][0], "images": [aerial_trees["train"][0]["image"]]}
    first, again, other = (instructions.transform(row, keyed_generator(key)) for key in (1, 1, 2))
    assert first["messages"] == again["messages"]
    assert first["images"][0].tobytes() == again["images"][0].tobytes()
    assert first["images"][0].tobytes() != other["images"][0].tobytes()


def test_the_test_ground_lies_behind_a_gap_that_no_training_crop_bridges(aerial_trees):
    train = [row for row in aerial_trees["train"] if row["scene"] == "yellowstone"]
    train_end = max(row["left"] + row["image"].size[0] for row in train)
    test_start = min(row["left"] for row in aerial_trees["test"])
    largest_crop = instructions.CROP * max(instructions.SCALES)
    assert test_start - train_end >= largest_crop
    assert {row["scene"] for row in aerial_trees["test"]} == {"yellowstone"}
    assert "yellowstone_2" not in set(aerial_trees["train"]["scene"])
    assert all(row["image"].size == (224, 224) for split in ("test", "second_scene") for row in aerial_trees[split])


def test_training_rows_are_repeated_under_ids_of_their_own(aerial_trees):
    train, test = instructions.prepare(aerial_trees)
    assert len(train) == len(set(train["id"])) == 32 * len(aerial_trees["train"])
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
    assert evaluation.iou(first, second) == pytest.approx(expected)


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
    box = evaluation.first_box(answer, 256)
    assert box is None if expected is None else list(box) == pytest.approx(expected)


def test_count_scores_equal_a_loop():
    true = [3, 5, 0, 9]
    dataset = {"boxes": [[[0, 0, 1, 1]] * count for count in true]}
    scores = evaluation.score_counts(["3", "There are 7.", "none", "4"], dataset, constant=4.0)
    predicted = [3, 7, 4, 4]
    assert scores["mean_error"] == sum(abs(p - t) for p, t in zip(predicted, true)) / 4
    assert scores["mean_error_swapped_images"] == sum(abs(predicted[(i + 2) % 4] - t) for i, t in enumerate(true)) / 4
    assert scores["mean_error_constant_median"] == sum(abs(4 - t) for t in true) / 4
    assert scores["answers_without_number"] == 1
    assert scores["correlation"] == pytest.approx(np.corrcoef(predicted, true)[0, 1])


@settings(max_examples=100, deadline=None)
@given(st.lists(st.one_of(st.integers(0, 40).map(str), st.just("none")), min_size=1, max_size=15))
def test_the_median_answer_has_the_least_absolute_error(answers):
    chosen = evaluation.median_answer(answers)
    numbers = [int(answer) for answer in answers if answer != "none"]
    if not numbers:
        assert chosen == answers[0]
        return
    errors = [sum(abs(number - other) for other in numbers) for number in numbers]
    assert sum(abs(int(chosen) - other) for other in numbers) == min(errors)


def test_the_data_set_is_what_the_script_builds():
    """Windows are cut where the docstring says and hold the boxes whose centres lie in them."""
    from modeling_vitp.recipes.data import build_aerial_trees

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
    answers = evaluation.ask(
        model, processor, aerial_trees["second_scene"].select(range(3)), "How many trees are there?"
    )
    assert len(answers) == 3
    assert all("visual_token_indices" not in inputs for inputs in seen)
    assert torch.is_grad_enabled()


@pytest.mark.parametrize("split", ["train", "test", "second_scene"])
def test_boxes_are_on_the_grid_by_rounding_alone(split, aerial_trees):
    """No tree is so small that its box is widened: every answer is that of InternVL's rule, corner by corner."""
    seen = 0
    for row in aerial_trees[split]:
        for key in range(20):
            view, boxes = instructions.random_view(row["image"], row["boxes"], keyed_generator(key, row["id"]))
            if len(boxes):
                size, box = view.size[0], instructions.largest(boxes, view.size[0])
                corners = ", ".join(str(round(corner * 1000 / size)) for corner in box.tolist())
                answer = f"<ref>tree</ref><box>[[{corners}]]</box>"
                assert instructions.ask_location(boxes, size, None) == (instructions.LOCATE, answer)
                seen += 1
    assert seen > 10 * len(aerial_trees[split])
