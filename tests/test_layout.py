"""Rules for the whole package: who may import whom, how long a file is, what is installed."""

import ast
import configparser
import importlib.util
import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from paths import HELPERS, ROOT

PACKAGE = "modeling_vitp"
LAYERS = [  # from top to bottom
    {"recipes", "space"},
    {"evaluation", "probing"},
    {"classification", "dense", "detection"},
    {"training"},
    {"instructions"},
    {"hub"},
    {"convert"},
    {"auto"},  # the models, made known to the Auto classes
    {"flat"},
    {"images", "cards", "metrics", "command"},
]
LEVELS = {folder: level for level, folders in enumerate(LAYERS) for folder in folders}
# What the lowest layer may take of the flat files: they import no model.
FOR_THE_LOWEST = {"bands", "image_processing_vitp", "image_processing_vitp_dense", "input_spec", "rotated_boxes", "vrl"}
HEAVY = ["trl", "datasets", "peft", "evaluate", "gradio", "rasterio", "matplotlib"]

FILES = sorted(path for folder in (PACKAGE, "recipes", "space") for path in (ROOT / folder).rglob("*.py"))
FACE = [ROOT / PACKAGE / "__init__.py", ROOT / PACKAGE / "__main__.py"]  # the public names and the command
FLAT = sorted(set((ROOT / PACKAGE).glob("*.py")) - set(FACE))
RECIPES = sorted(set((ROOT / "recipes").glob("*.py")) - {ROOT / "recipes" / "__init__.py"})


@dataclass
class Imported:
    """A name that a file imports: the module of ours that it is taken from, or that it is."""

    place: str  # file:line
    module: str  # with dots, from the root: modeling_vitp.dense.data
    name: str | None  # what is taken from the module, `None` for the module itself
    alias: str  # what it is called in the file

    @property
    def folder(self) -> str:
        """The folder of the package, `flat` for a file that lies flat, `face` for the package itself."""
        parts = self.module.split(".")
        if len(parts) == 1:
            return "face"
        return "flat" if (ROOT / PACKAGE / f"{parts[1]}.py").is_file() else parts[1]

    def __str__(self) -> str:
        return f"{self.place} imports {self.module}" + (f".{self.name}" if self.name else "")


def folder_of(path: Path) -> str:
    parts = path.relative_to(ROOT).parts
    if parts[0] != PACKAGE:
        return parts[0]
    return parts[1] if len(parts) > 2 else "flat"


def module_of(path: Path) -> list[str]:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return [PACKAGE, *parts] if parts[0] in ("recipes", "space") else list(parts)


def is_module(name: str) -> bool:
    parts = name.split(".")
    if parts[:2] == [PACKAGE, "recipes"]:
        parts = parts[1:]
    path = ROOT.joinpath(*parts)
    return path.with_suffix(".py").is_file() or path.is_dir()


def imports_of_ours(path: Path) -> Iterator[Imported]:
    """All imports of the package, those inside functions too, whatever the way in which they are written."""
    shown, of_path = path.relative_to(ROOT), module_of(path)
    for node in ast.walk(ast.parse(path.read_text())):
        if not isinstance(node, ast.Import | ast.ImportFrom):
            continue
        place = f"{shown}:{node.lineno}"
        if isinstance(node, ast.Import):
            for name in node.names:
                if name.name.split(".")[0] == PACKAGE:
                    yield Imported(place, name.name, None, name.asname or PACKAGE)
        else:
            start = of_path[: -node.level] if node.level else []
            module = ".".join([*start, *filter(None, [node.module])])
            if module.split(".")[0] != PACKAGE:
                continue
            for name in node.names:
                whole = f"{module}.{name.name}"
                if is_module(whole):
                    yield Imported(place, whole, None, name.asname or name.name)
                else:
                    yield Imported(place, module, name.name, name.asname or name.name)


IMPORTS = {path: list(imports_of_ours(path)) for path in FILES}


def attributes_of(path: Path, alias: str) -> dict[str, int]:
    """What a file uses of a module that it has imported under a name, and in which line."""
    nodes = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Attribute)]
    return {node.attr: node.lineno for node in nodes if isinstance(node.value, ast.Name) and node.value.id == alias}


def test_the_imports_are_found_whatever_the_way_in_which_they_are_written(tmp_path, monkeypatch):
    """So that the tests below cannot pass because nothing is found."""
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    for name in ("vrl.py", "dense/data.py", "dense/here.py", "images/reading.py", "dense/deep/here.py"):
        (tmp_path / PACKAGE / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / PACKAGE / name).touch()
    (tmp_path / PACKAGE / "dense" / "here.py").write_text(
        "import os, modeling_vitp.vrl\nfrom . import data as d\nfrom .data import x\nfrom .. import vrl, ViTPModel\n"
        "from ..images.reading import _y\nif True:\n    def f():\n        from modeling_vitp.images import reading\n"
    )
    (tmp_path / PACKAGE / "dense" / "deep" / "here.py").write_text("from ...vrl import x\nfrom ..data import y\n")
    found = [
        (one.place, one.module, one.name, one.alias) for one in imports_of_ours(tmp_path / PACKAGE / "dense/here.py")
    ]
    place = "modeling_vitp/dense/here.py"
    assert sorted(found, key=lambda one: (one[0], one[1])) == [
        (f"{place}:1", "modeling_vitp.vrl", None, "modeling_vitp"),
        (f"{place}:2", "modeling_vitp.dense.data", None, "d"),
        (f"{place}:3", "modeling_vitp.dense.data", "x", "x"),
        (f"{place}:4", "modeling_vitp", "ViTPModel", "ViTPModel"),
        (f"{place}:4", "modeling_vitp.vrl", None, "vrl"),
        (f"{place}:5", "modeling_vitp.images.reading", "_y", "_y"),
        (f"{place}:8", "modeling_vitp.images.reading", None, "reading"),
    ]
    deep = [(one.module, one.folder) for one in imports_of_ours(tmp_path / PACKAGE / "dense" / "deep" / "here.py")]
    assert deep == [("modeling_vitp.vrl", "flat"), ("modeling_vitp.dense.data", "dense")]


def test_every_folder_has_its_layer():
    folders = {folder_of(path) for path in FILES if path not in FACE}
    assert folders <= set(LEVELS), f"no layer in LAYERS: {folders - set(LEVELS)}"
    assert len(FILES) > 100 and len(FLAT) > 10 and sum(map(len, IMPORTS.values())) > 300


def test_nothing_is_imported_from_above_or_beside():
    wrong = []
    for path in FILES:
        mine = folder_of(path)
        for one in IMPORTS[path] if path not in FACE else []:
            if mine in LAYERS[-1] and one.folder == "flat":
                if one.module.split(".")[1] not in FOR_THE_LOWEST:
                    wrong.append(f"{one}: {mine}/ imports no model")
            elif one.folder not in ("face", mine) and LEVELS[one.folder] <= LEVELS[mine]:
                wrong.append(f"{one}: {mine}/ is not above {one.folder}/")
    assert not wrong, "\n".join(wrong)


def test_nothing_of_ours_is_imported_by_a_bare_name():
    """Such a name would be found in the tests, where `space/` is on the path, and nowhere else."""
    names = {path.stem for folder in (ROOT / "space", HELPERS) for path in folder.iterdir()} - {"__pycache__"}
    wrong = []
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text())) if folder_of(path) != "space" else []:
            modules = [node.module] if isinstance(node, ast.ImportFrom) and not node.level else []
            modules += [name.name for name in node.names] if isinstance(node, ast.Import) else []
            place = f"{path.relative_to(ROOT)}:{getattr(node, 'lineno', 0)}"
            wrong += [f"{place} imports {module}" for module in modules if module.split(".")[0] in names]
    assert not wrong, "\n".join(wrong)


def test_a_recipe_takes_nothing_of_another_but_its_main():
    """An entry point is run as a file, `python recipes/NAME.py`, and as a module: it has no neighbours in the first."""
    names = {path.stem for path in RECIPES}
    wrong = []
    for path in RECIPES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.level:
                wrong.append(f"{path.relative_to(ROOT)}:{node.lineno}: an entry point has no relative import")
        for one in IMPORTS[path]:
            parts = one.module.split(".")
            if parts[:2] != [PACKAGE, "recipes"] or len(parts) < 3 or parts[2] not in names:
                continue
            used = attributes_of(path, one.alias) if one.name is None else {one.name: 0}
            if set(used) != {"main"}:
                wrong.append(f"{one} and uses {', '.join(sorted(used))} of it, not its main alone")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("path", FLAT, ids=lambda path: path.stem)
def test_a_flat_file_imports_of_ours_only_names_of_flat_files(path):
    """`save_pretrained` copies the files that `from .name import …` names, and fails or forgets with any other form."""
    for node in ast.walk(ast.parse(path.read_text())):
        place = f"{path.relative_to(ROOT)}:{getattr(node, 'lineno', 0)}"
        if isinstance(node, ast.Import):
            assert all(name.name.split(".")[0] != PACKAGE for name in node.names), place
        elif isinstance(node, ast.ImportFrom) and node.level:
            assert node.level == 1 and node.module and "." not in node.module, place
            assert path.with_name(f"{node.module}.py") in FLAT, place
        elif isinstance(node, ast.ImportFrom):
            assert node.module.split(".")[0] != PACKAGE, place


def test_the_face_is_for_users_recipes_and_the_space():
    """In the package, a name is imported from the file that defines it."""
    inside = [path for path in FILES if path.is_relative_to(ROOT / PACKAGE) and path not in FACE]
    wrong = [str(one) for path in inside for one in IMPORTS[path] if one.folder == "face"]
    assert not wrong, "\n".join(wrong)


def test_no_private_name_is_taken_from_another_folder():
    def is_private(name: str) -> bool:
        return name.startswith("_") and not name.startswith("__")

    wrong = []
    for path in FILES:
        for one in IMPORTS[path]:
            if one.folder == folder_of(path):
                continue
            if is_private(one.name or "") or any(map(is_private, one.module.split("."))):
                wrong.append(str(one))
            if one.name is None:
                used = attributes_of(path, one.alias)
                wrong += [f"{one} and uses {name} in line {line}" for name, line in used.items() if is_private(name)]
    assert not wrong, "\n".join(wrong)


def test_importing_the_package_takes_none_of_the_extras_along():
    program = f"import json, sys, {PACKAGE}; print(json.dumps([name for name in {HEAVY} if name in sys.modules]))"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == []


def test_the_packages_that_are_installed_are_the_folders():
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    packages = setup["options"]["packages"].split()
    folders = {path.parent for path in FILES}
    data = {folder for folder in folders if folder.parent == ROOT / PACKAGE / "metrics"}  # loaded by evaluate
    expected = {".".join(module_of(folder)) for folder in folders - data}
    assert sorted(packages) == sorted(expected)
    assert [folder for folder in folders - data if not (folder / "__init__.py").is_file()] == []
    assert "*/*.py" in setup["options.package_data"][f"{PACKAGE}.metrics"].replace(",", " ").split()


def length(path: Path) -> int:
    return len(path.read_text().splitlines())


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_file_has_one_subject(path):
    assert length(path) <= 450, f"{path.relative_to(ROOT)} has {length(path)} lines"


@pytest.mark.parametrize(
    "path", [path for path in RECIPES if not path.stem.startswith("benchmark")], ids=lambda path: path.stem
)
def test_an_entry_point_has_nothing_but_its_main(path):
    assert length(path) <= 100, f"{path.relative_to(ROOT)} has {length(path)} lines"


def test_the_readme_is_read_in_a_sitting():
    assert length(ROOT / "README.md") <= 150, f"README.md has {length(ROOT / 'README.md')} lines"


@pytest.mark.parametrize(
    "name",
    sorted({path.stem for path in (ROOT / "recipes").rglob("*.py")} - {"__init__"}),
)
def test_no_recipe_can_be_imported_by_its_bare_name(name):
    spec = importlib.util.find_spec(name)  # a module of the Space may have the same name
    assert spec is None or Path(spec.origin).parent == ROOT / "space", spec
    done = subprocess.run([sys.executable, "-c", f"import {name}"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode and f"No module named '{name}'" in done.stderr


def test_test_files_take_nothing_of_each_other():
    """What two of them need is a fixture, or lies in `tests/helpers/`."""
    tests = sorted((ROOT / "tests").rglob("*.py"))
    names = {path.stem for path in tests if not path.is_relative_to(HELPERS)}
    wrong = []
    for path in tests:
        for node in ast.walk(ast.parse(path.read_text())):
            modules = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            modules += [name.name for name in node.names] if isinstance(node, ast.Import) else []
            place = f"{path.relative_to(ROOT)}:{getattr(node, 'lineno', 0)}"
            wrong += [f"{place} imports {module}" for module in modules if module.split(".")[0] in names | {"tests"}]
    assert len(tests) > 80 and not wrong, "\n".join(wrong)


def test_folders_of_tests_are_those_of_the_package():
    folders = {path.name for path in (ROOT / "tests").iterdir() if path.is_dir() and not path.name.startswith("__")}
    ours = {folder_of(path) for path in FILES} - {"flat"}
    assert folders - {"models", "helpers", "fixtures", "fuzz"} <= ours
