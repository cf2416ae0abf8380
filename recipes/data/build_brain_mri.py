"""Builds a small data set of brain MRI: T1, with grey and white matter as masks, in slabs of NIfTI.

    python recipes/data/build_brain_mri.py

The source is the wheel `nilearn` 0.14.1 (BSD-3-Clause), which ships the MNI152 template. That is ONE AVERAGED BRAIN:
good to prove a pipeline, no evidence for a claim. The volume is cut across its height into slabs; every fourth is the
test. So training and test are parts of one brain, next to each other, and a control that does not look at the image
(each test slice gets the mask of the nearest training slice) does well; it is printed, and in `control.json`.
"""

import argparse
import json
import tempfile
import zipfile
from pathlib import Path

import nibabel
import numpy as np

from modeling_vitp.metrics.pixel_metrics import count_areas
from modeling_vitp.recipes.data.wheels import open_wheel

FOLDER = "nilearn/datasets/data"
NAME = "mni_icbm152_{}_tal_nlin_sym_09a_converted.nii.gz"
SLAB, TEST_EVERY = 8, 4
TISSUES = ("background", "grey matter", "white matter")


def read_template(wheel: zipfile.ZipFile) -> dict[str, nibabel.Nifti1Image]:
    """The volumes `t1`, `gm` and `wm`, all of one shape, with their first axes to the right, to the front and up."""
    volumes = {}
    with tempfile.TemporaryDirectory() as folder:
        for kind in ("t1", "gm", "wm"):
            name = f"{FOLDER}/{NAME.format(kind)}"
            if name not in wheel.namelist():
                raise SystemExit(f"{wheel.filename} has no {name}: nilearn 0.14.1 is needed.")
            volume = nibabel.as_closest_canonical(nibabel.load(wheel.extract(name, folder)))
            volumes[kind] = nibabel.Nifti1Image(np.asarray(volume.dataobj), volume.affine)
    return volumes


def tissue_of(grey: np.ndarray, white: np.ndarray) -> np.ndarray:
    """The likelier tissue where the two together are at least as likely as anything else; 0 elsewhere.

    Args:
        grey, white: probabilities, where 255 is 1.

    Returns:
        uint8 of the same shape, indices into `TISSUES`.
    """
    grey, white = grey.astype(int), white.astype(int)
    return np.where(2 * (grey + white) >= 255, np.where(white > grey, 2, 1), 0).astype(np.uint8)


def slabs(tissue: np.ndarray) -> list[tuple[str, slice]]:
    """Split and slices of each slab, from the lowest slice with tissue to the highest."""
    (inside,) = np.nonzero(tissue.any((0, 1)))
    starts = range(inside[0], inside[-1] + 1, SLAB)
    return [
        ("test" if index % TEST_EVERY == TEST_EVERY - 1 else "train", slice(start, min(start + SLAB, inside[-1] + 1)))
        for index, start in enumerate(starts)
    ]


def control(tissue: np.ndarray, parts: list[tuple[str, slice]]) -> dict[str, float]:
    """Dice of each tissue over the test, if each slice gets the mask of the nearest training slice."""
    places = {
        split: np.concatenate([np.r_[part] for name, part in parts if name == split]) for split in ("train", "test")
    }
    nearest = places["train"][np.abs(places["test"][:, None] - places["train"]).argmin(1)]
    both, predicted, labelled = count_areas(tissue[..., nearest], tissue[..., places["test"]], len(TISSUES))
    return dict(zip(TISSUES[1:], (2 * both / (predicted + labelled))[1:].tolist()))


def build(wheel: zipfile.ZipFile, output_dir: Path) -> dict[str, float]:
    """Writes `train/images/slab_00.nii.gz`, `train/masks/slab_00.nii.gz` …, `test/…`, and gives the control's Dice."""
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
    parser.add_argument("--wheel", type=Path, help="the wheel nilearn 0.14.1; fetched with pip if not given")
    parser.add_argument("--output_dir", type=Path, default=Path("data/brain_mri"))
    args = parser.parse_args(argv)
    with open_wheel("nilearn==0.14.1", args.wheel) as wheel:
        dice = build(wheel, args.output_dir)
    shown = ", ".join(f"{name} {value:.3f}" for name, value in dice.items())
    print(f"{args.output_dir}. Dice of the nearest training slice's mask, whatever the image: {shown}")


if __name__ == "__main__":
    main()
