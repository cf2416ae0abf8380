"""Tests of the code blocks of the pages: blocks are run with adapted paths and sizes, or their arguments are parsed.

The entry point is `run_block`. It raises a `ValueError` for an unknown block, command or language, so new ones must be
added here.
"""

import argparse
import configparser
import json
import os
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import launch_command_parser
from paths import ROOT
from torch.distributed.run import get_args_parser

from modeling_vitp.__main__ import recipes
from modeling_vitp.instructions.mixture import load_mixture
from modeling_vitp.instructions.sources import read_source
from modeling_vitp.tasks.segmentation.data import DenseData
from modeling_vitp.training import command_line

NO_PAGES = {"outputs", "data", "build", "dist", "__pycache__"}

# Prefixes of commands of which only the arguments are parsed, with the reason.
ONLY_PARSED = {
    "accelerate launch": "eight GPUs",
    "vitp finetune_regression": "tests/tasks/test_plugin_task.py, in small",
    "vitp probe --plugins regression.py": "the same",
    "vitp adapt --plugins regression.py": "the same",
    "vitp make_instructions labelme": "tests/data/test_plugin_layout.py",
    "vitp validate_data labelme_instructions": "what the command before makes",
    "vitp finetune_detection --data_root my_labelme": "tests/data/test_plugin_layout.py, in small",
    "vitp finetune_segmentation --metric class_error.py": "tests/tasks/segmentation/test_registration.py, in small",
    "vitp adapt --config adapt_rsar": "tests/adaptation/test_configs.py, in small",
    "vitp adapt --data my_coco": "the Python block of the page runs it",
    "vitp convert OpenGVLab/InternViT": "tests/convert/test_checkpoint.py, in small",
    "vitp finetune_detection --config lab/configs/nuclei_oriented.yaml": "what the command before makes",
    "vitp space": "it serves until it is stopped",
    "vitp pretrain --config quickstart": "tests/recipes/test_quickstart.py runs it",
    "vitp pretrain --config remote_sensing_paper": "tests/recipes/test_command.py runs it from the wheel",
    "vitp finetune_segmentation --config loveda --dry_run": "tests/tasks/test_plan.py, in small",
    "vitp make_instructions volumes": "tests/recipes/test_medical.py runs the same steps",
    "vitp pretrain --config brain_vlm.yaml": "tests/recipes/test_medical.py",
    "vitp finetune_segmentation --config lab/configs/brain_mri.yaml": "tests/recipes/test_medical.py",
    "vitp predict_large outputs/brain_mri": "tests/recipes/test_medical.py",
    "vitp finetune_classification --config lab/configs/aerial_trees_density.yaml": "what the command before makes",
}
# Commands that run in slow tests only; otherwise their arguments are parsed.
SLOW = (
    "vitp adapt",
    "vitp pretrain --vision_model",
    "vitp pretrain --config my_recipe.yaml --color_jitter",
    "vitp finetune_detection --detector",
    "vitp finetune_segmentation --config sen1floods11",
    "vitp finetune_classification --config eurosat",
    "torchrun --nproc_per_node 4 -m modeling_vitp.recipes.finetune_classification",
    "vitp export_onnx",
)
# Modules whose Python blocks are compiled but not run, with the reason.
ONLY_COMPILED = {"terratorch": "a hundred packages", "torchao": "it logs what it cannot load whenever it is imported"}
ONLY_COMPILED |= dict.fromkeys(("duckdb", "geopandas"), "tests/probing/test_embedding.py reads a file with it")
ONLY_COMPILED |= {"my_clouds": "a model of the reader's, for the whole process; tests/auto/test_registry.py adds one"}
ONLY_COMPILED |= {"gradio_client": "a Space that is running", "nibabel": "volumes that only parsed commands make"}
# Commands that may exit with status 1, because a model of two steps does not pass their gate.
MAY_FAIL = ("vitp pretrain --vision_model",)

TRAINING = {"max_steps": 2, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 1, "bf16": False}
TRAINING |= {"save_strategy": "no", "logging_steps": 1, "report_to": "none", "learning_rate": 1e-3}
TRAINING |= {"dataloader_num_workers": 0, "dataloader_persistent_workers": False, "watch_samples": 0}
MAPS = TRAINING | {"crop_size": 64, "window": 64, "stride": 48, "test_scales": 1.0, "num_pictures": 1}
MAPS |= {"global_batch_size": 2, "warmup_steps": 1, "backbone": '{"deformable_heads": 4, "spatial_prior_channels": 8}'}
MAPS |= {"head": '{"hidden_size": 16, "auxiliary_channels": 16}'}
BOXES = TRAINING | {"image_size": 64, "num_pictures": 1, "warmup_steps": 1, "backbone": MAPS["backbone"]}
BOXES |= {
    "head": '{"neck_channels": 16, "head_hidden_size": 32, "rpn_candidates_train": 50, "rpn_candidates_eval": 50}'
}
ADAPT = {"steps": 10, "fine_tuning_steps": 2, "seeds": [0, 1], "learning_rates": [1e-3]}
ADAPT |= {"force": True}  # because the small images resemble each other
ADAPT |= {
    stage: {name: value for name, value in settings.items() if name not in ("max_steps", "learning_rate", "report_to")}
    for stage, settings in {"pretraining": TRAINING, "fine_tuning": BOXES}.items()
}
OF_TRANSFORMERS = '{"num_queries": 10, "decoder_layers": 2}'  # settings of the detectors of transformers
SMALL = {  # options by recipe that reduce the work, appended to those of the page
    "pretrain": TRAINING | {"max_length": 1024, "gradient_checkpointing": False},
    "finetune_segmentation": MAPS,
    "finetune_change_detection": MAPS,
    "finetune_detection": BOXES,
    "finetune_classification": TRAINING | {"image_size": 56, "num_pictures": 1, "warmup_steps": 1},
    "distill": TRAINING,
    "adapt": ADAPT,
    "predict_large": {"window": 64},
    "evaluate_robustness": {"corruptions": "haze rotation", "severities": "1 5", "limit": 2},
    "evaluate_vlm": {"limit": 2, "max_new_tokens": 2, "pictures": 1},
    "validate_data": {"num_workers": 1},
}


@dataclass(frozen=True)
class Block:
    """Fenced block with its page, first line, language and text."""

    page: str
    line: int
    language: str
    text: str


@dataclass
class Place:
    """Environment in which the blocks of a page are run.

    Args:
        folder: working directory with the files that the page names.
        names: variables shared by its Python blocks.
        paths: replacements of paths and sizes in the page.
        is_slow: whether to run slow commands.
    """

    folder: Path
    names: dict
    paths: dict[str, str]
    is_slow: bool


def find_pages() -> list[str]:
    """Return all Markdown files of the repository, relative to its root."""
    pages = []
    for folder, folders, files in os.walk(ROOT):
        hidden = {name for name in folders if name.startswith(".") or (Path(folder) / name / "pyvenv.cfg").exists()}
        folders[:] = sorted(set(folders) - hidden - (NO_PAGES if Path(folder) == ROOT else {"__pycache__"}))
        pages += [(Path(folder) / name).relative_to(ROOT).as_posix() for name in sorted(files) if name.endswith(".md")]
    return pages


def read_page(page: str) -> tuple[str, list[Block]]:
    """Return the text around the blocks, and the blocks."""
    text, blocks, opened = [], [], None
    for number, line in enumerate((ROOT / page).read_text().splitlines(), start=1):
        if line.lstrip().startswith("```"):
            if opened is None:
                opened = Block(page, number, line.strip().strip("`"), "")
            else:
                blocks.append(opened)
                opened = None
        elif opened is not None:
            opened = Block(opened.page, opened.line, opened.language, opened.text + line + "\n")
        else:
            text.append(line)
    assert opened is None, f"{page}, line {opened.line}: the block is not closed."
    return "\n".join(text), blocks


def run_block(block: Block, place: Place, patch: pytest.MonkeyPatch) -> None:
    """Run or check a block according to its language. An error names its page and line."""
    runners = {"python": run_python, "bash": run_bash, "yaml": run_yaml, "bibtex": check_citation}
    try:
        if block.language not in runners:
            raise ValueError(f"unknown language {block.language!r}")
        runners[block.language](block.text, place, patch)
    except (Exception, SystemExit) as error:
        raise AssertionError(f"{block.page}, line {block.line}: {error!r}\n{block.text}") from error


def adapted(text: str, place: Place) -> str:
    for old, new in place.paths.items():
        text = text.replace(old, new)
    return text


# Python


def run_python(text: str, place: Place, patch: pytest.MonkeyPatch) -> None:
    """Run a Python block with the variables shared by the blocks of a page."""
    if any(re.search(rf"^(from|import) {re.escape(name)}\b", text, re.MULTILINE) for name in ONLY_COMPILED):
        compile(text, "page", "exec")
    else:
        exec(adapted(text, place), place.names)


# Commands


def commands(text: str) -> Iterator[str]:
    """Return the commands of a block in order, without comments."""
    text = text.replace("\\\n", " ")
    for line in re.sub(r"&&\s*\n", "&& ", text).splitlines():
        for command in line.split(" && "):
            if shlex.split(command, comments=True):
                yield command.strip()


def run_bash(text: str, place: Place, patch: pytest.MonkeyPatch) -> None:
    for command in commands(text):
        run_command(command, place, patch)


def run_command(command: str, place: Place, patch: pytest.MonkeyPatch, only_parse: bool = False) -> None:
    """Parse the arguments of a command, and run it unless it is only parsed."""
    words = shlex.split(adapted(command, place), comments=True)
    while re.match(r"[A-Z_]+=", words[0]):
        patch.setenv(*words.pop(0).split("=", 1))
    words[0] = words[0].removeprefix(".venv/bin/")
    program, *words = ["python", *words[1:]] if words[0] == "python3" else words
    start = re.sub(r"^([A-Z_]+=\S* )*(\.venv/bin/)?", "", command)
    if any(start.startswith(one) for one in ONLY_PARSED) or (start.startswith(SLOW) and not place.is_slow):
        only_parse = True

    if program == "python" and words[0] == "-m":
        _, program, *words = words
        if program.startswith("modeling_vitp.") and program not in OTHER_PROGRAMS:
            words = [program.removeprefix("modeling_vitp.").removeprefix("recipes."), *words]
            program = "vitp"
    elif program == "python" and words[0].startswith("recipes/") and Path(words[0]).stem in recipes():
        program, words = "vitp", [Path(words[0]).stem, *words[1:]]
    elif program == "python":
        program, words = words[0], words[1:]

    if program in ("accelerate", "torchrun"):
        words = read_launcher(program, words)
        program = "vitp"
    if program == "vitp":
        name, *words = words
        if only_parse and not words:  # a sentence that names the command
            assert not call(name, ["--help"], patch), f"unknown command {command!r}"
            return
        words = with_config(words)
        parse(name, words, patch)
        if not only_parse:
            status = call(name, words + small(name, words), patch)
            if status and not (status == 1 and start.startswith(MAY_FAIL)):
                raise ValueError(f"{command} ended with status {status}")
    elif program in OTHER_PROGRAMS:
        OTHER_PROGRAMS[program](command, words, place, patch)
    elif program.startswith("lab."):
        find_module(program)
    else:
        raise ValueError(f"unknown command {command!r}")


def with_config(words: list[str]) -> list[str]:
    """Return the path of `--config NAME`: a file in the folder, or one of `recipes/configs`."""
    words = list(words)
    for index, word in enumerate(words[:-1]):
        if word == "--config" and not Path(words[index + 1]).exists():
            words[index + 1] = str(ROOT / "recipes" / "configs" / f"{words[index + 1]}.yaml")
    return words


def small(name: str, words: list[str]) -> list[str]:
    if "--dry_run" in words and name != "adapt":  # whose settings are those of its run
        return []
    settings = SMALL.get(name, {}) | ({"head": OF_TRANSFORMERS} if "--detector" in words else {})
    return [word for key, value in settings.items() for word in (f"--{key}", *option_words(value))]


def option_words(value: Any) -> list[str]:
    """Return a value as words of a command: mappings as JSON, and the items of a list apart."""
    if isinstance(value, dict):
        return [json.dumps(value)]
    if isinstance(value, list):
        return [str(item) for item in value]
    return [value] if str(value).startswith("{") else str(value).split()


class Parsed(BaseException):
    """Exception that stops a recipe after its arguments are parsed."""


def call(name: str, words: list[str], patch: pytest.MonkeyPatch) -> int | str | None:
    """Run `vitp NAME WORDS`, or a module below `recipes` by its dotted name, in this process; return the status."""
    from modeling_vitp.__main__ import main

    with patch.context() as inner:
        inner.setattr(sys, "argv", sys.argv)  # The command changes sys.argv.
        try:
            if "." in name:
                return import_module(f"modeling_vitp.recipes.{name}").main(words)
            main([name, *words])
        except SystemExit as end:
            return end.code
    return 0


def parse(name: str, words: list[str], patch: pytest.MonkeyPatch) -> None:
    """Parse the arguments with the recipe's own parser and stop."""
    with patch.context() as inner:
        # The first step after the arguments: loading models in a recipe, signal handling in the conversion.
        inner.setattr(command_line, "register_models", stop)
        inner.setattr("modeling_vitp.command.paths.check_paths", lambda arguments: None)
        inner.setattr(command_line, "check_paths", lambda arguments: None)
        inner.setattr(signal, "signal", stop)
        if name == "space":
            inner.setattr("modeling_vitp.command.paths.check_paths", stop)
        try:
            status = call(name, words, inner)
        except Parsed:
            return
    raise ValueError(f"the arguments {words} of {name} are not read: status {status}")


def stop(*args):
    raise Parsed


def read_launcher(program: str, words: list[str]) -> list[str]:
    """Parse the arguments of a launcher and return the recipe and its arguments."""
    if program == "accelerate":
        if words[0] != "launch":
            raise ValueError(f"unknown command accelerate {words[0]}")
        args = launch_command_parser().parse_args(words[1:])
        load_config_from_file(args.config_file)
    else:
        args = get_args_parser().parse_args(words)
    script = args.training_script
    if not args.module or not script.startswith("modeling_vitp.recipes."):
        raise ValueError(f"{script} is not launched as a module, which works without a clone too")
    return [script.removeprefix("modeling_vitp.recipes."), *args.training_script_args]


def run_in_shell(command: str, words: list[str], place: Place, patch: pytest.MonkeyPatch) -> None:
    run_process(["bash", "-euc", adapted(command, place).replace("python", sys.executable, 1)], place.folder)


def run_process(command: list[str], folder: Path) -> None:
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    if done.returncode != 0:
        raise ValueError(f"{command} ended with status {done.returncode}: {done.stdout[-1000:]}{done.stderr[-1000:]}")


def read_pip(command: str, words: list[str], place: Place, patch: pytest.MonkeyPatch) -> None:
    """Check the extras of this package that a command installs."""
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    for extras in re.findall(r"(?:\.|modeling-vitp)\[([\w,]+)\]", command):
        missing = set(extras.split(",")) - {*setup["options.extras_require"]}
        assert not missing, f"extra {missing} not found"


def read_pytest(command: str, words: list[str], place: Place, patch: pytest.MonkeyPatch) -> None:
    """Check the paths and the marks of a pytest command."""
    missing = [word for word in words if "/" in word and not (ROOT / word).exists()]
    assert not missing, f"{missing} not found"
    known = re.search(r"^markers = (.*)$", (ROOT / "pyproject.toml").read_text(), re.MULTILINE)[1]
    marks = [mark.removeprefix("not ") for option, mark in zip(words, words[1:]) if option == "-m"]
    assert all(f'"{mark}: ' in known for mark in marks), f"mark {marks} not found"


def ignore(command: str, words: list[str], place: Place, patch: pytest.MonkeyPatch) -> None:
    """Skip a command that CI or the test named below runs."""


def log_in(command: str, words: list[str], place: Place, patch: pytest.MonkeyPatch) -> None:
    """Run the command of the client, with the token that it would ask for."""
    from huggingface_hub.cli.hf import main

    with patch.context() as inner:
        inner.setattr(sys, "argv", ["hf", *words, "--token", place.names["token"]])
        try:
            main()
        except SystemExit as end:
            if end.code:
                raise ValueError(f"{command} ended with status {end.code}") from end


def pack_model(command: str, words: list[str], place: Place, patch: pytest.MonkeyPatch) -> None:
    """Pack a model into the folder of the page, because `space` there is a link to the project."""
    source, target = words
    run_process([sys.executable, ROOT / "space" / "pack.py", source, place.folder / "packed" / target], place.folder)


def find_module(program: str) -> None:
    """Check that a module of the laboratory is there. `lab/tests/test_pages.py` runs it."""
    assert (ROOT / program.replace(".", "/")).with_suffix(".py").is_file(), f"{program} not found"


def read_lmms_eval(command: str, words: list[str], place: Place, patch: pytest.MonkeyPatch) -> None:
    """Check the tasks of a command of lmms-eval, which `tests/recipes/benchmarks/test_lmms_eval.py` runs."""
    options = dict(zip(words[::2], words[1::2]))
    tasks = ROOT / "recipes" / "benchmarks" / "lmms_eval" / "tasks"
    missing = [name for name in options["--tasks"].split(",") if not (tasks / f"{name}.yaml").is_file()]
    assert not missing and options["--include_path"] == "$(python -m modeling_vitp.recipes.benchmarks.lmms_eval)", (
        command
    )


def run_tasks(command: str, words: list[str], place: Place, patch: pytest.MonkeyPatch) -> None:
    """Run the command that Slurm's `sbatch` wraps, for each task of its array."""
    parser = argparse.ArgumentParser(exit_on_error=False)
    for name in ("--job-name", "--dependency", "--wrap"):
        parser.add_argument(name)
    parser.add_argument("--array", default="1-1")
    args = parser.parse_args(words)
    first, last = map(int, args.array.split("-"))
    for task in range(first, last + 1):
        run_command(args.wrap.replace("$SLURM_ARRAY_TASK_ID", str(task)), place, patch)


OTHER_PROGRAMS = {
    "sbatch": run_tasks,
    "lmms-eval": read_lmms_eval,
    "torchgeo-bench": ignore,  # tests/recipes/benchmarks/test_backbones.py runs it
    "modeling_vitp.recipes.benchmarks.backbones.kaiko_eva": ignore,  # the same
    "venv": ignore,
    "pip": read_pip,
    "pytest": read_pytest,
    "ruff": ignore,
    "hf": log_in,
    "transformers": ignore,  # tests/convert/test_serving.py runs it
    "space/app.py": ignore,  # tests/space/test_space_browser.py runs it
    "space/pack.py": pack_model,
    "space/finding.py": ignore,  # it writes to the package; tests/space/test_finding.py computes its figures anew
    "zipfile": run_in_shell,
    "printf": run_in_shell,
    "echo": run_in_shell,
}


# YAML and BibTeX


def run_yaml(text: str, place: Place, patch: pytest.MonkeyPatch) -> None:
    """Read a mixture, check the includes of a task of lmms-eval, or parse another configuration by its recipe."""
    path = place.folder / (file_name(text) or "block.yaml")
    path.write_text(adapted(text, place))
    fields = yaml.safe_load(path.read_text())
    if "mixture" in fields:
        for source in load_mixture(path).sources:
            first = next(iter(read_source(source)))
            assert first["error"] is None and first["source"] == source.name
    elif "include" in fields:
        included = ROOT / Path(fields["include"]).relative_to("/path/to/modeling_vitp")
        assert set(fields) <= {"include", "task", "lmms_eval_specific_kwargs"} and included.is_file()
    elif "task" in fields:
        parse("finetune_detection", ["--config", str(path)], patch)
        assert not call("finetune_detection", ["--config", str(path), *small("finetune_detection", [])], patch)
    elif "crop_area" in fields:
        assert not call(
            "finetune_classification", ["--config", str(path), *small("finetune_classification", [])], patch
        )
    elif "data" in fields:
        parse("finetune_segmentation", ["--config", str(path)], patch)
        data, splits = DenseData.from_dict(fields["data"]), list(fields["data"]["splits"])
        data.check_disjoint(splits)
        for split in splits:
            assert set(data.open([split])[0]) >= {"images", "mask"}
        status = call("finetune_segmentation", ["--config", str(path), *small("finetune_segmentation", [])], patch)
        assert not status
    elif "dataset_name" in fields:
        parse("pretrain", ["--config", str(path)], patch)
    else:
        raise ValueError(f"unknown YAML with the fields {', '.join(fields)}")


def file_name(text: str) -> str | None:
    """Return the file name in the first line of a block, if any."""
    found = re.match(r"# (\w+\.(?:yaml|py))\b", text)
    return found and found[1]


def check_citation(text: str, place: Place, patch: pytest.MonkeyPatch) -> None:
    """Check that the citation equals that of `CITATION.cff`."""
    fields = {name: " ".join(value.split()) for name, value in re.findall(r"(\w+)\s*=\s*\{(.*?)\}", text, re.DOTALL)}
    paper = yaml.safe_load((ROOT / "CITATION.cff").read_text())["preferred-citation"]
    authors = " and ".join(f"{one['family-names']}, {one['given-names']}" for one in paper["authors"])
    wanted = {name: str(paper[name]) for name in ("title", "journal", "year")} | {"author": authors}
    assert fields == wanted and re.match(r"@article\{\w+,\n", text)
