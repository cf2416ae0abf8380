"""Configurations of `vitp adapt` on a miniature of RSAR, with tiny models in the folders of the published ones."""

import json
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import yaml
from paths import CONFIGS
from prepared_folders import write_rsar
from vision_families import save_language_model, save_vit

from modeling_vitp import ViTPVisionConfig, ViTPVisionModel, export_backbone
from modeling_vitp.adaptation.arguments import LANGUAGE_MODEL
from modeling_vitp.adaptation.report import AdaptationReport
from modeling_vitp.recipes import adapt

STARTS = {"adapt_rsar_dinov2": "facebook/dinov2-base", "adapt_rsar_internvit": "models/InternViT-300M-448px-V2_5"}
VISION = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 48}
HEAD = {"neck_channels": 16, "head_hidden_size": 32, "rpn_candidates_train": 50, "rpn_candidates_eval": 50}
TINY = {"image_size": 64, "head": HEAD, "backbone": {"deformable_heads": 4, "spatial_prior_channels": 8}}
TINY |= {"dataloader_num_workers": 0, "bf16": False}
pytestmark = pytest.mark.slow


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Work in a folder with data and models, and return a function that runs a configuration with changes."""
    monkeypatch.chdir(tmp_path)
    write_rsar(tmp_path / "data")
    save_language_model(LANGUAGE_MODEL)
    save_vit(STARTS["adapt_rsar_dinov2"], "dinov2")
    vision = ViTPVisionConfig(**VISION, image_size=[56, 56], patch_size=[14, 14])
    export_backbone(ViTPVisionModel(vision), STARTS["adapt_rsar_internvit"])

    def run_configuration(name: str, *options: str, **changes) -> Path:
        settings = yaml.safe_load((CONFIGS / f"{name}.yaml").read_text())
        assert (settings["data"], settings["start"]) == ("rsar", STARTS[name])
        settings["fine_tuning"] |= TINY
        settings["pretraining"] |= {"bf16": False, "watch_samples": 0}
        Path("tiny.yaml").write_text(yaml.safe_dump(settings | changes))
        assert adapt.main(["--config", "tiny.yaml", *options]) == 0
        return Path(settings["output_dir"])

    return run_configuration


@pytest.mark.parametrize("name", STARTS)
def test_dry_run_plans_without_weights(run, name, capsys):
    for path in Path(STARTS[name]).glob("*.safetensors"):
        path.unlink()
    (Path(LANGUAGE_MODEL) / "model.safetensors").unlink()
    output, printed = run(name, "--dry_run"), capsys.readouterr().out
    assert "The given splits train, val and test are kept: 12 images for training, 4 for validation" in printed
    assert "8000 steps of pretraining" in printed and "vrl_drop_ratio 0.75" in printed
    # Four backbones, each with the other rate of the choice, and three seeds with all and with a tenth of the labels.
    assert f"{4 * (1 + 3 * 2)} fine-tunings of 12000 steps, seeds [0, 1, 2]" in printed
    assert "8,000 steps of 8 samples take" in printed and "hours of 12,000 steps" in printed
    assert printed.count("One of 1 device(s), a100, 80 GiB") == 2 and "assumed" not in printed
    assert "A step has 8 samples of 64 x 64 pixels, 2 at once" in printed
    ids = pq.read_table(output / "instructions" / "train" / "train-00000.parquet", columns=["id"])["id"].to_pylist()
    # One image has a box that cannot be used; each other one also gives a collage.
    assert ids[:11] == [f"train/{number:07d}" for number in range(2, 13)] and len(ids) == 2 * 11
    assert not (output / "pretraining").exists() and not (output / "bundle").exists()


def test_two_steps_end_in_a_report(run, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)  # tests/adaptation/test_bundle.py exports
    tiny = {"steps": 2, "fine_tuning_steps": 2, "seeds": [0], "learning_rates": [1e-4], "label_fractions": [1.0]}
    output = run("adapt_rsar_dinov2", "--force", **tiny | {"baselines": ["start"]})
    report = AdaptationReport.load(output / "bundle")
    assert (report.task, report.metric, report.start) == ("detection", "map", "dinov2-base")
    assert [(entry["model"], entry["labels"], entry["seed"]) for entry in report.fine_tuned] == [
        ("adapted", 1.0, 0),
        ("dinov2-base", 1.0, 0),
    ]
    assert report.plan["vrl_drop_ratio"] == 0.75 and report.verdict.startswith("Not decided")
    trained = json.loads((output / "fine_tuning/dinov2-base/labels_100_rate_0.0001_seed_0/metrics.json").read_text())
    assert trained["train_images"] == 12 and "eval_map" in trained["eval"] and "test" not in trained
