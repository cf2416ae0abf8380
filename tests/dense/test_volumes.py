"""Volumes are cut into slices."""

import gzip

import dense_data
import nibabel
import numpy as np
import pytest
import torch
from dense_data import TWO
from volumes_on_disk import write_series

from modeling_vitp.dense.data import DenseData, LabelEncoding, slice_volumes
from modeling_vitp.training.fine_tuning_data import find_samples


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


def test_series_of_dicom_are_volumes_and_know_their_spacing(tmp_path):
    """A mask in NIfTI, as dcm2niix turns it, belongs to a series that lies in the same place."""
    values = np.random.default_rng(0).integers(-300, 400, (4, 6, 5))
    write_series(tmp_path / "ann" / "ct", values)
    labels = (values > 0).astype(np.uint8)
    affine = np.diag([-0.75, 0.5, 2.0, 1.0])
    affine[:3, 3] = [20, 30 - 5 * 0.5, 5]
    nibabel.save(nibabel.Nifti1Image(labels[:, ::-1].transpose(2, 1, 0), affine), tmp_path / "ann" / "liver.nii.gz")
    splits = {"train": {"image": "{patient}/ct", "mask": "{patient}/liver.nii.gz"}}
    data = DenseData(classes=TWO, splits=splits, root=str(tmp_path), volumes={"window": [-160, 240]})
    assert data.image_spec == {"window": [-160, 240]}
    samples = data.open(["train"])
    expected = np.round(255 * np.clip((values + 160) / 400, 0, 1))
    for index in range(4):
        assert np.array_equal(samples[index]["images"][0][0], expected[index][:, ::-1])
        assert np.array_equal(samples[index]["mask"], labels[index][:, ::-1])
        assert (samples[index]["place"], samples[index]["spacing"]) == (index, [2.0, 0.5, 0.75])


def check(root, pattern="{split}/{name}", **settings):
    splits = {split: {"image": pattern.replace("{split}", split)} for split in ("train", "test")}
    data = DenseData(classes=TWO, splits=splits, root=str(root), volumes={"window": [0, 1]}, **settings)
    data.check_disjoint(["train", "test"])


def test_a_case_in_two_splits_is_named(tmp_path, caplog):
    values = np.random.default_rng(0).integers(-300, 400, (3, 6, 5))
    write_series(tmp_path / "tags" / "train" / "a", values, patient="ann")
    write_series(tmp_path / "tags" / "test" / "b", values + 1, patient="ann")
    with pytest.raises(
        ValueError, match="PatientID ann is in both splits 'train', as .*a, and 'test', as .*b: take the"
    ):
        check(tmp_path / "tags")
    check(tmp_path / "tags", allow_shared_images=True)
    assert "PatientID ann is in both splits" in caplog.text

    for split, name in (("train", "a"), ("test", "b")):
        (tmp_path / "packed" / split).mkdir(parents=True)
        content = nibabel.Nifti1Image(values.astype(np.int16), np.eye(4)).to_bytes()
        packed = gzip.compress(content, 1 if name == "a" else 9, mtime=len(name))
        (tmp_path / "packed" / split / f"{name}.nii.gz").write_bytes(packed)
    with pytest.raises(ValueError, match="b.nii.gz in split 'test' is the same image as .*a.nii.gz in 'train'"):
        check(tmp_path / "packed", "{split}/{name}.nii.gz")

    write_series(tmp_path / "names" / "train" / "p1", values, patient="p1")
    write_series(tmp_path / "names" / "test" / "p1", values + 1, patient="p2")
    with pytest.raises(ValueError, match="patient p1 is in both splits 'train' and 'test'"):
        check(tmp_path / "names", "{split}/{patient}")
