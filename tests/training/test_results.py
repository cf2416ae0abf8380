"""Results are saved before the next step that may fail."""

import json
import math
import shlex
import warnings
from dataclasses import dataclass
from types import SimpleNamespace

import datasets
import pytest
import torch
import transformers
from huggingface_hub import ModelCard
from PIL import Image
from pushed_runs import train
from tiny_models import FROM_SCRATCH
from training_run import make_trainer
from transformers import PreTrainedConfig, Trainer, TrainerCallback, TrainingArguments
from transformers.integrations import deepspeed, is_deepspeed_zero3_enabled

from modeling_vitp import ViTPForConditionalGeneration, ViTPVisionModel
from modeling_vitp.pretraining.requirements import check_requirements
from modeling_vitp.pretraining.results import START, keep_start, next_commands
from modeling_vitp.pretraining.trainer import ViTPTrainer
from modeling_vitp.training import results
from modeling_vitp.training.base_trainer import BaseTrainer
from modeling_vitp.training.batching import GlobalBatchSampler
from modeling_vitp.training.checkpointing import attempt, write_whole
from modeling_vitp.training.config import BaseConfig
from modeling_vitp.training.results import draw_losses


def fail(*_, **__):
    raise TypeError("a bad\nday")


def test_run_by_length_exports_backbone(data_folder, tmp_path, from_scratch):
    assert train(tmp_path, **from_scratch, train_sampling_strategy="group_by_length") == 0
    assert json.loads((tmp_path / "out" / "metrics.json").read_text())["eval"]["eval_loss"] > 0
    assert (tmp_path / "out" / "backbone" / "model.safetensors").is_file()


def test_lora_run_from_scratch_writes_cards(data_folder, tmp_path, from_scratch):
    assert train(tmp_path, **from_scratch, use_peft=True, lora_r=2) == 0
    out = tmp_path / "out"
    for part in ("adapter", "backbone", ""):
        assert (out / part / "README.md").is_file()
    assert ViTPForConditionalGeneration.from_pretrained(out)
    assert "eval" in json.loads((out / "metrics.json").read_text())


def test_next_run_in_folder_drops_parts_of_earlier_run(data_folder, tmp_path, from_scratch):
    out, options = tmp_path / "out", {**from_scratch, "save_strategy": "no"}
    assert train(tmp_path, **options, use_peft=True, lora_r=2) == 0 and (out / "adapter").is_dir()
    for folder in (out, out / "backbone"):
        record = json.loads((folder / "run.json").read_text())
        record |= {"base_model": ["org/base"], "data": [{"dataset": "org/rows"}]}
        (folder / "run.json").write_text(json.dumps(record))
        card = ModelCard.load(folder / "README.md")
        card.data.base_model, card.data.datasets, card.data.language = ["org/base"], ["org/rows"], "de"
        card.save(folder / "README.md")
    (out / START).mkdir()
    (out / "predictions.png").touch()
    assert train(tmp_path, **options) == 0
    assert not any((out / name).exists() for name in ("adapter", START, "predictions.png"))
    for folder in (out, out / "backbone"):
        card = ModelCard.load(folder / "README.md")
        assert card.data.base_model is card.data.datasets is None and card.data.language == "de"


def test_sharded_lora_is_refused_before_training(tmp_path):
    trainer = make_trainer(tmp_path, lora=True)
    trainer.is_fsdp_enabled = True
    with pytest.raises(ValueError, match="LoRA.*FSDP"):
        results.train(trainer)
    assert trainer.state.global_step == 0


def test_kept_start_belongs_to_the_run(tmp_path):
    """A new run replaces the export of an earlier run; a resumed run keeps it."""

    def start(seed, **options):
        trainer = make_trainer(tmp_path, seed=seed, eval_strategy="no", max_steps=1, **options)
        weight = trainer.model.model.vision_tower.encoder.layer[0].mlp.fc1.weight
        with torch.no_grad():
            weight.normal_(generator=torch.Generator().manual_seed(seed))
        keep_start(trainer)
        kept = ViTPVisionModel.from_pretrained(tmp_path / START).encoder.layer[0].mlp.fc1.weight
        return trainer, torch.equal(kept, weight)

    first, is_own = start(0, save_strategy="no")
    first.train()
    assert is_own
    second, is_own = start(1, save_steps=1)
    second.train()
    assert is_own
    assert start(2)[1] is False


def test_failing_evaluation_comes_after_saving(data_folder, tmp_path, from_scratch, monkeypatch):
    monkeypatch.setattr(ViTPTrainer, "evaluate", fail)
    for name, more in [("full", {}), ("lora", {"use_peft": True, "lora_r": 2})]:
        (tmp_path / name).mkdir()
        with pytest.raises(TypeError):
            train(tmp_path / name, **from_scratch, **more)
        out = tmp_path / name / "out"
        assert ViTPForConditionalGeneration.from_pretrained(out)
        assert (out / "backbone" / "model.safetensors").is_file()
        assert json.loads((out / "metrics.json").read_text())["train"]["train_loss"] > 0


@pytest.mark.parametrize("what", ["draw_losses", "write_part_card"])
def test_failing_plot_or_card_is_status_1(data_folder, tmp_path, from_scratch, monkeypatch, caplog, what):
    monkeypatch.setattr(results, what, fail)
    assert train(tmp_path, **from_scratch) == 1
    lines = [record.getMessage() for record in caplog.records if record.levelname == "ERROR"]
    assert lines and all("The run is complete in" in line and "TypeError: a bad day." in line for line in lines)
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert metrics["eval"]["eval_loss"] > 0


def test_failing_model_card_is_status_1(data_folder, tmp_path, from_scratch, monkeypatch, caplog):
    monkeypatch.setattr("modeling_vitp.training.base_trainer.write_model_card", fail)
    assert train(tmp_path, **from_scratch) == 1
    assert "the card failed: TypeError: a bad day." in caplog.text


def test_file_is_written_atomically(tmp_path):
    write_whole(tmp_path / "a" / "metrics.json", "old")
    with pytest.raises(UnicodeEncodeError):
        write_whole(tmp_path / "a" / "metrics.json", "\ud800")
    assert (tmp_path / "a" / "metrics.json").read_text() == "old"
    assert attempt(tmp_path, "nothing", lambda: None) == 0


class Losses(torch.nn.Module):
    """Model that returns the given losses one after another."""

    def __init__(self, losses):
        super().__init__()
        self.weight, self.losses = torch.nn.Parameter(torch.zeros(())), iter(losses)
        self.config = PreTrainedConfig()

    def forward(self, x):
        return {"loss": 0 * self.weight + next(self.losses)}


@dataclass
class LossConfig(BaseConfig, TrainingArguments):
    pass


class LossTrainer(BaseTrainer, Trainer):
    def run_settings(self):
        return {"fixed": {}, "free": {}}

    def train_sampler(self):
        return GlobalBatchSampler(len(self.train_dataset), 1)

    def training_data(self):
        return None


@pytest.mark.parametrize(("logging_steps", "is_first"), [(10, True), (10, False), (500, False)])
def test_train_loss_is_the_mean_over_steps_and_processes(tmp_path, logging_steps, is_first):
    """A second process has three times the loss."""
    losses = [4.0] * 10 + [2.0] * 10 + [0.5] * 9
    args = LossConfig(
        str(tmp_path),
        max_steps=len(losses),
        logging_steps=logging_steps,
        logging_first_step=is_first,
        per_device_train_batch_size=1,
        report_to="none",
        save_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
        watch_samples=0,
    )
    trainer = LossTrainer(Losses(losses), args, train_dataset=[{"x": torch.zeros(1)}] * 40)
    trainer.accelerator.gather = lambda value: torch.stack([value, 3 * value])
    result = trainer.train()
    mean = trainer.mean_loss()["train_loss"]
    assert mean == pytest.approx(2 * sum(losses) / len(losses)) == result.metrics["train_loss"]


class Stop(TrainerCallback):
    def on_save(self, args, state, control, **kwargs):
        raise KeyboardInterrupt


@pytest.mark.parametrize("resume", [results.train, lambda trainer: {"train": trainer.train(True).metrics}])
def test_train_loss_of_resumed_run_has_all_steps(tmp_path, monkeypatch, resume):
    losses, training_step = [], ViTPTrainer.training_step

    def kept(*args, **kwargs):
        loss = training_step(*args, **kwargs)
        losses.append(loss.item())
        return loss

    monkeypatch.setattr(ViTPTrainer, "training_step", kept)
    options = {"eval_strategy": "no", "save_steps": 5, "logging_first_step": True}
    trainer = make_trainer(tmp_path, **options)
    trainer.add_callback(Stop())
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    trainer = make_trainer(tmp_path, **options)
    metrics = resume(trainer)
    assert [logs["step"] for logs in trainer.state.log_history if "loss" in logs] == [1, 3, 6]
    assert metrics["train"]["train_loss"] == pytest.approx(sum(losses) / 8)


@pytest.fixture
def from_scratch(data_folder):
    return {"from_scratch": FROM_SCRATCH, "dataset_name": str(data_folder), "max_steps": 1}


def reported_commands(output: str) -> list[list[str]]:
    assert len(output.splitlines()) <= 30
    return [shlex.split(line) for line in output.splitlines() if line.startswith("    vitp ")]


def test_report_of_a_pretraining(tmp_path, capsys):
    folder = tmp_path / "mein Ordner"
    (folder / "backbone").mkdir(parents=True)
    probe = {"scores": {"backbone": {"linear": {"patch_auc": 0.75}}}, "least_gain": {"linear": 0.0312}}
    metrics = {"train": {"train_loss": 1.5}, "eval": {"eval_loss": 0.25, "eval_runtime": 3.0}, "probe": probe}
    metrics["requirements"] = check_requirements({"probe.least_gain.linear": "> 0.02"}, metrics)
    assert results.report(metrics, folder, "vitp", next_commands(folder)) == 0
    output = capsys.readouterr().out
    rows = [line.split() for line in output.splitlines()]
    assert [
        ["train", "Loss", "1.5"],
        ["eval", "Loss", "0.25"],
        ["test", "AUROC", "of", "a", "linear", "probe", "0.75"],
    ] == rows[2:5]
    assert "passed: probe.least_gain.linear > 0.02: 0.031" in output and str(folder / "metrics.json") in output
    commands = reported_commands(output)
    assert [command[1] for command in commands] == ["finetune_segmentation", "pretrain", "push_to_hub"]
    assert all({str(folder), str(folder / "backbone")} & set(command) for command in commands)

    metrics["requirements"] = check_requirements({"probe.least_gain.linear": "> 0.04", "answers.x": "< 1"}, metrics)
    assert results.report(metrics, folder, "vitp", next_commands(folder)) == 1
    output = capsys.readouterr()
    assert "failed: probe.least_gain.linear" in output.out
    assert "probe.least_gain.linear" in output.err and "answers.x" in output.err


def test_report_of_a_fine_tuning(tmp_path, capsys):
    metrics = {"train": {"train_loss": 1.5}, "test": {"test_f1": 0.5, "test_accuracy": math.nan, "test_f1/a": 1.0}}
    assert results.report(metrics, tmp_path, "vitp_image_classification", ["vitp space FOLDER"]) == 0
    output = capsys.readouterr().out
    assert "0.5" in output and "f1/a" not in output and "nan" not in output
    assert reported_commands(output) == [["vitp", "space", "FOLDER"]]


def test_library_bars_are_hidden_for_a_step_only():
    libraries = transformers.utils.logging, datasets
    before = [library.is_progress_bar_enabled() for library in libraries]
    with results.no_library_bars():
        assert not any(library.is_progress_bar_enabled() for library in libraries)
    assert [library.is_progress_bar_enabled() for library in libraries] == before


def test_summary_shows_features_before_and_after(tmp_path, monkeypatch):
    trainer, widths = make_trainer(tmp_path, eval_strategy="no", max_steps=1, watch_samples=1), []
    results.train(trainer)
    for start_is_kept in (False, True):
        if start_is_kept:
            keep_start(trainer)
        assert results.finish(trainer) == 0
        widths.append(Image.open(tmp_path / "summary.png").width)
    assert widths[0] < widths[1]
    monkeypatch.setattr("modeling_vitp.pretraining.trainer.draw_summary", fail)
    assert results.finish(trainer) == 1


@pytest.mark.parametrize("log_history", [[], [{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.0, "eval_loss": 1.5}]])
def test_losses_of_any_length_are_drawn(log_history, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        draw_losses(log_history, tmp_path / "loss.png")
    assert Image.open(tmp_path / "loss.png").size == (660, 440)


def test_parts_are_saved_without_sharding_under_zero3(tmp_path, monkeypatch):
    """Under ZeRO-3, `from_pretrained` shards a model over all processes, but only the first one saves the parts."""
    trainer, seen, zero3 = make_trainer(tmp_path), [], SimpleNamespace(is_zero3=lambda: True)
    for name, result in (("train_or_resume", {}), ("save_model", None)):
        monkeypatch.setattr(trainer, name, lambda *args, result=result, **kwargs: result)
    monkeypatch.setattr(
        "modeling_vitp.pretraining.trainer.save_parts", lambda trainer: seen.append(is_deepspeed_zero3_enabled())
    )
    monkeypatch.setattr(deepspeed, "_hf_deepspeed_config_weak_ref", lambda: zero3)
    results.train(trainer)
    assert seen == [False]
