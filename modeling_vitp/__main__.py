"""Command `vitp`, which runs every recipe by its name.

vitp                                 list the recipes; also vitp help
vitp --version                       print the version of the package
vitp pretrain --config quickstart    as python recipes/pretrain.py --config recipes/configs/quickstart.yaml
vitp convert SOURCE TARGET           as python -m modeling_vitp.convert SOURCE TARGET
vitp space MODEL                     as python space/__main__.py MODEL
"""

import ast
import importlib.metadata
import runpy
import shutil
import sys
import textwrap
from importlib.resources import files
from pathlib import Path

from modeling_vitp.command import errors

from .command.paths import SPACE

RECIPES = "modeling_vitp.recipes"
CONVERT = "modeling_vitp.convert"
PLUGIN_TASK = "finetune"  # recipe of `vitp finetune_NAME` for the tasks of plugins
GROUPS = {  # of the overview
    "adapt": ("adapt",),
    "data": ("make_instructions", "validate_data", "make_public_set"),
    "pretrain": ("pretrain", "distill"),
    "fine-tune": (
        "finetune_classification",
        "finetune_segmentation",
        "finetune_change_detection",
        "finetune_detection",
        "predict_large",
    ),
    "evaluate": ("probe", "embed", "evaluate_vlm", "evaluate_robustness"),
    "share": ("export_backbone", "export_onnx", "convert", "push_to_hub"),
    "look": ("space",),
}


def recipes() -> dict[str, Path]:
    """Return the files of the entry points by name."""
    folder = Path(str(files(RECIPES)))
    paths = [*sorted(folder.glob("*.py")), *sorted(folder.glob("datasets/make_*.py"))]
    paths_by_name = {path.stem: path for path in paths}
    for name in ("__init__", PLUGIN_TASK):
        paths_by_name.pop(name, None)
    return paths_by_name


def summary(path: Path) -> str:
    """Return the first line of a file's docstring."""
    return ast.get_docstring(ast.parse(path.read_text())).splitlines()[0]


def overview(paths: dict[str, Path]) -> str:
    """Return the commands in groups, each on one line with its summary."""
    width = max(40, shutil.get_terminal_size((160, 24)).columns - 29)
    lines = []
    for group, names in GROUPS.items():
        lines += ["", f"{group}:"]
        for name in names:
            first_line = textwrap.shorten(summary(paths[name]), width, placeholder=" …")
            lines.append(f"  {name:<26} {first_line}")
    return "\n".join(lines)


def module_of(name: str, path: Path) -> str:
    """Return the module that runs a command.

    Args:
        name: name of the command.
        path: its file, see [`recipes`].
    """
    if name == "convert":
        return CONVERT
    if path.parent.name == "recipes":
        return f"{RECIPES}.{name}"
    return f"{RECIPES}.{path.parent.name}.{name}"


def main(argv: list[str] | None = None) -> None:
    words = sys.argv[1:] if argv is None else argv
    paths = recipes()
    paths["convert"] = Path(str(files(CONVERT))) / "__main__.py"
    paths["space"] = SPACE / "__main__.py"
    if words[:1] == ["help"] and len(words) > 1:
        words = [words[1], "--help"]
    if words and words[0] in ("--version", "version"):
        print(importlib.metadata.version("modeling-vitp"))
        return
    if not words or words[0] in ("-h", "--help", "help"):
        print("vitp NAME ARGUMENTS; --help shows the usual arguments, --help_all those of the libraries too.")
        print("Start here: vitp pretrain --config quickstart, or vitp validate_data FOLDER for data of your own.")
        print(overview(paths))
        return
    name = words[0].replace("-", "_")
    is_plugin_task = name not in paths and name.startswith("finetune_")
    if is_plugin_task:
        words = [name, name.removeprefix("finetune_"), *words[1:]]
    elif name not in paths:
        nearest = errors.nearest_name(name, paths)
        hint = "." if nearest is None else f": did you mean {nearest!r}?"
        errors.run_program(lambda: errors.refuse(f"unknown command {words[0]!r}{hint}"))
    sys.argv = [f"vitp {name}", *words[1:]]
    try:
        if name == "space":
            runpy.run_path(str(paths[name]), run_name="__main__")
        else:
            module = f"{RECIPES}.{PLUGIN_TASK}" if is_plugin_task else module_of(name, paths[name])
            runpy.run_module(module, run_name="__main__", alter_sys=True)
    except ImportError as error:  # raised before the recipe can report its own errors
        sys.exit(errors.report_error(error))


if __name__ == "__main__":
    main()
