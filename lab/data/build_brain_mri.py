"""Build a small data set of brain MRI: T1, with gray and white matter as masks, in slabs of NIfTI.

    python -m lab.data.build_brain_mri

The source is the wheel `nilearn` 0.14.1 (BSD-3-Clause), which contains the MNI152 template. The template is ONE
AVERAGED BRAIN: it can test a pipeline, but it is not evidence for a claim. The volume is cut across its height into
slabs; every fourth slab is a test slab. Training and test slabs are neighbors in the same brain, so a control that
ignores the image (each test slice gets the mask of the nearest training slice) scores high. Its Dice is printed and
saved in `control.json`.
"""

import argparse
import json
import tempfile
import zipfile
from pathlib import Path

import nibabel
import numpy as np

from lab.data.wheels import open_wheel
from modeling_vitp.metrics.pixel_metrics import count_areas

FOLDER = "nilearn/datasets/data"
NAME = "mni_icbm152_{}_tal_nlin_sym_09a_converted.nii.gz"
SLAB, TEST_EVERY = 8, 4
TISSUES = ("background", "gray matter", "white matter")


def read_template(wheel: zipfile.ZipFile) -> dict[str, nibabel.Nifti1Image]:
    """Return the volumes `t1`, `gm` and `wm`, of the same shape, with axes to the right, to the front and up."""
    volumes = {}
    with tempfile.TemporaryDirectory() as folder:
        for kind in ("t1", "gm", "wm"):
            name = f"{FOLDER}/{NAME.format(kind)}"
            if name not in wheel.namelist():
                raise SystemExit(f"{name} not found in {wheel.filename}. Use the wheel of nilearn 0.14.1.")
            volume = nibabel.as_closest_canonical(nibabel.load(wheel.extract(name, folder)))
            volumes[kind] = nibabel.Nifti1Image(np.asarray(volume.dataobj), volume.affine)
    return volumes


def tissue_of(gray: np.ndarray, white: np.ndarray) -> np.ndarray:
    """Return the more probable tissue where both together have a probability of at least 0.5, and 0 elsewhere.

    Args:
        gray, white: probabilities from 0 to 255.

    Returns:
        uint8 indices into `TISSUES`, of the same shape.
    """
    gray, white = gray.astype(int), white.astype(int)
    return np.where(2 * (gray + white) >= 255, np.where(white > gray, 2, 1), 0).astype(np.uint8)


def slabs(tissue: np.ndarray) -> list[tuple[str, slice]]:
    """Return split and slices of each slab, from the lowest to the highest slice with tissue."""
    (inside,) = np.nonzero(tissue.any((0, 1)))
    starts = range(inside[0], inside[-1] + 1, SLAB)
    return [
        ("test" if index % TEST_EVERY == TEST_EVERY - 1 else "train", slice(start, min(start + SLAB, inside[-1] + 1)))
        for index, start in enumerate(starts)
    ]


def control(tissue: np.ndarray, parts: list[tuple[str, slice]]) -> dict[str, float]:
    """Return the test Dice of each tissue if each slice gets the mask of the nearest training slice."""
    slices = {
        split: np.concatenate([np.r_[part] for name, part in parts if name == split]) for split in ("train", "test")
    }
    nearest = slices["train"][np.abs(slices["test"][:, None] - slices["train"]).argmin(1)]
    both, predicted, labeled = count_areas(tissue[..., nearest], tissue[..., slices["test"]], len(TISSUES))
    return dict(zip(TISSUES[1:], (2 * both / (predicted + labeled))[1:].tolist()))


def build(wheel: zipfile.ZipFile, output_dir: Path) -> dict[str, float]:
    """Write `train/images/slab_00.nii.gz`, `train/masks/slab_00.nii.gz` …, `test/…`, and return the control's Dice."""
    volumes = read_template(wheel)
    tissue = tissue_of(*(np.asarray(volumes[kind].dataobj) for kind in ("gm", "wm")))
    parts = slabs(tissue)
    for index, (split, part) in enumerate(parts):
        affine = volumes["t1"].affine.copy()
        affine[:3, 3] += affine[:3, 2] * part.start
        for kind, values in (("images", np.asarray(volumes["t1"].dataobj)), ("masks", tissue)):
            folder = output_dir / split / kind
            folder.mkdir(parents=True, exist_ok=True)
            cut = nibabel.Nifti1Image(np.ascontiguousarray(values[..., part]), affine)
            nibabel.save(cut, folder / f"slab_{index:02d}.nii.gz")
    dice = control(tissue, parts)
    (output_dir / "control.json").write_text(json.dumps({"dice": dice}, indent=2) + "\n")
    license = next(name for name in wheel.namelist() if name.endswith("licenses/LICENSE"))
    (output_dir / "LICENSE").write_bytes(wheel.read(license))
    return dice


def main(argv: list[str] | None = None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--wheel", type=Path, help="Wheel of nilearn 0.14.1. Default: download with pip.")
    parser.add_argument("--output_dir", type=Path, default=Path("data/brain_mri"))
    args = parser.parse_args(argv)
    with open_wheel("nilearn==0.14.1", args.wheel) as wheel:
        dice = build(wheel, args.output_dir)
    shown = ", ".join(f"{name} {value:.3f}" for name, value in dice.items())
    print(f"{args.output_dir}. Dice of the mask of the nearest training slice, without using the image: {shown}")


if __name__ == "__main__":
    main()
