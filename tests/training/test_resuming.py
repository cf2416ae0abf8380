"""Settings that must match on resume, and settings whose changes cause a warning."""

import copy
import logging
import shutil

import pytest
import torch
from peft import LoraConfig, get_peft_model
from training_run import make_trainer

from modeling_vitp.training.freezing import freeze
from modeling_vitp.training.resuming import base_fingerprint, check_resume_settings, fingerprint_data, frozen_parts

TARGETS = ["q_proj", "v_proj"]


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """Return the folder of two runs of one step, with and without an adapter."""
    folder = tmp_path_factory.mktemp("stopped")
    make_trainer(folder / "lora", lora=True, max_steps=1).train()
    make_trainer(folder / "full", max_steps=1).train()
    return folder


@pytest.mark.parametrize(
    ("lora", "message"),
    [
        ({"lora_alpha": 256}, "lora_alpha was 8 and is 256.*new run: set another"),
        ({"r": 4}, "lora_r was 2 and is 4"),
        ({"use_rslora": True}, "use_rslora was False and is True"),
        ({"use_dora": True}, "use_dora was False and is True"),
        ({"target_modules": ["q_proj"]}, r"lora_target_modules was \['q_proj', 'v_proj'\] and is \['q_proj'\]"),
        (
            {"modules_to_save": ["multi_modal_projector"]},
            r"freeze_projector was True and is False; lora_modules_to_save was None and is \['multi_modal",
        ),
        (False, r"use_peft was True and is False\. "),
    ],
    ids=str,
)
def test_changed_adapter_is_refused(stopped, lora, message):
    with pytest.raises(ValueError, match=message):
        make_trainer(stopped / "lora", lora=lora, max_steps=1).train(resume_from_checkpoint=True)


def test_adapter_on_another_model_is_refused(stopped):
    trainer = make_trainer(stopped / "lora", lora=True, max_steps=2)
    with torch.no_grad():
        trainer.model.get_base_model().lm_head.weight.mul_(1.01)
    with pytest.raises(ValueError, match=r"weights under the adapter was '\w{16}' and is '\w{16}'\. Restore"):
        trainer.train(resume_from_checkpoint=True)
    with pytest.raises(ValueError, match="use_peft was False and is True.*model_name_or_path"):
        make_trainer(stopped / "full", lora=True).train(resume_from_checkpoint=True)


@pytest.mark.parametrize("name", ["lora", "full"])
def test_checkpoint_without_record_is_a_warning(stopped, tmp_path, caplog, name):
    shutil.copytree(stopped, tmp_path, dirs_exist_ok=True)
    for has_record in (True, False):
        caplog.clear()
        trainer = make_trainer(tmp_path / name, lora=name == "lora", max_steps=1)
        checkpoint = tmp_path / name / "checkpoint-1"
        trainer.train(resume_from_checkpoint=str(checkpoint))
        assert trainer.state.global_step == 1
        assert ("checkpoint-1 has no record of its run" in caplog.text) == (not has_record)
        (checkpoint / "checkpoint.json").unlink(missing_ok=True)


def test_adapter_without_record_must_have_same_keys(stopped, tmp_path):
    shutil.copytree(stopped / "lora", tmp_path / "lora")
    (tmp_path / "lora" / "checkpoint-1" / "checkpoint.json").unlink()
    trainer = make_trainer(tmp_path / "lora", lora={"target_modules": TARGETS + ["o_proj"]})
    with pytest.raises(ValueError, match="missing keys .*o_proj"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "lora" / "checkpoint-1"))


def test_base_fingerprint_ignores_the_adapter(model):
    settings = {"target_modules": TARGETS, "init_lora_weights": False}
    found = {
        base_fingerprint(get_peft_model(copy.deepcopy(model), LoraConfig(**settings | more)), True)
        for more in ({}, {"r": 2}, {"target_modules": ["o_proj"]}, {"modules_to_save": ["multi_modal_projector"]})
    }
    assert len(found) == 1
    wrapped = get_peft_model(model, LoraConfig(**settings))
    weights = [weight for weight in wrapped.parameters() if not weight.requires_grad]
    with torch.no_grad():
        for weight in weights:
            weight.add_(1.0)
            found.add(base_fingerprint(wrapped, True))
    assert len(found) == 1 + len(weights) > 60


@pytest.mark.parametrize("flags", [(False,) * 3, (True, False, False), (False, True, False), (True, False, True)])
@pytest.mark.parametrize("layers", [0, 2])
def test_frozen_parts_equal_freeze_arguments(model, flags, layers):
    layers = layers if flags[0] else 0
    freeze(model, *flags, layers)
    names = "freeze_vision", "freeze_projector", "freeze_language_model", "unfreeze_vision_layers"
    assert frozen_parts(model) == dict(zip(names, (*flags, layers)))


def test_changed_freezing_is_refused(stopped):
    trainer = make_trainer(stopped / "full")
    freeze(trainer.model, vision=True, unfreeze_vision_layers=1)
    message = "freeze_vision was False and is True; unfreeze_vision_layers was 0 and is 1"
    with pytest.raises(ValueError, match=message):
        trainer.train(resume_from_checkpoint=True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"loss_type": "dft"}, "loss_type was None and is 'dft'"),
        ({"neftune_noise_alpha": 5.0}, "neftune_noise_alpha was None and is 5.0"),
        (
            {"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lr": 1e-3}},
            "lr_scheduler_kwargs was None and is {'min_lr': 0.001}",
        ),
        ({}, None),
    ],
    ids=str,
)
def test_changed_loss_or_schedule_is_a_warning(stopped, tmp_path, caplog, change, message):
    shutil.copytree(stopped / "full", tmp_path / "run")
    trainer = make_trainer(tmp_path / "run", max_steps=1, **change)
    with caplog.at_level(logging.WARNING):
        trainer._settings, trainer._data = trainer.run_settings(), fingerprint_data(trainer.training_data())
        trainer.check_checkpoint(str(tmp_path / "run" / "checkpoint-1"))
    assert (message in caplog.text) if message else ("changed settings" not in caplog.text)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"learning_rate": 1e-6}, "learning_rate was 0.01 and is 1e-06"),
        ({"weight_decay": 0.5, "adam_beta2": 0.9}, "weight_decay was 0.0 and is 0.5; adam_beta2 was 0.999 and is 0.9"),
        ({"optim": "sgd", "optim_args": "momentum=0.5"}, "optim_args was None and is 'momentum=0.5'"),
        ({"vision_learning_rate": 0.1}, "vision_learning_rate was None and is 0.1"),
    ],
    ids=str,
)
def test_changed_optimizer_is_refused(stopped, change, message):
    """A resumed run takes the settings of its optimizer from the checkpoint, so that a change would be ignored."""
    with pytest.raises(ValueError, match=f"{message}.*model_name_or_path"):
        make_trainer(stopped / "full", max_steps=2, **change).train(resume_from_checkpoint=True)


def test_changed_settings_are_named(caplog):
    settings = {"fixed": {"seed": 0, "spec": (1, 2)}, "free": {"max_steps": 1}}
    recorded = {"fixed": {"seed": 0, "spec": [1, 2]}, "free": {"max_steps": 1}}
    check_resume_settings("checkpoint-1", recorded, settings)
    assert not caplog.records
    check_resume_settings("checkpoint-1", recorded, {**settings, "free": {"max_steps": 2}})
    assert "max_steps was 1 and is 2" in caplog.text
    with pytest.raises(ValueError, match=r"seed was 0 and is 1\. .*model_name_or_path"):
        check_resume_settings("checkpoint-1", recorded, {**settings, "fixed": {"seed": 1, "spec": (1, 2)}})


def test_extra_settings_are_compared_if_both_exist():
    """A recipe knows its initial weights, but a trainer in Python may not."""
    settings = {"fixed": {}, "free": {}}
    check_resume_settings("checkpoint-1", settings | {"given": {"weights": "a"}}, settings | {"given": {}})
    check_resume_settings("checkpoint-1", settings | {"given": {}}, settings | {"given": {"weights": "b"}})
    with pytest.raises(ValueError, match="weights was 'a' and is 'b'"):
        check_resume_settings(
            "checkpoint-1", settings | {"given": {"weights": "a"}}, settings | {"given": {"weights": "b"}}
        )
