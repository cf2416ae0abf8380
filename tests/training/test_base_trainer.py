"""What is private in the trainers that ours are built on is named in one place, and looked for."""

import ast
import configparser
from importlib.metadata import version

import pytest
from paths import ROOT
from transformers import Trainer
from trl import SFTTrainer

from modeling_vitp.training import base_trainer
from modeling_vitp.training.base_trainer import OVERRIDDEN, READ, TESTED, check_members, missing_members

FILES = [
    ROOT / "modeling_vitp" / name
    for name in (
        "training/base_trainer.py",
        "training/vitp_trainer.py",
        "training/fine_tuning.py",
        "dense/trainer.py",
    )
]


def test_private_members_in_use_are_listed():
    theirs = {name for base in (Trainer, SFTTrainer) for name in dir(base)}
    theirs |= {name for names in READ.values() for name in names}
    code = [getattr(member, "__code__", None) for base in (Trainer, SFTTrainer) for member in vars(base).values()]
    theirs |= {name for part in code if part is not None for name in part.co_names}
    used = set()
    for file in FILES:
        for node in ast.walk(ast.parse(file.read_text())):
            name = node.attr if isinstance(node, ast.Attribute) else getattr(node, "name", "")
            if isinstance(node, ast.Attribute | ast.FunctionDef) and name.startswith("_") and not name.endswith("__"):
                used.add(name)
    public_of_torch = {"_is_avx512_bf16_supported", "_is_amx_tile_supported", "_name_or_path", "_unseen_tile"}
    assert (used & theirs) - public_of_torch == {*OVERRIDDEN, *(name for names in READ.values() for name in names)}
    assert missing_members() == []


def test_missing_member_names_tested_releases(monkeypatch):
    monkeypatch.setitem(base_trainer.OVERRIDDEN, "_run_epoch", {"number"})
    monkeypatch.setitem(base_trainer.OVERRIDDEN, "_gone", set())
    monkeypatch.setitem(base_trainer.READ, Trainer, ("_sum",))
    needed = "which lack the parameter number of Trainer._run_epoch; Trainer._gone; Trainer._sum: pip install "
    with pytest.raises(ImportError, match=f"{needed}'transformers==5.24.*' 'trl==1.16"):
        check_members()


def test_tested_releases_are_those_allowed():
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    requirements = setup["options"]["install_requires"] + setup["options.extras_require"]["recipes"]
    for name, release in TESTED.items():
        major, minor = map(int, release.split("."))
        assert f"{name}>={release},<{major}.{minor + 1}" in requirements.split()
        assert version(name).startswith(f"{release}.")
