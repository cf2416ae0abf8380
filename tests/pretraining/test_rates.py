"""Learning rates of model parts, projector steps, and the global batch size."""

from contextlib import nullcontext

import pytest
import torch
from training_run import make_trainer

from modeling_vitp import ViTPTrainingConfig
from modeling_vitp.instructions.raw_tiles import normalize_tiles
from modeling_vitp.pretraining.model_patches import attention_by_sequence
from modeling_vitp.training.freezing import freeze, part_of

QUIET = {"eval_strategy": "no", "save_strategy": "no", "watch_samples": 0, "lr_scheduler_type": "constant"}
PARTS = ("vision", "projector", "language_model")


def weights_of(model) -> dict[str, torch.Tensor]:
    return {name: weight.detach().clone() for name, weight in model.named_parameters()}


def test_rate_of_each_part_scales_its_update(tmp_path):
    """Updates of SGD are proportional to the learning rate."""
    options = {
        **QUIET,
        "max_steps": 1,
        "optim": "sgd",
        "learning_rate": 0.01,
        "max_grad_norm": 0.0,
        "weight_decay": 0.0,
    }
    rates = {"vision": 0.02, "projector": 0.04, "language_model": 0.0}
    factors = {"vision": 2, "projector": 4, "language_model": 0}
    one = make_trainer(tmp_path / "one", **options)
    several = make_trainer(tmp_path / "several", **options, part_learning_rates=rates)
    start = weights_of(one.model)
    one.train(), several.train()
    seen = set()
    for name, weight in weights_of(several.model).items():
        expected = factors[part_of(name)] * (weights_of(one.model)[name] - start[name])
        torch.testing.assert_close(weight - start[name], expected, rtol=1e-3, atol=1e-5)
        seen |= {part_of(name)} if expected.abs().sum() > 0 or part_of(name) == "language_model" else set()
    assert seen == set(PARTS)


def test_projector_steps_equal_frozen_run(tmp_path):
    # If nothing before the projector needs a gradient, other attention kernels run. Adam would amplify their rounding,
    # because it divides by the size of a gradient; SGD does not.
    options = {**QUIET, "max_steps": 2, "max_grad_norm": 0.0, "optim": "sgd", "learning_rate": 1.0}
    first = make_trainer(tmp_path / "first", projector_steps=2, **options)
    frozen = make_trainer(tmp_path / "frozen", **options)
    freeze(frozen.model, ["vision", "language_model"])
    start = weights_of(first.model)
    first.train(), frozen.train()
    expected = weights_of(frozen.model)
    for name, weight in weights_of(first.model).items():
        update = expected[name] - start[name]
        assert (weight - start[name] - update).abs().max() <= 0.01 * update.abs().max(), name
        assert torch.equal(weight, start[name]) == (part_of(name) != "projector"), name


@pytest.mark.parametrize(
    ("option", "value", "part"),
    [("projector_steps", 1, "projector"), ("part_learning_rates", {"vision": 1.0}, "vision")],
)
def test_option_of_a_frozen_part_is_refused(tmp_path, option, value, part):
    trainer = make_trainer(tmp_path, **QUIET, **{option: value})
    freeze(trainer.model, [part])
    with pytest.raises(ValueError, match=option):
        trainer.create_optimizer()


def test_unknown_part_is_named(tmp_path):
    with pytest.raises(ValueError, match="'decoder'"):
        ViTPTrainingConfig(tmp_path, part_learning_rates={"decoder": 1e-3}, bf16=False)


def test_all_parts_train_after_projector_steps(tmp_path):
    trainer = make_trainer(tmp_path, projector_steps=1, **QUIET, max_steps=2)
    start = weights_of(trainer.model)
    trainer.train()
    moved = {
        part_of(name) for name, weight in weights_of(trainer.model).items() if not torch.equal(weight, start[name])
    }
    assert moved == set(PARTS)


def test_global_batch_size_sets_accumulation(tmp_path):
    options = {"bf16": False, "per_device_train_batch_size": 4}
    assert ViTPTrainingConfig(tmp_path, global_batch_size=128, **options).gradient_accumulation_steps == 32
    assert ViTPTrainingConfig(tmp_path, global_batch_size=4, **options).gradient_accumulation_steps == 1
    for size, more, named in [
        (130, {}, "128 and 132"),
        (2, {}, "are 4"),
        (128, {"gradient_accumulation_steps": 16}, "gradient_accumulation"),
    ]:
        with pytest.raises(ValueError, match=named):
            ViTPTrainingConfig(tmp_path, global_batch_size=size, **options, **more)


@pytest.mark.parametrize("padding_free", [False, True])
@pytest.mark.parametrize("loss_reduction", ["token", "sample"])
def test_samples_or_tokens_count_the_same(tmp_path, padding_free, loss_reduction):
    """The step of SGD is that of a loop over the samples, each of which is a batch of its own."""
    options = {**QUIET, "max_steps": 1, "optim": "sgd", "learning_rate": 0.01, "max_grad_norm": 0.0}
    options |= {"weight_decay": 0.0, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    trainer = make_trainer(tmp_path, **options, padding_free=padding_free, loss_reduction=loss_reduction)
    start = weights_of(trainer.model)
    batches = []
    training_step = trainer.training_step

    def recorded_step(model, inputs, *args):
        batches.append(dict(inputs))
        return training_step(model, inputs, *args)

    trainer.training_step = recorded_step
    trainer.train()
    trained = weights_of(trainer.model)
    trainer.model.load_state_dict(start)
    trainer.model.train().zero_grad()
    losses = []
    counts = []
    for batch in batches:
        labels = batch.pop("labels")
        pixel_values = normalize_tiles(batch.pop("pixel_values"), trainer.data_collator.processor.image_processor)
        with attention_by_sequence(trainer.model) if padding_free else nullcontext():
            scores = trainer.model(**batch, pixel_values=pixel_values, use_cache=False, answer_labels=labels)
        if padding_free:
            samples = [labels[0, first:end] for first, end in batch["cu_seq_lens_q"].unfold(0, 2, 1).tolist()]
        else:
            samples = list(labels)
        numbers = [int((sample[1:] != -100).sum()) for sample in samples]
        losses += (-scores.log_probs).split(numbers)
        counts += numbers
    assert len(counts) == 4 and len(set(counts)) > 1
    means = {
        "sample": torch.stack([loss.mean() for loss in losses]).mean(),
        "token": torch.cat(losses).mean(),
    }
    names, weights = zip(*(item for item in trainer.model.named_parameters() if item[1].requires_grad))
    deviations = {}
    for reduction, mean in means.items():
        gradients = torch.autograd.grad(mean, weights, retain_graph=True, allow_unused=True)
        differences = []
        updates = []
        for name, gradient in zip(names, gradients):
            if gradient is not None:
                updates.append(-0.01 * gradient.flatten())
                differences.append((trained[name] - start[name]).flatten() - updates[-1])
        deviations[reduction] = torch.cat(differences).norm() / torch.cat(updates).norm()
    other = {"sample": "token", "token": "sample"}[loss_reduction]
    assert deviations[loss_reduction] < 1e-3 < 0.05 < deviations[other]
