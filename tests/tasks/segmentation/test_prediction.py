import json
import subprocess
import sys

import numpy as np
import pytest
import rasterio
import rasterio.shutil
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from interrupting import Killed, killed_after
from PIL import Image
from rasterio.control import GroundControlPoint
from rasterio.rpc import RPC
from rasterio.transform import from_origin
from tiny_models import HEAD, adapter_config
from torch.nn import functional as F

from modeling_vitp import (
    ViTPChangeDetectionConfig,
    ViTPForChangeDetection,
    ViTPForSemanticSegmentation,
    ViTPSegmentationConfig,
    ViTPSegmentationImageProcessor,
    predict_large,
)
from modeling_vitp.recipes import predict_large as script
from modeling_vitp.tasks.segmentation.prediction import augmented, default_stride, predict_bands, sliding_window

SHAPES = {
    "height": st.integers(1, 40),
    "width": st.integers(1, 40),
    "window": st.tuples(st.integers(1, 16), st.integers(1, 16)),
    "shares": st.tuples(st.floats(0.2, 1), st.floats(0.2, 1)),
    "batch_size": st.integers(1, 5),
}


def strides(window, shares):
    return tuple(max(int(length * share), 1) for length, share in zip(window, shares))


def noise(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def make_pointwise(channels=6, classes=4):
    """Return the logits of a model without context, a 1 x 1 convolution."""
    torch.manual_seed(0)
    layer = torch.nn.Conv2d(channels, classes, 1).double()
    return lambda *images: layer(torch.cat(images, dim=1).double()).detach()


def with_context(*images):
    """Return logits that depend on the whole window and on the position in the window."""
    (image,) = images
    places = torch.arange(image[0, 0].numel()).view(image.shape[-2:]) / 100
    return torch.cat([image * places, image.mean((2, 3), keepdim=True) - image**2], dim=1)


def loop(predict, image, window, stride):
    """Predict one window after another, as mmsegmentation does."""
    height, width = image.shape[-2:]
    rows = max(height - window[0] + stride[0] - 1, 0) // stride[0] + 1
    columns = max(width - window[1] + stride[1] - 1, 0) // stride[1] + 1
    total, counts = 0, torch.zeros(height, width)
    for row in range(rows):
        for column in range(columns):
            bottom, right = min(row * stride[0] + window[0], height), min(column * stride[1] + window[1], width)
            top, left = max(bottom - window[0], 0), max(right - window[1], 0)
            logits = predict(image[:, :, top:bottom, left:right])
            total = total + F.pad(logits, (left, width - right, top, height - bottom))
            counts[top:bottom, left:right] += 1
    return total / counts


@settings(deadline=None, max_examples=25)
@given(**SHAPES)
def test_logits_equal_a_loop_over_windows(height, width, window, shares, batch_size):
    images = noise(2, 3, height, width)
    stride = strides(window, shares)
    expected = loop(with_context, images, window, stride)
    actual = sliding_window(with_context, images, window, stride, batch_size)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


@settings(deadline=None, max_examples=25)
@given(**SHAPES, start=st.integers(0, 39))
def test_rows_are_equal_from_any_start(height, width, window, shares, batch_size, start):
    start = min(start, height - 1)
    image, stride = noise(1, 3, height, width), strides(window, shares)

    def bands(start):
        read = lambda top, bottom: (image[:, :, top:bottom],)  # noqa: E731
        return list(predict_bands(with_context, read, (height, width), window, stride, batch_size, start))

    row = start
    for top, logits in bands(start):
        assert top == row
        row += logits.shape[2]
    assert row == height
    whole = sliding_window(with_context, image, window, stride, batch_size)
    assert torch.equal(torch.cat([logits for _, logits in bands(start)], dim=2), whole[:, :, start:])


def test_pair_windows_are_predicted_together():
    before, after = noise(2, 2, 3, 21, 34)
    predict = make_pointwise()
    logits = sliding_window(predict, (before, after), window=8, stride=5)
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits, predict(before, after).float(), rtol=1e-5, atol=1e-5)


def test_bfloat16_logits_are_summed_in_float32():
    value = torch.tensor(3.015625)  # Exact in bfloat16, but two and three times the value are not.
    logits = sliding_window(lambda image: image.bfloat16(), torch.full((1, 1, 40, 40), value), window=20, stride=4)
    torch.testing.assert_close(logits, torch.full_like(logits, value), rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"window": 8, "stride": 9}, r"stride.*\(9, 9\)"),
        ({"window": 8, "stride": 4, "batch_size": 0}, "batch_size.*0"),
        ({"window": 8, "stride": 4, "predict": lambda image: image[..., ::2]}, r"predict.*\(8, 8\)"),
        ({"window": 8, "stride": 4, "images": torch.zeros(3, 20, 20)}, r"\(batch, channels, height, width\)"),
        ({"window": 8, "stride": 4, "images": [torch.zeros(1, 3, 9, 9), torch.zeros(1, 3, 9, 8)]}, "same"),
    ],
)
def test_bad_window_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        sliding_window(**{"predict": lambda image: image, "images": torch.zeros(1, 3, 20, 20), **arguments})


def test_augmentation_averages_probabilities():
    image = noise(2, 3, 20, 30)
    scales = (0.5, 1.0, 1.5)
    actual = augmented(with_context, scales, flip=True)(image)
    expected = 0
    for scale, size in zip(scales, ((10, 15), (20, 30), (30, 45))):
        scaled = F.interpolate(image, size, mode="bilinear", antialias=scale == 0.5)
        plain, mirrored = with_context(scaled), with_context(scaled.flip(-1)).flip(-1)
        for logits in (plain, mirrored):
            expected = expected + F.interpolate(logits, (20, 30), mode="bilinear").softmax(1) / 6
    torch.testing.assert_close(actual.exp(), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(actual.softmax(1), expected, rtol=1e-5, atol=1e-6)


def test_augmentation_flips_both_images_of_pair():
    before, after = noise(2, 1, 3, 16, 24)
    predict = make_pointwise()
    expected = predict(before, after).float().log_softmax(1)
    torch.testing.assert_close(augmented(predict, flip=True)(before, after), expected, rtol=1e-5, atol=1e-5)


def test_scales_must_be_positive():
    for scales in ((), (1.0, 0.0)):
        with pytest.raises(ValueError, match="scales"):
            augmented(with_context, scales)


HEIGHT, WIDTH = 133, 101
WINDOWS = {"window": 48, "stride": 32, "batch_size": 2}
GROUND = {"crs": "EPSG:32612", "transform": from_origin(541000.0, 4977000.0, 0.1, 0.1)}


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    labels = {"id2label": {0: "ground", 1: "tree", 2: "roof"}, "label2id": {"ground": 0, "tree": 1, "roof": 2}}
    config = ViTPSegmentationConfig(backbone_config=adapter_config(), **{**HEAD, "num_labels": 3}, **labels)
    return ViTPForSemanticSegmentation(config).eval()


@pytest.fixture(scope="module")
def change_model():
    torch.manual_seed(0)
    return ViTPForChangeDetection(ViTPChangeDetectionConfig(backbone_config=adapter_config(), **HEAD)).eval()


def scene(bands=3, dtype="uint8", seed=0, high=256):
    """Return smooth random images for which the model predicts more than one class."""
    random = np.random.default_rng(seed)
    rows, columns = np.mgrid[:HEIGHT, :WIDTH]
    waves = [np.sin(rows / random.uniform(5, 30)) + np.cos(columns / random.uniform(5, 30)) for _ in range(bands)]
    values = (np.stack(waves) + 2) / 4 * 0.8 + 0.2 * random.random((bands, HEIGHT, WIDTH))
    return (values * (high - 1)).astype(dtype)


def write_tiff(path, image, **profile):
    bands, height, width = image.shape
    profile = {"count": bands, "height": height, "width": width, "dtype": image.dtype, **GROUND, **profile}
    with rasterio.open(path, "w", driver="GTiff", **profile) as file:
        file.write(image)
    return path


def read(path):
    with rasterio.open(path) as file:
        return file.read()


@torch.no_grad()
def in_memory(model, processor, *images, **options):
    """Return the logits of whole images from the image processor and the sliding window."""
    options = {"input_data_format": "channels_first", "return_tensors": "pt", **options}
    pixel_values = [processor(torch.from_numpy(image), **options).pixel_values for image in images]
    return sliding_window(lambda *windows: model(*windows).logits, pixel_values, **WINDOWS)[0]


def classes_in_memory(model, processor, *images, **options):
    return in_memory(model, processor, *images, **options).argmax(0).numpy()


def classes_of_file(model, processor, paths, **options):
    """Return the classes that `predict_large` writes beside the image, or beside the first of a pair."""
    first_path = paths[0] if isinstance(paths, list) else paths
    output = first_path.parent / "classes.tif"
    predict_large(model, processor, paths, output, **WINDOWS, **options)
    return read(output)[0]


def test_geotiff_equals_prediction_in_memory(model, tmp_path):
    image, processor = scene(), ViTPSegmentationImageProcessor()
    write_tiff(tmp_path / "scene.tif", image)
    paths = {"output": tmp_path / "classes.tif", "probabilities": tmp_path / "probabilities.tif"}
    colors = [(0, 0, 0), (0, 255, 0), (255, 0, 0)]
    predict_large(model, processor, tmp_path / "scene.tif", **paths, **WINDOWS, colors=colors)

    logits = in_memory(model, processor, image)
    assert len(logits.argmax(0).unique()) > 1
    np.testing.assert_array_equal(read(paths["output"])[0], logits.argmax(0).numpy())
    probabilities = (logits.softmax(0) * 255).round().to(torch.uint8).numpy()
    np.testing.assert_array_equal(read(paths["probabilities"]), probabilities)
    for path in paths.values():
        with rasterio.open(path) as file:
            assert (file.crs, file.transform) == (rasterio.crs.CRS.from_string(GROUND["crs"]), GROUND["transform"])
    with rasterio.open(paths["output"]) as file:
        assert json.loads(file.tags()["classes"]) == ["ground", "tree", "roof"]
        assert [file.colormap(1)[index][:3] for index in range(3)] == colors
        assert file.nodata is None
    with rasterio.open(paths["probabilities"]) as file:
        assert file.descriptions == ("ground", "tree", "roof")
        assert file.scales == pytest.approx([1 / 255] * 3)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["classes.tif", "probabilities.tif", "scene.tif"]


def test_default_stride_is_three_quarters():
    windows = (1, 30, (40, 64))
    assert [default_stride(window) for window in windows] == [(1, 1), (22, 22), (30, 48)]


def test_pair_equals_prediction_in_memory(change_model, tmp_path):
    """Check a pair, in which pixels without data in the later image have no class."""
    before, after = scene(seed=0), scene(seed=1)
    after[:, :10] = 0
    paths = [write_tiff(tmp_path / "before.tif", before), write_tiff(tmp_path / "after.tif", after, nodata=0)]
    processor = ViTPSegmentationImageProcessor()
    expected = classes_in_memory(change_model, processor, before, after)
    expected[(after == 0).all(0)] = 255
    assert len(np.unique(expected)) > 2
    np.testing.assert_array_equal(classes_of_file(change_model, processor, paths), expected)


@pytest.mark.parametrize(
    ("bands", "spec"),
    [
        (5, {"bands": [4, 2, 0], "percentiles": [2, 98]}),
        (5, {"bands": [1], "window": [500, 9000]}),
        (4, {"bands": [3, 0, 1], "percentiles": [0, 100]}),
    ],
)
def test_bands_and_percentiles_are_equal_in_all_windows(model, tmp_path, bands, spec):
    """Check an image that is smaller than the sample of percentiles, so that the processor computes the same.

    GDAL marks the fourth of four 8-bit bands as alpha, but it is near infrared, which is 0 for water.
    """
    image = scene(bands, "uint16", high=10000) if bands == 5 else scene(bands)
    if bands == 4:
        image[3, 30:90, 20:80] = 0
    path = write_tiff(tmp_path / "scene.tif", image)
    with rasterio.open(path) as file:
        assert (file.colorinterp[3].name == "alpha") == (bands == 4)
    processor = ViTPSegmentationImageProcessor(input_spec=spec)
    expected = classes_in_memory(model, processor, image)
    np.testing.assert_array_equal(classes_of_file(model, processor, path), expected)


def test_nodata_pixels_have_no_class(model, tmp_path):
    image = scene(dtype="int16", high=10000)
    image[:, 40:, 70:] = -9999
    path = write_tiff(tmp_path / "scene.tif", image, nodata=-9999)
    processor = ViTPSegmentationImageProcessor(input_spec={"percentiles": [0, 100]})
    classes = classes_of_file(model, processor, path, probabilities=tmp_path / "p.tif")
    window = [[int(band[band != -9999].min()), int(band.max())] for band in image]
    expected = classes_in_memory(model, processor, image, input_spec={"window": window})
    expected[40:, 70:] = 255
    np.testing.assert_array_equal(classes, expected)
    with rasterio.open(tmp_path / "classes.tif") as file:
        assert file.nodata == 255
    assert {path.name for path in tmp_path.iterdir()} == {"scene.tif", "classes.tif", "p.tif"}
    with rasterio.open(tmp_path / "p.tif") as file:
        np.testing.assert_array_equal(file.dataset_mask() == 0, expected == 255)
        assert not file.read()[:, expected == 255].any()


@pytest.mark.parametrize("name", ["scene.jpg", "no_suffix"])
def test_image_with_orientation_is_refused(model, tmp_path, monkeypatch, name):
    """Check a JPEG and a TIFF that are too large for Pillow."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", HEIGHT * WIDTH // 4)
    image, path = Image.fromarray(scene().transpose(1, 2, 0)), tmp_path / name
    exif = Image.Exif()

    def save(orientation):
        exif[274] = orientation
        if name == "scene.jpg":
            image.save(path, "JPEG", exif=exif)
        else:
            image.save(path, "TIFF", tiffinfo={274: orientation})

    save(6)
    with pytest.raises(ValueError, match=f"{name} .*orientation 6"):
        classes_of_file(model, ViTPSegmentationImageProcessor(), path)
    assert list(tmp_path.iterdir()) == [path]
    save(1)
    classes_of_file(model, ViTPSegmentationImageProcessor(), path)
    assert Image.MAX_IMAGE_PIXELS == HEIGHT * WIDTH // 4


def test_raster_that_may_name_other_files_is_refused(model, tmp_path):
    write_tiff(tmp_path / "scene.tif", scene())
    with rasterio.open(tmp_path / "scene.tif") as file:
        rasterio.shutil.copy(file, tmp_path / "scene.img", driver="HFA")
    with pytest.raises(ValueError, match=r"scene\.img.*TIFF"):
        classes_of_file(model, ViTPSegmentationImageProcessor(), tmp_path / "scene.img")


@pytest.mark.parametrize("name", ["scene.png", "scene.tif"])
def test_transparent_pixels_have_no_class(model, tmp_path, name):
    """Check that other pixels have the class of a prediction in memory with transparent pixels in white."""
    image, alpha = scene(), np.full((1, HEIGHT, WIDTH), 255, dtype=np.uint8)
    image[:, :20], alpha[:, :20], alpha[:, 20:25] = 0, 0, 51
    pixels = np.concatenate([image, alpha])
    if name == "scene.png":
        Image.fromarray(pixels.transpose(1, 2, 0)).save(tmp_path / name)
    else:
        write_tiff(tmp_path / name, pixels, photometric="RGB", alpha="YES")
    processor = ViTPSegmentationImageProcessor()
    on_white = (image * (alpha / 255) + (255 - alpha)).round().astype(np.uint8)
    expected = classes_in_memory(model, processor, on_white)
    assert (expected != classes_in_memory(model, processor, image))[20:].any()
    expected[:20] = 255
    np.testing.assert_array_equal(classes_of_file(model, processor, tmp_path / name), expected)


def test_other_georeferences_are_kept(model, tmp_path):
    """Check ground control points, as of many radar images, and coefficients (RPCs), as of many satellite images."""
    points = [GroundControlPoint(row, column, 10.0 + column, 50.0 - row) for row, column in ((0, 0), (0, 99), (99, 0))]
    names = ("height", "lat", "long", "line", "samp")
    rpcs = {f"{name}_{kind}": 50.0 for name in names for kind in ("off", "scale")}
    rpcs |= {f"{name}_{kind}_coeff": [1.0] + [0.5] * 19 for name in names[3:] for kind in ("num", "den")}
    profiles = {"points": {"gcps": points}, "rpcs": {"crs": None, "rpcs": RPC(**rpcs)}}
    for kind, profile in profiles.items():
        (tmp_path / kind).mkdir()
        path = write_tiff(tmp_path / kind / "scene.tif", scene(), transform=None, **profile)
        classes_of_file(model, ViTPSegmentationImageProcessor(), path)
    with rasterio.open(tmp_path / "points" / "classes.tif") as file:
        written_points, crs = file.gcps
    expected = [(point.row, point.col, point.x, point.y) for point in points]
    assert [(point.row, point.col, point.x, point.y) for point in written_points] == expected
    assert crs == rasterio.crs.CRS.from_string(GROUND["crs"])
    with rasterio.open(tmp_path / "rpcs" / "classes.tif") as file:
        assert {name: getattr(file.rpcs, name) for name in rpcs} == rpcs


def test_windows_are_augmented(model, tmp_path):
    image, processor = scene()[:, :60, :70], ViTPSegmentationImageProcessor()
    path = write_tiff(tmp_path / "scene.tif", image)
    options = {"scales": (1.0, 0.5), "flip": True}
    predict = augmented(lambda pixels: model(pixels).logits, **options)
    pixels = processor(torch.from_numpy(image), input_data_format="channels_first", return_tensors="pt").pixel_values
    with torch.no_grad():
        expected = sliding_window(predict, pixels, **WINDOWS)[0].argmax(0).numpy()
    np.testing.assert_array_equal(classes_of_file(model, processor, path, **options), expected)


@pytest.mark.parametrize("calls, finished, needed", [(1, 0, 8), (4, 64, 6), (7, 85, 4)])
def test_killed_run_resumes_to_same_file(model, tmp_path, monkeypatch, calls, finished, needed):
    """Check a run that is killed while it predicts, and one with an incomplete row, killed while it writes.

    Rows of windows begin at 0, 32, 64 and 85, and each is two batches. Those that reach below the last whole row are
    predicted again, no others.
    """
    source = write_tiff(tmp_path / "scene.tif", scene())

    def run(name):
        paths = {"output": tmp_path / f"{name}.tif", "probabilities": tmp_path / f"{name}_p.tif"}
        predict_large(model, ViTPSegmentationImageProcessor(), source, **paths, **WINDOWS)
        return [path.read_bytes() for path in paths.values()]

    whole = run("whole")
    with monkeypatch.context() as patch, pytest.raises(Killed):
        killed_after(model, patch, calls)
        run("killed")
    part = tmp_path / "killed.tif.part"
    size = 4 * WIDTH * finished
    assert part.stat().st_size == size
    with open(part, "r+b") as file:
        file.truncate(max(size - 7, 0))
    assert not (tmp_path / "killed.tif").exists()

    with monkeypatch.context() as patch:
        killed_after(model, patch, needed)
        assert run("killed") == whole


def test_unfinished_run_with_other_arguments_is_refused(model, tmp_path, monkeypatch):
    source = write_tiff(tmp_path / "scene.tif", scene())
    with monkeypatch.context() as patch, pytest.raises(Killed):
        killed_after(model, patch, 3)
        classes_of_file(model, ViTPSegmentationImageProcessor(), source)
    with pytest.raises(ValueError, match="classes.tif.part .*image processor, scales"):
        classes_of_file(model, ViTPSegmentationImageProcessor(image_mean=[0, 0, 0]), source, scales=(0.5,))
    with pytest.raises(ValueError, match="different model"):
        classes_of_file(ViTPForSemanticSegmentation(model.config), ViTPSegmentationImageProcessor(), source)


def test_bad_images_are_refused(model, change_model, tmp_path):
    source = write_tiff(tmp_path / "scene.tif", scene())
    many = write_tiff(tmp_path / "many.tif", scene(bands=5))
    small = write_tiff(tmp_path / "small.tif", scene()[:, 1:])
    moved = write_tiff(tmp_path / "moved.tif", scene(), transform=from_origin(0, 0, 0.1, 0.1))
    empty = write_tiff(tmp_path / "empty.tif", np.zeros((3, 60, 60), "uint16"), nodata=0)
    white = write_tiff(tmp_path / "white.tif", scene(1), photometric="MINISWHITE")
    palette, whole, cut = (tmp_path / f"{name}.png" for name in ("palette", "whole", "cut"))
    Image.fromarray(scene()[0]).convert("P").save(palette)
    Image.fromarray(scene().transpose(1, 2, 0)).save(whole)
    cut.write_bytes(whole.read_bytes()[:-500])
    for paths, chosen_model, spec, message in (
        ([source, source], model, None, "ViTPForSemanticSegmentation.* 2"),
        (source, change_model, None, "ViTPForChangeDetection.* 1"),
        (many, model, None, "many.tif .*5 bands"),
        (source, model, {"bands": [7]}, r"scene.tif .*\[7\]"),
        (empty, model, {"percentiles": [2, 98]}, "empty.tif"),
        (palette, model, None, "palette.png"),
        (white, model, None, "white.tif"),
        (cut, model, None, "cut.png"),
        ([source, small], change_model, None, "small.tif .*shape"),
        ([source, moved], change_model, None, "moved.tif .*transform"),
    ):
        with pytest.raises(ValueError, match=message):
            classes_of_file(chosen_model, ViTPSegmentationImageProcessor(input_spec=spec), paths)
    assert not list(tmp_path.glob("*.part*"))


def test_bad_outputs_are_refused(model, tmp_path):
    source = write_tiff(tmp_path / "scene.tif", scene())
    output = tmp_path / "classes.tif"
    for paths, message in (
        ([tmp_path / "classes"], ".tif.*classes"),
        ([output, tmp_path / "p.png"], ".tif.*p.png"),
        ([output, output], "classes.tif"),
    ):
        with pytest.raises(ValueError, match=message):
            probabilities = paths[1] if len(paths) > 1 else None
            predict_large(model, ViTPSegmentationImageProcessor(), source, paths[0], probabilities=probabilities)
    output.touch()
    with pytest.raises(FileExistsError, match="classes.tif"):
        classes_of_file(model, ViTPSegmentationImageProcessor(), source)


def script_words(folder, *paths):
    sizes = [word for name, value in WINDOWS.items() for word in (f"--{name}", str(value))]
    return [str(folder / "model"), *map(str, paths), "--output", str(folder / "classes.tif"), *sizes]


def test_command_line_selects_bands(model, tmp_path):
    model.save_pretrained(tmp_path / "model")
    ViTPSegmentationImageProcessor().save_pretrained(tmp_path / "model")
    image, spec = scene(5, "uint16", high=3000)[:, :60, :70], {"bands": [3, 2, 1], "window": [0, 3000]}
    words = script_words(tmp_path, write_tiff(tmp_path / "scene.tif", image))
    with pytest.raises(ValueError, match="has 5.*input_spec"):
        script.main(words)
    with pytest.raises(ValueError, match="input_spec.*'{bands'"):
        script.main([*words, "--input_spec", "{bands"])
    assert script.main([*words, "--input_spec", json.dumps(spec)]) == 0
    expected = classes_in_memory(model, ViTPSegmentationImageProcessor(input_spec=spec), image)
    np.testing.assert_array_equal(read(tmp_path / "classes.tif")[0], expected)


def test_script_predicts_pair_with_saved_model(change_model, tmp_path):
    images = [scene(), scene(seed=1)]
    processor = ViTPSegmentationImageProcessor(input_spec={"window": [0, 200]})
    change_model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    paths = [write_tiff(tmp_path / f"{place}.tif", image) for place, image in enumerate(images)]
    classes = [{"name": name, "color": [10 * place, 0, 99]} for place, name in enumerate(("ground", "tree", "roof"))]
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({"data": {"classes": classes}}))
    script.main([*script_words(tmp_path, *paths), "--classes", str(tmp_path / "config.yaml")])
    expected = classes_in_memory(change_model, processor, *images)
    with rasterio.open(tmp_path / "classes.tif") as file:
        np.testing.assert_array_equal(file.read(1), expected)
        assert [file.colormap(1)[index][:3] for index in range(3)] == [(0, 0, 99), (10, 0, 99), (20, 0, 99)]


@pytest.mark.slow
def test_memory_is_independent_of_image_height(tmp_path):
    """Check the memory for a 16-bit image of 144 MB, 288 MB as model input, with a convolution as model."""
    width, heights = 4000, (2000, 6000)
    random = np.random.default_rng(0)
    for height in heights:
        profile = {"driver": "GTiff", "count": 3, "height": height, "width": width, "dtype": "uint16", "tiled": True}
        with rasterio.open(tmp_path / f"{height}.tif", "w", **profile, **GROUND) as file:
            for top in range(0, height, 1000):
                rows = random.integers(0, 4000, (3, 1000, width), dtype=np.uint16)
                file.write(rows, window=rasterio.windows.Window(0, top, width, 1000))
    code = """
import re, sys
from pathlib import Path
from types import SimpleNamespace
import torch
from modeling_vitp import ViTPSegmentationImageProcessor, predict_large
from modeling_vitp.images import large

large.CACHE = 32  # MiB of GDAL, less than either image

def memory(kind):
    # ru_maxrss is not used, because a new process inherits it from its parent.
    return int(re.search(kind + r":\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) * 1024

class Model(torch.nn.Conv2d):
    config = SimpleNamespace(num_labels=2, id2label={0: "ground", 1: "tree"})
    images_per_sample, device, dtype = 1, torch.device("cpu"), torch.float32

    def forward(self, pixel_values):
        used.append(memory("VmRSS"))
        return SimpleNamespace(logits=super().forward(pixel_values))

processor = ViTPSegmentationImageProcessor(input_spec={"percentiles": [2, 98]})
torch.manual_seed(0)
model = Model(3, 2, 1)
peaks = []
for height in sys.argv[1:]:
    used = []
    predict_large(model, processor, f"{height}.tif", f"classes_{height}.tif", window=512, stride=480)
    peaks += [max(used), memory("VmHWM")]
print(*peaks)
"""
    command = [sys.executable, "-c", code, *map(str, heights)]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-3000:]
    low, high = np.array(run.stdout.splitlines()[-1].split(), dtype=int).reshape(2, 2)
    print("MB while predicting, and at most:", low / 1e6, high / 1e6)
    assert (high - low).max() < 50e6
    with rasterio.open(tmp_path / f"classes_{heights[1]}.tif") as file:
        assert file.shape == (heights[1], width)
        for top in (0, heights[1] - 512):
            assert set(np.unique(file.read(1, window=rasterio.windows.Window(0, top, 512, 512)))) == {0, 1}
