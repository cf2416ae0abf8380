"""Build `recipes/data/aerial_trees`, the sample of the quickstart in COCO layout, from the wheel `deepforest`.

    python -m lab.data.build_sample [--wheel deepforest-2.1.0-py3-none-any.whl] [--output_dir DIR]

Ground and split are those of `lab/data/aerial_trees`, see [`~lab.data.build_aerial_trees`]: `train` has the same 20
windows, and `test` the same unseen ground as one image. Boxes are cut at the border of their image.
"""

import argparse
import io
import json
import zipfile
from pathlib import Path
from typing import Any

from PIL import Image

from lab.data.build_aerial_trees import BIG_SCENE, TEST_START, build, cut, read_scene
from lab.data.wheels import open_wheel

ANNOTATIONS = "_annotations.coco.json"
SAMPLE = Path(__file__).parents[2] / "recipes" / "data" / "aerial_trees"


def build_splits(wheel: zipfile.ZipFile) -> dict[str, list[dict]]:
    """Return the rows of `train` and `test`, see [`~lab.data.build_aerial_trees.cut`]."""
    image, boxes = read_scene(wheel, BIG_SCENE)
    width, height = image.size
    side = max(width, height)
    test = cut(image, boxes, "yellowstone", (TEST_START, 0, width, height), side, side)
    return {"train": build(wheel)["train"], "test": test}


def write_coco(rows: list[dict], folder: Path, description: str) -> int:
    """Write the images of rows and their boxes as COCO JSON, and return the number of boxes."""
    folder.mkdir(parents=True, exist_ok=True)
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for row in rows:
        content = row["image"]["bytes"]
        width, height = Image.open(io.BytesIO(content)).size
        name = f"{row['id'].replace('/', '_')}.jpg"
        (folder / name).write_bytes(content)
        images.append({"id": len(images) + 1, "file_name": name, "width": width, "height": height})
        for left, top, right, bottom in row["boxes"]:
            left, top = max(left, 0), max(top, 0)
            sides = [min(right, width) - left, min(bottom, height) - top]
            annotation = {"id": len(annotations) + 1, "image_id": len(images), "category_id": 1}
            annotations.append(annotation | {"bbox": [left, top, *sides], "area": sides[0] * sides[1], "iscrowd": 0})
    contents = {
        "info": {"description": description},
        "licenses": [{"id": 1, "name": "MIT"}],
        "images": images,
        "annotations": annotations,
        "categories": [{"id": 1, "name": "tree"}],
    }
    (folder / ANNOTATIONS).write_text(json.dumps(contents, separators=(",", ":")) + "\n")
    return len(annotations)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--wheel", type=Path, help="Wheel of deepforest 2.1.0. Default: download with pip.")
    parser.add_argument("--output_dir", type=Path, default=SAMPLE)
    args = parser.parse_args(argv)
    with open_wheel("deepforest==2.1.0", args.wheel) as wheel:
        splits = build_splits(wheel)
    for split, rows in splits.items():
        number = write_coco(rows, args.output_dir / split, f"Tree crowns in aerial images, {split}")
        print(f"{split}: {len(rows)} images, {number} boxes")


if __name__ == "__main__":
    main()
