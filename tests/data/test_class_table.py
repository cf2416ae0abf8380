"""Tables of classes as a layout: images, splits and classes as written, recognition, and errors."""

import re

import numpy as np
import pandas as pd
import pytest
from annotated_images import LAYOUTS, NAMES, make, noise, turns_of

from modeling_vitp.adaptation.labels import read_labels, with_label_fraction
from modeling_vitp.data import layouts
from modeling_vitp.data.layouts import ClassTable, recognize_layout
from modeling_vitp.data.layouts.table import find_class_columns
from modeling_vitp.data.splits import choose_split
from modeling_vitp.instructions.from_annotations.labels import annotate_all
from modeling_vitp.instructions.from_annotations.pipeline import make_instructions_command
from modeling_vitp.tasks.classification.data import ClassificationData

CLASSES = ("AnnualCrop", "River", "sea_lake")
WORDS = {"AnnualCrop": "annual crop", "River": "river", "sea_lake": "sea lake"}
SIZE = (16, 16)
NUMBER = 24


def split_of(index):
    return ("train", "train", "val", "test")[index % 4]


def write_images(root, folders):
    """Write images, and return the class of each path below the root. Classes differ within each folder and split."""
    labels = {}
    for index in range(NUMBER):
        path = f"{folders(index)}{index:02}.png"
        noise(root / path, index, SIZE)
        labels[path] = CLASSES[index // 4 % 3]
    return labels


def write_rows(root, file, rows):
    frame = pd.DataFrame(rows)
    if file.endswith(".parquet"):
        frame.to_parquet(root / file)
    else:
        frame.to_csv(root / file, sep="\t" if file.endswith(".tsv") else ",", index=False)


def write_split_column(root, file="labels.csv"):
    labels = write_images(root, lambda index: f"images/{('north', 'south')[index % 2]}/")
    rows = []
    for index, (path, label) in enumerate(labels.items()):
        split = {"train": "Training", "val": "valid", "test": "test"}[split_of(index)]
        rows.append({"Path": path, "Class": label, "Split": split})
    write_rows(root, file, rows)
    return labels


def write_tables_of_splits(root):
    labels = write_images(root, lambda index: "")
    names = {"train": "train.csv", "val": "valid_labels.csv", "test": "test.csv"}
    for split, file in names.items():
        rows = []
        for index, (path, label) in enumerate(labels.items()):
            if split_of(index) == split:
                rows.append({"file_name": path, "label": label})
        write_rows(root, file, rows)
    return labels


def write_same_names_in_splits(root):
    """Write images of the same names in the folders of the splits, which the tables of the splits tell apart."""
    labels = {}
    for split in ("train", "val", "test"):
        rows = []
        for number in range(6):
            path = f"{split}/images/{number}.png"
            label = CLASSES[(number + len(split)) % 3]
            noise(root / path, 10 * number + len(split), SIZE)
            labels[path] = label
            rows.append({"image_id": str(number), "category": label})
        write_rows(root, f"{split}.tsv", rows)
    return labels


def write_split_folders(root):
    labels = write_images(root, lambda index: f"photos/{split_of(index)}/site {index % 3}/")
    rows = [{"filename": path.rpartition("/")[2], "category": label} for path, label in labels.items()]
    write_rows(root, "labels.tsv", rows)
    return labels


def write_unsplit(root):
    """Write images of several suffixes, in folders of the places where they were taken."""
    labels = {}
    for index in range(NUMBER):
        path = f"{('north', 'south')[index % 2]}/{index:02}.{('png', 'jpg')[index % 3 // 2]}"
        noise(root / path, index, SIZE)
        labels[path] = CLASSES[index // 4 % 3]
    write_rows(root, "labels.parquet", [{"image": path, "label": label} for path, label in labels.items()])
    return labels


WRITERS = {
    "split column": write_split_column,
    "table for each split": write_tables_of_splits,
    "same names in splits": write_same_names_in_splits,
    "split folders": write_split_folders,
    "no split": write_unsplit,
}


def expected_splits(case, labels):
    """Return the paths of each split as written."""
    splits = {}
    for index, path in enumerate(labels):
        if case == "no split":
            split = "all"
        elif case == "same names in splits":
            split = path.split("/")[0]
        else:
            split = split_of(index)
        splits.setdefault(split, []).append(path)
    return {split: sorted(paths) for split, paths in splits.items()}


@pytest.mark.parametrize("case", WRITERS)
def test_table_is_read(case, tmp_path):
    root = tmp_path / "data"
    labels = WRITERS[case](root)
    splits = expected_splits(case, labels)
    (root / ".labels.csv").write_text("file_name,label\n00.png,hidden\n")
    assert recognize_layout(root) == "table"
    layout = ClassTable(root)
    assert {split: sorted(images) for split, images in layout.splits().items()} == splits
    for split, paths in splits.items():
        images = annotate_all(layout, choose_split(layout, split)[0])
        assert {image.id: image.labels for image in images} == {path: (WORDS[labels[path]],) for path in paths}
        assert {image.size for image in images} == {SIZE}


def labels_read(settings, root, splits):
    """Return the class of each path as fine-tuning reads it, for each split."""
    read = {}
    for split in splits:
        data = ClassificationData.from_dict(settings)
        data.find_classes(["train"])
        samples = data.open([split])
        read[split] = {}
        for sample, label in zip(samples.samples, samples.labels.tolist()):
            read[split][sample.images[0].relative_to(root).as_posix()] = data.classes[label]
    return read


@pytest.mark.parametrize("case", WRITERS)
def test_classification_and_adapt_read_table(case, tmp_path):
    root = tmp_path / "data"
    labels = WRITERS[case](root)
    data = ClassificationData.from_dict({"root": str(root)})
    found = read_labels(root, tmp_path / "lists")
    assert (found.task, found.layout) == ("classification", "table")
    if case == "no split":  # A part is held out by a hash.
        assert data.splits.keys() == {"train", "test"}
    else:
        splits = expected_splits(case, labels)
        assert data.splits.keys() == splits.keys()
        assert {split: len(images) for split, images in found.images.items()} == {k: len(v) for k, v in splits.items()}
    assert data.find_classes(["train"]) == sorted(CLASSES)
    data.check_disjoint([*data.splits])
    recorded = data.describe(["train"], "test", None)[1]["data"]
    assert len(ClassificationData.from_dict(recorded).open(["test"])) == len(data.open(["test"]))
    for settings, names in (({"root": str(root)}, data.splits), (found.data, found.lists)):
        read = labels_read(settings, root, names)
        for split, of_split in read.items():
            assert of_split and (case == "no split" or sorted(of_split) == splits[split])
        together = [*read.values()]
        assert {path: label for of_split in together for path, label in of_split.items()} == labels
        assert sum(map(len, together)) == len(labels)
    part = ClassificationData.from_dict(with_label_fraction(found, 0.5, 0, tmp_path / "fractions"))
    part.find_classes(["train"])
    assert len(part.open(["train"])) == round(0.5 * len(found.images["train"]))


def test_adapt_draws_missing_splits_of_table(tmp_path):
    """Check that rows of images that are drawn for another split are not missing."""
    labels = write_images(tmp_path / "data", lambda index: "")
    rows = [{"file_name": path, "label": label, "split": "train"} for path, label in labels.items()]
    write_rows(tmp_path / "data", "labels.csv", rows)
    found = read_labels(tmp_path / "data", tmp_path / "lists")
    data = ClassificationData.from_dict(found.data)
    read = [path for split in found.images for path in data.open([split]).files_or_rows()]
    assert len(read) == len(set(read)) == NUMBER and all(map(len, found.images.values()))


def test_patients_of_table_are_in_one_split(tmp_path):
    labels = write_images(tmp_path / "data", lambda index: "")
    rows = []
    for index, (path, label) in enumerate(labels.items()):
        rows.append({"file_name": path, "label": label, "patient": f"00{index % 8}"})
    write_rows(tmp_path / "data", "labels.csv", rows)
    found = read_labels(tmp_path / "data", tmp_path / "lists")
    assert "8 patients" in found.how and "table" in found.how
    patients = [{int(path.stem) % 8 for path in paths} for paths in found.images.values()]
    assert sum(map(len, patients)) == len(set.union(*patients)) == 8
    assert ClassTable(tmp_path / "data").case(tmp_path / "data" / "09.png") == "patient 001"


def test_numbers_are_classes(tmp_path):
    for index in range(NUMBER):
        noise(tmp_path / "data" / f"{index}.png", index, SIZE)
    rows = [{"name": str(index), "label": index % 3} for index in range(NUMBER)]
    write_rows(tmp_path / "data", "labels.csv", rows)
    layout = ClassTable(tmp_path / "data", {"0": "river", "1": "lake", "2": None})
    phrases = [image.labels for image in annotate_all(layout, choose_split(layout, "all")[0])]
    assert [phrases.count(labels) for labels in (("river",), ("lake",), ())] == [8, 8, 8] and len(phrases) == 24
    found = read_labels(tmp_path / "data", tmp_path / "lists")
    assert found.data["classes"] == ["0", "1", "2"]
    for path, label in labels_read(found.data, tmp_path / "data", ["train"])["train"].items():
        assert int(label) == int(path.removesuffix(".png")) % 3


def test_instructions_ask_for_classes_of_table(tmp_path, monkeypatch):
    labels = write_split_column(tmp_path / "data")
    monkeypatch.chdir(tmp_path)
    assert make_instructions_command("data").split()[:4] == ["vitp", "make_instructions", "table", "data"]
    rows = make("table", tmp_path / "data", tmp_path / "out")["train"]
    assert sorted(row["id"] for row in rows) == expected_splits("split column", labels)["train"]
    answers = {"yes": 0, "no": 0, "class": 0}
    for row in rows:
        word = WORDS[labels[row["id"]]]
        for question, answer in turns_of(row):
            if answer in ("yes", "no"):
                asked = [other for other in WORDS.values() if re.search(rf"\b{other}\b", question)]
                assert len(asked) == 1 and answer == ("yes" if asked == [word] else "no")
                answers[answer] += 1
            else:
                assert answer == word
                answers["class"] += 1
    assert answers["class"] == len(rows) == NUMBER // 2 and answers["yes"] == answers["no"] > 0


def add_table_of_other_layout(root):
    paths = sorted(path.relative_to(root).as_posix() for path in root.rglob("*.*") if path.suffix in (".png", ".tif"))
    rows = [{"file_name": path, "label": CLASSES[index % 2]} for index, path in enumerate(paths)]
    write_rows(root, "labels.csv", rows)


@pytest.mark.parametrize("layout", [*LAYOUTS, "masks", "changes"])
def test_other_layout_with_table_is_recognized(layout, tmp_path):
    if layout in LAYOUTS:
        LAYOUTS[layout][0](tmp_path, "train", NAMES["train"][:4])
    else:
        for folder in ("images", "masks") if layout == "masks" else ("A", "B", "label"):
            for number in range(2):
                noise(tmp_path / "train" / folder / f"{number}.png", number, SIZE)
    add_table_of_other_layout(tmp_path)
    assert recognize_layout(tmp_path) == layout
    if layout not in LAYOUTS:
        with pytest.raises(ValueError, match="masks"):
            ClassificationData.from_dict({"root": str(tmp_path)}).find_classes(["train"])


@pytest.mark.parametrize("split", ["", "train/"])
@pytest.mark.parametrize("label", ["folder", "number", "incomplete"])
def test_index_of_class_folders_is_ignored(split, label, tmp_path):
    """Check that folders of classes are recognized with an index of their images, also by other names or incomplete."""
    rows = []
    for index in range(9):
        name = CLASSES[index % 3]
        path = f"{split}{name}/{index}.png"
        noise(tmp_path / path, index, SIZE)
        rows.append({"file_name": path, "label": index % 3 if label == "number" else name})
    write_rows(tmp_path, "index.csv", rows[: 8 if label == "incomplete" else None])
    assert recognize_layout(tmp_path) == "folders"
    if split:
        data = ClassificationData.from_dict({"root": str(tmp_path)})
        assert data.table is None and data.find_classes(["train"]) == sorted(CLASSES)


def test_other_tables_are_not_recognized(tmp_path):
    for number in range(3):
        noise(tmp_path / f"{number}.png", number, SIZE)
    tables = {
        "objects.csv": "filename,width,height,class,xmin,ymin,xmax,ymax\n0.png,16,16,ship,1,1,5,5\n",
        "captions.csv": "file_name,caption\n0.png,a ship\n",
        "other.csv": "file_name,label\nx.png,ship\n",
        "semicolons.csv": "file_name;label\n0.png;ship\n",
        "empty.csv": "",
        "binary.csv": "\0\xff\0",
    }
    for name, text in tables.items():
        (tmp_path / name).write_text(text, encoding="latin-1")
    pd.DataFrame({"image": [{"bytes": b"0", "path": "0.png"}], "label": ["ship"]}).to_parquet(tmp_path / "a.parquet")
    (tmp_path / "broken.parquet").write_bytes(b"PAR1")
    assert recognize_layout(tmp_path) is None


def rows_of(*rows, header="file_name,label"):
    return {"labels.csv": "\n".join((header, *rows)) + "\n"}


ROWS = ("0.png,a", "1.png,b", "2.png,a")
WRONG = {
    "image without row": (rows_of(*ROWS[:2]), "2.png has no row in .*labels.csv"),
    "row without image": (rows_of(*ROWS, "7.png,a"), "labels.csv, row 3: .*'7.png'"),
    "two rows": (rows_of(*ROWS, "0.png,b"), "labels.csv .*'0.png'"),
    "no class": (rows_of(*ROWS[:2], "2.png,"), "labels.csv: .*2.png has no class"),
    "no 1 or 0": (
        rows_of(*[f"{n}.png,1,0" for n in range(25)], "x.png,2,0", header="file,a,b"),
        "row 25: .*'a', got 2",
    ),
    "number": (rows_of("0.png,0.5", "1.png,1", "2.png,2"), "labels.csv, row 0: .*0.5"),
    "split": (rows_of("0.png,a,train", "1.png,b,3", "2.png,a,test", header="file,label,split"), "row 1: .*'3'"),
    "same split": (
        rows_of("0.png,a,val", "1.png,b,valid", "2.png,a,test", header="file,label,split"),
        "row 1: .*'valid' after .*'val'",
    ),
    "two splits": (
        {"train.csv": "file_name,label\n0.png,a\n1.png,b\n", "test.csv": "file_name,label\n2.png,a\n1,a\n"},
        "1.png has rows in both splits 'test' and 'train'",
    ),
    "two tables of a split": (
        {"val.csv": "file_name,label\n0.png,a\n", "valid.csv": "file_name,label\n1.png,a\n"},
        "val.csv.*valid.csv",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_table_is_refused(case, tmp_path):
    tables, message = WRONG[case]
    for number in range(3):
        noise(tmp_path / f"{number}.png", number, SIZE)
    for name, text in tables.items():
        (tmp_path / name).write_text(text)
    assert recognize_layout(tmp_path) == "table"
    for read in (ClassTable(tmp_path).splits, lambda: ClassificationData.from_dict({"root": str(tmp_path)})):
        with pytest.raises(ValueError, match=message):
            read()


SEVERAL = [set(), {"River"}, {"River", "sea_lake"}, {"AnnualCrop"}, {"AnnualCrop", "River", "sea_lake"}, {"sea_lake"}]


def write_several(root, form, classes_of_images=SEVERAL):
    """Write images with any number of classes, and return the classes of each path below the root."""
    labels = {}
    rows = []
    for index in range(NUMBER):
        classes = classes_of_images[index % len(classes_of_images)]
        name = f"{index:02}.png"
        noise(root / name, index, SIZE)
        labels[name] = classes
        row = {"Image": name, "patient": f"p{index // 2}"}
        if form == "columns":
            rows.append(row | {label: int(label in classes) for label in CLASSES} | {"age": 20 + index})
        elif form == "list":
            rows.append(row | {"Labels": sorted(classes)})
        else:
            rows.append(row | {"Labels": form.join(sorted(classes))})
    write_rows(root, "labels.parquet" if form == "list" else "labels.csv", rows)
    return labels


@pytest.mark.parametrize("form", ["|", "; ", ", ", "list", "columns"])
def test_several_classes_are_read(form, tmp_path):
    """Read the classes as written, in questions, fine-tuning, drawn splits and parts of the labels."""
    root = tmp_path / "data"
    labels = write_several(root, form)
    layout = ClassTable(root)
    images = annotate_all(layout, choose_split(layout, "all")[0])
    assert {image.id: image.labels for image in images} == {
        path: tuple(sorted(WORDS[label] for label in classes)) for path, classes in labels.items()
    }
    found = read_labels(root, tmp_path / "lists")
    assert (found.task, found.data["multi_label"], found.data["classes"]) == ("classification", True, sorted(CLASSES))
    assert "12 patients" in found.how
    for settings, names in (({"root": str(root)}, ["train", "test"]), (found.data, found.lists)):
        data = ClassificationData.from_dict(settings)
        data.find_classes(["train"])
        data.check_disjoint(names)
        read = {}
        for split in names:
            samples = data.open([split])
            for path, encoded in zip(samples.files_or_rows(), samples.labels.tolist(), strict=True):
                read[path.name] = {name for name, is_present in zip(data.classes, encoded) if is_present}
        assert read == labels
    part = with_label_fraction(found, 0.2, 0, tmp_path / "fractions")
    drawn_classes = [labels[path.name] for path in ClassificationData.from_dict(part).open(["train"]).files_or_rows()]
    assert set().union(*drawn_classes) == set(CLASSES) and len(drawn_classes) == round(0.2 * len(found.images["train"]))


def test_one_class_in_columns_is_one_class(tmp_path):
    labels = write_several(tmp_path / "data", "columns", [{"River"}, {"sea_lake"}, {"AnnualCrop"}])
    data = ClassificationData.from_dict({"root": str(tmp_path / "data")})
    names = data.find_classes(["train"])
    samples = data.open(["train"])
    assert not data.multi_label and samples.labels.shape == (len(samples),)
    for path, label in zip(samples.files_or_rows(), samples.labels.tolist()):
        assert {names[label]} == labels[path.name]


def test_split_without_several_classes_is_multi_label(tmp_path):
    """Check that the tables of all splits have one separator, and that numbers beside several are names."""
    tables = {"train": ["1|10", "2", "10"] * 2, "test": ["1", "2", "10"]}
    for split, labels in tables.items():
        for number in range(len(labels)):
            noise(tmp_path / "data" / split / f"{number}.png", 10 * len(labels) + number, SIZE)
        rows = [{"file": f"{split}/{number}.png", "label": label} for number, label in enumerate(labels)]
        write_rows(tmp_path / "data", f"{split}.csv", rows)
    data = ClassificationData.from_dict({"root": str(tmp_path / "data")})
    assert data.find_classes(["train"]) == ["1", "10", "2"]
    assert data.open(["train"]).labels[:3].tolist() == [[1, 1, 0], [0, 0, 1], [0, 1, 0]]
    assert data.open(["test"]).labels.tolist() == [[1, 0, 0], [0, 0, 1], [0, 1, 0]]


def test_questions_ask_for_several_classes(tmp_path):
    """Check that all classes of each image are asked for, and that yes and no are balanced for each class."""
    labels = write_several(tmp_path / "data", "|")
    rows = make("table", tmp_path / "data", tmp_path / "out")["train"]
    balance = dict.fromkeys(WORDS.values(), 0)
    num_yes = 0
    for row in rows:
        words = sorted(WORDS[label] for label in labels[row["id"]])
        listings = []
        for question, answer in turns_of(row):
            if answer in ("yes", "no"):
                (asked,) = [word for word in WORDS.values() if re.search(rf"\b{word}\b", question)]
                assert (answer == "yes") == (asked in words)
                balance[asked] += 1 if answer == "yes" else -1
                num_yes += answer == "yes"
            else:
                assert ("classes" in question) == (len(words) != 1)
                listings.append(answer)
        assert listings == [", ".join(words) or "none"]
    assert len(rows) == NUMBER and set(balance.values()) == {0} and num_yes > 0


def test_commas_in_names_are_kept(tmp_path):
    for number in range(2):
        noise(tmp_path / f"{number}.png", number, SIZE)
    (tmp_path / "labels.csv").write_text('file_name,label\n0.png,"Shark, white"\n1.png,None\n')
    files = ClassTable(tmp_path).splits()["all"]
    labels = [ClassTable(tmp_path).annotate(image_id, paths)[0].labels for image_id, paths in files.items()]
    assert labels == [("shark, white",), ("none",)]


def test_ambiguous_folders_of_splits_are_refused(tmp_path):
    rows = []
    for number, place in enumerate(("a/train", "a/test", "b/train", "b/test")):
        noise(tmp_path / place / f"{number}.png", number, SIZE)
        rows.append({"file_name": f"{place}/{number}.png", "label": CLASSES[number // 2]})
    write_rows(tmp_path, "labels.csv", rows)
    assert sorted(map(len, ClassTable(tmp_path).splits().values())) == [2, 2]
    with pytest.raises(ValueError, match="'test' .*train.*column `split`"):
        ClassificationData.infer(tmp_path)


def test_one_table_is_chosen(tmp_path):
    write_unsplit(tmp_path)
    write_rows(tmp_path, "other.csv", [{"file_name": "north/00.png", "label": "a"}])
    with pytest.raises(ValueError, match="labels.parquet.*other.csv|other.csv.*labels.parquet"):
        ClassTable(tmp_path).splits()
    layout = ClassTable(tmp_path, annotations=tmp_path / "labels.parquet")
    assert len(layout.splits()["all"]) == NUMBER
    assert layouts.LAYOUTS["table"] is ClassTable and np.all([path.is_file() for path in layout._file_of])


def test_table_with_lists_is_no_table_of_classes(tmp_path):
    """A Parquet file of conversations has lists in its columns."""
    rows = pd.DataFrame({"image": ["a.png"] * 2, "messages": [[1, 0], [0, 1]], "sizes": [np.ones(2), np.zeros(2)]})
    assert find_class_columns(rows) == []
