"""What times a step, but for the times: those are of `test_speed_ratios.py`."""

import time

import psutil

from modeling_vitp.recipes.benchmarks.step_time import beside_busy


def test_busy_processes_work_until_the_measurement_ends():
    me, start = psutil.Process(), time.monotonic()
    before = set(me.children())
    with beside_busy(2):
        busy = set(me.children()) - before
        while min(process.cpu_times().user for process in busy) < 0.1 and time.monotonic() - start < 30:
            time.sleep(0.05)
        assert len(busy) == 2 and min(process.cpu_times().user for process in busy) >= 0.1
    assert set(me.children()) == before
