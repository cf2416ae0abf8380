"""Estimated memory of a dry run, compared with the live tensor storages of a real training."""

import weakref

import pytest
import torch
from datasets import Dataset
from sample_rows import sized_row
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from training_run import FEATURES, OPTIONS

from modeling_vitp import ViTPTrainer, ViTPTrainingConfig
from modeling_vitp.pretraining.loading import build_model, build_tokenizer
from modeling_vitp.pretraining.plan import BatchShape, step_cost

VISION = {"hidden_size": 192, "num_hidden_layers": 6, "num_attention_heads": 3, "intermediate_size": 768}
VISION |= {"image_size": [224, 224], "patch_size": [14, 14], "attention_bias": True}
TEXT = {"hidden_size": 256, "num_hidden_layers": 8, "num_attention_heads": 4, "intermediate_size": 1024}
TEXT |= {"num_key_value_heads": 2, "vocab_size": 8192, "tie_word_embeddings": False}
SIDE = 224
COLUMNS, ROWS = 2, 2


class Alive(TorchDispatchMode):
    """Dispatch mode that counts the bytes of live storages."""

    def __init__(self):
        super().__init__()
        self.sizes = {}
        self.bytes = self.most = 0

    def add(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage._cdata not in self.sizes:
            self.sizes[storage._cdata] = storage.nbytes()
            self.bytes += storage.nbytes()
            self.most = max(self.most, self.bytes)
            weakref.finalize(storage, self.remove, storage._cdata)

    def remove(self, address: int) -> None:
        self.bytes -= self.sizes.pop(address)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        outputs = function(*args, **(kwargs or {}))
        for output in tree_leaves(outputs):
            if isinstance(output, torch.Tensor):
                self.add(output)
        return outputs


@pytest.mark.slow
@pytest.mark.parametrize(
    ("ratio", "every", "batches"),
    [(0.75, 0, 2), (0.0, 1, 2), (0.0, 2, 2), (0.0, 0, 1)],
)
def test_bf16_training_memory_equals_estimate(tmp_path, ratio, every, batches):
    """The error is at most a tenth, or a sixth with one batch, whose gradients replace its activations."""
    tokenizer = build_tokenizer(["How many trees? There are 12 trees."], 400)
    model, processor = build_model(tokenizer, VISION, TEXT, {"max_patches": COLUMNS * ROWS})
    rows = [sized_row(index, [(COLUMNS * SIDE, ROWS * SIDE)]) for index in range(4)]
    options = {
        "activation_checkpointing": every > 0,
        "bf16": True,
        "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": batches,
        "max_steps": 2,
        "vrl_drop_ratio": ratio,
    }
    if every:
        options["activation_checkpointing_kwargs"] = {"every_n_layers": every}
    args = ViTPTrainingConfig(str(tmp_path), **{**OPTIONS, **options, "eval_strategy": "no"})
    trainer = ViTPTrainer(
        model, args, train_dataset=Dataset.from_list(rows, features=FEATURES), processing_class=processor
    )
    batch = trainer.data_collator([trainer.train_dataset[0]])
    visual = int((batch["input_ids"] == model.config.image_token_id).sum())
    tiles, answers = len(batch["pixel_values"]), int((batch["labels"] >= 0).sum())
    shape = BatchShape(1, tiles, batch["input_ids"].shape[1] - visual, ratio, answers)

    alive = Alive()
    for weight in model.parameters():
        alive.add(weight)
    with alive:
        trainer.train()
    cost = step_cost(model.config, shape, every)
    assert tiles == COLUMNS * ROWS + 1
    assert 0.9 < cost.memory / alive.most < (1.1 if batches > 1 else 1.2)
