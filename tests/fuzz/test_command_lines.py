"""Malformed command lines and configurations are parsed, or raise a one-line error that names the argument."""

import json
import math
import random
from dataclasses import fields

import pytest
import yaml
from fuzzing import limits, mutate, one_input
from paths import CONFIGS

from modeling_vitp.command.errors import WrongArguments
from modeling_vitp.pretraining.arguments import PretrainArguments, VRLArguments
from modeling_vitp.probing.arguments import ProbeArguments
from modeling_vitp.tasks.arguments import BackboneArguments, StartArguments
from modeling_vitp.tasks.classification.arguments import ClassificationArguments, ClassificationSettings
from modeling_vitp.tasks.classification.data import ClassificationData
from modeling_vitp.tasks.detection.arguments import VARIANTS, DetectionArguments, DetectionSettings
from modeling_vitp.tasks.detection.data import DetectionData
from modeling_vitp.tasks.robustness_arguments import RobustnessArguments
from modeling_vitp.tasks.segmentation.arguments import DenseArguments, DenseSettings
from modeling_vitp.tasks.segmentation.data import DenseData
from modeling_vitp.training.command_line import parse

pytestmark = pytest.mark.slow
CLASSES = {
    "pretrain": (PretrainArguments, VRLArguments),
    "finetune": (DenseArguments, DenseSettings, BackboneArguments),
    "classification": (ClassificationArguments, ClassificationSettings, StartArguments),
    "detection": (DetectionArguments, DetectionSettings, BackboneArguments),
    "probe": (ProbeArguments,),
    "robustness": (RobustnessArguments,),
}
ODD = ["", "-1", "0", "1", "2.5", "1e400", "nan", "-inf", "true", "[]", "{}", "{", "null", "x", "--", "é\u2028", "a b"]


def words_of(rng, names):
    words = []
    for _ in range(rng.randint(1, 5)):
        name = rng.choice(names) if rng.random() < 0.9 else rng.choice(["lr", "modle", "", "data-root", "--"])
        if rng.random() < 0.1:
            name = name[:-1] or name
        words += [f"--{name}", *(rng.choice(ODD) for _ in range(rng.choice([0, 1, 1, 1, 2])))]
    return words


FILES = {"finetune": "loveda", "classification": "chest_xray14", "detection": "dior_r"}


@pytest.mark.parametrize("kind", CLASSES)
def test_malformed_arguments_and_configurations_are_named(kind, tmp_path, capsys):
    rng, own, refused = random.Random(0), CLASSES[kind], 0
    names = [item.name for cls in own for item in fields(cls)]
    path = tmp_path / "config.yaml"
    with limits():
        for number in range(75):
            if number % 2 and kind in FILES:
                config = yaml.safe_load((CONFIGS / f"{FILES[kind]}.yaml").read_text())
                config = {name: value for name, value in config.items() if name in names}
                path.write_text(json.dumps(mutate(rng, config, rng.choice([1, 1, 2, 3]))))
                words = ["--config", str(path)]
            else:
                words = words_of(rng, names)
            try:
                with one_input():
                    parsed = parse(words, "", own)
            except WrongArguments as error:
                refused += 1
                assert len(str(error).splitlines()) == 1 and str(error).strip(), words
            except SystemExit as end:  # argparse exits for a value of the wrong type and an option without a value.
                refused += 1
                assert end.code in (0, 2) and (end.code == 0 or "error:" in capsys.readouterr().err), words
            else:
                numbers = [value for each in parsed for value in vars(each).values() if isinstance(value, float)]
                assert not any(map(math.isnan, numbers)), words
    assert 15 < refused


DATA = {"classification": ClassificationData, "dense": DenseData, "detection": DetectionData}


def data_kind(config):
    if config.get("task") in VARIANTS:
        return "detection"
    return "dense" if isinstance(config["data"].get("classes", [""])[0], dict) else "classification"


@pytest.mark.parametrize("kind", DATA)
def test_malformed_data_settings_are_named(kind):
    rng = random.Random(2)
    configs = [yaml.safe_load(path.read_text()) for path in sorted(CONFIGS.glob("*.yaml"))]
    configs = [config for config in configs if isinstance(config, dict) and isinstance(config.get("data"), dict)]
    good = [config["data"] for config in configs if data_kind(config) == kind]
    good = [data for data in good if "dataset_name" not in data]  # Such data would be searched on the Hub.
    assert good
    with limits():
        for _ in range(375):
            data = mutate(rng, rng.choice(good), rng.choice([1, 1, 2, 3]))
            try:
                with one_input():
                    opened = DATA[kind].from_dict(data)
                    names = list(opened.splits)[:1]
                    if kind == "classification":
                        opened.find_classes(names, of_model=["a", "b"])
                    opened.open(names, *([rng.choice(list(VARIANTS))] if kind == "detection" else []))
            except ValueError as error:
                assert str(error).strip()
