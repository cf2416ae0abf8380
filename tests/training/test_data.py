"""Data of pretraining."""

from types import SimpleNamespace

import pytest
from datasets import Dataset

from modeling_vitp.instructions.mixture import load_mixture
from modeling_vitp.training.arguments import PretrainArguments
from modeling_vitp.training.data import describe_data, open_data

TASK = SimpleNamespace(prepare=lambda splits: (splits["train"], splits["test"]))


@pytest.fixture
def folder(tmp_path):
    """Return a folder with a split of 7 and a split of 3 numbered rows."""
    (tmp_path / "rows").mkdir()
    for name, numbers in {"train": range(7), "test": range(100, 103)}.items():
        Dataset.from_dict({"number": list(numbers)}).to_parquet(tmp_path / "rows" / f"{name}.parquet")
    return str(tmp_path / "rows")


@pytest.mark.parametrize(
    ("split", "numbers"),
    [
        ("train", range(7)),
        ("train[:2]", [0, 1]),
        ("train[5:]", [5, 6]),
        ("train[50%:]", [4, 5, 6]),
        ("test", range(100, 103)),
    ],
)
def test_task_gets_requested_split(folder, split, numbers):
    args = PretrainArguments(dataset_name=folder, dataset_train_split=split)
    data = open_data(args, None, TASK, 0)
    assert data.train["number"] == data.splits["train"]["number"] == list(numbers)
    assert data.eval["number"] == [100, 101, 102]
    described = describe_data(args, None, data.train)
    assert described == [{"name": "rows", "dataset": None, "split": split, "rows": len(numbers)}]


def test_test_split_with_task_is_refused(folder):
    args = PretrainArguments(dataset_name=folder, dataset_test_split="train")
    with pytest.raises(ValueError, match="dataset_test_split='train'"):
        open_data(args, None, TASK, 0)


def test_evaluation_on_mixture_is_refused(folder):
    mixture = load_mixture({"sources": [{"name": "mine", "folder": folder}]})
    args = PretrainArguments(mixture={"sources": []})
    with pytest.raises(ValueError, match="eval_strategy: no"):
        open_data(args, mixture, None, 0, evaluates=True)
