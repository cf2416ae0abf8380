"""Small detection data sets in the formats of benchmarks: bright rotated rectangles on a dark ground."""

import json
from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np
import shapely
from georeferenced import NORTH_UP, save_geopackage, save_geotiff, to_ground
from PIL import Image
from pycocotools import mask as run_lengths
from rasterio import Affine

from modeling_vitp.tasks.detection.arguments import DetectionSettings
from modeling_vitp.tasks.detection.augmentation import Augmentation

NAMES = ["ship", "plane"]
COLORS = [(230, 60, 60), (60, 60, 230)]
WIDTH, HEIGHT = 96, 80


def draw_objects(seed: int, number: int | None = None) -> list[tuple[str, np.ndarray]]:
    """Return classes and corners (4, 2) of rectangles inside the image, with one decimal."""
    random = np.random.default_rng(seed)
    objects = []
    for _ in range(random.integers(1, 4) if number is None else number):
        centre, angle = random.uniform((24, 24), (WIDTH - 24, HEIGHT - 24)), random.uniform(0, np.pi)
        axis = np.array([np.cos(angle), np.sin(angle)])
        long, short = axis * random.uniform(8, 14), axis[::-1] * [-1, 1] * random.uniform(4, 7)
        corners = np.array([centre - long - short, centre + long - short, centre + long + short, centre - long + short])
        objects.append((NAMES[random.integers(2)], corners.round(1)))
    return objects


def draw_mask(corners: np.ndarray) -> np.ndarray:
    return cv2.fillPoly(np.zeros((HEIGHT, WIDTH), np.uint8), [corners.round().astype(np.int32)], 1)


def draw_image(objects: Sequence[tuple[str, np.ndarray]], seed: int) -> Image.Image:
    image = np.random.default_rng(seed).integers(0, 40, (HEIGHT, WIDTH, 3), dtype=np.uint8)
    for label, corners in objects:
        image[draw_mask(corners) > 0] = COLORS[NAMES.index(label)]
    return Image.fromarray(image)


def write_images(folder: Path, names: Sequence[str], suffixes: Sequence[str] = (".png",)) -> dict[str, list]:
    """Write images with alternating file types and return their objects by name."""
    folder.mkdir(parents=True, exist_ok=True)
    found = {}
    for index, name in enumerate(names):
        found[name] = draw_objects(int(name[-3:]), 0 if name.startswith("empty") else None)
        draw_image(found[name], index).save(folder / f"{name}{suffixes[index % len(suffixes)]}")
    return found


def write_dota(root: Path, names: Sequence[str], suffixes: Sequence[str] = (".png",)) -> dict[str, list]:
    """Write a text file for each image, as in DOTA and RSAR."""
    found = write_images(root / "images", names, suffixes)
    (root / "annfiles").mkdir(exist_ok=True)
    for name, objects in found.items():
        lines = [f"{' '.join(map(str, corners.flatten()))} {label} 0" for label, corners in objects]
        (root / "annfiles" / f"{name}.txt").write_text("\n".join(["imagesource:GoogleEarth", "gsd:0.3", *lines]) + "\n")
    return found


def write_voc(root: Path, names: Sequence[str], is_oriented: bool) -> dict[str, list]:
    """Write an XML file for each image, as in DIOR and DIOR-R, of which one has capitalized class names."""
    found = write_images(root / "images", names, [".jpg"])
    folder = root / "Annotations" / ("Oriented Bounding Boxes" if is_oriented else "Horizontal Bounding Boxes")
    folder.mkdir(parents=True, exist_ok=True)
    for name, objects in found.items():
        (folder / f"{name}.xml").write_text(
            f"<annotation>{''.join(voc_object(*o, is_oriented) for o in objects)}</annotation>"
        )
    return found


def voc_object(label: str, corners: np.ndarray, is_oriented: bool) -> str:
    if is_oriented:
        parts = zip(("left_top", "right_top", "right_bottom", "left_bottom"), corners)
        box = "".join(f"<x_{name}>{x}</x_{name}><y_{name}>{y}</y_{name}>" for name, (x, y) in parts)
        return f"<object><name>{label.title()}</name><difficult>0</difficult><robndbox>{box}</robndbox></object>"
    sides = zip(("xmin", "ymin", "xmax", "ymax"), (*corners.min(0), *corners.max(0)))
    box = "".join(f"<{side}>{value}</{side}>" for side, value in sides)
    return f"<object><name>{label}</name><bndbox>{box}</bndbox></object>"


def write_yolo(root: Path, names: Sequence[str]) -> dict[str, list]:
    """Write a text file for each image with objects, with the class indices in another order."""
    found = write_images(root / "images", names)
    (root / "labels").mkdir(exist_ok=True)
    (root / "labels" / "classes.txt").write_text("plane\nship\n")
    (root / "data.yaml").write_text("train: ../images\nnames: {0: plane, 1: ship}\n")
    for name, objects in found.items():
        rows = [(1 if label == "ship" else 0, *(corners / [WIDTH, HEIGHT]).flatten()) for label, corners in objects]
        if rows:
            (root / "labels" / f"{name}.txt").write_text("\n".join(" ".join(map(str, row)) for row in rows))
    return found


def write_geopackage(root: Path, names: Sequence[str]) -> dict[str, list]:
    """Write GeoTIFFs side by side and one GeoPackage in longitude and latitude."""
    found, shapes, labels = write_images(root / "images", names), [], []
    for index, (name, objects) in enumerate(found.items()):
        path = root / "images" / f"{name}.png"
        transform = Affine(*NORTH_UP[:2], NORTH_UP.c + index * WIDTH * NORTH_UP.a, *NORTH_UP[3:6])
        save_geotiff(path.with_suffix(".tif"), np.asarray(Image.open(path)), transform)
        path.unlink()
        shapes += [to_ground(shapely.Polygon(corners), transform) for _, corners in objects]
        labels += [label for label, _ in objects]
    save_geopackage(root / "labels.gpkg", shapes, labels)
    return found


def coco_contents(found: dict[str, list]) -> dict:
    """Write COCO's JSON with polygons, and run lengths for every second object; categories have another order."""
    images, annotations = [], []
    for image_id, (name, objects) in enumerate(found.items(), start=10):
        images.append({"id": image_id, "file_name": f"{name}.png", "height": HEIGHT, "width": WIDTH})
        for label, corners in objects:
            (left, top), (right, bottom) = corners.min(0).tolist(), corners.max(0).tolist()
            outline = [corners.flatten().tolist()]
            if len(annotations) % 2:
                outline = run_lengths.encode(np.asfortranarray(draw_mask(corners)))
                outline = {**outline, "counts": outline["counts"].decode()}
            box = [left, top, right - left, bottom - top]
            entry = {"id": len(annotations), "image_id": image_id, "category_id": {"plane": 3, "ship": 7}[label]}
            annotations.append({**entry, "bbox": box, "segmentation": outline, "iscrowd": 0, "area": box[2] * box[3]})
    categories = [{"id": 3, "name": "plane"}, {"id": 7, "name": "ship"}]
    return {"images": images, "annotations": annotations, "categories": categories}


def write_coco(root: Path, names: Sequence[str]) -> dict[str, list]:
    found = write_images(root / "images", names)
    (root / "instances.json").write_text(json.dumps(coco_contents(found)))
    return found


def build_augmentation(size: int, keep_ratio: bool = True, flips=(0.5, 0.0, 0.0), **changes) -> Augmentation:
    """Return an augmentation for the classes "0" to "9", also for sizes that are no multiple of 16."""
    chances = dict(zip(("horizontal_flip", "vertical_flip", "diagonal_flip"), flips))
    settings = DetectionSettings(keep_ratio=keep_ratio, **chances, **changes)
    settings.image_size = size
    return Augmentation(settings, [str(label) for label in range(10)])
