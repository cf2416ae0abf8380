"""Which images are taken."""

import json

import pytest
from annotated_images import LAYOUTS, NAMES, make, noise, write_coco, write_voc

from modeling_vitp.instructions.from_annotations import layouts
from modeling_vitp.instructions.from_annotations.formats import read_annotation, read_list
from modeling_vitp.instructions.from_annotations.pipeline import annotate_all, choose_split, leave_out_copies


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


def test_a_name_of_a_list_is_that_of_one_image(tmp_path):
    """By its id, or by a name that no other has; all others are held out, whatever they are called."""
    for place, name in enumerate(("forest/1.png", "water/1.png", "water/2.png")):
        noise(tmp_path / "classes" / name, place, (16, 16))
    layout = layouts.ClassFolders(tmp_path / "classes")
    with pytest.raises(ValueError, match=r"1.png of the list could be .*'forest/1.png' and 'water/1.png'"):
        choose_split(layout, "train", ["1.png"])
    chosen, held_out = choose_split(layout, "train", ["forest/1.png", "2"])
    assert [*chosen] == ["forest/1.png", "water/2.png"] and held_out == {tmp_path / "classes" / "water" / "1.png"}

    for place, split in enumerate(("train", "test")):
        noise(tmp_path / "pairs" / split / "images" / "1.png", place, (16, 16))
    layout = layouts.Dota(tmp_path / "pairs")
    chosen, held_out = choose_split(layout, "train", ["1"])
    assert [*chosen.values()] == [(tmp_path / "pairs" / "train" / "images" / "1.png",)]
    assert held_out == {tmp_path / "pairs" / "test" / "images" / "1.png"}


def test_names_of_a_list_may_have_spaces_and_the_file_a_mark_of_its_encoding(tmp_path):
    path = tmp_path / "list.txt"
    path.write_bytes("\ufeffscene 1\r\n süd/scene 2.png \r\n\r\n0003".encode())
    assert read_list(path) == ["scene 1", "süd/scene 2.png", "0003"]
    path.write_text("2008_000008 -1\n2008_000015  1\n2008_000019  0\n")
    assert read_list(path) == ["2008_000008", "2008_000015", "2008_000019"]
    path.write_bytes('\ufeff{"a": 1}'.encode())
    assert read_annotation(path) == {"a": 1}


def test_a_file_of_images_alone_and_one_with_an_image_twice_are_named(tmp_path):
    write_coco(tmp_path / "data", "train", NAMES["train"][:3])
    file = tmp_path / "data" / "annotations" / "instances_train2017.json"
    contents = json.loads(file.read_text())
    file.write_text(json.dumps({key: value for key, value in contents.items() if key != "annotations"}))
    layout = layouts.Coco(tmp_path / "data")
    with pytest.raises(ValueError, match="instances_train2017.json has no `annotations`"):
        annotate_all(layout, choose_split(layout, "train")[0])
    contents["images"].append(contents["images"][0] | {"id": 10**6})
    file.write_text(json.dumps(contents))
    with pytest.raises(ValueError, match="two entries of `images` have the file_name '.*': join them"):
        choose_split(layouts.Coco(tmp_path / "data"), "train")


def test_an_image_that_is_also_in_the_test_split_is_left_out_by_list_and_by_link(tmp_path):
    for split in ("train", "test"):
        write_voc(tmp_path, split, NAMES[split][:3])
    lists = tmp_path / "ImageSets" / "Main"
    (lists / "train.txt").write_text("000\n001\n002\n060\n")
    (tmp_path / "JPEGImages" / "061.png").unlink()
    (tmp_path / "JPEGImages" / "061.png").symlink_to(tmp_path / "JPEGImages" / "002.png")
    kept, copies = leave_out_copies(*choose_split(layouts.PascalVOC(tmp_path), "train"))
    assert set(kept) == {"000", "001"}
    assert {path.stem for path, _ in copies} == {"002", "060"}


BAD_FILES = {
    "voc": [
        b"",
        b"<annotation",
        b"\xff\xfe\x00",
        b'<?xml version="1.0" encoding="none"?><a/>',
        b"<a><object><name>x</name></object></a>",
        b"<a><object><bndbox><xmin>1</xmin><ymin>1</ymin><xmax>9</xmax><ymax>9</ymax></bndbox></object></a>",
        *(
            f"<a><object><name>x</name><bndbox><xmin>{x}</xmin><ymin>1</ymin><xmax>9</xmax><ymax>9</ymax></bndbox>"
            "</object></a>".encode()
            for x in ("nan", "-inf", "", "9", "1e999", "a")
        ),
    ],
    "dota": [
        b"1 2 3",
        b"\xff\xff",
        b"nan 1 9 1 9 9 1 9 x 0",
        b"1 1 inf 1 9 9 1 9 x 0",
        b"1 1 9 1 9 9 1 9",
        b"1 1 1 1 1 1 1 1 x",
    ],
}


@pytest.mark.parametrize(("layout", "content"), [(name, one) for name, files in BAD_FILES.items() for one in files])
def test_a_bad_annotation_file_is_named_and_can_be_skipped(tmp_path, capsys, layout, content):
    LAYOUTS[layout][0](tmp_path / "data", "train", NAMES["train"][:12])
    file = {"voc": "Annotations/003.xml", "dota": "train/labelTxt/003.txt"}[layout]
    (tmp_path / "data" / file).write_bytes(content)
    read = layouts.LAYOUTS[layout](tmp_path / "data")
    chosen, _ = choose_split(read, {"voc": "train", "dota": "train"}[layout])
    with pytest.raises(ValueError, match=file):
        annotate_all(read, chosen)
    images = annotate_all(read, chosen, "skip")
    assert "003 is left out" in capsys.readouterr().err
    assert len(images) == 11 and not any("003" in image.id for image in images)


def test_the_command_goes_on_without_what_is_bad(tmp_path, capsys):
    write_voc(tmp_path / "data", "train", NAMES["train"][:12])
    (tmp_path / "data" / "Annotations" / "003.xml").write_text("<annotation")
    rows = make("voc", tmp_path / "data", tmp_path / "out", "--on_error", "skip")["train"]
    assert "003.xml is no XML" in capsys.readouterr().err
    assert "003" not in rows["id"] and len(rows) > 5
    with pytest.raises(ValueError, match="003.xml is no XML"):
        make("voc", tmp_path / "data", tmp_path / "out")


@pytest.mark.parametrize(
    ("kind", "change"),
    [
        ("annotations", {"bbox": [1, 2, "x", 4]}),
        ("annotations", {"bbox": [1, 2, float("nan"), 4]}),
        ("annotations", {"bbox": 3}),
        ("annotations", {"bbox": None}),
        ("annotations", {"category_id": 99}),
        ("annotations", {"category_id": []}),
        ("annotations", {"area": "large"}),
        ("annotations", {"area": float("inf")}),
        ("annotations", {"caption": 3}),
        ("annotations", {"image_id": None}),
        ("images", {"file_name": 3}),
        ("images", {"file_name": None}),
        ("images", {"id": []}),
        ("images", {"width": "wide"}),
        ("categories", {"name": 3}),
        ("categories", {"id": {}}),
    ],
)
def test_a_bad_entry_of_coco_is_named(tmp_path, kind, change):
    write_coco(tmp_path / "data", "train", NAMES["train"][:6])
    file = tmp_path / "data" / "annotations" / "instances_train2017.json"
    contents = json.loads(file.read_text())
    contents[kind][1] |= change
    file.write_text(json.dumps(contents))
    read = layouts.Coco(tmp_path / "data")
    with pytest.raises(ValueError, match="instances_train2017.json"):
        annotate_all(read, choose_split(read, "train")[0])
    if (kind == "annotations" and "image_id" not in change) or "width" in change:  # it is of one image
        assert len(annotate_all(read, choose_split(read, "train")[0], "skip")) == 5


@pytest.mark.parametrize("way", ["../out.png", "absolute", "link.png", "images/../../out.png"])
def test_a_file_name_of_coco_does_not_leave_the_root(tmp_path, capsys, way):
    write_coco(tmp_path / "data", "train", NAMES["train"][:4])
    noise(tmp_path / "out.png", 5)
    (tmp_path / "data" / "images" / "link.png").symlink_to(tmp_path / "out.png")
    file = tmp_path / "data" / "annotations" / "instances_train2017.json"
    contents = json.loads(file.read_text())
    contents["images"][1]["file_name"] = str(tmp_path / "out.png") if way == "absolute" else way
    inside = tmp_path / "data" / "images" / "train2017" / "000.png"
    contents["images"][0]["file_name"] = str(inside)  # absolute, and below the root
    file.write_text(json.dumps(contents))
    layout = layouts.Coco(tmp_path / "data")
    chosen, _ = choose_split(layout, "train")
    with pytest.raises(ValueError, match="is not below .*data|cannot be read"):
        annotate_all(layout, chosen)
    images = annotate_all(layout, chosen, "skip")
    assert [image.paths[0].name for image in images] == ["000.png", "002.png", "003.png"]
    assert "is left out" in capsys.readouterr().err


def test_an_image_that_is_a_link_out_of_the_data_is_not_taken(tmp_path):
    for number in range(3):
        noise(tmp_path / "data" / "ship" / f"{number}.png", number)
    noise(tmp_path / "private.png", 5)
    (tmp_path / "data" / "ship" / "3.png").symlink_to(tmp_path / "private.png")
    layout = layouts.ClassFolders(tmp_path / "data")
    with pytest.raises(ValueError, match="3.png' is not below .*data, but is .*private.png"):
        annotate_all(layout, choose_split(layout, "all")[0])
