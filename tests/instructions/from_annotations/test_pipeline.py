"""Choice of images by split and list."""

import pytest
from annotated_images import NAMES, make, write_voc

from modeling_vitp.data import layouts
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
