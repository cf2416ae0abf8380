import io
import json
import os
import re
import subprocess
import sys
from collections import Counter
from functools import lru_cache
from pathlib import Path

import numpy as np
import pytest
from datasets import load_dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from modeling_vitp import ViTPDataCollator
from modeling_vitp.cards.sections import set_section
from modeling_vitp.images.windows import window_starts
from modeling_vitp.instructions.boxes import grid_box
from modeling_vitp.instructions.from_annotations import storage
from modeling_vitp.recipes import make_instructions

WIDTH, HEIGHT = 320, 240
SINGULAR = {"planes": "plane", "ships": "ship", "storage tanks": "storage tank", "buses": "bus"}
LABELS = ["plane", "ship", "storage-tank", "Bus"]
QUARTERS = {"top left": (0, 0), "top right": (1, 0), "bottom left": (0, 1), "bottom right": (1, 1)}


def noise(path, seed, size=(WIDTH, HEIGHT)):
    path.parent.mkdir(parents=True, exist_ok=True)
    small = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    Image.fromarray(small).resize(size).save(path)


def random_objects(seed):
    """Classes and corners (4, 2) of turned boxes; many of one class or few of several."""
    rng = np.random.default_rng(seed)
    objects = []
    for label in rng.choice(LABELS, int(rng.integers(0, 4)), replace=False):
        for _ in range(int(rng.integers(1, 5))):
            centre, angle = rng.uniform((20, 20), (WIDTH - 20, HEIGHT - 20)), rng.uniform(0, np.pi)
            axis = np.array([np.cos(angle), np.sin(angle)])
            long, short = axis * rng.uniform(1, 30), axis[::-1] * [-1, 1] * rng.uniform(0.5, 15)
            corners = np.array(
                [centre + long + short, centre + long - short, centre - long - short, centre - long + short]
            )
            objects.append((str(label), corners.round(1)))
    return objects


def write_coco(root, split, names):
    images, annotations = [], []
    for index, name in enumerate(names):
        noise(root / "images" / f"{split}2017" / f"{name}.png", int(name))
        images.append({"id": index, "file_name": f"{name}.png", "width": WIDTH, "height": HEIGHT})
        for label, corners in random_objects(int(name)):
            (left, top), (right, bottom) = corners.min(0).tolist(), corners.max(0).tolist()
            box = [left, top, right - left, bottom - top]
            annotations.append(
                {"id": len(annotations), "image_id": index, "category_id": LABELS.index(label), "bbox": box}
            )
    contents = {
        "images": images,
        "annotations": annotations,
        "categories": [{"id": index, "name": label} for index, label in enumerate(LABELS)],
    }
    (root / "annotations").mkdir(exist_ok=True)
    (root / "annotations" / f"instances_{split}2017.json").write_text(json.dumps(contents))
    (root / "annotations" / f"captions_{split}2017.json").write_text(json.dumps({"images": images, "annotations": []}))


def write_voc(root, split, names):
    (root / "ImageSets" / "Main").mkdir(parents=True, exist_ok=True)
    (root / "ImageSets" / "Main" / f"{split}.txt").write_text("\n".join(names))
    (root / "Annotations").mkdir(exist_ok=True)
    for name in names:
        noise(root / "JPEGImages" / f"{name}.png", int(name))
        objects = ""
        for label, corners in random_objects(int(name)):
            sides = zip(("xmin", "ymin", "xmax", "ymax"), [*corners.min(0), *corners.max(0)])
            box = "".join(f"<{side}>{value}</{side}>" for side, value in sides)
            objects += f"<object><name>{label}</name><difficult>0</difficult><bndbox>{box}</bndbox></object>\n"
        text = f"<annotation><filename>{name}.png</filename>\n{objects}</annotation>"
        (root / "Annotations" / f"{name}.xml").write_text(text)


def write_dota(root, split, names):
    (root / split / "labelTxt").mkdir(parents=True)
    for name in names:
        noise(root / split / "images" / f"{name}.png", int(name))
        objects = random_objects(int(name))
        lines = [" ".join(f"{value:.1f}" for value in corners.flatten()) + f" {label} 0" for label, corners in objects]
        (root / split / "labelTxt" / f"{name}.txt").write_text("\n".join(["imagesource:none", "gsd:0.5", *lines]))


def read_coco(root, name):
    contents = json.loads((root / "annotations" / "instances_train2017.json").read_text())
    (image,) = [image for image in contents["images"] if image["file_name"] == f"{name}.png"]
    labels = {category["id"]: category["name"] for category in contents["categories"]}
    for annotation in contents["annotations"]:
        if annotation["image_id"] == image["id"]:
            x, y, w, h = annotation["bbox"]
            yield labels[annotation["category_id"]], [x, y, x + w, y + h], w * h


def read_voc(root, name):
    text = (root / "Annotations" / f"{name}.xml").read_text()
    for label, *sides in re.findall(r"<name>(.*?)</name>.*?" + r"<\w{4}>([\d.-]+)</\w{4}>" * 4, text):
        x0, y0, x1, y1 = map(float, sides)
        yield label, [x0, y0, x1, y1], (x1 - x0) * (y1 - y0)


def read_dota(root, name):
    for line in (root / "train" / "labelTxt" / f"{Path(name).name}.txt").read_text().splitlines()[2:]:
        *numbers, label, _ = line.split()
        xs, ys = np.array(numbers[::2], float), np.array(numbers[1::2], float)
        area = abs(np.dot(xs, np.roll(ys, 1)) - np.dot(ys, np.roll(xs, 1))) / 2
        yield label, [xs.min(), ys.min(), xs.max(), ys.max()], area


LAYOUTS = {"coco": (write_coco, read_coco), "voc": (write_voc, read_voc), "dota": (write_dota, read_dota)}
NAMES = {"train": [f"{index:03}" for index in range(60)], "test": [f"{index:03}" for index in range(60, 66)]}


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


def make(layout, root, output, *options):
    assert make_instructions.main([layout, str(root), "--output_dir", str(output), *map(str, options)]) == 0
    return load_dataset(str(output), cache_dir=str(output / "cache"))


@lru_cache
def scene(root, name):
    (path,) = root.rglob(f"{name}.png")
    return Image.open(path).convert("RGB")


def turns_of(row):
    messages = row["messages"]
    assert [message["role"] for message in messages] == ["user", "assistant"] * (len(messages) // 2)
    return [(q["content"], a["content"]) for q, a in zip(messages[::2], messages[1::2])]


def boxes_in(text):
    """Phrase and boxes; the text has to be written exactly in InternVL's way."""
    phrase, boxes = re.fullmatch(r"<ref>(.*)</ref><box>\[(\[.*\])\]</box>", text).groups()
    boxes = [[int(number) for number in re.findall(r"\d+", box)] for box in re.findall(r"\[(.*?)\]", boxes)]
    assert text == f"<ref>{phrase}</ref><box>[" + ", ".join(str(box) for box in boxes) + "]</box>"
    return phrase, boxes


def same_place(grid, box, width=WIDTH, height=HEIGHT):
    """A grid box is the box in pixels, to half a grid step; to one where it would have no area otherwise."""
    exact = [side * 1000 / end for side, end in zip(box, [width, height] * 2)]
    x0, y0, x1, y1 = grid
    assert 0 <= x0 < x1 <= 1000 and 0 <= y0 < y1 <= 1000
    slack = [0.5 if exact[i + 2] - exact[i] > 1 else 1 for i in (0, 1)] * 2
    return all(abs(a - b) <= limit + 1e-6 for a, b, limit in zip(grid, exact, slack))


def kind_of(question):
    for kind, pattern in PATTERNS.items():
        match = re.fullmatch(pattern, question)
        if match:
            return kind, next((group for group in match.groups() if group), None)
    raise AssertionError(question)


PATTERNS = {
    "presence": r"(?:Is there|Can you see|Does the image show) an? (.*?)(?: in the image)?\?",
    "counting": r"(?:How many|What is the number of|Count the) (.*?)(?: are)?(?: in the image)?[.?]",
    "all": r"(?:Find all (.*)|Mark every (.*) in the image with a box|Give the boxes of all (.*))\.",
    "one": r"(?:Where is (.*)\?|Give the box of (.*)\.|Locate <ref>(.*)</ref> in the image\.)",
    "caption": r"(?:What is in the region|Describe the object at|What does the box) <box>\[\[(.*)\]\]</box>.*",
}


def check(question, answer, objects, width=WIDTH, height=HEIGHT):
    """Recomputes the answer from the raw annotation with plain loops; returns the kind of the question."""
    kind, subject = kind_of(question)
    if kind == "presence":
        assert answer == ("yes" if any(label == subject for label, _, _ in objects) else "no")
    elif kind == "counting":
        assert int(answer) == sum(label == SINGULAR[subject] for label, _, _ in objects)
    elif kind == "all":
        label = SINGULAR.get(subject, subject)
        expected = sorted((box for name, box, _ in objects if name == label), key=lambda box: (box[1], box[0]))
        if not expected:
            assert answer == f"There is no {label}."
            return "none"
        phrase, boxes = boxes_in(answer)
        assert SINGULAR.get(phrase, phrase) == label and (phrase == label) == (len(boxes) == 1)
        assert len(boxes) == len(expected)
        assert all(same_place(grid, box, width, height) for grid, box in zip(boxes, expected))
    elif kind == "one":
        phrase, (grid,) = boxes_in(answer)
        (found,) = referents(subject, objects, width, height)
        assert same_place(grid, found, width, height)
        assert phrase in (subject, subject.removeprefix("the "))
        return "referring" if phrase == subject else "one"
    else:
        grid = [int(number) for number in subject.split(", ")]
        candidates = [entry for entry in objects if same_place(grid, entry[1], width, height)]
        label, extreme, count = re.fullmatch(r"an? ([a-z ]+?)(?:, the (largest|smallest) of (\d+))?", answer).groups()
        assert label in {name for name, _, _ in candidates}
        if extreme:
            assert int(count) == sum(name == label for name, _, _ in objects)
            (found,) = referents(f"the {extreme} {label}", objects, width, height)
            assert same_place(grid, found, width, height)
    return kind


def referents(phrase, objects, width, height):
    """Boxes that a phrase may mean."""
    words, place = re.fullmatch(r"the (.*?)(?: in the (top left|top right|bottom left|bottom right))?", phrase).groups()
    first, _, rest = words.partition(" ")
    position = {"leftmost": (0, 1), "topmost": (1, 1), "rightmost": (0, -1), "bottommost": (1, -1)}
    if first in ("largest", "smallest"):
        entries = [(area, (box[2] - box[0]) * (box[3] - box[1]), box) for name, box, area in objects if name == rest]
        best = max if first == "largest" else min
        assert best(entries, key=lambda entry: entry[0]) is best(entries, key=lambda entry: entry[1])
        areas = sorted((entry[0] for entry in entries), reverse=first == "largest")
        assert max(areas[0] / areas[1], areas[1] / areas[0]) >= 1.2
        return [best(entries, key=lambda entry: entry[0])[2]]
    if first in position:
        axis, sign = position[first]
        boxes = [box for name, box, _ in objects if name == rest]
        return [min(boxes, key=lambda box: sign * (box[axis] + box[axis + 2]))]
    boxes = [box for name, box, _ in objects if name == words]
    if place is not None:
        x, y = QUARTERS[place]
        left, top, right, bottom = x * width / 2, y * height / 2, (x + 1) * width / 2, (y + 1) * height / 2
        boxes = [b for b in boxes if b[0] < right and b[2] > left and b[1] < bottom and b[3] > top]
        for box in boxes:
            assert left <= (box[0] + box[2]) / 2 <= right and top <= (box[1] + box[3]) / 2 <= bottom
    return boxes


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
    assert set(kinds) == {"presence", "counting", "all", "none", "one", "referring", "caption"}
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
        inside, slivers = [], set()
        for label, (x0, y0, x1, y1), area in objects(name):
            cut = [min(max(side - start, 0), 200) for side, start in zip((x0, y0, x1, y1), (x, y, x, y))]
            share = (cut[2] - cut[0]) * (cut[3] - cut[1]) / ((x1 - x0) * (y1 - y0))
            if share >= 0.5:
                inside.append((label, cut, min(area * share, (cut[2] - cut[0]) * (cut[3] - cut[1]))))
            elif share > 0:
                slivers.add(label)
        for question, answer in turns_of(row):
            seen[check(question, answer, inside, 200, 200)] += 1
            kind, subject = kind_of(question)
            if answer in ("no", "0") or answer.startswith("There is no"):
                assert SINGULAR.get(subject, subject) not in slivers or answer == "0" and inside
            if kind == "one":
                assert not any(subject.endswith(label) for label in slivers)
    assert len(seen) == 7


def test_another_process_makes_the_same_bytes_and_another_seed_does_not(tmp_path):
    root = tmp_path / "data"
    write_voc(root, "train", NAMES["train"][:20])
    for name, seed in (("a", 0), ("c", 5)):
        make("voc", root, tmp_path / name, "--seed", seed)
    command = [sys.executable, make_instructions.__file__, "voc", str(root), "--output_dir", str(tmp_path / "b")]
    subprocess.run(command, check=True, env=os.environ | {"PYTHONHASHSEED": "3"})
    a, b, c = ((tmp_path / name / "train-00000.parquet").read_bytes() for name in "abc")
    assert a == b != c


def test_no_test_image_enters_by_split_list_or_as_a_copy(tmp_path, capsys):
    root = tmp_path / "data"
    for split, names in NAMES.items():
        write_voc(root, split, names)
    (root / "JPEGImages" / "004.png").write_bytes((root / "JPEGImages" / "061.png").read_bytes())
    rows = make("voc", root, tmp_path / "out")["train"]
    assert not set(rows["id"]) & {"004", *NAMES["test"]}
    assert "004.png is left out" in capsys.readouterr().err
    assert "1 files were left out" in (tmp_path / "out" / "README.md").read_text()

    (tmp_path / "list.txt").write_text("001\n002.png\n003\n004\n")
    rows = make("voc", root, tmp_path / "listed", "--split_list", tmp_path / "list.txt", "--kinds", "counting")["train"]
    assert set(rows["id"]) <= {"001", "002", "003"}
    (tmp_path / "list.txt").write_text("001\nnothing\n")
    with pytest.raises(ValueError, match=r"1 of 2 listed images are not in .*: nothing"):
        make("voc", root, tmp_path / "listed", "--split_list", tmp_path / "list.txt")
    with pytest.raises(ValueError, match=r"shows no split 'val', only \['test', 'train'\]"):
        make("voc", root, tmp_path / "listed", "--split", "val")


def test_a_second_split_joins_the_folder_and_its_card(tmp_path):
    root = tmp_path / "data"
    for split, names in NAMES.items():
        write_voc(root, split, names)
    make("voc", root, tmp_path / "out")
    both = make("voc", root, tmp_path / "out", "--split", "test", "--license", "mit")
    assert set(both) == {"train", "test"} and set(both["test"]["id"]) <= set(NAMES["test"])
    card = (tmp_path / "out" / "README.md").read_text()
    assert card.index("license: mit") < card.index("# Instructions from data") < card.index("## Split `train`")
    assert card.count("## Split `test`") == card.count("# Instructions from") == 1


def test_classes_of_folders(tmp_path):
    plain = {"AnnualCrop": "annual crop", "River": "river", "Sea_Lake": "sea lake", "Forest": "forest", "HWY": "HWY"}
    for split in ("train", "test"):
        for index, label in enumerate(("AnnualCrop", "River", "Sea_Lake", "Forest", "Highway")):
            for number in range(8):
                noise(
                    tmp_path / "data" / split / label / f"{number}.png", 100 * index + number + 50 * (split == "test")
                )
    rows = make("folders", tmp_path / "data", tmp_path / "out")["train"]
    plain = {
        "AnnualCrop": "annual crop",
        "River": "river",
        "Sea_Lake": "sea lake",
        "Forest": "forest",
        "Highway": "highway",
    }
    assert len(rows) == 40
    yes_and_no, with_options = Counter(), 0
    for row in rows:
        label = plain[row["id"].split("/")[1]]
        for question, answer in turns_of(row):
            if answer in ("yes", "no"):
                asked = re.fullmatch(
                    r"Is (.*) the class of this scene\?|.* the class (.*)\?|.* scene as (.*)\?", question
                )
                asked = next(group for group in asked.groups() if group)
                assert asked in plain.values() and answer == ("yes" if asked == label else "no")
                yes_and_no[asked, answer] += 1
                continue
            assert answer == label
            options = re.search(r"shown: (.*)\?|from (.*)\.", question)
            if options:
                options = re.split(", | or ", next(group for group in options.groups() if group))
                assert len(set(options)) == 4 and label in options and set(options) <= set(plain.values())
                with_options += 1
    assert all(yes_and_no[label, "yes"] == yes_and_no[label, "no"] for label in plain.values())
    assert sum(yes_and_no.values()) >= 20 and with_options >= 5


def flood(mask):
    """Connected parts of a boolean array by a search in the eight neighbours: lists of (y, x)."""
    left, parts = {tuple(place) for place in np.argwhere(mask)}, []
    while left:
        part, border = [], [left.pop()]
        while border:
            y, x = border.pop()
            part.append((y, x))
            near = {(y + a, x + b) for a in (-1, 0, 1) for b in (-1, 0, 1)} & left
            left -= near
            border += near
        parts.append(np.array(part))
    return parts


def parts_of(mask):
    """(box, area) of the parts of a boolean mask in reading order."""
    found = [([p[:, 1].min(), p[:, 0].min(), p[:, 1].max() + 1, p[:, 0].max() + 1], len(p)) for p in flood(mask)]
    return sorted(found, key=lambda entry: (entry[0][1], entry[0][0]))


def random_mask(seed, size=64, values=(0, 1, 2, 3)):
    rng = np.random.default_rng(seed)
    mask = np.full((size, size), rng.choice(values) if len(values) > 2 else 0, dtype=np.uint8)
    for _ in range(int(rng.integers(0, 6))):
        x, y, w, h = rng.integers((0, 0, 3, 3), (size - 20, size - 20, 45, 30))
        mask[y : y + h, x : x + w] = rng.choice(values)
    return mask


@pytest.mark.parametrize("is_colour", [False, True])
def test_masks(tmp_path, is_colour):
    colours = np.array([[0, 0, 0], [255, 0, 0], [0, 128, 255], [9, 9, 9]], dtype=np.uint8)
    named = {1: "water", 2: "grass", 3: "road"}
    for number in range(50):
        noise(tmp_path / "data" / "Train" / "Rural" / "images" / f"{number}.png", number, (64, 64))
        path = tmp_path / "data" / "Train" / "Rural" / "masks" / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        mask = random_mask(number)
        Image.fromarray(colours[mask] if is_colour else mask).save(path)
    keys = [",".join(map(str, colour)) if is_colour else str(value) for value, colour in enumerate(colours.tolist())]
    (tmp_path / "names.json").write_text(json.dumps({key: named.get(value) for value, key in enumerate(keys)}))
    rows = make("masks", tmp_path / "data", tmp_path / "out", "--names", tmp_path / "names.json", "--turns", 9)["train"]
    seen = Counter()
    for row in rows:
        mask = random_mask(int(row["id"].split("/")[-1]))
        areas = {label: int((mask == value).sum()) for value, label in named.items()}
        parts = {label: parts_of(mask == value) for value, label in named.items()}
        for question, answer in turns_of(row):
            if answer in ("yes", "no"):
                (label,) = [label for label in named.values() if label in question]
                assert answer == ("yes" if areas[label] else "no")
                seen[answer] += 1
            elif answer in named.values() and "box" not in question:
                assert areas[answer] == max(areas.values()) and areas[answer] >= 64 * 64 - sum(areas.values())
                seen["largest class"] += 1
            elif re.match("Find all|Mark every|Give the boxes", question):
                (label,) = [label for label in named.values() if label in question]
                if answer == f"There is no {label}.":
                    assert not areas[label]
                    continue
                _, boxes = boxes_in(answer)
                assert len(boxes) == len(parts[label])
                assert all(same_place(grid, box, 64, 64) for grid, (box, _) in zip(boxes, parts[label]))
                seen["all"] += len(boxes) > 1
            else:
                objects = [(label, box, area) for label, found in parts.items() for box, area in found]
                seen[check(question, answer, objects, 64, 64)] += 1
    assert set(seen) >= {"yes", "no", "largest class", "all", "one", "referring", "caption"}
    assert seen["yes"] == seen["no"]


def test_changes(tmp_path):
    for number in range(40):
        for folder in "AB":
            noise(tmp_path / "data" / "train" / folder / f"{number}.png", 2 * number + (folder == "B"), (64, 64))
        path = tmp_path / "data" / "train" / "label" / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray((random_mask(number, values=(0, 1)) > 0).astype(np.uint8) * 255).save(path)
    rows = make("changes", tmp_path / "data", tmp_path / "out")["train"]
    seen = Counter()
    for row in rows:
        assert len(row["images"]) == 2
        mask = random_mask(int(row["id"].split("/")[-1]), values=(0, 1)) > 0
        parts = parts_of(mask)
        for _, answer in turns_of(row):
            if answer in ("yes", "no"):
                assert answer == ("yes" if mask.any() else "no")
                seen[answer] += 1
            elif answer in ("Nothing has changed.", "There is no changed region."):
                assert not mask.any()
                seen["nothing"] += 1
            elif answer.startswith("<ref>"):
                _, boxes = boxes_in(answer)
                assert len(boxes) == len(parts)
                assert all(same_place(grid, box, 64, 64) for grid, (box, _) in zip(boxes, parts))
                seen["boxes"] += 1
            else:
                pattern = r"(\d+) changed regions?, (?:less than (1)%|about (\d+)%) of the image(?:, .* in the (.*))?\."
                count, less, share, place = re.fullmatch(pattern, answer).groups()
                assert int(count) == len(parts)
                assert mask.mean() < 0.01 if less else abs(100 * mask.mean() - int(share)) <= 0.5
                if place:
                    x, y = QUARTERS[place]
                    areas = Counter()
                    for (x0, y0, x1, y1), area in parts:
                        areas[int(x0 + x1 >= 64), int(y0 + y1 >= 64)] += area
                    assert areas[x, y] > areas.total() / 2
                seen["caption"] += 1
    assert all(seen[key] >= 3 for key in ("yes", "no", "nothing", "boxes", "caption")) and seen["yes"] == seen["no"]


def test_captions_of_changes_without_masks_say_nothing_about_places(tmp_path):
    images = []
    for number in range(6):
        for folder in "AB":
            noise(tmp_path / "data" / "images" / "train" / folder / f"train_{number}.png", number, (64, 64))
        sentences = [{"raw": f" a road {number} appears . "}, {"raw": f"road {number}"}]
        images.append({"filename": f"train_{number}.png", "split": "train", "sentences": sentences})
    (tmp_path / "data" / "LevirCCcaptions.json").write_text(json.dumps({"images": images}))
    rows = make("changes", tmp_path / "data", tmp_path / "out")["train"]
    assert len(rows) == 6
    for row in rows:
        number = row["id"][-1]
        assert [answer for _, answer in turns_of(row)] in ([f"a road {number} appears ."], [f"road {number}"])


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


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda root: (root / "JPEGImages" / "003.png").write_bytes(b"no"), r"003\.png cannot be read"),
        (lambda root: (root / "JPEGImages" / "003.png").unlink(), r"003\.jpg cannot be read"),
        (lambda root: (root / "Annotations" / "003.xml").unlink(), r"003\.png has no 003\.xml"),
        (lambda root: (root / "Annotations" / "003.xml").write_text("<annotation>"), r"003\.xml is no XML"),
        (
            lambda root: (root / "Annotations" / "003.xml").write_text(
                "<a><object><name>x</name><bndbox><xmin>9</xmin><ymin>9</ymin><xmax>4</xmax><ymax>12</ymax></bndbox></object></a>"
            ),
            r"003\.xml, object 0: the box .* has no area",
        ),
    ],
)
def test_broken_input_is_named(tmp_path, break_it, message):
    root = tmp_path / "data"
    write_voc(root, "train", NAMES["train"][:5])
    break_it(root)
    with pytest.raises(ValueError, match=message):
        make("voc", root, tmp_path / "out")


def test_turned_images_are_refused(tmp_path):
    path = tmp_path / "data" / "a" / "1.jpg"
    noise(path, 0)
    exif = Image.Exif()
    exif[274] = 6
    Image.open(path).save(path, exif=exif)
    with pytest.raises(ValueError, match=r"1\.jpg is turned by its EXIF data"):
        make("folders", tmp_path / "data", tmp_path / "out", "--split", "all")


def test_kinds_that_the_annotation_cannot_answer_are_refused(tmp_path, capsys):
    with pytest.raises(SystemExit):
        make_instructions.main(["folders", str(tmp_path), "--output_dir", str(tmp_path), "--kinds", "counting"])
    assert "folders cannot answer counting" in capsys.readouterr().err


def test_shards_end_by_size_and_replace_older_ones(tmp_path):
    def row(index):
        buffer = io.BytesIO()
        Image.new("RGB", (8, 8)).save(buffer, format="PNG")
        return {"id": str(index), "images": [{"bytes": buffer.getvalue(), "path": None}], "messages": []}

    size = len(row(0)["images"][0]["bytes"])
    assert len(storage.save_rows(map(row, range(7)), tmp_path, "train", shard_bytes=3 * size)) == 3
    assert len(storage.save_rows(map(row, range(4)), tmp_path, "train", shard_bytes=3 * size)) == 2
    rows = load_dataset("parquet", data_dir=str(tmp_path), split="train", cache_dir=str(tmp_path / "cache"))
    assert rows["id"] == ["0", "1", "2", "3"]


@pytest.mark.slow
def test_push_to_hub_uploads_the_folder_as_a_private_data_set(hub, tmp_path, monkeypatch):
    for name, value in hub.environment(tmp_path / "home", hub.token()).items():
        monkeypatch.setenv(name, value)
    write_voc(tmp_path / "data", "train", NAMES["train"][:20])
    make("voc", tmp_path / "data", tmp_path / "out", "--push_to_hub", "tester/ships")
    files = hub.files("tester/ships", repo_type="dataset")
    del files[".gitattributes"]
    assert files == {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir() if path.is_file()}
    assert hub.repo("tester/ships", "dataset").state["private"]


def test_a_section_of_a_card_is_replaced_and_the_others_stay(tmp_path):
    card = tmp_path / "README.md"
    card.write_text("---\nlicense: mit\n---\n\n# Name\n\n## One\n\nold\n\n## Two\n\nstays\n")
    set_section(card, "One", "new")
    set_section(card, "Three", "added")
    assert card.read_text() == (
        "---\nlicense: mit\n---\n\n# Name\n\n## One\n\nnew\n\n## Two\n\nstays\n\n## Three\n\nadded\n"
    )


def test_gifs_are_images_and_masks_as_in_drive(tmp_path):
    noise(tmp_path / "data" / "train" / "images" / "21.gif", 0, (30, 20))
    mask = np.zeros((20, 30), dtype=np.uint8)
    mask[5:10, 10:25] = 1
    (tmp_path / "data" / "train" / "masks").mkdir()
    Image.fromarray(mask).save(tmp_path / "data" / "train" / "masks" / "21.gif")
    (tmp_path / "names.json").write_text('{"0": null, "1": "vessel"}')
    options = "--names", str(tmp_path / "names.json"), "--kinds", "grounding_one"
    (row,) = make("masks", tmp_path / "data", tmp_path / "out", *options)["train"]
    assert row["images"][0].size == (30, 20)
    ((_, answer),) = turns_of(row)
    assert answer == "<ref>vessel</ref><box>[[333, 250, 833, 500]]</box>"


def test_sizes_that_disagree_are_named_width_first(tmp_path):
    write_coco(tmp_path / "data", "train", NAMES["train"][:2])
    path = tmp_path / "data" / "annotations" / "instances_train2017.json"
    contents = json.loads(path.read_text())
    contents["images"][1] |= {"width": HEIGHT, "height": WIDTH}
    path.write_text(json.dumps(contents))
    with pytest.raises(ValueError, match=r"240 x 320 pixels is not the size of .*png, 320 x 240\."):
        make("coco", tmp_path / "data", tmp_path / "out")
