"""Does a model look at its images? Its loss with its own images, and with those of other rows."""

import numpy as np
import torch
from datasets import Dataset, concatenate_datasets
from tqdm.auto import tqdm

from modeling_vitp.instructions.collator import NO_LABEL, ViTPDataCollator
from modeling_vitp.modeling_vitp import ViTPForConditionalGeneration


def losses_with_own_and_other_images(
    model: ViTPForConditionalGeneration, collator: ViTPDataCollator, rows: Dataset, batch_size: int = 32
) -> dict[str, float]:
    """Mean loss of an answer token under teacher forcing, every visual token kept.

    An answer can be guessed from its own beginning, so that its loss falls without the model looking: neighbours in a
    map are alike, and sentences are usual. What is gained by looking is what the loss rises by where each row is given
    the images of another one, half the rows away.

    Args:
        collator: as for evaluation, see [`~modeling_vitp.instructions.collator.ViTPDataCollator.for_evaluation`].
        rows: with `messages` and `image`.

    Returns:
        `loss` and `loss_swapped_images`, in nats.
    """
    others = rows.select_columns("image").select(np.roll(np.arange(len(rows)), -(len(rows) // 2)))
    swapped = concatenate_datasets([rows.remove_columns("image"), others], axis=1)
    named = {"loss": rows, "loss_swapped_images": swapped}
    return {name: mean_loss(model, collator, dataset, batch_size, name) for name, dataset in named.items()}


@torch.no_grad()
def mean_loss(
    model: ViTPForConditionalGeneration, collator: ViTPDataCollator, rows: Dataset, batch_size: int, description: str
) -> float:
    """Over all answer tokens of the rows."""
    was_training = model.training
    model.eval()
    total = number = 0
    for start in tqdm(range(0, len(rows), batch_size), desc=description):
        batch = collator(list(rows.select(range(start, min(start + batch_size, len(rows))))))
        tokens = (batch["labels"][:, 1:] != NO_LABEL).sum().item()
        inputs = {name: values.to(model.device) for name, values in batch.items()}
        total += model(**inputs).loss.item() * tokens
        number += tokens
    model.train(was_training)
    return total / number
