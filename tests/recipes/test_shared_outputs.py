"""Commands that write one output at the same time, are killed, or run as shards: their file is that of a single run."""

import time
from pathlib import Path

import numpy as np
import pytest
from launching import start_program
from original_detectors import original_detector
from other_backbones import save_backbone
from pictures import write_bands
from rasterio.transform import from_origin
from tiny_models import HEAD, adapter_config, vivid

from modeling_vitp import (
    ViTPDetectionImageProcessor,
    ViTPForSemanticSegmentation,
    ViTPSegmentationConfig,
    ViTPSegmentationImageProcessor,
)

COMMANDS = {
    "embed": ["--window", "32", "--batch_size", "4"],
    "segment": ["--window", "64", "--stride", "48", "--batch_size", "1"],
    "detect": ["--window", "96", "--stride", "60", "--batch_size", "2", "--threshold", "0.1"],
}
SUFFIXES = {"embed": ".parquet", "segment": ".tif", "detect": ".geojson"}
TRIALS = [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(1, 40))]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Write the models, a scene, and the output of a single run of each command."""
    folder = tmp_path_factory.mktemp("outputs")
    save_backbone(folder / "embed", "vit")
    model = ViTPForSemanticSegmentation(ViTPSegmentationConfig(backbone_config=adapter_config(), **HEAD))
    vivid(model).save_pretrained(folder / "segment")
    ViTPSegmentationImageProcessor().save_pretrained(folder / "segment")
    original_detector("mask_rcnn").save_pretrained(folder / "detect")
    ViTPDetectionImageProcessor().save_pretrained(folder / "detect")
    pixels = np.random.default_rng(0).integers(0, 256, (3, 300, 340), dtype=np.uint8)
    ground = {"crs": "EPSG:3857", "transform": from_origin(1_000_000.0, 6_000_000.0, 0.5, 0.5)}
    write_bands(folder / "scene.tif", pixels, **ground)
    runs = [start(folder, command, folder / f"whole{SUFFIXES[command]}") for command in COMMANDS]
    assert [exit_code(run) for run in runs] == [0, 0, 0]
    return folder


def start(folder: Path, command: str, output: Path, *words: str):
    """Start a command on the scene, with its messages in `OUTPUT.log`."""
    name = "embed" if command == "embed" else "predict_large"
    words = [*COMMANDS[command], "--output", output, "--device", "cpu", *words]
    log = output.with_suffix(".log")
    return start_program(["-m", "modeling_vitp", name, folder / command, folder / "scene.tif", *words], log)


def exit_code(run) -> int:
    run.join(120)
    return run.exitcode


def kill_at(runs: list, part: Path, size: int) -> None:
    """Kill runs when their common file of results has a size, unless they end before."""
    while any(run.is_alive() for run in runs) and not (part.exists() and part.stat().st_size >= size):
        time.sleep(0.005)
    for run in runs:
        run.kill()
        run.join()


def check_output(folder: Path, command: str, output: Path) -> None:
    """Assert that an output is that of a single run, and that no other file is left beside it."""
    assert output.read_bytes() == (folder / f"whole{output.suffix}").read_bytes()
    assert "Traceback" not in output.with_suffix(".log").read_text()
    assert sorted(path.suffix for path in output.parent.iterdir()) == sorted([".log", output.suffix])


@pytest.mark.parametrize("seed", TRIALS)
@pytest.mark.parametrize("command", COMMANDS)
def test_two_runs_of_one_output_write_it_once(folder, tmp_path, command, seed):
    output = tmp_path / f"result{SUFFIXES[command]}"
    first = start(folder, command, output)
    time.sleep(np.random.default_rng(seed).uniform(0, 1))
    second = start(folder, command, output)
    codes = sorted([exit_code(first), exit_code(second)])
    assert codes[0] == 0 and codes[1] in (1, 2)
    check_output(folder, command, output)
    assert str(output) in output.with_suffix(".log").read_text()  # The refused run names it.


@pytest.mark.parametrize("seed", TRIALS)
@pytest.mark.parametrize("command", COMMANDS)
def test_run_after_two_killed_ones_resumes(folder, tmp_path, command, seed):
    output = tmp_path / f"result{SUFFIXES[command]}"
    part = Path(f"{output}.part")
    runs = [start(folder, command, output) for _ in range(2)]
    kill_at(runs, part, np.random.default_rng(seed).integers(0, 100_000))
    has_output = output.exists() and not part.exists()
    assert exit_code(start(folder, command, output)) == (2 if has_output else 0)
    check_output(folder, command, output)


@pytest.mark.parametrize("seed", TRIALS)
@pytest.mark.parametrize("command", COMMANDS)
def test_shards_are_joined_to_the_same_bytes(folder, tmp_path, command, seed):
    """Check two shards at once, of which one is killed and started again, and a join before the last one ends."""
    output = tmp_path / f"result{SUFFIXES[command]}"
    first, second = (start(folder, command, output, "--shard", f"{number}/2") for number in (1, 2))
    kill_at([second], Path(f"{output}.2-of-2.part"), np.random.default_rng(seed).integers(0, 30_000))
    assert exit_code(first) == 0
    is_finished = second.exitcode == 0
    joined_code = exit_code(start(folder, command, output))
    if not output.exists():
        assert not is_finished and joined_code == 2 and "2-of-2.part" in output.with_suffix(".log").read_text()
        assert exit_code(start(folder, command, output, "--shard", "2/2")) == 0
        assert exit_code(start(folder, command, output)) == 0
    check_output(folder, command, output)
