"""What a fine-tuning for detection leaves: pictures of detections, and the files that DOTA's server takes."""

from pathlib import Path
from typing import Any

import torch

from ..training.outputs import attempt
from ..training.plots import draw_losses
from .data import DetectionData
from .pictures import SHOWN, draw_detections
from .samples import ObjectImages
from .submission import write_task1
from .tiles import merge
from .trainer import DetectionTrainer

MERGED = 0.1  # overlap up to which detections of a class are kept where windows are brought together


def finish(
    trainer: DetectionTrainer,
    samples: ObjectImages | None,
    number: int,
    data: DetectionData,
    submission: dict[str, Any] | None,
) -> int:
    """Pictures, the files for a server, the card and the push; the exit status, 1 if any of them failed."""
    output_dir = trainer.args.output_dir
    status = attempt(output_dir, "a picture", draw, trainer, samples, number)
    if submission is not None:
        status |= attempt(output_dir, "the submission", write_submission, trainer, data, submission)
    return status | (trainer.share() if trainer.train_dataset is not None else 0)


def draw(trainer: DetectionTrainer, samples: ObjectImages | None, number: int) -> None:
    """The losses of the training, and detections in samples that are spread over a data set."""
    output_dir = Path(trainer.args.output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    if trainer.train_dataset is not None:
        draw_losses(trainer.state.log_history, output_dir / "loss.png")
    if samples is not None and number:
        shown = [samples[index * len(samples) // number] for index in range(number)]
        detections = [trainer.detect([sample["image"]], SHOWN)[0] for sample in shown]
        bands = {"band_names": trainer.band_names}
        draw_detections(shown, detections, trainer.names, output_dir / "predictions.png", **bands)


def write_submission(trainer: DetectionTrainer, data: DetectionData, settings: dict[str, Any]) -> None:
    """The detections of a split, those in windows of one image merged, as DOTA's server takes them."""
    samples = data.open([settings["split"]], trainer.task)
    detections = detect_whole(trainer, samples, settings.get("nms", MERGED))
    archive = write_task1(detections, trainer.names, Path(trainer.args.output_dir) / "Task1")
    print(f"For the server: {archive}")


def detect_whole(
    trainer: DetectionTrainer, samples: ObjectImages, nms_threshold: float
) -> dict[str, dict[str, torch.Tensor]]:
    """The detections in whole images, by their names."""
    parts: dict[str, list] = {}
    for index, place in enumerate(samples.places):
        (found,) = trainer.detect([samples.image(index)])
        key = "corners" if "corners" in found else "boxes"
        found = {name: found[name].cpu() for name in ("scores", "labels", key)}
        parts.setdefault(place.whole, []).append((found, place.start))
    return {name: merge(*zip(*some), nms_threshold) for name, some in parts.items()}
