"""Entry point of two processes, `metrics_run.py FOLDER RANK`, which score parts of the maps and share the result."""

import json
import sys
from pathlib import Path

import evaluate
import numpy as np
import torch
from paths import ROOT

METRICS = ROOT / "modeling_vitp" / "metrics"


def make_maps():
    """Return seven maps of three cases and five classes, of which one never occurs, with ignored pixels."""
    random = np.random.default_rng(0)
    references = random.integers(0, 4, (7, 6, 5))
    references[random.random(references.shape) < 0.2] = 255
    predictions = random.integers(0, 4, references.shape)
    return predictions, references, ["a", "b", "c", "a", "a", "b", "c"]


def score(parts, **processes) -> dict:
    """Compute each metric over the maps of `parts`, batch by batch."""
    predictions, references, cases = make_maps()
    result = {}
    for name in ("mean_iou", "dice", "change_detection"):
        metric = evaluate.load(str(METRICS / name), num_labels=5, ignore_index=255, **processes)
        for part in parts:
            ids = {"case_ids": [cases[place] for place in part]} if name == "dice" else {}
            metric.add_batch(predictions=predictions[part], references=references[part], **ids)
        result[name] = metric.compute() | {"resampled": metric.score_images().resampled}
    return result | score_boxes(parts, **processes)


def score_boxes(parts, **processes) -> dict:
    """Compute the metrics of boxes in seven images of four classes, with many equal scores."""
    random = np.random.default_rng(0)
    images = []
    for _ in range(7):
        low = random.uniform(0, 100, (9, 2))
        boxes = np.concatenate([low, low + random.uniform(5, 60, (9, 2))], 1)
        labels, scores = random.integers(0, 4, 9), random.integers(1, 4, 9) / 4
        images.append(
            ({"boxes": boxes, "labels": labels, "scores": scores}, {"boxes": boxes[4:] + 3, "labels": labels[4:]})
        )
    result = {}
    for name in ("average_precision", "coco_average_precision"):
        metric = evaluate.load(str(METRICS / name), num_labels=5, **processes)
        for part in parts:
            predictions, references = zip(*(images[place] for place in part))
            metric.add_batch(predictions=predictions, references=references, image_ids=part, case_ids=part)
        result[name] = metric.compute() | {"resampled": metric.score_images().resampled}
    return result


if __name__ == "__main__":
    folder, rank = Path(sys.argv[1]), int(sys.argv[2])
    torch.distributed.init_process_group("gloo", f"file://{folder / 'rendezvous'}", rank=rank, world_size=2)
    parts = ([[0, 1], [2]], [[3], [4, 5, 6]])[rank]
    result = score(parts, num_process=2, process_id=rank)
    (folder / f"{rank}.json").write_text(json.dumps(result))
    torch.distributed.destroy_process_group()
