"""Tests of the configurations of the package."""

import pytest
import yaml
from paths import CONFIGS, LAB_CONFIGS

from modeling_vitp.tasks.arguments import BackboneArguments
from modeling_vitp.tasks.detection.arguments import DetectionArguments, DetectionSettings
from modeling_vitp.tasks.detection.data import DetectionData
from modeling_vitp.training.command_line import parse

# Classes, task, learning rate, decay and epochs of the published models.
PUBLISHED = {
    "dior": (20, "horizontal", 2e-5, 0.9, 12),
    "dior_r": (20, "oriented", 2.5e-5, 0.95, 12),
    "dota_v2": (18, "oriented", 2.5e-5, 0.95, 12),
    "sardet_100k": (6, "horizontal", 1e-5, 0.95, 12),
    "rsar": (6, "oriented", 2.5e-5, 0.95, 12),
    "ssdd": (1, "instances", 1e-5, 0.9, 24),
}
WHOLE = [
    "modeling_vitp.tasks.detection.arguments.DetectionArguments",
    "modeling_vitp.tasks.detection.trainer.ViTPDetectionTrainingConfig",
    "modeling_vitp.tasks.arguments.BackboneArguments",
]


@pytest.mark.parametrize("name", [*PUBLISHED, "nuclei_oriented", "aerial_trees_boxes"])
def test_configuration_has_published_settings(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # The folder of the backbone.
    (tmp_path / "outputs/remote_sensing_paper/backbone").mkdir(parents=True)
    own = DetectionArguments, DetectionSettings, BackboneArguments
    folder = CONFIGS if name in PUBLISHED else LAB_CONFIGS
    words = ["--config", str(folder / f"{name}.yaml"), "--output_dir", str(tmp_path)]
    args, settings, _ = parse(words, "", own, WHOLE, ["transformers.training_args"])
    data = DetectionData.from_dict(args.data)
    named = {*args.train_splits, args.eval_split, args.test_split, getattr(args.submission, "split", None)} - {None}
    assert named <= set(data.splits) and set(settings.right_angle_classes) <= set(data.names.names)
    if name in PUBLISHED:
        published = len(data.names.names), args.task, settings.learning_rate, settings.layer_decay
        assert (*published, settings.num_train_epochs) == PUBLISHED[name]
        assert settings.lr_milestones == ([16, 22] if name == "ssdd" else [8, 11])
        assert settings.max_grad_norm == 35 and settings.warmup_steps == 500 and settings.weight_decay == 0.05
        assert settings.level_embeddings_at_input and settings.position_weight_decay


def test_class_order_is_published_order():
    dior, dior_r = (
        yaml.safe_load((CONFIGS / f"{name}.yaml").read_text())["data"]["classes"] for name in ("dior", "dior_r")
    )
    assert sorted(name.lower() for name in dior) == sorted(dior_r)
    assert [dior.index(name) for name in ("dam", "Expressway-Service-area", "Expressway-toll-station")] == [6, 7, 8]
    assert [dior_r.index(name) for name in ("expressway-service-area", "expressway-toll-station", "dam")] == [6, 7, 8]
    assert [dior_r[place] for place in (5, 15, 19)] == ["chimney", "storagetank", "windmill"]
    dota = yaml.safe_load((CONFIGS / "dota_v2.yaml").read_text())["data"]["classes"]
    assert [dota[place] for place in (9, 11, 16, 17)] == ["storage-tank", "roundabout", "airport", "helipad"]
