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
from modeling_vitp.tasks.segmentation import prediction as large_images
from modeling_vitp.tasks.segmentation.prediction import augmented, predict_bands, sliding_window

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


def make_pointwise(channels=3, classes=4):
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


@settings(deadline=None, max_examples=60)
@given(**SHAPES)
def test_model_without_context_equals_full_image(height, width, window, shares, batch_size):
    images = noise(2, 3, height, width)
    predict = make_pointwise()
    logits = sliding_window(predict, images, window, strides(window, shares), batch_size)
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits, predict(images).float(), rtol=1e-5, atol=1e-5)


@settings(deadline=None, max_examples=60)
@given(**SHAPES)
def test_logits_equal_a_loop_over_windows(height, width, window, shares, batch_size):
    images = noise(2, 3, height, width)
    stride = strides(window, shares)
    expected = loop(with_context, images, window, stride)
    actual = sliding_window(with_context, images, window, stride, batch_size)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


@settings(deadline=None, max_examples=60)
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
    predict = make_pointwise(channels=6)
    logits = sliding_window(predict, (before, after), window=8, stride=5)
    torch.testing.assert_close(logits, predict(before, after).float(), rtol=1e-5, atol=1e-5)


def test_bfloat16_logits_are_summed_in_float32():
    value = torch.tensor(3.015625)  # Exact in bfloat16, but two and three times the value are not.
    logits = sliding_window(lambda image: image.bfloat16(), torch.full((1, 1, 40, 40), value), window=20, stride=4)
    torch.testing.assert_close(logits, torch.full_like(logits, value), rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"window": 8, "stride": 9}, r"stride.*\(9, 9\)"),
        ({"window": 8, "stride": (4, 0)}, r"stride.*\(4, 0\)"),
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
    predict = make_pointwise(channels=6)
    expected = predict(before, after).float().log_softmax(1)
    torch.testing.assert_close(augmented(predict, flip=True)(before, after), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("scales", [(), (1.0, 0.0)])
def test_scales_must_be_positive(scales):
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


def test_png_has_same_classes(model, tmp_path):
    image, processor = scene(), ViTPSegmentationImageProcessor()
    Image.fromarray(image.transpose(1, 2, 0)).save(tmp_path / "scene.png")
    predict_large(model, processor, tmp_path / "scene.png", tmp_path / "classes.tif", **WINDOWS)
    expected = in_memory(model, processor, image).argmax(0).numpy()
    np.testing.assert_array_equal(read(tmp_path / "classes.tif")[0], expected)


@pytest.mark.parametrize(("window", "stride"), [(48, 36), (30, 22), (1, 1), ((40, 64), (30, 48))])
def test_default_stride_is_three_quarters(model, tmp_path, monkeypatch, window, stride):
    asked = []

    def record_windows(*args, window, stride, **kwargs):
        asked.append((window, stride))
        return []

    monkeypatch.setattr(large_images, "predict_bands", record_windows)
    image = write_tiff(tmp_path / "scene.tif", scene())
    predict_large(model, ViTPSegmentationImageProcessor(), image, tmp_path / "classes.tif", window=window)
    stride = stride if isinstance(stride, tuple) else (stride, stride)
    assert asked == [(window, stride)]


def test_pair_equals_prediction_in_memory(change_model, tmp_path):
    """Check a pair, in which pixels without data in the later image have no class."""
    before, after = scene(seed=0), scene(seed=1)
    after[:, :10] = 0
    paths = [write_tiff(tmp_path / "before.tif", before), write_tiff(tmp_path / "after.tif", after, nodata=0)]
    predict_large(change_model, ViTPSegmentationImageProcessor(), paths, tmp_path / "changes.tif", **WINDOWS)
    expected = in_memory(change_model, ViTPSegmentationImageProcessor(), before, after).argmax(0).numpy()
    expected[(after == 0).all(0)] = 255
    assert len(np.unique(expected)) > 2
    np.testing.assert_array_equal(read(tmp_path / "changes.tif")[0], expected)


@pytest.mark.parametrize("spec", [{"bands": [4, 2, 0], "percentiles": [2, 98]}, {"bands": [1], "window": [500, 9000]}])
def test_percentiles_are_equal_in_all_windows(model, tmp_path, spec):
    """Check percentiles of an image that is smaller than the sample, so the processor computes the same."""
    image, processor = scene(bands=5, dtype="uint16", high=10000), ViTPSegmentationImageProcessor(input_spec=spec)
    write_tiff(tmp_path / "scene.tif", image)
    predict_large(model, processor, tmp_path / "scene.tif", tmp_path / "classes.tif", **WINDOWS)
    expected = in_memory(model, processor, image).argmax(0).numpy()
    np.testing.assert_array_equal(read(tmp_path / "classes.tif")[0], expected)


def test_nodata_pixels_have_no_class(model, tmp_path):
    image = scene(dtype="int16", high=10000)
    image[:, 40:, 70:] = -9999
    write_tiff(tmp_path / "scene.tif", image, nodata=-9999)
    processor = ViTPSegmentationImageProcessor(input_spec={"percentiles": [0, 100]})
    paths = {"output": tmp_path / "classes.tif", "probabilities": tmp_path / "p.tif"}
    predict_large(model, processor, tmp_path / "scene.tif", **paths, **WINDOWS)
    window = [[int(band[band != -9999].min()), int(band.max())] for band in image]
    expected = in_memory(model, processor, image, input_spec={"window": window}).argmax(0).numpy()
    expected[40:, 70:] = 255
    with rasterio.open(tmp_path / "classes.tif") as file:
        assert file.nodata == 255
        np.testing.assert_array_equal(file.read(1), expected)
    assert {path.name for path in tmp_path.iterdir()} == {"scene.tif", "classes.tif", "p.tif"}
    with rasterio.open(tmp_path / "p.tif") as file:
        np.testing.assert_array_equal(file.dataset_mask() == 0, expected == 255)
        assert not file.read()[:, expected == 255].any()


@pytest.mark.parametrize("name", ["scene.tif", "scene.png", "scene.jpg", "no_suffix"])
def test_image_with_orientation_is_refused(model, tmp_path, monkeypatch, name):
    """Check that rotated images are refused, also images that are too large for Pillow."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", HEIGHT * WIDTH // 4)
    image, path = Image.fromarray(scene().transpose(1, 2, 0)), tmp_path / name
    kind = {"scene.png": "PNG", "scene.jpg": "JPEG"}.get(name, "TIFF")
    exif = Image.Exif()
    for orientation in (6, 2, 1):
        exif[274] = orientation
        how = {"tiffinfo": {274: orientation}} if kind == "TIFF" else {"exif": exif}
        image.save(path, kind, **how)
        arguments = model, ViTPSegmentationImageProcessor(), path, tmp_path / "classes.tif"
        if orientation == 1:
            predict_large(*arguments, **WINDOWS)
            continue
        with pytest.raises(ValueError, match=f"{name} is stored with orientation {orientation}") as caught:
            predict_large(*arguments, **WINDOWS)
        assert len(str(caught.value).splitlines()) == 1 and list(tmp_path.iterdir()) == [path]
    assert Image.MAX_IMAGE_PIXELS == HEIGHT * WIDTH // 4


def test_raster_that_may_name_other_files_is_refused(model, tmp_path):
    write_tiff(tmp_path / "scene.tif", scene())
    with rasterio.open(tmp_path / "scene.tif") as file:
        rasterio.shutil.copy(file, tmp_path / "scene.img", driver="HFA")
    with pytest.raises(ValueError, match=r"scene\.img.*TIFF"):
        predict_large(model, ViTPSegmentationImageProcessor(), tmp_path / "scene.img", tmp_path / "a.tif", **WINDOWS)


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
    predict_large(model, ViTPSegmentationImageProcessor(), tmp_path / name, tmp_path / "classes.tif", **WINDOWS)
    on_white = (image * (alpha / 255) + (255 - alpha)).round().astype(np.uint8)
    expected = in_memory(model, ViTPSegmentationImageProcessor(), on_white).argmax(0).numpy()
    assert (expected != in_memory(model, ViTPSegmentationImageProcessor(), image).argmax(0).numpy())[20:].any()
    expected[:20] = 255
    np.testing.assert_array_equal(read(tmp_path / "classes.tif")[0], expected)


def test_selected_fourth_band_is_not_alpha(model, tmp_path):
    """Check 8-bit near infrared, which GDAL marks as alpha and which is 0 for water."""
    image, spec = scene(bands=4), {"bands": [3, 0, 1], "percentiles": [0, 100]}
    image[3, 30:90, 20:80] = 0
    write_tiff(tmp_path / "scene.tif", image)
    with rasterio.open(tmp_path / "scene.tif") as file:
        assert file.colorinterp[3].name == "alpha"
    processor = ViTPSegmentationImageProcessor(input_spec=spec)
    predict_large(model, processor, tmp_path / "scene.tif", tmp_path / "classes.tif", **WINDOWS)
    expected = in_memory(model, processor, image).argmax(0).numpy()
    np.testing.assert_array_equal(read(tmp_path / "classes.tif")[0], expected)


def test_ground_control_points_are_kept(model, tmp_path):
    """Check an image with ground control points, as many radar images have."""
    points = [GroundControlPoint(row, column, 10.0 + column, 50.0 - row) for row, column in ((0, 0), (0, 99), (99, 0))]
    write_tiff(tmp_path / "scene.tif", scene(), transform=None, gcps=points)
    predict_large(model, ViTPSegmentationImageProcessor(), tmp_path / "scene.tif", tmp_path / "classes.tif", **WINDOWS)
    with rasterio.open(tmp_path / "classes.tif") as file:
        kept, crs = file.gcps
    assert [(point.row, point.col, point.x, point.y) for point in kept] == [(p.row, p.col, p.x, p.y) for p in points]
    assert crs == rasterio.crs.CRS.from_string(GROUND["crs"])


def test_rational_polynomial_coefficients_are_kept(model, tmp_path):
    """Check an image with RPCs, as many satellite images have."""
    names = ("height", "lat", "long", "line", "samp")
    values = {f"{name}_{kind}": 50.0 for name in names for kind in ("off", "scale")}
    values |= {f"{name}_{kind}_coeff": [1.0] + [0.5] * 19 for name in names[3:] for kind in ("num", "den")}
    rpcs = RPC(**values)
    write_tiff(tmp_path / "scene.tif", scene(), transform=None, crs=None, rpcs=rpcs)
    predict_large(model, ViTPSegmentationImageProcessor(), tmp_path / "scene.tif", tmp_path / "classes.tif", **WINDOWS)
    with rasterio.open(tmp_path / "classes.tif") as file:
        assert {name: getattr(file.rpcs, name) for name in values} == values


def test_windows_are_augmented(model, tmp_path):
    image, processor = scene(), ViTPSegmentationImageProcessor()
    write_tiff(tmp_path / "scene.tif", image)
    options = {"scales": (1.0, 1.5), "flip": True}
    predict_large(model, processor, tmp_path / "scene.tif", tmp_path / "classes.tif", **WINDOWS, **options)
    predict = augmented(lambda pixels: model(pixels).logits, **options)
    pixels = processor(torch.from_numpy(image), input_data_format="channels_first", return_tensors="pt").pixel_values
    with torch.no_grad():
        expected = sliding_window(predict, pixels, **WINDOWS)[0].argmax(0).numpy()
    np.testing.assert_array_equal(read(tmp_path / "classes.tif")[0], expected)


class Killed(Exception):
    pass


def killed_after(model, monkeypatch, calls):
    """Return the forward method of a model, which raises an error after a number of calls."""
    forward, count = model.forward, iter(range(calls))

    def dying(*args, **kwargs):
        if next(count, None) is None:
            raise Killed
        return forward(*args, **kwargs)

    monkeypatch.setattr(model, "forward", dying)


@pytest.mark.parametrize("calls, finished, needed", [(0, 0, 8), (1, 0, 8), (4, 64, 6), (7, 85, 4)])
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
        predict_large(model, ViTPSegmentationImageProcessor(), source, tmp_path / "classes.tif", **WINDOWS)
    with pytest.raises(ValueError, match="classes.tif.part .*image processor, stride"):
        options = {**WINDOWS, "stride": 16}
        predict_large(
            model, ViTPSegmentationImageProcessor(image_mean=[0, 0, 0]), source, tmp_path / "classes.tif", **options
        )
    other = ViTPForSemanticSegmentation(model.config)
    with pytest.raises(ValueError, match="different model"):
        predict_large(other, ViTPSegmentationImageProcessor(), source, tmp_path / "classes.tif", **WINDOWS)


def test_bad_prediction_arguments_are_refused(model, change_model, tmp_path):
    source = write_tiff(tmp_path / "scene.tif", scene())
    output = tmp_path / "classes.tif"

    def run(images, model=model, **options):
        predict_large(model, ViTPSegmentationImageProcessor(**options), images, output, **WINDOWS)

    many = write_tiff(tmp_path / "many.tif", scene(bands=5))
    small = write_tiff(tmp_path / "small.tif", scene()[:, 1:])
    moved = write_tiff(tmp_path / "moved.tif", scene(), transform=from_origin(0, 0, 0.1, 0.1))
    empty = write_tiff(tmp_path / "empty.tif", np.zeros((3, 60, 60), "uint16"), nodata=0)
    Image.fromarray(scene()[0]).convert("P").save(tmp_path / "palette.png")
    with pytest.raises(ValueError, match="1 .*ViTPForSemanticSegmentation.* 2"):
        run([source, source])
    with pytest.raises(ValueError, match="2 .*ViTPForChangeDetection.* 1"):
        run(source, model=change_model)
    with pytest.raises(ValueError, match="many.tif .*5 bands"):
        run(many)
    with pytest.raises(ValueError, match=r"scene.tif .*\[7\].*3 band"):
        run(source, input_spec={"bands": [7]})
    with pytest.raises(ValueError, match="empty.tif .*band"):
        run(empty, input_spec={"percentiles": [2, 98]})
    with pytest.raises(ValueError, match="palette.png has a palette"):
        run(tmp_path / "palette.png")
    white = write_tiff(tmp_path / "white.tif", scene(1), photometric="MINISWHITE")
    with pytest.raises(ValueError, match="white.tif stores white as 0"):
        run(white)
    with pytest.raises(ValueError, match=r"scene.tif and .*small.tif differ in shape: \(133, 101\) and \(132, 101\)"):
        run([source, small], model=change_model)
    with pytest.raises(ValueError, match=r"scene.tif and .*moved.tif differ in transform"):
        run([source, moved], model=change_model)
    for name in ("classes.png", "classes"):
        for outputs in ([tmp_path / name], [output, tmp_path / name]):
            with pytest.raises(ValueError, match=f".tif.*{name}"):
                predict_large(
                    model, ViTPSegmentationImageProcessor(), source, outputs[0], probabilities=outputs[-1], **WINDOWS
                )
    with pytest.raises(ValueError, match="different output files.*classes.tif"):
        predict_large(model, ViTPSegmentationImageProcessor(), source, output, probabilities=output, **WINDOWS)
    with pytest.raises(ValueError, match="stride"):
        predict_large(model, ViTPSegmentationImageProcessor(), source, output, window=32, stride=64)
    assert not list(tmp_path.glob("*.part*"))
    Image.fromarray(scene()[:3].astype("uint8").transpose(1, 2, 0)).save(tmp_path / "whole.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "whole.png").read_bytes()[:-500])
    with pytest.raises(ValueError, match="cut.png"):
        run(tmp_path / "cut.png")
    output.touch()
    with pytest.raises(FileExistsError, match="classes.tif exists"):
        run(source)


def test_command_line_selects_bands(model, tmp_path):
    model.save_pretrained(tmp_path / "model")
    ViTPSegmentationImageProcessor().save_pretrained(tmp_path / "model")
    image, spec = scene(5, "uint16", high=3000), {"bands": [3, 2, 1], "window": [0, 3000]}
    words = [str(tmp_path / "model"), str(write_tiff(tmp_path / "scene.tif", image)), "--output"]
    words += [str(tmp_path / "classes.tif")] + [
        part for key, size in WINDOWS.items() for part in (f"--{key}", str(size))
    ]
    with pytest.raises(ValueError, match='has 5.*input_spec={"bands"'):
        script.main(words)
    for wrong, message in (
        ("{bands", "input_spec.*'{bands'"),
        ("3", "input_spec.*3"),
    ):
        with pytest.raises(ValueError, match=message):
            script.main([*words, "--input_spec", wrong])
    assert script.main([*words, "--input_spec", json.dumps(spec)]) == 0
    expected = in_memory(model, ViTPSegmentationImageProcessor(input_spec=spec), image).argmax(0).numpy()
    np.testing.assert_array_equal(read(tmp_path / "classes.tif")[0], expected)


@pytest.mark.parametrize("is_pair", [False, True])
def test_script_predicts_with_saved_model(model, change_model, tmp_path, is_pair):
    model, images = (change_model, [scene(), scene(seed=1)]) if is_pair else (model, [scene()])
    processor = ViTPSegmentationImageProcessor(input_spec={"window": [0, 200]})
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    paths = [str(write_tiff(tmp_path / f"{place}.tif", image)) for place, image in enumerate(images)]
    classes = [{"name": name, "color": [10 * place, 0, 99]} for place, name in enumerate(("ground", "tree", "roof"))]
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({"data": {"classes": classes}}))
    settings = [part for name, value in WINDOWS.items() for part in (f"--{name}", str(value))]
    settings += ["--classes", str(tmp_path / "config.yaml")]
    script.main([str(tmp_path / "model"), *paths, "--output", str(tmp_path / "classes.tif"), *settings])
    expected = in_memory(model, processor, *images).argmax(0).numpy()
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
for height in sys.argv[1:]:
    used = []
    predict_large(model, processor, f"{height}.tif", f"classes_{height}.tif", window=512, stride=480)
    print(max(used), memory("VmHWM"))
"""
    command = [sys.executable, "-c", code, *map(str, heights)]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-3000:]
    low, high = (np.array(line.split(), dtype=int) for line in run.stdout.splitlines())
    print("MB while predicting, and at most:", low / 1e6, high / 1e6)
    assert (high - low).max() < 50e6
    with rasterio.open(tmp_path / f"classes_{heights[1]}.tif") as file:
        assert file.shape == (heights[1], width)
        for top in (0, heights[1] - 512):
            assert set(np.unique(file.read(1, window=rasterio.windows.Window(0, top, 512, 512)))) == {0, 1}
