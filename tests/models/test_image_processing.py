"""Images of any depth, mode and layout, compared with plain transformers, Pillow and numpy."""

import base64

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pictures import picture
from PIL import Image, ImageOps
from transformers import GotOcr2ImageProcessor, image_utils

from modeling_vitp import ViTPImageProcessor, ViTPSegmentationImageProcessor
from modeling_vitp.input_spec import InputSpec, band_percentiles

MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
HEIGHT, WIDTH = 7, 10


def random_array(shape, dtype, seed=0):
    rng = np.random.default_rng(seed)
    dtype = np.dtype(dtype)
    if dtype.kind == "b":
        return rng.random(shape) > 0.5
    if dtype.kind == "f":
        return rng.random(shape).astype(dtype)
    info = np.iinfo(dtype)
    return rng.integers(info.min, info.max, shape, dtype=dtype.newbyteorder("="), endpoint=True).astype(dtype)


def unit(image, size=None, **kwargs):
    """Process an image to [0, 1] as `(3, height, width)`, without normalization; resize it only if `size` is set."""
    if size is None:
        size = (image.height, image.width) if isinstance(image, Image.Image) else (HEIGHT, WIDTH)
    processor = ViTPImageProcessor(
        size={"height": size[0], "width": size[1]}, image_mean=[0.0, 0.0, 0.0], image_std=[1.0, 1.0, 1.0]
    )
    return processor(image, return_tensors="pt", **kwargs)["pixel_values"][0].numpy()


def oracle(bands, low=None, high=None, gamma=1.0):
    """Compute the same in numpy; `low` and `high` are numbers, or one for each band."""
    bands = np.asarray(bands)
    if low is None:
        low, high = 0, np.iinfo(bands.dtype).max if bands.dtype.kind in "iu" else 1
    low, high = (np.asarray(value, dtype=np.float64).reshape(-1, 1, 1) for value in (low, high))
    with np.errstate(invalid="ignore"):
        scaled = np.clip((bands.astype(np.float64) - low) / (high - low), 0, 1)
    scaled = np.where(np.isnan(scaled), 0, scaled) ** gamma
    return np.broadcast_to(scaled, (3, *scaled.shape[1:]))


def assert_close(actual, expected, tolerance=1e-6):
    np.testing.assert_allclose(actual, expected, rtol=0, atol=tolerance)


def brute_force_grid(width, height, tile, min_patches, max_patches):
    """Return (columns, rows) nearest in aspect ratio; of equal ones the largest below twice the image's area."""
    grids = [
        (columns, rows)
        for columns in range(1, max_patches + 1)
        for rows in range(1, max_patches + 1)
        if min_patches <= columns * rows <= max_patches
    ]
    distance = {grid: abs(width / height - grid[0] / grid[1]) for grid in grids}
    nearest = [grid for grid in grids if distance[grid] == min(distance.values())]
    nearest.sort(key=lambda grid: grid[0] * grid[1])
    allowed = [grid for grid in nearest[1:] if width * height > 0.5 * tile * tile * grid[0] * grid[1]]
    return (nearest[:1] + allowed)[-1]


FORMS = {
    "pil": lambda image: image,
    "hwc": np.asarray,
    "chw": lambda image: np.asarray(image).transpose(2, 0, 1),
    "reversed strides": lambda image: np.ascontiguousarray(np.asarray(image)[:, :, ::-1])[:, :, ::-1],
    "tensor": lambda image: torch.from_numpy(np.asarray(image).transpose(2, 0, 1).copy()),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("crop_to_patches", [False, True])
def test_8_bit_rgb_equals_transformers(form, crop_to_patches):
    settings = {"size": {"height": 56, "width": 56}, "crop_to_patches": crop_to_patches, "max_patches": 6}
    for size in ((56, 56), (37, 191), (300, 20)):
        image = picture(*size)
        expected = GotOcr2ImageProcessor(image_mean=MEAN, image_std=STD, **settings)(image, return_tensors="pt")
        actual = ViTPImageProcessor(**settings)(FORMS[form](image), return_tensors="pt")
        assert torch.equal(actual["pixel_values"], expected["pixel_values"])
        assert torch.equal(actual["num_patches"], expected["num_patches"])


def test_8_bit_grayscale_equals_transformers():
    settings = {"size": {"height": 56, "width": 56}, "crop_to_patches": True}
    image = picture(100, 60).convert("L")
    expected = GotOcr2ImageProcessor(image_mean=MEAN, image_std=STD, **settings)(image, return_tensors="pt")
    for form in (image, np.asarray(image)):
        actual = ViTPImageProcessor(**settings)(form, return_tensors="pt")
        assert torch.equal(actual["pixel_values"], expected["pixel_values"])


@pytest.mark.parametrize("nested", [False, True])
def test_mixed_batches_keep_order(nested):
    settings = {"size": {"height": 28, "width": 28}, "crop_to_patches": True, "max_patches": 4}
    images = [picture(90, 30, 0), picture(28, 28, 1), picture(90, 30, 2), picture(20, 50, 3)]
    oracle = GotOcr2ImageProcessor(image_mean=MEAN, image_std=STD, **settings)
    expected = [oracle(image, return_tensors="pt") for image in images]
    mixed = [images[0], np.asarray(images[1]), images[2], np.asarray(images[3]).transpose(2, 0, 1)]
    if nested:
        mixed = [[image] for image in mixed]  # one sample each, so that no budget is shared
    actual = ViTPImageProcessor(**settings)(mixed, return_tensors="pt")
    assert torch.equal(actual["pixel_values"], torch.cat([one["pixel_values"] for one in expected]))
    assert actual["num_patches"].tolist() == [one["num_patches"].item() for one in expected]


def test_defaults_are_those_of_internvl():
    processor = ViTPImageProcessor()
    assert list(processor.image_mean) == MEAN and list(processor.image_std) == STD
    assert dict(processor.size) == {"height": 448, "width": 448}
    assert processor.crop_to_patches is False and processor.input_spec is None


@pytest.mark.parametrize("min_patches, max_patches", [(1, 1), (1, 12), (3, 6)])
def test_tiles_are_nearest_grid_and_thumbnail(min_patches, max_patches):
    processor = ViTPImageProcessor(size={"height": 28, "width": 28}, crop_to_patches=True)
    limits = {"min_patches": min_patches, "max_patches": max_patches}
    for size in [
        (28, 28),
        (56, 56),
        (400, 400),
        (57, 28),
        (100, 40),
        (35, 28),
        (40, 100),
        (500, 28),
        (1, 90),
        (900, 3),
    ]:
        for spec in (None, {"percentiles": [1, 99]}):
            output = processor(picture(*size), **limits, input_spec=spec, return_tensors="pt")
            columns, rows = brute_force_grid(*size, 28, min_patches, max_patches)
            expected = columns * rows + (columns * rows > 1)
            assert output["num_patches"].tolist() == [expected]
            assert output["pixel_values"].shape == (expected, 3, 28, 28)
            assert output["pixel_values"].isfinite().all()


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, ">u2", np.uint32, np.float16, np.float32, np.float64, bool])
def test_range_without_spec_is_that_of_type(dtype):
    array = random_array((3, HEIGHT, WIDTH), dtype)
    native = array.astype(array.dtype.newbyteorder("="))
    assert_close(unit(array), oracle(native))
    assert_close(unit(array[0]), oracle(native[:1]))


def test_pil_images_of_many_bits_have_range_of_type():
    array = random_array((HEIGHT, WIDTH), np.uint16)
    for mode, dtype in (("I;16", "<u2"), ("I;16B", ">u2")):
        image = Image.frombytes(mode, (WIDTH, HEIGHT), array.astype(dtype).tobytes())
        assert_close(unit(image), oracle(array[None]))
    floats = random_array((HEIGHT, WIDTH), np.float32)
    assert_close(unit(Image.fromarray(floats)), oracle(floats[None]))


def test_image_stays_on_its_device():
    image = torch.zeros(3, HEIGHT, WIDTH, dtype=torch.uint16, device="meta")
    for spec in ({}, {"window": (0, 3000)}, {"window": ((0, 1), (0, 2), (0, 3))}):
        assert InputSpec(**spec)(image).device == image.device


def test_percentiles_of_constant_band_give_black():
    for dtype in (np.uint16, np.float32):
        array = np.full((HEIGHT, WIDTH), 7, dtype=dtype)
        assert_close(unit(array, input_spec={"percentiles": [2, 98]}), np.zeros((3, HEIGHT, WIDTH)))


def test_percentiles_of_large_band_agree_with_numpy():
    band = torch.arange(2**24 + 2, dtype=torch.int32)
    assert band_percentiles(band, (2.5, 75)) == [0.025 * (2**24 + 1), 0.75 * (2**24 + 1)]


def on_white(rgb, alpha):
    alpha = alpha[..., None] / 255
    return rgb * alpha + 255 * (1 - alpha)


def pil_of_mode(mode):
    """Return an image of a mode, and its 8-bit RGB version on white, `(height, width, 3)`."""
    rgb = random_array((HEIGHT, WIDTH, 3), np.uint8)
    gray, alpha = rgb[..., 0], random_array((HEIGHT, WIDTH), np.uint8, seed=1)
    if mode == "RGB":
        return Image.fromarray(rgb), rgb
    if mode == "L":
        return Image.fromarray(gray), gray[..., None].repeat(3, axis=-1)
    if mode == "1":
        bits = gray > 127
        return Image.fromarray(bits), 255.0 * bits[..., None].repeat(3, axis=-1)
    if mode == "RGBA":
        return Image.fromarray(np.dstack([rgb, alpha])), on_white(rgb, alpha)
    if mode == "LA":
        image = Image.merge("LA", [Image.fromarray(gray), Image.fromarray(alpha)])
        return image, on_white(gray[..., None].repeat(3, axis=-1), alpha)
    if mode == "CMYK":
        image = Image.fromarray(np.dstack([rgb, alpha]), mode="CMYK")
        return image, np.asarray(image.convert("RGB"))
    palette = random_array((16, 3), np.uint8, seed=2)
    indices = gray % 16
    image = Image.fromarray(indices, mode="P")
    image.putpalette(palette.flatten().tolist())
    if mode == "P":
        return image, palette[indices]
    image.info["transparency"] = 5
    return image, on_white(palette[indices], np.where(indices == 5, 0, 255))


PIL_MODES = ["RGB", "L", "1", "RGBA", "LA", "CMYK", "P", "P with transparency"]


@pytest.mark.parametrize("mode", [*PIL_MODES, "I;16", "F"])
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_pil_modes_become_rgb_on_white(mode):
    """Images of few rows or columns have the layout of their mode."""
    if mode in ("I;16", "F"):
        array = random_array((HEIGHT, WIDTH), {"I;16": np.uint16, "F": np.float32}[mode])
        image, shades = Image.fromarray(array), oracle(array[None])
    else:
        image, rgb = pil_of_mode(mode)
        shades = rgb.transpose(2, 0, 1) / 255
    assert image.mode == mode.split()[0]
    rounding = 1.01 / 255 if "A" in mode else 1e-6
    for width, height in ((WIDTH, HEIGHT), (WIDTH, 1), (WIDTH, 3), (1, HEIGHT), (3, HEIGHT), (3, 3), (1, 1), (4, 1)):
        for spec in (None, {"gamma": 1.0}):
            actual = unit(image.crop((0, 0, width, height)), input_spec=spec)
            assert_close(actual, shades[:, :height, :width], rounding)
    low, high = 0.2, 0.8
    if mode not in ("I;16", "F"):
        window = {"window": [255 * low, 255 * high]}
        assert_close(unit(image, input_spec=window), oracle(shades, low, high), rounding / (high - low))


@pytest.mark.parametrize("channels_last", [False, True])
def test_axis_of_bands_is_found(channels_last):
    """The axis need not be the shortest one for one band and three bands."""
    for bands in (1, 3):
        for size in ((2, 30), (30, 2), (5, 5), (2, 2)):
            array = random_array((bands, *size), np.uint8)
            assert_close(unit(array.transpose(1, 2, 0) if channels_last else array, size=size), oracle(array))
    for bands in (2, 5, 13):
        array = random_array((bands, 20, 30), np.uint16)
        image = array.transpose(1, 2, 0) if channels_last else array
        assert_close(unit(image, size=(20, 30), input_spec={"bands": [1]}), oracle(array[[1]]))


@pytest.mark.parametrize("input_data_format", ["channels_first", "channels_last"])
def test_input_data_format_is_respected(input_data_format):
    for shape in ((5, 9, 5), (3, 9, 4), (1, 9, 1), (5, 20, 30)):
        array = random_array(shape, np.uint16)
        bands = array if input_data_format == "channels_first" else array.transpose(2, 0, 1)
        actual = unit(array, size=bands.shape[1:], input_spec={"bands": [0]}, input_data_format=input_data_format)
        assert_close(actual, oracle(bands[:1]))


def test_input_data_format_leaves_pil_images_alone():
    image = picture(WIDTH, HEIGHT)
    processor = ViTPImageProcessor(size={"height": HEIGHT, "width": WIDTH})
    kwargs = {"input_data_format": "channels_first", "input_spec": {"gamma": 0.5}, "return_tensors": "pt"}
    pixel_values = processor([image, np.asarray(image).transpose(2, 0, 1)], **kwargs)["pixel_values"]
    assert torch.equal(pixel_values[0], pixel_values[1])


@pytest.mark.parametrize(
    "spec",
    [
        {"bands": (3, 1, 0), "window": ((0, 30000), (5, 60000), (10, 65535)), "gamma": 0.7},
        {"bands": [2, 0, 1], "percentiles": (2, 98)},
    ],
)
def test_spec_survives_saving(spec, tmp_path):
    image = random_array((5, 20, 30), np.uint16)
    processor = ViTPImageProcessor(size={"height": 14, "width": 14}, crop_to_patches=True, input_spec=spec)
    expected = processor(image, return_tensors="pt")["pixel_values"]
    processor.save_pretrained(tmp_path)
    loaded = ViTPImageProcessor.from_pretrained(tmp_path)
    assert torch.equal(loaded(image, return_tensors="pt")["pixel_values"], expected)


def test_spec_of_call_replaces_that_of_processor():
    image = random_array((HEIGHT, WIDTH), np.uint16)
    processor = ViTPImageProcessor(
        size={"height": HEIGHT, "width": WIDTH},
        image_mean=[0.0] * 3,
        image_std=[1.0] * 3,
        input_spec={"window": [0, 100]},
    )
    calls = {"own": {}, "window": {"input_spec": {"window": [5, 50000]}}, "gamma": {"input_spec": {"gamma": 2.0}}}
    actual = {
        name: processor(image, return_tensors="pt", **kwargs)["pixel_values"][0] for name, kwargs in calls.items()
    }
    assert_close(actual["own"].numpy(), oracle(image[None], 0, 100))
    assert_close(actual["window"].numpy(), oracle(image[None], 5, 50000))
    assert_close(actual["gamma"].numpy(), oracle(image[None], gamma=2.0))
    assert processor.input_spec == {"window": [0, 100]}


FILES = {
    "gray.png": lambda: picture(WIDTH, HEIGHT).convert("L"),
    "rgba.png": lambda: pil_of_mode("RGBA")[0],
    "palette.png": lambda: pil_of_mode("P with transparency")[0],
    "rgb.tif": lambda: picture(WIDTH, HEIGHT),
    "16 bit.tif": lambda: Image.fromarray(random_array((HEIGHT, WIDTH), np.uint16)),
    "float.tif": lambda: Image.fromarray(random_array((HEIGHT, WIDTH), np.float32)),
    "3 pixels wide.png": lambda: picture(3, 3),
}


@pytest.mark.parametrize("name", FILES)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_path_equals_opened_image(name, tmp_path):
    path = tmp_path / name
    FILES[name]().save(path)
    with Image.open(path) as image:
        image.load()
    expected = unit(image)
    assert_close(unit(str(path), size=expected.shape[1:]), expected)


@pytest.mark.parametrize("way", ["https", "data", "base64"])
@pytest.mark.parametrize("name", ["rgba.png", "16 bit.tif"])
def test_url_equals_path(name, way, tmp_path, monkeypatch):
    path = tmp_path / name
    FILES[name]().save(path)
    encoded = base64.encodebytes(path.read_bytes()).decode()
    where = {"https": "https://example.org/image", "data": f"data:image/png;base64,{encoded}", "base64": encoded}[way]

    def get(url, **options):
        request = image_utils.httpx.Request("GET", url)
        return image_utils.httpx.Response(200, content=path.read_bytes(), request=request)

    monkeypatch.setattr(image_utils.httpx, "get", get)
    expected = unit(str(path))
    assert_close(unit(where, size=expected.shape[1:]), expected)


@pytest.mark.parametrize("answer", [404, "no connection"])
def test_failed_request_names_the_url(answer, monkeypatch):
    def get(url, **options):
        request = image_utils.httpx.Request("GET", url)
        if answer == 404:
            return image_utils.httpx.Response(answer, request=request)
        raise image_utils.httpx.ConnectError(answer, request=request)

    monkeypatch.setattr(image_utils.httpx, "get", get)
    with pytest.raises(ValueError, match=f"https://example.org/none.png.*{answer}"):
        unit("https://example.org/none.png")


def test_orientation_of_file_is_applied(tmp_path):
    image = picture(WIDTH, HEIGHT)
    exif = Image.Exif()
    exif[0x0112] = 6
    image.save(tmp_path / "turned.png", exif=exif)
    upright = ImageOps.exif_transpose(Image.open(tmp_path / "turned.png"))
    assert upright.size == (HEIGHT, WIDTH)
    expected = np.asarray(upright).transpose(2, 0, 1) / 255
    assert_close(unit(str(tmp_path / "turned.png"), size=(WIDTH, HEIGHT)), expected)


@st.composite
def images_and_specs(draw):
    """Draw an image, its bands `(bands, height, width)`, its layout, and a spec for it."""
    num_bands = draw(st.integers(1, 6))
    shape = (num_bands, draw(st.integers(1, 12)), draw(st.integers(1, 12)))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    kind = draw(st.sampled_from(["window", "percentiles", None]))
    dtypes = ["u1", "<u2", ">u2", "<u4", "?", "<f2", "<f4", "<f8"]
    dtype = np.dtype(draw(st.sampled_from(dtypes + (["<i2", ">i2", "<i4", ">f4", "<f4"] if kind else []))))
    bands = random_array(shape, dtype, seed=rng)
    if dtype.kind == "f" and kind is not None:
        bands = (rng.standard_normal(shape) * draw(st.sampled_from([1, 100, 3000]))).astype(dtype)
        bands[rng.random(shape) < 0.1] = draw(st.sampled_from([np.nan, np.inf, -np.inf]))
        bands[:, 0, 0] = 1
    spec = {"gamma": draw(st.floats(0.2, 3))}
    if num_bands not in (1, 3) or draw(st.booleans()):
        spec["bands"] = draw(st.sampled_from([1, 3]).flatmap(lambda n: st.tuples(*[st.integers(0, num_bands - 1)] * n)))
    used = len(spec.get("bands", bands))
    if kind == "window":
        pairs = [(low, low + draw(st.floats(0.5, 5000))) for low in draw(st.tuples(*[st.floats(-3000, 3000)] * used))]
        spec["window"] = draw(st.sampled_from([pairs, pairs[0]]))
    elif kind == "percentiles":
        spec["percentiles"] = draw(st.tuples(st.floats(0, 45), st.floats(55, 100)))
    input_data_format = draw(st.sampled_from(["channels_first", "channels_last"]))
    image = bands if input_data_format == "channels_first" else np.ascontiguousarray(bands.transpose(1, 2, 0))
    return image, bands, input_data_format, spec


@settings(max_examples=100, deadline=None, derandomize=True)
@given(images_and_specs())
def test_any_spec_agrees_with_numpy(case):
    image, bands, input_data_format, spec = case
    used = bands[list(spec["bands"])] if "bands" in spec else bands
    used = used.astype(used.dtype.newbyteorder("="))
    low = high = None
    if "window" in spec:
        low, high = np.array(spec["window"]).reshape(-1, 2).T
    elif "percentiles" in spec:
        finite = [band[np.isfinite(band)].astype(np.float64) for band in used]
        low, high = np.array([np.percentile(band, spec["percentiles"]) for band in finite]).T
        high = np.where(high > low, high, low + 1)
    actual = unit(image, size=bands.shape[1:], input_spec=spec, input_data_format=input_data_format)
    # The root of a gamma below 1 would enlarge the rounding of dark pixels without bound.
    power = max(1, 1 / spec["gamma"])
    assert_close(actual**power, oracle(used, low, high, spec["gamma"]) ** power, tolerance=1e-5)


@pytest.mark.parametrize(("dtype", "size"), [(np.uint16, (56, 56)), (np.float32, (15, 31))])
def test_resizing_more_than_8_bits_is_clamped_bicubic(dtype, size):
    image = random_array((3, 20, 20), bool).astype(np.float32)
    expected = torch.nn.functional.interpolate(torch.from_numpy(image)[None], size, mode="bicubic", antialias=True)
    assert expected.min() < -0.05 and expected.max() > 1.05
    image = (image * (65535 if dtype is np.uint16 else 1)).astype(dtype)
    assert_close(unit(image, size=size), expected[0].clamp(0, 1).numpy(), tolerance=1e-5)


@pytest.mark.parametrize(
    "kind", ["a float array", "a float tensor", "16 bits without a spec", "a window", "float tensors of two sizes"]
)
@pytest.mark.parametrize("processor_class", [ViTPImageProcessor, ViTPSegmentationImageProcessor])
def test_floats_without_rescaling_are_normalized(processor_class, kind):
    """Floats in [0, 1] are the output of `torchvision.transforms.ToTensor`, and an intermediate form of others."""
    generator = np.random.default_rng(0)
    images = [generator.random((3, 28, 28)).astype(np.float32)]
    if kind == "float tensors of two sizes" and processor_class is ViTPSegmentationImageProcessor:
        images.append(generator.random((3, 28, 20)).astype(np.float32))
    given, options = [torch.from_numpy(image) for image in images], {}
    if kind == "a float array":
        given = [images[0].transpose(1, 2, 0)]
    elif kind == "16 bits without a spec":
        given = [(images[0] * 65535).astype(np.uint16)]
        images = [given[0].astype(np.float32) / 65535]
    elif kind == "a window":
        given, options = [images[0] * 400 - 160], {"input_spec": {"window": [-160, 240]}}
    processor = processor_class(do_rescale=False, image_mean=MEAN, image_std=STD, size={"height": 28, "width": 28})
    pixels = processor(given, return_tensors="pt", **options)["pixel_values"]
    for image, found in zip(images, pixels):
        wanted = (image - np.reshape(MEAN, (3, 1, 1))) / np.reshape(STD, (3, 1, 1))
        assert_close(found[:, : image.shape[1], : image.shape[2]], wanted, 1e-5)
    rescaled = processor(given, return_tensors="pt", do_rescale=True, **options)["pixel_values"]
    torch.testing.assert_close(pixels, rescaled, atol=1e-5, rtol=0)


def test_floats_without_rescaling_equal_transformers():
    # A smooth image, whose resized values stay in [0, 1]; only our processor would clip others.
    rows, columns = np.meshgrid(np.linspace(0.2, 0.8, 90), np.linspace(0.3, 0.7, 130), indexing="ij")
    image = torch.tensor(np.stack([rows, columns, rows * columns]), dtype=torch.float32)
    options = {"size": {"height": 28, "width": 28}, "crop_to_patches": True, "do_rescale": False}
    ours = ViTPImageProcessor(**options)(image, return_tensors="pt")["pixel_values"]
    theirs = GotOcr2ImageProcessor(image_mean=MEAN, image_std=STD, **options)(image, return_tensors="pt")
    torch.testing.assert_close(ours, theirs["pixel_values"], atol=1e-4, rtol=0)


@pytest.mark.parametrize("processor_class", [ViTPImageProcessor, ViTPSegmentationImageProcessor])
def test_8_bit_without_rescaling_equals_transformers(processor_class):
    processor = processor_class(do_rescale=False, image_mean=MEAN, image_std=STD, size={"height": 28, "width": 28})
    theirs = GotOcr2ImageProcessor(do_rescale=False, image_mean=MEAN, image_std=STD, size={"height": 28, "width": 28})
    image = picture(28, 28)
    expected = theirs(image, return_tensors="pt")["pixel_values"]
    assert torch.equal(processor(image, return_tensors="pt")["pixel_values"], expected)
    with pytest.raises(ValueError, match="of one kind"):
        processor([image, torch.zeros(3, 28, 28)], return_tensors="pt")
