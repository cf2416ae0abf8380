"""Features of GeoJSON and GeoPackage in pixels of GeoTIFFs, against the shapes that are written, and rasterio."""

import json
import sqlite3

import numpy as np
import pytest
import rasterio.features
import shapely
from faster_coco_eval.core import mask as run_lengths
from georeferenced import (
    NORTH_UP,
    ROTATED,
    UTM,
    apply,
    feature,
    save_geojson,
    save_geopackage,
    save_geotiff,
    to_ground,
)
from hypothesis import example, given, settings
from hypothesis import strategies as st
from rasterio import Affine

from modeling_vitp.data.geodata import FeatureFile, clipped_object, feature_files
from modeling_vitp.data.layouts import GeoJson, recognize_layout

HEIGHT, WIDTH = 80, 120
SIZE = (HEIGHT, WIDTH)
PIXELS = np.zeros((*SIZE, 3), np.uint8)
SHAPES = [
    shapely.Polygon([(10, 12), (40.5, 12), (40.5, 30.25), (10, 30.25)]),
    shapely.Polygon([(60, 20), (90, 30), (85, 60), (70, 45), (55, 62)], [[(70, 30), (80, 33), (75, 40)]]),
    shapely.MultiPolygon([shapely.box(5, 60, 15, 70), shapely.box(20, 65, 30, 72)]),
    shapely.Polygon([(100, -10), (140, 5), (130, 50), (105, 40)]),
]
LABELS = ["ship", "plane", "ship", "plane"]
RIGHT = shapely.box(0, 0, WIDTH, HEIGHT)


def objects_of(path, image, class_property="class"):
    file = FeatureFile(path, [image])
    file.class_property = class_property
    return file.objects(image, SIZE)


def check_shapes(found, shapes=SHAPES, tolerance=1e-3):
    assert [item.label for item in found] == LABELS[: len(shapes)]
    for item, shape in zip(found, shapes, strict=True):
        inside = shape & RIGHT
        np.testing.assert_allclose(item.box, inside.bounds, atol=tolerance)
        np.testing.assert_allclose(item.area, inside.area, atol=100 * tolerance)
        assert item.is_difficult == (inside.area < shape.area / 2)


@pytest.mark.parametrize("transform", [NORTH_UP, ROTATED])
def test_boxes_equal_those_of_affine_transform(transform, tmp_path):
    save_geotiff(tmp_path / "a.tif", PIXELS, transform)
    save_geojson(tmp_path / "a.geojson", [feature(s, transform, **{"class": c}) for s, c in zip(SHAPES, LABELS)])
    found = objects_of(tmp_path / "a.geojson", tmp_path / "a.tif")
    check_shapes(found)
    # The same from the file: reprojected points, and the inverse of rasterio's transform.
    contents = json.loads((tmp_path / "a.geojson").read_text())
    with rasterio.open(tmp_path / "a.tif") as file:
        for item, entry in list(zip(found, contents["features"]))[:2]:
            xs, ys = rasterio.warp.transform("EPSG:4326", file.crs, *zip(*entry["geometry"]["coordinates"][0]))
            points = apply(~file.transform, np.transpose([xs, ys]))
            np.testing.assert_allclose(item.box, (*points.min(0), *points.max(0)), atol=1e-6)
        assert file.crs == UTM


@pytest.mark.parametrize(
    ("crs", "transform"),
    [("EPSG:4326", NORTH_UP), (UTM, ROTATED), ("EPSG:3857", NORTH_UP), ("EPSG:25832", ROTATED)],
)
def test_geopackage_equals_written_shapes(crs, transform, tmp_path):
    save_geotiff(tmp_path / "a.tif", PIXELS, transform)
    ground = [shapely.force_3d(to_ground(shape, transform, target=crs), 7) for shape in SHAPES]
    save_geopackage(tmp_path / "a.gpkg", ground, LABELS, crs)
    check_shapes(objects_of(tmp_path / "a.gpkg", tmp_path / "a.tif"))


@pytest.mark.parametrize("name", ["urn:ogc:def:crs:EPSG::25832", "EPSG:25832"])
def test_crs_member_is_used(name, tmp_path):
    save_geotiff(tmp_path / "a.tif", PIXELS)
    entries = [feature(shape, **{"class": label}) for shape, label in zip(SHAPES, LABELS)]
    for entry, shape in zip(entries, SHAPES):
        entry["geometry"] = json.loads(shapely.to_geojson(to_ground(shape, target="EPSG:25832")))
    save_geojson(tmp_path / "a.geojson", entries, crs={"type": "name", "properties": {"name": name}})
    check_shapes(objects_of(tmp_path / "a.geojson", tmp_path / "a.tif"))


def test_features_at_antimeridian_are_found(tmp_path):
    transform = Affine(50, 0, 822000, 0, -50, 6000)  # The right of zone 60, across 180 degrees.
    save_geotiff(tmp_path / "a.tif", np.zeros((80, 600, 3), np.uint8), transform, "EPSG:32660")
    entries = []
    for left in (10, 500):
        ground = to_ground(shapely.box(left, 10, left + 20, 30), transform, "EPSG:32660")
        entries.append(feature(SHAPES[0]) | {"geometry": json.loads(shapely.to_geojson(ground))})
    longitudes = [entry["geometry"]["coordinates"][0][0][0] for entry in entries]
    assert longitudes[0] > 179 and longitudes[1] < -179
    save_geojson(tmp_path / "a.geojson", entries)
    found = FeatureFile(tmp_path / "a.geojson", [tmp_path / "a.tif"]).objects(tmp_path / "a.tif", (80, 600))
    np.testing.assert_allclose([item.box for item in found], [(10, 10, 30, 30), (500, 10, 520, 30)], atol=1e-2)


@st.composite
def stars(draw):
    """Draw a star-shaped polygon around or beside the image, with a hole if it is large."""
    number = draw(st.integers(3, 12))
    radii = draw(st.lists(st.floats(5, 150), min_size=number, max_size=number))
    center = np.array([draw(st.floats(-20, WIDTH + 20)), draw(st.floats(-20, HEIGHT + 20))])
    shape = star(center, radii, draw(st.floats(0, 1)))
    return shape if draw(st.booleans()) else shape.reverse()


def star(center, radii, angle=0.0):
    angles = np.linspace(0, 2 * np.pi, len(radii), endpoint=False) + angle
    spokes = np.stack([np.cos(angles), np.sin(angles)], 1) * np.array(radii)[:, None]
    return shapely.Polygon(center + spokes, [center + 0.4 * spokes] if len(radii) > 4 else [])


def mask_of(item):
    return run_lengths.decode([run_lengths.segmToRle(item.segmentation, WIDTH, HEIGHT)])[..., 0]


@settings(deadline=None, max_examples=60)
@given(stars())
@example(star(np.array([5, 4]), [5, 5, 26, 5, 18, 5]).reverse())  # touches the border of the image at a vertex
@example(star(np.array([60, 40]), [30] * 6))  # a whole polygon, with a hole of the same direction
def test_clipped_polygon_equals_intersection(shape):
    item, inside = clipped_object("x", "star", shape, SIZE), shape & RIGHT
    if inside.geom_type == "GeometryCollection":  # with the points and lines at which they touch
        inside = shapely.union_all([part for part in inside.geoms if part.area])
    if item is None:
        left, top, right, bottom = inside.bounds if inside.area > 1e-5 else (0, 0, 0, 0)
        assert min(right - left, bottom - top) < 1 + 1e-6
        return
    np.testing.assert_allclose(item.box, inside.bounds, atol=1e-6)
    np.testing.assert_allclose(item.area, inside.area, rtol=1e-6, atol=1e-4)
    # An outline through holes encloses the area if the holes have the opposite direction.
    areas = [shapely.Polygon(np.reshape(outline, (-1, 2))).area for outline in item.segmentation]
    np.testing.assert_allclose(sum(areas), item.area, rtol=1e-6)
    drawn = rasterio.features.rasterize([shape], SIZE)
    # Both decide about pixels on the outline by themselves.
    assert (mask_of(item) != drawn).sum() <= inside.boundary.length + 4


def test_polygon_around_the_image_is_only_where_it_enters():
    around = shapely.box(-30, -30, WIDTH + 30, HEIGHT + 30) - shapely.box(-10, -10, WIDTH + 10, HEIGHT + 10)
    shape = (around - shapely.box(-40, 40, -10, 50)) | shapely.box(-20, 20, 15, 30) | shapely.box(50, 70, 58, 100)
    item = clipped_object("x", "wall", shape, SIZE)
    assert item.box == (0, 20, 58, 80) and item.area == 15 * 10 + 8 * 10 and item.is_difficult
    assert sorted(len(polygon) for polygon in item.segmentation) == [8, 8]
    assert mask_of(item).sum() == item.area


def test_narrow_parts_and_neighbors_are_left_out():
    for left, expected in ((WIDTH - 0.9, False), (WIDTH - 1.1, True), (WIDTH, False), (WIDTH + 5, False)):
        item = clipped_object("x", "ship", shapely.box(left, 10, left + 20, 30), SIZE)
        assert (item is not None) == expected
    item = clipped_object("x", "ship", shapely.box(5, 5, 5.5, 5.5), SIZE)
    assert item.box == (5, 5, 5.5, 5.5)  # Small, but whole.


HOLE_AT_EDGE = shapely.Polygon(shapely.box(-10, 10, 30, 50).exterior, [shapely.box(-10, 15, 5, 30).exterior])
BOW_TIE = shapely.Polygon([(-10, 10), (30, 30), (30, 10), (-10, 30)])
OVERLAPPING = shapely.MultiPolygon([shapely.box(-10, 10, 10, 30), shapely.box(-5, 20, 15, 40)])


@pytest.mark.parametrize(
    ("shape", "area", "pixels"), [(HOLE_AT_EDGE, 1125, 1125), (BOW_TIE, 250, 250), (OVERLAPPING, 500, 400)]
)
def test_invalid_polygon_is_clipped(shape, area, pixels):
    """The area of parts that overlap counts twice, as without a border."""
    item = clipped_object("x", "ship", shape, SIZE)
    assert not shape.is_valid and item.area == pytest.approx(area) and mask_of(item).sum() == pixels


def test_outlines_of_whole_polygons_are_not_changed():
    """Outlines that are not cut keep their points, also if they cross themselves or have no area."""
    for points in ([(10, 10), (30, 30), (30, 10), (10, 30)], [(10, 10), (30, 30), (50, 50)]):
        item = clipped_object("x", "ship", shapely.Polygon(points), SIZE)
        (outline,) = item.segmentation
        assert sorted(zip(outline[::2], outline[1::2])) == sorted(points)


def label_names(root, **options):
    return GeoJson(root, **options).class_names()


@pytest.mark.parametrize(
    ("properties", "expected"),
    [
        ({"name": "a", "class": "b"}, ["b"]),
        ({"Type": "a", "id": 3}, ["a"]),
        ({"category": 3.0}, ["3"]),
        ({"id": 3}, ["object"]),
    ],
)
def test_class_property_is_found(properties, expected, tmp_path):
    save_geotiff(tmp_path / "a.tif", PIXELS)
    save_geojson(tmp_path / "a.geojson", [feature(SHAPES[0], **properties)])
    assert label_names(tmp_path) == expected
    if "id" in properties:
        assert label_names(tmp_path, class_property="id") == ["3"]


@pytest.mark.parametrize(
    ("column", "value", "expected"), [("INTEGER", 5, "5"), ("BOOLEAN", 1, "1"), ("DATE", "'2024-01-02'", "2024-01-02")]
)
def test_class_may_have_any_type_in_geopackage(column, value, expected, tmp_path):
    save_geotiff(tmp_path / "a.tif", PIXELS)
    geopackage(f"ALTER TABLE labels ADD COLUMN kind {column} DEFAULT {value}")(tmp_path)
    assert [item.label for item in objects_of(tmp_path / "a.gpkg", tmp_path / "a.tif", "kind")] == [expected] * 2


def test_all_features_are_read_if_their_stated_number_is_wrong(tmp_path):
    save_geotiff(tmp_path / "a.tif", PIXELS)
    geopackage("UPDATE gpkg_ogr_contents SET feature_count = 1")(tmp_path)
    check_shapes(objects_of(tmp_path / "a.gpkg", tmp_path / "a.tif"), SHAPES[:2])


def test_class_property_is_the_same_in_all_files(tmp_path):
    for name, properties in (("a", {"name": "x", "class": "ship"}), ("b", {"name": "y"})):
        save_geotiff(tmp_path / f"{name}.tif", PIXELS)
        save_geojson(tmp_path / f"{name}.geojson", [feature(SHAPES[0], **properties)])
    with pytest.raises(ValueError, match=r"b\.geojson, feature 0: .*'class'.*name"):
        label_names(tmp_path)
    assert label_names(tmp_path, class_property="name") == ["x", "y"]


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        (["a.geojson", "b.gpkg"], ["a.geojson", "b.gpkg"]),
        (["labels/a.geojson", "labels/b.geojson"], ["labels/a.geojson", "labels/b.geojson"]),
        (["labels/a.geojson"], ["labels/a.geojson", None]),
        (["all.gpkg"], ["all.gpkg"] * 2),
        (["images/all.geojson", "../all.geojson"], ["images/all.geojson"] * 2),
        (["../labels/all.geojson", "../other/labels/all.geojson"], ["../labels/all.geojson"] * 2),
        (["../shapes/all.geojson"], ["../shapes/all.geojson"] * 2),
        (["all.gpkg", "labels/a.gpkg"], ["labels/a.gpkg", "all.gpkg"]),
        (["../shapes/a.gpkg", "../shapes/b.gpkg"], ["../shapes/a.gpkg", "../shapes/b.gpkg"]),
        (["labels/a.gpkg", "../test/labels/a.gpkg", "all.gpkg"], ["labels/a.gpkg", "all.gpkg"]),
    ],
)
def test_files_of_images_are_found(files, expected, tmp_path):
    for file in files:
        path = (tmp_path / "train" / file).resolve()
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    images = [tmp_path / "train" / "images" / f"{name}.tif" for name in "ab"]
    found = feature_files(tmp_path, tmp_path, images)
    paths = [(tmp_path / "train" / name).resolve() if name else None for name in expected]
    assert [found[image].path.resolve() if image in found else None for image in images] == paths


def test_shared_file_annotates_images_of_two_zones(tmp_path):
    """One GeoPackage in WGS 84 over rasters of two zones; the second raster has no feature."""
    east = Affine(*NORTH_UP[:2], NORTH_UP.c + WIDTH * NORTH_UP.a, *NORTH_UP[3:6])
    save_geotiff(tmp_path / "train" / "a.tif", PIXELS)
    save_geotiff(tmp_path / "train" / "b.tif", PIXELS, east)
    save_geotiff(tmp_path / "train" / "c.tif", PIXELS, Affine(10, 0, 412345, 0, -10, 4512345), "EPSG:32634")
    shapes = [shapely.box(WIDTH - 12, 20, WIDTH + 8, 40), shapely.box(WIDTH + 30, 5, WIDTH + 40, 15)]
    save_geopackage(tmp_path / "train" / "labels.gpkg", [to_ground(shape) for shape in shapes], ["ship", "plane"])
    layout = GeoJson(tmp_path)
    assert recognize_layout(tmp_path) == "geojson" and layout.splits().keys() == {"train"}
    boxes = {}
    for image_id, paths in layout.splits()["train"].items():
        (image,) = layout.annotate(image_id, paths)
        boxes[image_id] = [(region.label, *np.round(region.box, 3), region.is_clear) for region in image.regions]
    assert boxes == {
        "train/a.tif": [("ship", WIDTH - 12, 20, WIDTH, 40, True)],
        "train/b.tif": [("ship", 0, 20, 8, 40, False), ("plane", 30, 5, 40, 15, True)],
        "train/c.tif": [],
    }


def change(**members):
    def apply(root):
        contents = json.loads((root / "a.geojson").read_text())
        contents["features"][1].update(members)
        save_geojson(root / "a.geojson", contents["features"])

    return apply


def geometry(kind, coordinates):
    return change(geometry={"type": kind, "coordinates": coordinates})


def swap(root):
    contents = json.loads((root / "a.geojson").read_text())
    for entry in contents["features"]:
        shape = shapely.from_geojson(json.dumps(entry["geometry"]))
        swapped = shapely.transform(shape, lambda points: points[:, ::-1])
        entry["geometry"] = json.loads(shapely.to_geojson(swapped))
    save_geojson(root / "a.geojson", contents["features"])


def two_layers(root):
    (root / "a.geojson").unlink()
    for layer in ("roads", "houses"):
        save_geopackage(root / "a.gpkg", [to_ground(SHAPES[0])], ["x"], layer=layer, append=layer == "houses")


def geopackage(statement):
    def apply(root):
        (root / "a.geojson").unlink(missing_ok=True)
        save_geopackage(root / "a.gpkg", [to_ground(shape) for shape in SHAPES[:2]], LABELS[:2])
        with sqlite3.connect(root / "a.gpkg") as base:
            triggers = base.execute("SELECT name FROM sqlite_master WHERE type = 'trigger'").fetchall()
            for (name,) in triggers:  # They call functions of GDAL.
                base.execute(f"DROP TRIGGER {name}")
            base.execute(statement)
        base.close()

    return apply


def other_format(root):
    """Write a file with the name of a GeoPackage, which is a list of other files for GDAL."""
    (root / "a.geojson").rename(root / "b.json")
    source = f"<SrcDataSource>{root / 'b.json'}</SrcDataSource>"
    (root / "a.gpkg").write_text(f'<OGRVRTDataSource><OGRVRTLayer name="b">{source}</OGRVRTLayer></OGRVRTDataSource>')


RING = [[15, 50], [16, 50], [16, 51], [15, 50]]
WRONG = {
    "no CRS": (lambda root: save_geotiff(root / "a.tif", PIXELS, crs=None), r"a\.tif.*coordinate reference system"),
    "no transform": (lambda root: save_geotiff(root / "a.tif", PIXELS, None), r"a\.tif.*geotransform.*gdal"),
    "no JSON": (lambda root: (root / "a.geojson").write_text("{"), r"a\.geojson"),
    "crs": (lambda root: save_geojson(root / "a.geojson", [], crs=None), r"a\.geojson.*`crs`"),
    "point": (geometry("Point", [15, 50]), r"a\.geojson, feature 1.*'Point'"),
    "no geometry": (change(geometry=None), r"a\.geojson, feature 1.*no geometry"),
    "not finite": (geometry("Polygon", [[*RING, [float("nan"), 3]]]), r"a\.geojson, feature 1.*finite"),
    "no class": (change(properties={"other": 1}), r"a\.geojson, feature 1.*'class'.*other.*`class_property`"),
    "list class": (change(properties={"class": [1]}), r"a\.geojson, feature 1.*'class'.*\[1\]"),
    "swapped": (swap, r"a\.geojson.*a\.tif.*latitude"),
    "layers": (two_layers, r"a\.gpkg.*houses, roads"),
    "other format": (other_format, r"a\.gpkg.*SQLite"),
    "no CRS of a layer": (geopackage("UPDATE gpkg_geometry_columns SET srs_id = -1"), r"a\.gpkg.*'labels'.*a_srs"),
    "cut blob": (geopackage("UPDATE labels SET geom = substr(geom, 1, 80) WHERE fid = 2"), r"a\.gpkg, feature 2"),
    "null": (geopackage("UPDATE labels SET geom = NULL WHERE fid = 2"), r"a\.gpkg, feature 2.*no geometry"),
}


@pytest.mark.parametrize("name", WRONG)
def test_invalid_file_is_named(name, tmp_path):
    spoil, named = WRONG[name]
    save_geotiff(tmp_path / "a.tif", PIXELS)
    save_geojson(tmp_path / "a.geojson", [feature(s, **{"class": c}) for s, c in zip(SHAPES, LABELS)])
    spoil(tmp_path)
    layout = GeoJson(tmp_path, class_property="class")
    ((image_id, paths),) = layout.splits()["all"].items()
    with pytest.raises(ValueError, match=named) as caught:
        layout.annotate(image_id, paths)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("names", [["all"], ["first", "second"], ["c"]])
def test_missing_features_are_named(names, tmp_path):
    """An empty file for all images, two such files, and a file of another image."""
    for name in "ab":
        save_geotiff(tmp_path / f"{name}.tif", PIXELS)
    away = [feature(shapely.box(900, 900, 930, 930))] if names == ["c"] else []
    for name in names:
        save_geojson(tmp_path / f"{name}.geojson", away)
    with pytest.raises(ValueError, match=rf"{names[-1]}\.geojson"):
        GeoJson(tmp_path).annotate("a.tif", (tmp_path / "a.tif",))
    (tmp_path / f"{names[0]}.geojson").unlink()
    if len(names) == 1:
        with pytest.raises(ValueError, match=r"\.geojson or \.gpkg"):
            GeoJson(tmp_path).annotate("a.tif", (tmp_path / "a.tif",))


def test_empty_file_of_an_image_has_no_objects(tmp_path):
    for name, entries in (("a", []), ("b", [feature(SHAPES[0])])):
        save_geotiff(tmp_path / f"{name}.tif", PIXELS)
        save_geojson(tmp_path / f"{name}.geojson", entries)
    save_geotiff(tmp_path / "c.tif", PIXELS)
    layout = GeoJson(tmp_path)
    numbers = [len(layout.annotate(f"{n}.tif", (tmp_path / f"{n}.tif",))[0].regions) for n in "ab"]
    assert numbers == [0, 1]
    with pytest.raises(ValueError, match=r"c\.tif .*c\.geojson"):
        layout.annotate("c.tif", (tmp_path / "c.tif",))
