"""Embeddings compared with plain transformers and rasterio, and their files read by other libraries."""

import json
import logging

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
import rasterio
import shapely
import torch
from interrupting import Killed, killed_after
from other_backbones import save_backbone
from pictures import picture, write_bands
from PIL import Image
from rasterio.control import GroundControlPoint
from rasterio.transform import Affine, from_origin
from rasterio.warp import transform, transform_geom
from transformers import AutoImageProcessor, AutoModel

from modeling_vitp.probing.backbones import load_backbone
from modeling_vitp.probing.embedding import embed_images
from modeling_vitp.recipes.embed import main

UTM = {"crs": "EPSG:32612", "transform": from_origin(541000, 4977000, 0.5, 0.5)}
COLUMNS = ["path", "col_off", "row_off", "width", "height", "embedding"]
GEO_COLUMNS = [*COLUMNS[:-1], "xmin", "ymin", "xmax", "ymax", "crs", "geometry", "embedding"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Write a backbone and images without and with a georeference."""
    folder = tmp_path_factory.mktemp("embedding")
    save_backbone(folder / "vit", "vit")
    for number in range(7):
        path = folder / "photos" / "ab"[number % 2] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        picture(50 + 9 * number, 60, number).save(path)
    write_bands(folder / "scene.tif", colors(150, 100), **UTM)
    return folder


def colors(width: int, height: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (3, height, width), dtype=np.uint8)


def embed(folder, output, *words: str, model="vit", images=("photos",)) -> pd.DataFrame:
    """Run the command and return its table."""
    inputs = [str(folder / image) for image in images]
    assert main([str(folder / model), *inputs, "--output", str(output), "--device", "cpu", *words]) == 0
    assert [path.name for path in output.parent.glob(f"{output.name}*")] == [output.name]
    return pd.read_parquet(output)


def of_transformers(model: str, images: list, pooling: str, prefix: int) -> np.ndarray:
    """Return the features of images one by one, by plain transformers."""
    processor, model, features = AutoImageProcessor.from_pretrained(model), AutoModel.from_pretrained(model).eval(), []
    for image in images:
        with torch.no_grad():
            states = model(processor(image, return_tensors="pt")["pixel_values"]).last_hidden_state[0]
        parts = {"cls": states[0], "mean": states[prefix:].mean(0)}
        features.append(torch.cat([parts[name] for name in pooling.split("_")]).numpy())
    return np.stack(features)


@pytest.mark.parametrize(
    ("kind", "prefix", "pooling"), [("vit", 1, "cls_mean"), ("vitp", 1, "cls"), ("dinov2", 4, "mean")]
)
def test_rows_equal_features_of_transformers(folder, tmp_path, kind, prefix, pooling):
    dtype, tolerance = ("float16", 1e-3) if kind == "vit" else ("float32", 1e-5)
    save_backbone(tmp_path / kind, kind)
    words = ["--pooling", pooling, "--dtype", dtype, "--batch_size", "3"]
    table = embed(folder, tmp_path / "e.parquet", *words, model=tmp_path / kind)
    files = [folder / "photos" / f"{name}.png" for name in ("a/0", "a/2", "a/4", "a/6", "b/1", "b/3", "b/5")]
    assert list(table.columns) == COLUMNS and list(table["path"]) == [str(path) for path in files]
    images = [Image.open(path) for path in files]
    assert table[["col_off", "row_off", "width", "height"]].to_numpy().tolist() == [[0, 0, *one.size] for one in images]
    embeddings = np.stack(table["embedding"])
    assert embeddings.dtype == dtype
    expected = of_transformers(tmp_path / kind, images, pooling, prefix)
    np.testing.assert_allclose(embeddings, expected, rtol=tolerance, atol=1e-5)


def test_windows_have_features_and_bounds_of_crops(folder, tmp_path):
    """Cut a scene in 64-pixel windows with stride 48, and read a small image and files with workers."""
    small = write_bands(tmp_path / "small.tif", colors(40, 30, 1), **UTM)
    words = ["--window", "64", "--stride", "48", "--batch_size", "4", "--num_workers", "2"]
    table = embed(folder, tmp_path / "e.parquet", *words, images=["scene.tif", small])
    assert list(table.columns) == GEO_COLUMNS and set(table["crs"]) == {"EPSG:32612"}
    areas = [(left, top, 64, 64) for top in (0, 36) for left in (0, 48, 86)] + [(0, 0, 40, 30)]
    assert [tuple(row) for row in table[["col_off", "row_off", "width", "height"]].to_numpy()] == areas
    crops = []
    for row in table.itertuples():
        with rasterio.open(row.path) as image:
            window = rasterio.windows.Window(row.col_off, row.row_off, row.width, row.height)
            crops.append(Image.fromarray(image.read(window=window).transpose(1, 2, 0)))
            bounds = image.window_bounds(window)
        assert (row.xmin, row.ymin, row.xmax, row.ymax) == bounds
        polygon = shapely.from_wkb(row.geometry)
        assert polygon.equals(shapely.box(*bounds)) and polygon.exterior.is_ccw
    expected = of_transformers(folder / "vit", crops, "mean", 1)
    np.testing.assert_allclose(np.stack(table["embedding"]), expected, rtol=1e-5, atol=1e-5)


def test_file_follows_the_geoparquet_specification(folder, tmp_path):
    table = embed(folder, tmp_path / "e.parquet", images=["scene.tif"])
    schema = pq.read_schema(tmp_path / "e.parquet")
    geo = json.loads(schema.metadata[b"geo"])
    assert geo["version"] == "1.0.0" and geo["primary_column"] == "geometry" and [*geo["columns"]] == ["geometry"]
    column = geo["columns"]["geometry"]
    assert column["encoding"] == "WKB" and column["geometry_types"] == ["Polygon"]
    assert column["crs"]["type"] == "ProjectedCRS" and column["crs"]["id"] == {"authority": "EPSG", "code": 32612}
    assert shapely.from_wkb(table["geometry"][0]).bounds == (541000, 4976950, 541075, 4977000)
    settings = json.loads(schema.metadata[b"vitp"])
    assert settings["model"] == str(folder / "vit") and settings["pooling"] == "mean" and settings["window"] is None
    assert schema.field("embedding").type.list_size == 32


def test_geopandas_reads_crs_and_polygons(folder, tmp_path):
    geopandas = pytest.importorskip("geopandas")
    embed(folder, tmp_path / "e.parquet", "--window", "64", images=["scene.tif"])
    table = geopandas.read_parquet(tmp_path / "e.parquet")
    assert table.crs == "EPSG:32612" and table.geometry.geom_type.unique().tolist() == ["Polygon"]
    np.testing.assert_array_equal(table.bounds.to_numpy(), table[["xmin", "ymin", "xmax", "ymax"]].to_numpy())
    assert table.total_bounds.tolist() == [541000, 4976950, 541075, 4977000]


def test_geometries_of_several_crs_are_longitude_and_latitude(folder, tmp_path):
    """Embed two zones, a transform without CRS, and a picture without georeference."""
    other = write_bands(tmp_path / "other.tif", colors(60, 60), **UTM | {"crs": "EPSG:32613"})
    unknown = write_bands(tmp_path / "unknown.tif", colors(60, 60), transform=UTM["transform"])
    images = ["scene.tif", other, unknown, "photos/a/0.png"]
    table = embed(folder, tmp_path / "e.parquet", images=images)
    geo = json.loads(pq.read_schema(tmp_path / "e.parquet").metadata[b"geo"])
    assert geo["columns"]["geometry"]["crs"]["id"] == {"authority": "OGC", "code": "CRS84"}
    assert list(table["crs"].fillna("")) == ["EPSG:32612", "EPSG:32613", "", ""]
    assert table["geometry"].isna().tolist() == [False, False, True, True]
    for row in table[:2].itertuples():
        box = shapely.box(row.xmin, row.ymin, row.xmax, row.ymax)
        expected = shapely.geometry.shape(transform_geom(row.crs, "OGC:CRS84", shapely.geometry.mapping(box)))
        polygon = shapely.from_wkb(row.geometry)
        assert polygon.normalize().equals_exact(expected.normalize(), 1e-9) and -112 < polygon.centroid.x < -104
    assert table["ymax"][2] == 4977000 and np.isnan(table["ymax"][3])


def test_crs_of_files_with_and_without_crs_is_kept(folder, tmp_path):
    unknown = write_bands(tmp_path / "unknown.tif", colors(60, 60), transform=UTM["transform"])
    for images, crs in ((["scene.tif", unknown], 32612), ([unknown], None)):
        output = tmp_path / f"{crs}.parquet"
        table = embed(folder, output, images=images)
        stored = json.loads(pq.read_schema(output).metadata[b"geo"])["columns"]["geometry"]["crs"]
        assert (stored and stored["id"]["code"]) == crs
        assert table["geometry"].isna().tolist() == ([False, True] if crs else [False])


@pytest.mark.parametrize("with_points", [False, True])
def test_rotated_images_have_rotated_polygons(folder, tmp_path, with_points):
    """Check an affine transform, and ground control points of the same transform."""
    ground = Affine.translation(541000, 4977000) @ Affine.rotation(30) @ Affine.scale(2, -2)
    path = write_bands(tmp_path / "r.tif", colors(100, 80), **{} if with_points else UTM | {"transform": ground})
    if with_points:
        pixels = [(row, column) for row in (0, 40, 80) for column in (0, 50, 100)]
        points = [GroundControlPoint(row, column, *(ground @ (column, row))) for row, column in pixels]
        with rasterio.open(path, "r+") as file:
            file.gcps = points, rasterio.CRS.from_epsg(32612)
    table = embed(folder, tmp_path / "e.parquet", "--window", "80", images=[path])
    for left, row in zip((0, 20), table.itertuples()):
        expected = [ground @ corner for corner in ((left, 80), (left + 80, 80), (left + 80, 0), (left, 0), (left, 80))]
        polygon = shapely.from_wkb(row.geometry)
        np.testing.assert_allclose(shapely.get_coordinates(polygon), expected, rtol=0, atol=1e-6)
        assert polygon.bounds == (row.xmin, row.ymin, row.xmax, row.ymax)


@pytest.mark.parametrize("window", [{"window": [0, 4080]}, {"percentiles": [0, 100]}])
def test_bands_of_16_bits_are_read_by_the_input_spec(folder, tmp_path, window):
    """The percentiles of a window are those of the whole image."""
    values = np.random.default_rng(0).integers(0, 256, (4, 64, 128), dtype=np.uint16)
    values[:, 0, 0], values[:, 0, 127] = 0, 255
    path = write_bands(tmp_path / "bands.tif", values * 16)
    words = ["--window", "64", "--input_spec", json.dumps({"bands": [3, 0, 1], **window})]
    table = embed(folder, tmp_path / "e.parquet", *words, images=[path])
    assert list(table.columns) == COLUMNS
    picture = Image.fromarray(values[[3, 0, 1]].astype(np.uint8).transpose(1, 2, 0))
    crops = [picture.crop((left, 0, left + 64, 64)) for left in (0, 64)]
    expected = of_transformers(folder / "vit", crops, "mean", 1)
    np.testing.assert_allclose(np.stack(table["embedding"]), expected, rtol=1e-5, atol=1e-5)


def test_windows_without_data_have_no_row(folder, tmp_path):
    pixels = colors(192, 64).clip(1)
    pixels[:, :, 64:128] = 0
    path = write_bands(tmp_path / "gap.tif", pixels, nodata=0, **UTM)
    table = embed(folder, tmp_path / "e.parquet", "--window", "64", "--batch_size", "1", images=[path])
    assert list(table["col_off"]) == [0, 128]
    np.testing.assert_array_equal(table["xmin"], [541000, 541064])


GRIDS = {
    "EPSG:32760": from_origin(817_700 - 3000, 8_007_000, 100, 100),  # Fiji: longitude 180 is near x = 817,700.
    "EPSG:4326": from_origin(179.93, 10, 0.001, 0.001),
    "EPSG:3413": from_origin(-1_600_000, 1_700_000, 2000, 2000),
    "EPSG:3995": from_origin(-70_000, 80_000, 1000, 1000),  # Around the north pole.
    "EPSG:3031": from_origin(-150_000, -1_500_000, 2000, 2000),
}


@pytest.mark.parametrize("crs", GRIDS)
def test_windows_across_antimeridian_are_split(folder, tmp_path, crs):
    """Check windows beside an image elsewhere: on an equal-area map around it, a window is the same polygon."""
    scene = write_bands(tmp_path / "scene.tif", colors(150, 150), crs=crs, transform=GRIDS[crs])
    table = embed(folder, tmp_path / "e.parquet", "--window", "50", images=[scene, folder / "scene.tif"])
    table = table[table["crs"] == crs]
    polygons = shapely.from_wkb(table["geometry"])
    num_checked = 0
    for row, polygon in zip(table.itertuples(), polygons):
        west, south, east, north = polygon.bounds
        assert -180 <= west < east <= 180 and polygon.is_valid
        center = [(row.xmin + row.xmax) / 2], [(row.ymin + row.ymax) / 2]
        (longitude,), (latitude,) = transform(crs, "OGC:CRS84", *center)
        map_crs = f"+proj=laea +lon_0={longitude} +lat_0={latitude} +datum=WGS84"
        window = on_map(shapely.box(row.xmin, row.ymin, row.xmax, row.ymax), crs, map_crs)
        parts = shapely.union_all([on_map(part, "OGC:CRS84", map_crs) for part in shapely.get_parts(polygon)])
        if len(shapely.get_coordinates(polygon)) > 5:  # Other windows have four corners, as on any longitude.
            num_checked += 1
            assert window.symmetric_difference(parts).area < 0.01 * window.area
    num_parts = shapely.get_num_geometries(polygons)
    assert len(table) == 9 and max(num_parts) == 2 and num_checked >= 2


def on_map(polygon: shapely.Polygon, crs: str, map_crs: str) -> shapely.Polygon:
    west, south, east, north = polygon.bounds
    dense = polygon.segmentize(max(east - west, north - south) / 100)
    points = transform(crs, map_crs, *shapely.get_coordinates(dense).T)
    return shapely.Polygon(np.transpose(points)).buffer(0)


OPTIONS = {"window": 40, "stride": 30, "batch_size": 4, "dtype": "float16"}


@pytest.mark.parametrize("batches", [1, 13])
def test_killed_run_resumes_to_same_file(folder, tmp_path, monkeypatch, batches):
    """Check 53 windows in 14 batches, killed between batches, and in the write of a batch."""
    backbone, images = load_backbone(str(folder / "vit")), [folder / "photos", folder / "scene.tif"]

    def run(name):
        number = embed_images(backbone, images, tmp_path / name, **OPTIONS)
        return number, (tmp_path / name).read_bytes()

    whole = run("whole.parquet")
    assert whole[0] == 53
    with monkeypatch.context() as patch, pytest.raises(Killed):
        killed_after(backbone, patch, 1 + batches, "pool")  # one call finds the width
        run("killed.parquet")
    part, size = tmp_path / "killed.parquet.part", 4 * batches * 32 * 2
    assert part.stat().st_size == size and not (tmp_path / "killed.parquet").exists()
    with open(part, "r+b") as file:
        file.truncate(max(size - 70, 0))  # One row and a part of another one are lost.
    with monkeypatch.context() as patch:
        killed_after(backbone, patch, 15 - max(batches - 1, 0), "pool")
        assert run("killed.parquet") == whole
    assert not part.exists()


def test_unfinished_run_with_other_arguments_is_refused(folder, tmp_path, monkeypatch):
    backbone, images = load_backbone(str(folder / "vit")), [folder / "photos"]
    with monkeypatch.context() as patch, pytest.raises(Killed):
        killed_after(backbone, patch, 2, "pool")  # one call finds the width
        embed_images(backbone, images, tmp_path / "e.parquet", **OPTIONS)
    with pytest.raises(ValueError, match="window, images"):
        embed_images(backbone, [*images, folder / "scene.tif"], tmp_path / "e.parquet", **OPTIONS | {"window": 50})
    backbone.model.layernorm.weight.data += 1
    with pytest.raises(ValueError, match="different model"):
        embed_images(backbone, images, tmp_path / "e.parquet", **OPTIONS)


@pytest.mark.parametrize("kept", [3, 900])
def test_corrupt_image_is_named_or_skipped(folder, tmp_path, caplog, kept):
    """Check a file without a header, and one whose pixels are truncated: the run that stops there is resumed."""
    images = [tmp_path / f"{number}.png" for number in range(5)]
    for number, path in enumerate(images):
        picture(64, 64, number).save(path)
    images[2].write_bytes(images[2].read_bytes()[:kept])
    output, words = tmp_path / "e.parquet", ["--batch_size", "2"]
    for workers in ("0", "1"):
        with pytest.raises(ValueError, match="^[^\n]*2.png cannot be read.*bad_images"):
            embed(folder, output, *words, "--num_workers", workers, images=images)
    assert (tmp_path / "e.parquet.part").exists() == (kept == 900)
    with caplog.at_level(logging.WARNING):
        table = embed(folder, output, *words, "--bad_images", "skip", images=images)
    assert "2.png" in caplog.text and list(table["path"]) == [str(path) for path in images if path != images[2]]
    expected = of_transformers(folder / "vit", [Image.open(path) for path in table["path"]], "mean", 1)
    np.testing.assert_allclose(np.stack(table["embedding"]), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--output", "e.csv"], "e.csv"),
        (["--window", "8", "--stride", "9"], "stride=9 and window=8"),
        (["--image_size", "50"], "image_size must be a multiple of 16 x 16"),
    ],
)
def test_bad_arguments_are_refused(folder, tmp_path, monkeypatch, words, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=message):
        main([str(folder / "vit"), str(folder / "photos"), "--output", "e.parquet", "--device", "cpu", *words])


def test_missing_inputs_are_named(folder, tmp_path):
    backbone, output = load_backbone(str(folder / "vit")), tmp_path / "e.parquet"
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="No image files found in .*empty"):
        embed_images(backbone, [tmp_path / "empty"], output)
    (tmp_path / "a.png").write_bytes(b"no")
    with pytest.raises(ValueError, match="None of the images"):
        embed_images(backbone, [tmp_path / "a.png"], output, bad_images="skip")
    output.touch()
    with pytest.raises(FileExistsError, match="e.parquet"):
        embed_images(backbone, [folder / "photos"], output)
    pooled = load_backbone(str(save_backbone(tmp_path / "swin", "swin")))
    with pytest.raises(ValueError, match="CLS token"):
        embed_images(pooled, [folder / "photos"], tmp_path / "o.parquet", pooling="cls")


def test_embedding_beyond_float16_is_refused(folder, tmp_path, monkeypatch):
    backbone = load_backbone(str(folder / "vit"))
    backbone.model.layernorm.weight.data *= 1e6
    with pytest.raises(ValueError, match="not finite in float16.*0.png"):
        embed_images(backbone, [folder / "photos"], tmp_path / "e.parquet", dtype="float16")
