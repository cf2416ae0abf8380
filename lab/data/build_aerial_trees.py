"""Build `lab/data/aerial_trees`: real aerial images with tree boxes, from the public wheel `deepforest`.

    python -m lab.data.build_aerial_trees [--wheel deepforest-2.1.0-py3-none-any.whl] [--output_dir DIR]

Without `--wheel`, the wheel is downloaded with pip (20 MB). The result is byte-identical for the same Pillow version.

The split, in pixels of the big Yellowstone scene (2299 x 2472, about 0.1 m a pixel):

    x     0 .. 1289   training: windows of 512, stride 392
    x  1289 .. 1609   gap of 320, wider than any training crop
    x  1609 .. 2299   test: crops of 224, stride 112 (the right-hand 30%)

The two small scenes (Florida, California) are also training windows. The second Yellowstone scene is a separate test
split, `second_scene`, and is never trained on.
"""

import argparse
import io
import xml.etree.ElementTree as ElementTree
import zipfile
from pathlib import Path

from datasets import Dataset, Features, Image, List, Value
from PIL import Image as PILImage

from lab.data.wheels import open_wheel
from modeling_vitp.data.layouts.voc import voc_objects
from modeling_vitp.images.reading import window_starts

BIG_SCENE, SECOND_SCENE = "2019_YELL_2_528000_4978000_image_crop2", "2019_YELL_2_541000_4977000_image_crop"
SMALL_SCENES = ("OSBS_029", "SOAP_061")
TEST_START, GAP = 1609, 320
WINDOW, WINDOW_STRIDE = 512, 392
CROP, TEST_STRIDE, SECOND_STRIDE = 224, 112, 224
JPEG_QUALITY = 80

FEATURES = Features(
    {
        "id": Value("string"),
        "image": Image(),
        "boxes": List(List(Value("int32"), length=4)),
        "scene": Value("string"),
        "left": Value("int32"),
        "top": Value("int32"),
    }
)


def read_scene(wheel: zipfile.ZipFile, name: str) -> tuple[PILImage.Image, list[list[int]]]:
    """Return the image of a scene and its tree boxes, `[left, top, right, bottom]` in pixels."""
    image = PILImage.open(io.BytesIO(wheel.read(f"deepforest/data/{name}.png"))).convert("RGB")
    path = f"deepforest/data/{name}.xml"
    objects = voc_objects(ElementTree.fromstring(wheel.read(path)), path)
    return image, [[round(side) for side in found.box] for found in objects]


def cut(
    image: PILImage.Image, boxes: list[list[int]], scene: str, area: tuple[int, int, int, int], size: int, stride: int
) -> list[dict]:
    """Return rows for the windows of an area, with the uncut boxes whose centers lie in the window, in its pixels."""
    rows = []
    left, top, right, bottom = area
    for y in (top + start for start in window_starts(bottom - top, size, stride)):
        for x in (left + start for start in window_starts(right - left, size, stride)):
            width, height = min(size, right - x), min(size, bottom - y)
            inside = [
                [x0 - x, y0 - y, x1 - x, y1 - y]
                for x0, y0, x1, y1 in boxes
                if x <= (x0 + x1) / 2 < x + width and y <= (y0 + y1) / 2 < y + height
            ]
            encoded = io.BytesIO()
            image.crop((x, y, x + width, y + height)).save(encoded, format="JPEG", quality=JPEG_QUALITY)
            rows.append(
                {
                    "id": f"{scene}/{x}_{y}",
                    "image": {"bytes": encoded.getvalue(), "path": None},
                    "boxes": inside,
                    "scene": scene,
                    "left": x,
                    "top": y,
                }
            )
    return rows


def build(wheel: zipfile.ZipFile) -> dict[str, list[dict]]:
    """Return the rows of each split."""
    big_image, big_boxes = read_scene(wheel, BIG_SCENE)
    second_image, second_boxes = read_scene(wheel, SECOND_SCENE)
    width, height = big_image.size
    train = cut(big_image, big_boxes, "yellowstone", (0, 0, TEST_START - GAP, height), WINDOW, WINDOW_STRIDE)
    for name in SMALL_SCENES:
        image, boxes = read_scene(wheel, name)
        train += cut(image, boxes, name.lower(), (0, 0, *image.size), WINDOW, WINDOW_STRIDE)
    return {
        "train": train,
        "test": cut(big_image, big_boxes, "yellowstone", (TEST_START, 0, width, height), CROP, TEST_STRIDE),
        "second_scene": cut(
            second_image, second_boxes, "yellowstone_2", (0, 0, *second_image.size), CROP, SECOND_STRIDE
        ),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--wheel", type=Path, help="Wheel of deepforest 2.1.0. Default: download with pip.")
    parser.add_argument("--output_dir", type=Path, default=Path(__file__).parent / "aerial_trees")
    args = parser.parse_args()

    with open_wheel("deepforest==2.1.0", args.wheel) as wheel:
        splits = build(wheel)
        license = next(name for name in wheel.namelist() if name.endswith("licenses/LICENSE"))
        args.output_dir.mkdir(parents=True, exist_ok=True)
        (args.output_dir / "LICENSE").write_bytes(wheel.read(license))
    for split, rows in splits.items():
        Dataset.from_list(rows, features=FEATURES).to_parquet(args.output_dir / f"{split}.parquet")
        print(f"{split}: {len(rows)} images, {sum(len(row['boxes']) for row in rows)} boxes (windows overlap)")


if __name__ == "__main__":
    main()
