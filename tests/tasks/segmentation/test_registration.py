"""Tests of a decode head and a metric from outside the package, named by a configuration."""

import json

import dense_data
import numpy as np
import pytest
import torch
from torch import nn

from modeling_vitp import ViTPForSemanticSegmentation, ViTPSegmentationImageProcessor
from modeling_vitp.images.pixels import normalized
from modeling_vitp.modeling_vitp_dense import HEADS, register_head
from modeling_vitp.recipes.evaluate_robustness import main as evaluate_robustness
from modeling_vitp.recipes.finetune_segmentation import main
from modeling_vitp.tasks.segmentation.data import DenseData

pytestmark = pytest.mark.usefixtures("no_loss_picture")
HEAD = """
import torch
from torch import nn
from torch.nn import functional as F

from modeling_vitp.modeling_vitp_dense import register_head


@register_head("sum_of_maps")
class SumOfMaps(nn.Module):
    def __init__(self, config, in_channels, width: int = 4):
        super().__init__()
        self.laterals = nn.ModuleList(nn.Conv2d(channels, width, 1) for channels in in_channels)
        self.classifier = nn.Conv2d(width, config.num_labels, 1)

    def forward(self, maps):
        maps = [lateral(one) for lateral, one in zip(self.laterals, maps)]
        return self.classifier(sum(F.interpolate(one, maps[0].shape[-2:]) for one in maps).relu())
"""
METRIC = """
from modeling_vitp.metrics import pixel_metrics


class ErrorRate(pixel_metrics.PixelMetric):
    main_score = "error_rate"
    lower_is_better = ("error_rate",)

    def _compute(self, cases):
        both, _, labeled = cases.sum(axis=(0, 2))
        return {"error_rate": float(1 - both / labeled)}
"""
SETTINGS = {"decode_head": "sum_of_maps", "decode_head_kwargs": {"width": 6}, "use_auxiliary_head": False}


@pytest.fixture
def files(tmp_path):
    dense_data.make_loveda(tmp_path / "data")
    (tmp_path / "my_head.py").write_text(HEAD)
    (tmp_path / "error_rate.py").write_text(METRIC)
    yield tmp_path
    HEADS.pop("sum_of_maps", None)


def arguments(folder, **changes):
    settings = {
        "plugins": [str(folder / "my_head.py")],
        "metric": str(folder / "error_rate.py"),
        "head": SETTINGS,
        "eval_split": "val",
        "submission": None,
    }
    return dense_data.smoke_arguments("loveda", folder / "data", folder / "out", **settings | changes)


def error_rate(folder) -> float:
    """Return the share of wrong pixels of the saved model, which sees each image of the split `val` whole."""
    model = ViTPForSemanticSegmentation.from_pretrained(folder / "out").eval()
    assert type(model.decode_head).__name__ == "SumOfMaps" and model.decode_head.classifier.in_channels == 6
    processor = ViTPSegmentationImageProcessor.from_pretrained(folder / "out")
    samples = DenseData.from_dict(dense_data.read_config("loveda")["data"] | {"root": str(folder / "data")})
    wrong, labeled = 0, 0
    for sample in samples.open(["val"]):
        with torch.no_grad():
            prediction = model(normalized(sample["images"][0], processor)[None]).logits.argmax(1)[0].numpy()
        mask = sample["mask"].numpy()
        wrong += ((prediction != mask) & (mask != 255)).sum()
        labeled += (mask != 255).sum()
    return wrong / labeled


def train_with_best_checkpoint(files, **changes) -> tuple[dict, list[float]]:
    """Return the metrics, and the score of each evaluation during training."""
    settings = {"load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 1, "save_steps": 1}
    settings |= {"max_steps": 3, "train_splits": ["train"], "test_scales": [1.0], "num_pictures": 0}
    assert main(arguments(files, **settings | changes)) == 0
    state = json.loads((files / "out" / "checkpoint-3" / "trainer_state.json").read_text())
    scores = [logs["eval_error_rate"] for logs in state["log_history"] if "eval_error_rate" in logs]
    assert len(scores) == 3
    return json.loads((files / "out" / "metrics.json").read_text()), scores


@pytest.mark.slow
def test_external_head_and_metric_train_and_score(files):
    metrics, scores = train_with_best_checkpoint(files)
    assert metrics["main_score"] == "error_rate" and not metrics["greater_is_better"]
    assert metrics["eval"]["eval_error_rate"] == min(scores) < max(scores)
    assert metrics["eval"]["eval_error_rate"] == pytest.approx(error_rate(files), abs=0.01)
    assert np.isfinite(metrics["train"]["train_loss"])

    # The saved model loads if its head is registered, and another command scores it.
    names = ["--models", str(files / "out"), "--plugins", str(files / "my_head.py"), "--split", "val"]
    options = ["--corruptions", "haze", "--severities", "1", "--output_dir", str(files / "robustness")]
    assert evaluate_robustness([*names, *options]) == 0
    scored = json.loads((files / "robustness" / "metrics.json").read_text())
    assert scored["score"] == "error_rate" and not scored["greater_is_better"]

    HEADS.pop("sum_of_maps")
    with pytest.raises(ValueError, match="sum_of_maps"):
        ViTPForSemanticSegmentation.from_pretrained(files / "out")


@pytest.mark.slow
def test_named_score_selects_lowest_error_rate(files):
    metrics, scores = train_with_best_checkpoint(files, metric_for_best_model="eval_error_rate")
    assert metrics["eval"]["eval_error_rate"] == min(scores) < max(scores)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"plugins": []}, "sum_of_maps"),
        ({"plugins": ["nowhere.py"]}, "nowhere.py"),
        ({"head": SETTINGS | {"decode_head_kwargs": {"wide": 1}}}, "wide"),
        ({"metric": "average_precision"}, "average_precision"),
    ],
)
def test_bad_plugin_settings_are_refused(files, changes, message):
    with pytest.raises(ValueError, match=message):
        main(arguments(files, **changes))


def test_duplicate_head_name_is_refused():
    class Other(nn.Module):
        pass

    with pytest.raises(ValueError, match="upernet"):
        register_head("upernet")(Other)
