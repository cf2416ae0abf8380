"""Folders and checkpoints that the command line names."""

import json
import shlex
from types import SimpleNamespace

import pytest
from pictures import picture

from modeling_vitp.recipes import pretrain
from modeling_vitp.training import plan
from modeling_vitp.training.checkpointing import publish_checkpoint
from modeling_vitp.training.command_line import check_output, find_checkpoint


def write_checkpoint(folder, step):
    (folder / "_saving" / "c").mkdir(parents=True)
    publish_checkpoint(folder / "_saving" / "c", folder / f"checkpoint-{step}", {"fixed": {}, "free": {}})


@pytest.mark.parametrize("wanted", [True, "true", "True"])
def test_the_last_checkpoint_stands_for_true_and_without_one_that_is_said(tmp_path, wanted):
    settings = SimpleNamespace(output_dir=str(tmp_path), resume_from_checkpoint=wanted)
    with pytest.raises(ValueError, match=f"resume_from_checkpoint: there is no complete checkpoint in {tmp_path}"):
        find_checkpoint([SimpleNamespace(), settings])
    for step in (9, 10):
        write_checkpoint(tmp_path, step)
    find_checkpoint([SimpleNamespace(), settings])
    assert settings.resume_from_checkpoint == str(tmp_path / "checkpoint-10")


@pytest.mark.parametrize(("given", "left"), [(None, None), (False, None), ("false", None), ("there", "there")])
def test_what_is_no_truth_is_left(tmp_path, given, left):
    settings = SimpleNamespace(output_dir=str(tmp_path), resume_from_checkpoint=given)
    find_checkpoint([settings])
    assert settings.resume_from_checkpoint == left


@pytest.mark.parametrize("place", ["file", "file/run", "file/a/run"])
def test_an_output_folder_where_a_file_is_is_refused(tmp_path, place):
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=f"output_dir='{tmp_path / place}': {tmp_path / 'file'} is a file"):
        check_output([SimpleNamespace(output_dir=str(tmp_path / place))])
    check_output([SimpleNamespace(output_dir=str(tmp_path / "new" / "run"))])


@pytest.mark.parametrize(
    ("named", "kind"),
    [("json beside images", "folder"), ("json", "annotation"), ("parquet", "dataset"), ("hub", "dataset")],
)
def test_what_a_dry_run_of_a_data_set_advises_is_a_dry_run(tmp_path, data_folder, monkeypatch, named, kind):
    turns = [{"from": "human", "value": "?"}, {"from": "gpt", "value": "!"}]
    file, beside = tmp_path / "it's.jsonl", tmp_path / "it's beside"
    beside.mkdir()
    picture(60, 56, 0).save(beside / "a.png")
    for place, row in ((file, {}), (beside / "train.jsonl", {"image": "a.png"})):
        place.write_text(json.dumps({**row, "conversations": turns}))
    places = {"json beside images": beside, "json": file, "parquet": data_folder, "hub": "my-org/my-data"}
    name = str(places[named])
    config = tmp_path / "run.yaml"
    config.write_text(json.dumps({"dataset_name": name, "output_dir": "unused"}))
    words = ["--config", str(config), "--dry_run", "true"]
    with pytest.raises(ValueError, match=f'"{kind}": ') as refused:
        pretrain.main(words)
    advice = str(refused.value).partition("is given by ")[2].removesuffix(".")
    seen = []
    monkeypatch.setattr(plan, "dry_run", lambda args, training_args, model_args, mixture: seen.append(mixture) or 0)
    assert pretrain.main([*words, *shlex.split(advice)]) == 0
    ((source,),) = [mixture.sources for mixture in seen]
    assert getattr(source, kind) == name
