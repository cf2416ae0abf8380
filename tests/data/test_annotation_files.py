"""Objects of annotation files."""

import os
from pathlib import Path
from xml.etree import ElementTree

import pytest

from modeling_vitp.data.layouts.coco import CocoFile, check_coco, coco_object
from modeling_vitp.data.layouts.dota import dota_objects
from modeling_vitp.data.layouts.voc import voc_objects
from modeling_vitp.data.layouts.yolo import yolo_label

CORNERS = [(10.0, 20.0), (30.0, 22.0), (29.0, 32.0), (9.0, 30.0)]


def test_dior_r_box_has_corners():
    names = ("left_top", "right_top", "right_bottom", "left_bottom")
    sides = "".join(f"<x_{name}>{x}</x_{name}><y_{name}>{y}</y_{name}>" for name, (x, y) in zip(names, CORNERS))
    document = f"<annotation><object><name>Dam</name><robndbox>{sides}</robndbox></object></annotation>"
    (found,) = voc_objects(ElementTree.fromstring(document), "00001.xml")
    assert found.corners == tuple(CORNERS) and found.box == (9, 20, 30, 32) and found.label == "Dam"
    broken = document.replace("<y_right_top>22.0</y_right_top>", "")
    with pytest.raises(ValueError, match="00001.xml, object 0 "):
        voc_objects(ElementTree.fromstring(broken), "00001.xml")


def test_dota_header_is_skipped():
    numbers = " ".join(str(value) for point in CORNERS for value in point)
    text = f"imagesource:GoogleEarth\ngsd:0.3\n{numbers} ship 1\n\n{numbers} plane\n"
    first, second = dota_objects(text, "P0001.txt")
    assert (first.label, first.is_difficult, first.where) == ("ship", True, "P0001.txt, line 3")
    assert (second.label, second.is_difficult, second.corners) == ("plane", False, tuple(CORNERS))


@pytest.mark.parametrize("end", ["storage tank 0", "ship easy", "ship 0 1"])
def test_dota_class_with_space_is_refused(end):
    with pytest.raises(ValueError, match="P1.txt, line 2: .*" + end):
        dota_objects(f"1 1 9 1 9 9 1 9 ship 2\n1 1 9 1 9 9 1 9 {end}", "P1.txt")


def test_coco_annotation_keeps_segmentation():
    annotation = {"id": 4, "category_id": 7, "bbox": [1, 2, 3, 4], "iscrowd": 1, "segmentation": [[1, 2, 4, 2, 4, 6]]}
    found = coco_object(annotation, {7: "ship"}, "instances.json")
    assert (found.box, found.label, found.is_crowd) == ((1, 2, 4, 6), "ship", True)
    assert found.segmentation == [[1, 2, 4, 2, 4, 6]] and found.where == "instances.json, annotation 4"


def test_duplicate_category_id_raises_error():
    with pytest.raises(ValueError, match="two entries of `categories` have the id 1"):
        check_coco({"images": [], "categories": [{"id": 1, "name": "a"}, {"id": 1, "name": "b"}]}, "instances.json")


@pytest.mark.parametrize(("caption", "expected"), [("a red car", "a red car"), ("", None), (" ", None), (None, None)])
def test_empty_caption_becomes_none(caption, expected):
    annotation = {"id": 1, "bbox": [1, 2, 3, 4], "category_id": 1, "caption": caption}
    assert coco_object(annotation, {1: "car"}, "a.json").caption == expected


def test_label_of_a_yolo_image_below_a_root_with_dots(tmp_path):
    image = tmp_path / "data" / "images" / "train" / "a.png"
    label = yolo_label(image, tmp_path / "run" / ".." / "data")
    assert os.path.normpath(label) == str(tmp_path / "data" / "labels" / "train" / "a.txt")


@pytest.mark.parametrize("stated", [{"height": "30", "width": "40"}, {"height": 0, "width": 0}, {"height": None}, {}])
def test_size_of_coco_image_may_be_text_or_missing(stated):
    contents = {"images": [{"id": 1, "file_name": "a.png", **stated}], "categories": [], "annotations": []}
    file = CocoFile(Path("a.json"), contents)
    assert file.objects(file.images[0], Path("a.png"), (30, 40)) == []
    file.images[0] |= {"height": "40", "width": "30"}
    with pytest.raises(ValueError, match="a.json: 30 x 40 .* 40 x 30"):
        file.objects(file.images[0], Path("a.png"), (30, 40))
