"""The tests that all models of transformers share, from its source distribution: wheels do not have them.

The distribution holds the files of `tests/` themselves and none of its folders. What these files import from there is
replaced here: there is no generation mixin and no export mixin, and for the Hub's pictures there is one made here.
"""

import importlib.util
import subprocess
import sys
import tarfile
import types
import unittest
from pathlib import Path

import pytest
import transformers
from pictures import picture

PACKAGE = "transformers_common_tests"
MISSING = {
    f"{PACKAGE}.exporters": {},
    f"{PACKAGE}.exporters.test_export": {"ExportTesterMixin": type("ExportTesterMixin", (), {})},
    f"{PACKAGE}.generation": {},
    f"{PACKAGE}.generation.test_utils": {"GenerationTesterMixin": type("GenerationTesterMixin", (), {})},
    f"{PACKAGE}.utils": {},
    f"{PACKAGE}.utils.test_configuration_utils": {"config_common_kwargs": {}},
}


def unpack(cache: Path) -> Path:
    """The folder `tests` of the installed version, downloaded once. Skips where the registry cannot be reached."""
    name = f"transformers-{transformers.__version__}"
    folder = cache / name / "tests"
    if folder.is_dir():
        return folder
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-binary", ":all:", "--no-deps"]
    command += [f"transformers=={transformers.__version__}", "--dest", str(cache)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    except subprocess.TimeoutExpired:
        pytest.skip("the source distribution of transformers did not arrive in five minutes")
    if done.returncode:
        pytest.skip(f"the source distribution of transformers cannot be had: {done.stderr.strip().splitlines()[-1:]}")
    with tarfile.open(cache / f"{name}.tar.gz") as archive:
        members = [member for member in archive if member.name.startswith(f"{name}/tests/")]
        archive.extractall(cache, members, filter="data")
    return folder


def open_package(folder: Path) -> None:
    """The folder as a package of its own name, with what the distribution lacks."""
    (folder / "__init__.py").touch()  # which the tests of configurations import
    image = folder / "image.png"
    picture(60, 40).save(image)
    hub = {"fetch_hub_objects_for_ci": {"url_to_local_path": lambda url, *args, **kwargs: str(image)}}
    for name, contents in (MISSING | hub).items():
        module = types.ModuleType(name)
        module.__path__ = []
        module.__dict__.update(contents)
        sys.modules.setdefault(name, module)
    spec = importlib.util.spec_from_loader(PACKAGE, loader=None, is_package=True)
    package = importlib.util.module_from_spec(spec)
    package.__path__ = [str(folder)]
    sys.modules[PACKAGE] = package


def run(name: str, mixins: list[type], contents: dict, left_out: dict[str, str]) -> dict[str, str]:
    """Runs what the mixins test on the classes that `contents` names.

    Args:
        left_out: tests that are not run, and why.

    Returns:
        The tests that failed, with the end of their tracebacks. What was skipped is printed with its reason.
    """
    case = type(name, (*mixins, unittest.TestCase), contents)
    found = unittest.defaultTestLoader.getTestCaseNames(case)
    unknown = {test for test in left_out if test not in found}
    assert not unknown, f"left out, but there are none of that name: {unknown}"
    suite = unittest.TestSuite(case(test) for test in found if test not in left_out)
    result = unittest.TestResult()
    suite.run(result)
    print(f"{name}: {result.testsRun} run, {len(result.skipped)} of them skipped by themselves")
    for test, reason in [*((test.id().rsplit(".")[-1], reason) for test, reason in result.skipped), *left_out.items()]:
        print(f"  skipped {test}: {reason}")
    return {
        test.id().rsplit(".")[-1]: "\n".join(trace.splitlines()[-12:])
        for test, trace in result.failures + result.errors
    }
