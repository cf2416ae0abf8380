import json
import subprocess
import sys

import pytest
from paths import ROOT


@pytest.mark.slow
def test_the_quickstart_learns_to_see(tmp_path):
    command = [sys.executable, "recipes/pretrain.py", "--config", "recipes/configs/quickstart.yaml"]
    run = subprocess.run([*command, "--output_dir", tmp_path / "quickstart"], cwd=ROOT, stderr=subprocess.PIPE)
    assert run.returncode == 0, run.stderr.decode()[-2000:]
    metrics = json.loads((tmp_path / "quickstart" / "metrics.json").read_text())
    count = metrics["task"]["test"]["count"]
    assert count["mean_error"] <= 0.8 * count["mean_error_constant_median"]
    assert count["mean_error"] <= 0.8 * count["mean_error_swapped_images"]
    assert (tmp_path / "quickstart" / "backbone" / "model.safetensors").is_file()
