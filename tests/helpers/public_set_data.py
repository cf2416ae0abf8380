"""Public data sets in miniature: each in the layout in which it is downloaded, with generated pictures."""

import json
from collections.abc import Callable
from pathlib import Path

from pictures import picture

MINIATURES: dict[str, Callable[[Path], int]] = {}  # set -> what writes it, and returns the number of rows it becomes


def miniature(write: Callable[[Path], int]) -> Callable[[Path], int]:
    MINIATURES[write.__name__] = write
    return write


def save_picture(path: Path, width: int = 32, height: int = 24, seed: int = 0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    picture(width, height, seed).save(path)


def save_text(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def save_json(path: Path, content: object) -> None:
    save_text(path, json.dumps(content))


VOC_OBJECT = """
  <object>
    <name>ship</name>
    <pose>Unspecified</pose>
    <bndbox><xmin>{0}</xmin><ymin>{1}</ymin><xmax>{2}</xmax><ymax>{3}</ymax></bndbox>
    <description>{4}</description>
  </object>"""


@miniature
def dior_rsvg(folder: Path) -> int:
    """Seven objects in four images; the second image has an object of the test split and one of training."""
    numbers = iter(range(100))
    for image, count in enumerate((2, 2, 1, 2), start=1):
        objects = [VOC_OBJECT.format(2, 3, 10, 9, f"The ship {next(numbers)} at the pier") for _ in range(count)]
        save_text(
            folder / f"Annotations/{image:05d}.xml",
            f"<annotation>\n  <filename>{image:05d}.jpg</filename>{''.join(objects)}\n</annotation>",
        )
        save_picture(folder / f"JPEGImages/{image:05d}.jpg", seed=image)
    save_text(folder / "train.txt", "0\n1\n3\n6\n")
    save_text(folder / "val.txt", "5\n")
    save_text(folder / "test.txt", "2\n4\n")
    return 3
