"""Pushes during training: `push_to_hub` and `hub_strategy` of a recipe."""

import json
import logging
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from pushed_runs import card_of, train

from modeling_vitp import ViTPForConditionalGeneration, ViTPTrainer, ViTPTrainingConfig
from modeling_vitp.hub.files import model_files
from modeling_vitp.recipes import push_to_hub

STEPS = ["Training in progress, step 2", "Training in progress, step 1"]


@pytest.fixture
def folder(model_and_processor, tmp_path):
    """Model folder without a record of a run."""
    for part in model_and_processor:
        part.save_pretrained(tmp_path / "run")
    return tmp_path / "run"


@pytest.fixture
def settings(hub, logged_in, folder, data_folder):
    """Return the settings of a run that pushes and waits for each previous push."""
    settings = {"model_name_or_path": str(folder), "dataset_name": str(data_folder), "push_to_hub": True}
    return settings | {"hub_model_id": "tester/trained", "hub_always_push": True}


def summaries(hub) -> list[str]:
    return [commit["summary"] for _, commit in hub.repo("tester/trained").history("main")][:-1]


@pytest.mark.parametrize(
    ("strategy", "checkpoints"),
    [
        pytest.param("checkpoint", {"last-checkpoint"}, marks=pytest.mark.slow),
        ("all_checkpoints", {"checkpoint-1", "checkpoint-2"}),
    ],
)
def test_hub_strategies_push_expected_files(hub, settings, tmp_path, strategy, checkpoints):
    assert train(tmp_path, **settings, hub_strategy=strategy, save_total_limit=1) == 0
    assert summaries(hub)[0] == "End of training"
    in_progress = [text for text in summaries(hub)[1:] if not text.endswith("checkpoint")]
    assert in_progress == STEPS
    files, out = hub.files("tester/trained"), tmp_path / "out"
    kept = {path.split("/")[0] for path in files if "/" in path}
    assert kept == checkpoints
    assert {path for path in files if "/" not in path} == {".gitattributes", *model_files(out)}
    assert not any("training_args" in path for path in files) and not (out / "_pushing").exists()
    for name in checkpoints:
        assert {f"{name}/optimizer.pt", f"{name}/model.safetensors", f"{name}/checkpoint.json"} <= set(files)


@pytest.mark.slow
def test_failed_push_does_not_stop_training(hub, settings, tmp_path, caplog, pauses):
    hub.fail("POST", "*/commit/main", 403)
    assert train(tmp_path, **settings, max_steps=1) == 0
    assert summaries(hub) == ["End of training"]
    assert "A push failed" in caplog.text

    hub.fail("POST", "*/commit/*", 500, times=None)
    caplog.clear()
    settings |= {"hub_model_id": "tester/second", "output_dir": str(tmp_path / "second"), "hub_strategy": "end"}
    settings |= {"hub_private_repo": True, "hub_revision": "v2"}
    assert train(tmp_path, **settings, max_steps=1) == 1
    (error,) = [record.getMessage() for record in caplog.records if record.levelno == logging.ERROR]
    command = f"vitp push_to_hub {tmp_path / 'second'} tester/second --what model --revision v2 --private"
    assert "500" in error and error.endswith(command)
    assert (tmp_path / "second" / "metrics.json").is_file() and (tmp_path / "second" / "backbone").is_dir()
    hub.failures.clear()
    assert push_to_hub.main(command.split()[2:]) == 0
    assert hub.files("tester/second", "v2")["model.safetensors"] == (tmp_path / "second/model.safetensors").read_bytes()


@pytest.mark.slow
def test_background_push_is_retried_and_deletes_stale_weights(hub, settings, tmp_path, pauses):
    stale = {"model-00001-of-00002.safetensors": b"old", "model.safetensors.index.json": b"{}", "notes.txt": b"kept"}
    hub.create("tester/trained", stale)
    failure = hub.fail("POST", "*/commit/main", 500)
    assert train(tmp_path, **settings, max_steps=1) == 0
    assert failure.count == 1 and pauses == [1]
    assert summaries(hub)[:2] == ["End of training", "Training in progress, step 1"]
    files = hub.files("tester/trained")
    assert files.keys() & stale.keys() == {"notes.txt"}
    assert files["model.safetensors"] == (tmp_path / "out" / "model.safetensors").read_bytes()


def test_secret_in_the_output_folder_is_not_pushed(hub, settings, tmp_path, caplog):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / ".env").write_text("KEY=1234")
    assert train(tmp_path, **settings, hub_strategy="end", max_steps=1) == 1
    assert ".env (a file of secrets)" in caplog.text and "1234" not in caplog.text
    assert set(hub.files("tester/trained")) == {".gitattributes"}


@pytest.mark.slow
def test_lora_pushes_the_merged_model(hub, settings, folder, tmp_path, capsys):
    hub.create("org/start", dict(model_files(folder).items()))
    settings |= {"model_name_or_path": "org/start", "use_peft": True, "lora_r": 2}
    assert train(tmp_path, **settings, max_steps=1) == 0
    assert summaries(hub) == ["End of training"]
    assert set(hub.files("tester/trained")) == {".gitattributes", *model_files(tmp_path / "out")}
    assert "adapter_config.json" not in hub.files("tester/trained")
    merged = ViTPForConditionalGeneration.from_pretrained("tester/trained").state_dict()
    wanted = ViTPForConditionalGeneration.from_pretrained(tmp_path / "out").state_dict()
    assert all(torch.equal(merged[name], wanted[name]) for name in wanted)

    assert push_to_hub.main([str(tmp_path / "out"), "tester/adapter", "--what", "adapter"]) == 0
    card = card_of(hub, "tester/adapter")
    card.validate()
    assert card.data.base_model == "org/start" and card.data.library_name == "peft"
    config = json.loads(hub.files("tester/adapter")["adapter_config.json"])
    assert config["base_model_name_or_path"] == "org/start" and "[More Information Needed]" not in card.text


def test_trainer_pushes_only_the_model(hub, logged_in, model_and_processor, tmp_path):
    model, processor = model_and_processor
    token = hub.token()
    options = {"max_steps": 1, "save_strategy": "no", "allow_text_only": True, "bf16": False}
    args = ViTPTrainingConfig(str(tmp_path / "out"), hub_model_id="tester/direct", hub_token=token, **options)
    rows = [{"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "there"}]}]
    trainer = ViTPTrainer(model, args, train_dataset=Dataset.from_list(rows), processing_class=processor)
    (tmp_path / "out" / "optimizer.pt").write_bytes(b"state")
    earlier = {"metrics.json": {"eval": {"eval_loss": 0.125}}, "run.json": {"command": "vitp pretrain --seed 9"}}
    for name, fields in earlier.items():  # of another run
        (tmp_path / "out" / name).write_text(json.dumps(fields))
    trainer.train()
    trainer.push_to_hub()
    assert "metrics.json" not in hub.files("tester/direct") and "--seed 9" not in card_of(hub, "tester/direct").text
    assert set(hub.files("tester/direct")) == {".gitattributes", *model_files(tmp_path / "out")}
    saved = torch.load(tmp_path / "out" / "training_args.bin", weights_only=False)
    assert saved.hub_token is None and args.hub_token == token
    (Path(args.output_dir) / "notes.txt").write_text(token)
    with pytest.raises(ValueError, match=r"notes.txt \(a Hugging Face token\)"):
        trainer.push_to_hub()
