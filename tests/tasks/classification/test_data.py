"""Tests of the classification data sets: labels, tables, files, rows and their errors."""

import logging
import shutil

import numpy as np
import pandas as pd
import PIL.Image
import pytest
import rasterio
import torch
from classification_data import MAKERS, picture_of, write_folders
from datasets import ClassLabel, Dataset, Features, Image, List, Value
from dense_data import read_config, save
from pictures import picture, write_bands
from volumes_on_disk import write_series

from modeling_vitp.data.files import FileSample
from modeling_vitp.data.tables import LabelTable
from modeling_vitp.tasks.classification.data import ClassificationData, check_trained, count, names_of


def opened(settings: dict, split: str = "train"):
    data = ClassificationData.from_dict(settings)
    data.find_classes(["train"])
    return data.open([split])


@pytest.fixture
def folders(tmp_path):
    write_folders(tmp_path, {"train": 3, "test": 2}, ("field", "forest"))
    return tmp_path


def test_folders_are_splits_and_classes(folders):
    """Check that a folder gives the same samples as files and as a `datasets` folder."""
    ours, theirs = opened({"root": str(folders)}), opened({"dataset_name": str(folders)})
    assert ours.labels.tolist() == theirs.labels.tolist() == [0, 0, 0, 1, 1, 1]
    for index in range(6):
        assert torch.equal(ours[index]["image"], theirs[index]["image"])
        assert ours[index]["image"].shape == (3, 20, 24 + index % 3) and ours[index]["image"].dtype == torch.uint8
    assert ours[0]["id"] == "field/0" and ours[4]["label"] == 1
    assert opened({"root": str(folders), "classes": ["forest", "field"]}).labels.tolist() == [1, 1, 1, 0, 0, 0]


def test_named_labels_are_classes(tmp_path):
    """Check that labels are matched by name, and by index if the model has none of the names."""
    names = ["water", "field", "forest"]
    features = Features({"image": Image(), "label": ClassLabel(names=names)})
    rows = {"image": [picture(8, 8, seed) for seed in range(4)], "label": [2, 0, 1, 1]}
    Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "train.parquet")
    stored = {"dataset_name": str(tmp_path)}
    assert opened(stored).labels.tolist() == [2, 0, 1, 1]
    assert opened({**stored, "classes": ["field", "forest", "water"]}).labels.tolist() == [1, 2, 0, 0]
    assert opened({**stored, "classes": ["See", "Acker", "Wald"]}).labels.tolist() == [2, 0, 1, 1]
    data = ClassificationData.from_dict(stored)
    assert data.find_classes([], ["forest", "water", "field"]) == ["forest", "water", "field"]
    assert data.open(["train"]).labels.tolist() == [0, 1, 2, 2]
    with pytest.raises(ValueError, match="'forest'.* 2 .*classes"):
        opened({**stored, "classes": ["field", "water"]})


def test_class_of_test_split_only_is_refused(folders):
    save(picture(20, 20), folders / "test" / "swamp" / "9.png")
    with pytest.raises(ValueError, match="test/swamp/9.png .*'swamp'.*field, forest"):
        opened({"root": str(folders)}, "test")


def test_class_without_training_images_is_refused(caplog):
    trained, scored = {"field": 3, "swamp": 0}, {"field": 1, "swamp": 2}
    with pytest.raises(ValueError, match="Split 'test' .*swamp"):
        check_trained(trained, scored, "test", is_listed=False)
    check_trained(trained, scored, "test", is_listed=True)
    assert "swamp" in caplog.text
    check_trained(trained, {"field": 1, "swamp": 0}, "test", is_listed=False)


def test_empty_class_folder_is_refused(folders):
    (folders / "train" / "swamp").mkdir()
    with pytest.raises(ValueError, match="'swamp'.*train/swamp"):
        opened({"root": str(folders)})


@pytest.mark.parametrize("name", ["notes.txt", "0.png"])
def test_bad_file_is_refused_or_skipped(folders, caplog, name):
    """Check a file that is not an image, and a truncated image."""
    path = folders / "train" / "field" / name
    path.write_bytes((folders / "train/field/0.png").read_bytes()[:-300])
    number_of_images = 6 if name == "notes.txt" else 5
    with pytest.raises(ValueError, match=f"train/field/{name} .*bad_images"):
        opened({"root": str(folders)})
    with caplog.at_level(logging.WARNING):
        assert len(opened({"root": str(folders), "bad_images": "skip"})) == number_of_images
    assert name in caplog.text


def test_truncated_image_raises_error_on_reading(folders):
    path = folders / "train" / "field" / "0.bmp"
    PIL.Image.open(folders / "train" / "field" / "0.png").save(path)
    (folders / "train" / "field" / "0.png").unlink()
    path.write_bytes(path.read_bytes()[:-300])
    with pytest.raises(ValueError, match="train/field/0.bmp"):
        opened({"root": str(folders)})[0]


def rows(labels, feature, name: str = "label") -> Dataset:
    images = [picture(20, 20, seed) for seed in range(len(labels))]
    return Dataset.from_dict({"image": images, name: labels}, features=Features({"image": Image(), name: feature}))


@pytest.fixture
def stored(tmp_path):
    """Return a function that writes splits to disk and returns the name of the data set."""

    def store(**splits: Dataset) -> str:
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        for name, data in splits.items():
            data.to_parquet(folder / f"{name}.parquet")
        return str(folder)

    return store


def test_rows_are_single_label_or_multi_label(stored):
    named = ClassLabel(names=["field", "forest", "water"])
    name = stored(train=rows([0, 2, 1], named), test=rows([2], named))
    assert opened({"dataset_name": name}).labels.tolist() == [0, 2, 1]
    several = rows([[0, 2], [], [1]], List(named), "labels")
    data = {"dataset_name": stored(train=several), "multi_label": True}
    assert opened(data).labels.tolist() == [[1, 0, 1], [0, 0, 0], [0, 1, 0]]
    assert count(opened(data).labels, ["field", "forest", "water"]) == {"field": 1, "forest": 1, "water": 1}
    texts = rows([["b", "a"], ["c"]], List(Value("string")), "labels")
    assert opened({"dataset_name": stored(train=texts), "multi_label": True}).labels.tolist() == [[1, 1, 0], [0, 0, 1]]


def test_binary_columns_are_classes(stored):
    features = Features({"image": Image(), "mass": Value("int64"), "edema": Value("int64")})
    data = {"image": [picture(20, 20, seed) for seed in range(3)], "mass": [1, 0, 1], "edema": [1, 0, 0]}
    settings = {"multi_label": True, "columns": {"label": ["mass", "edema"]}}
    name = stored(train=Dataset.from_dict(data, features=features))
    assert opened({"dataset_name": name, **settings}).labels.tolist() == [[1, 1], [0, 0], [1, 0]]
    name = stored(train=Dataset.from_dict(data | {"mass": [1, 2, None]}, features=features))
    with pytest.raises(ValueError, match="Row 1 of split 'train': .*mass.* got 2.*label_values"):
        opened({"dataset_name": name, **settings})
    samples = opened({"dataset_name": name, **settings, "label_values": {2: None, "": 0}})
    assert samples.labels.tolist() == [[1, 1], [-100, 0], [0, 0]]
    assert count(samples.labels, ["mass", "edema"]) == {"mass": 1, "edema": 1}


@pytest.mark.parametrize(
    ("labels", "feature", "settings", "message"),
    [
        ([0, 2], Value("int64"), {"classes": ["a", "b"]}, "Row 1 of split 'train'.* label 2"),
        ([0, -3], Value("int64"), {"classes": ["a", "b"]}, "label -3"),
        ([0, -1], ClassLabel(names=["a", "b"]), {}, "Row 1 of split 'train'.* no class"),
        ([[0, 1], [1]], List(Value("int64")), {}, "Row 0 .* 2 classes, 0, 1.*multi_label"),
        ([[2], [0, 1, 0]], List(Value("int64")), {"multi_label": True}, r"Row 1 .*\[0, 1, 0\].* indices .*\[1\]"),
        (["a", "a"], Value("string"), {}, r"classes.*\['a'\]"),
        (["a", None, "b"], Value("string"), {}, "Row 1 of split 'train'"),
        ([0.5, 2.0], Value("float32"), {}, "0.5"),
        ([0, 1], Value("int64"), {"columns": {"label": "kind"}}, "no column .*kind"),
        ([0, 1], Value("int64"), {"columns": {"image": "label"}}, "'label'"),
    ],
)
def test_bad_labels_are_refused(stored, labels, feature, settings, message):
    with pytest.raises(ValueError, match=message):
        opened({"dataset_name": stored(train=rows(labels, feature)), **settings})


def test_bands_in_separate_files_are_stacked(tmp_path):
    MAKERS["bigearthnet_v2"](tmp_path)
    samples = opened(read_config("bigearthnet_v2")["data"] | {"root": str(tmp_path)})
    assert len(samples) == 10 and samples.labels.shape == (10, 19)
    table = pd.read_parquet(tmp_path / "metadata.parquet").set_index("patch_id")
    names = read_config("bigearthnet_v2")["data"]["classes"]
    for index in range(10):
        item = samples[index]
        assert [names[place] for place in item["label"].nonzero().flatten()] == sorted(
            table.loc[item["id"].split("/")[1], "labels"], key=names.index
        )
    # The stripe of the first class is red: 8 times the color, in a window of 0 to 2000.
    place = next(index for index in range(10) if samples[index]["label"][names.index("Arable land")])
    image = samples[place]["image"]
    assert image.shape == (12, 24, 24) and image.dtype == torch.float32
    stripe = image[[3, 2, 1], :, :6].mean((1, 2))
    np.testing.assert_allclose(stripe, np.array([200, 60, 40]) * 8 / 2000, atol=0.05)
    # A band of 60 m is resampled to the grid of 10 m and keeps its mean.
    (path,) = tmp_path.rglob(f"{samples[place]['id'].split('/')[1]}_B09.tif")
    with rasterio.open(path) as file:
        assert image[9].mean().item() == pytest.approx((file.read(1) / 6000).clip(0, 1).mean(), abs=0.05)
    write_bands(path, np.zeros((1, 24, 7), np.uint16))
    with pytest.raises(ValueError, match=r"bands .*\(24, 7\)"):
        samples[place]


def test_findings_in_text_become_labels(tmp_path):
    MAKERS["chest_xray14"](tmp_path)
    settings = read_config("chest_xray14")["data"] | {"root": str(tmp_path)}
    samples = opened(settings)
    table = pd.read_csv(tmp_path / "Data_Entry_2017.csv").set_index("Image Index")["Finding Labels"]
    for index in range(len(samples)):
        item = samples[index]
        found = [settings["classes"][place] for place in item["label"].nonzero().flatten()]
        assert "|".join(found) == table[item["id"].replace("/", "_") + ".png"].replace("No Finding", "")
    data = ClassificationData.from_dict(settings)
    data.check_disjoint(["train", "test"])
    with open(tmp_path / "test_list.txt", "a") as file:
        file.write("00000001_000.png\n")
    with pytest.raises(ValueError, match="patient 00000001"):
        ClassificationData.from_dict(settings).check_disjoint(["train", "test"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"file": "none.csv"}, "none.csv"),
        ({"file": "images"}, "got .*images"),
        ({"label": "Findings"}, "'Findings'"),
        ({"separator": ";"}, r"class '.*\|.*'"),
    ],
)
def test_bad_table_settings_are_refused(tmp_path, change, message):
    MAKERS["chest_xray14"](tmp_path)
    settings = read_config("chest_xray14")["data"] | {"root": str(tmp_path)}
    with pytest.raises(ValueError, match=message):
        opened(settings | {"table": settings["table"] | change})


@pytest.mark.parametrize("suffix", ["csv", "tsv"])
def test_table_keeps_leading_zeros_and_none(tmp_path, suffix):
    random, names = np.random.default_rng(0), {"0001": "car", "0002": "None", "0003": "NA", "0010": ""}
    for name in names:
        save(picture_of([], random), tmp_path / f"{name}.png")
    separator = {"csv": ",", "tsv": "\t"}[suffix]
    rows = [("id", "label"), *names.items()]
    (tmp_path / f"t.{suffix}").write_text("".join(f"{separator.join(row)}\n" for row in rows))
    settings = {"root": str(tmp_path), "multi_label": True, "classes": ["car", "None", "NA"]}
    settings |= {"table": {"file": f"t.{suffix}", "name": "id"}, "splits": {"train": {"image": "{name}.png"}}}
    samples = opened(settings)
    found = {item["id"]: item["label"].nonzero().flatten().tolist() for item in map(samples.__getitem__, range(4))}
    assert found == {"0001": [0], "0002": [1], "0003": [2], "0010": []}


def test_copied_image_in_two_splits_is_refused(folders):
    shutil.copyfile(folders / "train/field/1.png", folders / "test/field/renamed.png")
    for settings in ({"root": str(folders)}, {"dataset_name": str(folders)}):
        with pytest.raises(ValueError, match="'test' .*'train'"):
            ClassificationData.from_dict(settings).check_disjoint(["train", "test"])
    ClassificationData.from_dict({"root": str(folders), "allow_shared_images": True}).check_disjoint(["train", "test"])


def test_dicom_is_windowed_and_patients_are_checked(tmp_path):
    values = np.random.default_rng(0).integers(-300, 400, (1, 20, 24))
    for split, patient in (("train", "ann"), ("test", "bob")):
        for label in ("ct", "mr"):
            folder = tmp_path / split / label
            (path,) = write_series(folder, values, patient=patient)
            path.rename(folder / f"{split}_{label}.dcm")
    settings = {"root": str(tmp_path), "input_spec": {"window": [-160, 240]}}
    ClassificationData.from_dict(settings).check_disjoint(["train", "test"])
    image = opened(settings)[0]["image"]
    assert np.array_equal(image[0], np.round(255 * np.clip((values[0] + 160) / 400, 0, 1)))
    (path,) = write_series(tmp_path / "test" / "mr", values + 1, patient="ann")
    path.rename(path.with_name("other.dcm"))
    with pytest.raises(ValueError, match="PatientID ann of .*other.dcm .*'train' and 'test'"):
        ClassificationData.from_dict(settings).check_disjoint(["train", "test"])


def test_recorded_data_opens_without_training_split(folders):
    data = ClassificationData.from_dict({"root": str(folders)})
    data.find_classes(["train"])
    trained_on, evaluated_on = data.describe(["train"], None, "test")
    assert trained_on == [{"name": folders.name, "split": "train"}] and evaluated_on["test"] == "test"
    shutil.rmtree(folders / "train")
    assert ClassificationData.from_dict(evaluated_on["data"]).open(["test"]).labels.tolist() == [0, 0, 1, 1]


def test_file_names_may_have_dots(tmp_path):
    """Check names with dots, as in DICOM, and that the files which GDAL writes beside an image are ignored."""
    files = ("1.2.840.0", "1.2.840.1", "S2A.tile0.2020", "S2A.tile0.2021")
    names = [f"{name}/{file}" for name in "ab" for file in files]
    write_pictures(tmp_path / "train", *(f"{name}.png" for name in names))
    for name in "ab":
        (tmp_path / "train" / name / "S2A.tile0.2020.png.aux.xml").write_text("<PAMDataset/>")
    assert opened({"root": str(tmp_path)}).ids == names


def write_pictures(root, *paths):
    for number, path in enumerate(paths):
        save(picture(8, 8, number), root / path)


def write_table(root, rows, header="file_name,label"):
    (root / "t.csv").write_text("\n".join([header, *rows]) + "\n")


def labels_of_table(root, splits, name="file_name", **settings):
    """Return the name of the class of each sample of each split, by its id."""
    splits = {split: {"image": value} if isinstance(value, str) else value for split, value in splits.items()}
    data = ClassificationData.from_dict(
        {"root": str(root), "table": {"file": "t.csv", "name": name}, "splits": splits, **settings}
    )
    data.find_classes(["train"])
    labels = []
    for split in splits:
        samples = data.open([split])
        labels.append({id: data.classes[label] for id, label in zip(samples.ids, samples.labels.tolist())})
    return labels


PATIENTS = [f"images/p{patient}_{place}.png" for patient in range(3) for place in range(2)]
PATIENT_PATTERN = "images/{pid}_{name}.png"


def test_row_labels_all_images_of_patient(tmp_path):
    write_pictures(tmp_path, *PATIENTS)
    write_table(tmp_path, ["p0,ill,1", "p1,well,1", "p2,ill,2"], "pid,label,fold")
    whole = {"p0/0": "ill", "p0/1": "ill", "p1/0": "well", "p1/1": "well", "p2/0": "ill", "p2/1": "ill"}
    assert labels_of_table(tmp_path, {"train": PATIENT_PATTERN}, "pid") == [whole]
    fold = {"image": PATIENT_PATTERN, "where": {"fold": 1}}
    in_fold = {name: label for name, label in whole.items() if not name.startswith("p2")}
    assert labels_of_table(tmp_path, {"train": fold}, "pid") == [in_fold]
    # pandas reads integers with missing values as floats.
    write_table(tmp_path, ["p0,ill,1", "p1,well,1", "p2,ill,"], "pid,label,fold")
    assert labels_of_table(tmp_path, {"train": fold}, "pid") == [in_fold]


def test_patient_column_of_a_table_is_the_case(tmp_path):
    rows = [f"p{patient}_{place},ill,{patient},{place}" for patient in range(2) for place in range(2)]
    write_pictures(tmp_path, *PATIENTS)
    write_table(tmp_path, [*rows, "p2_0,well,,0", "p2_1,well,2,1"], "file_name,label,patient,part")
    splits = {name: {"image": "images/{name}.png", "where": {"part": part}} for part, name in enumerate("ab")}
    settings = {"root": str(tmp_path), "table": {"file": "t.csv"}, "classes": ["ill", "well"]}
    found = ClassificationData.from_dict(settings | {"splits": splits | {"all": {"image": "images/{name}.png"}}})
    assert found.open(["all"]).cases == ["0", "0", "1", "1", "p2_0", "2"]
    with pytest.raises(ValueError, match="patient 0 .*'a' and 'b'"):
        found.check_disjoint(["a", "b"])
    # A part has all images of a patient.
    splits = {name: {"image": "images/{name}.png", "part": part} for name, part in (("a", [0, 0.5]), ("b", [0.5, 1]))}
    found = ClassificationData.from_dict(settings | {"splits": splits})
    found.check_disjoint(["a", "b"])
    parts = [found.open([name]).cases for name in splits]
    assert all(parts) and sorted(sum(parts, [])) == ["0", "0", "1", "1", "2", "p2_0"]


def test_ambiguous_name_in_folders_is_refused(tmp_path):
    write_pictures(tmp_path, "north/0.png", "north/1.png", "south/0.png")

    def labels(pattern, rows):
        write_table(tmp_path, rows)
        return [*labels_of_table(tmp_path, {"train": pattern})[0].values()]

    for rows in (["0.png,forest", "1.png,water"], ["0,forest", "1,water"]):
        with pytest.raises(ValueError, match="t.csv, row 0: .*north.0.png .*south.0.png"):
            labels("{area}/{name}.png", rows)
    assert labels("{area}/{name}.png", ["north,forest", "south,water"]) == ["forest", "forest", "water"]
    paths = ["north/0.png,forest", "1.png,water", "south/0.png,water"]
    assert labels("{area}/{name}.png", paths) == ["forest", "water", "water"]
    assert labels("{plane}/{patient}.png", ["0,forest", "1,water"]) == ["forest", "water", "forest"]


def test_ambiguous_name_in_splits_is_refused(tmp_path):
    write_pictures(tmp_path, "train/0.png", "train/1.png", "test/0.png")

    def labels(rows, **where):
        write_table(tmp_path, rows, "file_name,label,part")
        splits = {name: {"image": f"{name}/{{name}}.png"} for name in ("train", "test")}
        for name, part in where.items():
            splits[name]["where"] = {"part": part}
        return [[*of_split.values()] for of_split in labels_of_table(tmp_path, splits)]

    with pytest.raises(ValueError, match="t.csv, row 0: '0.png' .*train.0.png .*test.0.png"):
        labels(["0.png,forest,a", "1.png,water,a"])
    paths = ["train/0.png,forest,a", "train/1.png,water,a", "test/0.png,water,a"]
    assert labels(paths) == [["forest", "water"], ["water"]]
    named = ["0.png,forest,a", "1.png,water,a", "0.png,water,b"]
    assert labels(named, train="a", test="b") == [["forest", "water"], ["water"]]


def test_patient_field_precedes_file_name(tmp_path):
    write_pictures(tmp_path, "1/1.png", "1/2.png", "2/1.png")
    write_table(tmp_path, ["1,ill", "2,well"], "pid,label")
    (labels,) = labels_of_table(tmp_path, {"train": "{patient}/{number}.png"}, "pid")
    assert [*labels.values()] == ["ill", "ill", "well"]


@pytest.mark.parametrize(
    ("rows", "where", "message"),
    [
        (["p0,a,1", "p1,b,1", "p2,a,1"], {"fold": "tset"}, "t.csv has 'tset' .*'fold'"),
        (["p0,a,1", "p1,b,1", "p2,a,1", "p9,a,1"], {"fold": 1}, "row 3: .*'p9'"),
        (["p0,0.5,1", "p1,1,1", "p2,2.25,1"], None, "t.csv, row 0: .*0.5"),
        (["p0,a,1", "p1,b,1"], None, "p2_0.png has no row"),
    ],
)
def test_bad_tables_are_refused(tmp_path, rows, where, message):
    write_pictures(tmp_path, *PATIENTS)
    write_table(tmp_path, rows, "pid,label,fold")
    split = {"image": PATIENT_PATTERN} | ({"where": where} if where else {})
    with pytest.raises(ValueError, match=message):
        labels_of_table(tmp_path, {"train": split}, "pid")


def test_unknown_cells_are_refused(tmp_path):
    """Check that an empty label is no class only if the settings say so: the image may not have been annotated."""
    write_pictures(tmp_path, "0.png")
    samples = [FileSample("0", {}, (tmp_path / "0.png",), None)]
    write_table(tmp_path, ["0.png,"])
    assert LabelTable("t.csv").labels_of(samples, tmp_path, None, "train", {})[1] == [[]]
    with pytest.raises(ValueError, match="row 0: 'label' .*'none'"):
        LabelTable("t.csv", no_class="none").labels_of(samples, tmp_path, None, "train", {})
    for cell, value in (("", "nan"), ("-1", "-1")):
        write_table(tmp_path, [f"0.png,1,{cell}"], "file_name,mass,edema")
        with pytest.raises(ValueError, match=f"row 0: .*'edema', got {value}"):
            LabelTable("t.csv", label=["mass", "edema"]).labels_of(samples, tmp_path, None, "train", {})


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"": 0, "-1": None}, [[1, 0], [0, -100], [-100, 1]]),
        ({"": None, -1.0: 1}, [[1, -100], [0, 1], [1, 1]]),
    ],
)
def test_cells_have_the_meaning_of_label_values(tmp_path, values, expected):
    write_pictures(tmp_path, "0.png", "1.png", "2.png")
    write_table(tmp_path, ["0.png,1.0,", "1.png,0.0,-1.0", "2.png,-1.0,1.0"], "file_name,mass,edema")
    table = {"file": "t.csv", "label": ["mass", "edema"]}
    settings = {"root": str(tmp_path), "table": table, "splits": {"train": {"image": "{name}.png"}}}
    settings |= {"multi_label": True, "classes": ["mass", "edema"], "label_values": values}
    assert opened(settings).labels.tolist() == expected
    for change in ({"multi_label": False}, {"table": {"file": "t.csv"}}, {"label_values": {"": 2}}):
        with pytest.raises(ValueError, match="label_values"):
            ClassificationData.from_dict(settings | change)


def test_each_split_may_have_a_table(tmp_path):
    write_pictures(tmp_path, "train/0.png", "valid/0.png")
    splits = {}
    for split in ("train", "valid"):
        splits[split] = {"image": f"{split}/{{name}}.png"}
        (tmp_path / f"{split}.csv").write_text(f"file_name,label\n{split}/0.png,{split}\n")
    settings = {"root": str(tmp_path), "table": {"file": "{split}.csv"}, "classes": ["train", "valid"]}
    data = ClassificationData.from_dict(settings | {"splits": splits})
    assert [data.open([split]).labels.tolist() for split in splits] == [[0], [1]]


def test_date_as_label_is_refused():
    with pytest.raises(ValueError, match="20230101"):
        names_of([[3], [20230101]])
