"""Data of pretraining."""

import pytest
from datasets import Dataset

from modeling_vitp.instructions.mixture import load_mixture
from modeling_vitp.pretraining.arguments import PretrainArguments
from modeling_vitp.pretraining.data import open_data


@pytest.fixture
def folder(tmp_path):
    """Return a folder with a split of 7 and a split of 3 numbered rows."""
    (tmp_path / "rows").mkdir()
    for name, numbers in {"train": range(7), "test": range(100, 103)}.items():
        Dataset.from_dict({"number": list(numbers)}).to_parquet(tmp_path / "rows" / f"{name}.parquet")
    return str(tmp_path / "rows")


def test_evaluation_on_mixture_is_refused(folder):
    mixture = load_mixture({"sources": [{"name": "mine", "folder": folder}]})
    args = PretrainArguments(mixture={"sources": []})
    with pytest.raises(ValueError, match="eval_strategy: no"):
        open_data(args, mixture, 0, evaluates=True)
