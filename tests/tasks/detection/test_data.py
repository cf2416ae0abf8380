"""Tests of the detection data sets: formats, rows, windows, splits and their errors."""

import dataclasses
import hashlib
import json
import re
import shutil
import tracemalloc
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
from georeferenced import ROTATED, feature, save_geojson, save_geotiff
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
from modeling_vitp.tasks.detection.prediction import write_geojson
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


@pytest.mark.parametrize("kind", SPLITS)
def test_formats_read_written_objects(tmp_path, kind):
    written = WRITERS[kind](tmp_path)
    samples = describe(tmp_path, kind).open(["train"], "horizontal")
    assert [samples[index]["id"] for index in range(len(samples))] == sorted(IMAGES)
    for item in (samples[index] for index in range(len(samples))):
        objects = written[item["id"]]
        assert item["image"].shape == (3, HEIGHT, WIDTH) and item["image"].dtype == torch.uint8
        assert item["labels"].tolist() == [NAMES.index(label) for label, _ in objects]
        corners = np.array([corners for _, corners in objects]).reshape(-1, 4, 2)
        if kind in ("dota", "voc oriented", "yolo"):
            np.testing.assert_allclose(item["corners"], corners, atol=1e-4)
        else:
            low, high = corners.min(1), corners.max(1)
            found = torch.cat([item["corners"].amin(1), item["corners"].amax(1)], 1)
            np.testing.assert_allclose(found, np.concatenate([low, high], 1), atol=1e-4)


def test_part_depends_on_its_seed(tmp_path):
    names = [f"a_{number:03}" for number in range(12)]
    write_dota(tmp_path, names)
    for seed in ({}, {"part_seed": 1}):
        settings = SPLITS["dota"] | {"part": [0.0, 0.5]} | seed
        samples = describe(tmp_path, "dota", splits={"train": settings}).open(["train"], "oriented")
        found = [place.id for place in samples.places]
        salted = [f"1/{name}" if seed else name for name in names]
        small = [hashlib.sha256(name.encode()).hexdigest()[0] < "8" for name in salted]
        assert found == [name for name, is_small in zip(names, small) if is_small] and 0 < len(found) < 12


@pytest.mark.parametrize("kind", SPLITS)
def test_tenth_of_single_folder_is_held_out(tmp_path, kind):
    WRITERS[kind](tmp_path / "data")
    inferred = DetectionData.infer(tmp_path / "data")
    parts = [inferred["splits"][split].pop("part") for split in ("train", "test")]
    assert inferred["splits"] == {"train": SPLITS[kind], "test": SPLITS[kind]}
    assert inferred["format"] == kind.split()[0] and sorted(map(str.lower, inferred["classes"])) == ["plane", "ship"]
    assert parts[0][0] == 0 and parts[0][1] == parts[1][0] and parts[1][1] == 1
    for split, part in zip(("train", "test"), parts):
        inferred["splits"][split]["part"] = part
    data = DetectionData.from_dict(inferred)
    train, test = ([place.id for place in data.open([split], "horizontal").places] for split in ("train", "test"))
    assert sorted(train + test) == sorted(IMAGES) and len(test) == 1


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
    write_yolo(tmp_path / "data", IMAGES)
    (tmp_path / "data" / "train.txt").write_text("./images/a_001.png\n./images/b_002.png\n")
    (tmp_path / "data" / "val.txt").write_text("images/c_004.png\n")
    (tmp_path / "data" / "data.yaml").write_text("path: data\ntrain: [train.txt]\nval: val.txt\ntest:\nnames: [p, s]")
    inferred = DetectionData.infer(tmp_path / "data")
    assert inferred["splits"]["val"] == SPLITS["yolo"] | {"list": "val.txt"} and inferred["classes"] == ["p", "s"]
    data = DetectionData.from_dict(inferred)
    found = {split: [place.id for place in data.open([split], "oriented").places] for split in data.splits}
    assert found == {"train": ["a_001", "b_002"], "val": ["c_004"]}
    (tmp_path / "data" / "data.yaml").write_text("train: [train.txt, val.txt]\nnames: [p, s]")
    with pytest.raises(ValueError, match="data.yaml"):
        DetectionData.infer(tmp_path / "data")


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


def test_unknown_folder_is_refused_with_template(tmp_path):
    write_images(tmp_path / "images", IMAGES)
    arguments = DetectionArguments(data_root=str(tmp_path))
    with pytest.raises(ValueError, match="coco.*--config: data: {root") as caught:
        DetectionData.from_arguments(arguments, tmp_path / "out")
    with pytest.raises(ValueError, match="nowhere"):
        DetectionData.from_arguments(DetectionArguments(data_root=str(tmp_path / "nowhere")), tmp_path / "out")
    template = yaml.safe_load(str(caught.value).split("--config: ")[1])
    DetectionData.from_dict(template["data"])


def test_root_may_be_relative(tmp_path, monkeypatch):
    write_dota(tmp_path / "data" / "ships", IMAGES)
    monkeypatch.chdir(tmp_path)
    samples = describe("data/ships", "dota").open(["train"], "oriented")
    assert len(samples) == len(IMAGES) and samples[0]["image"].shape == (3, HEIGHT, WIDTH)


@pytest.mark.parametrize("kind", ["coco", "yolo", "geojson"])
def test_outlines_become_masks(tmp_path, kind):
    written = WRITERS[kind](tmp_path)
    samples = describe(tmp_path, kind).open(["train"], "instances")
    for item in (samples[index] for index in range(len(samples))):
        assert item["masks"].dtype == torch.uint8 and item["masks"].shape == (len(item["labels"]), HEIGHT, WIDTH)
        for mask, (_, corners) in zip(item["masks"].numpy(), written[item["id"]], strict=True):
            drawn = draw_mask(corners)
            # OpenCV also draws the border of a polygon, the COCO reader does not.
            assert ((mask & drawn).sum() / (mask | drawn).sum()) > 0.75


@pytest.mark.parametrize("kind", ["coco", "yolo", "geojson"])
def test_polygons_become_smallest_rectangles(tmp_path, kind):
    written = WRITERS[kind](tmp_path)
    if kind == "coco":
        contents = json.loads((tmp_path / "instances.json").read_text())
        outlines = [corners.flatten().tolist() for objects in written.values() for _, corners in objects]
        for entry, outline in zip(contents["annotations"], outlines, strict=True):
            entry["segmentation"] = [outline]
        (tmp_path / "instances.json").write_text(json.dumps(contents))
    samples = describe(tmp_path, kind).open(["train"], "oriented")
    for item in (samples[index] for index in range(len(samples))):
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
    assert data.names.names == ["elm", "oak"] and data.class_property == "species"
    assert yaml.safe_load((tmp_path / "out" / "data.yaml").read_text())["data"]["class_property"] == "species"
    places = data.open(["train", "test"], "horizontal").places
    assert sorted((place.id, place.objects.labels.tolist()) for place in places) == [("a", [0]), ("b", [1])]
    for place in places:
        np.testing.assert_allclose(place.objects.boxes(), [[10, 10, 30, 25]], atol=1e-4)
    with pytest.raises(ValueError, match="'colour'.*species"):
        DetectionData.infer(root, class_property="colour")
    with pytest.raises(ValueError, match="class_property.*'dota'"):
        describe(root, "dota", class_property="species")


def test_predicted_features_are_labels(tmp_path):
    found = [
        {"label": 0, "score": 0.9, "corners": [[20, 10], [40, 22], [34, 32], [14, 20]]},
        {"label": 1, "score": 0.8, "polygons": [[[[50, 50], [60, 50], [60, 62], [50, 62], [50, 50]]]]},
    ]
    save_geotiff(tmp_path / "a.tif", np.zeros((HEIGHT, WIDTH, 3), np.uint8), ROTATED)
    with rasterio.open(tmp_path / "a.tif") as image:
        write_geojson([found], image, NAMES, tmp_path / "a.geojson")
    splits = {"train": {"images": ".", "annotations": "."}}
    (item,) = describe(tmp_path, "geojson", splits=splits).open(["train"], "horizontal")
    assert item["labels"].tolist() == [0, 1]
    expected = [[14, 10], [40, 32]], [[50, 50], [60, 62]]
    np.testing.assert_allclose(torch.stack([item["corners"].amin(1), item["corners"].amax(1)], 1), expected, atol=1e-3)


def test_tile_masks_need_little_memory(tmp_path):
    write_coco(tmp_path, IMAGES)
    tile = {"size": 40, "overlap": 10, "min_image_share": 0.1, "min_object_share": 0.1}
    wholes = describe(tmp_path, "coco").open(["train"], "instances")
    tiles = describe(tmp_path, "coco", splits={"train": SPLITS["coco"] | {"tile": tile}}).open(["train"], "instances")
    seen = 0
    for place, item in zip(tiles.places, (tiles[index] for index in range(len(tiles)))):
        left, top, right, bottom = place.window
        place = dataclasses.replace(place, window=None)
        whole = ObjectImages([place], None, True)[0]["masks"]
        assert torch.equal(item["masks"], whole[:, top:bottom, left:right])
        seen += len(item["masks"])
    assert seen > len(wholes)
    segmentation = [[1000, 1000, 1100, 1000, 1100, 1100]]
    many = dict(zip(("difficult", "crowd"), np.zeros((2, 100), bool)))
    objects = ImageObjects(
        np.zeros(100, np.int64), np.zeros((100, 4, 2)), **many, areas=np.ones(100), segmentations=(segmentation,) * 100
    )
    tracemalloc.start()
    masks = objects.masks((2048, 2048), (1000, 1000, 1100, 1100))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert masks.sum() > 0 and peak < 3 * 2048**2  # One mask of the image, and the masks of the tile.


def test_rows_with_any_column_names_are_read(tmp_path):
    found = write_images(tmp_path / "images", IMAGES)
    contents = coco_contents(found)
    rows = []
    for entry in contents["images"]:
        own = [item for item in contents["annotations"] if item["image_id"] == entry["id"]]
        label = [NAMES.index("plane" if item["category_id"] == 3 else "ship") for item in own]
        objects = {"bbox": [item["bbox"] for item in own], "category": label}
        rows.append(
            {"image": str(tmp_path / "images" / entry["file_name"]), "image_id": entry["id"], "objects": objects}
        )
    columns = {key: [row[key] for row in rows] for key in rows[0]}
    boxes = datasets.List(datasets.List(datasets.Value("float64")))
    labels = datasets.List(datasets.ClassLabel(names=["Ship", "Plane"]))
    features = {"image": datasets.Image(), "image_id": datasets.Value("int64")}
    features = datasets.Features(features | {"objects": {"bbox": boxes, "category": labels}})
    datasets.Dataset.from_dict(columns, features=features).to_parquet(tmp_path / "rows" / "train.parquet")

    described = {"dataset_name": str(tmp_path / "rows"), "classes": NAMES, "splits": {"train": "train"}}
    samples = DetectionData.from_dict(described).open(["train"], "horizontal")
    assert len(samples) == len(IMAGES)
    for item, objects in zip((samples[index] for index in range(len(samples))), found.values(), strict=True):
        assert item["labels"].tolist() == [NAMES.index(label) for label, _ in objects]
        low = np.array([corners.min(0) for _, corners in objects]).reshape(-1, 2)
        np.testing.assert_allclose(item["corners"].amin(1) if objects else np.zeros((0, 2)), low, atol=1e-4)

    parts = {
        "first": "train[:1]",
        "rest": "train[1:]",
        "windows": {"split": "train", "tile": {"size": 48, "overlap": 16}},
    }
    several = DetectionData.from_dict(described | {"splits": parts})
    joined, windows = several.open(["first", "rest"], "horizontal"), several.open(["windows"], "horizontal")
    assert len(joined) == len(IMAGES) and len(windows) == 6 * len(IMAGES)
    for index in range(len(IMAGES)):
        assert torch.equal(joined[index]["image"], samples[index]["image"])
        assert torch.equal(joined[index]["corners"], samples[index]["corners"])
        left, top = windows.places[6 * index + 4].start
        assert torch.equal(
            windows[6 * index + 4]["image"], samples[index]["image"][:, top : top + 48, left : left + 48]
        )
    several.check_disjoint(["first", "rest"], "horizontal")
    for other in ({"split": "train"}, "train[3:]"):
        with pytest.raises(ValueError, match="'a' and 'b' .*'train'"):
            DetectionData.from_dict(described | {"splits": {"a": "train", "b": other}}).check_disjoint(
                "ab", "horizontal"
            )

    named = {"columns": {"boxes": "objects.bbox", "labels": "objects.category"}, "box_format": "xyxy"}
    wrong = DetectionData.from_dict(described | named)
    with pytest.raises(ValueError, match=r"row \d+ of split 'train', object \d+: the box .* has no area"):
        wrong.open(["train"], "horizontal")
    with pytest.raises(ValueError, match="Split 'train' has no column 'objects.box'"):
        DetectionData.from_dict(described | {"columns": {"boxes": "objects.box"}}).open(["train"], "horizontal")


def test_areas_of_rows_are_read(tmp_path):
    numbers = datasets.List(datasets.Value("float32"))
    lists = {"bbox": datasets.List(numbers), "category": datasets.List(datasets.Value("int64")), "area": numbers}
    areas = [None, [None], [5.0]]
    rows = {
        "image": [Image.new("RGB", (32, 32), (seed, 0, 0)) for seed in range(3)],
        "objects": [{"bbox": [[1, 1, 9, 9]], "category": [0], "area": area} for area in areas],
    }
    features = datasets.Features({"image": datasets.Image(), "objects": lists})
    datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "train.parquet")
    settings = {"dataset_name": str(tmp_path), "classes": NAMES, "splits": {"train": "train"}}
    samples = DetectionData.from_dict(settings).open(["train"], "horizontal")
    found = [samples[index]["area"].tolist() for index in range(3)]
    assert np.isnan(found[:2]).all() and found[2] == [5.0]


def test_column_of_labels_is_needed_for_several_classes(tmp_path):
    rows = {
        "image": [Image.new("RGB", (32, 32))],
        "objects": [{"bbox": [[1, 1, 9, 9], [9, 9, 9, 9]], "category_id": [0, 1]}],
    }
    features = datasets.Dataset.from_dict(rows).features | {"image": datasets.Image()}
    datasets.Dataset.from_dict(rows, datasets.Features(features)).to_parquet(tmp_path / "train.parquet")
    settings = {"dataset_name": str(tmp_path), "splits": {"train": "train"}}
    with pytest.raises(ValueError, match="'train'.*'ship', 'plane'.*columns"):
        DetectionData.from_dict(settings | {"classes": ["ship", "plane"]}).open(["train"], "horizontal")
    named = settings | {"classes": ["ship", "plane"], "columns": {"labels": "objects.category_id"}}
    assert DetectionData.from_dict(named).open(["train"], "horizontal")[0]["labels"].tolist() == [0, 1]
    assert DetectionData.from_dict(settings | {"classes": ["ship"]}).open(["train"], "horizontal").count(["ship"])


def test_unlabeled_row_is_refused(tmp_path):
    """Check the label -1, which `datasets` uses for unlabeled rows."""
    write_images(tmp_path / "images", ["a_001"])
    objects = {"bbox": [[4.0, 4.0, 20.0, 20.0]], "category": [-1]}
    labels = datasets.List(datasets.ClassLabel(names=NAMES))
    features = {"image": datasets.Image(), "objects": {"bbox": datasets.List(datasets.List(datasets.Value("float64")))}}
    features["objects"]["category"] = labels
    rows = {"image": [str(tmp_path / "images" / "a_001.png")], "objects": [objects]}
    datasets.Dataset.from_dict(rows, datasets.Features(features)).to_parquet(tmp_path / "rows" / "train.parquet")
    described = {"dataset_name": str(tmp_path / "rows"), "classes": NAMES, "splits": {"train": "train"}}
    with pytest.raises(ValueError, match="row 0 of split 'train': object 0: .*-1"):
        DetectionData.from_dict(described).open(["train"], "horizontal")


def test_windows_have_their_objects(tmp_path):
    written = write_dota(tmp_path, IMAGES)
    tile = {"size": 48, "overlap": 16}
    described = describe(tmp_path, "dota", splits={"train": SPLITS["dota"] | {"tile": tile}})
    samples = described.open(["train"], "oriented")
    assert [place.id for place in samples.places[:6]] == [
        f"a_001__48__{left}___{top}" for top in (0, 32) for left in (0, 32, 48)
    ]
    whole = describe(tmp_path, "dota").open(["train"], "oriented")
    images = {item["id"]: item["image"] for item in (whole[index] for index in range(len(whole)))}
    for index, place in enumerate(samples.places):
        item, (left, top) = samples[index], place.start
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
    for share, empty in ((0.0, 0), (0.1, 1), (0.25, 3), (0.5, 9), (0.9, 20), (1.0, 20)):
        chosen = with_few_empty(samples, share, seed=0)
        names = [place.id for place in chosen.places]
        assert sum(name.startswith("empty") for name in names) == empty and len(names) == 9 + empty
        assert names == [place.id for place in with_few_empty(samples, share, seed=0).places]
    first, second = ([place.id for place in with_few_empty(samples, 0.5, seed).places] for seed in (0, 1))
    assert first != second


def test_class_aliases_and_ignored_names_are_used(tmp_path):
    written = write_dota(tmp_path, IMAGES)
    described = describe(tmp_path, "dota", classes=[{"name": "vessel", "as": ["boat", "SHIP"]}], leave_out=["plane"])
    samples = described.open(["train"], "oriented")
    assert described.names.names == ["vessel"]
    for item in (samples[index] for index in range(len(samples))):
        assert len(item["labels"]) == sum(label == "ship" for label, _ in written[item["id"]])


def rewrite(path, change):
    path.write_text(change(path.read_text()))


def replace_line(number, line):
    def change(text):
        lines = text.splitlines()
        lines[number] = line
        return "\n".join(lines) + "\n"

    return change


DOTA_MISTAKES = {
    "class": (replace_line(2, "10 10 30 10 30 20 10 20 submarine 0"), "a_001.txt, line 3: .*'submarine'"),
    "no area": (replace_line(2, "10 10 30 10 30 10 10 10 ship 0"), r"a_001.txt, line 3: the box .* has no area"),
    "no area but for rounding": (
        replace_line(2, "10.1 10.1 20.1 13.4 20.1 13.4 40.1 20 ship 0"),
        r"a_001.txt, line 3: the box .* has no area",
    ),
    "outside": (
        replace_line(2, "110 10 130 10 130 20 110 20 ship 0"),
        "line 3: the box .* outside the image of 96",
    ),
    "not to be held": (
        replace_line(2, "1e308 10 30 10 30 20 10 20 ship 0"),
        "line 3: the box .* finite",
    ),
    "not finite": (replace_line(2, "nan 10 30 10 30 20 10 20 ship 0"), "line 3: the box .* finite"),
    "five numbers": (
        replace_line(2, "10 10 30 10 30 ship 0"),
        "a_001.txt, line 3: .*'10 10 30 10 30 ship 0'",
    ),
}


@pytest.mark.parametrize("mistake", DOTA_MISTAKES)
def test_bad_line_is_refused(tmp_path, mistake):
    write_dota(tmp_path, IMAGES)
    change, message = DOTA_MISTAKES[mistake]
    rewrite(tmp_path / "annfiles" / "a_001.txt", change)
    with pytest.raises(ValueError, match=message):
        describe(tmp_path, "dota").open(["train"], "oriented")


def test_bad_objects_can_be_skipped(tmp_path, caplog):
    written = write_dota(tmp_path, IMAGES)
    rewrite(tmp_path / "annfiles" / "a_001.txt", DOTA_MISTAKES["outside"][0])
    samples = describe(tmp_path, "dota", bad_objects="skip").open(["train"], "oriented")
    assert len(samples[0]["labels"]) == len(written["a_001"]) - 1
    assert "train" in caplog.text and "a_001.txt, line 3" in caplog.text


@pytest.mark.parametrize("task", ["horizontal", "instances"])
def test_numbers_of_coco_may_be_text(tmp_path, task):
    write_coco(tmp_path, IMAGES)
    expected = list(describe(tmp_path, "coco").open(["train"], task))
    contents = json.loads((tmp_path / "instances.json").read_text())
    for entry in contents["annotations"]:
        entry |= {"bbox": [str(value) for value in entry["bbox"]], "iscrowd": "0", "area": "12.5"}
        if isinstance(entry["segmentation"], list):
            entry["segmentation"] = [[str(value) for value in polygon] for polygon in entry["segmentation"]]
    (tmp_path / "instances.json").write_text(json.dumps(contents))
    found = list(describe(tmp_path, "coco", bad_objects="skip").open(["train"], task))
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one["corners"], other["corners"]) and torch.equal(one["labels"], other["labels"])
        assert not one["crowd"].any() and (one["area"] == 12.5).all()
    assert sum(len(one["labels"]) for one in found) == len(contents["annotations"])


@pytest.mark.parametrize(
    "change", [{"bbox": ["one", 2, 3, 4]}, {"bbox": "1234"}, {"iscrowd": "maybe"}, {"area": "large"}]
)
def test_text_that_is_no_number_is_refused(tmp_path, change):
    write_coco(tmp_path, IMAGES)
    contents = json.loads((tmp_path / "instances.json").read_text())
    contents["annotations"][0] |= change
    (tmp_path / "instances.json").write_text(json.dumps(contents))
    with pytest.raises(ValueError, match="instances.json, annotation"):
        describe(tmp_path, "coco", bad_objects="skip").open(["train"], "horizontal")


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


def coco(change):
    def apply(root):
        contents = json.loads((root / "instances.json").read_text())
        change(contents)
        (root / "instances.json").write_text(json.dumps(contents))

    return apply


def drop_corner(root):
    """Replace the outline of an object by a polygon with too few points."""
    path = root / SPLITS["voc oriented"]["annotations"] / "b_002.xml"
    path.write_text(re.sub("<x_left_bottom>.*?</x_left_bottom>", "", path.read_text()))


def turn_an_image(root):
    exif = Image.Exif()
    exif[274] = 3
    path = root / "images" / "c_004.png"
    Image.open(path).save(path, exif=exif)


def folder_for_file(root):
    (root / "instances.json").unlink()
    (root / "instances.json").mkdir()


FILE_MISTAKES = [
    ("dota", lambda root: (root / "annfiles" / "b_002.txt").unlink(), "b_002.jpg .*annfiles"),
    ("dota", lambda root: (root / "images" / "b_002.jpg").unlink(), "'b_002' .*annfiles"),
    ("dota", lambda root: write_dota(root / "images" / "more", ["b_002"]), "b_002.jpg and .*b_002.png"),
    (
        "voc",
        lambda root: write_voc(root / "Annotations" / "Horizontal Bounding Boxes", ["a_001"], False),
        "a_001",
    ),
    (
        "coco",
        coco(lambda c: c["categories"].append({"id": 3, "name": "boat"})),
        "categories.* 3",
    ),
    ("coco", coco(lambda c: c["images"].append(c["images"][0])), "images.* 10"),
    (
        "coco",
        coco(lambda c: c["images"].append({**c["images"][0], "id": 99})),
        "images.*file_name",
    ),
    ("coco", coco(lambda c: c["annotations"][0].update(image_id=99)), "annotation 0.* 99"),
    ("coco", coco(lambda c: c["annotations"][0].update(category_id=9)), "annotation 0.*category"),
    ("coco", coco(lambda c: c["annotations"][0].update(bbox=[1, 2, -3, 4])), "annotation 0: the box .* has no area"),
    ("coco", coco(lambda c: c["images"][0].update(height=70)), "96 x 70"),
    ("coco", coco(lambda c: c["annotations"][0].update(segmentation=[[1, 2, 3, 4]])), "annotation 0: .*polygon"),
    ("coco", coco(lambda c: c["annotations"][0].update(segmentation=[1, 2, 3, 4, 5, 6])), r"list of polygons \["),
    (
        "coco",
        coco(lambda c: c["annotations"][0].update(segmentation=[[[1, 2], [3, 4], [5, 9]]])),
        "list of polygons",
    ),
    (
        "coco",
        coco(lambda c: c["annotations"][0].update(segmentation=["1,2 3,4 5,9"])),
        "annotation 0: .*outline",
    ),
    ("coco", coco(lambda c: c["annotations"][0].update(segmentation=[[1, 2, 3, 4, 5]])), "annotation 0: .*polygon"),
    ("coco", coco(lambda c: c["annotations"][0].update(segmentation=[[1, 2, 3, 1e9, 5, 6]])), "0: the polygon .* far"),
    ("coco", coco(lambda c: c["annotations"][1]["segmentation"].update(counts="1")), "1: the run lengths '1'"),
    ("coco", coco(lambda c: c["annotations"][1]["segmentation"].update(counts=[3])), "1: the run lengths"),
    ("coco", coco(lambda c: c["annotations"][1]["segmentation"].update(size=[9, 9])), r"run lengths .*\[9, 9\]"),
    ("coco", coco(lambda c: c["annotations"][0].pop("segmentation")), "annotation 0: .*outline"),
    ("voc oriented", drop_corner, "b_002.xml, object 0"),
    ("coco", turn_an_image, "c_004.png is stored with orientation 3"),
    ("coco", lambda root: (root / "images" / "c_004.png").unlink(), "'c_004'"),
    ("coco", lambda root: (root / "instances.json").unlink(), "instances.json"),
    ("coco", folder_for_file, "instances.json.*directory"),
    ("coco", lambda root: root.rename(root.with_name("moved")), "data: `root`"),
]


@pytest.mark.parametrize(("kind", "mistake", "message"), FILE_MISTAKES)
def test_bad_file_is_refused(tmp_path, kind, mistake, message):
    WRITERS[kind](tmp_path)
    mistake(tmp_path)
    with pytest.raises(ValueError, match=message):
        describe(tmp_path, kind).open(["train"], "instances" if kind == "coco" else "horizontal")


def test_list_selects_images_of_split(tmp_path):
    write_voc(tmp_path, IMAGES, True)
    (tmp_path / "train.txt").write_text("c_004\na_001\n")
    settings = {"train": SPLITS["voc oriented"] | {"list": "train.txt"}}
    samples = describe(tmp_path, "voc oriented", splits=settings).open(["train"], "oriented")
    assert [place.id for place in samples.places] == ["c_004", "a_001"]
    write_voc(tmp_path, ["scene 001"], True)
    (tmp_path / "train.txt").write_bytes("\ufeffscene 001\nc_004.png\n".encode())
    samples = describe(tmp_path, "voc oriented", splits=settings).open(["train"], "oriented")
    assert [place.id for place in samples.places] == ["scene 001", "c_004"]
    (tmp_path / "train.txt").write_text("c_004\nd_005\n")
    with pytest.raises(ValueError, match="'d_005' .*train.txt"):
        describe(tmp_path, "voc oriented", splits=settings).open(["train"], "oriented")
    (tmp_path / "train.txt").write_text("c_004\nc_004\n")
    with pytest.raises(ValueError, match="train.txt .*'c_004'"):
        describe(tmp_path, "voc oriented", splits=settings).open(["train"], "oriented")


@pytest.mark.parametrize("places", [("north/a_001", "south/a_001", "b_002"), ("north/a_001", "south/b_002")])
def test_coco_images_with_same_name_are_matched(tmp_path, places):
    """Check images in folders with the same name, also images that are not in the COCO file."""
    written = {place: write_images(tmp_path / "images", [place])[place] for place in places if "/" not in place}
    for seed, place in enumerate(("north/a_001", "south/a_001", "north/b_002", "south/b_002")):
        folder, name = place.split("/")
        objects = draw_objects(seed)
        (tmp_path / "images" / folder).mkdir(parents=True, exist_ok=True)
        draw_image(objects, seed).save(tmp_path / "images" / f"{place}.png")
        if place in places:
            written[place] = objects
    (tmp_path / "instances.json").write_text(json.dumps(coco_contents(written)))
    samples = describe(tmp_path, "coco").open(["train"], "horizontal")
    has_namesakes = "south/a_001" in places
    keys = {(place if has_namesakes else place.split("/")[-1]): place for place in places}
    assert [place.id for place in samples.places] == sorted(keys)
    for index, place in enumerate(samples.places):
        item = samples[index]
        picture = np.asarray(Image.open(tmp_path / "images" / f"{keys[place.id]}.png"))
        assert torch.equal(item["image"], torch.tensor(picture).permute(2, 0, 1))
        low = np.array([corners.min(0) for _, corners in written[keys[place.id]]])
        np.testing.assert_allclose(item["corners"].amin(1), low, atol=1e-4)
    (tmp_path / "train.txt").write_text(f"{places[1]}.png\n{places[0]}\n")
    listed = describe(tmp_path, "coco", splits={"train": SPLITS["coco"] | {"list": "train.txt"}})
    chosen = [place.id for place in listed.open(["train"], "horizontal").places]
    assert [keys[place] for place in chosen] == [places[1], places[0]]
    (tmp_path / "images" / "north" / "a_001.png").unlink()
    with pytest.raises(ValueError, match="a_001|b_002"):
        describe(tmp_path, "coco").open(["train"], "horizontal")


def test_split_without_annotations_is_read(tmp_path):
    write_images(tmp_path / "images", IMAGES)
    samples = describe(tmp_path, "dota", splits={"train": {"images": "images"}}).open(["train"], "oriented")
    assert set(samples[0]) == {"id", "case", "image"}
    with pytest.raises(ValueError, match="a_001"):
        with_few_empty(samples, 0.0, seed=0)


def test_image_in_two_splits_is_refused(tmp_path):
    write_dota(tmp_path, IMAGES)
    write_dota(tmp_path / "test", ["d_005"])
    (tmp_path / "test" / "images" / "e_006.png").symlink_to(tmp_path / "images" / "a_001.png")
    (tmp_path / "test" / "annfiles" / "e_006.txt").write_text("")
    splits = {"train": SPLITS["dota"], "test": {"images": "test/images", "annotations": "test/annfiles"}}
    described = describe(tmp_path, "dota", splits=splits)
    with pytest.raises(ValueError, match="e_006.png .*'train' and 'test'.*a_001.png"):
        described.check_disjoint(["train", "test"], "oriented")
    (tmp_path / "test" / "images" / "e_006.png").unlink()
    (tmp_path / "test" / "annfiles" / "e_006.txt").unlink()
    described.check_disjoint(["train", "test"], "oriented")
    assert len(described.open(["train", "test"], "oriented")) == 5


def test_dicom_patient_in_two_splits_is_refused(tmp_path, monkeypatch):
    write_dota(tmp_path, IMAGES)
    write_dota(tmp_path / "test", ["d_005"])
    monkeypatch.setattr("modeling_vitp.data.leaks.patient_of", lambda path: f"PatientID {path.stem[:1]}")
    splits = {"train": SPLITS["dota"], "test": {"images": "test/images", "annotations": "test/annfiles"}}
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


@pytest.mark.parametrize("stored", ["files", "rows"])
def test_shared_image_is_refused_unless_allowed(tmp_path, caplog, stored):
    write_dota(tmp_path, IMAGES)
    write_dota(tmp_path / "test", ["d_005"])
    first, other = tmp_path / "images" / "a_001.png", tmp_path / "test" / "images" / "d_005.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (HEIGHT, WIDTH, 3), np.uint8)).save(first)
    shutil.copy(first, other)
    splits = {"train": SPLITS["dota"], "test": {"images": "test/images", "annotations": "test/annfiles"}}
    described = {"root": str(tmp_path), "format": "dota", "classes": NAMES, "splits": splits}
    if stored == "rows":
        objects = {"bbox": [[2.0, 2.0, 9.0, 9.0]], "category": ["ship"]}
        for name, image in (("train", first), ("test", other)):
            row = {"image": [{"bytes": image.read_bytes(), "path": None}], "objects": [objects]}
            table = datasets.Dataset.from_dict(row).cast_column("image", datasets.Image())
            table.to_parquet(tmp_path / "rows" / f"{name}.parquet")
        splits = {"train": "train", "test": "test"}
        described = {"dataset_name": str(tmp_path / "rows"), "classes": NAMES, "splits": splits}
    with pytest.raises(ValueError, match="'test' .*'train'"):
        DetectionData.from_dict(described).check_disjoint(["train", "test"], "horizontal")
    allowed = DetectionData.from_dict(described | {"allow_shared_images": True})
    allowed.check_disjoint(["train", "test"], "horizontal")
    assert "'test'" in caplog.text


def test_rows_with_same_id_are_refused(tmp_path):
    row = {
        "image": [Image.new("RGB", (20, 20))] * 3,
        "image_id": [4, 7, 4],
        "objects": [{"bbox": [[2.0, 2, 9, 9]]}] * 3,
    }
    features = {"image": datasets.Image(), "image_id": datasets.Value("int64")}
    features["objects"] = {"bbox": datasets.List(datasets.List(datasets.Value("float64")))}
    rows = datasets.Dataset.from_dict(row, features=datasets.Features(features))
    rows.to_parquet(tmp_path / "train.parquet")
    described = {"dataset_name": str(tmp_path), "classes": ["ship"], "splits": {"train": "train"}}
    with pytest.raises(ValueError, match="Split 'train': rows 0 and 2 .*'image_id', 4"):
        DetectionData.from_dict(described).open(["train"], "horizontal")


@pytest.mark.parametrize("marks", [{"iscrowd": 1}, {"iscrowd": 1, "ignore": 1}, {"iscrowd": 0, "ignore": 1}])
def test_crowd_and_ignore_equal_pycocotools(tmp_path, marks):
    (tmp_path / "images").mkdir()
    Image.new("RGB", (100, 100)).save(tmp_path / "images" / "a.png")
    boxes = [[5, 5, 20, 20], [40, 5, 20, 20], [10, 50, 80, 40]]
    entries = [{"id": 1 + i, "image_id": 1, "category_id": 1, "bbox": box, "iscrowd": 0} for i, box in enumerate(boxes)]
    entries = [entry | {"area": box[2] * box[3]} for entry, box in zip(entries, boxes)]
    entries[2] |= marks
    images = [{"id": 1, "file_name": "a.png", "height": 100, "width": 100}]
    categories = [{"id": 1, "name": "ship"}]
    content = {"images": images, "annotations": entries, "categories": categories}
    (tmp_path / "boxes.json").write_text(json.dumps(content))
    found = [[*boxes[0], 0.7], [*boxes[1], 0.6], [10, 55, 20, 20, 0.9], [50, 60, 20, 20, 0.8], [*boxes[2], 0.5]]
    truth = COCO(str(tmp_path / "boxes.json"))
    scored = [{"image_id": 1, "category_id": 1, "bbox": one[:4], "score": one[4]} for one in found]
    scored = COCOeval(truth, truth.loadRes(scored), "bbox")
    scored.evaluate(), scored.accumulate(), scored.summarize()

    splits = {"train": {"images": "images", "annotations": "boxes.json"}}
    described = {"root": str(tmp_path), "format": "coco", "classes": ["ship"], "splits": splits}
    (item,) = DetectionData.from_dict(described).open(["train"], "horizontal")
    found = torch.tensor(found)
    prediction = {"labels": torch.zeros(5, dtype=torch.long), "scores": found[:, 4]}
    prediction["boxes"] = torch.cat([found[:, :2], found[:, :2] + found[:, 2:4]], 1)
    metric = evaluate.load(str(METRICS_FOLDER / "coco_average_precision"), num_labels=1)
    ours = metric.compute(predictions=[prediction], references=[reference(item, "horizontal")])
    assert ours["map"] == pytest.approx(scored.stats[0]) and 0 < ours["map"]


def test_voc_size_is_checked(tmp_path):
    (tmp_path / "d").mkdir()
    Image.fromarray(np.zeros((40, 60, 3), np.uint8)).save(tmp_path / "d" / "a.png")
    (tmp_path / "d" / "a.png.aux.xml").write_text("<PAMDataset></PAMDataset>")
    box = "".join(f"<{side}>{value}</{side}>" for side, value in zip(("xmin", "ymin", "xmax", "ymax"), (2, 3, 30, 33)))
    described = {"root": str(tmp_path), "format": "voc", "classes": NAMES}
    described = DetectionData.from_dict(described | {"splits": {"t": {"images": "d", "annotations": "d"}}})
    for width, height, fits in ((60, 40, True), (0, 0, True), ("?", 40, True), (120, 80, False), (40, 60, False)):
        size = f"<size><width>{width}</width><height>{height}</height></size>"
        content = f"<annotation>{size}<object><name>ship</name><bndbox>{box}</bndbox></object></annotation>"
        (tmp_path / "d" / "a.xml").write_text(content)
        if fits:
            assert described.open(["t"], "horizontal").places[0].objects.boxes().tolist() == [[2, 3, 30, 33]]
        else:
            with pytest.raises(ValueError, match=f"a.xml: .*{width} x {height} .*a.png"):
                described.open(["t"], "horizontal")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"format": "kitti"}, "format.*'kitti'"),
        ({"dataset_name": "x"}, "`root`"),
        ({"bad_objects": "mend"}, "bad_objects.*'mend'"),
        ({"classes": ["ship", "Ship"]}, "'Ship'"),
        ({"classes": [{"names": "ship"}]}, "'names'.*'name'"),
        ({"classes": []}, "classes"),
        ({"colour": 1}, "colour"),
        ({"splits": {"train": {"annotations": "x"}}}, "Split 'train': .*images"),
        ({"splits": {"train": {"images": "x"}}}, "Split 'train': image folder .*x"),
        ({"splits": {"train": {"images": "images", "tile": {"size": 9}}}}, "tile.*overlap"),
        ({"splits": {"train": "images"}}, "Split 'train' .*mapping.*images"),
        ({"splits": {}}, "'train'"),
    ],
)
def test_bad_data_settings_are_refused(tmp_path, settings, message):
    write_dota(tmp_path, IMAGES)
    with pytest.raises(ValueError, match=message):
        describe(tmp_path, "dota", **settings).open(["train"], "oriented")
