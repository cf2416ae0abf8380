"""Values and colours of masks become classes."""

import dense_data
import numpy as np
import pytest
from dense_data import TWO
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from modeling_vitp.dense.data import DenseData, LabelEncoding


@given(st.lists(st.integers(0, 11), min_size=6, max_size=6))
def test_values_are_mapped_as_a_loop_maps_them(values):
    classes = [{"name": "a", "value": 4}, {"name": "b", "value": [6, 9]}, {"name": "c", "value": 2}]
    encoding = LabelEncoding(classes, ignore=[0])
    known = {4: 0, 6: 1, 7: 1, 8: 1, 9: 1, 2: 2, 0: 255}
    stored = np.array(values).reshape(2, 3)
    unknown = sorted({value for value in values if value not in known})
    if unknown:
        with pytest.raises(
            ValueError, match=f"mask.png.*{len([v for v in values if v in unknown])} pixel.*{unknown[0]}"
        ):
            encoding.encode(stored, "mask.png")
    else:
        assert encoding.encode(stored, "mask.png").tolist() == [[known[value] for value in row] for row in stored]


def test_a_palette_is_read_by_index_or_by_colour(tmp_path):
    image = Image.fromarray(np.array([[0, 1], [1, 0]], dtype=np.uint8))
    image.putpalette([10, 20, 30, 200, 100, 0])
    assert image.mode == "P"
    dense_data.save(Image.new("RGB", (2, 2)), tmp_path / "images" / "a.png")
    dense_data.save(image, tmp_path / "masks" / "a.png")
    splits = {"train": {"image": "images/{name}.png", "mask": "masks/{name}.png"}}
    by_index = DenseData(classes=TWO, splits=splits, root=str(tmp_path))
    assert by_index.open(["train"])[0]["mask"].tolist() == [[0, 1], [1, 0]]
    classes = [{"name": "tree", "color": [200, 100, 0]}, {"name": "ground", "color": [10, 20, 30]}]
    by_colour = DenseData(classes=classes, splits=splits, root=str(tmp_path), mask_encoding="color")
    assert by_colour.open(["train"])[0]["mask"].tolist() == [[1, 0], [0, 1]]


def test_a_negative_value_may_be_ignored_and_nothing_else_is():
    encoding = LabelEncoding([{"name": "land"}, {"name": "water"}], ignore=[-1, 9])
    mask = np.array([[0, 1, -1, 9]], np.int32)
    assert encoding.encode(mask, "a.tif").tolist() == [[0, 1, 255, 255]]
    with pytest.raises(ValueError, match=r"a.tif has 1 pixel.*outside the classes: -2"):
        encoding.encode(np.array([[-2, 0]]), "a.tif")
