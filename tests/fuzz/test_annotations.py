"""Malformed annotations give samples and instructions, or an error that names file or row, and object."""

import json
import random

import datasets
import pyarrow as pa
import pytest
import torch
from annotated_images import LAYOUTS
from annotated_images import NAMES as SPLITS
from detection_data import NAMES, write_coco, write_dota, write_geopackage, write_images, write_voc, write_yolo
from fuzzing import alter_file, check_outcomes, limits, mutate, outcome
from PIL import Image

from modeling_vitp.data import layouts
from modeling_vitp.data.classes import ClassNames
from modeling_vitp.data.leaks import leave_out_copies
from modeling_vitp.data.splits import choose_split
from modeling_vitp.data.windows import windows_of
from modeling_vitp.instructions.from_annotations.encoding import image_bytes
from modeling_vitp.instructions.from_annotations.labels import annotate_all
from modeling_vitp.instructions.from_annotations.questions import PHRASINGS, Asker, make_conversations
from modeling_vitp.tasks.detection.annotations import collect, columns_of, read_rows
from modeling_vitp.tasks.detection.data import DetectionData

pytestmark = pytest.mark.slow
IMAGES = ["a_001", "b_002", "empty_003", "c_004"]
DETECTION = {
    "dota": (write_dota, "annfiles", "oriented"),
    "voc oriented": (lambda root, names: write_voc(root, names, True), "Annotations", "oriented"),
    "voc": (lambda root, names: write_voc(root, names, False), "Annotations", "horizontal"),
    "coco": (write_coco, "instances.json", "instances"),
    "yolo": (write_yolo, "labels", "instances"),
    "geojson": (write_geopackage, "labels.gpkg", "oriented"),
}
# The files of other layouts of objects are read by the same code as those of a detector.
INSTRUCTIONS = {"coco": ".json", "masks": ".png", "changes": ".json", "geojson": ".geojson"}


def samples(root, kind, bad_objects="raise"):
    """Return all training samples of a detector."""
    _, annotations, task = DETECTION[kind]
    split = {"images": "images", "annotations": annotations}
    settings = {"root": str(root), "format": kind.split()[0], "classes": NAMES, "splits": {"train": split}}
    images = DetectionData.from_dict(settings | {"bad_objects": bad_objects}).open(["train"], task)
    found = [images[index] for index in range(len(images))]
    for item in found:
        assert item["corners"].shape == (len(item["labels"]), 4, 2) and item["corners"].isfinite().all()
        assert task != "instances" or item["masks"].shape == (len(item["labels"]), *item["image"].shape[1:])
    return found


def write(kind, root):
    """Write four training images for instructions, and their annotations."""
    if kind in LAYOUTS:
        for split, names in SPLITS.items():
            LAYOUTS[kind][0](root, split, names[:4])
        return
    for number in range(4):
        for folder in ("A", "B", "label") if kind == "changes" else ("images", "masks"):
            path = root / "train" / folder / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            is_mask = folder in ("label", "masks")
            image = Image.new("L" if is_mask else "RGB", (32, 24))
            image.paste(255, (2, 2, 12 + number, 20)) if is_mask else image.putpixel((number, 0), (255, 0, 0))
            image.save(path)
    if kind == "changes":
        images = [{"filename": f"{number}.png", "sentences": [{"raw": " A house. "}]} for number in range(4)]
        (root / "captions.json").write_text(json.dumps({"images": images}))


def instructions(root, kind, on_error="raise"):
    """Return the annotated images, of which conversations are made like those of the command."""
    layout = layouts.LAYOUTS[kind](root, {"0": None, "255": "building"} if kind == "masks" else None)
    chosen, _ = leave_out_copies(*choose_split(layout, "train"))
    images = annotate_all(layout, chosen, on_error)
    if layout.subject == "objects":
        images = [window for image in images for window in windows_of(image, 200, 20)]
    asker = Asker(layout.subject, {label: 1 for image in images for label in image.classes})
    for conversation in make_conversations(images, asker, list(PHRASINGS[layout.subject]), 5):
        for exchange in conversation:
            for message in exchange.messages:
                assert isinstance(message["content"], str) and message["content"].strip()
    for image in images[:1]:
        image_bytes(image)
    return images


def alter_one_of(files, read, names_of, number):
    """Alter a file a number of times, and check that it is read, named, or left out; return the results."""
    rng = random.Random(number)
    results = []
    with limits():
        for _ in range(number):
            path = rng.choice(files)
            before = path.read_bytes()
            alter_file(rng, path)
            found = outcome(lambda: read("raise"), *names_of(path))
            remaining = outcome(lambda: read("skip"), *names_of(path))
            results.append(found)
            is_error = isinstance(remaining, ValueError) or isinstance(found, ValueError)
            assert is_error or len(remaining) == len(found)
            path.write_bytes(before)
    return results


@pytest.mark.parametrize("kind", DETECTION)
def test_malformed_objects_are_named_or_skipped(tmp_path, kind):
    write_kind, annotations, _ = DETECTION[kind]
    write_kind(tmp_path, IMAGES)
    sound = samples(tmp_path, kind)
    place = tmp_path / annotations
    files = [place] if place.is_file() else sorted(place.rglob("*.*"))
    names_of = lambda path: (str(path), "'train'")  # noqa: E731
    results = alter_one_of(files, lambda way: samples(tmp_path, kind, way), names_of, 60)
    check_outcomes(results, 3)
    for item, before in zip(samples(tmp_path, kind), sound, strict=True):
        assert all(torch.equal(item[name], before[name]) for name in ("image", "labels", "corners"))


@pytest.mark.parametrize("kind", INSTRUCTIONS)
def test_malformed_annotation_is_named_or_skipped(tmp_path, kind):
    root = tmp_path / "data"
    write(kind, root)
    sound = len(instructions(root, kind))
    files = sorted(path for path in root.rglob(f"*{INSTRUCTIONS[kind]}") if path.parent.name != "images")
    results = alter_one_of(files, lambda way: instructions(root, kind, way), lambda path: (str(root),), 50)
    check_outcomes(results, 1)
    assert len(instructions(root, kind)) == sound


def test_malformed_object_row_is_named(tmp_path):
    written = write_images(tmp_path / "images", IMAGES)
    good = []
    for name, objects in written.items():
        boxes = [[*corners.min(0).tolist(), *(corners.max(0) - corners.min(0)).tolist()] for _, corners in objects]
        outlines = [[corners.flatten().tolist()] for _, corners in objects]
        entry = {"bbox": boxes, "category": [label for label, _ in objects], "segmentation": outlines}
        good.append({"image": {"path": str(tmp_path / "images" / f"{name}.png"), "bytes": None}, "objects": entry})
    rng = random.Random(0)
    results = []

    def read(rows):
        columns = columns_of(rows.features, {}, "train")
        for item in read_rows(rows, columns, "xywh", "train"):
            objects, wrong = collect(item.objects, ClassNames(NAMES), item.size, "masks" in columns)
            if wrong:
                raise ValueError(wrong[0])
            objects.masks(item.size)

    with limits():
        for _ in range(175):
            row = rng.choice(good)
            changed = row | {"objects": mutate(rng, row["objects"], rng.choice([1, 1, 2]))}
            try:
                rows = datasets.Dataset.from_list([changed])
            except (pa.ArrowException, TypeError, OverflowError, UnicodeError):
                continue  # A column cannot have this value.
            results.append(outcome(lambda: read(rows), "row 0 of split 'train'", "Split 'train'"))  # noqa: B023 called at once
    check_outcomes(results, 10)
