"""The classes of files in a table."""

import pytest
from pictures import picture

from modeling_vitp.classification.data import ClassificationData, LabelTable
from modeling_vitp.training.fine_tuning_data import FileSample


def make(folder, rows, header="pid,label,fold"):
    (folder / "images").mkdir()
    for patient in range(3):
        for place in range(2):
            picture(8, 8, 10 * patient + place).save(folder / "images" / f"p{patient}_{place}.png")
    (folder / "labels.csv").write_text("\n".join([header, *rows]) + "\n")


def data(folder, **where):
    split = {"image": "images/{pid}_{name}.png", **({"where": where} if where else {})}
    table = {"file": "labels.csv", "name": "pid"}
    found = ClassificationData.from_dict({"root": str(folder), "table": table, "splits": {"train": split}})
    found.find_classes(["train"])
    samples = found.open(["train"])
    return {samples.id(index): found.classes[label] for index, label in enumerate(samples.labels.tolist())}


def test_a_row_is_of_all_images_of_a_patient(tmp_path):
    make(tmp_path, ["p0,ill,1", "p1,well,1", "p2,ill,2"])
    whole = {"p0/0": "ill", "p0/1": "ill", "p1/0": "well", "p1/1": "well", "p2/0": "ill", "p2/1": "ill"}
    assert data(tmp_path) == whole
    assert data(tmp_path, fold=1) == {name: label for name, label in whole.items() if not name.startswith("p2")}


def test_whole_numbers_are_found_where_some_are_missing(tmp_path):
    """As which pandas has them as floats."""
    make(tmp_path, ["p0,ill,1", "p1,well,1", "p2,ill,"])
    assert set(data(tmp_path, fold=1)) == {"p0/0", "p0/1", "p1/0", "p1/1"}


def test_a_row_is_not_of_files_of_one_name_in_several_folders(tmp_path):
    for place in ("north/0", "north/1", "south/0"):
        (tmp_path / place).parent.mkdir(exist_ok=True)
        picture(8, 8, len(list(tmp_path.rglob("*.png")))).save(tmp_path / f"{place}.png")

    def labels(pattern, rows):
        (tmp_path / "t.csv").write_text("\n".join(["file_name,label", *rows]) + "\n")
        settings = {"root": str(tmp_path), "table": {"file": "t.csv"}, "splits": {"train": {"image": pattern}}}
        found = ClassificationData.from_dict(settings)
        found.find_classes(["train"])
        samples = found.open(["train"])
        return [found.classes[label] for label in samples.labels.tolist()]

    for rows in (["0.png,forest", "1.png,water"], ["0,forest", "1,water"]):
        with pytest.raises(ValueError, match=r"t.csv, row 0: '0.*' could be .*north.0.png or .*south.0.png: "):
            labels("{area}/{name}.png", rows)
    assert labels("{area}/{name}.png", ["north,forest", "south,water"]) == ["forest", "forest", "water"]
    paths = ["north/0.png,forest", "1.png,water", "south/0.png,water"]
    assert labels("{area}/{name}.png", paths) == ["forest", "water", "water"]
    assert labels("{plane}/{patient}.png", ["0,forest", "1,water"]) == ["forest", "water", "forest"]


def test_a_row_is_not_of_files_of_one_name_in_two_splits(tmp_path):
    for place in ("train/0", "train/1", "test/0"):
        (tmp_path / place).parent.mkdir(exist_ok=True)
        picture(8, 8, len(list(tmp_path.rglob("*.png")))).save(tmp_path / f"{place}.png")

    def labels(rows, **where):
        (tmp_path / "t.csv").write_text("\n".join(["file_name,label,part", *rows]) + "\n")
        splits = {name: {"image": f"{name}/{{name}}.png"} for name in ("train", "test")}
        for name, split in splits.items():
            split |= {"where": {"part": where[name]}} if where else {}
        found = ClassificationData.from_dict({"root": str(tmp_path), "table": {"file": "t.csv"}, "splits": splits})
        found.find_classes(["train"])
        return [[found.classes[label] for label in found.open([name]).labels.tolist()] for name in splits]

    with pytest.raises(ValueError, match=r"t.csv, row 0: '0.png' could be .*train.0.png or .*test.0.png: "):
        labels(["0.png,forest,a", "1.png,water,a"])
    paths = ["train/0.png,forest,a", "train/1.png,water,a", "test/0.png,water,a"]
    assert labels(paths) == [["forest", "water"], ["water"]]
    named = ["0.png,forest,a", "1.png,water,a", "0.png,water,b"]
    assert labels(named, train="a", test="b") == [["forest", "water"], ["water"]]


def test_a_row_of_a_patient_is_not_that_of_a_file_called_so(tmp_path):
    for place in ("1/1", "1/2", "2/1"):
        (tmp_path / place).parent.mkdir(exist_ok=True)
        picture(8, 8, len(list(tmp_path.rglob("*.png")))).save(tmp_path / f"{place}.png")
    (tmp_path / "labels.csv").write_text("pid,label\n1,ill\n2,well\n")
    settings = {"root": str(tmp_path), "table": {"file": "labels.csv", "name": "pid"}}
    found = ClassificationData.from_dict(settings | {"splits": {"train": {"image": "{patient}/{number}.png"}}})
    found.find_classes(["train"])
    assert [found.classes[label] for label in found.open(["train"]).labels.tolist()] == ["ill", "ill", "well"]


@pytest.mark.parametrize(
    ("rows", "where", "message"),
    [
        (["p0,a,1", "p1,b,1", "p2,a,1"], {"fold": "tset"}, "no row of .*labels.csv has 'tset' in 'fold', but '1'"),
        (["p0,a,1", "p1,b,1", "p2,a,1", "p9,a,1"], {"fold": 1}, "row 3: no file of split 'train' is called 'p9'"),
        (["p0,0.5,1", "p1,1,1", "p2,2.25,1"], {}, "labels.csv, row 0: 0.5 is no class: give whole numbers, or names"),
        (["p0,a,1", "p1,b,1"], {}, "p2_0.png has no row in"),
    ],
)
def test_what_is_wrong_in_a_table_is_named(tmp_path, rows, where, message):
    make(tmp_path, rows)
    with pytest.raises(ValueError, match=message):
        data(tmp_path, **where)


@pytest.mark.parametrize(("no_class", "is_taken"), [(None, True), ("none", False)])
def test_an_empty_cell_is_no_word_for_an_image_without_classes(tmp_path, no_class, is_taken):
    """It may be one that nobody has looked at."""
    picture(8, 8).save(tmp_path / "0.png")
    (tmp_path / "labels.csv").write_text("file_name,label\n0.png,\n")
    samples = [FileSample("0", {}, (tmp_path / "0.png",), None)]
    table = LabelTable("labels.csv", no_class=no_class)
    if is_taken:
        assert table.labels_of(samples, tmp_path, None, "train", {})[1] == [[]]
    else:
        with pytest.raises(ValueError, match="row 0: 'label' is empty: give 'none' if it has none of the classes"):
            table.labels_of(samples, tmp_path, None, "train", {})


def test_a_table_with_semicolons_is_told_as_such(tmp_path):
    (tmp_path / "labels.csv").write_text("file_name;label\n0.png;a\n")
    with pytest.raises(ValueError, match="has no column 'file_name', only file_name;label. Save it with commas"):
        LabelTable("labels.csv").read(tmp_path)
