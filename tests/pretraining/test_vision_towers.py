"""Training runs with a vision transformer of each family."""

import pytest
import torch
from training_run import make_trainer, run
from transformers import AutoModel
from vision_families import FAMILIES, NAMES

from modeling_vitp import export_backbone
from modeling_vitp.vision_towers import tower_of

TRAINED = [name if name == "dinov2" else pytest.param(name, marks=pytest.mark.slow) for name in NAMES]


def vision_of(family: str) -> dict:
    fields = FAMILIES[family][1].to_dict()
    return fields | ({"drop_path_rate": 0.2} if "drop_path_rate" in fields else {})


@pytest.mark.parametrize("family", TRAINED)
def test_ten_steps_change_every_trained_tensor(family, tmp_path):
    trainer = make_trainer(tmp_path / "run", vision=vision_of(family), max_steps=10, eval_strategy="no", save_steps=50)
    tower = trainer.model.model.vision_tower
    before = {name: weight.detach().clone() for name, weight in tower.named_parameters()}
    trainer.train()
    for name, weight in tower.named_parameters():
        assert torch.equal(weight, before[name]) != weight.requires_grad, name
    export_backbone(trainer.model, tmp_path / "backbone", trainer.processing_class.image_processor)
    opened, family_of = AutoModel.from_pretrained(tmp_path / "backbone").eval(), tower_of(tower.config)
    side = 56 if family in ("dinov2", "dinov2_with_registers") else 64
    pixels = torch.randn(2, 3, side, side)
    with torch.no_grad():
        assert torch.equal(family_of.patch_tokens(opened, pixels), family_of.patch_tokens(tower.eval(), pixels))


@pytest.mark.slow
@pytest.mark.parametrize("family", NAMES)
def test_killed_run_of_each_family_is_exact(family, tmp_path):
    options = {"vision": vision_of(family), "max_steps": 10}
    whole = run(tmp_path / "whole", **options)
    for kill in [("step", 3), ("model", 6)]:
        run(tmp_path / "killed", kill, **options)
    assert run(tmp_path / "killed", **options) == whole
    assert whole["step"] == 10
