"""Volumes from instructions to pretraining, fine-tuning, prediction and scores, with their geometry."""

import importlib.util
import json
import math
import shutil
from pathlib import Path

import evaluate
import nibabel
import numpy as np
import pytest
import yaml
from dense_data import BACKBONE
from dense_data import HEAD as SMALL_HEAD
from metrics_run import METRICS
from tiny_models import FROM_SCRATCH
from volumes_on_disk import CT_SERIES, check_geometry

from modeling_vitp.images.volumes import open_volume
from modeling_vitp.recipes import finetune_segmentation, make_instructions, predict_large, pretrain

pytestmark = pytest.mark.slow
TRAINING = {"max_steps": 3, "per_device_train_batch_size": 2, "learning_rate": 1e-3, "logging_steps": 1}
TRAINING |= {"report_to": "none", "bf16": False, "watch_samples": 0, "save_strategy": "no"}


def write_brain(root: Path) -> tuple[list[float], str]:
    """Write three slabs of nilearn's template; return the intensities of black and white, and the file suffix."""
    nilearn = importlib.util.find_spec("nilearn")
    if nilearn is None:
        pytest.skip("nilearn is not installed")
    template = Path(nilearn.origin).parent / "datasets" / "data"
    t1, gray, white = (
        nibabel.load(template / f"mni_icbm152_{kind}_tal_nlin_sym_09a_converted.nii.gz") for kind in ("t1", "gm", "wm")
    )
    gray, white = (np.asarray(image.dataobj).astype(int) for image in (gray, white))  # probabilities from 0 to 255
    tissue = np.where(gray + white >= 128, np.where(white > gray, 2, 1), 0).astype(np.uint8)
    for start, place in ((70, "train/{}/a"), (80, "test/{}/b"), (90, "train/{}/c")):
        part = (slice(None, None, 4), slice(None, None, 4), slice(start, start + 6))
        image = t1.slicer[part]
        for kind, values in (("images", image.dataobj), ("masks", tissue[part])):
            path = root / f"{place.format(kind)}.nii.gz"
            path.parent.mkdir(parents=True, exist_ok=True)
            nibabel.save(nibabel.Nifti1Image(np.asarray(values), image.affine, image.header), path)
    return [0, 255], ".nii.gz"


def write_ct(root: Path) -> tuple[list[float], str]:
    """Write two series of pydicom with masks of dense voxels; return the intensities shown as black and white."""
    other = CT_SERIES.parents[1] / "77654033" / "CT2"
    shutil.copytree(CT_SERIES, root / "test" / "images" / "b")
    (root / "train" / "images" / "a").mkdir(parents=True)
    for name in ("17136", "17166", "17196"):  # without the scout
        shutil.copy(other / name, root / "train" / "images" / "a")
    for split, case in (("train", "a"), ("test", "b")):
        volume = open_volume(root / split / "images" / case)
        values = np.asarray(volume.stored)
        mask = np.digitize(values, np.percentile(values, [50, 80])).astype(np.uint8)
        (root / split / "masks").mkdir()
        turned = nibabel.as_closest_canonical(nibabel.Nifti1Image(mask, volume.affine))
        nibabel.save(turned, root / split / "masks" / f"{case}.nii.gz")
    return [-1000, 1000], ""


@pytest.mark.parametrize("write", [write_brain, write_ct])
def test_volume_passes_through_all_recipes(tmp_path, write):
    pytest.importorskip("monai")
    root = tmp_path / "volumes"
    window, suffix = write(root)
    names = ["background", "grey matter", "white matter"]
    (tmp_path / "names.json").write_text(json.dumps(dict(zip("012", [None, *names[1:]]))))

    words = ["volumes", str(root), "--names", str(tmp_path / "names.json"), "--intensities", *map(str, window)]
    assert make_instructions.main([*words, "--output_dir", str(tmp_path / "instructions")]) == 0

    settings = {"dataset_name": str(tmp_path / "instructions"), "from_scratch": FROM_SCRATCH}
    settings |= {"output_dir": str(tmp_path / "vlm"), "gradient_checkpointing": False}
    (tmp_path / "pretrain.yaml").write_text(yaml.safe_dump(TRAINING | settings))
    assert pretrain.main(["--config", str(tmp_path / "pretrain.yaml")]) == 0

    splits = {
        split: {"image": f"{split}/images/{{case}}{suffix}", "mask": f"{split}/masks/{{case}}.nii.gz"}
        for split in ("train", "test")
    }
    data = {"root": str(root), "volumes": {"plane": "axial", "window": window}, "splits": splits}
    settings = {"model_name_or_path": str(tmp_path / "vlm" / "backbone"), "output_dir": str(tmp_path / "maps")}
    settings |= {"backbone": BACKBONE, "head": SMALL_HEAD, "metric": "dice", "test_split": "test", "num_pictures": 1}
    settings |= {"crop_size": 64, "window": 32, "stride": 24, "per_device_eval_batch_size": 4}
    settings |= {"data": data | {"classes": [{"name": name} for name in names]}}
    (tmp_path / "maps.yaml").write_text(yaml.safe_dump(TRAINING | settings))
    assert finetune_segmentation.main(["--config", str(tmp_path / "maps.yaml")]) == 0

    source, result = root / "test" / "images" / f"b{suffix}", tmp_path / "b.nii.gz"
    words = [str(tmp_path / "maps"), str(source), "--output", str(result)]
    assert predict_large.main([*words, "--window", "32", "--batch_size", "4"]) == 0

    predicted = nibabel.load(result)
    if suffix:
        original = nibabel.load(source)
        assert predicted.shape == original.shape
        for field in ("pixdim", "qform_code", "sform_code", "srow_x", "srow_y", "srow_z", "xyzt_units"):
            np.testing.assert_array_equal(predicted.header[field], original.header[field])
        np.testing.assert_array_equal(predicted.affine, original.affine)
        assert nibabel.aff2axcodes(predicted.affine) == nibabel.aff2axcodes(original.affine)
    else:
        check_geometry(predicted.affine, source)

    truth = nibabel.as_closest_canonical(nibabel.load(root / "test" / "masks" / "b.nii.gz"))
    found = nibabel.as_closest_canonical(predicted)
    np.testing.assert_allclose(found.affine, truth.affine, atol=1e-3)
    maps = [np.moveaxis(np.asarray(image.dataobj).astype(int), 2, 0) for image in (found, truth)]
    across, up, between = map(float, truth.header.get_zooms())
    surfaces = evaluate.load(str(METRICS / "surface_distance"), num_labels=3)
    surfaces.add_batch(predictions=maps[:1], references=maps[1:], spacings=[(between, across, up)])
    scores = surfaces.compute()
    dice = evaluate.load(str(METRICS / "dice"), num_labels=3)
    dice.add_batch(predictions=maps[0], references=maps[1], case_ids=["b"] * len(maps[0]))
    scores |= dice.compute()
    written = json.loads((tmp_path / "maps" / "metrics.json").read_text())["test"]
    for name in ("mean_surface_dice", "mean_hausdorff_95", "mean_dice_by_case"):
        assert written[f"test_{name}"] == pytest.approx(scores[name], rel=1e-5), name
    assert math.isfinite(written["test_hausdorff_95/grey matter"])
    assert "test_hausdorff_95/background" not in written
