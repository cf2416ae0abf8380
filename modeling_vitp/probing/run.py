"""Probes of frozen features, from their arguments to a table of the scores of all backbones."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..cards.sections import table
from ..command.paths import Shard
from ..metrics.report import without_nan
from ..metrics.resampling import paired_difference
from ..training.checkpointing import check_no_model
from ..training.config import default_device
from .arguments import ProbeArguments
from .backbones import Backbone, load_with_controls
from .classification import ClassificationProbe
from .detection import DetectionProbe
from .few_labels import draw_labels
from .segmentation import SegmentationProbe

# Functions that open the labeled images of a probe, by what `annotations` says they are.
PROBES = {
    "classes": ClassificationProbe.open,
    "masks": SegmentationProbe.open,
    "boxes": DetectionProbe.open,
}


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
    annotations = "classes" if args.data is None else args.annotations
    task = PROBES[annotations](args)
    features = output_dir / "features"
    loading = {"batch_size": args.batch_size, "num_workers": args.num_workers}
    if args.shard is not None:
        for backbone in backbones_of(args):
            for split in ("train", "test"):
                task.features(backbone, split, args.image_size, features, shard=Shard.parse(args.shard), **loading)
        print(f"Shard {args.shard}: {features}. When all shards are finished, run the same command without --shard.")
        return {}

    draws = draw_labels(args.shots, args.shares, args.seeds, task.presence, task.names)
    metrics = {"arguments": vars(args), "classes": task.names, "control": task.control(), "results": []}
    main_scores: dict[str, dict[str, Any]] = {}
    output_dir.mkdir(parents=True, exist_ok=True)
    for backbone in backbones_of(args):
        scored = task.probe(backbone, draws, args.image_size, features, **loading)
        for (probe_name, labels), scores in scored.items():
            entry = {"backbone": backbone.name, "revision": backbone.revision, "probe": probe_name}
            entry |= {"labels": str(labels), "training_images": [len(used) for used in draws[labels]]}
            entry["scores"] = summarize_draws(scores)
            if args.intervals:
                entry["resampled"] = [score.main.resampled for score in scores]
                entry["cases"] = scores[0].main.cases
            metrics["results"].append(entry)
            of_backbone = main_scores.setdefault(backbone.name, {})
            of_backbone[f"{probe_name}, {labels}"] = [score.main for score in scores]
        (output_dir / "metrics.json").write_text(json.dumps(without_nan(metrics), indent=2) + "\n")
    print(probe_table(metrics["results"], metrics["control"], task.shown, task.control_name))
    if args.intervals:
        print("\n" + differences_table(main_scores, task.shown))
    print(f"\nAll scores: {output_dir / 'metrics.json'}")
    return without_nan(metrics)


def backbones_of(args: ProbeArguments) -> Iterator[Backbone]:
    """Load each backbone and its controls, one after the other."""
    for name in args.backbones:
        yield from load_with_controls(name, args.device, args.dtype, args.random_control, args.pixel_control)


def differences_table(main_scores: dict[str, dict[str, Any]], shown: str) -> str:
    """Return a Markdown table of the differences of all backbones to the first one, with 95% intervals."""
    (first, scores_of_first), *others = main_scores.items()
    rows = []
    for name, scores in others:
        differences = [str(paired_difference(scores[column], scores_of_first[column])) for column in scores_of_first]
        rows.append([name, *differences])
    return table([f"{shown.replace('_', ' ')}, difference to {first} (95 %)", *scores_of_first], rows)


def format_spread(mean: float, spread: float | None, sign: str = "") -> str:
    return f"{mean:{sign}.3f}" + ("" if spread is None else f" ± {spread:.3f}")


def summarize_draws(scores: Sequence[dict[str, float]]) -> dict[str, dict]:
    """Return mean, sample standard deviation (`None` for a single value) and values of each score."""
    summary = {}
    for name in scores[0]:
        values = [float(score[name]) for score in scores]
        spread = np.std(values, ddof=1).item() if len(values) > 1 else None
        summary[name] = {"mean": np.mean(values).item(), "spread": spread, "values": values}
    return summary


def probe_table(results: Sequence[dict], control: dict[str, float], score: str, control_name: str) -> str:
    """Return a Markdown table with a row for each backbone and the control, and a column for each probe and labels."""
    columns = list(dict.fromkeys(f"{item['probe']}, {item['labels']}" for item in results))
    cells = {}
    for item in results:
        of_score = item["scores"][score]
        cell = format_spread(of_score["mean"], of_score["spread"])
        cells.setdefault(item["backbone"], {})[f"{item['probe']}, {item['labels']}"] = cell
    rows = [[name, *(row[column] for column in columns)] for name, row in cells.items()]
    rows.append([control_name, *[f"{control[score]:.3f}"] * len(columns)])
    return table([score.replace("_", " "), *columns], rows)
