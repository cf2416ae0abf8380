"""What is timed is what it is called."""

import pytest
import torch

from modeling_vitp.recipes.benchmarks import detection_speed
from modeling_vitp.recipes.benchmarks.benchmark_detection import main
from modeling_vitp.recipes.benchmarks.detection_speed import DETECTORS, SHAPES, operators, time_calls, training_step

TINY = {"hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 32}


def test_each_operator_is_given_as_many_boxes_as_it_says():
    shapes = [tuple(call().shape) for call in list(operators(torch.device("cpu")).values())[:6:2]]
    assert shapes[0] == (2000, 2000) and 0 < shapes[1][0] < 2000 and shapes[2] == (512, 256, 7, 7)


@pytest.mark.slow
@pytest.mark.parametrize("detector", DETECTORS)
def test_a_step_trains(monkeypatch, detector):
    monkeypatch.setitem(SHAPES, "vit_s", TINY)
    step = training_step(detector, "vit_s", 64, torch.device("cpu"))
    first, second = step(), step()
    assert first.isfinite() and second.isfinite() and first != second


def test_the_first_call_is_not_timed():
    calls = []
    times = time_calls(lambda: calls.append(None) or torch.zeros(()), 3)
    assert len(times) == 3 and len(calls) == 4 and min(times) > 0


@pytest.mark.slow
def test_the_command_prints_a_row_for_each(monkeypatch, capsys):
    monkeypatch.setitem(SHAPES, "vit_s", TINY)
    monkeypatch.setattr(detection_speed, "NUM_BOXES", 600)
    assert main(["--runs", "1", "--steps", "1", "--image_size", "64"]) == 0
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    assert len(rows) == 1 + 8 + 3
