import pytest
import torch
from huggingface_hub.utils import disable_progress_bars
from tiny_models import TEXT, VISION

from modeling_vitp.pretraining.loading import build_model


@pytest.fixture(scope="session")
def trained(tokenizer, tmp_path_factory):
    """Output folder of a run, which is never changed."""
    torch.manual_seed(0)
    model, processor = build_model(tokenizer, VISION, TEXT, {"max_patches": 6})
    folder = tmp_path_factory.mktemp("outputs") / "run"
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture
def folder(trained, tmp_path):
    """Copy of the run's folder with other files of a run or its user."""
    folder = tmp_path / "run"
    for path in trained.iterdir():
        folder.mkdir(exist_ok=True)
        (folder / path.name).write_bytes(path.read_bytes())
    (folder / "metrics.json").write_text('{"seed": 0, "eval": {"eval_loss": 0.5}}')
    (folder / "checkpoint-2").mkdir()
    for name in ("optimizer.pt", "training_args.bin", "predictions.png", "train.parquet", "checkpoint-2/optimizer.pt"):
        (folder / name).write_bytes(b"private")
    return folder


@pytest.fixture(autouse=True)
def no_progress_bars():
    """Keep stderr to the program's own lines; the Trainer of other tests enables the bars again."""
    disable_progress_bars()
