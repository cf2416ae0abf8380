"""Folders and checkpoints of the command line, and threads of commands."""

import json
import os
import shlex
import subprocess
import sys
from types import SimpleNamespace

import pytest

from modeling_vitp.instructions.mixture import load_mixture
from modeling_vitp.pretraining import plan
from modeling_vitp.recipes import pretrain
from modeling_vitp.training.checkpointing import publish_checkpoint
from modeling_vitp.training.command_line import check_output, find_checkpoint


def write_checkpoint(folder, step):
    (folder / f"checkpoint-{step}").mkdir()
    publish_checkpoint(folder / f"checkpoint-{step}", {"fixed": {}, "free": {}})


def test_resume_option_finds_the_checkpoint(tmp_path):
    def found(option):
        settings = SimpleNamespace(output_dir=str(tmp_path), resume_from_checkpoint=option)
        find_checkpoint([SimpleNamespace(), settings])
        return settings.resume_from_checkpoint

    with pytest.raises(ValueError, match=f"resume_from_checkpoint.*{tmp_path}"):
        found(True)
    for step in (9, 10):
        write_checkpoint(tmp_path, step)
    for option in (True, "true", "True"):
        assert found(option) == str(tmp_path / "checkpoint-10")
    assert [found(option) for option in (None, False, "false", "there")] == [None, None, None, "there"]


def test_output_folder_on_a_file_is_refused(tmp_path):
    (tmp_path / "file").touch()
    for place in ("file", "file/a/run"):
        with pytest.raises(ValueError, match=f"output_dir='{tmp_path / place}'"):
            check_output([SimpleNamespace(output_dir=str(tmp_path / place))])
    check_output([SimpleNamespace(output_dir=str(tmp_path / "new" / "run"))])


@pytest.mark.parametrize(("named", "kind"), [("it's.jsonl", "annotation"), ("data", "dataset")])
def test_suggested_dry_run_command_works(tmp_path, data_folder, monkeypatch, named, kind):
    turns = [{"from": "human", "value": "?"}, {"from": "gpt", "value": "!"}]
    (tmp_path / "it's.jsonl").write_text(json.dumps({"conversations": turns}))
    config = tmp_path / "run.yaml"
    config.write_text(json.dumps({"dataset_name": str(tmp_path / named), "output_dir": "unused"}))
    words = ["--config", str(config), "--dry_run", "true"]
    with pytest.raises(ValueError, match=f'"{kind}": ') as refused:
        pretrain.main(words)
    advice = str(refused.value).partition("as a mixture: ")[2].removesuffix(".")
    seen = []
    monkeypatch.setattr(plan, "print_run", lambda options: seen.append(load_mixture(options.data.mixture)))
    assert pretrain.main([*words, *shlex.split(advice)]) == 0
    ((source,),) = [mixture.sources for mixture in seen]
    assert getattr(source, kind) == str(tmp_path / named)


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


@pytest.mark.slow
def test_command_shortens_thread_spinning(tmp_path):
    assert spins(tmp_path / "vitp", COMMAND) == 1000
    assert spins(tmp_path / "vitp", COMMAND, GOMP_SPINCOUNT="7") == 7
    assert spins(tmp_path / "vitp", COMMAND, OMP_WAIT_POLICY="ACTIVE") > 1000000
    assert spins(tmp_path / "script.py", "import modeling_vitp") > 1000
