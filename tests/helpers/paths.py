"""Paths of the project's files."""

from pathlib import Path

HELPERS = Path(__file__).parent
FIXTURES = HELPERS.parent / "fixtures"
ROOT = HELPERS.parent.parent
CONFIGS = ROOT / "recipes" / "configs"
AERIAL_TREES = ROOT / "recipes" / "data" / "aerial_trees"
