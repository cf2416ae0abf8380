"""Fixtures of `tests/conftest.py`, which the tests of the laboratory share."""

import importlib.util

from paths import ROOT

spec = importlib.util.spec_from_file_location("conftest_of_tests", ROOT / "tests" / "conftest.py")
shared = importlib.util.module_from_spec(spec)
spec.loader.exec_module(shared)
globals().update({name: value for name, value in vars(shared).items() if not name.startswith("__")})
