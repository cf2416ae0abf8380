import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.mark.slow
def test_the_quickstart_learns_to_see(tmp_path):
    command = [sys.executable, "recipes/pretrain.py", "--config", "recipes/configs/quickstart.yaml"]
    subprocess.run([*command, "--output_dir", str(tmp_path)], cwd=ROOT, check=True)
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    count = metrics["task"]["test"]["count"]
    assert count["mean_error"] <= 0.8 * count["mean_error_constant_median"]
    assert count["mean_error"] <= 0.8 * count["mean_error_swapped_images"]
