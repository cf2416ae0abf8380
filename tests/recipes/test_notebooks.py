"""Notebooks: stored with their outputs, and executed.

After a change of a notebook, this command executes it and stores its outputs:

    STORE_NOTEBOOKS=1 python -m pytest -m slow tests/recipes/test_notebooks.py -k NAME
"""

import base64
import importlib.util
import io
import json
import os
import re
import site
from pathlib import Path

import nbformat
import pytest
from IPython.core.interactiveshell import InteractiveShell
from nbclient import NotebookClient
from nbformat import NotebookNode
from paths import ROOT
from PIL import Image

FOLDER = ROOT / "recipes" / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
KEPT = {"kernelspec", "language_info"}  # metadata of a stored notebook
# The tests run a fifth of these steps.
STEPS = re.compile(r'((?:(?:max|save|logging|vrl_warmup|fine_tuning)_|\b)steps(?:": |: |=))(\d+)')
# Fewer images for the notebook that trains most often.
IMAGES = {'{"train": 3, "val": 2, "test": 2}': '{"train": 9, "val": 6, "test": 6}'}
MACHINE = re.compile(r"/(?:home|mnt|opt|root|tmp|usr|var|Users)/|site-packages|0x[0-9a-f]{6,}")


def code_of(notebook: NotebookNode) -> list[NotebookNode]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def outputs_of(notebook: NotebookNode) -> list[NotebookNode]:
    return [output for cell in code_of(notebook) for output in cell.outputs]


def count_images(notebook: NotebookNode) -> int:
    return sum(any(kind.startswith("image/") for kind in output.get("data", {})) for output in outputs_of(notebook))


def store(notebook: NotebookNode, path: Path) -> None:
    """Write an executed notebook with JPEG images, without log lines and metadata of this machine."""
    notebook.metadata = {**nbformat.read(path, as_version=4).metadata}
    for cell in code_of(notebook):
        cell.metadata.pop("execution", None)
        cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
    for output in outputs_of(notebook):
        if "image/png" in output.get("data", {}):
            image = Image.open(io.BytesIO(base64.b64decode(output.data.pop("image/png")))).convert("RGB")
            image.thumbnail((1000, 1200))
            encoded = io.BytesIO()
            image.save(encoded, "JPEG", quality=75, optimize=True)
            output.data["image/jpeg"] = base64.b64encode(encoded.getvalue()).decode()
            output.metadata = {}
    nbformat.write(notebook, path)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_is_stored_with_outputs(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    cells = code_of(notebook)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert all(output.output_type != "error" for output in outputs_of(notebook))
    assert count_images(notebook) >= 2
    assert path.stat().st_size < 600_000
    for output in outputs_of(notebook):
        for kind in [kind for kind in output.get("data", {}) if kind.startswith("image/")]:
            del output.data[kind]
    assert not MACHINE.search(json.dumps(notebook))
    assert {*notebook.metadata} == KEPT and not any(cell.metadata for cell in notebook.cells)
    assert notebook.metadata.kernelspec.name == "python3"
    assert f"({path.name})" in (FOLDER / "README.md").read_text()


@pytest.mark.parametrize(
    ("place", "missing", "installed"),
    [("", (), ""), ("", ("modeling_vitp", "trl"), '"modeling-vitp[recipes]"'), ("clone", ("trl",), '-e "{}[recipes]"')],
    ids=["installed", "released", "clone"],
)
def test_first_cell_installs_missing_packages(place, missing, installed, tmp_path, monkeypatch):
    (tmp_path / "clone" / "modeling_vitp").mkdir(parents=True)
    (tmp_path / "clone" / "recipes" / "notebooks").mkdir(parents=True)
    (tmp_path / "clone" / "setup.cfg").touch()
    monkeypatch.chdir(tmp_path / place / "recipes" / "notebooks" if place else tmp_path)
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *of: None if name in missing else found(name, *of))
    monkeypatch.setattr(site, "main", lambda: None)
    shell, lines = InteractiveShell(), []
    shell.register_magic_function(lines.append, magic_name="pip")
    (source,) = {code_of(nbformat.read(path, as_version=4))[0].source for path in NOTEBOOKS}
    error = shell.run_cell(source).error_in_exec
    assert lines == ([f"install -q {installed}".format(tmp_path / "clone")] if missing else [])
    assert isinstance(error, SystemExit) if missing else error is None


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_runs(path, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", os.defpath)  # the kernel's environment may be inactive
    (tmp_path / "lab").symlink_to(ROOT / "lab")  # the notebooks read its sample data, from the clone that they are in
    notebook = nbformat.read(path, as_version=4)
    stored = count_images(notebook)
    if not os.environ.get("STORE_NOTEBOOKS"):
        for cell in code_of(notebook):
            cell.source = STEPS.sub(lambda found: f"{found[1]}{int(found[2]) // 5}", cell.source)
            for of_reader, of_test in IMAGES.items():
                cell.source = cell.source.replace(of_reader, of_test)
    NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(tmp_path)}}).execute()
    if os.environ.get("STORE_NOTEBOOKS"):
        store(notebook, path)
    else:
        assert count_images(notebook) == stored
