"""Tests of the detection data sets: formats, rows, windows, splits and their errors."""

import json
import re
import shutil
import tracemalloc
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import cv2
import datasets
import evaluate
import numpy as np
import pytest
import rasterio
import shapely
import torch
import yaml
from annotated_images import LAYOUTS
from detection_data import (
    HEIGHT,
    NAMES,
    WIDTH,
    coco_contents,
    draw_image,
    draw_mask,
    draw_objects,
    voc_object,
    write_coco,
    write_dota,
    write_geopackage,
    write_images,
    write_voc,
    write_yolo,
)
from georeferenced import feature, save_geojson, save_geotiff
from PIL import Image
from pycocotools import mask as run_lengths
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from modeling_vitp.data.annotations import AnnotatedObject
from modeling_vitp.data.classes import ClassNames
from modeling_vitp.data.files import hashed_position
from modeling_vitp.metrics.report import METRICS_FOLDER
from modeling_vitp.tasks.detection.annotations import AnnotatedFile, ImageObjects, ObjectTiles, collect, row_objects
from modeling_vitp.tasks.detection.arguments import DetectionArguments
from modeling_vitp.tasks.detection.data import DetectionData, ObjectImages, cut_into_windows, with_few_empty
from modeling_vitp.tasks.detection.trainer import reference

IMAGES = ["a_001", "b_002", "empty_003", "c_004"]
SPLITS = {
    "dota": {"images": "images", "annotations": "annfiles"},
    "voc oriented": {"images": "images", "annotations": "Annotations/Oriented Bounding Boxes"},
    "voc": {"images": "images", "annotations": "Annotations/Horizontal Bounding Boxes"},
    "coco": {"images": "images", "annotations": "instances.json"},
    "yolo": {"images": "images", "annotations": "labels"},
    "geojson": {"images": "images", "annotations": "labels.gpkg"},
}
WRITERS = {
    "dota": lambda root: write_dota(root, IMAGES, (".png", ".jpg", ".bmp")),
    "voc oriented": lambda root: write_voc(root, IMAGES, True),
    "voc": lambda root: write_voc(root, IMAGES, False),
    "coco": lambda root: write_coco(root, IMAGES),
    "yolo": lambda root: write_yolo(root, IMAGES),
    "geojson": lambda root: write_geopackage(root, IMAGES),
}


def describe(root, kind, **more):
    settings = {"root": str(root), "format": kind.split()[0], "classes": NAMES, "splits": {"train": SPLITS.get(kind)}}
    return DetectionData.from_dict(settings | more)


def write_rows(path, images, objects, labels=None, **columns):
    """Write rows of images with their objects. `labels` is the feature of the labels."""
    rows = datasets.Dataset.from_dict({"image": images, "objects": objects, **columns})
    features = rows.features | {"image": datasets.Image()}
    if labels is not None:
        features["objects"]["category"] = datasets.List(labels)
    rows.cast(datasets.Features(features)).to_parquet(path)


def described_rows(folder, **more):
    settings = {"dataset_name": str(folder), "classes": NAMES, "splits": {"train": "train"}}
    return DetectionData.from_dict(settings | more)


def ids(samples):
    return [place.id for place in samples.places]


@pytest.mark.parametrize("kind", SPLITS)
def test_formats_read_written_objects(tmp_path, kind):
    written = WRITERS[kind](tmp_path)
    samples = describe(tmp_path, kind).open(["train"], "horizontal")
    assert ids(samples) == sorted(IMAGES)
    for item in samples:
        objects = written[item["id"]]
        assert item["image"].shape == (3, HEIGHT, WIDTH) and item["image"].dtype == torch.uint8
        assert item["labels"].tolist() == [NAMES.index(label) for label, _ in objects]
        corners = np.array([corners for _, corners in objects]).reshape(-1, 4, 2)
        if kind in ("dota", "voc oriented", "yolo"):
            np.testing.assert_allclose(item["corners"], corners, atol=1e-4)
        else:
            np.testing.assert_allclose(item["corners"].amin(1), corners.min(1), atol=1e-4)
            np.testing.assert_allclose(item["corners"].amax(1), corners.max(1), atol=1e-4)


@pytest.mark.parametrize("kind", SPLITS)
def test_tenth_of_single_folder_is_held_out(tmp_path, kind):
    WRITERS[kind](tmp_path / "data")
    inferred = DetectionData.infer(tmp_path / "data")
    data = DetectionData.from_dict(inferred)
    train, test = (ids(data.open([split], "horizontal")) for split in ("train", "test"))
    assert sorted(train + test) == sorted(IMAGES) and len(test) == 1
    (start, border), (same_border, end) = (inferred["splits"][split].pop("part") for split in ("train", "test"))
    assert (start, end) == (0, 1) and border == same_border
    assert inferred["splits"] == {"train": SPLITS[kind], "test": SPLITS[kind]}
    assert inferred["format"] == kind.split()[0] and sorted(map(str.lower, inferred["classes"])) == ["plane", "ship"]


INFERRED = {
    "coco": {"images": "images/train2017", "annotations": "annotations/instances_train2017.json"},
    "voc": {"images": "JPEGImages", "annotations": "Annotations", "list": "ImageSets/Main/train.txt"},
    "dota": {"images": "train/images", "annotations": "train/labelTxt"},
    "yolo": {"images": "images/train", "annotations": "labels/train"},
    "geojson": {"images": "train/images", "annotations": "train/labels"},
}


@pytest.mark.parametrize("layout", INFERRED)
def test_splits_and_classes_are_inferred(tmp_path, layout):
    write, read = LAYOUTS[layout]
    for split, names in {"train": ["000", "001", "002", "003", "004"], "test": ["060", "061"]}.items():
        write(tmp_path, split, names)
    inferred = DetectionData.infer(tmp_path)
    assert inferred["splits"].keys() == {"train", "test"} and inferred["splits"]["train"] == INFERRED[layout]
    assert len(inferred["classes"]) == 4
    data = DetectionData.from_dict(inferred)
    assert len(data.open(["test"], "horizontal")) == 2
    places = data.open(["train"], "horizontal").places
    assert [place.id for place in places] == ["000", "001", "002", "003", "004"]
    for place in places:
        labels, boxes, _ = zip(*read(tmp_path, place.id)) if list(read(tmp_path, place.id)) else ((), (), ())
        assert [data.names.names[label] for label in place.objects.labels] == list(labels)
        np.testing.assert_allclose(place.objects.boxes(), np.array(boxes).reshape(-1, 4), atol=1e-3)


def test_voc_folders_are_splits(tmp_path):
    for split, name in (("train", "a_001"), ("valid", "b_002")):
        ((name, objects),) = write_images(tmp_path / split, [name], [".jpg"]).items()
        text = f"<annotation>{''.join(voc_object(*item, False) for item in objects)}</annotation>"
        (tmp_path / split / f"{name}.xml").write_text(text)
    splits = DetectionData.infer(tmp_path)["splits"]
    folders = {"train": "train", "val": "valid"}
    assert splits == {split: {"images": folder, "annotations": folder} for split, folder in folders.items()}


def test_lists_and_exports_of_yolo_are_read(tmp_path):
    root = tmp_path / "data"
    write_yolo(root, IMAGES)
    (root / "train.txt").write_text("./images/a_001.png\n./images/b_002.png\n")
    (root / "val.txt").write_text("images/c_004.png\n")
    (root / "data.yaml").write_text("path: data\ntrain: [train.txt]\nval: val.txt\ntest:\nnames: [p, s]")
    inferred = DetectionData.infer(root)
    assert inferred["splits"]["val"] == SPLITS["yolo"] | {"list": "val.txt"} and inferred["classes"] == ["p", "s"]
    data = DetectionData.from_dict(inferred)
    found = {split: ids(data.open([split], "oriented")) for split in data.splits}
    assert found == {"train": ["a_001", "b_002"], "val": ["c_004"]}
    (root / "data.yaml").write_text("train: [train.txt, val.txt]\nnames: [p, s]")
    with pytest.raises(ValueError, match="data.yaml"):
        DetectionData.infer(root)


@pytest.mark.parametrize(
    ("folders", "place"),
    [(("images", "labels"), ""), (("images", "labels"), "labels"), (("", ""), "")],  # Label Studio; LabelImg twice
)
def test_classes_file_of_yolo_is_read(tmp_path, folders, place):
    written = write_yolo(tmp_path / "written", IMAGES)
    for source, target in zip(("images", "labels"), folders):
        shutil.copytree(tmp_path / "written" / source, tmp_path / target, dirs_exist_ok=True)
    (tmp_path / folders[1] / "classes.txt").replace(tmp_path / place / "classes.txt")
    shutil.rmtree(tmp_path / "written")
    inferred = DetectionData.infer(tmp_path)
    train = {name: inferred["splits"]["train"][name] for name in ("images", "annotations")}
    assert inferred["classes"] == ["plane", "ship"] and list(train.values()) == [folder or "." for folder in folders]
    samples = describe(tmp_path, "yolo", splits={"train": train}).open(["train"], "oriented")
    assert len(samples) == len(IMAGES)
    for item in samples:
        labels, corners = zip(*written[item["id"]]) if written[item["id"]] else ((), np.zeros((0, 4, 2)))
        assert item["labels"].tolist() == [NAMES.index(label) for label in labels]
        np.testing.assert_allclose(item["corners"], corners, atol=1e-4)


@pytest.mark.parametrize("kind", ["coco", "yolo", "geojson"])
def test_outlines_become_masks(tmp_path, kind):
    written = WRITERS[kind](tmp_path)
    for item in describe(tmp_path, kind).open(["train"], "instances"):
        assert item["masks"].dtype == torch.uint8 and item["masks"].shape == (len(item["labels"]), HEIGHT, WIDTH)
        for mask, (_, corners) in zip(item["masks"].numpy(), written[item["id"]], strict=True):
            drawn = draw_mask(corners)
            # OpenCV also draws the border of a polygon, the COCO reader does not.
            assert ((mask & drawn).sum() / (mask | drawn).sum()) > 0.75


@pytest.mark.parametrize("kind", ["coco", "yolo", "geojson"])
def test_polygons_become_smallest_rectangles(tmp_path, kind):
    written = WRITERS[kind](tmp_path)
    if kind == "coco":
        outlines = iter([corners.flatten().tolist() for objects in written.values() for _, corners in objects])
        with changed_coco(tmp_path) as contents:
            for entry in contents["annotations"]:
                entry["segmentation"] = [next(outlines)]
    for item in describe(tmp_path, kind).open(["train"], "oriented"):
        for found, (_, corners) in zip(item["corners"].numpy(), written[item["id"]], strict=True):
            expected = shapely.minimum_rotated_rectangle(shapely.Polygon(corners))
            assert (shapely.Polygon(found) ^ expected).area < 0.02 * expected.area


def test_run_lengths_become_smallest_rectangles():
    turned = cv2.boxPoints(((50, 40), (60, 12), 30)).astype(np.float64)
    for corners in (np.array([(20, 10), (50, 10), (50, 22), (20, 22)], np.float64), turned):
        mask = rasterio.features.geometry_mask([shapely.Polygon(corners)], (80, 100), rasterio.Affine.identity(), False)
        outline = run_lengths.encode(np.asfortranarray(~mask, np.uint8))
        item = AnnotatedObject("here", "ship", (0, 0, 100, 80), segmentation=outline)
        objects, wrong = collect([item], ClassNames(["ship"]), (80, 100), is_oriented=True)
        expected = shapely.Polygon(corners)
        assert not wrong and (shapely.Polygon(objects.corners[0]) ^ expected).area < 0.14 * expected.area
        empty = replace(item, segmentation=run_lengths.encode(np.zeros((80, 100), np.uint8, order="F")))
        objects_of_empty, (message,) = collect([empty], ClassNames(["ship"]), (80, 100), is_oriented=True)
        assert not len(objects_of_empty) and "no pixel" in message
        if corners is not turned:
            assert {tuple(corner) for corner in objects.corners[0].round(4)} == {tuple(corner) for corner in corners}


def test_class_property_of_features_is_an_option(tmp_path):
    root = tmp_path / "data"
    square = np.array([(10, 10), (30, 10), (30, 25), (10, 25)])
    for name, kind in (("a", "elm"), ("b", "oak")):
        save_geotiff(root / f"{name}.tif", np.full((HEIGHT, WIDTH, 3), ord(name), np.uint8))
        save_geojson(root / "labels" / f"{name}.geojson", [feature(square, species=kind, fid=1)])
    assert DetectionData.infer(root)["classes"] == ["object"]
    args = DetectionArguments(data_root=str(root), data={"class_property": "species"})
    data = DetectionData.from_arguments(args, tmp_path / "out")
    assert data.names.names == ["elm", "oak"]
    assert yaml.safe_load((tmp_path / "out" / "data.yaml").read_text())["data"]["class_property"] == "species"
    places = data.open(["train", "test"], "horizontal").places
    assert sorted((place.id, place.objects.labels.tolist()) for place in places) == [("a", [0]), ("b", [1])]
    for place in places:
        np.testing.assert_allclose(place.objects.boxes(), [[10, 10, 30, 25]], atol=1e-4)
    with pytest.raises(ValueError, match="colour"):
        DetectionData.infer(root, class_property="colour")


def test_tile_masks_need_little_memory(tmp_path):
    write_coco(tmp_path, IMAGES)
    tile = {"size": 40, "overlap": 10, "min_image_share": 0.1, "min_object_share": 0.1}
    wholes = describe(tmp_path, "coco").open(["train"], "instances")
    tiles = describe(tmp_path, "coco", splits={"train": SPLITS["coco"] | {"tile": tile}}).open(["train"], "instances")
    num_masks = 0
    for place, item in zip(tiles.places, tiles, strict=True):
        left, top, right, bottom = place.window
        whole = ObjectImages([replace(place, window=None)], None, True)[0]["masks"]
        assert torch.equal(item["masks"], whole[:, top:bottom, left:right])
        num_masks += len(item["masks"])
    assert num_masks > len(wholes)
    segmentation = [[1000, 1000, 1100, 1000, 1100, 1100]]
    no = np.zeros(100, bool)
    objects = ImageObjects(no.astype(int), np.zeros((100, 4, 2)), no, no, np.ones(100), (segmentation,) * 100)
    tracemalloc.start()
    masks = objects.masks((2048, 2048), (1000, 1000, 1100, 1100))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert masks.sum() > 0 and peak < 3 * 2048**2  # One mask of the image, and the masks of the tile.


@pytest.fixture
def rows(tmp_path):
    """Return the folder of rows, and the written objects of the images."""
    written = write_images(tmp_path / "images", IMAGES)
    images = [str(tmp_path / "images" / f"{name}.png") for name in written]
    objects = []
    for objects_of_image in written.values():
        boxes = []
        for _, corners in objects_of_image:
            low, high = corners.min(0), corners.max(0)
            boxes.append([*low.tolist(), *(high - low).tolist()])
        objects.append({"bbox": boxes, "category": [NAMES.index(label) for label, _ in objects_of_image]})
    labels = datasets.ClassLabel(names=["Ship", "Plane"])
    write_rows(tmp_path / "rows" / "train.parquet", images, objects, labels, image_id=list(range(10, 10 + len(images))))
    return tmp_path / "rows", written


def test_rows_with_usual_column_names_are_read(rows):
    folder, written = rows
    samples = described_rows(folder).open(["train"], "horizontal")
    for item, objects in zip(samples, written.values(), strict=True):
        assert item["labels"].tolist() == [NAMES.index(label) for label, _ in objects]
        low = np.array([corners.min(0) for _, corners in objects]).reshape(-1, 2)
        np.testing.assert_allclose(item["corners"].amin(1) if objects else np.zeros((0, 2)), low, atol=1e-4)


def test_parts_and_windows_of_rows_are_read(rows):
    folder, _ = rows
    samples = described_rows(folder).open(["train"], "horizontal")
    tile = {"size": 48, "overlap": 16}
    splits = {"first": "train[:1]", "rest": "train[1:]", "windows": {"split": "train", "tile": tile}}
    data = described_rows(folder, splits=splits)
    joined, windows = data.open(["first", "rest"], "horizontal"), data.open(["windows"], "horizontal")
    assert len(joined) == len(IMAGES) and len(windows) == 6 * len(IMAGES)
    for index, whole in enumerate(samples):
        assert torch.equal(joined[index]["image"], whole["image"])
        assert torch.equal(joined[index]["corners"], whole["corners"])
        left, top = windows.places[6 * index + 4].start
        window = whole["image"][:, top : top + 48, left : left + 48]
        assert torch.equal(windows[6 * index + 4]["image"], window)
    data.check_disjoint(["first", "rest"], "horizontal")
    for other in ({"split": "train"}, "train[3:]"):
        with pytest.raises(ValueError, match="'a' and 'b' .*'train'"):
            described_rows(folder, splits={"a": "train", "b": other}).check_disjoint("ab", "horizontal")


def test_columns_and_format_of_boxes_are_options(rows):
    columns = {"boxes": "objects.bbox", "labels": "objects.category"}
    with pytest.raises(ValueError, match=r"row \d+ of split 'train', object \d+: the box .* has no area"):
        described_rows(rows[0], columns=columns, box_format="xyxy").open(["train"], "horizontal")
    with pytest.raises(ValueError, match="'objects.box'"):
        described_rows(rows[0], columns={"boxes": "objects.box"}).open(["train"], "horizontal")


def test_areas_of_rows_are_read(tmp_path):
    images = [Image.new("RGB", (32, 32), (seed, 0, 0)) for seed in range(3)]
    objects = [{"bbox": [[1.0, 1, 9, 9]], "category": [0], "area": area} for area in (None, [None], [5.0])]
    write_rows(tmp_path / "train.parquet", images, objects)
    absent, unknown, stated = (item["area"].tolist() for item in described_rows(tmp_path).open(["train"], "horizontal"))
    assert np.isnan([absent, unknown]).all() and stated == [5.0]


def test_column_of_labels_is_needed_for_several_classes(tmp_path):
    objects = {"bbox": [[1, 1, 9, 9], [9, 9, 9, 9]], "category_id": [0, 1]}
    write_rows(tmp_path / "train.parquet", [Image.new("RGB", (32, 32))], [objects])
    with pytest.raises(ValueError, match="'train'.*'ship', 'plane'.*columns"):
        described_rows(tmp_path).open(["train"], "horizontal")
    named = described_rows(tmp_path, columns={"labels": "objects.category_id"})
    assert named.open(["train"], "horizontal")[0]["labels"].tolist() == [0, 1]
    one_class = described_rows(tmp_path, classes=["ship"])
    assert one_class.open(["train"], "horizontal").count(["ship"]) == {"ship": 2}


def test_unlabeled_row_is_refused(tmp_path):
    """Check the label -1, which `datasets` uses for unlabeled rows."""
    objects = {"bbox": [[4.0, 4.0, 20.0, 20.0]], "category": [-1]}
    labels = datasets.ClassLabel(names=NAMES)
    write_rows(tmp_path / "train.parquet", [Image.new("RGB", (32, 32))], [objects], labels)
    with pytest.raises(ValueError, match="row 0 of split 'train': object 0: .*-1"):
        described_rows(tmp_path).open(["train"], "horizontal")


def test_windows_have_their_objects(tmp_path):
    written = write_dota(tmp_path, IMAGES)
    tile = {"size": 48, "overlap": 16}
    samples = describe(tmp_path, "dota", splits={"train": SPLITS["dota"] | {"tile": tile}}).open(["train"], "oriented")
    starts = [(left, top) for top in (0, 32) for left in (0, 32, 48)]
    assert ids(samples)[:6] == [f"a_001__48__{left}___{top}" for left, top in starts]
    images = {item["id"]: item["image"] for item in describe(tmp_path, "dota").open(["train"], "oriented")}
    for place, item in zip(samples.places, samples, strict=True):
        left, top = place.start
        name = item["id"].split("__")[0]
        assert torch.equal(item["image"], images[name][:, top : top + 48, left : left + 48])
        corners = np.array([corners for _, corners in written[name]]).reshape(-1, 4, 2) - [left, top]
        for one in item["corners"].numpy():
            assert np.isclose(corners, one, atol=1e-4).all((1, 2)).sum() == 1


def test_upright_boxes_are_clipped_to_window(tmp_path):
    """Check that upright boxes are clipped to their window, and oriented boxes are not."""
    write_dota(tmp_path, IMAGES)
    box = np.array([[40.0, 4], [52, 4], [52, 20], [40, 20]])  # Two thirds of the box are in the first window.
    line = " ".join(f"{value:g}" for value in box.flatten())
    (tmp_path / "annfiles" / "a_001.txt").write_text(f"{line} {NAMES[0]} 0\n")
    tile = {"size": 48, "overlap": 16, "min_object_share": 0.5}
    described = describe(tmp_path, "dota", splits={"train": SPLITS["dota"] | {"tile": tile}})
    expected = {"horizontal": box.clip(0, 48), "oriented": box}
    for task, corners in expected.items():
        samples = described.open(["train"], task)
        np.testing.assert_allclose(samples[0]["corners"][0], corners)
    item = described.open(["train"], "horizontal")[0]
    metric = evaluate.load(str(METRICS_FOLDER / "coco_average_precision"), num_labels=len(NAMES))
    perfect = {"scores": torch.ones(1), "labels": torch.zeros(1).long(), "boxes": torch.tensor([[40.0, 4, 48, 20]])}
    metric.add_batch(predictions=[perfect], references=[reference(item, "horizontal")], image_ids=[0])
    assert metric.compute()["map_75"] == 1


def test_windows_keep_the_crowds_that_reach_into_them():
    """A crowd region hides false detections, also in a window that has a small part of it."""
    items = [
        AnnotatedObject("here", "ship", box, is_crowd=is_crowd)
        for box, is_crowd in (((0, 0, 60, 96), True), ((30, 10, 60, 20), False))
    ]
    objects, _ = collect(items, ClassNames(["ship"]), (96, 96))
    image = AnnotatedFile("a", Path("a.png"), (96, 96), items)
    tile = ObjectTiles(48, 0)
    places = list(cut_into_windows(image, objects, tile, is_oriented=False))
    assert [place.objects.crowd.tolist() for place in places] == [[True], [True], [True], [True]]
    assert [place.objects.boxes()[0].tolist() for place in places[:2]] == [[0, 0, 48, 48], [48, 0, 60, 48]]
    tile = ObjectTiles(48, 0, min_object_share=0.0)
    places = list(cut_into_windows(image, objects, tile, is_oriented=False))
    assert [len(place.objects) for place in places] == [2, 2, 1, 1]  # Without the objects of other windows.


def test_share_of_empty_images_is_limited(tmp_path):
    write_dota(tmp_path, [f"empty_{number:03}" for number in range(20)] + [f"full_{number:03}" for number in range(9)])
    samples = describe(tmp_path, "dota").open(["train"], "oriented")
    assert len(samples) == 29
    for share, num_empty in ((0.0, 0), (0.1, 1), (0.5, 9), (0.9, 20), (1.0, 20)):
        names = ids(with_few_empty(samples, share, seed=0))
        assert sum(name.startswith("empty") for name in names) == num_empty and len(names) == 9 + num_empty
        assert names == ids(with_few_empty(samples, share, seed=0))
    assert ids(with_few_empty(samples, 0.5, seed=0)) != ids(with_few_empty(samples, 0.5, seed=1))


def test_class_aliases_and_ignored_names_are_used(tmp_path):
    written = write_dota(tmp_path, IMAGES)
    described = describe(tmp_path, "dota", classes=[{"name": "vessel", "as": ["boat", "SHIP"]}], leave_out=["plane"])
    assert described.names.names == ["vessel"]
    for item in described.open(["train"], "oriented"):
        assert len(item["labels"]) == sum(label == "ship" for label, _ in written[item["id"]])


@contextmanager
def changed_coco(root):
    """Yield the content of the COCO file, and write it with the changes that are made to it."""
    path = root / "instances.json"
    contents = json.loads(path.read_text())
    yield contents
    path.write_text(json.dumps(contents))


def dota_line(line):
    """Return a function that replaces the first object of an image."""

    def change(root):
        path = root / "annfiles" / "a_001.txt"
        lines = path.read_text().splitlines()
        lines[2] = line
        path.write_text("\n".join(lines) + "\n")

    return change


def coco_entry(kind, index=0, **values):
    """Return a function that changes an entry of a list of the COCO file."""

    def change(root):
        with changed_coco(root) as contents:
            contents[kind][index].update(values)

    return change


def repeat_image(**values):
    def change(root):
        with changed_coco(root) as contents:
            contents["images"].append(contents["images"][0] | values)

    return change


def remove(path):
    return lambda root: (root / path).unlink()


def test_bad_objects_can_be_skipped(tmp_path, caplog):
    written = write_dota(tmp_path, IMAGES)
    dota_line("110 10 130 10 130 20 110 20 ship 0")(tmp_path)
    samples = describe(tmp_path, "dota", bad_objects="skip").open(["train"], "oriented")
    assert len(samples[0]["labels"]) == len(written["a_001"]) - 1
    assert "train" in caplog.text and "a_001.txt, line 3" in caplog.text


def test_boxes_without_outlines_need_another_task(tmp_path):
    write_dota(tmp_path, IMAGES)
    with pytest.raises(ValueError, match=r"\.txt, line \d+.*--task oriented") as caught:
        describe(tmp_path, "dota").open(["train"], "instances")
    assert "bad_objects" not in str(caught.value)


def test_numbers_of_coco_may_be_text(tmp_path):
    write_coco(tmp_path, IMAGES)
    expected = describe(tmp_path, "coco").open(["train"], "instances")
    with changed_coco(tmp_path) as contents:
        for entry in contents["annotations"]:
            entry |= {"bbox": [str(value) for value in entry["bbox"]], "iscrowd": "0", "area": "12.5"}
            if isinstance(entry["segmentation"], list):
                entry["segmentation"] = [[str(value) for value in polygon] for polygon in entry["segmentation"]]
    found = describe(tmp_path, "coco", bad_objects="skip").open(["train"], "instances")
    for one, other in zip(found, expected, strict=True):
        for name in ("corners", "labels", "masks"):
            assert torch.equal(one[name], other[name])
        assert not one["crowd"].any() and (one["area"] == 12.5).all()


def test_flags_of_rows_may_be_text():
    objects = {
        "boxes": [[1, 2, 3, 4]] * 5,
        "crowd": ["0", "1", "false", "", None],
        "difficult": ["1", "0", 0, 1.0, True],
    }
    found = list(row_objects({**objects, "labels": [0] * 5}, None, "xywh", "row 0"))
    assert [one.is_crowd for one in found] == [False, True, False, False, False]
    assert [one.is_difficult for one in found] == [True, False, False, True, True]
    with pytest.raises(ValueError, match="difficult"):
        list(row_objects({"boxes": [[1, 2, 3, 4]], "difficult": ["x"]}, None, "xywh", "row 0"))


def test_small_objects_can_be_skipped(tmp_path):
    written = write_dota(tmp_path, IMAGES)
    sides = [np.linalg.norm(np.diff(corners, axis=0), axis=1).min() for _, corners in written["c_004"]]
    samples = describe(tmp_path, "dota", min_side=float(np.mean(sides))).open(["train"], "oriented")
    assert len(samples[2]["labels"]) == sum(np.array(sides) >= np.mean(sides))


def drop_corner(root):
    """Remove a coordinate of an oriented box."""
    path = root / SPLITS["voc oriented"]["annotations"] / "b_002.xml"
    path.write_text(re.sub("<x_left_bottom>.*?</x_left_bottom>", "", path.read_text()))


def turn_an_image(root):
    exif = Image.Exif()
    exif[274] = 3
    path = root / "images" / "c_004.png"
    Image.open(path).save(path, exif=exif)


MISTAKES = [
    ("dota", dota_line("10 10 30 10 30 20 10 20 submarine 0"), "a_001.txt, line 3: .*'submarine'"),
    ("dota", dota_line("10.1 10.1 20.1 13.4 20.1 13.4 40.1 20 ship 0"), "a_001.txt, line 3: .*area"),
    ("dota", dota_line("110 10 130 10 130 20 110 20 ship 0"), "line 3: .* outside .* 96"),
    ("dota", dota_line("1e308 10 30 10 30 20 10 20 ship 0"), "line 3: .* finite"),
    ("dota", dota_line("nan 10 30 10 30 20 10 20 ship 0"), "line 3: .* finite"),
    ("dota", dota_line("10 10 30 10 30 ship 0"), "a_001.txt, line 3"),
    ("dota", remove("annfiles/b_002.txt"), "b_002.jpg .*annfiles"),
    ("dota", remove("images/b_002.jpg"), "'b_002' .*annfiles"),
    ("dota", lambda root: write_dota(root / "images" / "more", ["b_002"]), "b_002.jpg and .*b_002.png"),
    ("voc", lambda root: write_voc(root / SPLITS["voc"]["annotations"], ["a_001"], False), "a_001"),
    ("voc oriented", drop_corner, "b_002.xml, object 0"),
    ("coco", repeat_image(file_name="x.png"), "images.* 10"),
    ("coco", repeat_image(id=99), "images.*file_name"),
    ("coco", coco_entry("images", height=70), "96 x 70"),
    ("coco", coco_entry("annotations", image_id=99), "annotation 0.* 99"),
    ("coco", coco_entry("annotations", category_id=9), "annotation 0.*category"),
    ("coco", coco_entry("annotations", bbox=["one", 2, 3, 4]), "annotation 0"),
    ("coco", coco_entry("annotations", bbox="1234"), "annotation 0"),
    ("coco", coco_entry("annotations", iscrowd="maybe"), "annotation 0.*iscrowd"),
    ("coco", coco_entry("annotations", segmentation=None), "annotation 0: .*outline"),
    ("coco", coco_entry("annotations", segmentation=[[1, 2, 3, 4]]), "annotation 0: .*polygon"),
    ("coco", coco_entry("annotations", segmentation=[[1, 2, 3, 1e9, 5, 6]]), "annotation 0: .* far"),
    (
        "coco",
        coco_entry("annotations", 1, segmentation={"size": [80, 96], "counts": "1"}),
        "annotation 1: .*run lengths '1'",
    ),
    ("coco", coco_entry("annotations", 1, segmentation={"size": [9, 9], "counts": [81]}), r"annotation 1: .*\[9, 9\]"),
    ("coco", turn_an_image, "c_004.png .*orientation"),
    ("coco", remove("images/c_004.png"), "'c_004'"),
    ("coco", remove("instances.json"), "instances.json"),
    ("coco", lambda root: root.rename(root.with_name("moved")), "`root`"),
]


@pytest.mark.parametrize(("kind", "mistake", "message"), MISTAKES)
def test_bad_file_is_refused(tmp_path, kind, mistake, message):
    WRITERS[kind](tmp_path)
    mistake(tmp_path)
    task = {"dota": "oriented", "coco": "instances"}.get(kind, "horizontal")
    with pytest.raises(ValueError, match=message):
        describe(tmp_path, kind).open(["train"], task)


def test_list_selects_images_of_split(tmp_path):
    write_voc(tmp_path, [*IMAGES, "scene 001"], True)
    settings = {"train": SPLITS["voc oriented"] | {"list": "train.txt"}}
    for lines, found in (
        ("c_004\na_001\n", ["c_004", "a_001"]),
        ("\ufeffscene 001\nc_004.png\n", ["scene 001", "c_004"]),
        ("c_004\nd_005\n", "'d_005' .*train.txt"),
        ("c_004\nc_004\n", "train.txt .*'c_004'"),
    ):
        (tmp_path / "train.txt").write_bytes(lines.encode())
        described = describe(tmp_path, "voc oriented", splits=settings)
        if isinstance(found, list):
            assert ids(described.open(["train"], "oriented")) == found
        else:
            with pytest.raises(ValueError, match=found):
                described.open(["train"], "oriented")


@pytest.mark.parametrize("names", [("north/a_001", "south/a_001", "b_002"), ("north/a_001", "south/b_002")])
def test_coco_images_with_same_name_are_matched(tmp_path, names):
    """Check images in folders with the same name, also images that are not in the COCO file."""
    written = {name: write_images(tmp_path / "images", [name])[name] for name in names if "/" not in name}
    for seed, name in enumerate(("north/a_001", "south/a_001", "north/b_002", "south/b_002")):
        objects = draw_objects(seed)
        path = tmp_path / "images" / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        draw_image(objects, seed).save(path)
        if name in names:
            written[name] = objects
    (tmp_path / "instances.json").write_text(json.dumps(coco_contents(written)))
    samples = describe(tmp_path, "coco").open(["train"], "horizontal")
    has_namesakes = "south/a_001" in names
    name_of_id = {(name if has_namesakes else Path(name).name): name for name in names}
    assert ids(samples) == sorted(name_of_id)
    for item in samples:
        name = name_of_id[item["id"]]
        picture = np.asarray(Image.open(tmp_path / "images" / f"{name}.png"))
        assert torch.equal(item["image"], torch.tensor(picture).permute(2, 0, 1))
        low = np.array([corners.min(0) for _, corners in written[name]])
        np.testing.assert_allclose(item["corners"].amin(1), low, atol=1e-4)
    (tmp_path / "train.txt").write_text(f"{names[1]}.png\n{names[0]}\n")
    listed = describe(tmp_path, "coco", splits={"train": SPLITS["coco"] | {"list": "train.txt"}})
    assert [name_of_id[image_id] for image_id in ids(listed.open(["train"], "horizontal"))] == [names[1], names[0]]
    (tmp_path / "images" / "north" / "a_001.png").unlink()
    with pytest.raises(ValueError, match="a_001|b_002"):
        describe(tmp_path, "coco").open(["train"], "horizontal")


def test_split_without_annotations_is_read(tmp_path):
    write_images(tmp_path / "images", IMAGES)
    samples = describe(tmp_path, "dota", splits={"train": {"images": "images"}}).open(["train"], "oriented")
    assert set(samples[0]) == {"id", "case", "image"}
    with pytest.raises(ValueError, match="a_001"):
        with_few_empty(samples, 0.0, seed=0)


def test_dicom_patient_in_two_splits_is_refused(tmp_path, monkeypatch):
    write_dota(tmp_path, IMAGES)
    write_dota(tmp_path / "test", ["d_005"])
    splits = {"train": SPLITS["dota"], "test": {"images": "test/images", "annotations": "test/annfiles"}}
    monkeypatch.setattr("modeling_vitp.data.leaks.patient_of", lambda path: f"PatientID {path.stem[:1]}")
    described = describe(tmp_path, "dota", splits=splits)
    described.check_disjoint(["train", "test"], "oriented")
    monkeypatch.setattr("modeling_vitp.data.leaks.patient_of", lambda path: "PatientID ann")
    with pytest.raises(ValueError, match="PatientID ann .*'train'.*'test'"):
        described.check_disjoint(["train", "test"], "oriented")
    allowed = describe(tmp_path, "dota", splits=splits, allow_shared_images=True)
    allowed.check_disjoint(["train", "test"], "oriented")


def test_scene_is_in_one_split(tmp_path):
    names = [f"{letter}_{number:03}" for letter in "abcd" for number in range(4)]
    write_dota(tmp_path, names)
    scenes = {f"images/{name}.png": f"scene {name[0]}" for name in names}
    (tmp_path / "scenes.json").write_text(json.dumps(scenes))
    common = SPLITS["dota"] | {"cases": "scenes.json"}
    ends = sorted(hashed_position(scene) for scene in set(scenes.values()))[1:3]
    splits = {"train": common | {"part": [0.0, sum(ends) / 2]}, "test": common | {"part": [sum(ends) / 2, 1.0]}}
    described = describe(tmp_path, "dota", splits=splits)
    described.check_disjoint(["train", "test"], "oriented")
    assert [len(described.open([name], "oriented")) for name in splits] == [8, 8]
    for name, chosen in (("train", names[::2]), ("test", names[1::2])):
        (tmp_path / f"{name}.txt").write_text("\n".join(chosen))
    described = describe(tmp_path, "dota", splits={name: common | {"list": f"{name}.txt"} for name in splits})
    with pytest.raises(ValueError, match="case scene a .*'train' and 'test'"):
        described.check_disjoint(["train", "test"], "oriented")


def test_rows_with_same_id_are_refused(tmp_path):
    objects = [{"bbox": [[2.0, 2, 9, 9]]}] * 3
    write_rows(tmp_path / "train.parquet", [Image.new("RGB", (20, 20))] * 3, objects, image_id=[4, 7, 4])
    with pytest.raises(ValueError, match="'train': rows 0 and 2 .*'image_id', 4"):
        described_rows(tmp_path, classes=["ship"]).open(["train"], "horizontal")


@pytest.mark.parametrize("marks", [{"iscrowd": 1}, {"iscrowd": 0, "ignore": 1}])
def test_crowd_and_ignore_equal_pycocotools(tmp_path, marks):
    (tmp_path / "images").mkdir()
    Image.new("RGB", (100, 100)).save(tmp_path / "images" / "a.png")
    boxes = [[5, 5, 20, 20], [40, 5, 20, 20], [10, 50, 80, 40]]
    entries = []
    for number, box in enumerate(boxes, 1):
        entry = {"id": number, "image_id": 1, "category_id": 1, "bbox": box, "iscrowd": 0, "area": box[2] * box[3]}
        entries.append(entry)
    entries[2] |= marks
    images = [{"id": 1, "file_name": "a.png", "height": 100, "width": 100}]
    content = {"images": images, "annotations": entries, "categories": [{"id": 1, "name": "ship"}]}
    (tmp_path / "boxes.json").write_text(json.dumps(content))
    found = [[*boxes[0], 0.7], [*boxes[1], 0.6], [10, 55, 20, 20, 0.9], [50, 60, 20, 20, 0.8], [*boxes[2], 0.5]]
    truth = COCO(str(tmp_path / "boxes.json"))
    scored = [{"image_id": 1, "category_id": 1, "bbox": one[:4], "score": one[4]} for one in found]
    scored = COCOeval(truth, truth.loadRes(scored), "bbox")
    scored.evaluate(), scored.accumulate(), scored.summarize()

    splits = {"train": {"images": "images", "annotations": "boxes.json"}}
    (item,) = describe(tmp_path, "coco", classes=["ship"], splits=splits).open(["train"], "horizontal")
    found = torch.tensor(found)
    prediction = {"labels": torch.zeros(5, dtype=torch.long), "scores": found[:, 4]}
    prediction["boxes"] = torch.cat([found[:, :2], found[:, :2] + found[:, 2:4]], 1)
    metric = evaluate.load(str(METRICS_FOLDER / "coco_average_precision"), num_labels=1)
    ours = metric.compute(predictions=[prediction], references=[reference(item, "horizontal")])
    assert ours["map"] == pytest.approx(scored.stats[0]) and 0 < ours["map"]


@pytest.mark.parametrize(("width", "height"), [(60, 40), (0, 0), ("?", 40), (120, 80)])
def test_voc_size_is_checked(tmp_path, width, height):
    Image.new("RGB", (60, 40)).save(tmp_path / "a.png")
    (tmp_path / "a.png.aux.xml").write_text("<PAMDataset></PAMDataset>")
    size = f"<size><width>{width}</width><height>{height}</height></size>"
    ship = voc_object("ship", np.array([[2, 3], [30, 33]]), False)
    (tmp_path / "a.xml").write_text(f"<annotation>{size}{ship}</annotation>")
    described = describe(tmp_path, "voc", splits={"train": {"images": ".", "annotations": "."}})
    if width == 120:
        with pytest.raises(ValueError, match="a.xml: .*120 x 80 .*a.png"):
            described.open(["train"], "horizontal")
    else:
        assert described.open(["train"], "horizontal").places[0].objects.boxes().tolist() == [[2, 3, 30, 33]]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"format": "kitti"}, "format.*'kitti'"),
        ({"format": None}, "`format`"),
        ({"class_property": "species"}, "class_property.*'dota'"),
        ({"classes": ["ship", "Ship"]}, "'Ship'"),
        ({"colour": 1}, "colour"),
        ({"splits": {"train": {"annotations": "x"}}}, "Split 'train': .*images"),
        ({"splits": {"train": {"images": "x"}}}, "Split 'train': .*x"),
        ({"splits": {"train": "images"}}, "Split 'train' .*mapping"),
    ],
)
def test_bad_data_settings_are_refused(tmp_path, settings, message):
    write_dota(tmp_path, IMAGES)
    with pytest.raises(ValueError, match=message):
        describe(tmp_path, "dota", **settings).open(["train"], "oriented")
