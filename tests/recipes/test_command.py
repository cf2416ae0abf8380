"""Command `vitp`, and the three ways to call a recipe."""

import ast
import json
import os
import re
import resource
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
    texts = []
    for words in ([], ["help"], ["--help"]):
        main(words)
        texts.append(capsys.readouterr().out)
    assert len({*texts}) == 1
    for words in (["help", "export_backbone"], ["export_backbone", "--help"]):
        with pytest.raises(SystemExit):
            main(words)
        texts.append(capsys.readouterr().out)
    assert texts[-1] == texts[-2] and "output_dir" in texts[-1]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["pretrain", "make_public_set"])
def test_recipe_has_same_help_by_three_calls(name):
    path = RECIPES[name].relative_to(ROOT)
    module = ".".join(["modeling_vitp", *path.with_suffix("").parts])
    commands = ([sys.executable, path], [VITP, name], [sys.executable, "-m", module])
    ways = [run(*command, "--help") for command in commands]
    assert [way.returncode for way in ways] == [0, 0, 0], [way.stderr for way in ways]
    assert ways[0].stdout == ways[1].stdout == ways[2].stdout


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "module"), [("convert", ["-m", "modeling_vitp.convert"]), ("space", ["space/__main__.py"])]
)
def test_convert_and_space_are_part_of_command(name, module):
    ways = [run(VITP, name, "--help"), run(sys.executable, *module, "--help")]
    assert ways[0].returncode == 0 and ways[0].stdout == ways[1].stdout
    assert f"usage: vitp {name} " in ways[0].stdout


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


def test_recipes_import_the_command_before_the_package():
    for path in RECIPES.values():
        nodes = [node for node in ast.parse(path.read_text()).body if isinstance(node, ast.Import | ast.ImportFrom)]
        names = [node.module if isinstance(node, ast.ImportFrom) else node.names[0].name for node in nodes]
        ours = [name for name in names if name.partition(".")[0] in ("modeling_vitp", "vitp_command")]
        assert ours[0] == "vitp_command", path


def test_mistake_is_one_line_and_status_2(tmp_path):
    """The command runs in a new process; `test_bad_inputs.py` has a table of mistakes."""
    done = run(VITP, "pretran", cwd=tmp_path)
    assert done.returncode == 2 and done.stdout == "" and not any(tmp_path.iterdir())
    assert re.fullmatch("error: .*'pretran'.*'pretrain'.*\n", done.stderr), done.stderr


@pytest.mark.slow
def test_help_and_mistake_are_fast():
    """The fastest of three calls counts, so no further call follows one that is fast enough."""

    def seconds(*command):
        start = time.perf_counter()
        run(*command)
        return time.perf_counter() - start

    reference = min(seconds(sys.executable, "-c", "from transformers import AutoModel") for _ in range(3))
    mistake = ["pretrain", "--config", "quickstart", "--learning_rat", "1"]
    for words in (*([name, "--help"] for name in RECIPES), mistake):
        assert any(seconds(VITP, *words) <= 1.5 * reference for _ in range(3)), words


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
    # A training command cannot do without TRL's imports. Other processes may slow down one of the two, so the fastest
    # of three runs is compared.
    imports, dry_runs = [], []
    for _ in range(3):
        _, seconds = timed(sys.executable, "-c", "from trl import SFTConfig", cwd=work, **here)
        imports.append(seconds)
        dry, seconds = timed(*vitp, "pretrain", "--config", "remote_sensing_paper", "--dry_run", cwd=work, **here)
        assert dry.returncode == 0 and "The four rules of a mixture:" in dry.stdout, dry.stderr
        dry_runs.append(seconds)
    assert min(dry_runs) < 2.2 * min(imports), (dry_runs, imports)
    steps = "--max_steps 2 --eval_strategy no --save_strategy no --watch_samples 0 --dataloader_num_workers 0".split()
    steps += ["--dataloader_persistent_workers", "false", "--freeze_vision", "true"]
    quick = run(*vitp, "pretrain", "--config", "quickstart", *steps, cwd=work, **here)
    assert quick.returncode == 1 and "probe.least_gain.linear" in quick.stderr, quick.stderr  # a frozen ViT
    assert (work / "outputs/quickstart/backbone/model.safetensors").is_file()


def timed(*command: object, **options: object) -> tuple[subprocess.CompletedProcess, float]:
    """Run a command, and measure the seconds of CPU that it used."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = run(*command, **options)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return done, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


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


REGISTERED = """
import sys
import vitp_command
from modeling_vitp.pretraining.arguments import VRLArguments
from modeling_vitp.training.command_line import parse
before = "modeling_vitp.auto" in sys.modules
parse([], "", (VRLArguments,))
print(before, "modeling_vitp.auto" in sys.modules)
"""


@pytest.mark.slow
def test_models_are_registered_after_arguments():
    """Models are also registered for recipes that import no public name of the package."""
    done = run(sys.executable, "-c", REGISTERED)
    assert done.stdout.splitlines()[-1] == "False True", done.stderr


@pytest.mark.slow
def test_import_registers_models_for_any_program_name(tmp_path):
    script = tmp_path / "recipes" / "probe.py"
    script.parent.mkdir()
    script.write_text("import modeling_vitp, transformers\nprint(transformers.AutoConfig.for_model('vitp').model_type)")
    done = run(sys.executable, script)
    assert done.stdout.split() == ["vitp"], done.stderr
