"""Where the parts of this package lie that are run and not imported."""

from pathlib import Path

PACKAGE = Path(__file__).parents[1]
SPACE = PACKAGE / "space" if (PACKAGE / "space").is_dir() else PACKAGE.parent / "space"
"""The Gradio app: in the package where that is installed, beside it in a clone."""
