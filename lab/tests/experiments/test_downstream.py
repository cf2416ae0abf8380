"""The backbone experiment with tiny models and few steps."""

import json
from pathlib import Path

import pytest
import torch
import yaml
from datasets import load_dataset
from paths import AERIAL_TREES, LAB_CONFIGS, PLANS, TREES_BASE
from transformers import AutoModel

from lab.experiments import experiment
from lab.experiments.arguments import ExperimentArguments, slug
from lab.experiments.variants import Experiment
from lab.trees import downstream, evaluation
from lab.trees.downstream import Downstream
from modeling_vitp.training.checkpointing import RECORD_NAME

pytestmark = pytest.mark.slow
TINY = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
ARMS = {
    "random weights": {"objective": "none"},
    "MAE": {"objective": "mae", "max_steps": 3},
    "supervised": {"objective": "masks"},
    "ViTP": None,
    "a tenth": {"label_share": 0.1},
}
RATES, DECAYS = [1e-4, 1e-3, 1e-2], [1.0, 0.75]


def plan_in(folder: Path, **changes) -> dict:
    """Return the plan of the repository with small models and two steps."""
    base = yaml.safe_load(TREES_BASE.read_text())
    base |= {"max_steps": 2, "eval_steps": 2, "save_steps": 2, "per_device_train_batch_size": 2, "logging_steps": 1}
    base |= {"dataset_name": str(AERIAL_TREES), "dataloader_num_workers": 0, "dataloader_persistent_workers": False}
    base["watch_samples"] = 0
    base["from_scratch"]["vision_config"] |= TINY
    base["from_scratch"]["text_config"] |= TINY | {"num_key_value_heads": 2}
    (folder / "base.yaml").write_text(yaml.safe_dump(base))
    finetuning = yaml.safe_load((LAB_CONFIGS / "aerial_trees.yaml").read_text())
    finetuning |= {"max_steps": 2, "per_device_train_batch_size": 2, "crop_size": 64, "bf16": False}
    finetuning["watch_samples"] = 0
    finetuning["backbone"]["pyramid_channels"] = finetuning["head"]["hidden_size"] = 4
    (folder / "finetuning.yaml").write_text(yaml.safe_dump(finetuning))
    plan = yaml.safe_load((PLANS / "experiment_backbone.yaml").read_text())
    plan |= {"base": str(folder / "base.yaml"), "output_dir": str(folder / "out"), "seeds": [0], "arms": ARMS}
    plan["finetuning"] |= {"config": str(folder / "finetuning.yaml"), "learning_rates": RATES, "layer_decays": DECAYS}
    return plan | changes


class Finetunings:
    """Return a score of arm, rate and decay, and record the settings."""

    def __init__(self):
        self.seen = []

    def __call__(self, argv: list[str]) -> int:
        config = yaml.safe_load(Path(argv[1]).read_text())
        output, data = Path(config["output_dir"]), Path(config["data"]["root"])
        backbone, rate, decay = Path(config["model_name_or_path"]), config["learning_rate"], config["layer_decay"]
        arm = backbone.parent.name
        windows = {split: {path.stem for path in (data / split / "images").iterdir()} for split in ("train", "test")}
        assert AutoModel.from_pretrained(backbone).config.hidden_size == 32
        self.seen.append(
            {"arm": arm, "rate": rate, "decay": decay, "tunes": output.parents[2].name == "tuning", **windows}
        )
        best = RATES[(len(arm) + (decay < 1)) % 3]
        (output / "model.safetensors").touch()
        iou = 0.5 + 0.1 * (rate == best)
        (output / "metrics.json").write_text(json.dumps({"test": {downstream.SCORE: iou}}))
        return 0


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Run the experiment without probes and return its folder, metrics and recorded fine-tuning runs."""
    folder, finetunings = tmp_path_factory.mktemp("experiment"), Finetunings()
    plan = plan_in(folder, probe_label_shares=[], measures={"IoU": "finetuning.layer_decay_75.labels_10"})
    args = ExperimentArguments(**plan)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluation, "evaluate", lambda *args: {"checks": [], "passed": True})
        texts = ["How many trees are there?", "Map the trees."]  # Controls have no questions.
        patch.setattr("modeling_vitp.instructions.rows.sample_texts", lambda *args: texts)
        patch.setattr("lab.experiments.controls.probe_backbone", lambda *args: {})
        patch.setattr("modeling_vitp.recipes.finetune_segmentation.main", finetunings)
        metrics = Experiment(args, Downstream(args)).run()
        patch.setattr("lab.trees.pretrain.main", None)
        again = Experiment(args, Downstream(args)).run()
    assert again == metrics
    return folder / "out", metrics, finetunings.seen


def test_arms_start_from_the_same_weights(finished):
    out, _, _ = finished
    weights = {
        (arm, name): AutoModel.from_pretrained(out / "seed_0" / slug(arm) / name).state_dict()
        for arm in ARMS
        for name in ("backbone_at_start", "backbone")
    }
    start = weights["ViTP", "backbone_at_start"]
    for (arm, name), found in weights.items():
        is_same = all(torch.equal(value, start[key]) for key, value in found.items())
        assert is_same == (name == "backbone_at_start" or arm == "random weights"), (arm, name)


def test_arms_record_only_their_settings(finished):
    out, _, _ = finished
    base = yaml.safe_load((out.parent / "base.yaml").read_text())
    for arm, settings in ARMS.items():
        folder = out / "seed_0" / slug(arm)
        config = yaml.safe_load(folder.with_name(f"{folder.name}.yaml").read_text())
        told = {"output_dir": str(folder), "seed": 0, **(settings or {})}
        if told.pop("label_share", None):
            told["dataset_name"] = str(folder / "labeled")
        assert config == base | told
    records = {}
    for arm, step in (("MAE", 3), ("supervised", 2), ("ViTP", 2)):
        path = out / "seed_0" / slug(arm) / f"checkpoint-{step}" / RECORD_NAME
        records[arm] = json.loads(path.read_text())["settings"]
    free = {arm: {k: v for k, v in record["free"].items() if k != "max_steps"} for arm, record in records.items()}
    assert all(free["ViTP"][name] == value for name, value in free["MAE"].items())
    assert free["MAE"] == free["supervised"]
    objectives = {arm: record["fixed"].pop("objective", None) for arm, record in records.items()}
    assert objectives == {"MAE": "MaskedAutoencoder", "supervised": "PatchClassifier", "ViTP": None}
    assert records["MAE"]["fixed"] == records["supervised"]["fixed"]
    assert records["ViTP"]["fixed"]["data_seed"] == records["MAE"]["fixed"]["data_seed"] == 0


def test_rates_are_chosen_on_held_out_ground(finished):
    out, metrics, seen = finished
    tuning = {slug(arm): found for arm, found in metrics["tuning"].items()}
    for arm in map(slug, ARMS):
        chosen = tuning[arm]["chosen"]
        assert chosen == {"layer_decay_100": RATES[len(arm) % 3], "layer_decay_75": RATES[(len(arm) + 1) % 3]}
        final = [(run["decay"], run["rate"]) for run in seen if run["arm"] == arm and not run["tunes"]]
        assert sorted(final) == sorted([(1.0, chosen["layer_decay_100"]), (0.75, chosen["layer_decay_75"])] * 2)
    assert len([run for run in seen if run["tunes"]]) == len(ARMS) * len(RATES) * len(DECAYS)
    held_out = {"yellowstone_0_1960", "yellowstone_392_1960", "yellowstone_777_1960"}
    splits = load_dataset(str(AERIAL_TREES))
    test = {name.replace("/", "_") for name in splits["test"]["id"]}
    assert all(run["test"] <= (held_out if run["tunes"] else test) for run in seen)
    assert not any(run["tunes"] and run["train"] & held_out for run in seen)
    trained = load_dataset(str(out / "tuning" / "held_out"))
    assert not {name.replace("/", "_") for name in trained["train"]["id"]} & held_out and len(trained["train"]) == 14
    assert {run["IoU"] for run in metrics["runs"]} == {0.6}


def test_few_labels_are_the_same_windows(finished):
    out, _, seen = finished
    labeled = {name.replace("/", "_") for name in load_dataset(str(out / "seed_0/a_tenth/labeled"))["train"]["id"]}
    few = [run["train"] for run in seen if not run["tunes"] and len(run["train"]) < 20]
    assert len(few) == 2 * len(ARMS) and all(windows == labeled for windows in few)


def test_scenes_that_an_arm_leaves_out(tmp_path, monkeypatch, quick_probe):
    monkeypatch.setattr(evaluation, "evaluate", lambda *args: {"checks": [], "passed": True})
    monkeypatch.setattr("lab.trees.evaluation.PROBE_VIEWS", 1)
    measures = {
        f"{where}{name}": f"other_scenes.osbs_029.{where}{path}"
        for where in ("", "fitted_there.")
        for name, path in (
            ("AUC", "scores.backbone.linear.patch_auc"),
            ("AUC of pixels", "scores.pixels of a patch.linear.patch_auc"),
            ("lead over pixels", "gains.linear.pixels of a patch"),
        )
    }
    arms = {"fewer scenes": {"without_scenes": ["osbs_029"]}}
    plan = plan_in(tmp_path, arms=arms, control="fewer scenes", probe_label_shares=[], measures=measures)
    args = ExperimentArguments(**{**plan, "finetuning": None})
    (run,) = Experiment(args, Downstream(args)).run()["runs"]
    folder = tmp_path / "out" / "seed_0" / "fewer_scenes"
    assert set(load_dataset(str(folder / "labeled"))["train"]["scene"]) == {"yellowstone", "soap_061"}
    assert len([*(folder / "other_scenes" / "data" / "train" / "images").iterdir()]) == 19
    for where in ("", "fitted_there."):
        scores, pixels = run[f"{where}AUC"], run[f"{where}AUC of pixels"]
        assert run[f"{where}lead over pixels"] == pytest.approx(scores - pixels) and 0 < scores != pixels
    assert run["fitted_there.AUC of pixels"] > run["AUC of pixels"]


@pytest.mark.slow
def test_whole_experiment(tmp_path, capsys, monkeypatch, quick_probe):
    arms = {name: ARMS[name] for name in ("random weights", "MAE", "a tenth")}
    plan = plan_in(tmp_path, arms=arms, corruption_severities=[5], probe_color_jitter={"gray": 1.0})
    plan["finetuning"] |= {"learning_rates": [1e-3]}
    plan["measures"] |= {"corrupted": "corruptions.linear.patch_auc.relative"}
    plan["measures"] |= {"gray": "color_probe.second_scene.scores.backbone.linear.patch_auc"}
    folder = "lab.trees"
    names = ("evaluation.PROBE_VIEWS", "downstream.PROBE_VIEWS", "answers.NUM_SAMPLES", "answers.NUM_MAPS")
    for name in (*names, "answers.VIEWS_PER_WINDOW"):
        monkeypatch.setattr(f"{folder}.{name}", 1)
    (tmp_path / "plan.yaml").write_text(yaml.safe_dump(plan, sort_keys=False))
    assert experiment.main(["--config", str(tmp_path / "plan.yaml")]) == 0
    shown = capsys.readouterr().out
    assert all(f"| {arm} |" in shown for arm in arms)
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert len(metrics["runs"]) == 3
    for run in metrics["runs"]:
        assert all(0 <= run[measure] <= 1.5 for measure in plan["measures"])
