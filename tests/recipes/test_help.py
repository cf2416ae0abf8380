"""Options that the two helps of the trainings show."""

import re

import pytest

from modeling_vitp.__main__ import main as dispatch
from modeling_vitp.command.settings import advanced_options, own_fields
from modeling_vitp.convert import onnx
from modeling_vitp.pretraining import arguments as pretraining
from modeling_vitp.pretraining.config import ViTPTrainingConfig
from modeling_vitp.recipes import (
    export_onnx,
    finetune_change_detection,
    finetune_classification,
    finetune_detection,
    finetune_segmentation,
    pretrain,
)
from modeling_vitp.tasks import TASKS


def shown_options(recipe, word: str, capsys) -> set[str]:
    """Return the names of the options in a help, also those in its list of usual options."""
    with pytest.raises(SystemExit):
        recipe.main([word])
    usual_options, _, options = capsys.readouterr().out.partition("usual options:")[2].partition("\noptions:")
    names = set(re.findall(r"^  --(\w+)", options, re.MULTILINE))
    return names | set(re.findall(r"--(\w+)", usual_options))


@pytest.mark.parametrize(
    ("recipe", "classes", "most"),
    [
        (pretrain, (pretraining.PretrainArguments, pretraining.VRLArguments), 50),
        *(
            (recipe, (TASKS[task].arguments, TASKS[task].settings, TASKS[task].start), 40)
            for task, recipe in {
                "classification": finetune_classification,
                "segmentation": finetune_segmentation,
                "change_detection": finetune_change_detection,
                "detection": finetune_detection,
            }.items()
        ),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_short_help_leaves_out_advanced_options(recipe, classes, most, capsys):
    own_names = set()
    advanced_names = set()
    for cls in classes:
        own_names |= own_fields(cls).keys()
        advanced_names |= advanced_options(cls)
    assert advanced_names <= own_names
    short = shown_options(recipe, "--help", capsys)
    assert len(short) <= most
    assert own_names - short == advanced_names
    assert short | own_names <= shown_options(recipe, "--help_all", capsys)


def test_help_hides_unsupported_options(capsys):
    everything = shown_options(pretrain, "--help_all", capsys)
    assert everything.isdisjoint(ViTPTrainingConfig.unsupported)
    assert everything.isdisjoint({"auto_find_batch_size", "load_in_8bit"})


def test_overview_says_where_to_start(capsys):
    dispatch([])
    printed = capsys.readouterr().out
    assert "Start here: vitp " in printed and "--help_all" in printed


def test_export_is_announced_before_it_begins(tmp_path, capsys, monkeypatch):
    def export(*_):
        assert "takes minutes" in capsys.readouterr().out
        return []

    monkeypatch.setattr(onnx, "export_onnx", export)
    assert export_onnx.main([str(tmp_path), "model.onnx"]) == 0
