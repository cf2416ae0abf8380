"""Descriptions of how images are seen, against numpy, and the proposed input specs, which must use the range."""

import json
import re

import numpy as np
import pytest
import torch
from pictures import write_bands
from PIL import Image

from modeling_vitp import InputSpec
from modeling_vitp.images import seen
from modeling_vitp.images.seen import NUM_IMAGES, describe_images

RNG = np.random.default_rng(0)
SENTINEL = RNG.integers(200, 3000, (5, 40, 50)).astype(np.uint16)


def written(folder, images, **profile):
    return [write_bands(folder / f"{index}.tif", image, **profile) for index, image in enumerate(images)]


def described(sources, **spec):
    return describe_images(len(sources), sources.__getitem__, InputSpec(**spec) if spec else None)


def proposal(text):
    return json.loads(re.search(r"input_spec to (.*)\.$", text)[1])


@pytest.mark.parametrize(
    ("image", "spec"),
    [
        (SENTINEL[:3], {}),
        (SENTINEL, {"bands": (3, 2, 1)}),
        (SENTINEL[:1] // 16, {}),
        (RNG.normal(0.5, 0.01, (1, 40, 50)).astype(np.float32).clip(0, 1), {}),
        (RNG.normal(-12, 2, (1, 40, 50)).astype(np.float32), {"window": (-1000, 1000)}),
        (RNG.integers(3, 9, (3, 40, 50)).astype(np.uint8), {}),
    ],
)
def test_proposed_input_spec_uses_the_range(tmp_path, image, spec):
    """Check that the share is that of numpy, and at least nine tenths with the proposed spec."""
    paths = written(tmp_path, [image] * 3)
    text = described(paths, **spec)
    used_bands = image[list(spec.get("bands", range(len(image))))]
    low, high = np.percentile(used_bands.astype(float), [1, 99])
    black, white = spec.get("window", (0, 1 if image.dtype == np.float32 else np.iinfo(image.dtype).max))
    share = (high - low) / (white - black)
    assert share < 0.1 and f"use {share:.1%}" in text and "WARNING" in text
    fitting = proposal(text)
    assert fitting.get("bands", []) == list(spec.get("bands", []))
    pixels = InputSpec.from_dict(fitting)(torch.from_numpy(image)).numpy()
    assert np.ptp(np.percentile(pixels, [1, 99])) > 0.9 * 255
    assert "WARNING" not in described(paths, **fitting)


def test_images_that_use_the_range_have_no_warning(tmp_path):
    text = described(written(tmp_path, [RNG.integers(0, 256, (3, 40, 50), dtype=np.uint8)]))
    assert "uint8, 3 band(s)" in text and "0 to 255 is" in text and "WARNING" not in text and "alpha" not in text
    text = described(written(tmp_path, [SENTINEL[:3]]), percentiles=(2, 98))
    assert "uint16" in text and "percentile 2 to 98" in text and "WARNING" not in text


@pytest.mark.parametrize("side", [40, seen.SIDE + 40])
def test_alpha_of_gdal_is_named(tmp_path, side):
    """Check a fourth 8-bit band, which GDAL marks as alpha, in an image that is read whole and in one read in part."""
    pixels = np.full((4, side, side), 200, dtype=np.uint8)
    paths = written(tmp_path, [pixels])
    assert "alpha" in described(paths)
    assert "alpha" not in described(paths, bands=(0, 1, 2))
    Image.fromarray(pixels.transpose(1, 2, 0)).save(tmp_path / "a.png")
    assert "alpha" in described([tmp_path / "a.png"]) and "alpha" in described([(tmp_path / "a.png").read_bytes()])


def test_window_in_other_units_is_named(tmp_path):
    paths = written(tmp_path, [RNG.integers(0, 256, (3, 40, 50), dtype=np.uint8)])
    assert "WARNING" in described(paths, window=(-160, 240))
    signed = written(tmp_path, [RNG.integers(-160, 240, (1, 40, 50)).astype(np.int16)])
    assert "WARNING" not in described(signed, window=(-160, 240))


def test_few_images_are_read_and_the_same_ones(tmp_path):
    path = write_bands(tmp_path / "a.tif", SENTINEL[:3])
    read = []

    def source_of(index):
        read.append(index)
        return path

    text = describe_images(10_000_000, source_of, None)
    assert len(set(read)) == NUM_IMAGES and max(read) > 1_000_000
    assert describe_images(10_000_000, source_of, None) == text and read[:NUM_IMAGES] == read[NUM_IMAGES:]


def test_images_that_cannot_be_read_are_left_out(tmp_path):
    (tmp_path / "b.tif").write_bytes(b"no")
    paths = [tmp_path / "b.tif", tmp_path / "missing.png"]
    assert described(paths) == "" and described([]) == ""
    assert "uint16" in described([*paths, write_bands(tmp_path / "a.tif", SENTINEL[:3])])
