"""Layouts of annotations: regions that are read, and errors."""

import json
import re
from collections import Counter

import numpy as np
import pytest
from annotated_images import (
    LABELS,
    LAYOUTS,
    NAMES,
    QUARTERS,
    boxes_in,
    check,
    make,
    noise,
    same_place,
    turns_of,
    write_coco,
)
from PIL import Image

from modeling_vitp.data import layouts
from modeling_vitp.data.annotations import read_labels
from modeling_vitp.data.splits import choose_split
from modeling_vitp.instructions.from_annotations.labels import annotate_all


def flood(mask):
    """Return the 8-connected components of a boolean array by a search, as lists of (y, x)."""
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
    """Return (box, area) of the components of a boolean mask in reading order."""
    found = [([p[:, 1].min(), p[:, 0].min(), p[:, 1].max() + 1, p[:, 0].max() + 1], len(p)) for p in flood(mask)]
    return sorted(found, key=lambda entry: (entry[0][1], entry[0][0]))


def random_mask(seed, size=64, values=(0, 1, 2, 3)):
    rng = np.random.default_rng(seed)
    mask = np.full((size, size), rng.choice(values) if len(values) > 2 else 0, dtype=np.uint8)
    for _ in range(int(rng.integers(0, 6))):
        x, y, w, h = rng.integers((0, 0, 3, 3), (size - 20, size - 20, 45, 30))
        mask[y : y + h, x : x + w] = rng.choice(values)
    return mask


def test_masks_are_not_read_as_classes(tmp_path):
    for folder in ("images", "masks"):
        noise(tmp_path / "data" / "train" / folder / "0.png", 0, (64, 64))
    with pytest.raises(ValueError, match="'masks'"):
        make("folders", tmp_path / "data", tmp_path / "out")


@pytest.mark.slow
def test_boxes_of_masks_are_their_components(tmp_path):
    """Answers without boxes are compared with the masks by the tests of drawn views."""
    named = {1: "water", 2: "grass", 3: "road"}
    for number in range(50):
        noise(tmp_path / "data" / "Train" / "Rural" / "images" / f"{number}.png", number, (64, 64))
        path = tmp_path / "data" / "Train" / "Rural" / "masks" / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(random_mask(number)).save(path)
    names = {"0": None} | {str(value): label for value, label in named.items()}
    (tmp_path / "names.json").write_text(json.dumps(names))
    rows = make("masks", tmp_path / "data", tmp_path / "out", "--names", tmp_path / "names.json", "--turns", 9)["train"]
    seen = Counter()
    for row in rows:
        mask = random_mask(int(row["id"].split("/")[-1]))
        parts = {label: parts_of(mask == value) for value, label in named.items()}
        for question, answer in turns_of(row):
            is_word = answer in named.values() and "box" not in question
            if answer in ("yes", "no") or is_word or " cells" in question or " cell " in question:
                continue
            if re.match("Find all|Mark every|Give the boxes", question):
                (label,) = [label for label in named.values() if label in question]
                if answer == f"There is no {label}.":
                    assert not parts[label]
                    continue
                _, boxes = boxes_in(answer)
                assert len(boxes) == len(parts[label])
                assert all(same_place(grid, box, 64, 64) for grid, (box, _) in zip(boxes, parts[label]))
                seen["all"] += len(boxes) > 1
            else:
                objects = [(label, box, area) for label, found in parts.items() for box, area in found]
                seen[check(question, answer, objects, 64, 64)] += 1
    assert set(seen) >= {"all", "one", "referring", "caption"}


@pytest.mark.parametrize("is_color", [False, True])
def test_equal_channels_of_mask_are_gray_unless_names_are_colors(tmp_path, is_color):
    mask = np.array([[0, 1], [2, 2]], dtype=np.uint8)
    Image.fromarray(np.stack([mask] * 3, -1)).save(tmp_path / "mask.png")
    names = {"0": None, "1": "water", "2": "grass"}
    if is_color:
        names = {",".join([value] * 3): name for value, name in names.items()} | {"255,0,0": "road"}
    assert np.array_equal(read_labels(tmp_path / "mask.png", (2, 2), names).numbers, mask)


def test_change_pairs_are_read(tmp_path):
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


@pytest.mark.parametrize(
    ("box", "place"),
    [((10, 10, 95, 90), None), ((5, 60, 45, 95), "bottom left"), ((50, 0, 100, 50), "top right")],
)
def test_change_position_is_main_quarter(tmp_path, box, place):
    for folder in "AB":
        noise(tmp_path / "data" / "train" / folder / "0.png", folder == "B", (100, 100))
    mask = np.zeros((100, 100), np.uint8)
    mask[box[1] : box[3], box[0] : box[2]] = 255
    (tmp_path / "data" / "train" / "label").mkdir()
    Image.fromarray(mask).save(tmp_path / "data" / "train" / "label" / "0.png")
    (row,) = make("changes", tmp_path / "data", tmp_path / "out", "--kinds", "change_caption")["train"]
    ((_, answer),) = turns_of(row)
    found = re.fullmatch(r"1 changed region, about \d+% of the image(?:, most of it in the (.*))?\.", answer)
    assert found[1] == place


def test_captions_match_split(tmp_path):
    """Read captions of files with equal names in two splits."""
    images = []
    for split in ("train", "test"):
        for folder in "AB":
            noise(tmp_path / "data" / split / folder / "0001.png", len(images), (64, 64))
        images.append({"filename": "0001.png", "split": split, "sentences": [{"raw": f"of {split}"}]})
    (tmp_path / "data" / "captions.json").write_text(json.dumps({"images": images}))
    for split in ("train", "test"):
        (row,) = make("changes", tmp_path / "data", tmp_path / split, "--split", split)[split]
        assert [answer for _, answer in turns_of(row)] == [f"of {split}"]
    images[1]["split"] = "train"
    (tmp_path / "data" / "captions.json").write_text(json.dumps({"images": images}))
    with pytest.raises(ValueError, match="captions.json .*'0001.png'"):
        make("changes", tmp_path / "data", tmp_path / "other")


def test_mask_matches_split(tmp_path):
    root = tmp_path / "data"
    for place, split in enumerate(("train", "val")):
        noise(root / "images" / split / "0001.png", place, (32, 32))
        (root / "annotated" / split).mkdir(parents=True)
        Image.fromarray(np.full((32, 32), 1 + place, np.uint8)).save(root / "annotated" / split / "0001.png")
    names = {"1": "water", "2": "road"}
    for split, label in (("train", "water"), ("val", "road")):
        layout = layouts.Masks(root, names, root / "annotated")
        (image,) = annotate_all(layout, choose_split(layout, split)[0])
        assert [region.label for region in image.regions] == [label]
    (root / "annotated" / "val").rename(root / "annotated" / "other")
    (root / "annotated" / "train").rename(root / "annotated" / "one")
    layout = layouts.Masks(root, names, root / "annotated")
    with pytest.raises(ValueError, match=r"The mask of .*train/0001.png is ambiguous, .*0001.png"):
        annotate_all(layout, choose_split(layout, "train")[0])


@pytest.mark.parametrize(("kind", "folder", "what"), [("masks", "masks", "mask"), ("dota", "labelTxt", "label")])
def test_annotation_of_other_image_is_not_used(tmp_path, kind, folder, what):
    root = tmp_path / "data"
    for seed, area in enumerate(("north", "south")):
        noise(root / "train" / area / "images" / "0.png", seed, (32, 32))
    noise(root / "train" / "south" / "images" / "1.png", 2, (32, 32))

    def annotate(*places):
        for place, label in places:
            path = root / place
            path.parent.mkdir(parents=True, exist_ok=True)
            if kind == "masks":
                Image.fromarray(np.full((32, 32), 1 + LABELS.index(label), np.uint8)).save(path.with_suffix(".png"))
            else:
                path.with_suffix(".txt").write_text(f"4 4 20 4 20 20 4 20 {label} 0\n")

    def annotated():
        layout = {
            "masks": lambda: layouts.Masks(root, {str(1 + index): label for index, label in enumerate(LABELS)}),
            "dota": lambda: layouts.Dota(root, {label: label for label in LABELS}),
        }[kind]()
        return [image.regions[0].label for image in annotate_all(layout, choose_split(layout, "train")[0])]

    annotate((f"train/north/{folder}/0", "plane"), (f"{folder}/1", "ship"))
    with pytest.raises(ValueError, match=rf"{what} of .*south.images.0.png was not found"):
        annotated()
    annotate((f"{folder}/0", "Bus"))
    with pytest.raises(ValueError, match=r"south.images.0.png is ambiguous, .*0\.\w+"):
        annotated()
    annotate((f"train/south/{folder}/0", "Bus"))
    assert annotated() == ["plane", "Bus", "ship"]


def test_captions_without_masks_have_no_boxes(tmp_path):
    images = []
    for number in range(6):
        for folder in "AB":
            noise(tmp_path / "data" / "images" / "train" / folder / f"train_{number}.png", number, (64, 64))
        sentences = [{"raw": f" a road {number} appears . "}, {"raw": " "}, {"raw": f"road {number}"}, {"raw": ""}]
        images.append({"filename": f"train_{number}.png", "split": "train", "sentences": sentences})
    (tmp_path / "data" / "LevirCCcaptions.json").write_text(json.dumps({"images": images}))
    rows = make("changes", tmp_path / "data", tmp_path / "out")["train"]
    assert len(rows) == 6
    for row in rows:
        number = row["id"][-1]
        assert [answer for _, answer in turns_of(row)] in ([f"a road {number} appears ."], [f"road {number}"])


def test_gif_images_and_masks_are_read(tmp_path):
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


@pytest.mark.parametrize("place", ["train", "train2017/images", "annotations/images", "images/train/images"])
def test_coco_images_are_found_by_their_split(tmp_path, place):
    data = tmp_path / "data"
    write_coco(data, "train", NAMES["train"][:2])
    expected = make("coco", data, tmp_path / "expected")["train"]
    (data / place).parent.mkdir(parents=True, exist_ok=True)
    (data / "images" / "train2017").rename(data / "moved")
    (data / "moved").rename(data / place)
    found = make("coco", data, tmp_path / "found")["train"]
    assert [row["messages"] for row in found] == [row["messages"] for row in expected]
    assert [row["images"][0].tobytes() for row in found] == [row["images"][0].tobytes() for row in expected]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_hidden_files_are_ignored(layout, tmp_path):
    LAYOUTS[layout][0](tmp_path, "train", NAMES["train"][:4])
    for path in [path for path in tmp_path.rglob("*") if path.is_file()]:
        path.with_name(f"._{path.name}").write_bytes(b"\0\5\x16\7")
        copy = path.parent / ".ipynb_checkpoints" / path.name
        copy.parent.mkdir(exist_ok=True)
        copy.write_bytes(path.read_bytes())
    assert layouts.recognize_layout(tmp_path) == layout
    found = layouts.LAYOUTS[layout](tmp_path)
    assert len(annotate_all(found, choose_split(found, "train")[0])) == 4
