"""Notebooks: stored without outputs, and executed."""

import importlib.util
import os
import re
import shlex
import site
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from IPython.core.interactiveshell import InteractiveShell
from nbclient import NotebookClient
from paths import ROOT

FOLDER = ROOT / "recipes" / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_has_no_outputs_and_installs_first(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert all(not cell.outputs and cell.execution_count is None for cell in code)
    assert "pip install" in code[0].source and notebook.metadata.kernelspec.name == "python3"
    assert path.stem in (FOLDER / "README.md").read_text()


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
@pytest.mark.parametrize(
    ("place", "missing", "installed"),
    [("", (), ""), ("", ("modeling_vitp", "trl"), '"modeling-vitp[recipes]"'), ("clone", ("trl",), '-e "{}[recipes]"')],
    ids=["installed", "released", "clone"],
)
def test_first_cell_installs_missing_packages(path, place, missing, installed, tmp_path, monkeypatch):
    (tmp_path / "clone" / "modeling_vitp").mkdir(parents=True)
    (tmp_path / "clone" / "recipes" / "notebooks").mkdir(parents=True)
    (tmp_path / "clone" / "setup.cfg").touch()
    monkeypatch.chdir(tmp_path / place / "recipes" / "notebooks" if place else tmp_path)
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *of: None if name in missing else found(name, *of))
    monkeypatch.setattr(site, "main", lambda: None)
    shell, lines = InteractiveShell(), []
    shell.register_magic_function(lines.append, magic_name="pip")
    error = shell.run_cell(nbformat.read(path, as_version=4).cells[1].source).error_in_exec
    assert lines == ([f"install -q {installed}".format(tmp_path / "clone")] if missing else [])
    assert isinstance(error, SystemExit) if missing else error is None


def test_failed_command_ends_notebook(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", os.defpath)
    cells = [cell for path in NOTEBOOKS for cell in nbformat.read(path, as_version=4).cells]
    functions = [re.search(r"def vitp\(.*?\n(?=\S|\Z)", cell.source, re.DOTALL) for cell in cells]
    (source,) = {function.group() for function in functions if function}
    names = {"Path": Path, "shlex": shlex, "subprocess": subprocess, "sys": sys}
    exec(source, names)
    with pytest.raises(SystemExit, match="no_such_recipe.log"):
        names["vitp"]("no_such_recipe")
    assert "no_such_recipe" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_runs(path, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", os.defpath)  # the kernel's environment may be inactive
    notebook = nbformat.read(path, as_version=4)
    NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(tmp_path)}}).execute()
    shown = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert sum("image/png" in output.get("data", {}) for output in shown) >= 5
