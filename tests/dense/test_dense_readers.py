import dense_data
import nibabel
import numpy as np
import pytest
import rasterio
import torch
from datasets import Dataset, Features, Value
from datasets import Image as ImageFeature
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from modeling_vitp.dense.classes import LabelEncoding
from modeling_vitp.dense.data import DenseData, balanced_weights, count_pixels
from modeling_vitp.dense.files import fill, find_samples
from modeling_vitp.dense.volumes import slice_volumes
from modeling_vitp.images.windows import window_starts, windows

TWO = [{"name": "ground"}, {"name": "tree"}]


def folder(root, masks: dict[str, np.ndarray], size=(8, 6)):
    """Grey images in `images/`, and the masks."""
    for name, mask in masks.items():
        dense_data.save(Image.new("RGB", size, (10, 20, 30)), root / "images" / f"{name}.png")
        if mask is not None:
            dense_data.save(Image.fromarray(mask), root / "masks" / f"{name}.png")
    (root / "masks").mkdir(parents=True, exist_ok=True)
    splits = {"train": {"image": "images/{name}.png", "mask": "masks/{name}.png"}}
    return DenseData(classes=TWO, splits=splits, root=str(root))


def mask(*values, shape=(6, 8)):
    array = np.zeros(shape, dtype=np.uint8)
    array.flat[: len(values)] = values
    return array


# Layouts of benchmarks


def test_loveda(tmp_path):
    dense_data.make_loveda(tmp_path, size=16)
    data = DenseData.from_dict(dense_data.read_config("loveda")["data"] | {"root": str(tmp_path)})
    samples = data.open(["train", "val"])
    ids = [samples[index]["id"] for index in range(len(samples))]
    assert ids == [
        "Rural/0",
        "Rural/1",
        "Rural/2",
        "Urban/10",
        "Urban/11",
        "Urban/12",
        "Rural/0",
        "Urban/10",
        "Urban/11",
    ]
    stored = np.array(Image.open(tmp_path / "Train/Urban/masks_png/11.png"))
    expected = np.where(stored == 0, 255, stored - 1)
    assert np.array_equal(samples[4]["mask"], expected)
    image = np.array(Image.open(tmp_path / "Train/Urban/images_png/11.png"))
    assert np.array_equal(samples[4]["images"][0].permute(1, 2, 0), image)
    assert "mask" not in data.open(["test"])[0]


def test_uavid_by_colour(tmp_path):
    dense_data.make_uavid(tmp_path)
    data = DenseData.from_dict(dense_data.read_config("uavid")["data"] | {"root": str(tmp_path)})
    samples = data.open(["train"])
    colours = np.array(Image.open(tmp_path / "uavid_train/seq2/Labels/000100.png"))
    sample = samples[3]
    assert sample["id"] == "seq2/000100"
    assert sample["mask"].shape == (54, 96)
    for (row, column), label in np.ndenumerate(sample["mask"].numpy()):
        assert data.classes[label]["colour"] == colours[row, column].tolist()
    assert np.array_equal(data.encoding.decode(sample["mask"].numpy()), colours)


def test_levir_cd(tmp_path):
    dense_data.make_levir_cd(tmp_path, size=16)
    data = DenseData.from_dict(dense_data.read_config("levir_cd")["data"] | {"root": str(tmp_path)})
    sample = data.open(["train"])[1]
    for image, place in zip(sample["images"], "AB", strict=True):
        assert np.array_equal(image.permute(1, 2, 0), np.array(Image.open(tmp_path / f"train/{place}/train_2.png")))
    label = np.array(Image.open(tmp_path / "train/label/train_2.png"))
    assert np.array_equal(sample["mask"], label == 255)


@pytest.mark.parametrize("plane", ["axial", "coronal", "sagittal"])
def test_volumes_are_cut_where_the_patient_lies(tmp_path, plane):
    """Against direct indexing of an array whose axes are turned by hand."""
    rng = np.random.default_rng(0)
    values, labels = rng.integers(-300, 400, (5, 6, 7)).astype(np.int16), rng.integers(0, 3, (5, 6, 7)).astype(np.uint8)
    affine = np.diag([-1.0, 1.0, 2.0, 1.0])  # the first axis goes to the left
    for kind, array in (("image", values), ("mask", labels)):
        nibabel.save(nibabel.Nifti1Image(array, affine), tmp_path / f"{kind}_7.nii.gz")
    splits = {"train": {"image": "image_{patient}.nii.gz", "mask": "mask_{patient}.nii.gz"}}
    classes = [{"name": name} for name in ("background", "liver", "spleen")]
    volumes = {"plane": plane, "window": [-160, 240]}
    samples = DenseData(classes=classes, splits=splits, root=str(tmp_path), volumes=volumes).open(["train"])
    values, labels = values[::-1], labels[::-1]  # now to the right
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
            expected = [[cut[x, up - 1 - y] for x in range(across)] for y in range(up)]
            assert np.array_equal(turned, expected)


def test_channels_of_a_volume_and_slices_with_foreground(tmp_path):
    labels = np.zeros((4, 4, 5), dtype=np.uint8)
    labels[1, 1, 2:4] = 4
    for index, name in enumerate(("t1ce", "t2", "flair")):
        values = np.zeros((4, 4, 5), dtype=np.float32)
        values[..., 1:] = np.linspace(1, 101, 64).reshape(4, 4, 4) + 1000 * index
        (tmp_path / "p1").mkdir(exist_ok=True)
        nibabel.save(nibabel.Nifti1Image(values, np.eye(4)), tmp_path / "p1" / f"p1_{name}.nii.gz")
    nibabel.save(nibabel.Nifti1Image(labels, np.eye(4)), tmp_path / "p1" / "p1_seg.nii.gz")
    config = dense_data.read_config("brats2021")["data"] | {"root": str(tmp_path)}
    config["splits"]["train"].pop("part")
    samples = DenseData.from_dict(config | {"volumes": {"percentiles": [0, 100]}}).open(["train"])
    assert [samples[index]["id"] for index in range(len(samples))] == ["p1/axial_0002", "p1/axial_0003"]
    image = samples[0]["images"][0]
    # Black and white are each channel's own least and largest value that is not 0.
    assert torch.equal(image[0], image[1]) and torch.equal(image[0], image[2])
    assert image[0].float().mean() == pytest.approx(
        255 * (np.linspace(1, 101, 64).reshape(4, 4, 4)[..., 1] - 1).mean() / 100, abs=1
    )
    assert samples[0]["mask"].unique().tolist() == [0, 3]


def test_a_data_set_of_the_hub(tmp_path):
    """With the columns that segmentation data sets of the Hub have, and pairs."""
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
    assert count_pixels(samples, data.encoding.names) == {
        name: sum((np.array(mask) == index).sum() for mask in masks) for index, name in enumerate(("ground", "tree"))
    }
    pairs = DenseData(
        classes=TWO,
        splits={"train": "train"},
        dataset_name=str(tmp_path),
        columns={"before": "image", "after": "imageB"},
    )
    before, after = pairs.open(["train"])[0]["images"]
    assert np.array_equal(before.permute(1, 2, 0), np.array(pictures[0]))
    assert np.array_equal(after.permute(1, 2, 0), np.array(pictures[2]))


def test_a_tiff_of_many_bands_is_read_in_windows(tmp_path):
    rng = np.random.default_rng(0)
    bands, labels = rng.integers(0, 4000, (5, 20, 24), dtype=np.uint16), rng.integers(0, 2, (1, 20, 24), dtype=np.uint8)
    for name, array in (("image", bands), ("mask", labels)):
        settings = {"count": len(array), "height": 20, "width": 24, "dtype": array.dtype}
        with rasterio.open(tmp_path / f"{name}_1.tif", "w", "GTiff", **settings) as file:
            file.write(array)
    split = {"image": "image_{n}.tif", "mask": "mask_{n}.tif", "tile": {"size": 16, "overlap": 4}}
    spec = {"bands": [3, 2, 1], "window": [0, 3000]}
    samples = DenseData(classes=TWO, splits={"train": split}, root=str(tmp_path), input_spec=spec).open(["train"])
    sample = samples[3]
    assert sample["id"] == "1/8_4"
    expected = np.round(255 * np.clip(bands[[3, 2, 1], 4:, 8:] / 3000, 0, 1))
    assert np.abs(sample["images"][0].numpy() - expected).max() <= 1
    assert np.array_equal(sample["mask"], labels[0, 4:, 8:])


# Encodings and windows


@given(st.lists(st.integers(0, 11), min_size=6, max_size=6))
def test_values_are_mapped_as_a_loop_maps_them(values):
    classes = [{"name": "a", "value": 4}, {"name": "b", "value": [6, 9]}, {"name": "c", "value": 2}]
    encoding = LabelEncoding(classes, ignore=[0])
    known = {4: 0, 6: 1, 7: 1, 8: 1, 9: 1, 2: 2, 0: 255}
    stored = np.array(values).reshape(2, 3)
    unknown = sorted({value for value in values if value not in known})
    if unknown:
        with pytest.raises(
            ValueError, match=f"mask.png.*{len([v for v in values if v in unknown])} pixel.*{unknown[0]}"
        ):
            encoding.encode(stored, "mask.png")
    else:
        assert encoding.encode(stored, "mask.png").tolist() == [[known[value] for value in row] for row in stored]


def test_a_palette_is_read_by_index_or_by_colour(tmp_path):
    image = Image.fromarray(np.array([[0, 1], [1, 0]], dtype=np.uint8))
    image.putpalette([10, 20, 30, 200, 100, 0])
    assert image.mode == "P"
    dense_data.save(Image.new("RGB", (2, 2)), tmp_path / "images" / "a.png")
    dense_data.save(image, tmp_path / "masks" / "a.png")
    splits = {"train": {"image": "images/{name}.png", "mask": "masks/{name}.png"}}
    by_index = DenseData(classes=TWO, splits=splits, root=str(tmp_path))
    assert by_index.open(["train"])[0]["mask"].tolist() == [[0, 1], [1, 0]]
    classes = [{"name": "tree", "colour": [200, 100, 0]}, {"name": "ground", "colour": [10, 20, 30]}]
    by_colour = DenseData(classes=classes, splits=splits, root=str(tmp_path), mask_encoding="colour")
    assert by_colour.open(["train"])[0]["mask"].tolist() == [[1, 0], [0, 1]]


@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 20), st.data())
def test_windows_cover_an_image(width, height, size, data):
    overlap = data.draw(st.integers(0, size - 1))
    covered = np.zeros((height, width), dtype=int)
    boxes = windows((height, width), size, overlap)
    for box in boxes:
        left, top, right, bottom = box or (0, 0, width, height)
        assert 0 <= left < right <= width and 0 <= top < bottom <= height
        assert right - left == min(size, width) and bottom - top == min(size, height)
        covered[top:bottom, left:right] += 1
    assert covered.min() >= 1
    assert len(set(boxes)) == len(boxes)


def test_windows_of_a_scene_are_cut_from_image_and_mask_alike(tmp_path):
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


# Splits


def test_patterns_with_forms_and_folders_of_any_depth(tmp_path):
    for name in ("a/x/P0001.png", "P0002.png", "a/P12.png", "a/P0001_mask.png", "b/P0002_mask.png"):
        dense_data.save(Image.new("L", (2, 2)), tmp_path / name)
    samples = find_samples(tmp_path, {"image": "**/{name:P\\d+}.png"}, "train")
    assert [sample.id for sample in samples] == ["P0001", "P0002", "P12"]
    settings = {"image": "**/{name:P\\d{4}}.png", "mask": "**/{name}_mask.png"}
    with pytest.raises(ValueError, match="fields"):
        find_samples(tmp_path, settings, "train")
    assert fill("{a:x.*}/{b}.png", {"a": "1", "b": "2"}) == "1/2.png"


def test_parts_are_by_patient_and_do_not_overlap(tmp_path):
    for patient in range(30):
        for image in range(2):
            dense_data.save(Image.new("L", (2, 2)), tmp_path / f"p{patient}_{image}.png")
    parts = {"train": [0.0, 0.6], "val": [0.6, 0.8], "test": [0.8, 1.0]}
    splits = {name: {"image": "{patient}_{image}.png", "part": part} for name, part in parts.items()}
    found = {name: find_samples(tmp_path, settings, name) for name, settings in splits.items()}
    assert sum(map(len, found.values())) == 60
    patients = {name: {sample.case for sample in samples} for name, samples in found.items()}
    assert all(len(samples) == 2 * len(patients[name]) for name, samples in found.items())
    data = DenseData(classes=TWO, splits=splits, root=str(tmp_path))
    data.check_disjoint(list(parts))
    splits["val"]["part"] = [0.5, 0.8]
    with pytest.raises(ValueError, match="patient p.* is in both splits 'train' and 'val'"):
        data.check_disjoint(list(parts))


def test_a_list_chooses_samples(tmp_path):
    data = folder(tmp_path, {name: mask(0, 1) for name in "abcd"})
    (tmp_path / "train.txt").write_text("b\nd.png\n")
    data.splits["train"]["list"] = "train.txt"
    samples = data.open(["train"])
    assert [samples[index]["id"] for index in range(2)] == ["b", "d"]
    (tmp_path / "train.txt").write_text("x\n")
    with pytest.raises(ValueError, match="train.txt: 'x' is the name of 0 samples"):
        data.open(["train"])


# What is wrong is named


def test_values_outside_the_classes(tmp_path):
    data = folder(tmp_path, {"a": mask(0, 1), "b": mask(0, 7, 7)})
    with pytest.raises(ValueError, match=r"masks/b.png has 2 pixel\(s\) of 1 value\(s\) outside the classes: 7"):
        count_pixels(data.open(["train"]), data.encoding.names)


def test_image_and_mask_of_different_size(tmp_path):
    data = folder(tmp_path, {"a": mask(0, 1, shape=(6, 7))})
    with pytest.raises(ValueError, match=r"masks/a.png is 7 x 6 pixels, but its image .*images/a.png 8 x 6"):
        data.open(["train"])[0]


def test_images_of_a_pair_of_different_size(tmp_path):
    dense_data.make_levir_cd(tmp_path, size=16)
    dense_data.save(Image.new("RGB", (16, 15)), tmp_path / "train/B/train_1.png")
    data = DenseData.from_dict(dense_data.read_config("levir_cd")["data"] | {"root": str(tmp_path)})
    with pytest.raises(ValueError, match="B/train_1.png is 16 x 15 pixels, but .*A/train_1.png 16 x 16"):
        data.open(["train"])[0]


def test_an_empty_mask_folder(tmp_path):
    data = folder(tmp_path, {"a": None})
    with pytest.raises(ValueError, match="Split 'train' has no mask: no file is like .*masks/{name}.png"):
        data.open(["train"])


@pytest.mark.parametrize("place", ["A", "B", "label"])
def test_a_pair_with_one_image_missing(tmp_path, place):
    dense_data.make_levir_cd(tmp_path, size=16)
    (tmp_path / f"train/{place}/train_2.png").unlink()
    data = DenseData.from_dict(dense_data.read_config("levir_cd")["data"] | {"root": str(tmp_path)})
    role = {"A": "before", "B": "after", "label": "mask"}[place]
    with pytest.raises(ValueError, match=rf"train_2.png has no {role}: there is no .*train/{place}/train_2.png"):
        data.open(["train"])


def test_a_class_that_never_occurs(tmp_path, caplog):
    data = folder(tmp_path, {"a": mask(0, 0)})
    pixels = count_pixels(data.open(["train"]), data.encoding.names)
    assert pixels == {"ground": 48, "tree": 0}
    assert "['tree'] never occur" in caplog.text
    with pytest.raises(ValueError, match="'tree'"):
        balanced_weights(pixels)


def test_masks_that_are_all_ignored(tmp_path):
    data = folder(tmp_path, {"a": mask(*[9] * 48)})
    data.encoding = LabelEncoding(TWO, ignore=[9])
    with pytest.raises(ValueError, match="all are to be ignored"):
        count_pixels(data.open(["train"]), data.encoding.names)


@pytest.mark.parametrize("what", ["nan", "shape", "affine", "fraction", "value", "broken"])
def test_volumes_that_are_wrong(tmp_path, what):
    values, labels = np.ones((3, 4, 5), dtype=np.float32), np.zeros((3, 4, 5), dtype=np.float32)
    affine = np.eye(4)
    if what == "nan":
        values[0, 1, 2] = np.nan
    elif what == "shape":
        labels = labels[..., :4]
    elif what == "affine":
        affine = np.diag([1, 1, 3, 1])
    elif what == "fraction":
        labels[1, 1, 1] = 0.5
    elif what == "value":
        labels[1, 1, 1] = 7
    nibabel.save(nibabel.Nifti1Image(values, np.eye(4)), tmp_path / "image_1.nii.gz")
    nibabel.save(nibabel.Nifti1Image(labels, affine), tmp_path / "mask_1.nii.gz")
    if what == "broken":
        (tmp_path / "mask_1.nii.gz").write_bytes(b"no volume")
    samples = find_samples(tmp_path, {"image": "image_{patient}.nii.gz", "mask": "mask_{patient}.nii.gz"}, "train")
    expected = {
        "nan": r"image_1.nii.gz has 1 values that are NaN or infinite",
        "shape": r"mask_1.nii.gz has shape \(3, 4, 4\)",
        "affine": r"mask_1.nii.gz lies elsewhere than .*image_1.nii.gz",
        "value": r"mask_1.nii.gz has 1 pixel\(s\) of 1 value\(s\) outside the classes: 7",
        "fraction": r"mask_1.nii.gz has values that are no whole numbers",
        "broken": r"mask_1.nii.gz cannot be read",
    }
    with pytest.raises(ValueError, match=expected[what]):
        slice_volumes(samples, LabelEncoding(TWO), window=[0, 2])


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_a_broken_image(tmp_path, suffix):
    data = folder(tmp_path, {"a": mask(0, 1)})
    (tmp_path / "images/a.png").unlink()
    data.splits["train"]["image"] = f"images/{{name}}.{suffix}"
    (tmp_path / f"images/a.{suffix}").write_bytes(b"no image")
    with pytest.raises(ValueError, match=f"images/a.{suffix} cannot be read"):
        data.open(["train"])[0]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"splits": {"train": {"image": "a/{name}.png", "maks": "b"}}}, "unknown settings .*maks"),
        ({"splits": {"train": {"image": "a.png"}}}, "needs the fields"),
        ({"splits": {"train": {"before": "a/{name}.png"}}}, "needs either `image`, or `before` and `after`"),
        ({"classes": [{"name": "a"}]}, "1 classes are given"),
        ({"classes": [{"name": "a"}, {"name": "a"}]}, "Two classes are called 'a'"),
        ({"classes": [{"name": "a", "value": 1}, {"name": "b", "value": [0, 2]}]}, "stands for two things"),
        ({"mask_encoding": "colour"}, "needs a name, a colour"),
        ({"root": None}, "either `root`"),
        ({"tile": 3}, "unknown"),
    ],
)
def test_configurations_that_are_wrong(tmp_path, changes, message):
    settings = {"classes": TWO, "splits": {"train": {"image": "a/{name}.png"}}, "root": str(tmp_path)}
    with pytest.raises(ValueError, match=message):
        DenseData.from_dict(settings | changes).open(["train"])


# Configurations


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
    if "submission" in config:
        assert set(config["submission"]) <= {"split", "file", "encoding"}
        assert "mask" not in data.splits[config["submission"]["split"]]


@given(st.integers(1, 300), st.integers(1, 300), st.data())
def test_windows_along_an_axis_cover_it_and_the_last_ends_with_it(length, window, data):
    stride = data.draw(st.integers(1, window))
    starts = window_starts(length, window, stride)
    covered = np.zeros(length, dtype=int)
    for start in starts:
        covered[start : start + window] += 1
    assert covered.min() >= 1
    assert starts[0] == 0 and starts[-1] + min(window, length) == length
    assert starts == sorted(set(starts)) and all(start == index * stride for index, start in enumerate(starts[:-1]))
    assert len(starts) == 1 + -(-max(length - window, 0) // stride)  # no more than are needed
