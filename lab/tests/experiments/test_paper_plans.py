"""Plans of the paper's ablations: each variant is resolved, and one plan is run at a tiny scale."""

import json
from pathlib import Path

import pytest
import yaml
from detection_data import NAMES, write_dota
from paths import CONFIGS
from paths import PLANS as PLANS_FOLDER
from pictures import picture
from tiny_models import FROM_SCRATCH
from trl import ModelConfig

from lab.experiments import experiment
from lab.experiments.arguments import ExperimentArguments
from lab.experiments.variants import Experiment
from modeling_vitp.instructions.mixture import load_mixture
from modeling_vitp.pretraining.arguments import SFT_MODULES, PretrainArguments, VRLArguments
from modeling_vitp.pretraining.options import CLASSES
from modeling_vitp.tasks import TASKS
from modeling_vitp.tasks.options import make_options
from modeling_vitp.training.command_line import parse

PLANS = sorted(PLANS_FOLDER.glob("experiment_paper_*.yaml"))
# Sources that an arm leaves out: those of the first are the paper's, section 5.1.
GROUPS = {
    "without diversity": {"million_aid", "gaia", "levir_cc", "vhm", "vrsbench", "rsvg"},
    "without SAR": {"isprs_sar", "sar_sentinel_1_2"},
    "without grounding": {"geochat", "vrsbench", "rsvg", "dior_rsvg"},
    "without general data": {"mini_internvl_general"},
}
HEAD = {"neck_channels": 16, "head_hidden_size": 32, "anchor_scale": 4, "roi_samples": 32, "rpn_candidates_train": 60}
HEAD |= {"rpn_proposals_train": 30, "rpn_candidates_eval": 30, "rpn_proposals_eval": 20}


def open_plan(config: Path, tmp_path: Path, **changes) -> Experiment:
    plan = yaml.safe_load(config.read_text()) | {"output_dir": str(tmp_path)}
    return Experiment(ExperimentArguments(**plan | changes))


def parsed(config: dict, tmp_path: Path) -> tuple:
    """Return the pretraining arguments of the configuration of an arm."""
    (tmp_path / "arm.yaml").write_text(yaml.safe_dump(config))
    own = PretrainArguments, VRLArguments, ModelConfig
    return parse(["--config", str(tmp_path / "arm.yaml")], "", own, CLASSES, SFT_MODULES)


@pytest.mark.parametrize("config", PLANS, ids=lambda path: path.stem)
def test_every_arm_is_resolved(config, tmp_path, monkeypatch):
    plan = open_plan(config, tmp_path)
    monkeypatch.chdir(tmp_path)
    for name in ("models/InternVL2_5-1B", "models/InternVL2_5-4B", "models/InternVL2_5-1B-vit", "backbone"):
        Path(name).mkdir(parents=True)
    for name in ("Qwen/Qwen2.5-0.5B-Instruct", "Qwen/Qwen2.5-1.5B-Instruct"):
        Path(name).mkdir(parents=True)
    assert plan.args.control in plan.args.arms and "Not run at this scale" in config.read_text()
    whole = {source.name for source in load_mixture(CONFIGS / "remote_sensing_paper.yaml").sources}
    for arm in plan.args.arms:
        args, training_args, model_args = parsed(plan.config(arm, 0, tmp_path / "arm"), tmp_path)
        starts = model_args.model_name_or_path, args.language_model
        assert sum(start is not None for start in starts) == 1 and training_args.global_batch_size == 128
        assert arm.split()[1] != "steps" or training_args.max_steps == max(int(arm.split()[0]), 1)
        assert not arm.startswith("r = ") or training_args.vrl_drop_ratio == float(arm.split()[2])
        removed = whole - {source.name for source in load_mixture(args.mixture).sources}
        assert removed == GROUPS.get(arm, set())

    fine_tunings = []

    def run_fine_tuning(task, settings, folder):
        folder.mkdir(parents=True)
        fine_tunings.append(settings)
        metrics = {"main_score": "map", "greater_is_better": True, "is_share": True, "test": {"test_map": 0.5}}
        return metrics | {"test_resampled": [], "test_cases": 2}

    monkeypatch.setattr("modeling_vitp.adaptation.comparison.run_fine_tuning", run_fine_tuning)
    plan.args.finetuning.label_shares = []  # they need the labels
    assert plan.fine_tune(plan.args.control, 0, Path("backbone"))["labels_100"] == 0.5
    for settings in fine_tunings:
        options = make_options(TASKS["detection"], settings | {"output_dir": str(tmp_path / "run")})
        args, training_args = options.data, options.training
        is_efficiency = "labels" in config.stem
        assert args.train_splits == (["train"] if is_efficiency else ["val"]) and args.task == "oriented"
        assert training_args.num_train_epochs == (36 if is_efficiency else 12)
        assert training_args.max_steps == -1 and training_args.learning_rate == 2.5e-5
    assert fine_tunings[0]["model_name_or_path"] == "backbone" and fine_tunings[1]["test_split"] == "test"


def test_invalid_plans_are_named(tmp_path):
    config = PLANS_FOLDER / "experiment_paper_mixtures.yaml"
    finetuning = yaml.safe_load(config.read_text())["finetuning"]

    def says(message: str, **changes):
        with pytest.raises(ValueError, match=message):
            open_plan(config, tmp_path, **changes)

    says("arm 'all data'.*rsvgg", arms={"all data": {"without_sources": ["rsvgg"]}})
    says("finetuning.*steps", finetuning={"data": str(tmp_path), "learning_rates": [1e-4]})
    says("learning_rates.*eval_split", finetuning=finetuning | {"learning_rates": [1e-5, 1e-4]})
    says("label_shares.*train_splits", finetuning=finetuning | {"label_shares": [0.1]})
    says("finetune_detection.*'task'.*loveda", finetuning=finetuning | {"data": "loveda"})


@pytest.mark.slow
def test_plan_runs_at_a_tiny_scale(tmp_path):
    """Run pretraining on a mixture and detection as one arm, with all and with half of the labels."""
    sources = []
    for name in ("vhm", "isprs_sar"):
        (tmp_path / name).mkdir()
        for number in range(4):
            picture(60, 50, number).save(tmp_path / name / f"{number}.png")
            (tmp_path / name / f"{number}.txt").write_text(f"Field number {number} beside a road.")
        sources.append({"name": name, "folder": name})
    tiny = {"max_steps": 2, "per_device_train_batch_size": 2, "watch_samples": 0, "bf16": False, "report_to": "none"}
    base = tiny | {"from_scratch": FROM_SCRATCH, "mixture": {"root": str(tmp_path), "sources": sources}}
    (tmp_path / "base.yaml").write_text(yaml.safe_dump(base))
    numbers = {"train": range(6), "val": range(6, 9), "test": range(9, 12)}
    for split, part in numbers.items():
        write_dota(tmp_path / "ships" / split, [f"a_{number:03}" for number in part])
    splits = {split: {"images": f"{split}/images", "annotations": f"{split}/annfiles"} for split in numbers}
    data = {"root": str(tmp_path / "ships"), "format": "dota", "classes": NAMES, "splits": splits}
    settings = {name: value for name, value in tiny.items() if name != "max_steps"}
    settings |= {"task": "oriented", "test_split": "test", "image_size": 64, "neck": "pyramid", "num_pictures": 0}
    settings |= {"backbone": {"pyramid_channels": 16}, "head": HEAD, "data": data}
    (tmp_path / "ships.yaml").write_text(yaml.safe_dump(settings))

    plan = yaml.safe_load((PLANS_FOLDER / "experiment_paper_labels.yaml").read_text())
    plan["finetuning"] |= {"data": str(tmp_path / "ships.yaml"), "settings": {"num_train_epochs": 2}}
    plan["finetuning"]["label_shares"] = [0.5]
    plan |= {"base": str(tmp_path / "base.yaml"), "output_dir": str(tmp_path / "out"), "control": "all"}
    plan["arms"] = {"all": None, "without SAR": {"without_sources": ["isprs_sar"]}}
    plan["measures"] = {"mAP": "finetuning.labels_100", "half": "finetuning.labels_50"}
    (tmp_path / "plan.yaml").write_text(yaml.safe_dump(plan))
    assert experiment.main(["--config", str(tmp_path / "plan.yaml")]) == 0
    runs = json.loads((tmp_path / "out" / "metrics.json").read_text())["runs"]
    assert [run["arm"] for run in runs] == ["all", "without SAR"]
    for run, arm in zip(runs, ("all", "without_sar")):
        folder = tmp_path / "out" / "fine_tuning" / arm
        for measure, name in (("mAP", "labels_100"), ("half", "labels_50")):
            output = folder / f"{name}_rate_2.5e-05_seed_0"
            tested = json.loads((output / "test" / "metrics.json").read_text())["test"]
            trained = json.loads((output / "metrics.json").read_text())
            assert run[measure] == tested["test_map"]
            assert trained["train_images"] == (6 if measure == "mAP" else 3) and "eval" not in trained
    read = yaml.safe_load((tmp_path / "out" / "seed_0" / "without_sar.yaml").read_text())["mixture"]["sources"]
    assert [source["name"] for source in read] == ["vhm"]
