"""The loss with own and with other images, against one row at a time through plain transformers."""

import numpy as np
import pytest
import torch
from datasets import Dataset, Features, Image, List, Value

from modeling_vitp.instructions.collator import ViTPDataCollator
from modeling_vitp.recipes.tasks.trees.answers import losses_with_own_and_other_images


def test_the_losses_are_means_over_all_answer_tokens(model, processor, picture_rows):
    rows = picture_rows
    collator = ViTPDataCollator(processor)
    measured = losses_with_own_and_other_images(model, collator, rows, batch_size=2)

    def oracle(shift: int) -> float:
        total = number = 0
        for index in range(len(rows)):
            image = rows[(index + shift) % len(rows)]["image"]
            batch = collator([{"id": index, "messages": rows[index]["messages"], "image": image}])
            with torch.no_grad():
                logits = model.eval()(**{key: value for key, value in batch.items() if key != "labels"}).logits[0, :-1]
            targets = batch["labels"][0, 1:]
            for place in torch.nonzero(targets != -100)[:, 0]:
                total -= logits[place].log_softmax(-1)[targets[place]].item()
                number += 1
        return total / number

    assert measured["loss"] == pytest.approx(oracle(0), rel=1e-5)
    assert measured["loss_swapped_images"] == pytest.approx(oracle(len(rows) // 2), rel=1e-5)
    assert measured["loss"] != pytest.approx(measured["loss_swapped_images"], rel=1e-6)


def test_the_model_is_left_in_the_mode_it_was_in(model, processor, picture_rows):
    model.train()
    losses_with_own_and_other_images(model, ViTPDataCollator(processor), picture_rows.select([0, 1]))
    assert model.training


@pytest.fixture
def picture_rows():
    rng = np.random.default_rng(0)
    pictures = [rng.integers(0, 256, (56, 56, 3), dtype=np.uint8) for _ in range(5)]
    messages = [
        [{"role": "user", "content": "What is it?"}, {"role": "assistant", "content": "a " + "b " * number}]
        for number in range(5)
    ]
    features = Features({"image": Image(), "messages": List({"role": Value("string"), "content": Value("string")})})
    return Dataset.from_dict({"image": pictures, "messages": messages}, features=features)
