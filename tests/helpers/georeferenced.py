"""GeoTIFFs, and features in GeoJSON and GeoPackage that are written from their pixels."""

import json
from pathlib import Path

import numpy as np
import pyogrio
import rasterio
import rasterio.warp
import shapely
from rasterio import Affine

UTM, WGS84 = "EPSG:32633", "EPSG:4326"
NORTH_UP = Affine(0.5, 0, 412345.25, 0, -0.5, 5512345.75)
ROTATED = Affine(0.45, 0.3, 412345.25, 0.2, -0.6, 5512345.75)


def save_geotiff(path: Path, pixels: np.ndarray, transform: Affine | None = NORTH_UP, crs: str | None = UTM) -> None:
    """Write pixels of shape (height, width, 3)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    profile = {"driver": "GTiff", "count": 3, "dtype": "uint8", "height": len(pixels), "width": pixels.shape[1]}
    with rasterio.open(path, "w", photometric="RGB", crs=crs, transform=transform, **profile) as file:
        file.write(pixels.transpose(2, 0, 1))


def apply(transform: Affine, points: np.ndarray) -> np.ndarray:
    """Return the images of points (n, 2)."""
    return np.asarray(points) @ [[transform.a, transform.d], [transform.b, transform.e]] + [transform.c, transform.f]


def to_ground(shape, transform: Affine = NORTH_UP, crs: str = UTM, target: str = WGS84):
    """Return a polygon in pixels, of shapely or as corners (n, 2), in coordinates of the ground."""
    shape = shape if isinstance(shape, shapely.Geometry) else shapely.Polygon(shape)

    def move(points):
        return np.transpose(rasterio.warp.transform(crs, target, *apply(transform, points).T))

    return shapely.transform(shape, move)


def feature(shape, transform: Affine = NORTH_UP, **properties) -> dict:
    return {
        "type": "Feature",
        "properties": properties,
        "geometry": json.loads(shapely.to_geojson(to_ground(shape, transform))),
    }


def save_geojson(path: Path, features: list[dict], **members) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"type": "FeatureCollection", "features": features, **members}))


def save_geopackage(
    path: Path, shapes: list, labels: list[str], crs: str = WGS84, class_property: str = "class", **options
) -> None:
    """Write shapes of shapely, which are in coordinates of the ground, and their classes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pyogrio.raw.write(
        path,
        np.array(shapely.to_wkb(np.array(shapes), flavor="iso", output_dimension=3), object),
        [np.array(labels, object)],
        [class_property],
        driver="GPKG",
        crs=crs,
        geometry_type="Unknown",
        **{"layer": "labels", **options},
    )
