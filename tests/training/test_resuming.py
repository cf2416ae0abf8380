"""Settings that must match on resume, and settings whose changes cause a warning."""

import copy
import logging
import shutil

import pytest
import torch
from peft import LoraConfig, get_peft_model
from training_run import make_trainer

from modeling_vitp.training.freezing import freeze
from modeling_vitp.training.resuming import base_fingerprint, check_resume_settings, fingerprint_data, freezing_settings

TARGETS = ["q_proj", "v_proj"]


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """Return the folder of two runs of one step, with and without an adapter."""
    folder = tmp_path_factory.mktemp("stopped")
    make_trainer(folder / "lora", lora=True, max_steps=1).train()
    make_trainer(folder / "full", max_steps=1).train()
    return folder


@pytest.mark.parametrize(
    ("run", "change", "named"),
    [
        ("lora", {"lora": {"lora_alpha": 256}}, "lora_alpha was 8 and is 256"),
        ("lora", {"lora": {"use_dora": True}}, "use_dora was False and is True"),
        ("lora", {"lora": {"target_modules": ["q_proj"]}}, r"lora_target_modules was .* and is \['q_proj'\]"),
        ("lora", {"lora": {"modules_to_save": ["multi_modal_projector"]}}, "freeze was .*lora_modules_to_save"),
        ("lora", {"lora": False}, "use_peft was True and is False"),
        ("full", {"lora": True}, "use_peft was False and is True"),
        ("full", {"learning_rate": 1e-6}, "learning_rate was 0.01 and is 1e-06"),
        ("full", {"weight_decay": 0.5, "adam_beta2": 0.9}, "weight_decay was 0.0 .* adam_beta2 was 0.999 and is 0.9"),
        ("full", {"optim": "sgd", "optim_args": "momentum=0.5"}, "optim_args was None and is 'momentum=0.5'"),
        ("full", {"part_learning_rates": {"vision": 0.1}}, "part_learning_rates was None"),
    ],
    ids=str,
)
def test_changed_adapter_or_optimizer_is_refused(stopped, run, change, named):
    """A resumed run takes the settings of its optimizer from the checkpoint, so that a change would be ignored."""
    with pytest.raises(ValueError, match=named):
        make_trainer(stopped / run, max_steps=2, **change).train(resume_from_checkpoint=True)


def test_changed_freezing_is_refused(stopped):
    trainer = make_trainer(stopped / "full")
    freeze(trainer.model, ["vision"], unfreeze_vision_layers=1)
    with pytest.raises(ValueError, match=r"freeze was \[\] and is \['vision'\].*unfreeze_vision_layers was 0 and is 1"):
        trainer.train(resume_from_checkpoint=True)


def test_adapter_on_another_model_is_refused(stopped):
    trainer = make_trainer(stopped / "lora", lora=True, max_steps=2)
    with torch.no_grad():
        trainer.model.get_base_model().lm_head.weight.mul_(1.01)
    with pytest.raises(ValueError, match="weights under the adapter was"):
        trainer.train(resume_from_checkpoint=True)


def test_checkpoint_without_record_is_a_warning(stopped, tmp_path, caplog):
    shutil.copytree(stopped / "lora", tmp_path / "lora")
    checkpoint = tmp_path / "lora" / "checkpoint-1"
    for has_record in (True, False):
        caplog.clear()
        trainer = make_trainer(tmp_path / "lora", lora=True, max_steps=1)
        trainer.train(resume_from_checkpoint=str(checkpoint))
        assert trainer.state.global_step == 1
        assert ("checkpoint-1 has no record of its run" in caplog.text) == (not has_record)
        (checkpoint / "checkpoint.json").unlink(missing_ok=True)
    trainer = make_trainer(tmp_path / "lora", lora={"target_modules": TARGETS + ["o_proj"]})
    with pytest.raises(ValueError, match="missing keys .*o_proj"):
        trainer.train(resume_from_checkpoint=str(checkpoint))


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


@pytest.mark.parametrize(
    ("parts", "layers"), [([], 0), (["vision"], 2), (["projector"], 0), (["vision", "language_model"], 0)]
)
def test_freezing_settings_equal_freeze_arguments(model, parts, layers):
    freeze(model, parts, layers)
    assert freezing_settings(model) == {"freeze": parts, "unfreeze_vision_layers": layers}


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"loss_type": "dft"}, "loss_type was None and is 'dft'"),
        ({"neftune_noise_alpha": 5.0}, "neftune_noise_alpha was None and is 5.0"),
        ({}, None),
    ],
    ids=str,
)
def test_changed_loss_is_a_warning(stopped, caplog, change, named):
    trainer = make_trainer(stopped / "full", max_steps=1, **change)
    with caplog.at_level(logging.WARNING):
        trainer._settings, trainer._data = trainer.run_settings(), fingerprint_data(trainer.training_data())
        trainer.check_checkpoint(str(stopped / "full" / "checkpoint-1"))
    assert (named in caplog.text) if named else ("changed settings" not in caplog.text)


def test_tuples_equal_recorded_lists(caplog):
    recorded, settings = {"fixed": {"spec": [1, 2]}, "free": {}}, {"fixed": {"spec": (1, 2)}, "free": {}}
    check_resume_settings("checkpoint-1", recorded, settings)
    assert not caplog.records


def test_extra_settings_are_compared_if_both_exist():
    """A recipe knows its initial weights, but a trainer in Python may not."""

    def check(recorded, now):
        check_resume_settings(
            "checkpoint-1", {"fixed": {}, "free": {}, "given": recorded}, {"fixed": {}, "free": {}, "given": now}
        )

    check({"weights": "a"}, {})
    check({}, {"weights": "b"})
    with pytest.raises(ValueError, match="weights was 'a' and is 'b'"):
        check({"weights": "a"}, {"weights": "b"})
