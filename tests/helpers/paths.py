"""Paths of the project's files."""

from pathlib import Path

HELPERS = Path(__file__).parent
FIXTURES = HELPERS.parent / "fixtures"
ROOT = HELPERS.parent.parent
CONFIGS = ROOT / "recipes" / "configs"
LAB_CONFIGS = ROOT / "lab" / "configs"
PLANS = ROOT / "lab" / "experiments" / "configs"
TREES_BASE = ROOT / "lab" / "trees" / "quickstart.yaml"
AERIAL_TREES = ROOT / "lab" / "data" / "aerial_trees"
