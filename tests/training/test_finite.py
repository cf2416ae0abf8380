"""A run ends at the first step that is not finite, and leaves nothing of it."""

from types import SimpleNamespace

import dense_data
import pytest
import torch
from pushed_runs import train
from tiny_models import FROM_SCRATCH
from training_run import make_trainer
from trl import ModelConfig

from modeling_vitp.command.errors import RunStopped
from modeling_vitp.recipes import finetune_segmentation
from modeling_vitp.training.callbacks import StopAtNotFinite
from modeling_vitp.training.checkpointing import last_checkpoint
from modeling_vitp.training.loading import load_start


def poison(trainer, what: str, step: int) -> list:
    """Makes loss or gradient NaN in a step; the ids of the rows of the step come after."""
    compute_loss, seen = trainer.compute_loss, []

    def poisoned(model, inputs, *args, **kwargs):
        loss = compute_loss(model, inputs, *args, **kwargs)
        if model.training and trainer.state.global_step == step - 1:
            seen.extend(trainer._finite.samples)
            if what == "loss":
                return loss * float("nan")
            loss.register_hook(lambda gradient: gradient * float("inf"))
        return loss

    trainer.compute_loss = poisoned
    return seen


@pytest.mark.parametrize("stream", [False, True], ids=["map", "stream"])
@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_a_step_that_is_not_finite_is_named_with_its_samples_and_not_saved(tmp_path, stream, what):
    trainer = make_trainer(tmp_path, stream=stream, save_steps=1, eval_strategy="no", logging_steps=1)
    seen = poison(trainer, what, 3)
    with pytest.raises(RunStopped, match="Step 3 is not finite") as stop:
        trainer.train()
    assert seen
    assert all(repr(name) in str(stop.value) for name in seen)
    assert last_checkpoint(tmp_path).endswith("checkpoint-2")


def test_a_run_that_diverges_stops_at_the_first_step_and_exports_nothing(data_folder, tmp_path):
    settings = {"from_scratch": FROM_SCRATCH, "dataset_name": str(data_folder)}
    with pytest.raises(RunStopped, match="Step 1 is not finite: weights are NaN or infinite, in "):
        train(tmp_path, **settings, learning_rate=1e38, warmup_steps=0, max_steps=1)
    assert not (tmp_path / "out" / "backbone").exists() and not (tmp_path / "out" / "model.safetensors").exists()
    assert not (tmp_path / "out" / "metrics.json").exists() and last_checkpoint(tmp_path / "out") is None


def test_a_step_that_a_scaler_skips_goes_on_until_the_scale_explains_nothing(tmp_path):
    trainer = make_trainer(tmp_path)
    finite = StopAtNotFinite(trainer)
    finite.losses, finite.samples = [torch.tensor(1.0), torch.tensor(float("nan"))], ["row-7"]

    def end_step():
        finite.on_step_end(trainer.args, trainer.state, trainer.control, model=trainer.model)

    trainer.accelerator.scaler = SimpleNamespace(get_scale=lambda: 2.0)
    end_step()
    trainer.accelerator.scaler = SimpleNamespace(get_scale=lambda: 0.5)
    with pytest.raises(RunStopped, match="the loss is nan. Its samples here: 'row-7'"):
        end_step()


def test_a_segmentation_that_diverges_names_its_samples(tmp_path):
    dense_data.make_loveda(tmp_path / "data")
    settings = {"submission": None, "num_pictures": 0, "learning_rate": 1e38, "warmup_steps": 0}
    with pytest.raises(RunStopped, match=r"Step 1 is not finite: weights .* Its samples here: '.*/"):
        finetune_segmentation.main(
            dense_data.smoke_arguments("loveda", tmp_path / "data", tmp_path / "out", **settings)
        )
    assert not (tmp_path / "out" / "model.safetensors").exists()


def test_weights_that_are_nan_are_no_start(model_and_processor, tmp_path):
    model, processor = model_and_processor
    with torch.no_grad():
        model.lm_head.weight[3, 3] = float("nan")
    for part in (model, processor):
        part.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="NaN or infinite, in lm_head.weight"):
        load_start(ModelConfig(str(tmp_path)), None, [])
