"""What a fine-tuning for maps leaves: pictures of predictions, and the masks that a benchmark's server takes."""

from pathlib import Path
from typing import Any

from ..training.outputs import attempt
from ..training.plots import draw_losses
from .data import DenseData
from .pictures import draw_predictions
from .samples import MaskedImages
from .submission import write_masks
from .trainer import DenseTrainer


def finish(
    trainer: DenseTrainer,
    samples: MaskedImages | None,
    number: int,
    data: DenseData,
    submission: dict[str, Any] | None,
) -> int:
    """Pictures, the masks for a server, the card and the push; the exit status, 1 if any of them failed."""
    output_dir = trainer.args.output_dir
    status = attempt(output_dir, "a picture", draw, trainer, samples, number)
    if submission is not None:
        status |= attempt(output_dir, "the submission", write_submission, trainer, data, submission)
    return status | (trainer.share() if trainer.train_dataset is not None else 0)


def draw(trainer: DenseTrainer, samples: MaskedImages | None, number: int) -> None:
    """The losses of the training, and predictions of samples that are spread over a data set."""
    output_dir = Path(trainer.args.output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    if trainer.train_dataset is not None:
        draw_losses(trainer.state.log_history, output_dir / "loss.png")
    if samples is not None and number:
        shown = [samples[index * len(samples) // number] for index in range(number)]
        predictions = [trainer.predict_labels(sample["images"], is_test=True) for sample in shown]
        bands = {"band_names": trainer.processing_class.band_names}
        draw_predictions(shown, predictions, trainer.encoding, output_dir / "predictions.png", **bands)


def write_submission(trainer: DenseTrainer, data: DenseData, settings: dict[str, Any]) -> None:
    """The masks of a split as a benchmark's server takes them."""
    folder = Path(trainer.args.output_dir) / "submission"
    write_masks(data.open([settings["split"]]), trainer, data.encoding, settings, folder)
    print(f"For the server: {folder}.zip")
