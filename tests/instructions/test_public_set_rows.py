import json

import medical_set_data  # noqa: F401, which adds its miniatures
import pytest
from public_set_data import MINIATURES, dior_rsvg, save_text

from modeling_vitp.instructions.mixture_file import load_mixture
from modeling_vitp.instructions.public_set import HeldOut
from modeling_vitp.instructions.public_set_rows import FOLDER, load_public_set, make_rows, public_set_names
from modeling_vitp.instructions.validation import validate
from modeling_vitp.recipes import make_public_set


def make(name, folder, output, **options):
    made = make_rows(load_public_set(name)(folder), name, output, **options)
    return made, [json.loads(line) for line in made.annotation.read_text().splitlines()]


@pytest.mark.parametrize("name", MINIATURES)
def test_a_miniature_becomes_rows_that_pass_the_validation_and_are_the_same_again(name, tmp_path):
    folder = tmp_path / "data" / name
    expected = MINIATURES[name](folder)
    made, rows = make(name, folder, tmp_path / "a")
    assert (made.rows, made.unused) == (expected, []) and len(rows) == expected
    again, _ = make(name, folder, tmp_path / "b")
    assert made.annotation.read_bytes() == again.annotation.read_bytes()
    kind = load_public_set(name)
    source = {"name": name, "annotation": str(made.annotation), "image_root": str(made.image_root)}
    report = validate(load_mixture({"sources": [{**source, "tasks": list(kind.tasks)}]}), 0)[0]
    assert report.passed and report.rows == expected and not any(report.counts.values()), report.examples


def test_each_set_has_a_miniature_and_a_file_that_can_be_copied():
    assert public_set_names() == sorted(MINIATURES)
    for path in FOLDER.glob("*.py"):
        assert len(path.read_text().splitlines()) <= 60, path
        assert "from ." not in path.read_text(), path  # a copy lies elsewhere
    for name in public_set_names():
        kind = load_public_set(name)
        assert kind.title and kind.license and kind.obtain.startswith("https://") and kind.layout and kind.seen
        assert (kind.modality or kind.general) and kind.tasks


def test_files_of_held_out_splits_are_not_read(tmp_path):
    dior_rsvg(tmp_path / "data")
    save_text(tmp_path / "data/Annotations/test/00009.xml", "no XML")
    public_set = load_public_set("dior_rsvg")(tmp_path / "data")
    for name in ("test.txt", "val.txt", "RSVQA_LR_test.json", "a/evaluation/list.txt"):
        with pytest.raises(HeldOut, match="is not read"):
            public_set.lines(name)
    assert len(public_set.files("Annotations/**/*.xml")) == 4


def test_rows_about_images_of_the_test_split_are_left_out_unless_they_are_asked_for(tmp_path):
    dior_rsvg(tmp_path / "data")
    made, rows = make("dior_rsvg", tmp_path / "data", tmp_path)
    assert made.held_out == 1 and [row["id"] for row in rows] == ["0", "1", "6"]
    made, rows = make("dior_rsvg", tmp_path / "data", tmp_path, keep_shared=True)
    assert made.held_out == 0 and [row["id"] for row in rows] == ["0", "1", "3", "6"]


def test_the_box_is_written_on_the_grid(tmp_path):
    dior_rsvg(tmp_path / "data")
    _, rows = make("dior_rsvg", tmp_path / "data", tmp_path)
    question, answer = (message["content"] for message in rows[0]["messages"])
    assert answer == "<ref>The ship 0 at the pier</ref><box>[[62, 125, 312, 375]]</box>"
    assert "The ship 0 at the pier" in question


def test_what_is_broken_is_named_and_the_rest_goes_on(tmp_path, capsys):
    folder = tmp_path / "data" / "dior_rsvg"
    dior_rsvg(folder)
    (folder / "JPEGImages/00001.jpg").write_bytes(b"no picture")
    assert make_public_set.main(["dior_rsvg", str(folder)]) == 0
    said = capsys.readouterr()
    assert said.err.count("not used: ") == 2 and "00001.jpg" in said.err
    assert "1 rows; the paper's table has 27,000, a difference of -26,999; the released mixture" in said.out
    assert (tmp_path / "data/dior_rsvg.unused.txt").read_text().count("00001.jpg") == 2
