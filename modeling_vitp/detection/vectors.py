"""Objects that were found in an image as vectors: GeoJSON on its ground, or COCO's JSON in its pixels."""

import json
import math
from collections.abc import Iterable, Iterator, Sequence
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
from rasterio.features import shapes
from rasterio.io import DatasetReader
from rasterio.transform import AffineTransformer, GCPTransformer
from rasterio.warp import transform_geom

# An object: `label`, `score`, and in pixels of the image `box` (x1, y1, x2, y2) or `corners` (four x, y), and of an
# instance its `polygons`.
Found = dict[str, Any]
# An outline and its holes, each a closed ring of x, y.
Polygon = list[list[list[float]]]

WGS84 = "EPSG:4326"
DECIMALS = 9  # of a degree: a tenth of a millimetre
PIXEL_DECIMALS, SCORE_DECIMALS = 3, 6


def outline(found: Found) -> list[Polygon]:
    """The polygons of an object: of its mask, or the one around its box."""
    if "polygons" in found:
        return found["polygons"]
    if "corners" in found:
        corners = found["corners"]
    else:
        left, top, right, bottom = found["box"]
        corners = [[left, top], [right, top], [right, bottom], [left, bottom]]
    return [[[*corners, corners[0]]]]


def polygons_of(mask: np.ndarray, left: int = 0, top: int = 0) -> list[Polygon]:
    """The edges of a mask's pixels, part by part; pixels that only touch at a corner are two parts.

    Args:
        mask: bool of shape `(height, width)`.
        left, top: where it lies in its image.
    """
    rows, columns = (np.flatnonzero(mask.any(axis)) for axis in (1, 0))
    if not len(rows):
        return []
    mask = mask[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    left, top = left + int(columns[0]), top + int(rows[0])
    parts = shapes(mask.astype(np.uint8), mask=mask, connectivity=4)
    return [[[[left + x, top + y] for x, y in ring] for ring in part["coordinates"]] for part, _ in parts]


class Ground:
    """From pixels of an image to coordinates of GeoJSON.

    Attributes:
        coordinate_system: what the coordinates are: longitude and latitude if the image's are known, by its
            georeference or its ground control points; otherwise those that it has.

    Raises:
        ValueError: if the image's coordinates have no longitude and latitude.
    """

    def __init__(self, image: DatasetReader):
        points, crs = image.gcps
        self.transformer = GCPTransformer(points) if points else AffineTransformer(image.transform)
        self.crs = crs if points else image.crs
        if self.crs:
            self.coordinate_system = f"longitude and latitude on WGS 84 ({WGS84})"
        elif points or not image.transform.is_identity:
            self.coordinate_system = "that of the image, which does not name it (it has no CRS)"
        else:
            self.coordinate_system = "pixels of the image, x to the right and y down from its top left corner"
        corners = outline({"box": [0, 0, image.width, image.height]})
        try:
            self.decimals = self.decimals_of_a_pixel()
            self.geometries([corners])
        except Exception as error:  # GDAL has many kinds
            raise ValueError(
                f"{image.name}: its coordinates cannot be brought to longitude and latitude ({error}): write COCO's "
                "JSON, by the suffix .json."
            ) from error

    def decimals_of_a_pixel(self) -> int:
        """So many that a pixel, which may be a millionth of a degree, is told apart into thousandths."""
        (left, top), (right, bottom) = np.stack(self.transformer.xy([0, 1], [0, 1], offset="ul"), 1)
        side = max(abs(right - left), abs(bottom - top))
        return PIXEL_DECIMALS + max(math.ceil(-math.log10(side)), 0) if 0 < side < math.inf else DECIMALS

    def geometries(self, outlines: Sequence[list[Polygon]]) -> list[dict[str, Any]]:
        """Polygons in pixels as geometries of GeoJSON (RFC 7946): outer rings turn left, holes turn right."""
        geometries = [self.geometry(polygons) for polygons in outlines]
        if self.crs and geometries:
            geometries = transform_geom(self.crs, WGS84, geometries, precision=DECIMALS)
        return [turned(geometry) for geometry in geometries]

    def geometry(self, polygons: list[Polygon]) -> dict[str, Any]:
        placed = [[self.place(ring) for ring in polygon] for polygon in polygons]
        if len(placed) == 1:
            return {"type": "Polygon", "coordinates": placed[0]}
        return {"type": "MultiPolygon", "coordinates": placed}

    def place(self, ring: list[list[float]]) -> list[list[float]]:
        xs, ys = np.transpose(ring)
        points = np.stack(self.transformer.xy(ys, xs, offset="ul"), 1)
        return (points if self.crs else points.round(self.decimals)).tolist()


def turned(geometry: dict[str, Any]) -> dict[str, Any]:
    """A geometry whose outer rings turn left and whose holes turn right, with y upwards."""

    def ring(points: Sequence[Sequence[float]], is_hole: bool) -> list[Sequence[float]]:
        x, y = np.transpose(points)
        turns_left = (x[:-1] * y[1:] - x[1:] * y[:-1]).sum() > 0
        return list(points) if turns_left != is_hole else list(points)[::-1]

    def polygon(rings: Sequence) -> list:
        return [ring(points, index > 0) for index, points in enumerate(rings)]

    parts = geometry["coordinates"]
    return {**geometry, "coordinates": polygon(parts) if geometry["type"] == "Polygon" else list(map(polygon, parts))}


def write_geojson(parts: Iterable[list[Found]], image: DatasetReader, names: Sequence[str], path: Path) -> None:
    """A feature for each object, with the properties `class` and `score`.

    Args:
        parts: the objects, some at a time.
        image: the open file that they are in.
        names: of the classes.
        path: of the file.
    """
    ground = Ground(image)
    head = {
        "type": "FeatureCollection",
        "name": Path(image.name).stem,
        "coordinate_system": ground.coordinate_system,
    }

    def features() -> Iterator[dict]:
        for part in parts:
            for found, geometry in zip(part, ground.geometries([outline(one) for one in part])):
                properties = {"class": names[found["label"]], "score": round(found["score"], SCORE_DECIMALS)}
                yield {"type": "Feature", "properties": properties, "geometry": geometry}

    write_list(path, head, "features", features())


def write_coco(parts: Iterable[list[Found]], image: DatasetReader, names: Sequence[str], path: Path) -> None:
    """Annotations with a `score`; `segmentation` has the outlines, holes of masks filled, and `corners` those of
    oriented boxes.

    Args:
        parts, image, names, path: see [`write_geojson`].
    """
    head = {
        "images": [{"id": 1, "file_name": Path(image.name).name, "width": image.width, "height": image.height}],
        "categories": [{"id": label, "name": name} for label, name in enumerate(names, 1)],
    }

    def annotations() -> Iterator[dict]:
        number = count(1)
        for part in parts:
            for found in part:
                rings = [np.round(polygon[0][:-1], PIXEL_DECIMALS) for polygon in outline(found)]
                points = np.concatenate(rings) if "box" not in found else np.reshape(found["box"], (2, 2))
                low, high = points.min(0), points.max(0)
                annotation = {
                    "id": next(number),
                    "image_id": 1,
                    "category_id": found["label"] + 1,
                    "bbox": np.round([*low, *(high - low)], PIXEL_DECIMALS).tolist(),
                    "area": round(sum(map(area, rings)), PIXEL_DECIMALS),
                    "iscrowd": 0,
                    "segmentation": [ring.flatten().tolist() for ring in rings],
                    "score": round(found["score"], SCORE_DECIMALS),
                }
                yield annotation | ({"corners": rings[0].tolist()} if "corners" in found else {})

    write_list(path, head, "annotations", annotations())


def area(ring: np.ndarray) -> float:
    """Of a polygon `(points, 2)`."""
    x, y = ring.T
    return float(abs(x @ np.roll(y, -1) - y @ np.roll(x, -1)) / 2)


def write_list(path: Path, head: dict[str, Any], name: str, items: Iterable[dict]) -> None:
    """JSON with a list at its end, item by item: one in a line."""
    with open(path, "w", encoding="utf-8") as file:
        file.write(f'{json.dumps(head, ensure_ascii=False)[:-1]}, "{name}": [')
        for index, item in enumerate(items):
            file.write((",\n" if index else "\n") + json.dumps(item, ensure_ascii=False, allow_nan=False))
        file.write("\n]}\n")


WRITERS = {".geojson": write_geojson, ".json": write_coco}
