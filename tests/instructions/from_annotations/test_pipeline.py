"""Choice of images by split and list."""

import pytest
from annotated_images import NAMES, make, noise, write_voc

from modeling_vitp.data import layouts
from modeling_vitp.data.annotation_files import read_annotation, read_list
from modeling_vitp.data.leaks import leave_out_copies
from modeling_vitp.data.splits import choose_split


def test_test_images_are_held_out(tmp_path, capsys):
    root = tmp_path / "data"
    for split, names in NAMES.items():
        write_voc(root, split, names[:10])
    (root / "JPEGImages" / "004.png").write_bytes((root / "JPEGImages" / "061.png").read_bytes())
    rows = make("voc", root, tmp_path / "out")["train"]
    assert not set(rows["id"]) & {"004", *NAMES["test"]}
    assert "004.png is excluded" in capsys.readouterr().err
    assert "1 files were excluded" in (tmp_path / "out" / "README.md").read_text()

    (tmp_path / "list.txt").write_text("001\n002.png\n003\n004\n")
    rows = make("voc", root, tmp_path / "listed", "--split_list", tmp_path / "list.txt", "--kinds", "counting")["train"]
    assert set(rows["id"]) <= {"001", "002", "003"}
    (tmp_path / "list.txt").write_text("001\nnothing\n")
    with pytest.raises(ValueError, match=r"1 of 2 listed names .* nothing matches none"):
        make("voc", root, tmp_path / "listed", "--split_list", tmp_path / "list.txt")
    with pytest.raises(ValueError, match=r"'val' not found .*\['test', 'train'\]"):
        make("voc", root, tmp_path / "listed", "--split", "val")


def test_listed_name_must_be_unique(tmp_path):
    """List an image by its id or its unique name; all other images are held out."""
    for place, name in enumerate(("forest/1.png", "water/1.png", "water/2.png")):
        noise(tmp_path / "classes" / name, place, (16, 16))
    layout = layouts.ClassFolders(tmp_path / "classes")
    with pytest.raises(ValueError, match=r"1.png matches 'forest/1.png' .* or 'water/1.png'"):
        choose_split(layout, "train", ["1.png"])
    chosen, held_out = choose_split(layout, "train", ["forest/1.png", "2"])
    assert [*chosen] == ["forest/1.png", "water/2.png"] and held_out == {tmp_path / "classes" / "water" / "1.png"}

    for place, split in enumerate(("train", "test")):
        noise(tmp_path / "pairs" / split / "images" / "1.png", place, (16, 16))
    layout = layouts.Dota(tmp_path / "pairs")
    chosen, held_out = choose_split(layout, "train", ["1"])
    assert [*chosen.values()] == [(tmp_path / "pairs" / "train" / "images" / "1.png",)]
    assert held_out == {tmp_path / "pairs" / "test" / "images" / "1.png"}
    assert choose_split(layout, "all", ["train/images/1.png"]) == (chosen, held_out)


def test_lists_may_have_spaces_flags_and_bom(tmp_path):
    path = tmp_path / "list.txt"
    path.write_bytes("\ufeffscene 1\r\n süd/scene 2.png \r\n\r\n0003".encode())
    assert read_list(path) == ["scene 1", "süd/scene 2.png", "0003"]
    path.write_text("2008_000008 -1\n2008_000015  1\n2008_000019  0\n")
    assert read_list(path) == ["2008_000008", "2008_000015", "2008_000019"]
    path.write_bytes('\ufeff{"a": 1}'.encode())
    assert read_annotation(path) == {"a": 1}


def test_copies_of_test_images_are_excluded(tmp_path):
    for split in ("train", "test"):
        write_voc(tmp_path, split, NAMES[split][:3])
    lists = tmp_path / "ImageSets" / "Main"
    (lists / "train.txt").write_text("000\n001\n002\n060\n")
    (tmp_path / "JPEGImages" / "061.png").unlink()
    (tmp_path / "JPEGImages" / "061.png").symlink_to(tmp_path / "JPEGImages" / "002.png")
    kept, copies = leave_out_copies(*choose_split(layouts.PascalVOC(tmp_path), "train"))
    assert set(kept) == {"000", "001"}
    assert {path.stem for path, _ in copies} == {"002", "060"}
