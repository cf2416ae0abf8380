"""Scores of answer tokens alone equal those computed from the logits of all tokens."""

import pytest
import torch
from tiny_models import FROM_SCRATCH
from torch.nn.functional import cross_entropy
from training_run import make_trainer

from modeling_vitp import ViTPConfig, ViTPForConditionalGeneration


@pytest.fixture
def untrained():
    torch.manual_seed(0)
    text = {"model_type": "qwen2", **FROM_SCRATCH["text_config"], "vocab_size": 300}
    return ViTPForConditionalGeneration(ViTPConfig(vision_config=FROM_SCRATCH["vision_config"], text_config=text))


def make_batch(labeled: float) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(10, 290, (3, 17), generator=generator)
    labels = ids.masked_fill(torch.rand(ids.shape, generator=generator) >= labeled, -100)
    mask = torch.ones_like(ids)
    mask[1, 12:] = 0
    return {"input_ids": ids, "attention_mask": mask}, labels.masked_fill(mask == 0, -100)


@pytest.mark.parametrize("at_once", [4, 512])
@pytest.mark.parametrize("labeled", [0.0, 0.3, 1.0])
def test_answer_scores_equal_full_logits(untrained, labeled, at_once, monkeypatch):
    monkeypatch.setattr("modeling_vitp.modeling_vitp.SCORED_AT_ONCE", at_once)
    batch, labels = make_batch(labeled)
    logits = untrained(**batch).logits[:, :-1]
    is_answer = labels[:, 1:] != -100
    targets, of_answers = labels[:, 1:][is_answer], logits[is_answer]
    wanted = cross_entropy(of_answers, targets, reduction="sum")
    wanted.backward()
    gradients = {name: weight.grad for name, weight in untrained.named_parameters() if weight.grad is not None}
    untrained.zero_grad()
    scores = untrained(**batch, answer_labels=labels)
    torch.testing.assert_close(-scores.log_probs, cross_entropy(of_answers, targets, reduction="none"))
    torch.testing.assert_close(
        scores.entropy, torch.distributions.Categorical(logits=of_answers, validate_args=False).entropy()
    )
    assert torch.equal(scores.is_top1, of_answers.argmax(-1) == targets) and not scores.entropy.requires_grad
    (-scores.log_probs.sum()).backward()
    found = {name: weight.grad for name, weight in untrained.named_parameters() if weight.grad is not None}
    torch.testing.assert_close(found, gradients, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("lora", [False, True])
def test_trainer_computes_only_answer_logits(tmp_path, lora):
    trainer = make_trainer(tmp_path, lora=lora, max_steps=1, eval_strategy="no")
    rows, answers = [], []
    inner = trainer.model.get_base_model() if lora else trainer.model
    inner.lm_head.register_forward_hook(lambda module, inputs, output: rows.append(len(inputs[0])))
    compute_loss = trainer.compute_loss

    def count_answers(model, inputs, **kwargs):
        answers.append((inputs["labels"][:, 1:] != -100).sum().item())
        return compute_loss(model, inputs, **kwargs)

    trainer.compute_loss = count_answers
    trainer.train()
    assert rows == answers and answers
