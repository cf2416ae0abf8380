"""Layout rules of the package: who imports whom, what travels with a model, what is installed."""

import ast
import configparser
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from paths import HELPERS, ROOT

PACKAGE = "modeling_vitp"
LAYERS = [  # from top to bottom; a folder imports from its own layer's folder and from the layers below
    {"recipes", "space"},
    {"adaptation"},
    {"evaluation"},
    {"tasks"},
    {"probing"},
    {"pretraining"},
    {"training"},
    {"instructions"},
    {"data"},
    {"hub"},
    {"convert"},
    {"auto"},
    {"flat"},
    {"images", "cards", "metrics"},
    {"command"},
]
LEVELS = {folder: level for level, folders in enumerate(LAYERS) for folder in folders}
# Flat files without a model, which the layers below may import.
WITHOUT_MODELS = {"bands", "image_decoding", "image_processing_vitp", "image_processing_vitp_dense", "input_spec"}
WITHOUT_MODELS |= {"rotated_boxes", "vrl"}
# Files that name modules of layers above their own in strings, with these layers. Do not add to it.
KNOWN_STRINGS = {
    # The command starts the entry points, and finds the configurations beside them.
    "modeling_vitp/__main__.py": {"recipes", "convert"},
    "modeling_vitp/command/paths.py": {"recipes"},
    # An error for an unknown option names the command that has it, from the source of its arguments.
    "modeling_vitp/training/command_line.py": {"tasks", "pretraining", "probing"},
}
# Files that open images by themselves, with the reason. Others call `read_image`, `read_picture` or `open_raster`.
OPENERS = {"Image.open", "PIL.Image.open", "rasterio.open"}
OPENING_FILES = {
    "modeling_vitp/image_decoding.py": "opens images for training, the exported image processor and the Space",
    "modeling_vitp/images/reading.py": "reads images for training, also DICOM and windows, which models do not read",
    "space/reading.py": "opens photographs of visitors with few decoders, and reduces them while they are decoded",
    "modeling_vitp/tasks/segmentation/prediction.py": "writes a GeoTIFF",
    "modeling_vitp/instructions/from_annotations/encoding.py": "encodes windows of scenes, which Pillow must keep",
}
HEAVY = ["trl", "datasets", "peft", "evaluate", "gradio", "rasterio", "matplotlib"]

FILES = sorted(path for folder in (PACKAGE, "recipes", "space") for path in (ROOT / folder).rglob("*.py"))
TREES = {path: ast.parse(path.read_text()) for path in FILES}
TESTS = {path: ast.parse(path.read_text()) for path in sorted((ROOT / "tests").rglob("*.py"))}
FACE = [ROOT / PACKAGE / "__init__.py", ROOT / PACKAGE / "__main__.py"]


def module_of(path: Path) -> list[str]:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return [PACKAGE, *parts] if parts[0] in ("recipes", "space") else list(parts)


MODULES = {".".join(module_of(path)).removesuffix(".__init__"): path for path in FILES}


NAMED_MODULE = re.compile(r"(?:modeling_vitp|lab)\.[\w.:]*")  # also the beginning of an f-string


def folder_of(path: Path) -> str:
    parts = path.relative_to(ROOT).parts
    if parts[0] != PACKAGE:
        return parts[0]
    return parts[1] if len(parts) > 2 else "flat"


def imports_of(module: list[str], tree: ast.Module) -> list[tuple[int, str, str | None]]:
    """Return line, module and name of all imports of the package, also those inside functions."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(node.lineno, name.name, None) for name in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = ".".join([*(module[: -node.level] if node.level else []), *filter(None, [node.module])])
            for name in node.names:
                is_module = f"{base}.{name.name}" in MODULES
                found.append(
                    (node.lineno, f"{base}.{name.name}" if is_module else base, None if is_module else name.name)
                )
    return [item for item in found if item[1].split(".")[0] == PACKAGE]


def strings_of(tree: ast.Module) -> list[tuple[int, str]]:
    """Return line and module of the strings that name a module of the package or of the laboratory.

    A string such as "modeling_vitp.vrl:keyed_generator", or the beginning of an f-string, names the longest module that
    it begins with.
    """
    found = []
    for node in ast.walk(tree):
        if not isinstance(node, ast.Constant) or not isinstance(node.value, str):
            continue
        if not NAMED_MODULE.fullmatch(node.value):
            continue
        name = node.value.replace(":", ".").rstrip(".")
        if name.split(".")[0] == "lab":
            found.append((node.lineno, name))
            continue
        while name not in MODULES:
            name = name.rpartition(".")[0]
        if name != PACKAGE:
            found.append((node.lineno, name))
    return sorted(found)


IMPORTS = {path: imports_of(module_of(path), TREES[path]) for path in FILES}
STRINGS = {path: strings_of(TREES[path]) for path in FILES}


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def test_imports_go_downwards():
    wrong = []
    for path in set(FILES) - set(FACE):
        mine = folder_of(path)
        for line, module, name in IMPORTS[path]:
            if module == PACKAGE:
                if mine not in ("recipes", "space"):
                    wrong.append(f"{path}:{line} imports {name} from the package, not from its file")
                continue
            theirs = "auto" if module == f"{PACKAGE}.auto" else folder_of(MODULES[module])
            is_allowed = theirs == mine or LEVELS[theirs] > LEVELS[mine]
            if theirs == "flat" and LEVELS[mine] > LEVELS["flat"]:
                is_allowed = module.split(".")[1] in WITHOUT_MODELS
            if not is_allowed:
                wrong.append(f"{path}:{line}: {mine}/ imports {module}")
    assert not wrong, "\n".join(wrong)


def test_strings_name_no_module_above():
    """A module that is imported by its name is imported all the same. Remove known cases that are gone."""
    above = {}
    for path in FILES:
        for _, module in STRINGS[path]:
            if module.split(".")[0] == PACKAGE:
                mine, theirs = folder_of(path), folder_of(MODULES[module])
                if LEVELS[theirs] < LEVELS[mine]:
                    above.setdefault(path.relative_to(ROOT).as_posix(), set()).add(theirs)
    assert above == KNOWN_STRINGS


def test_product_does_not_know_the_laboratory():
    """Its tests do not import it either, but some read its sample data."""
    wrong = []
    for path, tree in (TREES | TESTS).items():
        modules = STRINGS.get(path, []).copy()
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                modules += [(node.lineno, name.name) for name in node.names]
            elif isinstance(node, ast.ImportFrom) and not node.level:
                modules.append((node.lineno, node.module))
        wrong += [f"{path}:{line}: {module}" for line, module in modules if module.split(".")[0] == "lab"]
    assert not wrong, "\n".join(wrong)


def test_flat_files_import_names_of_flat_files_only():
    """`save_pretrained` copies the files that `from .name import …` names, and fails or forgets with any other form."""
    flat = set((ROOT / PACKAGE).glob("*.py")) - set(FACE)
    wrong = []
    for path in flat:
        for node in ast.walk(TREES[path]):
            if isinstance(node, ast.Import):
                names = [name.name for name in node.names if name.name.split(".")[0] == PACKAGE]
            elif isinstance(node, ast.ImportFrom) and (node.level or node.module.split(".")[0] == PACKAGE):
                is_flat = node.level == 1 and node.module and path.with_name(f"{node.module}.py") in flat
                names = [] if is_flat else [node.module]
            else:
                names = []
            wrong += [f"{path}:{node.lineno} imports {name}" for name in names]
    assert not wrong, "\n".join(wrong)


def test_images_are_opened_by_the_readers():
    """Two ways to open images would differ in orientation, bits, bands or in the refusal of hostile files."""
    opening_files = set()
    for path, tree in TREES.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and ast.unparse(node) in OPENERS:
                opening_files.add(path.relative_to(ROOT).as_posix())
    assert opening_files == set(OPENING_FILES)


def test_private_names_stay_in_their_folder():
    wrong = [
        f"{path}:{line} imports {module}.{name}"
        for path in FILES
        for line, module, name in IMPORTS[path]
        if is_private(name or "") and folder_of(MODULES[module]) != folder_of(path)
    ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.slow
def test_no_module_is_imported_by_its_bare_name():
    """`space/` and `tests/helpers/` are on the path in tests only, and no test file imports another."""
    names = {path.stem for folder in (ROOT / "space", ROOT / "recipes", HELPERS) for path in folder.rglob("*.py")}
    tests = TESTS | {path: ast.parse(path.read_text()) for path in (ROOT / "lab" / "tests").rglob("*.py")}
    of_tests = {path.stem for path in tests if not path.is_relative_to(HELPERS)} | {"tests"}
    wrong = []
    for path, tree in {**TREES, **tests}.items():
        forbidden = of_tests if path in tests else names - {"__init__"}
        for node in ast.walk(tree) if folder_of(path) != "space" else []:
            modules = [node.module] if isinstance(node, ast.ImportFrom) and not node.level else []
            modules += [name.name for name in node.names] if isinstance(node, ast.Import) else []
            wrong += [f"{path} imports {module}" for module in modules if module.split(".")[0] in forbidden]
    assert not wrong, "\n".join(wrong)


@pytest.mark.slow
def test_import_loads_no_extra():
    program = f"import json, sys, {PACKAGE}; print(json.dumps([name for name in {HEAVY} if name in sys.modules]))"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == []


def test_installed_packages_are_the_folders():
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    folders = {path.parent for path in FILES}
    loaded_by_evaluate = {folder for folder in folders if folder.parent == ROOT / PACKAGE / "metrics"}
    expected = {".".join(module_of(folder)) for folder in folders - loaded_by_evaluate}
    assert sorted(setup["options"]["packages"].split()) == sorted(expected)
    without_init = [folder for folder in folders - loaded_by_evaluate if not (folder / "__init__.py").is_file()]
    assert without_init == [ROOT / "recipes" / "datasets"]  # see the next test


@pytest.mark.slow
def test_recipes_run_as_files_import_the_library_datasets():
    """`python recipes/NAME.py` puts `recipes/` on the path, where a folder with an `__init__.py` would come first."""
    program = "import datasets; print(datasets.Dataset.__name__)"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT / "recipes", capture_output=True, text=True)
    assert done.stdout.strip() == "Dataset", done.stderr


def test_test_folders_mirror_the_package():
    folders = {path.name for path in (ROOT / "tests").iterdir() if path.is_dir() and not path.name.startswith("__")}
    ours = {folder_of(path) for path in FILES} - {"flat"}
    assert folders - {"models", "helpers", "fixtures", "fuzz"} <= ours
