"""Exact questions, answers and their order for each layout."""

import hashlib
import json
import shlex

import nibabel
import numpy as np
import pytest
from annotated_images import LAYOUTS, NAMES, make, noise
from PIL import Image

from modeling_vitp.data import layouts
from modeling_vitp.instructions.from_annotations import pipeline
from modeling_vitp.recipes import make_instructions

COLLAGES = ["--collages", "0.5", "--collage_grid", "2", "--collage_size"]
OPTIONS = {
    "coco": ["--turns", "10"],
    "voc": ["--window", "200", "--overlap", "40", *COLLAGES, "112"],
    "dota": ["--seed", "3", "--kinds", "counting", "referring", "region_caption", "map"],
    "yolo": ["--turns", "10"],
    "geojson": ["--turns", "10"],
    "folders": [],
    "table": [],
    "masks": ["--turns", "9", *COLLAGES, "32"],
    "changes": [],
    "volumes": ["--intensities", "-160", "240", *COLLAGES, "8"],
}
DIGESTS = {  # Number of rows, and digest of their ids and messages.
    "coco": (12, "507939df40343d33"),
    "voc": (72, "acd9054e217c8550"),
    "dota": (12, "b808d27e0a653cb1"),
    "yolo": (12, "dd245443388f4911"),
    "geojson": (12, "9757b94ccdfbbd9f"),
    "folders": (8, "12331408bcc64458"),
    "table": (8, "adaca2b7f0afaa2f"),
    "masks": (12, "469a75fdb9176643"),
    "changes": (8, "f5291eae80b20dcc"),
    "volumes": (12, "ca80a2096ff82cd0"),
}


def random_mask(number, side):
    rng, mask = np.random.default_rng(number), np.zeros((side, side), np.uint8)
    for value in (1, 2, 3):
        x, y, width, height = rng.integers(side // 8, side // 2, 4)
        mask[y : y + height, x : x + width] = value if rng.random() < 0.7 else 0
    return mask


def save_array(path, array):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path)


def write(layout, root):
    if layout in LAYOUTS:
        LAYOUTS[layout][0](root, "train", NAMES["train"][:12])
        return
    for number in range(8):
        if layout == "folders":
            noise(root / "train" / ("AnnualCrop", "Sea_Lake", "HWY")[number % 3] / f"{number}.png", number, (8, 8))
        elif layout == "table":
            noise(root / "images" / f"{number}.png", number, (8, 8))
            with (root / "train.csv").open("a") as file:
                file.write("file_name,label\n" if number == 0 else "")
                file.write(f"{number}.png,{('AnnualCrop', 'Sea_Lake', 'HWY')[number % 3]}\n")
        elif layout == "masks":
            noise(root / "train/images" / f"{number}.png", number, (64, 64))
            save_array(root / "train/masks" / f"{number}.png", random_mask(number, 64))
        elif layout == "changes":
            for place, folder in enumerate("AB"):
                noise(root / "train" / folder / f"{number}.png", 2 * number + place, (64, 64))
            save_array(root / "train/label" / f"{number}.png", random_mask(number, 64) // 2 * (number % 4 > 0))
        elif number < 2:
            mask = np.stack([random_mask(5 * number + index, 24) for index in range(4)], -1)
            for folder, array in (("images", mask.astype(np.int16) * 90 - 100), ("masks", mask)):
                (root / "train" / folder).mkdir(parents=True, exist_ok=True)
                image = nibabel.Nifti1Image(array, np.diag([-1.0, 1.0, 2.0, 1.0]))
                nibabel.save(image, root / "train" / folder / f"{number}.nii.gz")


@pytest.mark.parametrize("layout", OPTIONS)
def test_rows_are_pinned(layout, tmp_path):
    write(layout, tmp_path / "data")
    options = OPTIONS[layout]
    if layout in ("masks", "volumes"):
        (tmp_path / "names.json").write_text('{"0": null, "1": "water", "2": "storage tank", "3": "road"}')
        options = [*options, "--names", tmp_path / "names.json"]
    rows = make(layout, tmp_path / "data", tmp_path / "out", *options)["train"].remove_columns("images")
    digest = hashlib.sha256(json.dumps(rows.to_list(), sort_keys=True).encode()).hexdigest()[:16]
    assert (len(rows), digest) == DIGESTS[layout]


def test_masks_have_default_names(tmp_path, capsys):
    write("masks", tmp_path / "data")
    rows = make("masks", tmp_path / "data", tmp_path / "out")["train"]
    assert "0 is the background, 1 is 'class 1'" in capsys.readouterr().out
    (tmp_path / "names.json").write_text('{"0": null, "1": "class 1", "2": "class 2", "3": "class 3"}')
    expected = make("masks", tmp_path / "data", tmp_path / "expected", "--names", tmp_path / "names.json")["train"]
    assert rows.to_list() == expected.to_list()


@pytest.mark.parametrize("layout", OPTIONS)
def test_layout_is_recognized(layout, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = f"my {layout}"  # Resolved paths of folders are cached, so that each test needs its own name.
    write(layout, tmp_path / folder)
    matching = [name for name, entry in layouts.LAYOUTS.items() if entry.matches(tmp_path / folder)]
    assert matching == [layout] == [layouts.recognize_layout(folder)]
    assert layouts.recognize_layout(folder, layouts.LAYOUTS.keys() - {layout}) is None
    program, command, *words = shlex.split(pipeline.make_instructions_command(folder))
    assert (program, command, words[0]) == ("vitp", "make_instructions", layout)
    assert make_instructions.main(words) == 0
    assert (tmp_path / f"{folder}_instructions" / "README.md").is_file()


def write_captions(root):
    image = {"id": 1, "file_name": "0.png"}
    contents = {"images": [image], "annotations": [{"id": 1, "image_id": 1, "caption": "A bbox of categories."}]}
    (root / "annotations").mkdir()
    (root / "annotations" / "captions_train2017.json").write_text(json.dumps(contents))
    noise(root / "train2017" / "0.png", 0)


def write_numbers(root):
    (root / "labels").mkdir()
    (root / "labels" / "0.txt").write_text("0 0.1 0.1 0.2 0.1 0.2 0.2 0.1 0.2\n")
    noise(root / "images" / "0.png", 0)


@pytest.mark.parametrize("write_other", [write_captions, write_numbers])
def test_other_folder_is_not_recognized(write_other, tmp_path):
    write_other(tmp_path)
    assert layouts.recognize_layout(tmp_path) is None
    assert pipeline.make_instructions_command(tmp_path) is None
    assert layouts.recognize_layout(tmp_path / "missing") is None


def test_command_names_split_of_folder(tmp_path):
    for label in ("river", "forest"):
        noise(tmp_path / label / "0.png", 0)
    assert "--split" not in pipeline.make_instructions_command(tmp_path)  # All images are used.
    for label in ("river", "forest"):
        noise(tmp_path / "splits" / "val" / label / "0.png", 0)
    assert "--split val" in pipeline.make_instructions_command(tmp_path / "splits")
