"""Readers of georeferenced annotations, GeoJSON and GeoPackage, in pixels of the images that they cover."""

import sqlite3
import struct
from collections import defaultdict
from collections.abc import Iterable, Sequence
from contextlib import closing, suppress
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from rasterio.crs import CRS
from rasterio.transform import AffineTransformer
from rasterio.warp import transform_bounds, transform_geom

from ..images.reading import open_raster, visible_paths
from .annotation_files import is_number, read_annotation
from .annotations import AnnotatedObject
from .windows import MIN_VISIBLE

SUFFIXES = (".geojson", ".gpkg")
CLASS_PROPERTIES = ("class", "label", "category", "name", "type")  # Properties that may name the class, best first.
DEFAULT_CLASS = "object"
WGS84 = "OGC:CRS84"
SHAPES = ("Geometry", "Point", "LineString", "Polygon", "MultiPoint", "MultiLineString", "MultiPolygon")
ENVELOPES = (0, 32, 48, 48, 64)  # Bytes of the envelope in the header of a GeoPackage geometry, by its code.
MARGIN = 0.01  # Share by which the bounds of an image are enlarged, because their transform is an approximation.
TOUCHING = 1e-9  # pixels from the border of the image at which a point lies on it
MIN_AREA = 1e-6  # Smallest area of a clipped ring in square pixels; a smaller one is an edge on the border.

Bounds = tuple[float, float, float, float]  # Left, bottom, right and top in coordinates.
Ring = np.ndarray  # Points of a closed outline, float64 of shape `(n, 2)`; the first point is not repeated.


class Feature(NamedTuple):
    """Feature of a file: its name in errors, its properties, and its geometry as in GeoJSON."""

    where: str
    properties: dict[str, Any]
    geometry: dict[str, Any]


class FeatureFile:
    """GeoJSON or GeoPackage file with polygons over one or several images. It is read when it is needed.

    Args:
        path: path of the file.
        images: images that the file annotates.

    Attributes:
        class_property: property with the class of a feature; `None` if all features are of the class `"object"`.
    """

    def __init__(self, path: Path, images: Sequence[Path]):
        self.path, self.images = path, images
        self.class_property: str | None = None

    @cached_property
    def content(self) -> tuple[CRS, list[Feature]]:
        """Coordinate reference system and features.

        Raises:
            ValueError: If the file is invalid, has another geometry than polygons, or has no features for several
                images. The message names the file and the feature.
        """
        crs, features = (read_geopackage if self.path.suffix.lower() == ".gpkg" else read_geojson)(self.path)
        if not features and self.images[0].stem != self.path.stem:
            raise ValueError(f"{self.path} has no features. Expected the polygons of {self.images[0]}.")
        for feature in features:
            check_polygons(feature)
        return crs, features

    @cached_property
    def bounds(self) -> np.ndarray:
        """Left, bottom, right and top of each feature, float64 of shape `(n, 4)`."""
        rings = [
            np.concatenate([ring for part in parts_of(item.geometry) for ring in part]) for item in self.content[1]
        ]
        return np.array([(*ring.min(0), *ring.max(0)) for ring in rings]).reshape(-1, 4)

    @property
    def labels(self) -> list[str]:
        """Class of each feature."""
        return [class_of(feature, self.class_property) for feature in self.content[1]]

    def objects(self, image: Path, size: tuple[int, int]) -> list[AnnotatedObject]:
        """Return the features in an image, clipped to it, in pixels.

        The part of a feature is left out if it is less than one pixel wide or high, and marked as difficult if it is
        less than half of the feature.

        Args:
            image: path of the image.
            size: height and width of the image.

        Raises:
            ValueError: If the file is invalid, a feature lacks its class, the image has no georeference, or no feature
                lies in any of the `images`. The message names the file.
        """
        found, (crs, transformer, bounds) = [], georeference(image)
        chosen = [self.content[1][index] for index in self._near(image, crs, bounds)]
        if self.content[1] and not chosen and not self._covers_an_image:
            extent = (*self.bounds[:, :2].min(0), *self.bounds[:, 2:].max(0))
            raise ValueError(
                f"{self.path}: no feature lies in {image}. Expected features in {shown(bounds)} of {crs}, got "
                f"{shown(extent)} of {self.content[0]}. Check the coordinate reference systems of both files, and the "
                "order of longitude and latitude."
            )
        try:
            geometries = [feature.geometry for feature in chosen]
            if chosen and self.content[0] != crs:
                geometries = transform_geom(self.content[0], crs, geometries)
        except Exception as error:  # GDAL raises many error types.
            raise ValueError(
                f"{self.path}: the features in {image} cannot be transformed from {self.content[0]} to {crs}: {error}"
            ) from error
        for feature, geometry in zip(chosen, geometries):
            polygons = [[to_pixels(ring, transformer) for ring in part] for part in parts_of(geometry)]
            label = class_of(feature, self.class_property)
            if item := clipped_object(feature.where, label, polygons, size):
                found.append(item)
        return found

    def _near(self, image: Path, crs: CRS, bounds: Bounds) -> list[int]:
        """Return the indices of the features whose bounds overlap those of an image."""
        try:
            west, south, east, north = transform_bounds(crs, self.content[0], *bounds)
        except Exception as error:  # GDAL raises many error types.
            raise ValueError(
                f"{image}: its bounds {shown(bounds)} cannot be transformed from {crs} to {self.content[0]}, as of "
                f"{self.path}: {error}"
            ) from error
        left, bottom, right, top = self.bounds.T
        across = (left <= east) & (right >= west) if west <= east else (left <= east) | (right >= west)  # Antimeridian.
        return np.flatnonzero(across & (bottom <= north) & (top >= south)).tolist()

    @cached_property
    def _covers_an_image(self) -> bool:
        for image in self.images:
            with suppress(ValueError):  # An image without georeference has its own error.
                crs, _, bounds = georeference(image)
                if self._near(image, crs, bounds):
                    return True
        return False


def feature_files(
    root: Path, where: Path, images: Iterable[Path], class_property: str | None = None
) -> dict[Path, FeatureFile]:
    """Return the feature file of each image: that of the same name, or else the one for all images of a folder.

    Folders with the names `images` and `labels` are ignored: `train/labels.gpkg`, `train/labels/all.gpkg` and
    `train/images/all.gpkg` are for the images in `train/images` and its subfolders. A file elsewhere is for all images
    if it is the only one. Images without a file are left out.

    Args:
        root: folder of the data set.
        where: file for all images, or folder with the files.
        images: paths of the images.
        class_property: property with the class of a feature. Default: the first of `CLASS_PROPERTIES` that a feature
            has, compared without case.

    Raises:
        ValueError: If no file is found, or several files are equally near to an image.
    """
    images = list(images)
    paths = [where] if where.is_file() else [p for p in visible_paths(where) if p.suffix.lower() in SUFFIXES]
    if not paths:
        raise ValueError(f"No GeoJSON or GeoPackage file ({', '.join(SUFFIXES)}) found in {where}.")
    base = root if where.is_relative_to(root) else where
    stems, by_stem = {image.stem for image in images}, defaultdict(list)
    for path in paths:
        by_stem[path.stem if path.stem in stems and path != where else None].append(path)
    of_file = defaultdict(list)
    for image in images:
        candidates = by_stem.get(image.stem) or by_stem[None]
        folders = {path: folder_key(path, base) for path in candidates}
        near = [path for path, key in folders.items() if folder_key(image, root)[: len(key)] == key]
        deepest = max((len(folders[path]) for path in near), default=0)
        near = [path for path in near if len(folders[path]) == deepest] or candidates
        if len(near) > 1:
            raise ValueError(
                f"{near[0]} and {near[1]} may both annotate {image}. Expected one file of the same name as the image, "
                "or one for the folder of the image. Remove the other files, or set `annotations`."
            )
        if near:
            of_file[near[0]].append(image)
    files = [FeatureFile(path, owned) for path, owned in of_file.items()]
    if class_property is None:
        names = set()
        for file in files:
            with suppress(ValueError):  # An invalid file is named when its objects are read.
                names.update(name for feature in file.content[1] for name in feature.properties)
        matching = (name for known in CLASS_PROPERTIES for name in sorted(names) if name.lower() == known)
        class_property = next(matching, None)
    for file in files:
        file.class_property = class_property
    return {image: file for file in files for image in file.images}


def folder_key(path: Path, root: Path) -> tuple[str, ...]:
    return tuple(part for part in path.relative_to(root).parent.parts if part.lower() not in ("images", "labels"))


def georeference(image: Path) -> tuple[CRS, AffineTransformer, Bounds]:
    """Return the coordinate reference system of an image, its transform from pixels to coordinates, and its bounds.

    The bounds are a little larger than the image.

    Raises:
        ValueError: If the image lacks one of them, or cannot be read.
    """
    with open_raster(image) as file:
        if not file.crs or file.transform.is_identity:
            lacking = "geotransform" if file.crs else "coordinate reference system"
            raise ValueError(
                f"{image} has no {lacking}, so that no feature can be located in it. Expected a GeoTIFF. Set it with "
                "gdal_edit.py (-a_srs, -a_ullr); warp an image with ground control points with gdalwarp."
            )
        transformer, (low, high) = AffineTransformer(file.transform), (-MARGIN, 1 + MARGIN)
        rows, columns = file.height * np.array([low, low, high, high]), file.width * np.array([low, high, low, high])
        xs, ys = transformer.xy(rows, columns, offset="ul")
        return file.crs, transformer, (xs.min(), ys.min(), xs.max(), ys.max())


def read_geojson(path: Path) -> tuple[CRS, list[Feature]]:
    """Return the coordinate reference system and the features of a GeoJSON file.

    Coordinates are longitude and latitude on WGS 84 (RFC 7946), unless the file has the older member `crs`.

    Raises:
        ValueError: If the file is invalid; the message names it.
    """
    contents = read_annotation(path)
    kind = contents.get("type") if isinstance(contents, dict) else None
    if kind == "Feature":
        items = [contents]
    else:
        items = contents.get("features") if kind == "FeatureCollection" else None
    if not isinstance(items, list):
        raise ValueError(f"{path}: expected a GeoJSON FeatureCollection with `features`, got {str(contents)[:80]!r}.")
    try:
        crs = CRS.from_user_input(contents["crs"]["properties"]["name"] if "crs" in contents else WGS84)
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path}: expected `crs` with the name of a coordinate reference system, got "
            f"{str(contents['crs'])[:80]!r}. Correct it, or remove it if the coordinates are longitude and latitude."
        ) from error
    features = []
    for index, item in enumerate(items):
        properties = (item.get("properties") or {}) if isinstance(item, dict) else None
        if not isinstance(properties, dict):
            raise ValueError(f"{path}, feature {index}: expected `properties` and `geometry`, got {str(item)[:80]!r}.")
        features.append(Feature(f"{path}, feature {index}", properties, item.get("geometry")))
    return crs, features


def read_geopackage(path: Path) -> tuple[CRS, list[Feature]]:
    """Return the coordinate reference system and the features of the only layer of a GeoPackage.

    Raises:
        ValueError: If the file is invalid, or has several layers; the message names it.
    """
    try:
        with closing(sqlite3.connect(f"{path.resolve().as_uri()}?mode=ro", uri=True)) as base:
            layers = base.execute("SELECT table_name, column_name, srs_id FROM gpkg_geometry_columns").fetchall()
            if len(layers) != 1:
                names = ", ".join(sorted(str(layer[0]) for layer in layers)) or "none"
                raise ValueError(f"{path}: expected one layer of features, found {names}. Export the labels alone.")
            table, column, number = layers[0]
            query = "SELECT definition FROM gpkg_spatial_ref_sys WHERE srs_id = ? AND srs_id > 0"
            (definition,) = base.execute(query, [number]).fetchone() or (None,)
            quoted = '"{}"'.format(str(table).replace('"', '""'))
            rows = base.execute(f"SELECT rowid, * FROM {quoted}")
            names = [entry[0] for entry in rows.description][1:]
            rows = [(number, dict(zip(names, values))) for number, *values in rows]
    except (sqlite3.Error, UnicodeDecodeError) as error:
        raise ValueError(f"{path} cannot be read as GeoPackage: {error}") from error
    try:
        crs = CRS.from_user_input(definition)
    except ValueError as error:
        raise ValueError(
            f"{path}: the layer {table!r} has no known coordinate reference system. Set it, for example with "
            "ogr2ogr -a_srs EPSG:4326."
        ) from error
    features = []
    for number, properties in rows:
        where, blob = f"{path}, feature {number}", properties.pop(column, None)
        try:
            geometry = None if blob is None else read_geometry(blob)
        except (struct.error, ValueError, IndexError, TypeError, RecursionError) as error:
            raise ValueError(f"{where}: the geometry cannot be read: {error}") from error
        features.append(Feature(where, properties, geometry))
    return crs, features


def read_geometry(blob: bytes) -> dict[str, Any]:
    """Return the GeoJSON geometry of a binary geometry of a GeoPackage: a header, and well-known binary (WKB)."""
    flags = blob[3]
    if blob[:2] != b"GP" or (flags >> 1 & 7) >= len(ENVELOPES):
        raise ValueError(f"expected the header of a GeoPackage geometry, got {blob[:8]!r}")
    return read_wkb(blob, 8 + ENVELOPES[flags >> 1 & 7])[0]


def read_wkb(data: bytes, start: int) -> tuple[dict[str, Any], int]:
    """Return the GeoJSON geometry of WKB from a position, and the position after it.

    Only polygons have coordinates, of which Z and M are dropped. Of other geometries only the type is read.
    """
    order = "<" if data[start] else ">"
    code, count = struct.unpack_from(f"{order}II", data, start + 1)
    kind, dimensions = code % 1000, 2 + (0, 1, 1, 2)[code // 1000]
    shape, position, coordinates = SHAPES[kind] if kind < len(SHAPES) else f"geometry {kind}", start + 9, []
    if shape == "MultiPolygon":
        for _ in range(count):
            part, position = read_wkb(data, position)
            coordinates.append(part["coordinates"])
    elif shape == "Polygon":
        for _ in range(count):
            (length,) = struct.unpack_from(f"{order}I", data, position)
            ring = np.frombuffer(data, f"{order}f8", length * dimensions, position + 4).reshape(length, dimensions)
            coordinates.append(ring[:, :2].tolist())
            position += 4 + ring.nbytes
    return {"type": shape, "coordinates": coordinates}, position


def check_polygons(feature: Feature) -> None:
    """Raise a `ValueError` unless the geometry of a feature is a polygon, or several, with finite coordinates."""
    geometry = feature.geometry
    kind = geometry.get("type") if isinstance(geometry, dict) else None
    if kind not in ("Polygon", "MultiPolygon"):
        found = "no geometry" if geometry is None else f"the type {str(kind)[:80]!r}"
        raise ValueError(
            f"{feature.where}: expected a Polygon or MultiPolygon, got {found}. Remove the feature, or draw the "
            "outline of the object; the tool Buffer of QGIS makes polygons of points and lines."
        )
    try:
        parts = geometry["coordinates"] if kind == "MultiPolygon" else [geometry["coordinates"]]
        rings = [ring for part in parts for ring in part]
        is_valid = all(parts) and all(
            len(ring) >= 4 and all(len(point) >= 2 and all(map(is_number, point[:2])) for point in ring)
            for ring in rings
        )
    except (KeyError, TypeError):
        is_valid, rings = False, ()
    if not is_valid or not rings:
        raise ValueError(
            f"{feature.where}: expected rings of at least four points with finite coordinates, got "
            f"{str(geometry.get('coordinates'))[:80]}."
        )


def parts_of(geometry: dict[str, Any]) -> list[list[Ring]]:
    """Return the rings of each polygon of a checked geometry: its outline and its holes."""
    parts = geometry["coordinates"] if geometry["type"] == "MultiPolygon" else [geometry["coordinates"]]
    return [[open_ring([point[:2] for point in ring]) for ring in part] for part in parts]


def open_ring(points: list[Sequence[float]]) -> Ring:
    return np.array(points[:-1] if points[0] == points[-1] else points, np.float64)


def class_of(feature: Feature, class_property: str | None) -> str:
    """Return the class of a feature. Raise a `ValueError` if it is not a nonempty text or an integer."""
    if class_property is None:
        return DEFAULT_CLASS
    value = feature.properties.get(class_property)
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, (str, int)) or value == "":
        found = ", ".join(feature.properties) or "none"
        got = repr(value)[:80] if class_property in feature.properties else "no such property"
        raise ValueError(
            f"{feature.where}: expected a class in the property {class_property!r}, got {got}. Properties: {found}. "
            "Set `class_property` to the property with the class, or give the feature a class."
        )
    return str(value)


def to_pixels(ring: Ring, transformer: AffineTransformer) -> Ring:
    rows, columns = transformer.rowcol(*ring.T, op=np.positive)
    return np.stack([columns, rows], 1)


def clipped_object(where: str, label: str, polygons: list[list[Ring]], size: tuple[int, int]) -> AnnotatedObject | None:
    """Return the object of polygons in pixels, clipped to an image of height and width `size`.

    Return `None` if it lies outside, or if less than a pixel of its width or height is left after it is clipped.
    """
    whole, visible, outlines = 0.0, 0.0, []
    for rings in polygons:
        # A hole is subtracted by its direction, which must be opposite to that of the outline.
        rings = [ring if (signed_area(ring) > 0) != (index > 0) else ring[::-1] for index, ring in enumerate(rings)]
        whole += sum(map(signed_area, rings))
        for axis, side in enumerate(size[::-1]):
            rings = clip_rings(clip_rings(rings, axis, 0, 1), axis, side, -1)
        visible += sum(map(signed_area, rings))
        outlines += [with_bridges(rings)] if any(signed_area(ring) < 0 for ring in rings) else rings
    if not outlines:
        return None
    outlines = [outline.clip(0, size[::-1]) for outline in outlines]
    points = np.concatenate(outlines)
    (left, top), (right, bottom) = points.min(0).tolist(), points.max(0).tolist()
    if visible < whole * (1 - 1e-9) and min(right - left, bottom - top) < 1:
        return None
    is_difficult = visible < MIN_VISIBLE * whole
    outlines = [outline.flatten().tolist() for outline in outlines]
    box = (left, top, right, bottom)
    return AnnotatedObject(where, label, box, is_difficult=is_difficult, area=visible, segmentation=outlines)


def signed_area(ring: Ring) -> float:
    x, y = (ring - ring[0]).T
    return float(x @ np.roll(y, -1) - y @ np.roll(x, -1)) / 2


def clip_rings(rings: list[Ring], axis: int, bound: float, sign: int) -> list[Ring]:
    """Return the rings of the part of a polygon where `sign * (point[axis] - bound)` is not negative.

    The polygon is cut into chains of points that begin and end on the line. Sorted along the line, two ends at a time
    enclose a part of it inside the polygon, which joins their chains to rings.
    """
    kept, chains = [], []
    for ring in rings:
        # A point on the line counts as inside, so that the ends of a chain differ where a ring touches the line.
        depth = sign * (ring[:, axis] - bound) + TOUCHING
        inside = depth >= 0
        if inside.all():
            kept.append(ring)
            continue
        for start in np.flatnonzero(inside & ~np.roll(inside, 1)):
            order = np.roll(np.arange(len(ring)), -start)
            count = int(np.argmin(inside[order]))
            outer, inner = order[[-1, count]], order[[0, count - 1]]
            share = (depth[outer] / (depth[outer] - depth[inner]))[:, None]
            ends = ring[outer] + share * (ring[inner] - ring[outer])
            ends[:, axis] = bound
            chains.append(np.concatenate([ends[:1], ring[order[:count]], ends[1:]]))
    ends = sorted((chain[end, 1 - axis], index, end) for index, chain in enumerate(chains) for end in (0, -1))
    partners = {}
    for (_, *first), (_, *second) in zip(ends[::2], ends[1::2]):
        partners[tuple(first)], partners[tuple(second)] = tuple(second), tuple(first)
    left = dict.fromkeys(range(len(chains)))
    while left:
        joined, index, entry = [], next(iter(left)), 0
        while index in left:
            del left[index]
            joined.append(chains[index][:: 1 if entry == 0 else -1])
            index, entry = partners[index, -1 - entry]
        ring = np.concatenate(joined)
        if abs(signed_area(ring)) > MIN_AREA:
            kept.append(ring)
    return kept


def with_bridges(rings: list[Ring]) -> Ring:
    """Return one outline through all rings. The way to each further ring and back encloses nothing."""
    first = rings[0][:1]
    return np.concatenate([rings[0], *(part for ring in rings[1:] for part in (first, ring, ring[:1]))])


def shown(bounds: Bounds) -> str:
    return "[{:.6g}, {:.6g}, {:.6g}, {:.6g}]".format(*bounds)
