"""Folders and checkpoints of the command line, and threads of commands."""

import json
import logging
import os
import shlex
import subprocess
import sys
from types import SimpleNamespace

import pytest
from pictures import picture

from modeling_vitp.instructions.mixture import load_mixture
from modeling_vitp.pretraining import plan
from modeling_vitp.recipes import pretrain
from modeling_vitp.training.checkpointing import publish_checkpoint
from modeling_vitp.training.command_line import check_output, errors, find_checkpoint, run

LOGGED = ("training", "pretraining", "tasks", "evaluation", "recipes")


def write_checkpoint(folder, step):
    (folder / f"checkpoint-{step}").mkdir()
    publish_checkpoint(folder / f"checkpoint-{step}", {"fixed": {}, "free": {}})


@pytest.mark.parametrize("wanted", [True, "true", "True"])
def test_resume_true_is_the_last_checkpoint(tmp_path, wanted):
    settings = SimpleNamespace(output_dir=str(tmp_path), resume_from_checkpoint=wanted)
    with pytest.raises(ValueError, match=f"resume_from_checkpoint.*{tmp_path}"):
        find_checkpoint([SimpleNamespace(), settings])
    for step in (9, 10):
        write_checkpoint(tmp_path, step)
    find_checkpoint([SimpleNamespace(), settings])
    assert settings.resume_from_checkpoint == str(tmp_path / "checkpoint-10")


@pytest.mark.parametrize(("given", "left"), [(None, None), (False, None), ("false", None), ("there", "there")])
def test_resume_path_is_unchanged(tmp_path, given, left):
    settings = SimpleNamespace(output_dir=str(tmp_path), resume_from_checkpoint=given)
    find_checkpoint([settings])
    assert settings.resume_from_checkpoint == left


@pytest.mark.parametrize("place", ["file", "file/run", "file/a/run"])
def test_output_folder_on_a_file_is_refused(tmp_path, place):
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=f"output_dir='{tmp_path / place}': {tmp_path / 'file'} "):
        check_output([SimpleNamespace(output_dir=str(tmp_path / place))])
    check_output([SimpleNamespace(output_dir=str(tmp_path / "new" / "run"))])


@pytest.mark.parametrize(
    ("named", "kind"),
    [("json beside images", "folder"), ("json", "annotation"), ("parquet", "dataset"), ("hub", "dataset")],
)
def test_suggested_dry_run_command_works(tmp_path, data_folder, monkeypatch, named, kind):
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
    advice = str(refused.value).partition("as a mixture: ")[2].removesuffix(".")
    seen = []
    monkeypatch.setattr(plan, "print_run", lambda options: seen.append(load_mixture(options.data.mixture)))
    assert pretrain.main([*words, *shlex.split(advice)]) == 0
    ((source,),) = [mixture.sources for mixture in seen]
    assert getattr(source, kind) == name


COMMAND = "import vitp_command, modeling_vitp.training.command_line"


def spins(script, imports: str, **environment: str) -> int:
    """Return OpenMP's spin count of threads, displayed when torch is loaded, in a program with some imports."""
    unset = {"OMP_WAIT_POLICY": "", "GOMP_SPINCOUNT": ""}
    environment = {**os.environ, **unset, "OMP_DISPLAY_ENV": "verbose", **environment}
    environment = {name: value for name, value in environment.items() if value}
    script.write_text(f"{imports}\nimport torch\ntorch.ones(3).sum()")
    done = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True, check=True)
    lines = [line for line in done.stderr.splitlines() if "GOMP_SPINCOUNT" in line]
    if not lines:
        pytest.skip("the OpenMP of this torch does not display its settings")
    return int(lines[0].split("'")[1])


def test_command_sets_short_thread_spinning(tmp_path):
    assert spins(tmp_path / "vitp", COMMAND) == 1000


@pytest.mark.slow
def test_thread_spinning_follows_environment(tmp_path):
    assert spins(tmp_path / "vitp", COMMAND, GOMP_SPINCOUNT="7") == 7
    assert spins(tmp_path / "vitp", COMMAND, OMP_WAIT_POLICY="PASSIVE") == 0
    assert spins(tmp_path / "vitp", COMMAND, OMP_WAIT_POLICY="ACTIVE") > 1000000


@pytest.mark.slow
def test_library_does_not_change_threads(tmp_path):
    plain = spins(tmp_path / "script.py", "")
    assert spins(tmp_path / "script.py", "import modeling_vitp") == plain > 1000


@pytest.mark.parametrize(("rank", "level"), [(None, "INFO"), ("0", "INFO"), ("1", "WARNING")])
def test_first_process_alone_logs_progress(monkeypatch, rank, level):
    monkeypatch.setattr(errors, "run_program", lambda main: None)
    loggers = [logging.getLogger(f"modeling_vitp.{name}") for name in LOGGED]
    for logger in loggers:
        monkeypatch.setattr(logger, "level", logger.level)
    monkeypatch.delenv("RANK", raising=False)
    if rank is not None:
        monkeypatch.setenv("RANK", rank)
    run(lambda: 0)
    assert {logging.getLevelName(logger.level) for logger in loggers} == {level}
