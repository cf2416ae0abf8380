"""Benchmarks of scaling, loading, steps and detection perform the full measured work."""

import json
import time

import psutil
import pytest
import torch
from PIL import Image

from lab.benchmarks import benchmark_loader, detection_speed, scaling
from lab.benchmarks.benchmark_detection import main
from lab.benchmarks.detection_speed import DETECTORS, operators, time_calls, training_step
from lab.benchmarks.loading_speed import SIZES, synthetic_mixture
from lab.benchmarks.measuring import SHAPES
from lab.benchmarks.step_time import beside_busy
from modeling_vitp.command.errors import WrongArguments


@pytest.mark.parametrize("kind", ["parquet", "webdataset"])
def test_two_processes_split_the_rows_of_a_stream(tmp_path, monkeypatch, kind):
    monkeypatch.setattr(scaling, "ROWS_A_FILE", 10)
    scaling.write_rows(tmp_path / kind, kind, 43)
    assert len(list((tmp_path / kind).iterdir())) == 5
    whole = scaling.stream(tmp_path / kind, 43, 1, 0, is_split=False)
    for is_split in (False, True):
        parts = [scaling.stream(tmp_path / kind, 43, 2, process, is_split) for process in (0, 1)]
        assert sorted(parts[0] + parts[1]) == sorted(whole) == list(range(43))
        assert min(map(len, parts)) > 15


@pytest.mark.slow
def test_streams_have_a_row_for_each_case(tmp_path, monkeypatch):
    """Measure in this process; the page of `benchmark_growth` starts processes."""
    monkeypatch.setattr(scaling, "in_processes", lambda *calls: [scaling.measure_call(*one) for one in calls])
    rows = list(scaling.over_rows(tmp_path, [24], runs=1))
    cases = [("parquet", 1), ("parquet", 2), ("parquet, split", 2)]
    cases += [("webdataset", 1), ("webdataset", 2), ("webdataset, split", 2)]
    assert [row[:3] for row in rows] == [[f"stream of {name}", "24", processes] for name, processes in cases]


@pytest.mark.parametrize("rows", [[0, 1, 2, 2], [0, 1, 2]], ids=["twice", "lost"])
def test_lost_or_repeated_row_raises(tmp_path, monkeypatch, rows):
    found = {"seconds": 1.0, "cpu": 1.0, "peak": 1.0, "before": 1.0, "result": rows}
    monkeypatch.setattr(scaling, "in_processes", lambda *calls: [found, *({**found, "result": []} for _ in calls[1:])])
    with pytest.raises(RuntimeError, match="parquet, 4 rows, 1 processes"):
        list(scaling.over_rows(tmp_path, [4], runs=1))


@pytest.mark.parametrize(("values", "told"), [([0.25], "0.2"), ([3.04, 1.0, 2.06], "2.1 (1.0, 3.0)")])
def test_runs_are_summarized_by_median_and_range(values, told):
    assert scaling.median_and_range(values, ".1f") == told


def test_measurements_are_repeated(tmp_path, monkeypatch):
    calls = []

    def measured(*asked):
        calls.append(asked)
        found = {"seconds": 2.0, "cpu": len(calls), "peak": len(calls), "before": 1.0}
        return [{**found, "result": [0, 1][index :: len(asked)]} for index in range(len(asked))]

    monkeypatch.setattr(scaling, "in_processes", measured)
    rows = list(scaling.over_rows(tmp_path, [2], runs=3))
    assert [len(asked) for asked in calls] == 2 * ([1] * 3 + [2] * 6)
    assert rows[0] == ["stream of parquet", "2", 1, "1000000 (500000, 1500000)", "1 (1, 1)", "3.00"]


def test_measurements_process_all_data(tmp_path, monkeypatch):
    """Each measurement uses an empty folder."""
    scaling.write_tiny_backbone(tmp_path)
    scaling.write_scene(tmp_path / "600.tif", 600)
    maps, shown = scaling.Backbone.maps, []

    def counted(self, pixels, layer):
        shown.append(len(pixels))
        return maps(self, pixels, layer)

    monkeypatch.setattr(scaling.Backbone, "maps", counted)
    for case in ("extract_features", "predict"):
        for _ in range(2):
            getattr(scaling, case)(tmp_path, 600)
    assert shown[:2] == [1, 1] and len(shown) > 3 and shown[2 : len(shown) // 2 + 1] == shown[len(shown) // 2 + 1 :]


@pytest.mark.parametrize("number", [16_000, 24_000])
def test_sampler_resumes_in_the_middle_of_an_epoch(tmp_path, monkeypatch, number):
    seen = []
    monkeypatch.setattr(scaling, "SOURCE_ROWS", 80)
    monkeypatch.setattr(scaling.SkipBatchSampler, "__iter__", lambda self: seen.append(self.skip_batches) or iter([[]]))
    scaling.write_rows(tmp_path / "source", "parquet", 80)
    assert len(scaling.sampler(number)) == len(scaling.mixture(tmp_path / "source", number)) == 3
    assert seen == [number // 16]


@pytest.mark.parametrize(("side", "sizes"), [(None, SIZES), (70, ((70, 70),))])
def test_sizes_of_synthetic_images(tmp_path, side, sizes):
    (source,) = synthetic_mixture(tmp_path, 5, side)["sources"]
    rows = [json.loads(line) for line in (tmp_path / source["annotation"]).read_text().splitlines()]
    assert [Image.open(tmp_path / row["image"]).size for row in rows] == [sizes[i % len(sizes)] for i in range(5)]


def test_mixture_and_side_are_exclusive():
    with pytest.raises(WrongArguments, match="--side: not allowed with argument --mixture"):
        benchmark_loader.main(["--mixture", "my.yaml", "--side", "70"])


def test_busy_processes_run_until_measurement_ends():
    me, start = psutil.Process(), time.monotonic()
    before = set(me.children())
    with beside_busy(2):
        busy = set(me.children()) - before
        while min(process.cpu_times().user for process in busy) < 0.1 and time.monotonic() - start < 30:
            time.sleep(0.05)
        assert len(busy) == 2 and min(process.cpu_times().user for process in busy) >= 0.1
    assert set(me.children()) == before


TINY = {"hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 32}


def test_operators_receive_the_stated_number_of_boxes():
    shapes = [tuple(call().shape) for call in list(operators(torch.device("cpu")).values())[:6:2]]
    assert shapes[0] == (2000, 2000) and 0 < shapes[1][0] < 2000 and shapes[2] == (512, 256, 7, 7)


@pytest.mark.slow
@pytest.mark.parametrize("detector", DETECTORS)
def test_step_changes_weights(monkeypatch, detector):
    monkeypatch.setitem(SHAPES, "vit_s", TINY)
    step = training_step(detector, "vit_s", 64, torch.device("cpu"))
    first, second = step(), step()
    assert first.isfinite() and second.isfinite() and first != second


def test_first_call_is_not_timed():
    calls = []
    times = time_calls(lambda: calls.append(None) or torch.zeros(()), 3)
    assert len(times) == 3 and len(calls) == 4 and min(times) > 0


@pytest.mark.slow
def test_command_prints_a_row_for_each_case(monkeypatch, capsys):
    monkeypatch.setitem(SHAPES, "vit_s", TINY)
    monkeypatch.setattr(detection_speed, "NUM_BOXES", 600)
    assert main(["--runs", "1", "--steps", "1", "--image_size", "64"]) == 0
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    assert len(rows) == 1 + 8 + 3
