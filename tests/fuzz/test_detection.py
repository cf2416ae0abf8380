"""Malformed annotations of objects give samples, or an error that names file or row, and object."""

import json
import random

import datasets
import pyarrow as pa
import pytest
import torch
from detection_data import NAMES, write_coco, write_dota, write_geopackage, write_images, write_voc, write_yolo
from fuzzing import damage, limits, mutate, outcome

from modeling_vitp.data.classes import ClassNames
from modeling_vitp.tasks.detection.annotations import collect, columns_of, read_rows
from modeling_vitp.tasks.detection.data import DetectionData

pytestmark = pytest.mark.slow
IMAGES = ["a_001", "b_002", "empty_003", "c_004"]
WORDS = ["nan", "x", "", "1e999", "-5", "0", "7", "<", "</a>", "&x;", "é", "1_0", "0x1"]
KINDS = {
    "dota": (write_dota, "annfiles", "oriented"),
    "voc oriented": (lambda root, names: write_voc(root, names, True), "Annotations", "oriented"),
    "voc": (lambda root, names: write_voc(root, names, False), "Annotations", "horizontal"),
    "coco": (write_coco, "instances.json", "instances"),
    "yolo": (write_yolo, "labels", "instances"),
    "geojson": (write_geopackage, "labels.gpkg", "oriented"),
}


def samples(root, kind, bad_objects="raise"):
    """Return all training samples."""
    _, annotations, task = KINDS[kind]
    split = {"images": "images", "annotations": annotations}
    settings = {"root": str(root), "format": kind.split()[0], "classes": NAMES, "splits": {"train": split}}
    images = DetectionData.from_dict(settings | {"bad_objects": bad_objects}).open(["train"], task)
    found = [images[index] for index in range(len(images))]
    for item in found:
        assert item["corners"].shape == (len(item["labels"]), 4, 2) and item["corners"].isfinite().all()
        assert task != "instances" or item["masks"].shape == (len(item["labels"]), *item["image"].shape[1:])
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_malformed_objects_are_named_or_skipped(tmp_path, kind):
    write, annotations, _ = KINDS[kind]
    write(tmp_path, IMAGES)
    sound = samples(tmp_path, kind)
    is_file = (tmp_path / annotations).is_file()
    files = [tmp_path / annotations] if is_file else sorted((tmp_path / annotations).rglob("*.*"))
    rng = random.Random(kind)
    counts = {"error": 0, "right": 0}
    with limits():
        for number in range(125):
            path = rng.choice(files)
            before = path.read_bytes()
            if kind == "coco" and number % 4:
                path.write_text(json.dumps(mutate(rng, json.loads(before), rng.choice([1, 1, 2]))))
            elif number % 4 and kind != "geojson":
                words = before.decode().replace("<", " <").replace(">", "> ").split(" ")
                words[rng.randrange(len(words))] = rng.choice(WORDS)
                path.write_text(" ".join(words))
            else:
                path.write_bytes(damage(rng, before))
            found = outcome(lambda: samples(tmp_path, kind), str(path), "'train'")
            counts["error" if isinstance(found, ValueError) else "right"] += 1
            left = outcome(lambda: samples(tmp_path, kind, "skip"), str(path), "'train'")
            assert isinstance(left, ValueError) or isinstance(found, ValueError) or len(left) == len(found)
            path.write_bytes(before)
    assert min(counts.values()) > 7, counts
    for item, before in zip(samples(tmp_path, kind), sound, strict=True):
        assert all(torch.equal(item[name], before[name]) for name in ("image", "labels", "corners"))


def test_malformed_object_row_is_named(tmp_path):
    written = write_images(tmp_path / "images", IMAGES)
    good = []
    for name, objects in written.items():
        boxes = [[*corners.min(0).tolist(), *(corners.max(0) - corners.min(0)).tolist()] for _, corners in objects]
        outlines = [[corners.flatten().tolist()] for _, corners in objects]
        entry = {"bbox": boxes, "category": [label for label, _ in objects], "segmentation": outlines}
        good.append({"image": {"path": str(tmp_path / "images" / f"{name}.png"), "bytes": None}, "objects": entry})
    rng, classes = random.Random(0), ClassNames(NAMES)
    counts = {"error": 0, "right": 0}

    def read(rows):
        columns = columns_of(rows.features, {}, "train")
        for item in read_rows(rows, columns, "xywh", "train"):
            objects, wrong = collect(item.objects, classes, item.size, "masks" in columns)
            if wrong:
                raise ValueError(wrong[0])
            objects.masks(item.size)

    with limits():
        for _ in range(350):
            row = rng.choice(good)
            try:
                rows = datasets.Dataset.from_list(
                    [row | {"objects": mutate(rng, row["objects"], rng.choice([1, 1, 2]))}]
                )
            except (pa.ArrowException, TypeError, OverflowError, UnicodeError):
                continue  # A column cannot have this value.
            found = outcome(lambda: read(rows), "row 0 of split 'train'", "Split 'train'")  # noqa: B023 called at once
            counts["error" if isinstance(found, ValueError) else "right"] += 1
    assert min(counts.values()) > 20, counts
