"""Images with classes."""

import pytest
from datasets import ClassLabel, Dataset, Features, List, Value
from datasets import Image as ImageFeature
from PIL import Image

from modeling_vitp.probing.labelled_images import open_splits


@pytest.mark.parametrize(
    ("values", "feature", "message"),
    [
        ([0, -1], ClassLabel(names=["a", "b"]), "split 'train', row 1, has no label"),
        (["a", None], Value("string"), "split 'train', row 1, has no label"),
        ([[1], [2]], List(Value("int64")), "split 'train', row 0: label is .*, but one class"),
        (["a", "a"], Value("string"), "split 'train', has images of one class alone, 'a'"),
    ],
)
def test_columns_of_classes_that_are_wrong(tmp_path, values, feature, message):
    features = Features({"image": ImageFeature(), "label": feature})
    rows = {"image": [Image.new("RGB", (4, 4))] * 2, "label": values}
    Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "train.parquet")
    with pytest.raises(ValueError, match=message):
        open_splits(str(tmp_path), None, "train", "test", 0.5)
