"""Tests of the DICOM reader against the values of pydicom. tests/space has more kinds of files."""

import io
from pathlib import Path

import numpy as np
import pydicom
import pytest
import torch
from pydicom.data import get_testdata_file
from pydicom.dataset import Dataset
from pydicom.sequence import Sequence

from modeling_vitp import InputSpec
from modeling_vitp.data.classes import LabelEncoding
from modeling_vitp.data.files import FileSample
from modeling_vitp.data.rows import image_size
from modeling_vitp.images.pixels import to_pixels
from modeling_vitp.images.reading import picture_size, read_picture, stored_size
from modeling_vitp.instructions.rows import load_images
from modeling_vitp.tasks.segmentation.data import ImageFiles

CT = Path(get_testdata_file("CT_small.dcm"))


def hounsfield():
    dataset = pydicom.dcmread(CT)
    return dataset.pixel_array * float(dataset.RescaleSlope) + float(dataset.RescaleIntercept)


def windowed(low, high):
    return np.round(255 * np.clip((hounsfield() - low) / (high - low), 0, 1))


def test_ct_without_window_uses_percentiles():
    shown = read_picture(CT.read_bytes())
    assert (shown.mode, shown.size) == ("L", (128, 128))
    np.testing.assert_allclose(np.asarray(shown), windowed(*np.percentile(hounsfield(), (2, 98))), atol=1)


@pytest.mark.parametrize("is_inverted", [False, True])
def test_window_tags_and_monochrome1_are_applied(is_inverted):
    dataset = pydicom.dcmread(CT)
    dataset.WindowCenter, dataset.WindowWidth, dataset.VOILUTFunction = 40, 400, "LINEAR_EXACT"
    dataset.PhotometricInterpretation = f"MONOCHROME{1 if is_inverted else 2}"
    file = io.BytesIO()
    dataset.save_as(file)
    expected = windowed(-160, 240)
    shown = np.asarray(read_picture(file.getvalue()))
    np.testing.assert_allclose(shown, 255 - expected if is_inverted else expected, atol=1)
    units = read_picture(file.getvalue(), InputSpec(percentiles=(2, 98)))
    assert units.dtype == np.float32
    np.testing.assert_array_equal(units, -hounsfield() if is_inverted else hounsfield())


@pytest.mark.parametrize(
    "tags",
    [
        {"WindowCenter": None, "WindowWidth": None, "PixelPaddingValue": None},
        {"WindowCenter": "", "WindowWidth": 400},
        {"WindowCenter": 40, "WindowWidth": 400, "VOILUTFunction": "", "NumberOfFrames": None},
    ],
    ids=str,
)
def test_empty_tag_is_ignored(tags):
    """Check empty tags, as anonymization leaves them."""
    dataset = pydicom.dcmread(CT)
    for name, value in tags.items():
        setattr(dataset, name, value)
    file = io.BytesIO()
    dataset.save_as(file)
    edges = (-160, 239) if tags["WindowCenter"] else np.percentile(hounsfield(), (2, 98))
    np.testing.assert_allclose(np.asarray(read_picture(file.getvalue())), windowed(*edges), atol=1)
    np.testing.assert_array_equal(read_picture(file.getvalue(), as_stored=True), hounsfield())


def test_dicom_is_read_in_8_bits_or_by_spec():
    assert picture_size(io.BytesIO(CT.read_bytes())) == stored_size(CT) == image_size(str(CT)) == (128, 128)
    (shown,) = load_images({"image": str(CT)})
    assert shown.mode == "L"
    (units,) = load_images({"image": str(CT)}, InputSpec(window=(-160, 240)))
    np.testing.assert_array_equal(units, hounsfield()[None])
    assert [InputSpec(window=(0, 1)).is_in_units, InputSpec(gamma=2).is_in_units] == [True, False]

    sample = FileSample("a", {"name": "a"}, (CT,), None)
    encoding = LabelEncoding([{"name": "a"}, {"name": "b"}])
    (image,) = ImageFiles([sample], encoding, {"window": [-160, 240]})[0]["images"]
    np.testing.assert_allclose(image.numpy(), np.broadcast_to(windowed(-160, 240), (3, 128, 128)), atol=0.5)
    (image,) = ImageFiles([sample], encoding, {"window": [-160, 240]}, {"size": 64, "overlap": 0})[1]["images"]
    np.testing.assert_allclose(image[0].numpy(), windowed(-160, 240)[:64, 64:], atol=0.5)
    (image,) = ImageFiles([sample], encoding)[0]["images"]
    np.testing.assert_array_equal(image[0].numpy(), np.asarray(shown))


@pytest.mark.parametrize(
    "name, message",
    [
        ("MR_small_jpeg_ls_lossless.dcm", "compressed as JPEG-LS Lossless Image Compression"),
        ("rtplan.dcm", "modality RTPLAN"),
        ("MR_truncated.dcm", "cannot be read"),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_bad_dicom_is_refused_in_one_line(name, message):
    path = get_testdata_file(name)
    with pytest.raises(ValueError, match=message) as caught:
        load_images({"image": path})
    assert path in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("spec", [{"window": [-160, 240]}, {"percentiles": [2, 98]}], ids=str)
def test_monochrome1_gives_same_image(spec):
    pictures = []
    for is_inverted in (False, True):
        dataset = pydicom.dcmread(CT)
        if is_inverted:  # MONOCHROME1 swaps black and white.
            turned = (80 if "window" in spec else 0) - hounsfield() - float(dataset.RescaleIntercept)
            dataset.PixelData = turned.astype(np.int16).tobytes()
            dataset.PhotometricInterpretation = "MONOCHROME1"
        file = io.BytesIO()
        dataset.save_as(file)
        fields = InputSpec.from_dict(spec)
        pictures.append(to_pixels(read_picture(file.getvalue(), fields), fields))
    assert pictures[0].float().std() > 30
    torch.testing.assert_close(*pictures, atol=1, rtol=0)


@pytest.mark.parametrize(
    ("windows", "is_read"), [(((0, 400), (100, 300)), True), (((0, 400), (0, 200)), False)], ids=["middle", "middles"]
)
def test_monochrome1_windows_need_same_center(windows, is_read):
    dataset = pydicom.dcmread(CT)
    dataset.PhotometricInterpretation = "MONOCHROME1"
    file = io.BytesIO()
    dataset.save_as(file)
    spec = InputSpec(bands=(0, 0, 0), window=(*windows, windows[0]))
    if not is_read:
        with pytest.raises(ValueError, match="MONOCHROME1"):
            read_picture(file.getvalue(), spec)
        return
    found = spec(torch.from_numpy(read_picture(file.getvalue(), spec))[None])
    for channel, (low, high) in zip(found, spec.windows):
        mirrored = 255 - 255 * (hounsfield() - low).clip(0, high - low) / (high - low)
        np.testing.assert_allclose(channel, mirrored, atol=1e-3)


@pytest.mark.parametrize("is_shared", [True, False])
def test_functional_group_tags_are_applied(is_shared):
    """Check enhanced CT and MR with the values 0, 400 and 1000 in the middle of three frames."""
    dataset = pydicom.dcmread(CT)
    for name in ("RescaleSlope", "RescaleIntercept"):
        delattr(dataset, name)
    frames = np.zeros((3, 128, 128), dtype=np.int16)
    frames[1] = np.repeat([1024, 1424, 2024, 1024], 32)
    dataset.PixelData, dataset.NumberOfFrames = frames.tobytes(), 3
    groups = []
    for intercept in (-1024,) if is_shared else (0, -1024, 0):
        group, values, window = Dataset(), Dataset(), Dataset()
        values.RescaleSlope, values.RescaleIntercept, values.RescaleType = 1, intercept, "HU"
        window.WindowCenter, window.WindowWidth, window.VOILUTFunction = 500, 1000, "LINEAR_EXACT"
        group.PixelValueTransformationSequence, group.FrameVOILUTSequence = Sequence([values]), Sequence([window])
        groups.append(group)
    name = "SharedFunctionalGroupsSequence" if is_shared else "PerFrameFunctionalGroupsSequence"
    setattr(dataset, name, Sequence(groups))
    file = io.BytesIO()
    dataset.save_as(file)
    units = read_picture(file.getvalue(), InputSpec(window=(0, 1000)))
    np.testing.assert_array_equal(units[0], np.repeat([0, 400, 1000, 0], 32))
    np.testing.assert_array_equal(np.asarray(read_picture(file.getvalue()))[0], np.repeat([0, 102, 255, 0], 32))
