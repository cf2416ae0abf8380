"""Conversations about annotated images, each answer recomputed from the raw annotation."""

import json
from collections import Counter
from functools import lru_cache

import pytest
from annotated_images import (
    HEIGHT,
    LAYOUTS,
    NAMES,
    SINGULAR,
    WIDTH,
    check,
    covered_by,
    kind_of,
    make,
    map_of,
    scene,
    turns_of,
    write_coco,
)

from modeling_vitp import ViTPDataCollator
from modeling_vitp.images.reading import window_starts


@pytest.fixture(scope="module", params=LAYOUTS)
def annotated(request, tmp_path_factory):
    """Layout, its folder, and a reader of the test's own: name -> [(label, box, area), …]."""
    root = tmp_path_factory.mktemp(request.param)
    write, read = LAYOUTS[request.param]
    for split, names in NAMES.items():
        write(root, split, names)

    ends = [WIDTH, HEIGHT] * 2

    @lru_cache
    def objects(name):
        return [
            (label.replace("-", " ").lower(), [min(max(side, 0), end) for side, end in zip(box, ends)], area)
            for label, box, area in read(root, name)
        ]

    return request.param, root, objects


def test_every_answer_follows_from_the_raw_annotation(annotated, tmp_path):
    layout, root, objects = annotated
    rows = make(layout, root, tmp_path, "--turns", 10)["train"]
    kinds, answers = Counter(), {}
    for row in rows:
        name = row["id"].removeprefix("train/").removesuffix(".png")
        assert name in NAMES["train"]
        assert row["images"][0].tobytes() == scene(root, name).tobytes()
        for question, answer in turns_of(row):
            kinds[check(question, answer, objects(name))] += 1
            kind, subject = kind_of(question)
            answers.setdefault((kind, subject), Counter())[answer] += 1
    assert set(kinds) == {"presence", "counting", "all", "none", "one", "referring", "caption", "map"}
    assert min(kinds.values()) >= 5, kinds
    yes_and_no = {key: counts for key, counts in answers.items() if key[0] == "presence"}
    assert {subject for _, subject in yes_and_no} == {"plane", "ship", "storage tank", "bus"}
    assert all(counts["yes"] == counts["no"] > 0 for counts in yes_and_no.values()), yes_and_no
    zeros = sum(counts["0"] for (kind, _), counts in answers.items() if kind == "counting")
    assert 0.05 < zeros / kinds["counting"] < 0.6


def test_in_windows_an_object_counts_if_half_of_it_is_seen(annotated, tmp_path):
    layout, root, objects = annotated
    rows = make(layout, root, tmp_path, "--turns", 10, "--window", 200, "--overlap", 40)["train"]
    assert window_starts(320, 128, 100) == [0, 100, 192]
    seen = Counter()
    for row in rows:
        name, place = row["id"].removeprefix("train/").replace(".png", "").split("/")
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
            if kind == "map":
                assert answer.split() == map_of(subject, covered_by(parts, 200, 200), (200, 200))
                seen[kind] += 1
                continue
            seen[check(question, answer, inside, 200, 200)] += 1
            if answer in ("no", "0") or answer.startswith("There is no"):
                assert SINGULAR.get(subject, subject) not in slivers or answer == "0" and inside
            if kind == "one":
                assert not any(subject.endswith(label) for label in slivers)
    assert len(seen) == 8


def test_rows_go_into_training_as_they_are(annotated, tmp_path, processor):
    layout, root, _ = annotated
    rows = make(layout, root, tmp_path)["train"]
    batch = ViTPDataCollator(processor, vrl_drop_ratio=0.75)([rows[0], rows[1]])
    assert (batch["labels"] != -100).any(dim=1).all()


def test_crowds_and_difficult_objects_are_neither_counted_nor_pointed_at_nor_denied(tmp_path):
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
