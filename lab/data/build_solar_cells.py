"""Build images of solar cells by level of defect, in folders of classes, from the wheel `elpv-dataset`.

    python -m lab.data.build_solar_cells [--output_dir data/solar_cells]

The wheel `elpv-dataset` 1.0.0.post1 contains 2,624 electroluminescence images of 300 x 300 pixels, from 44 modules. The
images are licensed CC BY-NC-SA 4.0: only the laboratory uses them, never a model or an example that is shared. Cite
C. Buerhop-Lutz et al., EU PVSEC 2018, doi:10.4229/35thEUPVSEC20182018-5CV.3.15.

The wheel does not name the module of a cell. Its cells are in the order of the modules, in ten blocks that alternate
between monocrystalline and polycrystalline modules. Cells of one module must not be in two splits. Therefore a split is
a range of this order, and two splits are in different blocks or at least 72 cells apart, more than the cells of a
module on average (60). A model is trained on monocrystalline cells, and polycrystalline cells are another site:

    mono/train  monocrystalline cells 60 to 599
    mono/val    cells 0 to 59 and 954 to 1073, which are blocks of their own, to choose settings
    mono/test   cells 672 to 953
    poly/test   all polycrystalline cells
"""

import argparse
import zipfile
from collections import Counter
from pathlib import Path
from typing import NamedTuple

from lab.data.wheels import open_wheel, read_license

REQUIREMENT = "elpv-dataset==1.0.0.post1"
FOLDER = "elpv_dataset/data"
GAP = 72

# Defect probabilities of the annotation, in thirds. Two experts said what they see and whether they are certain.
CLASSES = ("functional", "functional but uncertain", "defective but uncertain", "defective")

# Ranges of the cells of a type in the order of the wheel, without their ends.
MONO_RANGES = {
    "train": [(60, 600)],
    "val": [(0, 60), (954, 1074)],
    "test": [(672, 954)],
}


class Cell(NamedTuple):
    """Image of a solar cell in the wheel."""

    path: str
    class_name: str
    cell_type: str  # "mono" or "poly"


def read_cells(wheel: zipfile.ZipFile) -> list[Cell]:
    """Return the cells in the order of the wheel."""
    cells = []
    lines = wheel.read(f"{FOLDER}/labels.csv").decode().splitlines()
    for line in lines:
        path, probability, cell_type = line.split()
        level = round(float(probability) * (len(CLASSES) - 1))
        cells.append(Cell(path, CLASSES[level], cell_type))
    return cells


def split_cells(cells: list[Cell]) -> dict[str, list[Cell]]:
    """Return the cells of each folder `SITE/SPLIT`."""
    mono_cells = []
    poly_cells = []
    for cell in cells:
        if cell.cell_type == "mono":
            mono_cells.append(cell)
        else:
            poly_cells.append(cell)
    folders = {}
    for split, ranges in MONO_RANGES.items():
        cells_of_split = []
        for start, end in ranges:
            cells_of_split += mono_cells[start:end]
        folders[f"mono/{split}"] = cells_of_split
    folders["poly/test"] = poly_cells
    return folders


def write_cells(wheel: zipfile.ZipFile, cells: list[Cell], folder: Path) -> Counter[str]:
    """Write `CLASS/NAME.png` for each cell, and return the number of cells of each class."""
    counts: Counter[str] = Counter()
    for cell in cells:
        class_folder = folder / cell.class_name
        class_folder.mkdir(parents=True, exist_ok=True)
        file_name = Path(cell.path).name
        (class_folder / file_name).write_bytes(wheel.read(f"{FOLDER}/{cell.path}"))
        counts[cell.class_name] += 1
    return counts


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--wheel", type=Path, help="Wheel of elpv-dataset 1.0.0.post1. Default: download with pip.")
    parser.add_argument("--output_dir", type=Path, default=Path("data/solar_cells"))
    args = parser.parse_args(argv)
    with open_wheel(REQUIREMENT, args.wheel) as wheel:
        cells_of_folders = split_cells(read_cells(wheel))
        for folder, cells in cells_of_folders.items():
            counts = write_cells(wheel, cells, args.output_dir / folder)
            shown_counts = ", ".join(f"{counts[name]} {name}" for name in CLASSES)
            print(f"{folder}: {len(cells)} cells, {shown_counts}")
        license_text = read_license(wheel)
    (args.output_dir / "LICENSE.md").write_bytes(license_text)


if __name__ == "__main__":
    main()
