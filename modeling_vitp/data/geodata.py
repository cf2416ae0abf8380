"""Readers of georeferenced annotations, GeoJSON and GeoPackage, in pixels of the images that they cover."""

import logging
import math
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import shapely
import shapely.affinity
import shapely.geometry
from rasterio.crs import CRS
from rasterio.transform import AffineTransformer
from rasterio.warp import transform_bounds, transform_geom

from ..image_decoding import open_file
from ..images.reading import open_raster, read_errors, visible_paths
from .annotation_files import is_number, read_annotation
from .annotations import AnnotatedObject
from .windows import MIN_VISIBLE

SUFFIXES = (".geojson", ".gpkg")
CLASS_PROPERTIES = ("class", "label", "category", "name", "type")  # Properties that may name the class, best first.
DEFAULT_CLASS = "object"
WGS84 = "OGC:CRS84"
# Authority code, URN, WKT or PROJ string. GDAL would open an address or a path.
CRS_DEFINITION = re.compile(r"[\w.,+-]+(:[\w.,+-]*)+|\w+\s*[\[(].*|\+proj=[^/]*", re.DOTALL)
POLYGONS = ("Polygon", "MultiPolygon")
SQLITE_HEADER = b"SQLite format 3\0"  # First bytes of a GeoPackage.
MAX_COORDINATE = 1e15  # As in `is_number`.
MARGIN = 0.01  # Share by which the bounds of an image are enlarged, because their transform is an approximation.
MIN_AREA = 1e-6  # Smallest area of a clipped polygon in square pixels; a smaller one is an edge on the border.

logger = logging.getLogger(__name__)

Bounds = tuple[float, float, float, float]  # Left, bottom, right and top in coordinates.


class Feature(NamedTuple):
    """Feature of a file: its name in errors, its properties, and its geometry, a polygon or several."""

    where: str
    properties: dict[str, Any]
    geometry: shapely.Polygon | shapely.MultiPolygon


class FeatureFile:
    """GeoJSON or GeoPackage file with polygons over one or several images. It is read when it is needed.

    Args:
        path: path of the file.
        images: images that the file annotates.

    Attributes:
        class_property: property with the class of a feature; `None` if all features are of the class `"object"`.
    """

    def __init__(self, path: Path, images: Sequence[Path]):
        self.path = path
        self.images = images
        self.class_property: str | None = None

    @cached_property
    def content(self) -> tuple[CRS, list[Feature]]:
        """Coordinate reference system and features.

        Raises:
            ValueError: If the file is invalid, or has another geometry than polygons. The message names the file and
                the feature.
        """
        if self.path.suffix.lower() == ".gpkg":
            return read_geopackage(self.path)
        return read_geojson(self.path)

    @cached_property
    def bounds(self) -> np.ndarray:
        """Left, bottom, right and top of each feature, float64 of shape `(n, 4)`."""
        _, features = self.content
        return shapely.bounds([feature.geometry for feature in features])

    @property
    def labels(self) -> list[str]:
        """Class of each feature."""
        _, features = self.content
        return [class_of(feature, self.class_property) for feature in features]

    def objects(self, image: Path, size: tuple[int, int]) -> list[AnnotatedObject]:
        """Return the features in an image, clipped to it, in pixels.

        The part of a feature is left out if it is less than one pixel wide or high, and marked as difficult if it is
        less than half of the feature.

        Args:
            image: path of the image.
            size: height and width of the image.

        Raises:
            ValueError: If the file is invalid, a feature lacks its class, the image has no georeference, or no feature
                lies in any of the `images`, unless the file is empty and has the name of the image. The message names
                the file.
        """
        image_crs, transformer, bounds = georeference(image)
        crs, features = self.content
        features_near = [features[index] for index in self._near(image, image_crs, bounds)]
        is_empty_file_of_image = not features and image.stem == self.path.stem
        if not features_near and not is_empty_file_of_image and not self._covers_an_image:
            extent = "no features"
            if features:
                west, south = self.bounds[:, :2].min(axis=0)
                east, north = self.bounds[:, 2:].max(axis=0)
                extent = f"{shown((west, south, east, north))} of {crs}"
            raise ValueError(
                f"{self.path}: no feature lies in {image}. Expected features in {shown(bounds)} of {image_crs}, got "
                f"{extent}. Check the coordinate reference systems of both files, and the order of longitude and "
                "latitude."
            )
        geometries = [feature.geometry for feature in features_near]
        if geometries and crs != image_crs:
            geometries = self._transformed(geometries, image, image_crs)
        objects = []
        for feature, geometry in zip(features_near, geometries):
            label = class_of(feature, self.class_property)
            pixel_geometry = to_pixels(geometry, transformer)
            visible_object = clipped_object(feature.where, label, pixel_geometry, size)
            if visible_object is not None:
                objects.append(visible_object)
        return objects

    def _transformed(self, geometries: list[shapely.Geometry], image: Path, image_crs: CRS) -> list[shapely.Geometry]:
        """Return geometries in the coordinate reference system of an image."""
        crs, _ = self.content
        mappings = [shapely.geometry.mapping(geometry) for geometry in geometries]
        with naming_both(self.path, image):
            return [shapely.geometry.shape(mapping) for mapping in transform_geom(crs, image_crs, mappings)]

    def _near(self, image: Path, image_crs: CRS, bounds: Bounds) -> list[int]:
        """Return the indices of the features whose bounds overlap those of an image."""
        crs, _ = self.content
        with naming_both(self.path, image):
            west, south, east, north = transform_bounds(image_crs, crs, *bounds)
        feature_west, feature_south, feature_east, feature_north = self.bounds.T
        if west <= east:
            overlaps_x = (feature_west <= east) & (feature_east >= west)
        else:  # The image crosses the antimeridian.
            overlaps_x = (feature_west <= east) | (feature_east >= west)
        overlaps_y = (feature_south <= north) & (feature_north >= south)
        return np.flatnonzero(overlaps_x & overlaps_y).tolist()

    @cached_property
    def _covers_an_image(self) -> bool:
        for image in self.images:
            with suppress(ValueError):  # An image without georeference has its own error.
                crs, _, bounds = georeference(image)
                if self._near(image, crs, bounds):
                    return True
        return False


@contextmanager
def naming_both(annotations: Path, image: Path) -> Iterator[None]:
    """Raise errors between the coordinates of annotations and of an image as a `ValueError` that names both files."""
    try:
        yield
    except Exception as error:  # GDAL raises many error types.
        raise ValueError(f"{annotations} and {image}: coordinates cannot be transformed: {error}") from error


def feature_files(
    root: Path,
    where: Path,
    images: Iterable[Path],
    class_property: str | None = None,
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
        ValueError: If several files are equally near to an image.
    """
    images = list(images)
    if where.is_file():
        paths = [where]
    else:
        paths = [path for path in visible_paths(where) if path.suffix.lower() in SUFFIXES]
    base = root if where.is_relative_to(root) else where
    image_stems = {image.stem for image in images}
    files_by_stem = defaultdict(list)
    shared_files = []
    for path in paths:
        if path.stem in image_stems and path != where:
            files_by_stem[path.stem].append(path)
        else:
            shared_files.append(path)
    images_of_files = defaultdict(list)
    for image in images:
        candidates = files_by_stem.get(image.stem) or shared_files
        nearest_files = files_nearest_to(image, root, candidates, base) or candidates
        if len(nearest_files) > 1:
            raise ValueError(
                f"{nearest_files[0]} and {nearest_files[1]} may both annotate {image}. Expected one file of the same "
                "name as the image, or one for the folder of the image. Remove the other files, or set `annotations`."
            )
        for path in nearest_files:
            images_of_files[path].append(image)
    files = [FeatureFile(path, images_of_file) for path, images_of_file in images_of_files.items()]
    if class_property is None:
        class_property = default_class_property(files)
    file_of_image = {}
    for file in files:
        file.class_property = class_property
        for image in file.images:
            file_of_image[image] = file
    return file_of_image


def files_nearest_to(
    image: Path,
    root: Path,
    files: Sequence[Path],
    base: Path,
) -> list[Path]:
    """Return the files in the deepest folder that has an image in it; `base` is the folder of all files."""
    image_folders = folder_key(image, root)
    depths = {}
    for file in files:
        folders = folder_key(file, base)
        has_image = image_folders[: len(folders)] == folders
        if has_image:
            depths[file] = len(folders)
    largest_depth = max(depths.values(), default=0)
    return [file for file, depth in depths.items() if depth == largest_depth]


def default_class_property(files: Iterable[FeatureFile]) -> str | None:
    """Return the first of `CLASS_PROPERTIES` that a feature has, compared without case, or `None`."""
    property_names = set()
    for file in files:
        with suppress(ValueError):  # An invalid file is named when its objects are read.
            for feature in file.content[1]:
                property_names.update(feature.properties)
    for class_property in CLASS_PROPERTIES:
        for name in sorted(property_names):
            if name.lower() == class_property:
                return name
    if property_names:
        logger.warning(
            "No feature has a property %s, so all objects are of the class %r. Properties: %s. Set `class_property` to "
            "the property with the class.",
            " or ".join(CLASS_PROPERTIES),
            DEFAULT_CLASS,
            ", ".join(sorted(property_names)),
        )
    return None


def folder_key(path: Path, root: Path) -> tuple[str, ...]:
    """Return the folders of a path, without those with the names `images` and `labels`."""
    folders = path.relative_to(root).parent.parts
    return tuple(folder for folder in folders if folder.lower() not in ("images", "labels"))


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
        transformer = AffineTransformer(file.transform)
        low = -MARGIN
        high = 1 + MARGIN
        rows = file.height * np.array([low, low, high, high])
        columns = file.width * np.array([low, high, low, high])
        xs, ys = transformer.xy(rows, columns, offset="ul")
        bounds = (xs.min(), ys.min(), xs.max(), ys.max())
        return file.crs, transformer, bounds


def parse_crs(definition: Any) -> CRS:
    """Return the coordinate reference system of a definition in a file. Raise a `ValueError` if it is invalid."""
    if not isinstance(definition, str) or not CRS_DEFINITION.fullmatch(definition):
        raise ValueError(f"expected an authority code, WKT or a PROJ string, got {str(definition)[:80]!r}")
    return CRS.from_user_input(definition)


def read_geojson(path: Path) -> tuple[CRS, list[Feature]]:
    """Return the coordinate reference system and the features of a GeoJSON file.

    Coordinates are longitude and latitude on WGS 84 (RFC 7946), unless the file has the older member `crs`. The file is
    not read by GDAL, which skips invalid features, and converts a class that is a list to text.

    Raises:
        ValueError: If the file is invalid, or has another geometry than polygons. The message names the file and the
            feature.
    """
    contents = read_annotation(path)
    kind = contents.get("type") if isinstance(contents, dict) else None
    items = None
    if kind == "Feature":
        items = [contents]
    elif kind == "FeatureCollection":
        items = contents.get("features")
    if not isinstance(items, list):
        raise ValueError(f"{path}: expected a GeoJSON FeatureCollection with `features`, got {str(contents)[:80]!r}.")
    try:
        crs_name = contents["crs"]["properties"]["name"] if "crs" in contents else WGS84
        crs = parse_crs(crs_name)
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path}: expected `crs` with the name of a coordinate reference system such as EPSG:4326, got "
            f"{str(contents['crs'])[:80]!r}. Correct it, or remove it if the coordinates are longitude and latitude."
        ) from error
    features = []
    for index, item in enumerate(items):
        location = f"{path}, feature {index}"
        properties = member_of(item, "properties")
        geometry = member_of(item, "geometry")
        kind = geometry.get("type")
        coordinates = geometry.get("coordinates")
        polygons = geojson_polygons(kind, coordinates)
        check_geometry(location, kind, coordinates, polygons)
        features.append(Feature(location, properties, polygons))
    return crs, features


def member_of(feature: Any, name: str) -> dict[str, Any]:
    """Return the properties or the geometry of a feature in GeoJSON, empty if they are missing or invalid."""
    member = feature.get(name) if isinstance(feature, dict) else None
    return member if isinstance(member, dict) else {}


def geojson_polygons(kind: Any, coordinates: Any) -> shapely.MultiPolygon | None:
    """Return the polygons of the coordinates of a GeoJSON geometry, or `None` if they are invalid.

    A ring need not repeat its first point.
    """
    polygons = []
    try:
        for rings in coordinates if kind == "MultiPolygon" else [coordinates]:
            exterior, *holes = [[point[:2] for point in ring] for ring in rings]
            for points in (exterior, *holes):
                is_finite = all(is_number(x) and is_number(y) for x, y in points)
                if len(points) < 4 or not is_finite:
                    return None
            polygons.append(shapely.Polygon(exterior, holes))
    except (TypeError, ValueError):
        return None
    return shapely.MultiPolygon(polygons) if polygons else None


def read_geopackage(path: Path) -> tuple[CRS, list[Feature]]:
    """Return the coordinate reference system and the features of the only layer of a GeoPackage.

    Raises:
        ValueError: If the file is invalid, or has several layers, or another geometry than polygons. The message names
            the file and the feature.
    """
    # If geopandas is installed, pyogrio imports it, which takes a second that only these files need.
    import pyogrio

    with read_errors(path, "a GeoPackage"):  # GDAL raises many error types.
        with open_file(path) as file:
            header = file.read(len(SQLITE_HEADER))
        # GDAL chooses the format by the content. Some formats name other files, which GDAL would open too.
        if header != SQLITE_HEADER:
            raise ValueError("expected an SQLite database.")
        layers = [name for name, geometry_type in pyogrio.list_layers(path) if geometry_type is not None]
        if len(layers) != 1:
            layer_names = ", ".join(sorted(layers)) or "none"
            raise ValueError(f"expected one layer of features, found {layer_names}. Export the labels alone.")
        # Without a query, pyogrio reads as many features as the file states. Their number may be wrong after another
        # program changed the layer.
        quoted_layer = layers[0].replace('"', '""')
        description, numbers, blobs, columns = pyogrio.raw.read(
            path,
            sql=f'SELECT * FROM "{quoted_layer}"',
            force_2d=True,
            return_fids=True,
            datetime_as_string=True,
        )
        definition = description["crs"]
        if definition is None or "Undefined" in definition:  # GDAL names a missing system "Undefined Cartesian SRS".
            raise ValueError(
                f"the layer {layers[0]!r} has no known coordinate reference system. Set it, for example with ogr2ogr "
                "-a_srs EPSG:4326."
            )
        crs = parse_crs(definition)
    values_of_properties = {}
    for name, column in zip(description["fields"], columns):
        if column.dtype == bool:
            column = column.astype(int)  # The class is "0" or "1", as the file stores it.
        values_of_properties[name] = column.tolist()
    features = []
    for index, geometry in enumerate(shapely.from_wkb(blobs, on_invalid="ignore")):
        location = f"{path}, feature {numbers[index]}"
        kind = None if geometry is None else geometry.geom_type
        check_geometry(location, kind, geometry, geometry if has_valid_rings(geometry) else None)
        properties = {name: values[index] for name, values in values_of_properties.items()}
        features.append(Feature(location, properties, geometry))
    return crs, features


def has_valid_rings(geometry: shapely.Geometry | None) -> bool:
    """Return whether a geometry has points, and all are finite."""
    parts = shapely.get_parts(geometry)
    is_finite = np.abs(shapely.get_coordinates(geometry)) < MAX_COORDINATE
    return len(parts) > 0 and not shapely.is_empty(parts).any() and bool(is_finite.all())


def check_geometry(
    location: str,
    kind: Any,
    coordinates: Any,
    polygons: shapely.Geometry | None,
) -> None:
    """Raise a `ValueError` unless a feature is a polygon or several, with valid rings.

    Args:
        location: file and feature in the error.
        kind: type of the geometry, as the file states it.
        coordinates: coordinates, as the file states them.
        polygons: the valid polygons, or `None`.
    """
    if kind not in POLYGONS:
        stated_kind = "no geometry that can be read" if kind is None else f"the type {str(kind)[:80]!r}"
        problem = (
            f"expected a Polygon or MultiPolygon, got {stated_kind}. Remove the feature, or draw the outline of the "
            "object; the tool Buffer of QGIS makes polygons of points and lines."
        )
    elif polygons is None:
        problem = f"expected rings of at least four points with finite coordinates, got {str(coordinates)[:80]}."
    else:
        return
    raise ValueError(f"{location}: {problem}")


def class_of(feature: Feature, class_property: str | None) -> str:
    """Return the class of a feature. Raise a `ValueError` if it is not a nonempty text or an integer."""
    if class_property is None:
        return DEFAULT_CLASS
    value = feature.properties.get(class_property)
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, (str, int)) or value == "":
        known_properties = ", ".join(feature.properties) or "none"
        stated_class = repr(value)[:80] if class_property in feature.properties else "no such property"
        raise ValueError(
            f"{feature.where}: expected a class in the property {class_property!r}, got {stated_class}. Properties: "
            f"{known_properties}. Set `class_property` to the property with the class, or give the feature a class."
        )
    return str(value)


def to_pixels(geometry: shapely.Geometry, transformer: AffineTransformer) -> shapely.Geometry:
    """Return a geometry in pixels, with x to the right and y down."""

    def points_to_pixels(points: np.ndarray) -> np.ndarray:
        xs, ys = points.T
        # The default of `op` rounds to whole pixels.
        rows, columns = transformer.rowcol(xs, ys, op=np.positive)
        return np.stack([columns, rows], axis=1)

    return shapely.transform(geometry, points_to_pixels)


def clipped_object(
    location: str,
    label: str,
    geometry: shapely.Polygon | shapely.MultiPolygon,
    size: tuple[int, int],
) -> AnnotatedObject | None:
    """Return the object of polygons in pixels, clipped to an image of height and width `size`.

    Return `None` if it lies outside, or if less than a pixel of its width or height is left after it is clipped.
    """
    height, width = size
    min_x, min_y, max_x, max_y = geometry.bounds
    polygons = shapely.get_parts(geometry)
    whole_area = float(shapely.area(polygons).sum())
    visible_area = whole_area
    if min_x < 0 or min_y < 0 or max_x > width or max_y > height:
        # Only valid polygons can be intersected. Each part is repaired alone, because parts may overlap.
        is_invalid = ~shapely.is_valid(polygons)
        polygons[is_invalid] = shapely.make_valid(polygons[is_invalid], method="structure", keep_collapsed=False)
        whole_area = float(shapely.area(polygons).sum())
        image_area = shapely.box(0, 0, width, height)
        polygons = polygons_in(shapely.intersection(polygons, image_area))
        visible_area = float(shapely.area(polygons).sum())
    if not len(polygons):
        return None
    outlines = [outline_of(polygon).clip(0, (width, height)) for polygon in shapely.orient_polygons(polygons)]
    points = np.concatenate(outlines)
    min_x, min_y = points.min(axis=0).tolist()
    max_x, max_y = points.max(axis=0).tolist()
    is_clipped = visible_area < whole_area * (1 - 1e-9)
    if is_clipped and min(max_x - min_x, max_y - min_y) < 1:
        return None
    return AnnotatedObject(
        location,
        label,
        box=(min_x, min_y, max_x, max_y),
        is_difficult=visible_area < MIN_VISIBLE * whole_area,
        area=visible_area,
        segmentation=[outline.flatten().tolist() for outline in outlines],
    )


def polygons_in(geometries: np.ndarray) -> np.ndarray:
    """Return the polygons in geometries, without points, lines and polygons of no area."""
    parts = shapely.get_parts(shapely.get_parts(geometries))  # Twice, for a MultiPolygon in a GeometryCollection.
    return parts[shapely.area(parts) > MIN_AREA]


def outline_of(polygon: shapely.Polygon) -> np.ndarray:
    """Return one outline through all rings of a polygon, float64 of shape `(n, 2)`.

    COCO's polygons have no holes. The outline goes from its first point to each hole and back, which encloses nothing.
    The last point is not the first.
    """
    exterior = shapely.get_coordinates(polygon.exterior)
    rings = [exterior]
    for hole in polygon.interiors:
        rings += [shapely.get_coordinates(hole), exterior[:1]]
    return np.concatenate(rings)[:-1]


def split_at_antimeridian(polygon: shapely.Polygon, is_wrapped: bool) -> shapely.Polygon | shapely.MultiPolygon:
    """Return a polygon in longitude and latitude, split at the antimeridian as RFC 7946 (3.1.9) says.

    Args:
        polygon: polygon that crosses the antimeridian, or surrounds a pole.
        is_wrapped: whether longitudes jump by 360 degrees at the antimeridian. Otherwise they go on beyond 180 degrees.
    """
    rings = []
    for ring in (polygon.exterior, *polygon.interiors):
        points = shapely.get_coordinates(ring)
        if is_wrapped:
            points[:, 0] = np.unwrap(points[:, 0], period=360)
        if abs(points[-1, 0] - points[0, 0]) > 180:  # The ring surrounds a pole, which is an edge of the map.
            pole = math.copysign(90, points[:, 1].mean())
            points = np.concatenate([points, [[points[-1, 0], pole], [points[0, 0], pole]]])
        if rings:  # A hole is brought to the turn of the outline.
            points[:, 0] += 360 * round((rings[0][:, 0].mean() - points[:, 0].mean()) / 360)
        rings.append(points)
    exterior, *holes = rings
    continuous = shapely.make_valid(shapely.Polygon(exterior, holes))
    parts = []
    for west in (-540, -180, 180):
        clipped = shapely.intersection(continuous, shapely.box(west, -90, west + 360, 90))
        for part in shapely.get_parts(shapely.get_parts(clipped)):
            if part.area > 0:
                parts.append(shapely.affinity.translate(part, -180 - west))
    return shapely.orient_polygons(shapely.union_all(parts))  # The parts around a pole have a common edge.


def shown(bounds: Bounds) -> str:
    return "[{:.6g}, {:.6g}, {:.6g}, {:.6g}]".format(*bounds)
