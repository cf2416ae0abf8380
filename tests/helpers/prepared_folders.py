"""Miniatures of prepared data sets, each built from the public description that its docstring names.

The miniatures are the specification of the readers: a reader is mended until it reads them, never the other way round.
"""

import json
from pathlib import Path

import numpy as np
from PIL import Image

SIZE = 16


def _picture(path: Path, seed: int, mode: str = "RGB", size: int = SIZE) -> None:
    """Write an image of random 8-bit values, RGB or gray (`mode="L"`)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    shape = (size, size, 3) if mode == "RGB" else (size, size)
    Image.fromarray(np.random.default_rng([seed, *path.name.encode()]).integers(0, 256, shape, dtype=np.uint8)).save(
        path
    )


def _mask(path: Path, values: list[int], size: int = SIZE) -> None:
    """Write a gray PNG with vertical stripes of the values in turn."""
    path.parent.mkdir(parents=True, exist_ok=True)
    stripes = np.resize(values, size).astype(np.uint8)
    Image.fromarray(np.tile(stripes, (size, 1))).save(path)


def write_whu_cd(root: Path) -> Path:
    """Write WHU-CD cut to 256 pixels: `WHU_CD_256/{train,test}/{A,B,OUT}`, masks of 0 and 255.

    Source: data paths of the release's change-detection configuration for WHU-CD.
    """
    folder = root / "WHU_CD_256"
    for split, names in {"train": ["1.png", "2.png", "3.png"], "test": ["4.png", "5.png"]}.items():
        for index, name in enumerate(names):
            _picture(folder / split / "A" / name, index)
            _picture(folder / split / "B" / name, index + 10)
            _mask(folder / split / "OUT" / name, [0, 255])
    return folder


def write_levir_cd_256(root: Path) -> Path:
    """Write LEVIR-CD cut to 256 pixels: `LEVIR-CD-256/{A,B,label}` with names in `list/{train,val,test}.txt`.

    Source: the READMEs of the change-detection repositories that link this archive (BIT, ChangeFormer, TinyCD), and the
    data paths of the release's configuration.
    """
    folder = root / "LEVIR-CD-256"
    lists = {
        "train": ["train_1_1.png", "train_1_2.png", "train_2_1.png"],
        "val": ["val_1_1.png"],
        "test": ["test_1_1.png", "test_1_2.png"],
    }
    (folder / "list").mkdir(parents=True)
    for split, names in lists.items():
        for index, name in enumerate(names):
            _picture(folder / "A" / name, index)
            _picture(folder / "B" / name, index + 10)
            _mask(folder / "label" / name, [0, 255])
        (folder / "list" / f"{split}.txt").write_text("\n".join(names) + "\n", encoding="utf-8")
    return folder


def write_levir_cd(root: Path) -> Path:
    """Write LEVIR-CD as its authors publish it: `LEVIR-CD/{train,val,test}/{A,B,label}`, masks of 0 and 255.

    Source: the page of LEVIR-CD. The originals have 1024 x 1024 pixels.
    """
    folder = root / "LEVIR-CD"
    for split, count in {"train": 3, "val": 1, "test": 2}.items():
        for index in range(1, count + 1):
            name = f"{split}_{index}.png"
            _picture(folder / split / "A" / name, index)
            _picture(folder / split / "B" / name, index + 10)
            _mask(folder / split / "label" / name, [0, 255])
    return folder


def write_uavid(root: Path) -> Path:
    """Write UAVid cut to patches: `uavid/{train_val,val,test}/{images,masks}`, class ids 0 (building) to 7 (clutter).

    Source: the README of GeoSeg (patches of 1024 pixels) and the data paths and class order of the release's
    configuration. The labels of the test split are not published.
    """
    folder = root / "uavid"
    for split, names in {
        "train_val": ["seq1_000000_0_0.png", "seq1_000000_0_1.png", "seq16_000000_0_0.png"],
        "val": ["seq16_000000_0_0.png"],
        "test": ["seq21_000000_0_0.png"],
    }.items():
        for index, name in enumerate(names):
            _picture(folder / split / "images" / name, index)
            if split != "test":
                _mask(folder / split / "masks" / name, list(range(8)))
    return folder


def write_amos2022(root: Path) -> Path:
    """Write slices of AMOS2022: `AMOS2022/{img_dir,ann_dir}/{train,val,test}`, class ids 0 to 13 in gray PNG.

    Source: MMSegmentation's page on preparing data sets (its Synapse CT layout); the number of classes is the paper's.
    """
    folder = root / "AMOS2022"
    for split, names in {
        "train": ["amos_0001_000", "amos_0001_001"],
        "val": ["amos_0004_000"],
        "test": ["amos_0008_000"],
    }.items():
        for index, name in enumerate(names):
            _picture(folder / "img_dir" / split / f"{name}.png", index, mode="L")
            _mask(folder / "ann_dir" / split / f"{name}.png", list(range(14)))
    return folder


def write_brats2021(root: Path) -> Path:
    """Write slices of BraTS2021: `brats/{images,masks}/{train,val,test}`, class ids 0 to 2 in gray PNG.

    Source: the layout of MMSegmentation's medical projects; the number of classes is the paper's.
    """
    folder = root / "brats"
    for split, names in {
        "train": ["BraTS2021_00000_077", "BraTS2021_00000_078"],
        "val": ["BraTS2021_00002_077"],
        "test": ["BraTS2021_00003_077"],
    }.items():
        for index, name in enumerate(names):
            _picture(folder / "images" / split / f"{name}.png", index)
            _mask(folder / "masks" / split / f"{name}.png", [0, 1, 2])
    return folder


def write_covid_qu_ex(root: Path) -> Path:
    """Write COVID-QU-Ex: `Infection Segmentation Data/{Train,Val,Test}/{COVID-19,Non-COVID,Normal}/…`.

    Each class has the folders `images`, `infection masks` and `lung masks`, with equal file names, masks of 0 and 255.
    Source: the page of the data set and the READMEs of repositories that use it.
    """
    folder = root / "Infection Segmentation Data"
    for split, count in {"Train": 2, "Val": 1, "Test": 1}.items():
        for index, kind in enumerate(["COVID-19", "Non-COVID", "Normal"]):
            for number in range(count):
                name = f"{kind.lower()}_{split.lower()}_{number}.png"
                _picture(folder / split / kind / "images" / name, index, mode="L")
                _mask(folder / split / kind / "infection masks" / name, [0, 255] if kind == "COVID-19" else [0])
                _mask(folder / split / kind / "lung masks" / name, [0, 255, 0])
    return folder


def write_rsar(root: Path) -> Path:
    """Write RSAR: `RSAR/{train,val,test}/{images,annfiles}`, images of three file types and a text file for each.

    A line has four corners, one of the six classes and a difficulty. Names are numbers that each split counts anew, and
    a training image has a box without an area.
    Source: data paths, file types and class order of the release's configuration for RSAR.
    """
    folder, classes = root / "RSAR", ["ship", "aircraft", "car", "tank", "bridge", "harbor"]
    for offset, (split, count) in enumerate({"train": 12, "val": 4, "test": 4}.items()):
        (folder / split / "annfiles").mkdir(parents=True)
        (folder / split / "images").mkdir()
        for index in range(count):
            random = np.random.default_rng([offset, index])
            coarse = Image.fromarray(random.integers(0, 256, (12, 12), dtype=np.uint8))
            name, suffix = f"{index + 1:07d}", (".jpg", ".png", ".bmp")[index % 3]
            coarse.resize((72, 72), Image.Resampling.BICUBIC).convert("RGB").save(
                folder / split / "images" / f"{name}{suffix}"
            )
            lines = []
            for label in (classes[(index + 2 * offset) % 6], classes[(index + 2 * offset + 1) % 6]):
                (x, y), half = random.uniform(24, 48, 2), random.uniform(6, 12)
                lines.append(f"{x} {y - half} {x + half} {y} {x} {y + half} {x - half} {y} {label} 0")
            lines += ["20 20 20 20 20 20 20 20 ship 0"] * (split == "train" and index == 0)
            (folder / split / "annfiles" / f"{name}.txt").write_text("\n".join(lines) + "\n")
    return folder


def write_released_annotations(root: Path) -> Path:
    """Write annotations of two sources with their meta file, and return the path of the meta file.

    Source: InternVL's page on the format of chat data (JSON Lines and meta file), and the meta files of the release, in
    which `root` and `annotation` are relative to the folder that training starts from. One source has
    `max_dynamic_patch` and `data_augment: true`, the other neither.
    """
    (root / "data" / "rs_ann").mkdir(parents=True)
    for index in range(4):
        _picture(root / "data" / "images" / "rs_data" / "UCM" / f"beach{index:02d}.png", index)
        _picture(root / "data" / "images" / "rs_data" / "Levir" / "A" / f"{index}.png", index)
        _picture(root / "data" / "images" / "rs_data" / "Levir" / "B" / f"{index}.png", index + 10)
    one = [
        {
            "id": index,
            "image": f"UCM/beach{index:02d}.png",
            "width": SIZE,
            "height": SIZE,
            "conversations": [
                {"from": "human", "value": "<image>\nClassify the image."},
                {"from": "gpt", "value": "beach"},
            ],
        }
        for index in range(4)
    ]
    two = [
        {
            "id": index,
            "image": [f"Levir/A/{index}.png", f"Levir/B/{index}.png"],
            "width": [SIZE, SIZE],
            "height": [SIZE, SIZE],
            "conversations": [
                {"from": "human", "value": "<image>\n<image>\nWhat changed?"},
                {"from": "gpt", "value": "A road was built."},
            ],
        }
        for index in range(4)
    ]
    meta = {}
    for name, rows, extra in [
        ("cls_rgb_UCM", one, {"data_augment": True, "repeat_time": 5, "max_dynamic_patch": 12}),
        ("caption_cd_rgb_LevirCCcaptions", two, {"data_augment": False, "repeat_time": 0.5}),
    ]:
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (root / "data" / "rs_ann" / f"{name}.jsonl").write_text(lines, encoding="utf-8")
        meta[name] = {
            "root": "data/images/rs_data/",
            "annotation": f"data/rs_ann/{name}.jsonl",
            "length": len(rows),
            **extra,
        }
    path = root / "ft_data_rs.json"
    path.write_text(json.dumps(meta, indent=2), encoding="utf-8")
    return path
