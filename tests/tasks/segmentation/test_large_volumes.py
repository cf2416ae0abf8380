"""Tests of `predict_volume` against slices of fine-tuning, and of the position of its output."""

import json
import subprocess
import sys

import nibabel
import numpy as np
import pytest
import torch
from interrupting import Killed, killed_after
from pictures import write_bands
from tiny_models import HEAD, adapter_config
from volumes_on_disk import CT_SERIES, OBLIQUE, check_geometry, write_series

from modeling_vitp import (
    ViTPForSemanticSegmentation,
    ViTPSegmentationConfig,
    ViTPSegmentationImageProcessor,
    predict_volume,
)
from modeling_vitp.data.classes import LabelEncoding
from modeling_vitp.data.files import FileSample
from modeling_vitp.recipes import predict_large as script
from modeling_vitp.tasks.segmentation.data import Rows, slice_volumes
from modeling_vitp.tasks.segmentation.prediction import predict_large, sliding_window

WINDOWS = {"window": 32, "stride": 24, "batch_size": 2}
SETTINGS = {"input_spec": {"window": [-500, 900]}}
AFFINE = np.array([[0, 0, 3.0, 1], [-2, 0.1, 0, 2], [0.1, -1, 0, 3], [0, 0, 0, 1]])


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    labels = {"id2label": {0: "rest", 1: "liver", 2: "spleen"}, "label2id": {"rest": 0, "liver": 1, "spleen": 2}}
    config = ViTPSegmentationConfig(backbone_config=adapter_config(), **HEAD, **labels)
    model = ViTPForSemanticSegmentation(config).eval()
    classifier = model.decode_head.classifier  # Large weights, so that more than one class is predicted.
    classifier.weight.data *= 100
    classifier.bias.data.zero_()
    return model


def values(shape=(6, 3, 40)):
    grids = np.indices(shape)
    waves = sum(np.sin(grid / (3 + axis)) for axis, grid in enumerate(grids))
    return (500 * waves + np.random.default_rng(0).normal(0, 100, shape)).astype(np.int16)


def write_nifti(path, stored=None, kind=nibabel.Nifti1Image):
    image = kind(values() if stored is None else stored, AFFINE)
    image.set_qform(AFFINE, 1, strip_shears=True)
    image.set_sform(AFFINE, 3)
    image.header["descrip"], image.header["cal_max"] = b"of a scanner", 400
    image.header.set_xyzt_units("mm")
    nibabel.save(image, path)
    return path


@torch.no_grad()
def as_in_training(model, path, plane="axial", window=(-500, 900), scores=False):
    """Predict the slices of a volume as in the evaluation of fine-tuning."""
    sample = FileSample("a", {"name": "a"}, (path,) if not isinstance(path, tuple) else path, None)
    encoding = LabelEncoding([{"name": "a"}, {"name": "b"}])
    rows = Rows(slice_volumes([sample], encoding, plane, window), encoding)
    found = []
    for index in range(len(rows)):
        pixels = ViTPSegmentationImageProcessor()(rows[index]["images"][0], return_tensors="pt").pixel_values
        logits = sliding_window(lambda pixels: model(pixels).logits, pixels, **WINDOWS)[0]
        found.append(logits.softmax(0).movedim(0, -1).numpy() if scores else logits.argmax(0).numpy())
    return np.stack(found)


def placed(slices, image, plane):
    """Return slices in the axes of a NIfTI file, through its canonical orientation."""
    axis = {"sagittal": 0, "coronal": 1, "axial": 2}[plane]
    canonical = np.moveaxis(np.stack([np.rot90(one[:, ::-1], -1) for one in slices]), 0, axis)
    turned = nibabel.as_closest_canonical(
        nibabel.Nifti1Image(np.arange(np.prod(image.shape)).reshape(image.shape).astype(np.int32), image.affine)
    )
    found = np.empty(image.shape, dtype=canonical.dtype)
    found.ravel()[np.asarray(turned.dataobj).ravel()] = canonical.ravel()
    return found


@pytest.mark.parametrize("plane", ["axial", "coronal"])
def test_nifti_equals_prediction_of_slices(model, tmp_path, plane):
    path = write_nifti(tmp_path / "v.nii.gz")
    output, probabilities = tmp_path / "classes.nii.gz", tmp_path / "p.nii.gz"
    processor = ViTPSegmentationImageProcessor(**SETTINGS)
    predict_volume(model, processor, path, output, plane=plane, probabilities=probabilities, **WINDOWS)
    source, result, scores = map(nibabel.load, (path, output, probabilities))
    expected = as_in_training(model, path, plane)
    assert len(np.unique(expected)) > 1
    np.testing.assert_array_equal(result.get_fdata(), placed(expected, source, plane))
    assert result.get_data_dtype() == np.uint8
    np.testing.assert_array_equal(result.affine, source.affine)
    assert result.header.get_slope_inter() in ((1.0, 0.0), (None, None))
    kept = ("pixdim", "qform_code", "sform_code", "descrip", "xyzt_units", "srow_x", "quatern_b", "qoffset_x", "dim")
    for field in kept:
        np.testing.assert_array_equal(result.header[field], source.header[field])
    assert result.header.get_intent()[0] == "label"
    assert json.loads(result.header.extensions[0].get_content()) == {"classes": ["rest", "liver", "spleen"]}
    shares = as_in_training(model, path, plane, scores=True)
    assert scores.shape == (*source.shape, 3)
    for label in range(3):
        there = placed(shares[..., label], source, plane)
        np.testing.assert_allclose(scores.get_fdata()[..., label], there, atol=0.51 / 255)
    np.testing.assert_array_equal(scores.affine, source.affine)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["classes.nii.gz", "p.nii.gz", "v.nii.gz"]


def test_series_becomes_nifti_at_its_position(model, tmp_path):
    processor = ViTPSegmentationImageProcessor(**SETTINGS)
    predict_volume(model, processor, CT_SERIES, tmp_path / "c.nii", plane="axial", **WINDOWS)
    result = nibabel.load(tmp_path / "c.nii")
    assert result.shape == (16, 16, 5) and result.header.get_xyzt_units()[0] == "mm"
    check_geometry(result.affine, CT_SERIES)
    np.testing.assert_array_equal(result.get_fdata(), placed(as_in_training(model, CT_SERIES), result, "axial"))
    write_series(tmp_path / "oblique", values((4, 20, 24)) // 2, OBLIQUE)
    options = {"plane": "coronal", "percentiles": (1, 99), **WINDOWS}
    predict_volume(model, ViTPSegmentationImageProcessor(), tmp_path / "oblique", tmp_path / "o.nii", **options)
    check_geometry(nibabel.load(tmp_path / "o.nii").affine, tmp_path / "oblique")


@pytest.mark.slow
def test_script_predicts_channels_and_nifti_2(model, tmp_path, capsys):
    parts = [values(), values()[::-1], values() // 2]
    paths = tuple(write_nifti(tmp_path / f"{index}.nii", part, nibabel.Nifti2Image) for index, part in enumerate(parts))
    model.save_pretrained(tmp_path / "model")
    ViTPSegmentationImageProcessor().save_pretrained(tmp_path / "model")
    words = [str(tmp_path / "model"), *map(str, paths), "--output", str(tmp_path / "c.nii.gz"), "--batch_size", "2"]
    words += ["--window", "32", "--intensities", "-500", "900", "--plane", "coronal"]
    assert script.main(words) == 0
    result = nibabel.load(tmp_path / "c.nii.gz")
    assert isinstance(result, nibabel.Nifti2Image)
    expected = placed(as_in_training(model, paths, "coronal"), result, "coronal")
    np.testing.assert_array_equal(result.get_fdata(), expected)
    with pytest.raises(ValueError, match="--classes"):
        script.main([*words, "--classes", "x.yaml"])

    # The plane is that of the training by default, and another one is refused.
    words = [*words[:-2], "--output", str(tmp_path / "again.nii.gz")]
    with pytest.raises(ValueError, match="`plane`"):
        script.main(words)
    config = ViTPSegmentationConfig.from_pretrained(tmp_path / "model")
    config.volume_plane = "coronal"
    config.save_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match="`plane`.*coronal.*axial"):
        script.main([*words, "--plane", "axial"])
    assert script.main(words) == 0
    np.testing.assert_array_equal(nibabel.load(tmp_path / "again.nii.gz").get_fdata(), result.get_fdata())


def test_killed_run_resumes_to_same_file(model, tmp_path, monkeypatch):
    """Check a run that is killed in the third slice, and whose second slice is incomplete on disk."""
    path = write_nifti(tmp_path / "v.nii")
    processor = ViTPSegmentationImageProcessor(**SETTINGS)
    options = {"probabilities": tmp_path / "p.nii.gz", "plane": "axial"}
    options |= {"batch_size": 2, "window": 48, "stride": 48}  # One call per slice.

    def run(name, **more):
        predict_volume(model, processor, path, tmp_path / f"{name}.nii.gz", **options | more)
        return [(tmp_path / file).read_bytes() for file in (f"{name}.nii.gz", "p.nii.gz")]

    whole = run("whole")
    (tmp_path / "p.nii.gz").unlink()
    with monkeypatch.context() as patch, pytest.raises(Killed):
        killed_after(model, patch, 2)
        run("killed")
    part = tmp_path / "killed.nii.gz.part"
    assert part.stat().st_size == 2 * 4 * 6 * 40 and not (tmp_path / "killed.nii.gz").exists()
    with part.open("r+b") as file:
        file.truncate(part.stat().st_size - 9)
    with pytest.raises(ValueError, match="killed.nii.gz.part .*plane"):
        run("killed", plane="coronal")
    with monkeypatch.context() as patch:
        killed_after(model, patch, 2)
        assert run("killed") == whole


def test_model_of_volumes_takes_no_geotiff(model, tmp_path, monkeypatch):
    monkeypatch.setattr(model.config, "volume_plane", "axial")
    path = write_bands(tmp_path / "photo.tif", np.zeros((3, 32, 32), dtype=np.uint8))
    with pytest.raises(ValueError, match="axial.*photo.tif"):
        predict_large(model, ViTPSegmentationImageProcessor(**SETTINGS), path, tmp_path / "classes.tif")
    assert [file.name for file in tmp_path.iterdir()] == ["photo.tif"]


def test_bad_prediction_arguments_are_refused(model, tmp_path):
    path = write_nifti(tmp_path / "v.nii")
    nibabel.save(nibabel.Nifti1Image(values(), np.diag([1, 1, 5, 1])), tmp_path / "moved.nii")

    def run(volumes=path, output="c.nii.gz", spec=SETTINGS, **options):
        options = {"plane": "axial"} | options
        predict_volume(model, ViTPSegmentationImageProcessor(**spec), volumes, tmp_path / output, **options)

    for options, message in (
        ({"output": "c.tif"}, ".nii.gz.*c.tif"),
        ({"spec": {}}, "intensities"),
        ({"intensities": [5, 5]}, r"window.*\[5, 5\]"),
        ({"plane": "top"}, "plane.*'top'"),
        ({"volumes": [path, path]}, "three volumes.* 2"),
        ({"volumes": [path, path, tmp_path / "moved.nii"]}, "moved.nii .*v.nii"),
    ):
        with pytest.raises(ValueError, match=message):
            run(**options)
    assert not list(tmp_path.glob("*.part"))
    (tmp_path / "c.nii.gz").touch()
    with pytest.raises(FileExistsError, match="c.nii.gz"):
        run()


@pytest.mark.slow
@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
def test_one_slice_is_in_memory(tmp_path, suffix):
    """Check the memory for a volume of 126 MB in 120 slices, with a convolution as model."""
    stored = np.zeros((512, 512, 120), dtype=np.float32)
    stored[100:400, 100:400] = np.random.default_rng(0).random((300, 300, 1))
    nibabel.save(nibabel.Nifti1Image(stored, np.eye(4)), tmp_path / f"v{suffix}")
    code = f"""
from pathlib import Path
from types import SimpleNamespace
import torch
from modeling_vitp import ViTPSegmentationImageProcessor, predict_volume

used = []

def measure():
    status = Path("/proc/self/status").read_text().splitlines()
    used.append(int(next(line for line in status if line.startswith("RssAnon")).split()[1]) * 1024)

class Model(torch.nn.Conv2d):
    config = SimpleNamespace(num_labels=2, id2label={{0: "rest", 1: "liver"}}, volume_plane=None)
    images_per_sample, device, dtype = 1, torch.device("cpu"), torch.float32

    def forward(self, pixel_values):
        measure()
        return SimpleNamespace(logits=super().forward(pixel_values))

processor = ViTPSegmentationImageProcessor(input_spec={{"window": [0, 1]}})
measure()
predict_volume(Model(3, 2, 1), processor, "v{suffix}", "classes.nii.gz", plane="sagittal", window=512, stride=512)
print(max(used) - used[0])
"""
    run = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-3000:]
    print(f"{int(run.stdout) / 1e6:.0f} MB")
    assert int(run.stdout) < 60e6
    assert nibabel.load(tmp_path / "classes.nii.gz").shape == stored.shape
