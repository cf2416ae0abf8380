"""Which images are taken."""

import pytest
from annotated_images import NAMES, make, write_voc


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
