"""Common tests of the models of transformers, from its source distribution; wheels do not include them.

The distribution contains the files of `tests/`, but not its subfolders. Their imports from subfolders are replaced
here: the mixins for generation and export are empty, and a generated picture is used in place of the Hub's pictures.
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
    """Return the folder `tests` of the installed version, downloaded once. Skip the test without the registry."""
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
        pytest.skip(
            f"the source distribution of transformers cannot be downloaded: {done.stderr.strip().splitlines()[-1:]}"
        )
    with tarfile.open(cache / f"{name}.tar.gz") as archive:
        members = [member for member in archive if member.name.startswith(f"{name}/tests/")]
        archive.extractall(cache, members, filter="data")
    return folder


def open_package(folder: Path) -> None:
    """Register the folder as a package, with replacements of the missing modules."""
    (folder / "__init__.py").touch()  # The configuration tests import the package.
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
    """Run the tests of the mixins on the classes in `contents`.

    Args:
        left_out: tests that are not run, with the reason.

    Returns:
        The failed tests with the end of their tracebacks. Skipped tests are printed with their reason.
    """
    case = type(name, (*mixins, unittest.TestCase), contents)
    found = unittest.defaultTestLoader.getTestCaseNames(case)
    unknown = {test for test in left_out if test not in found}
    assert not unknown, f"excluded tests not found: {unknown}"
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
