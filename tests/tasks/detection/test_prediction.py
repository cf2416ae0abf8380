"""Tests of detection in large images against a greedy loop, GDAL and the COCO tools."""

import json
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pyogrio
import pytest
import rasterio
import shapely
import torch
from interrupting import Killed, killed_after
from original_detectors import DETECTORS, original_detector
from paths import FIXTURES
from PIL import Image
from pycocotools.coco import COCO
from rasterio.control import GroundControlPoint
from rasterio.transform import from_origin
from safetensors.torch import load_file

from modeling_vitp import ViTPDetectionImageProcessor, detect_large
from modeling_vitp.data.windows import shares_inside
from modeling_vitp.recipes import predict_large as script
from modeling_vitp.rotated_boxes import corners
from modeling_vitp.tasks.detection import prediction as large_images
from modeling_vitp.tasks.detection.prediction import (
    first_at_top_left,
    merge,
    moved,
    polygons_of,
    write_coco,
    write_geojson,
    write_task1,
)

HEIGHT, WIDTH = 150, 170
WINDOWS = {"window": 96, "stride": 60, "batch_size": 1}
WITH_POLYGONS = ["oriented_rcnn", "mask_rcnn"]
GROUND = {"crs": "EPSG:3857", "transform": from_origin(1_000_000.0, 6_000_000.0, 0.5, 0.5)}


def scene(height=HEIGHT, width=WIDTH, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (3, height, width), dtype=np.uint8)


def write_tiff(path, image, **profile):
    bands, height, width = image.shape
    profile = {"count": bands, "height": height, "width": width, "dtype": image.dtype, **GROUND, **profile}
    with rasterio.open(path, "w", driver="GTiff", **profile) as file:
        file.write(image)
    return path


@torch.no_grad()
def objects_alone(model, processor, window, threshold, **options):
    """Return labels, scores, outlines as shapely polygons, and masks of one window."""
    pixels = torch.from_numpy(window.copy())
    outputs = model(**processor(pixels, input_data_format="channels_first", return_tensors="pt", **options))
    settings = {"threshold": threshold, "target_sizes": [window.shape[-2:]]}
    if outputs.pred_corners is not None:
        (found,) = processor.post_process_oriented_object_detection(outputs, **settings)
        found["outlines"] = [shapely.Polygon(points) for points in found["corners"].double().tolist()]
        return found
    if outputs.pred_masks is not None:
        (found,) = processor.post_process_instance_segmentation(outputs, **settings)
    else:
        (found,) = processor.post_process_object_detection(outputs, **settings)
    found["outlines"] = [shapely.box(*box) for box in found["boxes"].double().tolist()]
    return found


def starts(length, window, stride):
    places, place = [], 0
    while place + window < length:
        places.append(place)
        place += stride
    return [*places, max(length - window, 0)]


def by_hand(model, image, threshold=0.1, window=96, stride=60):
    """Detect in all windows one by one, and merge the objects in a greedy loop."""
    found = []
    for top in starts(image.shape[1], window, stride):
        for left in starts(image.shape[2], window, stride):
            part = image[:, top : top + window, left : left + window]
            alone = objects_alone(model, ViTPDetectionImageProcessor(), part, threshold)
            for index, (label, score, shape) in enumerate(zip(alone["labels"], alone["scores"], alone["outlines"])):
                one = {"label": int(label), "score": float(score)}
                one["outline"] = shapely.transform(shape, lambda points, by=(left, top): points + by)
                ends = np.array(shape.bounds) - [1, 1, part.shape[2] - 1, part.shape[1] - 1]
                inner = left > 0, top > 0, left + window < image.shape[2], top + window < image.shape[1]
                one["cut"] = (ends * [1, 1, -1, -1] <= 0) & inner
                if "masks" in alone:
                    one["mask"] = np.zeros(image.shape[1:], bool)
                    one["mask"][top : top + window, left : left + window] = alone["masks"][index].numpy()
                found.append(one)
    kept = []
    for one in sorted((one for one in found if "mask" not in one or one["mask"].any()), key=lambda one: -one["score"]):
        ours = (other["outline"] for other in kept if other["label"] == one["label"])
        if all(
            one["outline"].intersection(other).area / one["outline"].union(other).area <= model.config.nms_threshold
            for other in ours
        ):
            kept.append(one)
    whole = [one for one in kept if not (one["cut"].any() and lies_in_another(one, kept))]
    assert len(whole) <= len(kept) < len(found)
    return whole


def lies_in_another(one, others):
    """Return whether another box of the class covers 0.7 of a cut box and continues beyond the cut."""
    box, boxes = one["outline"], [other["outline"] for other in others if other["label"] == one["label"]]
    around = [other for other in boxes if other.intersection(box).area >= 0.7 * box.area]
    beyond = [(np.array(other.bounds) - box.bounds) * [-1, -1, 1, 1] > 1 for other in around]
    return any(sides[one["cut"]].all() for sides in beyond)


def detect_with(monkeypatch, finds, image, output, **options):
    """Return the annotations of an image by a detector `finds`, which gets the bounds of a window."""
    windows = []

    def reads(source, top, lefts, window, batch_size):
        windows[:] = [(left, top, left + window, top + window) for left in lefts]
        yield lefts, torch.zeros(len(lefts), 3, window, window)

    def detects(*_):
        for bounds in windows:
            yield finds(bounds)

    monkeypatch.setattr(large_images, "windows_with_data", reads)
    monkeypatch.setattr(large_images, "detect", detects)
    detect_large(original_detector("oriented_rcnn"), ViTPDetectionImageProcessor(), image, output, **options)
    return json.loads(output.read_text())["annotations"]


def test_adjacent_ships_are_not_merged(tmp_path, monkeypatch):
    """Check ships with overlapping upright boxes, with a detector that finds ships with 0.7 in the window."""
    generator, along, across = np.random.default_rng(0), np.array([0.6, -0.8]), np.array([0.8, 0.6])
    truth = []
    for quay in np.stack(np.meshgrid([50, 200, 330], [60, 200]), -1).reshape(-1, 2):
        for berth in range(10):
            center, half = quay + across * 11 * berth, along * generator.uniform(24, 30)
            truth.append([center - half, center + half, center + half + 8 * across, center - half + 8 * across])
    truth = np.array(truth)

    def finds(bounds):
        start = bounds[:2]
        seen = np.flatnonzero(shares_inside(truth, start, WINDOWS["window"]) >= 0.7)
        scores = generator.uniform(0.8, 1, len(seen)).tolist()
        return [
            {"label": 0, "score": score, "corners": (truth[index] - start).tolist()}
            for index, score in zip(seen, scores)
        ]

    source = write_tiff(tmp_path / "scene.tif", np.zeros((3, 350, 450), np.uint8))
    annotations = detect_with(monkeypatch, finds, source, tmp_path / "found.json", **WINDOWS)
    found = np.array([one["corners"] for one in annotations])
    is_visible = np.zeros(len(truth), bool)
    for left in starts(450, 96, 60):
        for top in starts(350, 96, 60):
            is_visible |= shares_inside(truth, (left, top), WINDOWS["window"]) >= 0.7
    distances = np.linalg.norm(found.mean(1)[None] - truth.mean(1)[:, None], axis=-1)
    assert is_visible.sum() > 50 and (distances < 1).sum(1).tolist() == is_visible.astype(int).tolist()


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """Return the folder of the scene and its detections, the detectors, and the expected objects."""
    folder = tmp_path_factory.mktemp("large")
    source = write_tiff(folder / "scene.tif", scene())
    models = {name: original_detector(name) for name in DETECTORS}
    outputs = [f"{name}.json" for name in models] + [f"{name}.geojson" for name in WITH_POLYGONS]
    for output in outputs:
        model = models[Path(output).stem]
        detect_large(model, ViTPDetectionImageProcessor(), source, folder / output, threshold=0.1, **WINDOWS)
    return folder, models, {name: by_hand(model, scene()) for name, model in models.items()}


@pytest.mark.parametrize("key", ["box", "corners"])
def test_object_in_overlap_is_detected_once(tmp_path, monkeypatch, key):
    """Check a detector that finds all visible parts of objects, with the visible share as score."""
    generator = np.random.default_rng(0)
    places = [(x, y) for x in range(3, 380, 29) for y in range(3, 280, 29)]
    truth = [(x, y, *np.add((x, y), generator.integers(8, 26, 2)).tolist()) for x, y in places]

    def finds(bounds):
        window = shapely.box(*bounds)
        detections = []
        for box in truth:
            visible = shapely.box(*box).intersection(window)
            if visible.area:
                left, top, right, bottom = (np.array(visible.bounds) - (*bounds[:2], *bounds[:2])).tolist()
                corners = [[left, top], [right, top], [right, bottom], [left, bottom]]
                share = visible.area / shapely.box(*box).area
                position = {"box": [left, top, right, bottom], "corners": corners}[key]
                detections.append({"label": 0, "score": 0.5 + share / 2, key: position})
        return detections

    source = write_tiff(tmp_path / "scene.tif", np.zeros((3, 300, 400), np.uint8))
    annotations = detect_with(monkeypatch, finds, source, tmp_path / "o.json", window=100, stride=74)
    found = [one["bbox"] for one in annotations]
    assert sorted((x, y, x + width, y + height) for x, y, width, height in found) == sorted(truth)


@pytest.mark.parametrize("name", DETECTORS)
def test_objects_equal_greedy_loop(written, name):
    folder, models, expected = written
    file = COCO(str(folder / f"{name}.json"))
    found = sorted(file.loadAnns(file.getAnnIds()), key=lambda one: -one["score"])
    classes = models[name].config.id2label
    assert {one["id"]: one["name"] for one in file.cats.values()} == {index + 1: classes[index] for index in classes}
    (image,) = file.imgs.values()
    assert image["file_name"] == "scene.tif" and (image["height"], image["width"]) == (HEIGHT, WIDTH)
    assert len(found) == len(expected[name]) > 20
    for one, wanted in zip(found, expected[name]):
        assert one["category_id"] == wanted["label"] + 1
        assert one["score"] == pytest.approx(wanted["score"], abs=1e-5)
        left, top, right, bottom = wanted["outline"].bounds
        assert one["bbox"] == pytest.approx([left, top, right - left, bottom - top], abs=4e-3)
        if name == "oriented_rcnn":
            corners = list(wanted["outline"].exterior.coords)[:-1]
            np.testing.assert_allclose(one["corners"], corners, rtol=0, atol=2e-3)
            assert one["segmentation"] == [np.ravel(one["corners"]).tolist()]
        if name != "mask_rcnn":
            assert one["area"] == pytest.approx(wanted["outline"].area, rel=1e-3)


def test_instance_outlines_are_mask_edges(written):
    folder, _, expected = written
    file = pyogrio.raw.read(folder / "mask_rcnn.geojson", columns=["score"])
    geometries = shapely.from_wkb(file[2])
    order = np.argsort(-file[3][0], kind="stable")
    parts = set()
    for index, wanted in zip(order, expected["mask_rcnn"]):
        in_pixels = shapely.transform(geometries[index], pixels_of)
        burnt = rasterio.features.rasterize([in_pixels], (HEIGHT, WIDTH), transform=rasterio.Affine.identity())
        np.testing.assert_array_equal(burnt.astype(bool), wanted["mask"])
        parts.add(in_pixels.geom_type)
    assert "Polygon" in parts


def pixels_of(degrees):
    """Return scene pixels of longitude and latitude, by the spherical Mercator formula."""
    radius = 6378137.0
    x = radius * np.radians(degrees[:, 0])
    y = radius * np.log(np.tan(np.pi / 4 + np.radians(degrees[:, 1]) / 2))
    return np.stack([(x - 1_000_000) / 0.5, (6_000_000 - y) / 0.5], 1)


@pytest.mark.parametrize("name", WITH_POLYGONS)
def test_gdal_reads_object_positions(written, name):
    """Check the GeoJSON layer in longitude and latitude against the boxes of the COCO file in pixels."""
    folder, _, expected = written
    path = folder / f"{name}.geojson"
    info = pyogrio.read_info(path)
    assert info["crs"] == "EPSG:4326" and info["layer_name"] == "scene"
    assert info["fields"].tolist() == ["class", "score"] and info["features"] == len(expected[name])
    in_file = json.loads(path.read_text())
    assert in_file["coordinate_system"] == "longitude and latitude on WGS 84 (EPSG:4326)"
    annotations = json.loads((folder / f"{name}.json").read_text())["annotations"]
    for feature, annotation in zip(in_file["features"], annotations, strict=True):
        geometry = shapely.from_geojson(json.dumps(feature["geometry"]))
        assert geometry.is_valid
        for polygon in shapely.get_parts(geometry):  # RFC 7946, 3.1.6
            assert polygon.exterior.is_ccw and not any(ring.is_ccw for ring in polygon.interiors)
        assert feature["properties"]["score"] == annotation["score"]
        outlines = [np.reshape(points, (-1, 2)) for points in annotation["segmentation"]]
        in_pixels = shapely.transform(geometry, pixels_of)
        wanted = shapely.union_all([shapely.Polygon(points) for points in outlines])
        filled = shapely.union_all([shapely.Polygon(part.exterior) for part in shapely.get_parts(in_pixels)])
        assert shapely.symmetric_difference(filled, wanted).area < 2e-3 * wanted.length


def test_small_image_has_scale_of_windows(written, tmp_path):
    """Check that windows of 48 are resized to 96, so an image of 30 x 40 pixels is resized to 60 x 80."""
    model = written[1]["cascade_rcnn"]
    image = scene(30, 40)
    Image.fromarray(image.transpose(1, 2, 0)).save(tmp_path / "small.png")
    processor = ViTPDetectionImageProcessor(do_resize=True, size={"max_height": 96, "max_width": 96})
    detect_large(model, processor, tmp_path / "small.png", tmp_path / "small.geojson", window=48, threshold=0.1)
    found = json.loads((tmp_path / "small.geojson").read_text())
    assert found["coordinate_system"] == "pixels of the image, x to the right and y down from the top left corner"
    alone = objects_alone(model, processor, image, 0.1, size={"height": 60, "width": 80})
    rings = [feature["geometry"]["coordinates"][0] for feature in found["features"]]
    boxes = [[*np.min(ring, 0), *np.max(ring, 0)] for ring in rings]
    assert len(boxes) > 5
    np.testing.assert_allclose(sorted(boxes), sorted(alone["boxes"].tolist()), rtol=0, atol=2e-3)


def test_image_without_objects_gives_empty_file(written, tmp_path):
    folder, models, _ = written
    for suffix, key in (("geojson", "features"), ("json", "annotations")):
        output = tmp_path / f"none.{suffix}"
        model = models["oriented_rcnn"]
        detect_large(model, ViTPDetectionImageProcessor(), folder / "scene.tif", output, threshold=1.0, window=200)
        assert json.loads(output.read_text())[key] == []
    assert pyogrio.read_info(tmp_path / "none.geojson")["features"] == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["none.geojson", "none.json"]


def test_killed_run_resumes_to_same_file(written, tmp_path, monkeypatch):
    """Check two rows of three windows. The run is killed in the second row, of which a part is in the file."""
    folder, models, _ = written
    model, output = models["mask_rcnn"], tmp_path / "objects.geojson"

    def run(**options):
        options = {"threshold": 0.1, **WINDOWS, **options}
        detect_large(model, ViTPDetectionImageProcessor(), folder / "scene.tif", output, **options)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        killed_after(model, patch, 4)
        run()
    part = tmp_path / "objects.geojson.part"
    assert len(part.read_bytes().splitlines()) == 1 and not output.exists()
    with open(part, "ab") as file:
        file.write(b'[{"label": 1, "sco')
    with pytest.raises(ValueError, match="objects.geojson.part .*stride, threshold"):
        run(stride=50, threshold=0.2)
    with monkeypatch.context() as patch:
        killed_after(model, patch, 3)
        run()
    assert output.read_bytes() == (folder / "mask_rcnn.geojson").read_bytes()
    assert list(tmp_path.iterdir()) == [output]


def test_windows_without_data_are_skipped(written, tmp_path, monkeypatch):
    model, image = written[1]["cascade_rcnn"], scene()
    image[:, :, :100] = 0
    path = write_tiff(tmp_path / "scene.tif", image, nodata=0)
    with monkeypatch.context() as patch:
        # The model is called twice, because the first of three windows in each of the two rows has no data.
        killed_after(model, patch, 2)
        options = {**WINDOWS, "batch_size": 2}
        detect_large(model, ViTPDetectionImageProcessor(), path, tmp_path / "objects.json", **options)
    assert json.loads((tmp_path / "objects.json").read_text())["annotations"]


def test_bad_detection_arguments_are_refused(written, tmp_path):
    folder, models, _ = written
    source = folder / "scene.tif"
    local = write_tiff(tmp_path / "local.tif", scene(40, 40), crs='LOCAL_CS["site",UNIT["metre",1]]')
    many = write_tiff(tmp_path / "many.tif", np.concatenate([scene(40, 40)] * 2))
    (tmp_path / "there.json").touch()
    for image, output, options, message in (
        (source, "objects.tif", {}, "objects.tif"),
        (source, "there.json", {}, "there.json exists"),
        (source, "o.json", {"window": 64, "stride": 65}, "stride=65"),
        (source, "o.json", {"batch_size": 0}, "batch_size=0"),
        (source, "o.json", {"threshold": 1.5}, "`threshold` .*1.5"),
        (source, "o.json", {"nms_threshold": -1}, "`nms_threshold` .*-1"),
        (tmp_path, "o.json", {}, "directory"),
        (source, "none/o.json", {}, "none"),
        (many, "o.json", {}, "many.tif .* 6 band"),
        (local, "o.geojson", {}, "local.tif"),
    ):
        with pytest.raises((ValueError, OSError), match=message):
            detect_large(models["cascade_rcnn"], ViTPDetectionImageProcessor(), image, tmp_path / output, **options)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["local.tif", "many.tif", "there.json"]


def test_script_detects_with_saved_model(written, tmp_path):
    folder, models, _ = written
    models["oriented_rcnn"].save_pretrained(tmp_path / "model")
    ViTPDetectionImageProcessor().save_pretrained(tmp_path / "model")
    words = [str(tmp_path / "model"), str(folder / "scene.tif"), "--output", str(tmp_path / "objects.geojson")]
    for wrong in (["--flip"], ["--scales", "1", "2"]):
        with pytest.raises(ValueError, match=wrong[0]):
            script.main([*words, *wrong])
    for name, value in WINDOWS.items():
        words += [f"--{name}", str(value)]
    assert script.main([*words, "--threshold", "0.1"]) == 0
    assert (tmp_path / "objects.geojson").read_bytes() == (folder / "oriented_rcnn.geojson").read_bytes()


@pytest.mark.slow
def test_large_image_needs_little_memory(tmp_path):
    """Check the memory for an image of 0.19 GB, 0.77 GB as model input, with 300 fixed boxes per window as model."""
    size = 8000
    profile = {"driver": "GTiff", "count": 3, "height": size, "width": size, "dtype": "uint8", "tiled": True}
    random = np.random.default_rng(0)
    with rasterio.open(tmp_path / "scene.tif", "w", **profile, **GROUND) as file:
        for top in range(0, size, 1000):
            rows = random.integers(0, 256, (3, 1000, size), dtype=np.uint8)
            file.write(rows, window=rasterio.windows.Window(0, top, size, 1000))
    code = """
import time
from pathlib import Path
from types import SimpleNamespace
import torch
from modeling_vitp import ViTPDetectionImageProcessor, detect_large
from modeling_vitp.modeling_vitp_detection import ViTPDetectionOutput

class Model(torch.nn.Module):
    config = SimpleNamespace(num_labels=2, id2label={0: "ship", 1: "plane"}, nms_threshold=0.5)
    device, dtype = torch.device("cpu"), torch.float32

    def forward(self, pixel_values, pixel_mask):
        batch = len(pixel_values)
        boxes = torch.cat([torch.rand(batch, 300, 2), torch.rand(batch, 300, 2) / 50 + 0.01], -1)
        labels = torch.randint(0, 2, (batch, 300))
        return ViTPDetectionOutput(scores=torch.rand(batch, 300), labels=labels, pred_boxes=boxes)

torch.manual_seed(0)
start = time.time()
detect_large(Model(), ViTPDetectionImageProcessor(), "scene.tif", "objects.geojson")
# ru_maxrss is not used, because a new process inherits it from its parent.
peak = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
print(time.time() - start, int(peak.split()[1]) * 1024)
"""
    run = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-3000:]
    seconds, memory = map(float, run.stdout.splitlines()[-1].split())
    features = pyogrio.read_info(tmp_path / "objects.geojson")["features"]
    print(f"{seconds:.0f} s, {memory / 1e9:.2f} GB, {features} objects")
    assert memory < 9e8 and features > 20_000


pytestmark = pytest.mark.filterwarnings("ignore::rasterio.errors.NotGeoreferencedWarning")
BOX = {"label": 1, "score": 0.123456789, "box": [2.0, 3.0, 12.0, 7.5]}


def image(path, **profile):
    """Return an open image of 20 x 30 pixels."""
    profile = {"driver": "GTiff", "count": 1, "height": 20, "width": 30, "dtype": "uint8", **profile}
    with rasterio.open(path, "w", **profile) as file:
        file.write(np.zeros((1, 20, 30), np.uint8))
    return rasterio.open(path)


def geojson(tmp_path, found, **profile):
    with image(tmp_path / "scene.tif", **profile) as opened:
        write_geojson([[found], []], opened, ["ship", "plane"], tmp_path / "objects.geojson")
    return json.loads((tmp_path / "objects.geojson").read_text())


@pytest.mark.parametrize("share", [0.02, 0.5, 0.9])
def test_polygons_cover_the_mask(share):
    """Check masks with holes, with several parts, and with parts that touch at a corner."""
    mask = np.random.default_rng(0).random((13, 17)) < share
    polygons = polygons_of(mask)
    assert any(len(rings) > 1 for rings in polygons) == (share > 0.1)
    shape = shapely.MultiPolygon([(rings[0], rings[1:]) for rings in polygons])
    assert shape.is_valid and shape.area == mask.sum()
    ys, xs = np.mgrid[:13, :17]
    np.testing.assert_array_equal(shapely.contains_xy(shape, xs + 0.5, ys + 0.5), mask)
    assert polygons_of(np.zeros((4, 5), bool)) == []


def test_holes_are_kept_in_geojson_only(tmp_path):
    mask = np.ones((5, 5), bool)
    mask[2, 1:3] = False
    found = {**BOX, "polygons": moved({"polygons": polygons_of(mask)}, 4, 6)["polygons"]}
    (feature,) = geojson(tmp_path, found)["features"]
    shape = shapely.from_geojson(json.dumps(feature["geometry"]))
    assert shape.exterior.is_ccw and not shape.interiors[0].is_ccw and shape.area == 23
    with image(tmp_path / "scene.tif") as opened:
        write_coco([[found]], opened, ["ship", "plane"], tmp_path / "objects.json")
    (annotation,) = json.loads((tmp_path / "objects.json").read_text())["annotations"]
    assert shapely.Polygon(np.reshape(annotation["segmentation"], (-1, 2))).equals(shapely.box(4, 6, 9, 11))
    assert annotation["area"] == 25 and annotation["bbox"] == [2, 3, 10, 4.5]
    assert annotation["score"] == 0.123457 and annotation["category_id"] == 2


def test_image_without_crs_keeps_its_coordinates(tmp_path):
    found = geojson(tmp_path, BOX, transform=from_origin(500, 900, 2, 2))
    assert "no CRS" in found["coordinate_system"]
    ring = [[504, 894], [504, 885], [524, 885], [524, 894], [504, 894]]
    (feature,) = found["features"]
    assert feature["properties"] == {"class": "plane", "score": 0.123457}
    assert feature["geometry"] == {"type": "Polygon", "coordinates": [ring]}


@pytest.mark.parametrize("pixel", [5e-6, 3.0])
def test_small_pixels_keep_precision(tmp_path, pixel):
    """Check an image whose world file is in degrees."""
    found = geojson(tmp_path, BOX, transform=from_origin(12, 48, pixel, pixel))
    shape = shapely.from_geojson(json.dumps(found["features"][0]["geometry"]))
    expected = (12 + 2 * pixel, 48 - 7.5 * pixel, 12 + 12 * pixel, 48 - 3 * pixel)
    assert shape.bounds == pytest.approx(expected, rel=0, abs=1e-3 * pixel)


def test_ground_control_points_set_positions(tmp_path):
    """Check ground control points, the georeference of many radar images, with 0.1 degrees per pixel."""
    places = [(row, column) for row in (0, 20) for column in (0, 30)]
    points = [GroundControlPoint(row, column, 10 + column / 10, 50 - row / 10) for row, column in places]
    found = geojson(tmp_path, BOX, gcps=points, crs="EPSG:4326")
    assert found["coordinate_system"].startswith("longitude and latitude")
    shape = shapely.from_geojson(json.dumps(found["features"][0]["geometry"]))
    assert shape.bounds == pytest.approx((10.2, 49.25, 11.2, 49.7), abs=1e-6)


def test_object_over_antimeridian_is_split(tmp_path):
    """Check RFC 7946, 3.1.9, with an image in the zone of Fiji, where longitude 180 is near x = 817,700."""
    ground = {"crs": "EPSG:32760", "transform": from_origin(817_700 - 3000, 8_007_000, 200, 200)}
    (feature,) = geojson(tmp_path, {**BOX, "box": [0, 0, 30, 20]}, **ground)["features"]
    shape = shapely.from_geojson(json.dumps(feature["geometry"]))
    west, east = sorted(part.bounds for part in shape.geoms)
    assert west[0] == -180 and west[2] < -179.9 and east[0] > 179.9 and east[2] == 180
    assert all(part.exterior.is_ccw for part in shape.geoms)


@pytest.mark.parametrize(
    ("crs", "transform"),
    [("EPSG:4326", from_origin(179.9, 10, 0.01, 0.01)), ("EPSG:3413", from_origin(-1_510_000, 1_510_000, 1000, 1000))],
)
def test_object_that_gdal_does_not_split_is_split(tmp_path, crs, transform):
    (feature,) = geojson(tmp_path, {**BOX, "box": [0, 0, 30, 20]}, crs=crs, transform=transform)["features"]
    shape = shapely.from_geojson(json.dumps(feature["geometry"]))
    west, east = sorted(part.bounds for part in shape.geoms)
    assert west[0] == -180 and west[2] < -179 and east[0] > 179 and east[2] == 180
    assert all(part.exterior.is_ccw for part in shape.geoms)


EVALUATION = FIXTURES / "rotated_evaluation"


def test_submission_equals_mmrotate(tmp_path):
    expected = json.loads((EVALUATION / "expected.json").read_text())["merge"]
    patches = load_file(EVALUATION / "patches.safetensors")
    parts = {}
    for patch in expected["patches"]:
        image, _, place = patch.split("__", 2)
        found = [patches[f"{patch}.{label}"] for label in range(2)]
        labels = torch.cat([torch.full((len(boxes),), label) for label, boxes in enumerate(found)])
        found = torch.cat(found)
        detections = {"corners": corners(found[:, :5]), "scores": found[:, 5], "labels": labels}
        parts.setdefault(image, []).append((detections, tuple(int(start) for start in place.split("___"))))
    merged = {image: merge(*zip(*some), nms_threshold=0.1) for image, some in parts.items()}
    archive = write_task1(merged, expected["classes"], tmp_path / "Task1")
    with zipfile.ZipFile(archive) as packed:
        assert sorted(packed.namelist()) == sorted(expected["files"])
        for name, text in expected["files"].items():
            assert packed.read(name).decode() == text == (tmp_path / "Task1" / name).read_text()


def test_first_corner_equals_mmrotate():
    fixture = load_file(FIXTURES / "rotated_ops" / "expected.safetensors")
    ordered = first_at_top_left(corners(fixture["convert.boxes"].double()).numpy())
    expected = fixture["submission.corners"][:, :8].reshape(-1, 4, 2).double()
    torch.testing.assert_close(torch.from_numpy(ordered), expected, rtol=0, atol=1e-4)


def test_submission_without_detections(tmp_path):
    nothing = {"corners": torch.zeros(0, 4, 2), "scores": torch.zeros(0), "labels": torch.zeros(0).long()}
    write_task1({"P0001": nothing}, ["ship", "plane"], tmp_path / "Task1")
    texts = {path.name: path.read_text() for path in (tmp_path / "Task1").iterdir()}
    assert texts == {"Task1_ship.txt": "", "Task1_plane.txt": ""}
