"""Results are saved before the next step that may fail."""

import json
import shlex
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
from huggingface_hub import ModelCard
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
from modeling_vitp.training.checkpointing import write_whole
from modeling_vitp.training.config import BaseConfig


def fail(*_, **__):
    raise TypeError("a bad\nday")


@pytest.mark.slow
def test_next_run_in_folder_drops_parts_of_earlier_run(data_folder, tmp_path, from_scratch):
    out, options = tmp_path / "out", {**from_scratch, "save_strategy": "no"}
    assert train(tmp_path, **options, use_peft=True, lora_r=2) == 0
    assert all((out / part / "README.md").is_file() for part in ("adapter", "backbone", ""))
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
    for seed, options, is_own in ((0, {"save_strategy": "no"}, True), (1, {"save_steps": 1}, True), (2, {}, False)):
        trainer = make_trainer(tmp_path, seed=seed, eval_strategy="no", max_steps=1, **options)
        weight = trainer.model.model.vision_tower.encoder.layer[0].mlp.fc1.weight
        with torch.no_grad():
            weight.normal_(generator=torch.Generator().manual_seed(seed))
        keep_start(trainer)
        kept = ViTPVisionModel.from_pretrained(tmp_path / START).encoder.layer[0].mlp.fc1.weight
        assert torch.equal(kept, weight) == is_own
        if is_own:
            trainer.train()


def test_failing_evaluation_comes_after_saving(data_folder, tmp_path, from_scratch, monkeypatch, caplog):
    monkeypatch.setattr(ViTPTrainer, "evaluate", fail)
    caplog.set_level("INFO", "modeling_vitp")
    with pytest.raises(TypeError):
        train(tmp_path, **from_scratch, use_peft=True, lora_r=2)
    assert "Scoring the eval split" in caplog.text  # announced before it begins
    out = tmp_path / "out"
    assert ViTPForConditionalGeneration.from_pretrained(out)
    assert (out / "backbone" / "model.safetensors").is_file() and (out / "adapter").is_dir()
    assert json.loads((out / "metrics.json").read_text())["train"]["train_loss"] > 0


@pytest.mark.parametrize(
    "what",
    ["results.draw_losses", "results.write_part_card", "base_trainer.write_model_card"],
)
def test_failing_plot_or_card_is_status_1(data_folder, tmp_path, from_scratch, monkeypatch, caplog, what):
    monkeypatch.setattr(f"modeling_vitp.training.{what}", fail)
    assert train(tmp_path, **from_scratch) == 1
    assert "TypeError: a bad day." in caplog.text
    assert json.loads((tmp_path / "out" / "metrics.json").read_text())["eval"]["eval_loss"] > 0


def test_file_is_written_atomically(tmp_path):
    file = tmp_path / "a" / "metrics.json"
    write_whole(file, "old")
    with pytest.raises(UnicodeEncodeError):
        write_whole(file, "\ud800")
    assert file.read_text() == "old"


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


@pytest.mark.parametrize(("logging_steps", "is_first"), [(10, True), (500, False)])
def test_train_loss_is_the_mean_over_steps_and_processes(tmp_path, logging_steps, is_first):
    """A second process has three times the loss."""
    losses = [4.0] * 10 + [2.0] * 10 + [0.5] * 9
    settings = {"max_steps": len(losses), "logging_steps": logging_steps, "logging_first_step": is_first}
    settings |= {"report_to": "none", "save_strategy": "no", "disable_tqdm": True, "watch_samples": 0}
    args = LossConfig(str(tmp_path), per_device_train_batch_size=1, use_cpu=True, **settings)
    trainer = LossTrainer(Losses(losses), args, train_dataset=[{"x": torch.zeros(1)}] * 40)
    trainer.accelerator.gather = lambda value: torch.stack([value, 3 * value])
    result = trainer.train()
    mean = trainer.mean_loss()["train_loss"]
    assert mean == pytest.approx(2 * sum(losses) / len(losses)) == result.metrics["train_loss"]


class Stop(TrainerCallback):
    def on_save(self, args, state, control, **kwargs):
        raise KeyboardInterrupt


@pytest.mark.slow
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


def test_report_of_a_pretraining(tmp_path, capsys):
    folder = tmp_path / "mein Ordner"
    (folder / "backbone").mkdir(parents=True)
    metrics = {"eval": {"eval_loss": 0.25}, "probe": {"least_gain": {"linear": 0.0312}}}
    metrics["requirements"] = check_requirements({"probe.least_gain.linear": "> 0.02"}, metrics)
    assert results.report(metrics, folder, "vitp", next_commands(folder)) == 0
    commands = [shlex.split(line) for line in capsys.readouterr().out.splitlines() if line.startswith("    vitp ")]
    assert [command[1] for command in commands] == ["finetune_segmentation", "pretrain", "push_to_hub"]
    assert all({str(folder), str(folder / "backbone")} & set(command) for command in commands)

    metrics["requirements"] = check_requirements({"probe.least_gain.linear": "> 0.04", "answers.x": "< 1"}, metrics)
    assert results.report(metrics, folder, "vitp", next_commands(folder)) == 1
    errors = capsys.readouterr().err
    assert "probe.least_gain.linear" in errors and "answers.x" in errors


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
