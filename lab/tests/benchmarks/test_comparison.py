"""Comparisons with other libraries compute the same results, and the table shows the times."""

import functools
import time

import pytest
import torch
from safetensors.torch import load_file, save_file

from lab.benchmarks import comparison as peers
from lab.benchmarks.benchmark_peers import main
from lab.benchmarks.comparison import HEADER, Comparison, rows_of, take_turns
from lab.benchmarks.measuring import SHAPES
from modeling_vitp.convert.tensor_files import SINGLE_FILE
from modeling_vitp.tasks.segmentation.prediction import sliding_window

TINY = {"hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 128}
HEAD = {"hidden_size": 16, "auxiliary_channels": 16}


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    monkeypatch.setitem(SHAPES, "vit_s", TINY)


def test_timm_and_plain_layers_match_our_features():
    pytest.importorskip("timm")
    comparison = peers.compare_features("vit_s", torch.float32, image_size=56)
    ours, *others = (call() for call in comparison.calls.values())
    assert ours.shape == (1, 17, 64) and ours.std() > 0.1 and len(others) == 2
    for other in others:
        torch.testing.assert_close(other, ours, rtol=1e-4, atol=1e-5)
    comparison.check(dict(enumerate([ours, *others])))
    with pytest.raises(AssertionError, match="differ by"):
        comparison.check({"ours": ours, "other": ours + 1e-3})


def test_monai_windows_match_ours(tmp_path):
    pytest.importorskip("monai")
    scene = torch.randn(1, 3, 128, 160)
    model = peers.build_narrow_model("vit_s", 64, torch.float32)
    with torch.inference_mode():
        ours = sliding_window(lambda pixels: model(pixels).logits, scene, 64, 48)
        theirs = peers.monai_windows(lambda pixels: model(pixels).logits, 64, 48)(scene)
    torch.testing.assert_close(theirs, ours, rtol=1e-4, atol=1e-5)
    comparison = peers.compare_windows("vit_s", torch.float32, tmp_path, size=(128, 160), window=64)
    results = {name: call() for name, call in comparison.calls.items()}
    comparison.check(results)
    assert all(path.suffix == ".tif" for path in results.values()) and len(set(results.values())) == len(results) > 1
    with pytest.raises(AssertionError, match="the maps differ"):
        comparison.check({"ours": results["ViTP, predict_large"], "other": windows_of_noise(tmp_path)})


def windows_of_noise(folder):
    path = folder / "noise.tif"
    peers.write_waves(path, 128, 160)
    return path


def test_missing_library_has_a_row(tmp_path, monkeypatch):
    monkeypatch.setattr(peers, "find_spec", lambda name: None)
    for comparison, package in (
        (peers.compare_windows("vit_s", torch.float32, tmp_path, size=(64, 96), window=64), "terratorch"),
        (peers.compare_features("vit_s", torch.float32, image_size=56), "timm"),
    ):
        rows = rows_of(comparison, dict.fromkeys(comparison.calls, [(1.0, 1.0)]))
        assert rows[-1][1] == f"not installed: pip install {package}" and all(len(row) == len(HEADER) for row in rows)


def test_transformers_upernet_matches_our_losses():
    adapter = {"deformable_heads": 4, "spatial_prior_channels": 8}
    comparison = peers.compare_training_step("vit_s", torch.float32, adapter=adapter, **HEAD)
    calls = comparison.calls
    for _ in range(2):
        ours, same = calls[peers.OURS](), calls[peers.SAME]()
        torch.testing.assert_close(same, ours, rtol=1e-4, atol=0)
    first = {name: call() for name, call in calls.items()}
    comparison.check(first)
    assert list(first)[0] == peers.OURS and first[peers.OURS] != ours  # The step changes the loss.
    with pytest.raises(AssertionError, match="losses"):
        comparison.check(first | {peers.SAME: 1.01 * ours})


def test_dinov2_has_the_size_of_our_vit():
    ours, theirs = peers.build_vit("vit_s", 224, torch.float32), peers.on_dinov2("vit_s", 224, **HEAD)
    sizes = [sum(part.numel() for part in module.parameters()) for module in (ours, theirs.backbone)]
    assert sizes[1] == sizes[0] + 3 * 64  # DINOv2 also has a mask token and a norm.


def test_converted_checkpoint_equals_the_copy(tmp_path):
    comparison = peers.compare_conversion("vit_s", torch.float32, tmp_path)
    results = {name: call() for name, call in comparison.calls.items()}
    comparison.check(results)
    ours, copy = results.values()
    assert (tmp_path / "original" / SINGLE_FILE).read_bytes() and copy != ours
    weights = load_file(ours)
    weights["encoder.layer.0.attention.k_proj.weight"][0, 0] += 1
    save_file(weights, ours)
    with pytest.raises(AssertionError, match="k_proj"):
        comparison.check(results)


def test_turns(monkeypatch):
    now, done = [0.0], []
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(time, "process_time", lambda: now[0] / 2)

    def taking(name, seconds):
        def call():
            now[0] += seconds[sum(other == name for other in done)]
            done.append(name)
            return name

        return call

    calls = {"ours": taking("ours", [9, 1, 2, 4]), "theirs": taking("theirs", [9, 3, 3, 5])}
    comparison = Comparison("work", calls, lambda results: done.append(tuple(results.values())))
    rows = rows_of(comparison, take_turns(comparison, 3))
    assert done == ["ours", "theirs", ("ours", "theirs"), *["ours", "theirs"] * 3]
    assert rows == [
        ["ours", 3, "1", "2", "4", "1.00", "1", "1.00"],
        ["theirs", 3, "3", "3", "5", "1.50", "1.5", "1.50"],
    ]


@pytest.mark.slow
def test_command_prints_a_row_for_each_case(capsys, monkeypatch):
    monkeypatch.setattr(peers, "compare_training_step", functools.partial(peers.compare_training_step, **HEAD))
    assert main(["--runs", "1"]) == 0
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    assert len(rows) == 4 * 2 + 3 + 3 + 4 + 2
