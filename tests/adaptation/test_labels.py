"""Tasks and splits of labeled folders."""

import csv
import json
import shutil
from pathlib import Path

import detection_data
import numpy as np
import pytest
import yaml
from dense_data import save
from georeferenced import NORTH_UP, feature, save_geojson, save_geotiff
from paths import CONFIGS
from PIL import Image
from prepared_folders import write_rsar
from rasterio import Affine

from modeling_vitp.adaptation.labels import TaskData, labels_of, median_size, read_labels, with_label_fraction
from modeling_vitp.data.annotation_files import read_list
from modeling_vitp.data.layouts import LAYOUTS
from modeling_vitp.data.scenes import stem_of
from modeling_vitp.data.splits import choose_split
from modeling_vitp.tasks import TASKS

SCENES = [f"s{scene}_{tile:03}" for scene in range(10) for tile in range(2 + scene % 2)]  # 25 images


def noise(path: Path) -> None:
    seed = [*"/".join(path.parts[-3:]).encode()]
    save(Image.fromarray(np.random.default_rng(seed).integers(0, 256, (8, 10, 3), dtype=np.uint8)), path)


def save_list(path: Path, names: list[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(names))


def write_masks(root: Path, names: list[str], values: tuple[int, ...] = (0, 1)) -> None:
    for index, name in enumerate(names):
        noise(root / "images" / f"{name}.png")
        mask = np.full((8, 10), values[index % len(values)], np.uint8)
        mask[:3] = values[0]
        save(Image.fromarray(mask), root / "masks" / f"{name}.png")


def write_folders(root: Path, names: list[str], classes: tuple[str, ...] = ("field", "forest")) -> None:
    for index, name in enumerate(names):
        noise(root / classes[index % len(classes)] / f"{name}.png")


def write_table(root: Path, names: list[str], labels: tuple[str, ...] = ("field", "forest")) -> None:
    rows = ["file_name,label"]
    for index, name in enumerate(names):
        noise(root / "images" / f"{name}.png")
        rows.append(f"images/{name}.png,{labels[index % len(labels)]}")
    (root / "labels.csv").write_text("\n".join(rows))


def write_geojson(root: Path, names: list[str], gap: int = 20) -> None:
    """Write the tiles of a scene side by side, and a gap in pixels between scenes."""
    left, last = 0, None
    for name in names:
        scene = name.split("_")[0]
        left, last = left + 10 + (gap if scene != last else 0), scene
        place = NORTH_UP @ Affine.translation(left, 0)
        noise(root / "images" / f"{name}.png")
        save_geotiff(root / "images" / f"{name}.tif", np.asarray(Image.open(root / "images" / f"{name}.png")), place)
        (root / "images" / f"{name}.png").unlink()
        corners = np.array([[2, 2], [7, 2], [7, 6], [2, 6]])
        save_geojson(root / "labels" / f"{name}.geojson", [feature(corners, place, **{"class": "tree"})])


def write_yolo(root: Path, names: list[str]) -> None:
    detection_data.write_yolo(root, names)
    (root / "data.yaml").write_text("train: images\nnames: {0: plane, 1: ship}\n")


WRITERS = {
    "coco": detection_data.write_coco,
    "voc": lambda root, names: detection_data.write_voc(root, names, False),
    "dota": detection_data.write_dota,
    "yolo": write_yolo,
    "geojson": write_geojson,
    "masks": write_masks,
    "folders": write_folders,
    "table": write_table,
    "table of several classes": lambda root, names: write_table(root, names, ("field", "forest|field", "", "forest")),
}


def names_of(found: TaskData) -> dict[str, list[str]]:
    return {split: [path.relative_to(found.root).as_posix() for path in part] for split, part in found.images.items()}


def scenes_of(found: TaskData) -> dict[str, set[str]]:
    return {split: {path.stem.split("_")[0] for path in part} for split, part in found.images.items()}


def classes_of(found: TaskData, path: Path) -> set[str]:
    """Return the classes of an image of the task classification, from its folder or its row."""
    if found.layout == "folders":
        return {path.parent.name}
    with (found.root / "labels.csv").open() as file:
        labels = {row["file_name"]: row["label"] for row in csv.DictReader(file)}
    return set(labels[path.relative_to(found.root).as_posix()].split("|")) - {""}


def check(found: TaskData, number: int) -> None:
    """Check that the splits have all images once, and that fine-tuning and `make_instructions` take their lists."""
    names = names_of(found)
    assert [*found.images] == [*found.data["splits"]] == [*found.lists] == ["train", "val", "test"]
    assert len({name for part in names.values() for name in part}) == sum(map(len, names.values())) == number
    assert min(map(len, names.values())) >= 2 and str(len(names["train"])) in found.how
    data = TASKS[found.task].data_class.from_dict(found.data)
    task = [found.settings.get("task", "horizontal")] if found.task == "detection" else []
    data.check_disjoint(["train", "val", "test"], *task)
    if found.task == "classification":
        names_of_classes = data.find_classes(["train"])
        for split, images in found.images.items():
            labels = labels_of(found.task, found.data, split, found.settings)
            assert labels == {path: classes_of(found, path) for path in sorted(images)}
            encoded = dict(zip(data.open([split]).files_or_rows(), data.open([split]).labels.tolist()))
            for path, values in encoded.items():
                present = values if isinstance(values, list) else np.eye(len(names_of_classes))[values]
                assert {names_of_classes[index] for index in np.flatnonzero(present)} == labels[path]
        assert names_of_classes == sorted(set().union(*labels_of(found.task, found.data, "train", {}).values()))
    layout = LAYOUTS[found.layout](found.root)
    for split, images in found.images.items():
        assert read_list(found.lists[split]) == names[split]
        samples = data.open([split], *task)
        if found.task == "detection":
            opened = [place.image for place in samples.places]
        else:
            opened = [path for path in samples.files_or_rows() if "masks" not in path.parts]
        assert sorted(opened) == images
        chosen, held_out = choose_split(layout, "train" if split == "train" else "all", read_list(found.lists[split]))
        assert sorted(path for (path,) in chosen.values()) == images
        assert held_out >= {path for other in found.images if other != split for path in found.images[other]}


def cases_of(found: TaskData, split: str) -> dict[Path, str]:
    """Return the case of each image as the metrics get it."""
    data = TASKS[found.task].data_class.from_dict(found.data)
    if found.task == "detection":
        places = data.open([split], found.settings.get("task", "horizontal")).places
        return {place.image: place.case for place in places}
    samples = data.open([split])
    files = samples.samples if found.task == "classification" else [sample for sample, _ in samples.rows]
    return {sample.images[0]: case for sample, case in zip(files, samples.cases)}


def test_photos_of_classes_may_be_stored_turned(tmp_path):
    write_folders(tmp_path / "data", SCENES)
    for path in (tmp_path / "data").rglob("*.png"):
        exif = Image.Exif()
        exif[274] = 6
        Image.open(path).save(path, exif=exif)
    found = read_labels(tmp_path / "data", tmp_path / "splits")
    assert sum(map(len, found.images.values())) == len(SCENES)
    assert median_size(found.images["train"]) == (10, 8)  # upright, of a stored height of 8


@pytest.mark.parametrize("layout", WRITERS)
def test_splits_keep_scenes_whole(tmp_path, layout):
    root = tmp_path / "data"
    WRITERS[layout](root, SCENES)
    found = read_labels(root, tmp_path / "lists")
    check(found, len(SCENES))
    name = layout.split()[0]
    (task,) = [
        task.name for task in TASKS.values() if task.layout_class and issubclass(LAYOUTS[name], task.layout_class)
    ]
    assert (found.task, found.layout, found.root) == (task, name, root)
    assert found.data.get("multi_label", False) == (layout == "table of several classes")
    assert found.settings == ({"task": "oriented"} if layout == "dota" else {})
    scenes = scenes_of(found)
    assert sum(map(len, scenes.values())) == len(set.union(*scenes.values())) == 10
    assert found.test_scenes == len(scenes["test"]) < len(found.images["test"])
    assert found.how.startswith("Split by scene") and "10 scenes" in found.how
    for split in ("val", "test"):
        cases = cases_of(found, split)
        assert {*cases} == {*found.images[split]}
        pairs = {(path.stem.split("_")[0], case) for path, case in cases.items()}
        assert len(pairs) == len(scenes[split]) == len({case for _, case in pairs})
    assert all(3 <= len(found.images[split]) <= 5 for split in ("val", "test"))  # 15% are 3.75
    again = read_labels(root, tmp_path / "other", seed=0)
    assert names_of(again) == names_of(found) and again.how == found.how
    assert read_labels(root, tmp_path / "lists", seed=5) == found
    if layout == "masks":
        others = [names_of(read_labels(root, tmp_path / f"{seed}", seed=seed)) for seed in (1, 2, 3)]
        assert any(other != names_of(found) for other in others)


@pytest.mark.parametrize("layout", ["dota", "masks", "folders"])
def test_given_splits_are_kept(tmp_path, layout):
    root = tmp_path / "data"
    WRITERS[layout](root / "train", SCENES)
    WRITERS[layout](root / "test", ["t_101", "t_102", "u_103", "u_104"])
    given = {path for path in (root / "test").rglob("*.png") if "masks" not in path.parts}
    found = read_labels(root, tmp_path / "lists")
    check(found, len(SCENES) + 4)
    assert {*found.images["test"]} == given and found.test_scenes == 2
    assert "train and test are kept" in found.how and "validation" in found.how
    scenes = scenes_of(found)
    assert scenes["train"].isdisjoint(scenes["val"]) and 3 <= len(found.images["val"]) <= 5

    WRITERS[layout](root / "val", ["v_201", "v_202"])
    found = read_labels(root, tmp_path / "all")
    check(found, len(SCENES) + 6)
    assert [len(part) for part in found.images.values()] == [len(SCENES), 2, 4]
    assert "train, val and test are kept" in found.how
    with pytest.raises(ValueError, match="lists"):
        read_labels(root, tmp_path / "lists")


def test_lists_of_voc_are_given_splits(tmp_path):
    root = tmp_path / "data"
    detection_data.write_voc(root, [*SCENES, "t_101", "t_102"], False)
    for names, *splits in ((SCENES, "trainval", "train"), (["t_101", "t_102"], "test")):
        for split in splits:
            save_list(root / "ImageSets" / "Main" / f"{split}.txt", names)
    found = read_labels(root, tmp_path / "lists")
    check(found, len(SCENES) + 2)
    assert [path.stem for path in found.images["test"]] == ["t_101", "t_102"]
    (root / "ImageSets" / "Main" / "train.txt").unlink()
    assert read_labels(root, tmp_path / "trainval").images == found.images


def test_unlabeled_test_split_is_replaced(tmp_path):
    root = tmp_path / "data"
    write_masks(root / "train", SCENES)
    write_masks(root / "val", ["v_001", "v_002"])
    write_masks(root / "test", ["t_001", "t_002"])
    shutil.rmtree(root / "test" / "masks")
    found = read_labels(root, tmp_path / "lists")
    check(found, len(SCENES) + 2)
    assert all("train" in path.parts for path in found.images["test"])


@pytest.mark.parametrize("layout", ["coco", "masks", "folders"])
def test_equal_names_in_folders_are_told_apart(tmp_path, layout):
    root, areas, names = tmp_path / "data", [f"area{area}" for area in range(8)], ["000", "001", "002"]
    if layout == "coco":
        written = {}
        for area in areas:
            found = detection_data.write_images(root / area, names)
            written |= {f"{area}/{name}": objects for name, objects in found.items()}
        for index, name in enumerate(written):
            detection_data.draw_image(written[name], index).save(root / f"{name}.png")
        (root / "instances.json").write_text(json.dumps(detection_data.coco_contents(written)))
    for area in areas if layout == "masks" else ():
        write_masks(root / area, names)
    for name in names if layout == "folders" else ():
        for area in areas:
            noise(root / area / f"{name}.png")
    found = read_labels(root, tmp_path / "lists")
    check(found, 24)
    assert ("8 scenes" in found.how) == (layout != "folders")


def test_georeferences_tell_scenes_apart(tmp_path):
    root = tmp_path / "data"
    names = [f"{'abc'[index // 4]}_{index}" for index in range(12)]
    write_geojson(root, names)
    for path in [*root.rglob("*_*.*")]:  # names that tell nothing
        path.rename(path.with_name(f"{path.stem.split('_')[1]}{path.suffix}"))
    found = read_labels(root, tmp_path / "lists")
    assert "coordinates" in found.how and "(3 scenes: " in found.how
    assert all(len({int(path.stem) // 4 for path in part}) == 1 for part in found.images.values())

    shutil.rmtree(root)
    write_geojson(root, names, gap=0)
    with pytest.raises(ValueError, match=r"data .*\(1 scenes.*scene_pattern"):
        read_labels(root, tmp_path / "one")
    found = read_labels(root, tmp_path / "one", scene_pattern="(.*)")
    check(found, 12)


def test_scene_pattern_is_first_rule(tmp_path):
    root = tmp_path / "data"
    write_masks(root, [f"{site}-day{day}_{n}" for site in "abcde" for day in range(2) for n in range(2)])
    found = read_labels(root, tmp_path / "lists", scene_pattern=r"images/(\w)-")
    check(found, 20)
    sites = [{path.stem[0] for path in part} for part in found.images.values()]
    assert [len(part) for part in sites] == [3, 1, 1] and len(set.union(*sites)) == 5
    assert "5 scenes" in found.how
    for pattern in ("(day9)", "images/", "("):
        with pytest.raises(ValueError, match="scene_pattern"):
            read_labels(root, tmp_path / "wrong", scene_pattern=pattern)


def test_patients_stay_in_one_split(tmp_path, monkeypatch):
    root = tmp_path / "data"
    write_masks(root, [f"{patient}{n}x" for patient in "abcdef" for n in range(3)])
    patient_of = "modeling_vitp.data.layouts.base.patient_of"
    monkeypatch.setattr(patient_of, lambda path: f"PatientID {path.stem[0]}")
    found = read_labels(root, tmp_path / "lists")
    check(found, 18)
    patients = [{path.stem[0] for path in part} for part in found.images.values()]
    assert sum(map(len, patients)) == 6 and "6 patients" in found.how


def test_drawn_splits_have_two_scenes(tmp_path):
    """One scene has 15% of the images."""
    root = tmp_path / "data"
    write_masks(root, [f"{scene}_{n}" for scene in "abcdefghi" for n in range(7 if scene == "a" else 5)])
    for seed in range(3):
        scenes = scenes_of(read_labels(root, tmp_path / f"{seed}", seed=seed))
        assert [len(scenes[split]) for split in ("val", "test")] == [2, 2]


def test_identical_images_stay_in_one_split(tmp_path):
    root = tmp_path / "data"
    write_folders(root, [f"{name}x" for name in "abcdefghijkl"])
    for name in "abcdef":
        path = next(root.rglob(f"{name}x.png"))
        shutil.copy(path, path.with_name(f"copy{name}.png"))
    for seed in range(5):
        found = read_labels(root, tmp_path / f"{seed}", seed=seed)
        check(found, 18)
        assert found.how.startswith("Split by image: ")
        split_of = {path.read_bytes(): split for split, part in found.images.items() for path in part}
        assert all(split_of[path.read_bytes()] == split for split, part in found.images.items() for path in part)


def test_empty_tiles_join_no_scenes(tmp_path):
    root = tmp_path / "data"
    write_masks(root, SCENES)
    for scene in range(10):
        save(Image.new("RGB", (10, 8)), root / "images" / f"s{scene}_000.png")
    assert "10 scenes" in read_labels(root, tmp_path / "lists").how


def test_class_names_in_files_are_no_scenes(tmp_path):
    root, classes = tmp_path / "data", tuple("abcdefg")
    for index in range(70):
        noise(root / classes[index % 7] / f"{classes[index % 7]}_{index}.png")
    found = read_labels(root, tmp_path / "lists")
    check(found, 70)
    assert found.how.startswith("Split by image")
    assert all({path.parent.name for path in part} == {*classes} for part in found.images.values())


@pytest.mark.parametrize("is_split", [False, True])
def test_class_may_have_word_of_a_split(tmp_path, is_split):
    root, names = tmp_path / "data", {"train": SCENES, "val": ["v_1", "v_2"], "test": ["t_1", "t_2"]}
    for split, part in names.items() if is_split else [("", SCENES)]:
        write_folders(root / split, part, ("bridge", "train_station"))
    found = read_labels(root, tmp_path / "lists")
    assert found.data["classes"] == ["bridge", "train_station"]
    assert sum(map(len, found.images.values())) == len(SCENES) + 4 * is_split


def test_names_of_uneven_groups_are_no_scenes(tmp_path):
    root = tmp_path / "data"
    write_masks(root, [*(f"site_{n}" for n in range(20)), *(f"{other}_1" for other in "abcdef")])
    assert read_labels(root, tmp_path / "lists").how.startswith("Split by image: 18 images for training, 4 for ")


def test_every_class_is_in_training_images(tmp_path):
    root = tmp_path / "data"
    write_masks(root, SCENES, values=(0, 1))
    for value, name in enumerate(("s3_001", "s5_000", "s8_001", "s9_000"), start=2):
        save(Image.fromarray(np.full((8, 10), value, np.uint8)), root / "masks" / f"{name}.png")
    for seed in range(4):
        found = read_labels(root, tmp_path / f"{seed}", seed=seed)
        values = {split: set() for split in found.images}
        for split, part in found.images.items():
            for path in part:
                values[split] |= {*np.unique(Image.open(root / "masks" / path.name)).tolist()}
        assert values == {"train": {*range(6)}, "val": {0, 1}, "test": {0, 1}}


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("images/areaA_3_4.png", "images/areaA"),
        ("images/P0001__1024__0___0.png", "images/P0001"),
        ("images/scene12-x512-y0.tif", "images/scene12"),
        ("seq1/Images/000100.png", "seq1/Images/"),
        ("images/city_area12.png", "images/city_area12"),
    ],
)
def test_stem_without_tile_numbers(name, expected):
    assert stem_of(Path(name), False) == expected
    assert stem_of(Path(name), True) == expected.rpartition("/")[2]


def check_rsar(found: TaskData) -> None:
    """Compare splits and classes of each image with the text file beside it, of which an invalid box is left out."""
    for split, number in {"train": 12, "val": 4, "test": 4}.items():
        labels = labels_of("detection", found.data, split, found.settings)
        assert len(labels) == number and [*labels] == sorted(found.images[split])
        for path, classes in labels.items():
            lines = (found.root / split / "annfiles" / f"{path.stem}.txt").read_text().splitlines()
            wanted = {line.split()[8] for line in lines if not line.startswith("20 20")}
            assert {found.data["classes"][index] for index in classes} == wanted


def test_configuration_names_the_labels(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="RSAR of the labels not found: .*rsar.yaml"):
        read_labels("rsar", tmp_path / "splits")
    write_rsar(tmp_path / "data")
    found = read_labels("rsar", tmp_path / "splits")
    check_rsar(found)
    assert (found.task, found.settings, found.data["min_side"]) == ("detection", {"task": "oriented"}, 2.0)
    assert found.data["classes"] == ["ship", "aircraft", "car", "tank", "bridge", "harbor"]
    with pytest.raises(ValueError, match="'oriented'.*rsar.yaml, got 'horizontal'"):
        read_labels("rsar", tmp_path / "splits", task="horizontal")
    with pytest.raises(ValueError, match="finetune_detection.*loveda"):
        read_labels("loveda", tmp_path / "other")


def test_test_split_without_annotations_is_drawn(tmp_path, monkeypatch):
    """The test images of DOTA have no annotations; a server scores their detections."""
    monkeypatch.chdir(tmp_path)
    write_rsar(tmp_path / "data")
    config = yaml.safe_load((CONFIGS / "rsar.yaml").read_text()) | {"submission": {"split": "test"}}
    splits = config["data"]["splits"]
    del splits["test"]["annotations"]
    Path("own.yaml").write_text(yaml.safe_dump(config))
    found = read_labels("own.yaml", tmp_path / "splits")
    assert [len(part) for part in found.images.values()] == [10, 4, 2] and "submission" not in found.settings
    assert all("train" in path.parts for path in found.images["test"])
    assert found.data["splits"]["test"]["annotations"] == splits["train"].pop("annotations")
    Path("own.yaml").write_text(yaml.safe_dump(config))
    with pytest.raises(ValueError, match="'train' with `annotations`.*own.yaml"):
        read_labels("own.yaml", tmp_path / "other")


def test_task_is_chosen_where_labels_allow_it(tmp_path):
    root = tmp_path / "data"
    detection_data.write_dota(root, SCENES)
    assert read_labels(root, tmp_path / "h", task="horizontal").settings == {}
    detection_data.write_coco(root, SCENES)
    for path in (root / "images").iterdir():
        save(Image.fromarray(np.eye(80, 96, dtype=np.uint8)), root / "masks" / path.name)
    assert read_labels(root, tmp_path / "i", task="instances").settings == {"task": "instances"}
    found = read_labels(root, tmp_path / "s", task="segmentation")
    assert (found.task, found.layout) == ("segmentation", "masks")
    with pytest.raises(ValueError, match="classification"):
        read_labels(root, tmp_path / "c", task="classification")
    with pytest.raises(ValueError, match="'boxes'.*oriented.*segmentation"):
        read_labels(root, tmp_path / "b", task="boxes")


def test_other_images_than_listed_are_refused(tmp_path):
    root = tmp_path / "data"
    write_folders(root, SCENES)
    found = read_labels(root, tmp_path / "lists")
    noise(root / "forest" / "s3_900.png")
    with pytest.raises(ValueError, match="s3_900"):
        read_labels(root, tmp_path / "lists")
    (root / "forest" / "s3_900.png").unlink()
    assert read_labels(root, tmp_path / "lists") == found
    found.images["val"][0].unlink()
    with pytest.raises(ValueError, match=found.images["val"][0].name):
        read_labels(root, tmp_path / "lists")


def write_broken(root: Path) -> None:
    write_folders(root, SCENES)
    (root / "field" / "s0_000.png").write_bytes(b"no image")


def write_truncated_mask_image(root: Path) -> None:
    write_masks(root, SCENES)
    path = root / "images" / "s1_001.png"
    path.write_bytes(path.read_bytes()[:150])


def write_shared(root: Path) -> None:
    write_folders(root / "train", SCENES)
    write_folders(root / "test", ["t_1", "t_2"])
    shutil.copy(root / "train" / "field" / "s0_000.png", root / "test" / "field" / "seen.png")


def write_no_objects(root: Path) -> None:
    write_yolo(root, SCENES)
    for path in (root / "labels").iterdir():
        path.write_text("")


def write_empty_class(root: Path) -> None:
    for split, names in (("train", SCENES), ("val", ["v_1", "v_2"]), ("test", ["t_1", "t_2"])):
        write_folders(root / split, names)
    (root / "val" / "forest" / "v_2.png").unlink()


def write_unlabeled_split(root: Path) -> None:
    """Write boxes whose validation images are all empty."""
    for split, names in (("train", SCENES), ("val", ["empty_101", "empty_102"]), ("test", ["t_201", "t_202"])):
        detection_data.write_dota(root / split, names)


def write_changes(root: Path) -> None:
    for folder in ("A", "B", "label"):
        noise(root / "train" / folder / "a.png")


WRONG = {
    "no folder": (lambda root: None, "data"),
    "no labels": (lambda root: noise(root / "a.png"), r"data\..*1 \.png"),
    "changes": (write_changes, "'changes'.*data"),
    "no objects": (write_no_objects, "1 .*data, found 0"),
    "empty class folder": (write_empty_class, "No images .*class 'forest': .*val/forest"),
    "no labels in a split": (write_unlabeled_split, "data, found none in the 2 images of 'val'"),
    "one mask value": (lambda root: write_masks(root, SCENES, (1,)), "data.*class 1"),
    "one class folder": (lambda root: write_folders(root, SCENES, ("field",)), r"two classes.*25 \.png"),
    "broken": (write_broken, "s0_000.png"),
    "truncated": (write_truncated_mask_image, "s1_001.png"),
    "nested": (lambda root: (write_folders(root, SCENES), noise(root / "field" / "more" / "a.png")), "more/a.png"),
    "few images": (lambda root: write_masks(root, ["a", "b", "c", "d", "e"]), "2 .*data, found 1"),
    "no training": (lambda root: write_folders(root / "test", SCENES), r"data.*\['test'\]"),
    "shared": (write_shared, "seen.png|s0_000.png"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_labels_are_refused(tmp_path, case):
    write, message = WRONG[case]
    write(tmp_path / "data")
    with pytest.raises(ValueError, match=message):
        read_labels(tmp_path / "data", tmp_path / "lists")
    assert not (tmp_path / "lists").exists()


def test_lists_are_outside_of_labels(tmp_path):
    with pytest.raises(ValueError, match="data/lists"):
        read_labels(tmp_path / "data", tmp_path / "data" / "lists")


@pytest.mark.parametrize("layout", ["dota", "folders", "table of several classes"])
def test_label_fractions_are_nested(tmp_path, layout):
    root = tmp_path / "data"
    WRITERS[layout](root, SCENES)
    found = read_labels(root, tmp_path / "lists")
    number, lists = len(found.images["train"]), {}
    for seed in (0, 1):
        for fraction in (0.01, 0.1, 0.25, 1.0):
            data = with_label_fraction(found, fraction, seed, tmp_path / "fractions")
            assert {split: data["splits"][split] for split in ("val", "test")} == {
                split: found.data["splits"][split] for split in ("val", "test")
            }
            lists[seed, fraction] = read_list(Path(data["splits"]["train"]["list"]))
            assert len(lists[seed, fraction]) == max(1, round(fraction * number))
            task = ["oriented"] if layout == "dota" else []
            opened = TASKS[found.task].data_class.from_dict(data)
            if found.task == "classification":
                opened.find_classes(["train"])
            assert len(opened.open(["train"], *task)) == len(lists[seed, fraction])
        assert set(lists[seed, 0.1]) < set(lists[seed, 0.25]) < set(lists[seed, 1.0])
    assert lists[0, 0.25] != lists[1, 0.25]
    if layout == "folders":
        assert all(len({Path(name).parts[0] for name in lists[seed, 0.1]}) == 2 for seed in (0, 1))
    for fraction in (0, 1.5):
        with pytest.raises(ValueError, match="fraction"):
            with_label_fraction(found, fraction, 0, tmp_path)
