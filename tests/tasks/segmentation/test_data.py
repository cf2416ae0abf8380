"""Tests of the segmentation data sets: label encodings, files, rows, volumes and their errors."""

import gzip

import dense_data
import nibabel
import numpy as np
import pytest
import torch
import yaml
from datasets import Dataset, Features, Value
from datasets import Image as ImageFeature
from dense_data import TWO, labelled_folder, small_mask
from hypothesis import given
from hypothesis import strategies as st
from pictures import write_bands
from PIL import Image
from volumes_on_disk import write_series

from modeling_vitp.data.classes import LabelEncoding
from modeling_vitp.data.files import find_samples
from modeling_vitp.tasks.segmentation.arguments import DenseArguments
from modeling_vitp.tasks.segmentation.data import (
    DenseData,
    balanced_weights,
    count_pixels,
    infer_classes,
    slice_volumes,
)

CUT = {"window": [0, 1]}


def benchmark(name: str, root) -> DenseData:
    return DenseData.from_dict(dense_data.read_config(name)["data"] | {"root": str(root)})


def read(path) -> np.ndarray:
    return np.array(Image.open(path))


def test_loveda_masks_are_encoded(tmp_path):
    dense_data.make_loveda(tmp_path, size=16)
    data = benchmark("loveda", tmp_path)
    samples = data.open(["train", "val"])
    train_ids = ["Rural/0", "Rural/1", "Rural/2", "Urban/10", "Urban/11", "Urban/12"]
    ids = [samples[index]["id"] for index in range(len(samples))]
    assert ids == [*train_ids, "Rural/0", "Urban/10", "Urban/11"]
    stored = read(tmp_path / "Train/Urban/masks_png/11.png")
    assert np.array_equal(samples[4]["mask"], np.where(stored == 0, 255, stored - 1))
    image = read(tmp_path / "Train/Urban/images_png/11.png")
    assert np.array_equal(samples[4]["images"][0].permute(1, 2, 0), image)
    assert "mask" not in data.open(["test"])[0]


def test_uavid_colors_are_encoded_and_decoded(tmp_path):
    dense_data.make_uavid(tmp_path)
    data = benchmark("uavid", tmp_path)
    colors = read(tmp_path / "uavid_train/seq2/Labels/000100.png")
    sample = data.open(["train"])[3]
    assert sample["id"] == "seq2/000100"
    assert sample["mask"].shape == (54, 96)
    for (row, column), label in np.ndenumerate(sample["mask"].numpy()):
        assert data.classes[label]["color"] == colors[row, column].tolist()
    assert np.array_equal(data.encoding.decode(sample["mask"].numpy()), colors)


def test_levir_cd_pairs_are_read(tmp_path):
    dense_data.make_levir_cd(tmp_path, size=16)
    sample = benchmark("levir_cd", tmp_path).open(["train"])[1]
    for image, place in zip(sample["images"], "AB", strict=True):
        assert np.array_equal(image.permute(1, 2, 0), read(tmp_path / f"train/{place}/train_2.png"))
    assert np.array_equal(sample["mask"], read(tmp_path / "train/label/train_2.png") == 255)


PAIRS = {"before": "A", "after": "B", "mask": "label"}


def test_patterns_and_values_are_inferred(tmp_path):
    dense_data.make_loveda(tmp_path / "data", size=16)
    inferred = DenseData.infer(tmp_path / "data")
    assert {split: set(files) for split, files in inferred["splits"].items()} == {
        "train": {"image", "mask"},
        "val": {"image", "mask"},
        "test": {"image"},
    }
    assert [item["value"] for item in inferred["classes"]] == list(range(8)) and inferred["ignore"] == []
    for split in inferred["splits"]:
        found = DenseData.from_dict(inferred).open([split])
        expected = benchmark("loveda", tmp_path / "data").open([split])
        files = [[sample.images + (sample.mask,) for sample, _ in samples.rows] for samples in (found, expected)]
        assert sorted(files[0], key=str) == sorted(files[1], key=str)


def test_values_of_jpeg_masks_are_no_classes(tmp_path):
    dense_data.make_loveda(tmp_path / "data", size=16)
    for path in (tmp_path / "data").rglob("masks_png/*.png"):
        Image.open(path).save(path.with_suffix(".jpg"))
        path.unlink()
    with pytest.raises(ValueError, match=r"\.jpg is a JPEG"):
        DenseData.infer(tmp_path / "data")
    settings = {"root": str(tmp_path / "data"), "classes": TWO}
    assert DenseData.from_arguments(DenseArguments(data=settings), str(tmp_path)).classes == TWO


def test_pairs_are_inferred(tmp_path):
    dense_data.make_levir_cd(tmp_path / "data", size=16)
    inferred = DenseData.infer(tmp_path / "data")
    assert [item["value"] for item in inferred["classes"]] == [0, 255]
    assert inferred["splits"]["val"] == {role: f"val/{folder}/{{name}}.png" for role, folder in PAIRS.items()}
    assert len(DenseData.from_dict(inferred).open(["train"])[0]["images"]) == 2


@pytest.mark.parametrize(
    ("masks", "values", "ignored"),
    [
        ([0, 255], [0, 255], []),
        ([0, 1, 255], [0, 1], [255]),
        ([-1, 0, 7], [0, 7], [-1]),
        ([-1, 0, 255], [0, 255], [-1]),
        ([(0, 0, 0), (255, 0, 0)], [[0, 0, 0], [255, 0, 0]], None),
    ],
)
def test_classes_are_values_of_masks(tmp_path, masks, values, ignored):
    images = [np.full((6, 8, *np.shape(value)), value, np.int16 if -1 in masks else np.uint8) for value in masks]
    for index, mask in enumerate([*images, *images]):
        dense_data.save(Image.new("RGB", (8, 6), (index, 0, 0)), tmp_path / "images" / f"{index}.png")
        path = tmp_path / "masks" / f"{index}.tif"
        path.parent.mkdir(exist_ok=True)
        write_bands(path, mask.transpose(2, 0, 1) if mask.ndim == 3 else mask[None])
    inferred = DenseData.infer(tmp_path)
    key = "color" if ignored is None else "value"
    assert [item[key] for item in inferred["classes"]] == values and inferred.get("ignore") == ignored
    data = DenseData.from_dict(inferred)
    train, test = data.open(["train"]), data.open(["test"])
    assert len(train) + len(test) == len(masks) * 2 and len(test) >= 1 and len(train) >= 1
    for item in (*train, *test):
        expected = masks[int(item["id"]) % len(masks)]
        index = values.index(list(expected) if key == "color" else expected) if expected not in (ignored or ()) else 255
        assert (item["mask"] == index).all()


def test_unknown_folder_is_refused_with_template(tmp_path):
    dense_data.save(Image.new("RGB", (8, 6)), tmp_path / "a.png")
    with pytest.raises(ValueError, match="--config: data: {root") as caught:
        DenseData.from_arguments(DenseArguments(data_root=str(tmp_path)), tmp_path / "out")
    DenseData.from_dict(yaml.safe_load(str(caught.value).split("--config: ")[1])["data"])


def test_masks_that_give_no_counts_are_refused(tmp_path, caplog):
    data = labelled_folder(tmp_path, {"a": small_mask(0, 1), "b": small_mask(0, 7, 7)})
    with pytest.raises(ValueError, match="masks/b.png has 2 pixel.*: 7"):
        count_pixels(data.open(["train"]), data.encoding.names)
    data = labelled_folder(tmp_path / "absent", {"a": small_mask(0, 0)})
    pixels = count_pixels(data.open(["train"]), data.encoding.names)
    assert pixels == {"ground": 48, "tree": 0}
    assert "tree" in caplog.text
    with pytest.raises(ValueError, match="'tree'"):
        balanced_weights(pixels)
    data = labelled_folder(tmp_path / "ignored", {"a": small_mask(*[9] * 48)})
    data.encoding = LabelEncoding(TWO, ignore=[9])
    with pytest.raises(ValueError, match="ignore"):
        count_pixels(data.open(["train"]), data.encoding.names)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"splits": {"train": {"image": "a.png"}}}, "fields"),
        ({"splits": {"train": {"before": "a/{name}.png"}}}, "`after`"),
        ({"classes": [{"name": "a"}]}, "classes.* 1"),
        ({"classes": [{"name": "a"}, {"name": "a"}]}, "'a'"),
        ({"classes": [{"name": "a", "value": 1}, {"name": "b", "value": [0, 2]}]}, "values 1 to 1"),
        ({"mask_encoding": "color"}, "Class 0: .*'color'"),
        ({"splits": {"train": {"image": "a/{name}.png", "foreground_only": True}}}, "`foreground_only`"),
        ({"volumes": CUT, "splits": {"train": {"image": "{name}.nii", "tile": {"size": 8, "overlap": 0}}}}, "`tile`"),
    ],
)
def test_bad_configurations_are_refused(tmp_path, changes, message):
    settings = {"classes": TWO, "splits": {"train": {"image": "a/{name}.png"}}, "root": str(tmp_path)}
    with pytest.raises(ValueError, match=message):
        DenseData.from_dict(settings | changes).open(["train"])


@pytest.mark.parametrize(
    "name",
    "isaid loveda uavid levir_cd whu_cd svcd s2looking amos2022 brats2021 covid_qu_ex brain_mri".split(),
)
def test_configurations_describe_their_data(name):
    config = dense_data.read_config(name)
    data = DenseData.from_dict(config["data"])
    named = {*config["train_splits"], config.get("eval_split"), config.get("test_split")} - {None}
    assert named <= set(data.splits)
    assert config.get("test_split", "") not in {*config["train_splits"], config.get("eval_split")}
    is_published = name in "isaid loveda uavid levir_cd whu_cd svcd s2looking".split()
    as_in_release = [config.get(option) for option in ("level_embeddings_at_input", "position_weight_decay")]
    assert as_in_release == ([True, True] if is_published else [None, None])
    if "submission" in config:
        assert set(config["submission"]) <= {"split", "file", "encoding"}
        assert "mask" not in data.splits[config["submission"]["split"]]


@given(st.lists(st.integers(-2, 11), min_size=6, max_size=6))
def test_encoding_equals_loop(values):
    classes = [{"name": "a", "value": 4}, {"name": "b", "value": [6, 9]}, {"name": "c", "value": 2}]
    encoding = LabelEncoding(classes, ignore=[0, -1])
    known = {4: 0, 6: 1, 7: 1, 8: 1, 9: 1, 2: 2, 0: 255, -1: 255}
    stored = np.array(values).reshape(2, 3)
    unknown = [value for value in values if value not in known]
    if unknown:
        with pytest.raises(ValueError, match=f"mask.png.* {len(unknown)} pixel.*{min(unknown)}"):
            encoding.encode(stored, "mask.png")
    else:
        assert encoding.encode(stored, "mask.png").tolist() == [[known[value] for value in row] for row in stored]


def test_palette_is_read_by_index_or_color(tmp_path):
    image = Image.fromarray(np.array([[0, 1], [1, 0]], dtype=np.uint8))
    image.putpalette([10, 20, 30, 200, 100, 0])
    assert image.mode == "P"
    dense_data.save(Image.new("RGB", (2, 2)), tmp_path / "images" / "a.png")
    dense_data.save(image, tmp_path / "masks" / "a.png")
    splits = {"train": {"image": "images/{name}.png", "mask": "masks/{name}.png"}}
    by_index = DenseData(classes=TWO, splits=splits, root=str(tmp_path))
    assert by_index.open(["train"])[0]["mask"].tolist() == [[0, 1], [1, 0]]
    classes = [{"name": "tree", "color": [200, 100, 0]}, {"name": "ground", "color": [10, 20, 30]}]
    by_color = DenseData(classes=classes, splits=splits, root=str(tmp_path), mask_encoding="color")
    assert by_color.open(["train"])[0]["mask"].tolist() == [[1, 0], [0, 1]]


@pytest.mark.parametrize("bands", [2, 4])
def test_transparency_of_tiff_mask_is_ignored(tmp_path, bands):
    data = labelled_folder(tmp_path, {"a": None})
    stored = np.stack([small_mask(0, 1)] * (bands - 1) + [small_mask(200)])
    write_bands(tmp_path / "masks" / "a.tif", stored)
    data.splits["train"]["mask"] = "masks/{name}.tif"
    assert np.array_equal(data.open(["train"])[0]["mask"], small_mask(0, 1))
    assert [item["value"] for item in infer_classes([tmp_path / "masks" / "a.tif"])["classes"]] == [0, 1]


def test_submission_needs_whole_images(tmp_path):
    data = labelled_folder(tmp_path, {"a": small_mask(0, 1)})
    data.check_submission({"split": "train", "file": "{name}.png"})
    data.splits["train"]["tile"] = {"size": 4, "overlap": 0}
    with pytest.raises(ValueError, match="submission.*'train'.*tile"):
        data.check_submission({"split": "train", "file": "{name}.png"})


def test_rows_of_hub_data_set_are_read(tmp_path):
    """Check the usual columns of segmentation data sets on the Hub, and image pairs."""
    rng = np.random.default_rng(0)
    pictures = [Image.fromarray(rng.integers(0, 256, (5, 7, 3), dtype=np.uint8)) for _ in range(3)]
    masks = [Image.fromarray(rng.integers(0, 2, (5, 7), dtype=np.uint8)) for _ in range(3)]
    columns = {"image": pictures, "label": masks, "imageB": pictures[::-1], "id": ["a", "b", "c"]}
    features = Features({**{name: ImageFeature() for name in ("image", "label", "imageB")}, "id": Value("string")})
    Dataset.from_dict(columns, features=features).to_parquet(tmp_path / "train.parquet")
    data = DenseData(classes=TWO, splits={"train": "train"}, dataset_name=str(tmp_path))
    samples = data.open(["train"])
    assert len(samples) == 3
    assert samples[1]["id"] == "b"
    assert np.array_equal(samples[1]["images"][0].permute(1, 2, 0), np.array(pictures[1]))
    assert np.array_equal(samples[1]["mask"], np.array(masks[1]))
    counts = np.bincount(np.concatenate([np.ravel(mask) for mask in masks]))
    assert [*count_pixels(samples, data.encoding.names).values()] == counts.tolist()
    columns = {"before": "image", "after": "imageB"}
    pairs = DenseData(classes=TWO, splits={"train": "train"}, dataset_name=str(tmp_path), columns=columns)
    before, after = pairs.open(["train"])[0]["images"]
    assert np.array_equal(before.permute(1, 2, 0), np.array(pictures[0]))
    assert np.array_equal(after.permute(1, 2, 0), np.array(pictures[2]))


def test_windows_of_image_and_mask_match(tmp_path):
    rng = np.random.default_rng(0)
    scene, labels = rng.integers(0, 256, (20, 30, 3), dtype=np.uint8), rng.integers(0, 2, (20, 30), dtype=np.uint8)
    dense_data.save(Image.fromarray(scene), tmp_path / "images" / "P1.png")
    dense_data.save(Image.fromarray(labels), tmp_path / "masks" / "P1.png")
    split = {"image": "images/{name}.png", "mask": "masks/{name}.png", "tile": {"size": 16, "overlap": 4}}
    samples = DenseData(classes=TWO, splits={"train": split}, root=str(tmp_path)).open(["train"])
    ids = ["P1/0_0", "P1/12_0", "P1/14_0", "P1/0_4", "P1/12_4", "P1/14_4"]
    assert [samples[index]["id"] for index in range(len(samples))] == ids
    assert np.array_equal(samples[5]["images"][0].permute(1, 2, 0), scene[4:, 14:])
    assert np.array_equal(samples[5]["mask"], labels[4:, 14:])
    assert samples[5]["case"] == "P1"


def test_files_of_different_sizes_are_refused(tmp_path):
    data = labelled_folder(tmp_path, {"a": small_mask(0, 1, shape=(6, 7))})
    with pytest.raises(ValueError, match="masks/a.png is 7 x 6 pixels, .*images/a.png is 8 x 6"):
        data.open(["train"])
    dense_data.make_levir_cd(tmp_path / "pairs", size=16)
    dense_data.save(Image.new("RGB", (16, 15)), tmp_path / "pairs/train/B/train_1.png")
    with pytest.raises(ValueError, match="B/train_1.png .*16 x 15 pixels, .*A/train_1.png .*16 x 16"):
        benchmark("levir_cd", tmp_path / "pairs").open(["train"])


@pytest.mark.parametrize("name", ["images/a.png", "masks/a.png"])
def test_truncated_file_is_refused_before_training(tmp_path, name):
    data = labelled_folder(tmp_path, {"a": small_mask(0, 1)})
    path = tmp_path / name
    path.write_bytes(path.read_bytes()[:-24])
    with pytest.raises(ValueError, match=f"{name} cannot be read"):
        data.open(["train"])


@pytest.mark.parametrize("kind", ["jpg", "tif"])
def test_rotated_orientation_is_refused(tmp_path, kind):
    """Check that a rotated image is refused, because its mask may have stored orientation."""
    data = labelled_folder(tmp_path, {"a": small_mask(0, 1, shape=(8, 8))})
    data.splits["train"]["image"] = f"images/{{name}}.{kind}"
    exif = Image.Exif()
    exif[274] = 3
    turned = {"tiffinfo": {274: 3}} if kind == "tif" else {"exif": exif}
    path = tmp_path / "images" / f"a.{kind}"
    Image.new("RGB", (8, 8)).save(path, **turned)
    with pytest.raises(ValueError, match=f"images/a.{kind} .*orientation 3"):
        data.open(["train"])
    Image.new("RGB", (8, 8)).save(path)
    assert len(data.open(["train"])) == 1


def write_volume(path, values, affine=None) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    nibabel.save(nibabel.Nifti1Image(values, np.eye(4) if affine is None else affine), path)


VOLUMES = {"image": "image_{patient}.nii.gz", "mask": "mask_{patient}.nii.gz"}


@pytest.mark.parametrize("plane", ["axial", "coronal", "sagittal"])
def test_volume_slices_have_patient_orientation(tmp_path, plane):
    """Check slices against direct indexing of a reoriented array."""
    rng = np.random.default_rng(0)
    values, labels = rng.integers(-300, 400, (5, 6, 7)).astype(np.int16), rng.integers(0, 3, (5, 6, 7)).astype(np.uint8)
    affine = np.diag([-1.0, 1.0, 2.0, 1.0])  # The first axis points to the left.
    write_volume(tmp_path / "image_7.nii.gz", values, affine)
    write_volume(tmp_path / "mask_7.nii.gz", labels, affine)
    classes = [{"name": name} for name in ("background", "liver", "spleen")]
    volumes = {"plane": plane, "window": [-160, 240]}
    data = DenseData(classes=classes, splits={"train": VOLUMES}, root=str(tmp_path), volumes=volumes)
    samples = data.open(["train"])
    values, labels = values[::-1], labels[::-1]  # The first axis points to the right.
    axis = {"sagittal": 0, "coronal": 1, "axial": 2}[plane]
    assert len(samples) == values.shape[axis]
    for index in (0, 3):
        sample = samples[index]
        assert (sample["id"], sample["case"]) == (f"7/{plane}_{index:04d}", "7")
        for turned, source in ((sample["images"][0][0], values), (sample["mask"], labels)):
            cut = np.take(source, index, axis).astype(float)
            if source is values:
                cut = np.round(255 * np.clip((cut + 160) / 400, 0, 1))
            across, up = cut.shape
            expected = [[cut[across - 1 - x, up - 1 - y] for x in range(across)] for y in range(up)]
            assert np.array_equal(turned, expected)


def test_volume_channels_and_foreground_are_used(tmp_path):
    labels = np.zeros((4, 4, 5), dtype=np.uint8)
    labels[1, 1, 2:4] = 4
    for index, name in enumerate(("t1ce", "t2", "flair")):
        values = np.zeros((4, 4, 5), dtype=np.float32)
        values[..., 1:] = np.linspace(1, 101, 64).reshape(4, 4, 4) + 1000 * index
        write_volume(tmp_path / "p1" / f"p1_{name}.nii.gz", values)
    write_volume(tmp_path / "p1" / "p1_seg.nii.gz", labels)
    config = dense_data.read_config("brats2021")["data"] | {"root": str(tmp_path)}
    config["splits"]["train"].pop("part")
    samples = DenseData.from_dict(config | {"volumes": {"percentiles": [0, 100]}}).open(["train"])
    assert [samples[index]["id"] for index in range(len(samples))] == ["p1/axial_0002", "p1/axial_0003"]
    image = samples[0]["images"][0]
    # Black and white are the smallest and largest non-zero value of each channel.
    assert torch.equal(image[0], image[1]) and torch.equal(image[0], image[2])
    gray = 255 * (np.linspace(1, 101, 64).reshape(4, 4, 4)[..., 1] - 1) / 100
    assert image[0].float().mean() == pytest.approx(gray.mean(), abs=1)
    assert samples[0]["mask"].unique().tolist() == [0, 3]


def test_values_of_volumes_may_need_more_than_8_bits(tmp_path):
    labels = np.zeros((3, 4, 5), np.int16)
    labels[0], labels[1, 2], labels[2, 3] = 2035, -1, 300
    write_volume(tmp_path / "image_1.nii.gz", np.ones((3, 4, 5), np.int16))
    write_volume(tmp_path / "mask_1.nii.gz", labels)
    settings = {"root": str(tmp_path), "splits": {"train": VOLUMES}, "volumes": CUT, "ignore": [-1, 300]}
    classes = [{"name": "rest", "value": 0}, {"name": "insula", "value": 2035}]
    samples = DenseData.from_dict(settings | {"classes": classes}).open(["train"])
    counts = sum(samples[index]["mask"].flatten().bincount(minlength=256) for index in range(len(samples)))
    assert [counts[label].item() for label in (0, 1, 255)] == [30, 20, 10]


@pytest.mark.parametrize(
    ("problem", "message"),
    [
        ("shape", r"mask_1.nii.gz has \(3, 4, 4\)"),
        ("affine", "position, .*mask_1.nii.gz .*image_1.nii.gz"),
        ("fraction", "mask_1.nii.gz .*integer"),
        ("value", "mask_1.nii.gz has 1 pixel.*: 7"),
    ],
)
def test_bad_volumes_are_refused(tmp_path, problem, message):
    values, labels = np.ones((3, 4, 5), dtype=np.float32), np.zeros((3, 4, 5), dtype=np.float32)
    if problem == "shape":
        labels = labels[..., :4]
    if problem in ("fraction", "value"):
        labels[1, 1, 1] = {"fraction": 0.5, "value": 7}[problem]
    write_volume(tmp_path / "image_1.nii.gz", values)
    write_volume(tmp_path / "mask_1.nii.gz", labels, np.diag([1, 1, 3, 1]) if problem == "affine" else None)
    with pytest.raises(ValueError, match=message):
        slice_volumes(find_samples(tmp_path, VOLUMES, "train"), LabelEncoding(TWO), window=[0, 2])


def test_dicom_series_have_spacing(tmp_path):
    """Check a DICOM series with a NIfTI mask in the orientation of dcm2niix."""
    values = np.random.default_rng(0).integers(-300, 400, (4, 6, 5))
    write_series(tmp_path / "ann" / "ct", values)
    labels = (values > 0).astype(np.uint8)
    affine = np.diag([-0.75, 0.5, 2.0, 1.0])
    affine[:3, 3] = [20, 30 - 5 * 0.5, 5]
    write_volume(tmp_path / "ann" / "liver.nii.gz", labels[:, ::-1].transpose(2, 1, 0), affine)
    splits = {"train": {"image": "{patient}/ct", "mask": "{patient}/liver.nii.gz"}}
    data = DenseData(classes=TWO, splits=splits, root=str(tmp_path), volumes={"window": [-160, 240]})
    assert data.image_spec == {"window": [-160, 240]}
    samples = data.open(["train"])
    expected = np.round(255 * np.clip((values + 160) / 400, 0, 1))
    for index in range(4):
        assert np.array_equal(samples[index]["images"][0][0], expected[index])
        assert np.array_equal(samples[index]["mask"], labels[index])
        assert (samples[index]["place"], samples[index]["spacing"]) == (index, [2.0, 0.5, 0.75])


def test_case_in_two_splits_is_refused(tmp_path):
    def check(folder, name):
        splits = {split: {"image": f"{split}/{name}"} for split in ("train", "test")}
        data = DenseData(classes=TWO, splits=splits, root=str(tmp_path / folder), volumes=CUT)
        data.check_disjoint(["train", "test"])

    values = np.random.default_rng(0).integers(-300, 400, (3, 6, 5))
    write_series(tmp_path / "tags" / "train" / "a", values, patient="ann")
    write_series(tmp_path / "tags" / "test" / "b", values + 1, patient="ann")
    with pytest.raises(ValueError, match="PatientID ann .*'train'.*'test'"):
        check("tags", "{name}")
    # The same volume, compressed in two ways.
    content = nibabel.Nifti1Image(values.astype(np.int16), np.eye(4)).to_bytes()
    for split, level in (("train", 1), ("test", 9)):
        path = tmp_path / "packed" / split / f"{level}.nii.gz"
        path.parent.mkdir(parents=True)
        path.write_bytes(gzip.compress(content, level, mtime=level))
    with pytest.raises(ValueError, match="9.nii.gz .*1.nii.gz"):
        check("packed", "{name}.nii.gz")
