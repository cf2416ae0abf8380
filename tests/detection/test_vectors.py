"""Outlines of masks, and where images lie on the ground."""

import json

import numpy as np
import pytest
import rasterio
import shapely
from rasterio.control import GroundControlPoint
from rasterio.transform import from_origin

from modeling_vitp.detection.prediction import outline, polygons_of, write_coco, write_geojson

pytestmark = pytest.mark.filterwarnings("ignore::rasterio.errors.NotGeoreferencedWarning")
BOX = {"label": 1, "score": 0.123456789, "box": [2.0, 3.0, 12.0, 7.5]}


def image(path, **profile):
    """An image of 20 x 30 pixels, open."""
    profile = {"driver": "GTiff", "count": 1, "height": 20, "width": 30, "dtype": "uint8", **profile}
    with rasterio.open(path, "w", **profile) as file:
        file.write(np.zeros((1, 20, 30), np.uint8))
    return rasterio.open(path)


def geojson(tmp_path, found, **profile):
    with image(tmp_path / "scene.tif", **profile) as opened:
        write_geojson([[found], []], opened, ["ship", "plane"], tmp_path / "objects.geojson")
    return json.loads((tmp_path / "objects.geojson").read_text())


@pytest.mark.parametrize("share", [0.02, 0.5, 0.9])
def test_polygons_of_a_mask_cover_its_pixels_and_no_others(share):
    """With holes, parts and parts that touch at a corner."""
    mask = np.random.default_rng(0).random((13, 17)) < share
    polygons = polygons_of(mask, left=100, top=50)
    assert any(len(rings) > 1 for rings in polygons) == (share > 0.1)
    shape = shapely.MultiPolygon([(rings[0], rings[1:]) for rings in polygons])
    assert shape.is_valid and shape.area == mask.sum()
    ys, xs = np.mgrid[:13, :17]
    np.testing.assert_array_equal(shapely.contains_xy(shape, xs + 100.5, ys + 50.5), mask)
    assert polygons_of(np.zeros((4, 5), bool)) == []


def test_holes_of_masks_turn_right_in_geojson_and_are_filled_in_coco(tmp_path):
    mask = np.ones((5, 5), bool)
    mask[2, 1:3] = False
    found = {**BOX, "polygons": polygons_of(mask, 4, 6)}
    (feature,) = geojson(tmp_path, found)["features"]
    shape = shapely.from_geojson(json.dumps(feature["geometry"]))
    assert shape.exterior.is_ccw and not shape.interiors[0].is_ccw and shape.area == 23
    with image(tmp_path / "scene.tif") as opened:
        write_coco([[found]], opened, ["ship", "plane"], tmp_path / "objects.json")
    (annotation,) = json.loads((tmp_path / "objects.json").read_text())["annotations"]
    assert shapely.Polygon(np.reshape(annotation["segmentation"], (-1, 2))).equals(shapely.box(4, 6, 9, 11))
    assert annotation["area"] == 25 and annotation["bbox"] == [2, 3, 10, 4.5]
    assert annotation["score"] == 0.123457 and annotation["category_id"] == 2


def test_an_image_without_a_crs_has_objects_in_the_coordinates_that_it_has(tmp_path):
    found = geojson(tmp_path, BOX, transform=from_origin(500, 900, 2, 2))
    assert found["coordinate_system"] == "that of the image, which does not name it (it has no CRS)"
    assert found["features"] == [
        {
            "type": "Feature",
            "properties": {"class": "plane", "score": 0.123457},
            "geometry": {
                "type": "Polygon",
                "coordinates": [[[504, 894], [504, 885], [524, 885], [524, 894], [504, 894]]],
            },
        }
    ]


@pytest.mark.parametrize("pixel", [5e-6, 0.25, 3.0])
def test_without_a_crs_a_pixel_is_told_apart_whatever_its_size(tmp_path, pixel):
    """The world files of many images are in degrees."""
    found = geojson(tmp_path, BOX, transform=from_origin(12, 48, pixel, pixel))
    shape = shapely.from_geojson(json.dumps(found["features"][0]["geometry"]))
    expected = (12 + 2 * pixel, 48 - 7.5 * pixel, 12 + 12 * pixel, 48 - 3 * pixel)
    assert shape.bounds == pytest.approx(expected, rel=0, abs=1e-3 * pixel)


def test_ground_control_points_place_the_objects(tmp_path):
    """Of many radar images they are the georeference; here 0.1 degrees a pixel."""
    places = [(row, column) for row in (0, 20) for column in (0, 30)]
    points = [GroundControlPoint(row, column, 10 + column / 10, 50 - row / 10) for row, column in places]
    found = geojson(tmp_path, BOX, gcps=points, crs="EPSG:4326")
    assert found["coordinate_system"].startswith("longitude and latitude")
    shape = shapely.from_geojson(json.dumps(found["features"][0]["geometry"]))
    assert shape.bounds == pytest.approx((10.2, 49.25, 11.2, 49.7), abs=1e-6)


def test_an_object_over_the_antimeridian_is_cut_there(tmp_path):
    """RFC 7946, 3.1.9. The image lies in Fiji's zone, where longitude 180 is near x = 817,700."""
    ground = {"crs": "EPSG:32760", "transform": from_origin(817_700 - 3000, 8_007_000, 200, 200)}
    (feature,) = geojson(tmp_path, {**BOX, "box": [0, 0, 30, 20]}, **ground)["features"]
    shape = shapely.from_geojson(json.dumps(feature["geometry"]))
    west, east = sorted(part.bounds for part in shape.geoms)
    assert west[0] == -180 and west[2] < -179.9 and east[0] > 179.9 and east[2] == 180
    assert all(part.exterior.is_ccw for part in shape.geoms)


def test_an_outline_is_closed():
    corners = [[0, 1], [2, 0], [3, 2], [1, 3]]
    assert outline({"corners": corners}) == [[[*corners, corners[0]]]]
    assert outline({"box": [1, 2, 3, 4]}) == [[[[1, 2], [3, 2], [3, 4], [1, 4], [1, 2]]]]
