import math

import numpy as np
import pytest
import shapely
from shapely import affinity

from modeling_vitp.instructions.boxes import grid_box
from modeling_vitp.recipes.datasets.remote_sensing import from_percent, upright_box


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("{<25><40><33><60>}", "<box>[[250, 400, 330, 600]]</box>"),
        ("<image>\n[refer] where is <p> gray ship </p> ?", "where is <ref>gray ship</ref> ?"),
        (
            "There are <p>two\nships</p> {<1><2><3><4>|<0>}{<5><6><7><8>|<0>} at <p>a pier</p> .",
            "There are <ref>two ships</ref><box>[[10, 20, 30, 40], [50, 60, 70, 80]]</box> at <ref>a pier</ref> .",
        ),
        ("<p>A</p> and <p>B</p> {<1><2><3><4>}", "<ref>A</ref> and <ref>B</ref><box>[[10, 20, 30, 40]]</box>"),
        ("[identify] what is {<1><2><3><4>|<180>} here", "what is <box>[[10, 20, 30, 40]]</box> here"),
        ("A plain text, [1, 2] and {3}.", "A plain text, [1, 2] and {3}."),
    ],
)
def test_percent_texts_become_internvl_texts(text, expected):
    assert from_percent(text, (1000, 1000)) == expected


@pytest.mark.parametrize(
    "written", ["{<1><2><3>|<4>}", "{<77><981><83><100>}", "{<35><32><35><36>}", "{<1.5><2><3><4>}"]
)
def test_wrong_percent_box_is_named(written):
    with pytest.raises(ValueError, match="is not a box"):
        from_percent(f"It is at {written} .", (100, 100))


def test_rotated_box_becomes_its_bounding_box():
    """The box equals that of shapely in non-square images, where a rotation in percent differs from one in pixels."""
    random = np.random.default_rng(0)
    for _ in range(50):
        left, top = random.integers(0, 60, 2)
        right, bottom = left + random.integers(1, 40), top + random.integers(1, 40)
        height, width = random.integers(50, 900, 2)
        angle = int(random.integers(0, 180))
        sides = (left * width / 100, top * height / 100, right * width / 100, bottom * height / 100)
        image = shapely.box(0, 0, width, height)
        for sign in (1, -1):
            turned = affinity.rotate(shapely.box(*sides), sign * angle, origin="center")
            expected = shapely.box(*turned.bounds).intersection(image).bounds
            box = upright_box(f"{{<{left}><{top}><{right}><{bottom}>|<{angle}>}}", (height, width))
            assert box == pytest.approx(expected) and math.isfinite(sum(box))
            assert grid_box(box, (height, width))
