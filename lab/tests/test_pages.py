"""Commands of the laboratory on all pages, which are parsed or run in small, and names in its docstrings."""

import pkgutil
import re
import shlex
from importlib import import_module

import pytest
import yaml
from page_blocks import commands, find_pages, option_words, read_page
from page_folder import make_folder
from paths import ROOT

from lab.experiments import experiment
from modeling_vitp.training import command_line

# Prefixes of commands of which only the arguments are parsed, with the reason.
ONLY_PARSED = {
    "lab.benchmarks.benchmark --shape internvl2_5_1b": "minutes, and 17 GiB of memory",
    "lab.benchmarks.benchmark --shape small": "lab/tests/benchmarks/test_speed_ratios.py runs it",
    "lab.benchmarks.benchmark --torch_compile": "minutes of compiling",
    "lab.benchmarks.benchmark_detection --shapes": "the command before, in other sizes",
    "lab.benchmarks.benchmark_growth --sides": "the command before, in other sizes",
    "lab.benchmarks.benchmark_peers": "lab/tests/benchmarks/test_comparison.py runs it",
    "lab.data": "lab/tests/data runs them",
    "lab.experiments": "hours",
    "lab.trees": "lab/tests/trees/test_quickstart.py runs it",
}
SMALL = {  # options that reduce the work, appended to those of the page
    "lab.benchmarks.benchmark_detection": {"runs": 1, "steps": 1, "image_size": 64},
    "lab.benchmarks.benchmark_growth": {"sides": 600, "rows": "", "epochs": 100, "runs": 1},
    "lab.benchmarks.benchmark_loader": {"rows": 4, "batch_size": 2, "workers": 0, "rounds": 1},
}
WHEEL_BUILDERS = (
    "build_brain_mri",
    "build_climate_zones",
    "build_dinov2_small",
    "build_nuclei",
    "build_smollm2",
    "build_solar_cells",
    "build_tree_crowns",
)
IN_TEXT = re.compile(r"`python -m (lab\.[^`…]+ [^`…]+)`")


def commands_of_pages() -> list[str]:
    """Return the commands on all pages, from the module on."""
    found = []
    for page in find_pages():
        text, blocks = read_page(page)
        for block in blocks:
            if block.language == "bash":
                lines = [shlex.split(command, comments=True) for command in commands(block.text)]
                found += [shlex.join(line[line.index("-m") + 1 :]) for line in lines if "-m" in line]
        found += [" ".join(command.split()) for command in IN_TEXT.findall(text)]
    return sorted({command for command in found if command.startswith("lab.")})


COMMANDS = commands_of_pages()
RUN = [command for command in COMMANDS if not command.startswith(tuple(ONLY_PARSED))]


class Parsed(BaseException):
    """Exception that stops a command after its arguments are parsed."""


@pytest.fixture(scope="module")
def folder(tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("pages")
    make_folder(folder, tokenizer)
    return folder


@pytest.fixture
def stopped(monkeypatch):
    """Stop each command at the first step after its arguments."""

    def stop(*args, **kwargs):
        raise Parsed

    for builder in WHEEL_BUILDERS:
        monkeypatch.setattr(f"lab.data.{builder}.open_wheel", stop)
    for builder in ("build_tree_classes", "build_tree_masks"):
        monkeypatch.setattr(f"lab.data.{builder}.load_dataset", stop)
    monkeypatch.setattr(command_line, "register_models", stop)
    monkeypatch.setattr(command_line, "check_paths", lambda arguments: None)


@pytest.mark.parametrize("command", COMMANDS)
def test_command_is_parsed(command, stopped, folder, monkeypatch):
    monkeypatch.chdir(folder)
    module, *words = shlex.split(command)
    with pytest.raises(Parsed):
        import_module(module).main(words)


@pytest.mark.slow
@pytest.mark.parametrize("command", RUN)
def test_command_runs(command, folder, monkeypatch):
    monkeypatch.chdir(folder)
    module, *words = shlex.split(command)
    for name, value in SMALL[module].items():
        words += [f"--{name}", *option_words(value)]
    assert import_module(module).main(words) == 0


def test_plan_of_page_is_parsed(stopped, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    blocks = [block for page in find_pages() for block in read_page(page)[1] if block.language == "yaml"]
    plans = [block.text for block in blocks if "arms" in yaml.safe_load(block.text)]
    assert plans
    for plan in plans:
        (tmp_path / "plan.yaml").write_text(plan)
        with pytest.raises(Parsed):
            experiment.main(["--config", "plan.yaml"])


def test_names_in_docstrings_are_there():
    for path in (ROOT / "lab").rglob("*.py"):
        for name in re.findall(r"\[`~([\w.]+)`\]", path.read_text()):
            pkgutil.resolve_name(name)
