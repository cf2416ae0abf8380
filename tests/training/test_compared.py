"""What a run may not have changed where it goes on, and what it may, with a warning."""

import copy
import json
import logging
import shutil

import pytest
import torch
from peft import LoraConfig, get_peft_model
from training_run import make_trainer

from modeling_vitp.training.freezing import freeze
from modeling_vitp.training.resume_config import base_fingerprint, frozen_parts

TARGETS = ["q_proj", "v_proj"]


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """After one step: with an adapter, and without."""
    folder = tmp_path_factory.mktemp("stopped")
    make_trainer(folder / "lora", lora=True, max_steps=1).train()
    make_trainer(folder / "full", max_steps=1).train()
    return folder


def forget(checkpoint, kind, names=()):
    """Makes a record older than some settings."""
    record = json.loads((checkpoint / "checkpoint.json").read_text())
    for name in names:
        del record["settings"][kind][name]
    if not names:
        del record["settings"][kind]
    (checkpoint / "checkpoint.json").write_text(json.dumps(record))


@pytest.mark.parametrize(
    ("lora", "message"),
    [
        ({"lora_alpha": 256}, "lora_alpha was 8 and is 256. Restore them to go on; or start a new run: give another"),
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
def test_another_adapter_is_not_gone_on_with(stopped, lora, message):
    with pytest.raises(ValueError, match=message):
        make_trainer(stopped / "lora", lora=lora, max_steps=1).train(resume_from_checkpoint=True)


def test_an_adapter_is_not_put_on_another_model_or_into_a_run_without(stopped):
    trainer = make_trainer(stopped / "lora", lora=True, max_steps=2)
    with torch.no_grad():
        trainer.model.get_base_model().lm_head.weight.mul_(1.01)
    with pytest.raises(ValueError, match=r"weights under the adapter was '\w{16}' and is '\w{16}'\. Restore"):
        trainer.train(resume_from_checkpoint=True)
    with pytest.raises(ValueError, match=r"use_peft was False and is True.*give the checkpoint as model_name_or_path"):
        make_trainer(stopped / "full", lora=True).train(resume_from_checkpoint=True)


def test_the_same_adapter_goes_on_and_an_older_checkpoint_does_with_a_warning(stopped, tmp_path, caplog):
    shutil.copytree(stopped, tmp_path, dirs_exist_ok=True)
    for name in ("lora", "full"):
        for is_older in (False, True):
            caplog.clear()
            trainer = make_trainer(tmp_path / name, lora=name == "lora", max_steps=1)
            trainer.train(resume_from_checkpoint=True)
            assert trainer.state.global_step == 1
            is_told = "checkpoint-1 has no record of its adapter: whether it is one of this model" in caplog.text
            assert is_told == (is_older and name == "lora")
            if not is_older:
                forget(tmp_path / name / "checkpoint-1", "model")
    with pytest.raises(ValueError, match="The checkpoint does not fit the model: missing keys .*o_proj"):
        make_trainer(tmp_path / "lora", lora={"target_modules": TARGETS + ["o_proj"]}).train(
            resume_from_checkpoint=True
        )


def test_the_fingerprint_is_of_every_weight_of_the_model_and_of_none_of_the_adapter(model):
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
def test_frozen_parts_are_known_by_their_options(model, flags, layers):
    layers = layers if flags[0] else 0
    freeze(model, *flags, layers)
    names = "freeze_vision", "freeze_projector", "freeze_language_model", "unfreeze_vision_layers"
    assert frozen_parts(model) == dict(zip(names, (*flags, layers)))


def test_what_is_frozen_is_named_where_it_is_not_what_was(stopped):
    trainer = make_trainer(stopped / "full")
    freeze(trainer.model, vision=True, unfreeze_vision_layers=1)
    message = "freeze_vision was False and is True; unfreeze_vision_layers was 0 and is 1"
    with pytest.raises(ValueError, match=message):
        trainer.train(resume_from_checkpoint=True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"loss_type": "dft"}, "loss_type was None and is 'dft'"),
        ({"label_smoothing_factor": 0.25}, "label_smoothing_factor was None and is 0.25"),
        ({"neftune_noise_alpha": 5.0}, "neftune_noise_alpha was None and is 5.0"),
        ({"optim": "sgd", "optim_args": "momentum=0.5"}, "optim_args was None and is 'momentum=0.5'"),
        (
            {"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lr": 1e-3}},
            "lr_scheduler_kwargs was None and is {'min_lr': 0.001}",
        ),
        ({}, None),
    ],
    ids=str,
)
def test_another_loss_or_schedule_is_a_warning(stopped, tmp_path, caplog, change, message):
    shutil.copytree(stopped / "full", tmp_path / "run")
    names = "loss_type lr_scheduler_kwargs optim_args label_smoothing_factor neftune_noise_alpha".split()
    forget(tmp_path / "run" / "checkpoint-1", "free", names)  # an older checkpoint: they were not in use
    trainer = make_trainer(tmp_path / "run", max_steps=1, **change)
    with caplog.at_level(logging.WARNING):
        trainer._settings, trainer._data = trainer.run_settings(), trainer._fingerprint()
        trainer.check_checkpoint(str(tmp_path / "run" / "checkpoint-1"))
    assert (message in caplog.text) if message else ("changed settings" not in caplog.text)
