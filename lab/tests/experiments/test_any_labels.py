"""Experiments that fine-tune on a folder of labels, with a fake pretraining that writes random backbones."""

import json
from pathlib import Path

import pytest
import yaml
from classification_data import write_folders
from dense_data import TINY
from transformers import set_seed

from lab.experiments import experiment
from modeling_vitp import ViTPImageProcessor, ViTPVisionConfig, ViTPVisionModel, export_backbone
from modeling_vitp.adaptation.labels import read_labels, with_label_fraction
from modeling_vitp.recipes import finetune_classification

RATES, STEPS = [1e-5, 1e-3], 4
SETTINGS = {"image_size": 64, "per_device_train_batch_size": 4, "bf16": False}


def pretrain(argv: list[str]) -> int:
    config = yaml.safe_load(Path(argv[1]).read_text())
    set_seed(config["seed"])
    vit = ViTPVisionModel(ViTPVisionConfig(**TINY | {"num_hidden_layers": config["layers"]}))
    image_processor = ViTPImageProcessor(size={"height": 64, "width": 64})
    export_backbone(vit, Path(config["output_dir"]) / "backbone", image_processor)
    (Path(config["output_dir"]) / "metrics.json").write_text("{}")
    return 0


@pytest.fixture
def plan(tmp_path, monkeypatch):
    """Return a plan for a folder with three classes."""
    monkeypatch.setattr("modeling_vitp.recipes.pretrain.main", pretrain)
    write_folders(tmp_path / "classes", {"train": 4, "val": 8, "test": 16}, ("field", "forest", "river"))
    (tmp_path / "base.yaml").write_text("layers: 1\n")
    finetuning = {"data": str(tmp_path / "classes"), "steps": STEPS, "learning_rates": RATES, "label_shares": [0.5]}
    return {
        "output_dir": str(tmp_path / "out"),
        "claim": "Layers help.",
        "against": "They do not.",
        "base": str(tmp_path / "base.yaml"),
        "arms": {"one layer": None},
        "control": "one layer",
        "seeds": [0, 1],
        "finetuning": finetuning | {"settings": SETTINGS},
        "measures": {
            "rate": "finetuning.learning_rate",
            "all": "finetuning.labels_100",
            "half": "finetuning.labels_50",
        },
    }


def run(plan: dict) -> list[dict]:
    """Run an experiment by its command and return its runs."""
    output = Path(plan["output_dir"])
    output.with_suffix(".yaml").write_text(yaml.safe_dump(plan))
    assert experiment.main(["--config", str(output.with_suffix(".yaml"))]) == 0
    return json.loads((output / "metrics.json").read_text())["runs"]


class FineTunings:
    """Fake fine-tuning whose test score is the number of its training images and its seed."""

    def __init__(self):
        self.trained = {}

    def __call__(self, task: str, settings: dict, output: Path) -> dict:
        assert task == "classification"
        output.mkdir(parents=True)
        metrics = {"main_score": "accuracy", "greater_is_better": True, "is_share": True}
        if settings.get("do_train", True):
            self.trained[str(output)] = settings
            metrics["eval"] = {"eval_accuracy": -abs(settings["learning_rate"] - RATES[1])}
            (output / "model.safetensors").touch()
        else:
            used = self.trained[settings["model_name_or_path"]]
            images = Path(used["data"]["splits"]["train"]["list"]).read_text().split()
            metrics |= {"test": {"test_accuracy": len(images) + used["seed"] / 10}}
            metrics |= {"test_resampled": [], "test_cases": 2}
        return metrics


def test_first_seed_chooses_the_rate(plan, monkeypatch):
    command = FineTunings()
    monkeypatch.setattr("modeling_vitp.adaptation.comparison.run_fine_tuning", command)
    expected = [
        {"arm": "one layer", "rate": RATES[1], "all": 12 + seed / 10, "half": 6 + seed / 10} for seed in range(3)
    ]
    assert run(plan) == [{"seed": seed, **expected[seed]} for seed in range(2)]
    assert len(command.trained) == 5 and len({config["model_name_or_path"] for config in command.trained.values()}) == 2
    assert run(plan | {"seeds": [2]}) == [{"seed": seed, **expected[seed]} for seed in range(3)]
    assert len(command.trained) == 7
    assert not list(Path(plan["output_dir"]).glob("fine_tuning/**/*.safetensors"))


def test_bad_plans_stop_before_the_pretraining(plan, tmp_path):
    with pytest.raises(ValueError, match="objective.* finetuning: {data"):
        run(plan | {"arms": {"one layer": None, "masked": {"objective": "mae"}}})
    plan["finetuning"]["data"] = str(tmp_path / "nothing")
    with pytest.raises(ValueError, match=f"Folder {tmp_path / 'nothing'}"):
        run(plan)
    assert not list(tmp_path.glob("out/seed_*"))


@pytest.mark.slow
def test_scores_equal_those_of_the_command(plan, tmp_path):
    runs = run(plan)
    labels = read_labels(tmp_path / "classes", tmp_path / "lists")

    def alone(seed: int, rate: float, share: float) -> dict:
        """Fine-tune the backbone of a run by the command alone, and return its metrics."""
        output = tmp_path / f"alone_{seed}_{rate}_{share}"
        settings = SETTINGS | {
            "data": with_label_fraction(labels, share, seed, tmp_path / "lists"),
            "eval_split": "val",
            "test_split": "test",
            "model_name_or_path": str(tmp_path / "out" / f"seed_{seed}" / "one_layer" / "backbone"),
            "learning_rate": rate,
            "lr_scheduler_type": "cosine",
            "warmup_steps": 0.1,
            "weight_decay": 0.05,
            "max_steps": STEPS,
            "eval_strategy": "no",
            "report_to": "none",
            "seed": seed,
            "output_dir": str(output),
        }
        output.with_suffix(".yaml").write_text(yaml.safe_dump(settings))
        assert finetune_classification.main(["--config", str(output.with_suffix(".yaml"))]) == 0
        return json.loads((output / "metrics.json").read_text())

    tried = {rate: alone(0, rate, 1.0) for rate in RATES}
    rate = max(tried, key=lambda rate: tried[rate]["eval"]["eval_accuracy"])
    scores = [tried[rate], alone(0, rate, 0.5), alone(1, rate, 0.5)]
    scores = [metrics["test"]["test_accuracy"] for metrics in scores]
    assert [run["rate"] for run in runs] == [rate, rate]
    assert [runs[0]["all"], runs[0]["half"], runs[1]["half"]] == scores and len(set(scores)) > 1
    assert not list((tmp_path / "out" / "fine_tuning").rglob("*.safetensors"))
