"""Trainers override only public members of the trainers of transformers and TRL."""

import pytest
from transformers import Trainer
from trl import SFTTrainer

from modeling_vitp import ViTPTrainer
from modeling_vitp.classification.trainer import ViTPClassificationTrainer
from modeling_vitp.dense.trainer import ViTPSegmentationTrainer
from modeling_vitp.detection.trainer import ViTPDetectionTrainer


@pytest.mark.parametrize(
    "trainer", [ViTPTrainer, ViTPClassificationTrainer, ViTPSegmentationTrainer, ViTPDetectionTrainer]
)
def test_trainer_overrides_no_private_member(trainer):
    theirs = {name for base in (Trainer, SFTTrainer) for name in vars(base)}
    ours = [cls for cls in trainer.__mro__ if cls.__module__.startswith("modeling_vitp.")]
    overridden = {name for cls in ours for name in vars(cls) if name in theirs and not name.startswith("__")}
    assert {"train", "save_model", "training_step"} <= overridden
    assert {name for name in overridden if name.startswith("_")} - {"_tag_names"} == set()
