"""Malformed command lines and configurations end in arguments, or in one line that names the argument."""

import json
import math
import random
from dataclasses import fields

import pytest
import yaml
from fuzzing import limits, mutate
from paths import CONFIGS

from modeling_vitp.dense.arguments import DenseModelArguments, DenseSettings, FinetuneArguments
from modeling_vitp.dense.data import DenseData
from modeling_vitp.evaluation.arguments import ExperimentArguments, RobustnessArguments
from modeling_vitp.probing.arguments import ProbeArguments
from modeling_vitp.training.arguments import PretrainArguments, VRLArguments
from modeling_vitp.training.command_line import WrongArguments, parse

pytestmark = pytest.mark.slow
CLASSES = {
    "pretrain": (PretrainArguments, VRLArguments),
    "finetune": (FinetuneArguments, DenseSettings, DenseModelArguments),
    "probe": (ProbeArguments,),
    "experiment": (ExperimentArguments,),
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


@pytest.mark.parametrize("kind", CLASSES)
def test_malformed_words(kind, capsys):
    rng, own, refused = random.Random(0), CLASSES[kind], 0
    names = [item.name for cls in own for item in fields(cls)]
    with limits():
        for _ in range(150):
            words = words_of(rng, names)
            try:
                parsed = parse(words, "", own)
            except WrongArguments as error:
                refused += 1
                assert len(str(error).splitlines()) == 1 and str(error).strip(), words
            except SystemExit as end:  # argparse's own: a value of another type, an option without a value
                refused += 1
                assert end.code in (0, 2) and (end.code == 0 or "error:" in capsys.readouterr().err), words
            else:
                numbers = [value for each in parsed for value in vars(each).values() if isinstance(value, float)]
                assert not any(map(math.isnan, numbers)), words
    assert 30 < refused


@pytest.mark.parametrize("kind", ["finetune", "experiment"])
def test_malformed_configurations(kind, tmp_path):
    rng, own = random.Random(1), CLASSES[kind]
    config = yaml.safe_load(
        (CONFIGS / ("loveda.yaml" if kind == "finetune" else "experiment_backbone.yaml")).read_text()
    )
    known = {item.name for cls in own for item in fields(cls)}
    config = {name: value for name, value in config.items() if name in known}
    path = tmp_path / "config.yaml"
    with limits():
        for _ in range(400):
            path.write_text(json.dumps(mutate(rng, config, rng.choice([1, 1, 2, 3]))))
            try:
                parse(["--config", str(path)], "", own)
            except WrongArguments as error:
                assert len(str(error).splitlines()) == 1 and str(error).strip()
            except SystemExit as end:
                assert end.code == 2


def test_malformed_data_of_dense_configurations():
    rng = random.Random(2)
    configs = [yaml.safe_load(path.read_text()) for path in sorted(CONFIGS.glob("*.yaml"))]
    good = [config["data"] for config in configs if isinstance(config, dict) and "data" in config]
    with limits():
        for _ in range(1500):
            data = mutate(rng, rng.choice(good), rng.choice([1, 1, 2, 3]))
            try:
                opened = DenseData.from_dict(data)
                opened.open(list(opened.splits)[:1])
            except ValueError as error:
                assert str(error).strip()
