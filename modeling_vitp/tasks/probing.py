"""Probes of frozen features, from their arguments to a table of the scores of all backbones."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..cards.sections import table
from ..command.paths import Shard
from ..metrics.report import without_nan
from ..metrics.resampling import Score, paired_difference
from ..probing.arguments import ProbeArguments
from ..probing.backbones import Backbone, load_with_controls
from ..probing.base import Probe
from ..probing.few_labels import draw_labels
from ..training.checkpointing import check_no_model
from ..training.config import default_device
from .base import TASKS


def probe(args: ProbeArguments) -> dict[str, Any]:
    """Probe the frozen features of backbones on labeled images, print a table, and write `metrics.json`.

    Args:
        args: arguments of the probes. With `shard`, only a part of the features is extracted and stored.

    Returns:
        Content of `metrics.json`; with `shard`, nothing.

    Raises:
        ValueError: if the arguments or the data are wrong.
    """
    check_no_model(args.output_dir)
    output_dir = Path(args.output_dir)
    args.device = args.device or str(default_device())
    images = find_probe_class(args).open(args)
    features = output_dir / "features"
    loading = {"batch_size": args.batch_size, "num_workers": args.num_workers}
    if args.shard is not None:
        shard = Shard.parse(args.shard)
        for backbone in backbones_of(args):
            for split in ("train", "test"):
                images.features(backbone, split, args.image_size, features, shard=shard, **loading)
        print(shard.hint(features))
        return {}

    draws = draw_labels(args.shots, args.shares, args.seeds, images.presence, images.names)
    metrics = {
        "arguments": vars(args),
        "classes": images.names,
        "main_score": images.main_score,
        "title": images.title,
        "control": images.control(),
        "results": [],
    }
    main_scores: dict[str, dict[str, list[Score]]] = {}
    output_dir.mkdir(parents=True, exist_ok=True)
    for backbone in backbones_of(args):
        scores_by_probe = images.probe(backbone, draws, args.image_size, features, **loading)
        backbone_scores = main_scores.setdefault(backbone.name, {})
        for (probe_name, labels), scores in scores_by_probe.items():
            entry = {
                "backbone": backbone.name,
                "revision": backbone.revision,
                "probe": probe_name,
                "labels": str(labels),
                "training_images": [len(draw) for draw in draws[labels]],
                "scores": summarize_draws(scores),
            }
            if args.intervals:
                entry["resampled"] = [score.main.resampled for score in scores]
                entry["cases"] = scores[0].main.cases
            metrics["results"].append(entry)
            backbone_scores[f"{probe_name}, {labels}"] = [score.main for score in scores]
        (output_dir / "metrics.json").write_text(json.dumps(without_nan(metrics), indent=2) + "\n")
    print(probe_table(metrics["results"], metrics["control"], images.main_score, images.control_name))
    if args.intervals:
        print("\n" + differences_table(main_scores, images.main_score))
    print(f"\nAll scores: {output_dir / 'metrics.json'}")
    return without_nan(metrics)


def find_probe_class(args: ProbeArguments) -> type[Probe]:
    """Return the class of the probes of a task.

    Raises:
        ValueError: if the task is unknown, or an option is set that its probes do not use.
    """
    if args.task not in TASKS:
        raise ValueError(f"Unknown task {args.task!r}. Options: {', '.join(TASKS)}.")
    probe_class = TASKS[args.task].probe_class
    for other_task in TASKS.values():
        for name in other_task.probe_class.options:
            is_set = getattr(args, name) != getattr(ProbeArguments, name)
            if is_set and name not in probe_class.options:
                raise ValueError(f"{name} is not an option of probes of {args.task}. Remove it.")
    return probe_class


def backbones_of(args: ProbeArguments) -> Iterator[Backbone]:
    """Load each backbone and its controls, one after the other."""
    for name in args.backbones:
        yield from load_with_controls(name, args.device, args.dtype, args.random_control, args.pixel_control)


def differences_table(main_scores: dict[str, dict[str, list[Score]]], score: str) -> str:
    """Return a Markdown table of the differences of all backbones to the first one, with 95% intervals.

    Args:
        main_scores: scores of each draw of labels, by backbone and column.
        score: name of the score.
    """
    first, *others = main_scores
    columns = list(main_scores[first])
    rows = []
    for name in others:
        differences = []
        for column in columns:
            difference = paired_difference(main_scores[name][column], main_scores[first][column])
            differences.append(str(difference))
        rows.append([name, *differences])
    return table([f"{score.replace('_', ' ')}, difference to {first} (95 %)", *columns], rows)


def format_spread(mean: float, spread: float | None, sign: str = "") -> str:
    """Return a mean with its standard deviation, if there is one."""
    text = f"{mean:{sign}.3f}"
    return text if spread is None else f"{text} ± {spread:.3f}"


def summarize_draws(scores: Sequence[dict[str, float]]) -> dict[str, dict]:
    """Return mean, sample standard deviation (`None` for a single value) and values of each score."""
    summary = {}
    for name in scores[0]:
        values = [float(score[name]) for score in scores]
        spread = np.std(values, ddof=1).item() if len(values) > 1 else None
        summary[name] = {"mean": np.mean(values).item(), "spread": spread, "values": values}
    return summary


def probe_table(results: Sequence[dict], control: dict[str, float], score: str, control_name: str) -> str:
    """Return a Markdown table with a row for each backbone and the control, and a column for each probe and labels.

    Args:
        results: entries `results` of `metrics.json`.
        control: scores of the constant prediction.
        score: name of the score.
        control_name: name of the constant prediction.
    """
    cells: dict[str, dict[str, str]] = {}
    columns = []
    for result in results:
        column = f"{result['probe']}, {result['labels']}"
        if column not in columns:
            columns.append(column)
        summary = result["scores"][score]
        backbone_cells = cells.setdefault(result["backbone"], {})
        backbone_cells[column] = format_spread(summary["mean"], summary["spread"])
    rows = []
    for name, backbone_cells in cells.items():
        rows.append([name, *(backbone_cells[column] for column in columns)])
    rows.append([control_name, *[f"{control[score]:.3f}"] * len(columns)])
    return table([score.replace("_", " "), *columns], rows)
