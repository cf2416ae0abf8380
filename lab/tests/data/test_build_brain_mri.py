"""The brain MRI data set from a wheel that is made here, and the recipe on it."""

import json
import zipfile

import dense_data
import nibabel
import numpy as np
import pytest

from lab.data import build_brain_mri
from modeling_vitp.recipes.finetune_segmentation import main
from modeling_vitp.tasks.segmentation.data import DenseData

SHAPE = (20, 24, 70)
AFFINE = np.array([[-1.0, 0, 0, 9], [0, 1, 0, -12], [0, 0, 2, -30], [0, 0, 0, 1]])


@pytest.fixture
def wheel(tmp_path):
    """Tissue in slices 3 to 66, the first axis to the left: grey where the image is 100, white where it is 200."""
    rng = np.random.default_rng(0)
    tissue = np.zeros(SHAPE, dtype=int)
    for height in range(3, 67):
        tissue[:, :, height] = dense_data.blobs(rng, SHAPE[1::-1], 3)
    volumes = {"t1": 100 * tissue, "gm": 255 * (tissue == 1), "wm": 255 * (tissue == 2)}
    path = tmp_path / "nilearn-0.14.1-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for kind, values in volumes.items():
            nibabel.save(nibabel.Nifti1Image(values.astype(np.uint8), AFFINE), tmp_path / "volume.nii.gz")
            name = build_brain_mri.NAME.format(kind)
            archive.write(tmp_path / "volume.nii.gz", f"{build_brain_mri.FOLDER}/{name}")
        archive.writestr("nilearn-0.14.1.dist-info/licenses/LICENSE", "terms")
    return path, tissue


def test_tissue_is_the_likelier_one():
    probabilities = np.arange(0, 256, 5)
    grey, white = (grid.astype(np.uint8) for grid in np.meshgrid(probabilities, probabilities))
    tissue = build_brain_mri.tissue_of(grey, white)
    for (row, column), value in np.ndenumerate(tissue):
        chances = {1: grey[row, column] / 255, 2: white[row, column] / 255}
        expected = max(chances, key=chances.get) if sum(chances.values()) >= 0.5 else 0
        assert value == expected


def test_slabs_are_parts_of_the_volume(wheel, tmp_path, capsys):
    path, tissue = wheel
    build_brain_mri.main(["--wheel", str(path), "--output_dir", str(tmp_path / "data")])
    files = sorted((tmp_path / "data").glob("*/masks/*.nii.gz"), key=lambda file: file.name)
    assert [file.parent.parent.name for file in files] == ["train", "train", "train", "test"] * 2
    assert (tmp_path / "data" / "LICENSE").read_text() == "terms"
    turned, seen = tissue[::-1], []  # the first axis to the right
    for file in files:
        mask, image = nibabel.load(file), nibabel.load(str(file).replace("masks", "images"))
        assert np.array_equal(mask.affine, image.affine)
        place = np.linalg.inv(AFFINE) @ mask.affine @ [0, 0, 0, 1]  # of its first voxel, in the volume
        height = round(place[2])
        assert place[:2].tolist() == [SHAPE[0] - 1, 0]
        expected = turned[..., height : height + 8]
        assert np.array_equal(mask.get_fdata(), expected) and np.array_equal(image.get_fdata(), 100 * expected)
        seen += range(height, height + 8)
    assert seen == list(range(3, 67))

    dice = json.loads((tmp_path / "data" / "control.json").read_text())["dice"]
    test = [*range(27, 35), *range(59, 67)]
    pairs = [(min((other for other in range(3, 59) if other not in test), key=lambda o: abs(o - h)), h) for h in test]
    shown = capsys.readouterr().out
    assert list(dice) == ["gray matter", "white matter"]
    for label, (name, value) in enumerate(dice.items(), start=1):
        predicted, truth = (tissue[..., [pair[place] for pair in pairs]] == label for place in (0, 1))
        assert value == pytest.approx(2 * (predicted & truth).sum() / (predicted.sum() + truth.sum()))
        assert f"{name} {value:.3f}" in shown


def test_the_recipe_runs_on_it(wheel, tmp_path):
    path, tissue = wheel
    build_brain_mri.main(["--wheel", str(path), "--output_dir", str(tmp_path / "data")])
    settings = {"num_pictures": 1, "crop_size": 32, "window": 32, "stride": 16}
    assert main(dense_data.smoke_arguments("brain_mri", tmp_path / "data", tmp_path / "out", **settings)) == 0
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    train = [height for height in range(3, 67) if (height - 3) // 8 % 4 != 3]
    counts = np.bincount(tissue[..., train].ravel())
    assert metrics["train_pixels"] == dict(zip(build_brain_mri.TISSUES, counts.tolist()))
    assert 0 <= metrics["test"]["test_mean_dice"] <= 1
    assert json.loads((tmp_path / "out" / "config.json").read_text())["volume_plane"] == "axial"
    data = DenseData.from_dict(dense_data.read_config("brain_mri")["data"] | {"root": str(tmp_path / "data")})
    samples = data.open(["test"])
    assert len(samples) == 16 and samples[0]["id"] == "slab_03/axial_0000"
    assert np.array_equal(samples[0]["mask"], np.rot90(tissue[::-1, :, 27])[:, ::-1])
    assert np.array_equal(samples[0]["images"][0][1], 100 * np.rot90(tissue[::-1, :, 27])[:, ::-1])


def test_another_wheel_is_named(tmp_path):
    with zipfile.ZipFile(tmp_path / "other.whl", "w") as archive:
        archive.writestr("other/data", "")
    with pytest.raises(SystemExit, match="t1.*not found in .*other.whl"):
        build_brain_mri.main(["--wheel", str(tmp_path / "other.whl"), "--output_dir", str(tmp_path / "data")])
