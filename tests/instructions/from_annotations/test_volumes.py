"""Questions about slices of volumes equal those about images with the same pixels; a case is in one split only."""

import gzip
import io
import json
import shutil

import datasets
import nibabel
import numpy as np
import pytest
from PIL import Image
from pydicom.data import get_testdata_file
from volumes_on_disk import write_series

from modeling_vitp.recipes import make_instructions

SHAPE = (24, 20, 5)
AFFINE = np.diag([-1.0, 1.0, 2.0, 1.0])  # The first axis points to the left.
WINDOW = ["--intensities", "-160", "240"]


def volume(seed):
    """Return Hounsfield units, and a mask with boxes of two classes."""
    rng = np.random.default_rng(seed)
    values, mask = rng.integers(-300, 400, SHAPE).astype(np.int16), np.zeros(SHAPE, dtype=np.uint8)
    for label in (1, 2, 1):
        low = rng.integers(0, [14, 10, 3])
        mask[tuple(slice(start, start + size) for start, size in zip(low, (8, 9, 2)))] = label
    return values, mask


def save_volume(path, array, affine=AFFINE):
    path.parent.mkdir(parents=True, exist_ok=True)
    nibabel.save(nibabel.Nifti1Image(array, affine), path)


def write_case(root, split, case, seed, suffix=".nii.gz"):
    for kind, array in zip(("images", "masks"), volume(seed)):
        save_volume(root / split / kind / f"{case}{suffix}", array)


@pytest.fixture
def names(tmp_path):
    (tmp_path / "names.json").write_text(json.dumps({"0": None, "1": "liver", "2": "spleen"}))
    return ["--names", str(tmp_path / "names.json")]


def make(layout, root, output_dir, *words):
    assert make_instructions.main([layout, str(root), "--output_dir", str(output_dir), *words]) == 0
    return datasets.load_dataset("parquet", data_dir=str(output_dir), split="train", cache_dir=f"{output_dir}/.cache")


def test_slices_equal_images_with_same_pixels(tmp_path, names):
    for seed, case in enumerate(("a", "b")):
        write_case(tmp_path / "ct", "train", case, seed, (".nii", ".nii.gz")[seed])
        for kind, array in zip(("images", "masks"), volume(seed)):
            if kind == "images":
                array = np.round(255 * np.clip((array + 160.0) / 400, 0, 1)).astype(np.uint8)
            (tmp_path / "png" / kind / case).mkdir(parents=True)
            for index in range(SHAPE[2]):
                cut = np.rot90(array[::-1, :, index])[:, ::-1]
                Image.fromarray(cut).save(tmp_path / "png" / kind / case / f"axial_{index:04d}.png")
    write_case(tmp_path / "ct", "test", "c", 9)
    collages = ["--collages", "0.2", "--collage_size", "8", "--collage_grid", "2"]
    rows = make("volumes", tmp_path / "ct", tmp_path / "of_volumes", *names, *WINDOW, *collages)
    images = make("masks", tmp_path / "png", tmp_path / "of_images", *names, "--split", "all", *collages)
    assert rows["id"] == images["id"] and rows["messages"] == images["messages"] and len(rows) > 8
    for row, image in zip(rows, images):
        assert np.array_equal(np.asarray(row["images"][0]), np.asarray(image["images"][0]))


def test_dicom_series_and_nnunet_folders_are_read(tmp_path, names):
    values, mask = volume(0)
    write_series(tmp_path / "ct" / "imagesTr" / "a", values.transpose(2, 1, 0), patient="ann")
    write_series(tmp_path / "ct" / "imagesTs" / "b", values.transpose(2, 1, 0) + 1, patient="bob")
    affine = np.diag([-0.75, -0.5, 2.0, 1.0])
    affine[:3, 3] = [20.0, 30.0, 5.0]
    save_volume(tmp_path / "ct" / "labelsTr" / "a.nii.gz", mask, affine)
    rows = make("volumes", tmp_path / "ct", tmp_path / "out", *names, *WINDOW, "--plane", "coronal")
    assert {row["id"].split("/")[0] for row in rows} == {"a"} and rows[0]["images"][0].size == (24, 5)
    # Metadata of the patient are not stored.
    stored = rows.cast_column("images", datasets.List(datasets.Image(decode=False)))
    assert all(b"ann" not in row["images"][0]["bytes"] for row in stored)


def test_first_nnunet_channel_is_used(tmp_path, names):
    values, mask = volume(0)
    for folder, channels in (("both", 2), ("first", 1)):
        for case in ("a", "b_0001"):
            save_volume(tmp_path / folder / "labelsTr" / f"{case}.nii.gz", mask, np.eye(4))
            for channel in range(channels):
                path = tmp_path / folder / "imagesTr" / f"{case}_000{channel}.nii.gz"
                save_volume(path, values + 50 * channel, np.eye(4))
    rows = make("volumes", tmp_path / "both", tmp_path / "rows", *names, *WINDOW)
    expected = make("volumes", tmp_path / "first", tmp_path / "expected", *names, *WINDOW)
    assert {row["id"].split("/")[0] for row in rows} == {"a", "b_0001"}
    for row, other in zip(rows, expected, strict=True):
        assert np.array_equal(np.asarray(row["images"][0]), np.asarray(other["images"][0]))


def test_case_in_two_splits_is_named(tmp_path, names):
    root = tmp_path / "ct"
    write_case(root, "train", "a", 0)
    write_case(root, "val", "a", 1)
    arguments = ["volumes", str(root), *names, *WINDOW, "--output_dir", str(tmp_path / "out")]
    with pytest.raises(ValueError, match="case a is in two splits"):
        make_instructions.main(arguments)
    shutil.rmtree(root)
    values = volume(0)[0].transpose(2, 1, 0)
    write_series(root / "train" / "images" / "a", values, patient="ann")
    write_series(root / "test" / "images" / "b", values + 1, patient="ann")
    with pytest.raises(ValueError, match="PatientID ann is in two splits"):
        make_instructions.main(arguments)


def test_recompressed_volume_is_excluded_as_copy(tmp_path, names, capsys):
    root = tmp_path / "ct"
    write_case(root, "train", "a", 0)
    write_case(root, "train", "b", 1)
    write_case(root, "test", "c", 1)
    held_out = root / "test" / "images" / "c.nii.gz"
    held_out.write_bytes(gzip.compress(gzip.decompress(held_out.read_bytes()), 1, mtime=5))
    rows = make("volumes", root, tmp_path / "out", *names, *WINDOW)
    assert {row["id"].split("/")[0] for row in rows} == {"a"}
    assert "b.nii.gz is excluded: it is identical to the held-out" in capsys.readouterr().err


def test_dicom_is_stored_without_metadata(tmp_path):
    for label, name in (("ct", "CT_small.dcm"), ("mr", "MR_small.dcm")):
        (tmp_path / "scans" / label).mkdir(parents=True)
        shutil.copy(get_testdata_file(name), tmp_path / "scans" / label)
    rows = make("folders", tmp_path / "scans", tmp_path / "out", "--split", "all")
    assert sorted(image.size for row in rows for image in row["images"]) == [(64, 64), (128, 128)]
    stored = rows.cast_column("images", datasets.List(datasets.Image(decode=False)))
    assert {Image.open(io.BytesIO(row["images"][0]["bytes"])).format for row in stored} == {"PNG"}
