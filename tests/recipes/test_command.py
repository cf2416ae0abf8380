"""Command `vitp`, and the three ways to call a recipe."""

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from modeling_vitp.__main__ import GROUPS, main, recipes
from modeling_vitp.command.errors import WrongArguments
from modeling_vitp.command.paths import find_config, find_data
from modeling_vitp.pretraining.arguments import SFT_MODULES, VRLArguments
from modeling_vitp.training.command_line import field_names, parse

ROOT = Path(__file__).parents[2]
RECIPES = {path.stem: path for path in (ROOT / "recipes").glob("*.py")}
del RECIPES["__init__"], RECIPES["finetune"]  # `vitp finetune_NAME` runs the latter for the task of a plugin
RECIPES["make_public_set"] = ROOT / "recipes" / "datasets" / "make_public_set.py"
VITP = Path(sys.executable).with_name("vitp")
ENVIRONMENT = os.environ | {"HF_HUB_OFFLINE": "1", "COLUMNS": "100"}
HEAVY = ("torch", "transformers", "datasets", "peft", "evaluate", "accelerate")


def run(*command, cwd=ROOT, **environment) -> subprocess.CompletedProcess:
    return subprocess.run(
        [str(word) for word in command], cwd=cwd, env=ENVIRONMENT | environment, capture_output=True, text=True
    )


def test_command_lists_every_recipe(capsys):
    main([])
    text = capsys.readouterr().out
    names = re.findall(r"^  (\w+) ", text, re.MULTILINE)
    assert sorted(names) == sorted([*RECIPES, "convert", "space"]) and len(names) <= 20
    assert re.findall(r"^(\S+):$", text, re.MULTILINE) == [*GROUPS] and recipes() == RECIPES


def test_version_and_help(capsys):
    main(["--version"])
    assert re.fullmatch(r"[\d.]+\S*\n", capsys.readouterr().out)
    for words in (["help", "export_backbone"], ["export_backbone", "--help"]):
        with pytest.raises(SystemExit):
            main(words)
        assert "output_dir" in capsys.readouterr().out


HELP = f"""
import contextlib, io, json, runpy, sys
said = {{}}
for path in sys.argv[1:]:
    sys.argv, out = [path, "--help"], io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.suppress(SystemExit):
        runpy.run_path(path, run_name="__main__")
    said[path] = out.getvalue(), [name for name in {HEAVY!r} if name in sys.modules]
print(json.dumps(said))
"""


def test_help_comes_before_heavy_imports():
    done = run(sys.executable, "-c", HELP, *RECIPES.values())
    said = json.loads(done.stdout)
    for name, path in RECIPES.items():
        text, heavy = said[str(path)]
        assert f"usage: vitp {name} " in text and heavy == [], name


def test_mistake_is_one_line_and_status_2(tmp_path):
    """The command runs in a new process; `test_bad_inputs.py` has a table of mistakes."""
    done = run(VITP, "pretran", cwd=tmp_path)
    assert done.returncode == 2 and done.stdout == "" and not any(tmp_path.iterdir())
    assert re.fullmatch("error: .*'pretran'.*'pretrain'.*\n", done.stderr), done.stderr


@pytest.mark.slow
def test_help_and_mistake_are_fast_and_the_same_by_all_calls():
    """The fastest of three calls counts, so no further call follows one that is fast enough."""

    def seconds(*command):
        start = time.perf_counter()
        run(*command)
        return time.perf_counter() - start

    reference = min(seconds(sys.executable, "-c", "from transformers import AutoModel") for _ in range(3))
    for words in (["make_public_set", "--help"], ["pretrain", "--config", "quickstart", "--learning_rat", "1"]):
        assert any(seconds(VITP, *words) <= 1.5 * reference for _ in range(3)), words
    module = ["-m", "modeling_vitp.recipes.pretrain"]
    ways = ([VITP, "pretrain"], [sys.executable, RECIPES["pretrain"]], [sys.executable, *module])
    texts = {run(*way, "--help").stdout for way in ways}
    assert len(texts) == 1 and "usage: vitp pretrain " in texts.pop()


def test_options_read_from_source_match_classes():
    from dataclasses import fields

    from transformers import TrainingArguments
    from trl import SFTConfig

    own = {item.name for item in fields(VRLArguments)}
    found = set().union(*map(field_names, SFT_MODULES))
    assert {item.name for item in fields(SFTConfig)} <= found | own
    assert {item.name for item in fields(TrainingArguments)} <= field_names("transformers.training_args")


def test_local_files_precede_package_files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert find_config("quickstart").samefile(ROOT / "recipes/configs/quickstart.yaml")
    assert find_config("recipes/configs/loveda.yaml").samefile(ROOT / "recipes/configs/loveda.yaml")
    assert Path(find_data("recipes/accelerate")).samefile(ROOT / "recipes/accelerate")
    assert find_data("org/data") == "org/data" and find_data("recipes/data/others") == "recipes/data/others"
    (tmp_path / "quickstart").write_text("a: 1")
    (tmp_path / "recipes/accelerate").mkdir(parents=True)
    assert find_config("quickstart") == Path("quickstart")
    assert find_data("recipes/accelerate") == "recipes/accelerate"
    with pytest.raises(WrongArguments, match="--config needs a name"):
        parse(["--config"], "", (VRLArguments,))


@pytest.mark.slow
def test_command_saves_models_with_code(model_and_processor, tmp_path):
    """Models are registered after parsing the arguments and before saving."""
    model, processor = model_and_processor
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    (tmp_path / "quiet").mkdir()
    done = run(VITP, "export_backbone", tmp_path / "model", tmp_path / "backbone", cwd=tmp_path / "quiet")
    assert done.returncode == 0, done.stderr
    config = json.loads((tmp_path / "backbone/config.json").read_text())
    assert config["auto_map"]["AutoModel"] == "modeling_vitp.ViTPVisionModel"
    assert (tmp_path / "backbone/modeling_vitp.py").is_file() and (tmp_path / "backbone/vrl.py").is_file()


INSTALLED = """
import importlib, json, pkgutil
import modeling_vitp, evaluate
from modeling_vitp import ViTPTrainer
from modeling_vitp.tasks.segmentation.trainer import ViTPSegmentationTrainer
from modeling_vitp.metrics.report import METRICS_FOLDER
from modeling_vitp import recipes
from modeling_vitp.recipes import pretrain
for module in pkgutil.iter_modules(recipes.__path__):
    importlib.import_module(f"modeling_vitp.recipes.{module.name}")
evaluate.load(str(METRICS_FOLDER / "mean_iou"), num_labels=3)
print(json.dumps([modeling_vitp.__file__, pretrain.__file__]))
"""

OPENED_SPACE = """
import sys
from modeling_vitp.command.paths import SPACE
sys.path.insert(0, str(SPACE))
import app
from loading import Models
models = Models()
app.build_app(models)
app.launch_options()
print(models.default, models.source(models.default), SPACE)
"""


@pytest.mark.slow
def test_wheel_has_command_configs_and_sample(tmp_path):
    wheels, site, work = tmp_path / "wheels", tmp_path / "site", tmp_path / "work"
    work.mkdir()
    pip = [sys.executable, "-m", "pip"]
    if not (wheel := os.environ.get("VITP_WHEEL")):  # that of `.ci/run`
        built = run(*pip, "wheel", "--no-deps", "-q", "-w", wheels, ROOT)
        assert built.returncode == 0, built.stderr
        (wheel,) = wheels.iterdir()
    installed = run(*pip, "install", "--no-deps", "--no-index", "-q", "--target", site, wheel)
    assert installed.returncode == 0, installed.stderr
    here = {"PYTHONPATH": str(site)}
    vitp = sys.executable, site / "bin" / "vitp"
    done = run(sys.executable, "-c", INSTALLED, cwd=work, **here)
    assert done.returncode == 0, done.stderr
    assert all(path.startswith(str(site)) for path in json.loads(done.stdout.splitlines()[-1]))
    listed = run(*vitp, cwd=work, **here)
    assert all(f"  {name} " in listed.stdout for name in [*RECIPES, "convert"])
    recipes = {name: site / "modeling_vitp" / path.relative_to(ROOT) for name, path in RECIPES.items()}
    assert not list(site.rglob("lab")) and not list(site.rglob("experiment*"))
    said = json.loads(run(sys.executable, "-c", HELP, *recipes.values(), cwd=work, **here).stdout)
    assert all(f"usage: vitp {name} " in said[str(path)][0] for name, path in recipes.items())
    dry = run(*vitp, "pretrain", "--config", "remote_sensing_paper", "--dry_run", cwd=work, **here)
    assert dry.returncode == 0 and "The four rules of a mixture:" in dry.stdout, dry.stderr
    opened = run(sys.executable, "-c", OPENED_SPACE, cwd=work, **here)
    space = site / "modeling_vitp" / "space"
    assert opened.stdout.splitlines()[-1] == f"quickstart {space / 'quickstart'} {space}", opened.stderr
    assert "usage: vitp space" in run(*vitp, "space", "--help", cwd=work, **here).stdout
    # The control of the quickstart: a frozen ViT learns nothing, and fails the requirements.
    steps = "--max_steps 2 --eval_strategy no --save_strategy no --watch_samples 0 --dataloader_num_workers 0".split()
    steps += ["--dataloader_persistent_workers", "false", "--freeze", "vision"]
    frozen = run(*vitp, "pretrain", "--config", "quickstart", *steps, cwd=work, **here)
    assert frozen.returncode == 1 and "probe.least_gain.linear" in frozen.stderr, frozen.stderr
    assert (work / "outputs/quickstart/backbone/model.safetensors").is_file()
    gains = json.loads((work / "outputs/quickstart/metrics.json").read_text())["probe"]["gains"]
    assert gains["linear"]["at the start"] == gains["nonlinear"]["at the start"] == 0


SAME_NAMES = """
import importlib
for name in ("pretrain", "finetune_segmentation", "make_instructions", "validate_data"):
    importlib.import_module(f"modeling_vitp.recipes.{name}")
benchmarks = importlib.import_module("modeling_vitp.recipes.benchmarks.lmms_eval.benchmarks")
print(benchmarks.__file__)
"""


@pytest.mark.slow
def test_packages_of_same_name_are_ignored(tmp_path):
    names = ("benchmarks", "data", "recipes", "configs", "lab", "utils", "images", "dense", "hub", "metrics")
    for name in names:
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text(f"raise ImportError('the wrong {name}')")
    path = {"PYTHONPATH": str(tmp_path)}
    done = run(sys.executable, "-c", SAME_NAMES, cwd=tmp_path, **path)
    assert done.returncode == 0, done.stderr
    assert "recipes/benchmarks/lmms_eval/benchmarks.py" in done.stdout and str(tmp_path) not in done.stdout
    for command in ([VITP, "pretrain"], [sys.executable, ROOT / "recipes/pretrain.py"]):
        done = run(*command, "--help", cwd=tmp_path, **path)
        assert done.returncode == 0 and "the wrong" not in done.stderr, done.stderr


@pytest.mark.slow
def test_import_registers_models_for_any_program_name(tmp_path):
    script = tmp_path / "recipes" / "probe.py"
    script.parent.mkdir()
    script.write_text("import modeling_vitp, transformers\nprint(transformers.AutoConfig.for_model('vitp').model_type)")
    done = run(sys.executable, script)
    assert done.stdout.split() == ["vitp"], done.stderr
