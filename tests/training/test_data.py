"""What a pretraining trains on."""

from types import SimpleNamespace

import pytest
from datasets import Dataset

from modeling_vitp.instructions.mixture import load_mixture
from modeling_vitp.training.arguments import PretrainArguments
from modeling_vitp.training.data import describe_data, open_data

TASK = SimpleNamespace(prepare=lambda splits: (splits["train"], splits["test"]))


@pytest.fixture
def folder(tmp_path):
    """Rows of a split of 7 and of one of 3, which are known by their number."""
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
def test_task_has_the_split_asked_for(folder, split, numbers):
    args = PretrainArguments(dataset_name=folder, dataset_train_split=split)
    data = open_data(args, None, TASK, 0)
    assert data.train["number"] == data.splits["train"]["number"] == list(numbers)
    assert data.eval["number"] == [100, 101, 102]
    described = describe_data(args, None, data.train)
    assert described == [{"name": "rows", "dataset": None, "split": split, "rows": len(numbers)}]


def test_a_task_is_scored_on_splits_of_its_own(folder):
    args = PretrainArguments(dataset_name=folder, dataset_test_split="train")
    with pytest.raises(ValueError, match="dataset_test_split='train': a task is scored on splits of its own"):
        open_data(args, None, TASK, 0)


def test_a_mixture_cannot_be_evaluated_on(folder):
    mixture = load_mixture({"sources": [{"name": "mine", "folder": folder}]})
    args = PretrainArguments(mixture={"sources": []})
    with pytest.raises(ValueError, match=r"A mixture has no rows to evaluate on.*eval_strategy: no"):
        open_data(args, mixture, None, 0, evaluates=True)
