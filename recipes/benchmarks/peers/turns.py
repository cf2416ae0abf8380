"""Calls that compute the same, timed in turn."""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

HEADER = ["", "runs", "s: min", "median", "max", "of ViTP's", "CPU time, s", "of ViTP's"]


@dataclass
class Comparison:
    """One piece of work, done by us and by others.

    Args:
        what: is done, on what input.
        calls: that do it, by name; ours is the first.
        check: is given the calls' results by name, and raises an `AssertionError` if they are not the same.
        absent: names of peers that cannot be called here, and the packages that they need.
    """

    what: str
    calls: dict[str, Callable[[], Any]]
    check: Callable[[dict[str, Any]], None]
    absent: dict[str, str] = field(default_factory=dict)


def take_turns(comparison: Comparison, runs: int) -> dict[str, list[tuple[float, float]]]:
    """Seconds by the clock and of this process's CPU, of each call `runs` times, one call after the other in each turn.

    There is a turn before, which is not timed, of which the results are checked.
    """
    comparison.check({name: call() for name, call in comparison.calls.items()})
    seconds = {name: [] for name in comparison.calls}
    for _ in range(runs):
        for name, call in comparison.calls.items():
            start, start_of_cpu = time.perf_counter(), time.process_time()
            result = call()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            seconds[name].append((time.perf_counter() - start, time.process_time() - start_of_cpu))
            del result
    return seconds


def rows_of(comparison: Comparison, seconds: dict[str, list[tuple[float, float]]]) -> list[list[str]]:
    """A row of [`HEADER`] for each call and for each peer that is not here."""
    rows, first = [], None
    for name, turns in seconds.items():
        clock, cpu = zip(*turns)
        medians = statistics.median(clock), statistics.median(cpu)
        first = first or medians
        ratios = [f"{mine / ours:.2f}" for mine, ours in zip(medians, first)]
        numbers = [f"{value:.3g}" for value in (min(clock), medians[0], max(clock))]
        rows.append([name, len(turns), *numbers, ratios[0], f"{medians[1]:.3g}", ratios[1]])
    for name, package in comparison.absent.items():
        rows.append([name, f"not here: pip install {package}", *[""] * (len(HEADER) - 2)])
    return rows
