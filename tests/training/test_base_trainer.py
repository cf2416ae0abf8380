"""Public members that trainers override, and what processes other than the first one do."""

from types import SimpleNamespace

import pytest
from accelerate import FullyShardedDataParallelPlugin
from accelerate.state import AcceleratorState
from training_run import make_trainer
from transformers import Trainer
from trl import SFTTrainer

from modeling_vitp import ViTPTrainer
from modeling_vitp.tasks.classification.trainer import ViTPClassificationTrainer
from modeling_vitp.tasks.detection.trainer import ViTPDetectionTrainer
from modeling_vitp.tasks.segmentation.trainer import ViTPSegmentationTrainer
from modeling_vitp.training import base_trainer


@pytest.mark.parametrize(
    "trainer", [ViTPTrainer, ViTPClassificationTrainer, ViTPSegmentationTrainer, ViTPDetectionTrainer]
)
def test_trainer_overrides_no_private_member(trainer):
    theirs = {name for base in (Trainer, SFTTrainer) for name in vars(base)}
    ours = [cls for cls in trainer.__mro__ if cls.__module__.startswith("modeling_vitp.")]
    overridden = {name for cls in ours for name in vars(cls) if name in theirs and not name.startswith("__")}
    assert {"train", "save_model", "training_step"} <= overridden
    assert {name for name in overridden if name.startswith("_")} - {"_tag_names"} == set()


def test_sharded_state_dict_is_refused(tmp_path, monkeypatch):
    """transformers would save no model at the end, without an error."""
    trainer = make_trainer(tmp_path)
    trainer.is_fsdp_enabled = True
    plugin = FullyShardedDataParallelPlugin(fsdp_version=2)
    monkeypatch.setattr(AcceleratorState(), "fsdp_plugin", plugin, raising=False)
    with pytest.raises(ValueError, match="fsdp_state_dict_type must be FULL_STATE_DICT"):
        trainer.train()


@pytest.fixture
def other_process(tmp_path, monkeypatch):
    """Trainer of the second process of a run."""
    trainer = make_trainer(tmp_path)
    monkeypatch.setattr(trainer, "is_world_process_zero", lambda: False)
    return trainer


def test_files_of_push_are_deleted_by_first_process(other_process, tmp_path):
    (tmp_path / base_trainer.OUTBOX).mkdir()
    other_process.finish_pushes()
    assert (tmp_path / base_trainer.OUTBOX).is_dir()


def test_all_processes_resume_from_checkpoint_of_first(other_process, tmp_path, monkeypatch):
    monkeypatch.setattr(base_trainer, "last_checkpoint", lambda folder: pytest.fail("looked in the folder of a node"))
    monkeypatch.setattr(base_trainer, "broadcast_object_list", lambda objects: [str(tmp_path / "checkpoint-4"), None])
    monkeypatch.setattr(
        ViTPTrainer, "train", lambda self, resume_from_checkpoint: SimpleNamespace(metrics=resume_from_checkpoint)
    )
    assert other_process.train_or_resume() == str(tmp_path / "checkpoint-4")
