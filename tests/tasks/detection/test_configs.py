"""Configurations of detection name splits and classes of their own data."""

import pytest
import yaml
from paths import CONFIGS, LAB_CONFIGS

from modeling_vitp.tasks import TASKS, options
from modeling_vitp.tasks.detection.arguments import VARIANTS
from modeling_vitp.training import command_line

PATHS = []
for folder in (CONFIGS, LAB_CONFIGS):
    for path in sorted(folder.glob("*.yaml")):
        if yaml.safe_load(path.read_text()).get("task") in VARIANTS:
            PATHS.append(path)


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_named_splits_and_classes_exist(path, tmp_path, monkeypatch):
    monkeypatch.setattr(command_line, "check_paths", lambda arguments: None)
    parsed = options.parse_options(TASKS["detection"], ["--config", str(path), "--output_dir", str(tmp_path)], "")
    settings = {name: value for item in vars(parsed).values() for name, value in vars(item).items()}
    submission_split = getattr(settings["submission"], "split", None)
    named = {*settings["train_splits"], settings["eval_split"], settings["test_split"], submission_split} - {None}
    assert named <= set(settings["data"]["splits"])
    data = TASKS["detection"].data_class.from_dict(settings["data"])
    assert set(settings["right_angle_classes"]) <= set(data.names.names)
