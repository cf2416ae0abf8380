"""Build the nuclei of a fluorescence image with oriented boxes and masks, for `lab/configs/nuclei_oriented.yaml`.

    python -m lab.data.build_nuclei [--output_dir data/nuclei]

The image of 512 x 512 pixels and its 125 outlined nuclei (2018 Data Science Bowl) are part of the wheel `stardist`
0.9.2 (BSD-3-Clause). The left half is cut into overlapping training windows, the right half into adjacent test windows.
A window includes the nuclei with at least half of their pixels inside. Their boxes are the smallest rectangles around
these pixels.
"""

import argparse
import io
import warnings
import zipfile
from pathlib import Path

import cv2
import numpy as np
import rasterio
from datasets import Dataset, Features, Image, List, Value
from faster_coco_eval.core import mask as run_lengths
from PIL import Image as PILImage
from rasterio.errors import NotGeoreferencedWarning

from lab.data.wheels import open_wheel
from modeling_vitp.images.reading import window_starts

SIZE, STRIDES = 128, {"train": 32, "test": 128}
HALVES = {"train": (0, 256), "test": (256, 512)}  # columns
BRIGHTEST = 120  # value that becomes 255; the median of the image is 24, its 99th percentile 116
FEATURES = Features(
    {
        "id": Value("string"),
        "image": Image(),
        "objects": List(
            {
                "bbox": List(Value("float32")),
                "corners": List(Value("float32")),
                "segmentation": {"size": List(Value("int32")), "counts": Value("string")},
            }
        ),
    }
)


def read_picture(wheel: zipfile.ZipFile, name: str) -> np.ndarray:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NotGeoreferencedWarning)
        with rasterio.MemoryFile(wheel.read(f"stardist/data/images/{name}.tif")) as memory, memory.open() as file:
            return file.read(1)


def nucleus(mask: np.ndarray) -> dict:
    """Return boxes and outline of a nucleus, given as a boolean mask `(height, width)` of a window."""
    rows, columns = np.nonzero(mask)
    pixels = np.concatenate([np.stack([columns + x, rows + y], 1) for x in (0, 1) for y in (0, 1)])
    corners = cv2.boxPoints(cv2.minAreaRect(pixels.astype(np.float32)))
    low, high = pixels.min(0), pixels.max(0)
    outline = run_lengths.encode(np.asfortranarray(mask[..., None].astype(np.uint8)))[0]
    counts = outline["counts"]
    return {
        "bbox": [*low, *(high - low)],
        "corners": corners.flatten(),
        "segmentation": {"size": outline["size"], "counts": counts.decode() if isinstance(counts, bytes) else counts},
    }


def cut(image: np.ndarray, labels: np.ndarray, split: str) -> list[dict]:
    """Return the rows of a split."""
    first, last = HALVES[split]
    sizes, rows = np.bincount(labels.flatten()), []
    for top in window_starts(len(image), SIZE, STRIDES[split]):
        for left in (first + start for start in window_starts(last - first, SIZE, STRIDES[split])):
            window = slice(top, top + SIZE), slice(left, left + SIZE)
            counts = np.bincount(labels[window].flatten(), minlength=len(sizes))
            mine = [label for label in range(1, len(sizes)) if counts[label] and 2 * counts[label] >= sizes[label]]
            encoded = io.BytesIO()
            PILImage.fromarray(image[window]).save(encoded, format="PNG")
            objects = [nucleus(labels[window] == label) for label in mine]
            rows.append({"id": f"{split}/{left}_{top}", "image": {"bytes": encoded.getvalue()}, "objects": objects})
    return rows


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path("data/nuclei"))
    parser.add_argument("--wheel", type=Path, help="Wheel of stardist 0.9.2. Default: download with pip.")
    args = parser.parse_args(argv)
    with open_wheel("stardist==0.9.2", args.wheel) as wheel:
        image, labels = read_picture(wheel, "img2d"), read_picture(wheel, "mask2d")
    image = (image.astype(np.float64) * 255 / BRIGHTEST).clip(0, 255).round().astype(np.uint8)
    for split in HALVES:
        rows = cut(image, labels.astype(np.int64), split)
        Dataset.from_list(rows, features=FEATURES).to_parquet(args.output_dir / f"{split}.parquet")
        print(f"{split}: {len(rows)} windows, {sum(len(row['objects']) for row in rows)} nuclei in {args.output_dir}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
