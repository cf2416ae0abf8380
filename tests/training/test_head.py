"""The head in TRL's loss: scored where there are labels, with the numbers of every place's."""

import copy
import math

import pytest
import torch
from tiny_models import FROM_SCRATCH
from training_run import make_trainer
from trl.trainer.utils import add_fused_lm_head

from modeling_vitp import ViTPConfig, ViTPForConditionalGeneration
from modeling_vitp.training.model_patches import OUTPUTS, add_head_of_loss


@pytest.fixture
def model():
    torch.manual_seed(0)
    text = {"model_type": "qwen2", **FROM_SCRATCH["text_config"], "vocab_size": 300}
    return ViTPForConditionalGeneration(ViTPConfig(vision_config=FROM_SCRATCH["vision_config"], text_config=text))


def batch_of(labelled: float) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(10, 290, (3, 17), generator=generator)
    labels = ids.masked_fill(torch.rand(ids.shape, generator=generator) >= labelled, -100)
    mask = torch.ones_like(ids)
    mask[1, 12:] = 0
    return {"input_ids": ids, "attention_mask": mask, "labels": labels.masked_fill(mask == 0, -100)}


@pytest.mark.parametrize("labelled", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("num_items", [None, 50])
def test_loss_gradients_and_metrics_are_those_of_every_place(model, labelled, num_items):
    every = copy.deepcopy(model)
    add_fused_lm_head(every, outputs=OUTPUTS)
    add_head_of_loss(model)
    batch = batch_of(labelled)
    items = None if num_items is None else torch.tensor(num_items)
    wanted, found = (one(**batch, fused_lm_head=True, num_items_in_batch=items) for one in (every, model))
    number = int((batch["labels"][:, 1:] != -100).sum())
    assert found.log_probs.shape == (1, number) and wanted.log_probs.shape == (3, 16)
    for name in ("log_probs", "entropy", "is_top1", "label_mask"):
        torch.testing.assert_close(getattr(found, name).sum(), getattr(wanted, name).sum())
    torch.testing.assert_close(found.loss, wanted.loss)
    wanted.loss.backward()
    found.loss.backward()
    gradients = [{name: weight.grad for name, weight in one.named_parameters()} for one in (model, every)]
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-7)


def test_the_loss_is_cross_entropy_computed_by_hand(model):
    batch = batch_of(0.4)
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    logits = model(**inputs).logits
    wanted = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten())
    add_head_of_loss(model)
    torch.testing.assert_close(model(**batch, fused_lm_head=True).loss, wanted)
    with pytest.raises(IndexError):
        model(**batch | {"input_ids": torch.full((3, 17), 1000)}, fused_lm_head=True)
    torch.testing.assert_close(model(**inputs).logits, logits)  # without TRL's keyword, and after a step that failed


def test_a_copy_runs_its_own_layers(model):
    add_head_of_loss(model)
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.model.language_model.norm.weight.zero_()
    batch = batch_of(0.4)
    entropy = math.log(300)  # of logits that are all zero
    assert other(**batch, fused_lm_head=True).loss.item() == pytest.approx(entropy, rel=1e-5)
    assert model(**batch, fused_lm_head=True).loss.item() != pytest.approx(entropy, rel=1e-5)


@pytest.mark.parametrize("lora", [False, True])
def test_the_trainer_scores_labels_alone(tmp_path, lora):
    trainer = make_trainer(tmp_path, lora=lora, max_steps=1)
    seen = []
    inner = trainer.model.get_base_model() if lora else trainer.model
    scored = inner.forward

    def forward(*args, **kwargs):
        outputs = scored(*args, **kwargs)
        seen.append((outputs.label_mask.shape, int((kwargs["labels"][:, 1:] != -100).sum())))
        return outputs

    inner.forward = forward
    trainer.train()
    assert seen and all(shape == (1, number) for shape, number in seen)
