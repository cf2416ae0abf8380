"""What a fine-tuning for classes leaves: a picture of predictions, the card and the push."""

from pathlib import Path

from torch.utils.data import Dataset

from ..training.outputs import attempt
from ..training.plots import draw_losses
from .pictures import draw_predictions
from .trainer import ClassificationTrainer


def finish(trainer: ClassificationTrainer, samples: Dataset | None, number: int) -> int:
    """Pictures, the card and the push; the exit status, 1 if any of them failed."""
    status = attempt(trainer.args.output_dir, "a picture", draw, trainer, samples, number)
    return status | (trainer.share() if trainer.train_dataset is not None else 0)


def draw(trainer: ClassificationTrainer, samples: Dataset | None, number: int) -> None:
    """The losses of the training, and predictions of samples that are spread over a data set."""
    output_dir = Path(trainer.args.output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    if trainer.train_dataset is not None:
        draw_losses(trainer.state.log_history, output_dir / "loss.png")
    if samples is not None and number:
        number = min(number, len(samples))
        shown = [samples[index * len(samples) // number] for index in range(number)]
        scores = trainer.predict([sample["image"] for sample in shown])
        bands = {"band_names": trainer.processing_class.band_names}
        draw_predictions(shown, scores, trainer.names, output_dir / "predictions.png", **bands)
