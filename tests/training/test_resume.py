"""Killed runs that are resumed."""

import functools
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
from training_run import kill_at_random_moments, make_trainer, run, summary

from modeling_vitp.pretraining.loading import build_tokenizer
from modeling_vitp.training.checkpointing import check_files, is_complete, last_checkpoint, publish_checkpoint

STAGES = ["model", "optimizer", "state", "before the record", "rotation"]
PERSISTENT = {"dataloader_num_workers": 2, "dataloader_persistent_workers": True}
WORKERS = {"0": {}, "2": {"dataloader_num_workers": 2}, "2 persistent": PERSISTENT}
LOADING = [(False, "0"), (False, "2 persistent"), (True, "2")]


@pytest.fixture(scope="module")
def whole_runs(tmp_path_factory):
    """Return a function that returns the summary of an uninterrupted run."""

    @functools.cache
    def whole(stream: bool, workers: str) -> dict:
        return run(tmp_path_factory.mktemp("whole"), stream=stream, **WORKERS[workers])

    return whole


@pytest.mark.slow
@pytest.mark.parametrize("stream", [False, True], ids=["map", "stream"])
def test_run_killed_again_and_again_is_exact(tmp_path, stream):
    options = {"stream": stream, **(PERSISTENT if stream else {})}
    whole = run(tmp_path / "whole", **options)
    folder = tmp_path / "killed"
    left = []
    for kill in [("optimizer", 2), ("step", 3), ("before the record", 6), ("rotation", 8)]:
        run(folder, kill, **options)
        last = last_checkpoint(folder)
        left.append(last and Path(last).name)
    assert left == [None, "checkpoint-2", "checkpoint-4", "checkpoint-8"]
    assert run(folder, **options) == whole
    assert whole["step"] == 8
    assert [entry["step"] for entry in whole["log"] if "loss" in entry] == [3, 6]
    assert all(0 < entry["padding_share"] < 1 for entry in whole["log"] if "loss" in entry)


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        {"activation_checkpointing": True, "activation_checkpointing_kwargs": {"every_n_layers": 2}},
        {"bf16": True},
        {"train_sampling_strategy": "group_by_length"},
        {"train_sampling_strategy": "batch_rebalance"},
        {"vrl_warmup_steps": 5, "answer_mask_ratio": 0.5},
        {"optim": "adamw_torch"},
    ],
    ids=lambda options: " ".join(map(str, [*options, *options.values()])),
)
def test_options_for_speed_resume_exactly(tmp_path, options):
    whole = run(tmp_path / "whole", **options)
    for kill in [("step", 3), ("state", 6)]:
        run(tmp_path / "killed", kill, **options)
    assert run(tmp_path / "killed", **options) == whole
    assert whole["step"] == 8


@pytest.mark.slow
@pytest.mark.parametrize(("stream", "workers"), LOADING)
def test_resume_at_end_of_epoch_is_exact(tmp_path, stream, workers):
    """An epoch has three steps. A stream has epochs too, but the trainer does not know their length."""
    options = {"stream": stream, "save_steps": 1, "save_total_limit": 20, **WORKERS[workers]}
    whole = run(tmp_path, **options)
    for step in (1, 3, 4, 6, 8):
        for path in tmp_path.glob("checkpoint-*"):
            if int(path.name.removeprefix("checkpoint-")) > step:
                shutil.rmtree(path)
        assert run(tmp_path, **options) == whole, step


@pytest.mark.slow
@pytest.mark.parametrize(("stream", "workers"), LOADING)
@pytest.mark.parametrize("stage", STAGES)
def test_run_killed_while_saving_is_exact(whole_runs, tmp_path, stream, workers, stage):
    run(tmp_path, (stage, 4), stream=stream, **WORKERS[workers])
    assert run(tmp_path, stream=stream, **WORKERS[workers]) == whole_runs(stream, workers)


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [{}, {"stream": True}, {"lora": True}, {"world": 2, "max_steps": 40}],
    ids=["map", "stream", "lora", "two processes"],
)
def test_run_killed_at_any_moment_is_exact(tmp_path, options):
    for folder in kill_at_random_moments(tmp_path, **{"save_steps": 1, "max_steps": 20} | options):
        manifest = json.loads((Path(last_checkpoint(folder)) / "checkpoint.json").read_text())
        assert all(manifest["data"].values())


def test_checkpoint_is_complete_with_all_files(tmp_path):
    checkpoint = tmp_path / "checkpoint-5"
    (checkpoint / "part").mkdir(parents=True)
    (checkpoint / "model.safetensors").write_bytes(b"weights")
    (checkpoint / "part" / "0.distcp").write_bytes(b"optimizer")
    (tmp_path / "checkpoint-20").mkdir()
    (tmp_path / "checkpoint-20" / "model.safetensors").write_bytes(b"half")
    (tmp_path / "checkpoint-30.bak").mkdir()
    assert last_checkpoint(tmp_path) is None
    publish_checkpoint(checkpoint, {"fixed": {}, "free": {}})
    assert last_checkpoint(tmp_path) == str(checkpoint)
    for name in ("model.safetensors", "part/0.distcp"):
        file = tmp_path / "checkpoint-5" / name
        content = file.read_bytes()
        file.write_bytes(content[:-1])
        assert not is_complete(tmp_path / "checkpoint-5")
        file.unlink()
        assert last_checkpoint(tmp_path) is None
        file.write_bytes(content)
    assert is_complete(tmp_path / "checkpoint-5")
    assert last_checkpoint(tmp_path / "nowhere") is None
    (tmp_path / "checkpoint-5" / "trainer_state.json").write_text("{}")
    check_files(tmp_path / "checkpoint-5")
    (tmp_path / "checkpoint-5" / "model.safetensors").write_bytes(b"weighty")
    assert is_complete(tmp_path / "checkpoint-5")
    with pytest.raises(ValueError, match="checkpoint-5/model.safetensors .*Delete"):
        check_files(tmp_path / "checkpoint-5")


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"seed": 1}, "seed was 42 and is 1"),
        ({"vrl_drop_ratio": 0.5}, "vrl_drop_ratio was 0.75 and is 0.5"),
        ({"answer_mask_ratio": 0.5}, "answer_mask_ratio was None and is 0.5"),
        ({"patch_drop_ratio": 0.5}, "patch_drop_ratio was None and is 0.5; patch_drop_end was None and is 0.1"),
        ({"color_jitter": {"gray": 0.2}}, "color_jitter was None"),
        ({"gradient_accumulation_steps": 1}, "global batch size was 4 and is 2"),
        ({"num_rows": 9}, "'rows' changed since .*--allow_changed_data"),
        ({"drop_path_rate": 0.0}, "drop_path_rate was 0.1 and is 0.0"),
    ],
    ids=str,
)
def test_changed_setting_is_refused(stopped, change, named):
    with pytest.raises(ValueError, match=named):
        make_trainer(stopped, **change).train(resume_from_checkpoint=True)


def test_changed_transform_or_tokenizer_is_refused(stopped):
    """The tokenizer of a model from scratch is trained on texts that may change."""
    trainer = make_trainer(stopped)
    trainer.data_collator.sample_transform = SimpleNamespace(settings={"map_share": 0.1})
    with pytest.raises(ValueError, match=r"sample_transform was None and is \{'map_share': 0.1\}"):
        trainer.train(resume_from_checkpoint=True)
    trainer = make_trainer(stopped)
    size = len(trainer.processing_class.tokenizer)
    trainer.processing_class.tokenizer = build_tokenizer(["Where do all the ships lie? In the harbor."], size)
    with pytest.raises(ValueError, match="tokenizer"):
        trainer.train(resume_from_checkpoint=True)


def test_unusable_checkpoint_is_refused(tmp_path):
    options = {"save_only_model": True, "save_steps": 1}
    make_trainer(tmp_path, max_steps=1, **options).train()
    with pytest.raises(ValueError, match="checkpoint-1 .*save_only_model"):
        make_trainer(tmp_path, max_steps=2, **options).train_or_resume()
    (tmp_path / "empty" / "checkpoint-3").mkdir(parents=True)
    with pytest.raises(ValueError, match="No complete checkpoint"):
        make_trainer(tmp_path / "empty").train(resume_from_checkpoint=True)
    with pytest.raises(ValueError, match="ignore_data_skip"):
        make_trainer(tmp_path, ignore_data_skip=True)


def test_changed_steps_and_batches_are_a_warning(stopped, tmp_path, caplog):
    shutil.copytree(stopped, tmp_path / "run")
    changed = {"max_steps": 2, "per_device_train_batch_size": 1, "gradient_accumulation_steps": 4}
    trainer = make_trainer(tmp_path / "run", **changed)
    trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == 2
    assert "max_steps was 1 and is 2; per_device_train_batch_size was 2 and is 1" in caplog.text


def test_summed_loss_is_the_mean_of_processes(tmp_path):
    options = {"eval_strategy": "no", "logging_steps": 2, "save_steps": 1, "save_total_limit": 2}
    whole = make_trainer(tmp_path, max_steps=2, **options)
    whole.train()
    shutil.rmtree(tmp_path / "checkpoint-2")
    checkpoint = tmp_path / "checkpoint-1"
    state, record = (json.loads((checkpoint / name).read_text()) for name in ("trainer_state.json", "checkpoint.json"))
    sums = state["stateful_callbacks"]["RunState"]["attributes"]
    (loss,) = sums["losses"]
    sums["losses"] = [loss + 1, loss - 1]  # as for two processes
    (checkpoint / "trainer_state.json").write_text(json.dumps(state))
    (checkpoint / "checkpoint.json").write_text(json.dumps(record | {"files": {}, "hashes": {}}))
    going_on = make_trainer(tmp_path, max_steps=2, **options)
    going_on.train(resume_from_checkpoint=True)
    assert summary(going_on) == summary(whole)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("optimizer.pt", b"?"),
        ("trainer_state.json", None),
        ("rng_state.pth", None),
        ("checkpoint.json", b"{"),
        ("checkpoint.json", b'{"files": {}, "settings": {}}'),
    ],
)
def test_damaged_checkpoint_file_is_named(stopped, tmp_path, name, content):
    checkpoint = tmp_path / "checkpoint-1"
    shutil.copytree(stopped / "checkpoint-1", checkpoint)
    (checkpoint / name).unlink()
    if content is not None:
        (checkpoint / name).write_bytes(content)
    with pytest.raises(ValueError, match=f"checkpoint-1.*{name}"):
        make_trainer(tmp_path).train(resume_from_checkpoint=str(checkpoint))


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stopped")
    make_trainer(folder, max_steps=1).train()
    return folder
