"""A model that is opened makes no request that its files ask for, and runs no code of them without consent."""

import io
import json
import re
import sys

import pytest
from internvl_checkpoints import edit_json
from other_backbones import save_backbone
from paths import ROOT
from vision_families import save_language_model, save_vit

from modeling_vitp import (
    ViTPConfig,
    ViTPForConditionalGeneration,
    ViTPProcessor,
    compose,
)
from modeling_vitp.convert.onnx import export_onnx
from modeling_vitp.modeling_vitp_backbone import open_vit
from modeling_vitp.opening import open_config
from modeling_vitp.pretraining.loading import check_from_scratch, load_checkpoint
from modeling_vitp.probing.backbones import load_backbone

WEIGHTS = "w.pth"
ATTACKS = {
    "pretrained_cfg": lambda url: {"model_args": {"pretrained_cfg": {"url": f"{url}/{WEIGHTS}"}, "pretrained": True}},
    "checkpoint_path": lambda url: {"model_args": {"checkpoint_path": WEIGHTS}},
    "architecture": lambda url: {"architecture": "hf-hub:tester/vit", "model_args": None},
}


@pytest.fixture(params=ATTACKS)
def attack(request, hub):
    """Fields of a configuration of timm that ask for weights of another place, and the offending name."""
    return request.param, ATTACKS[request.param](hub.url)


def test_sources_of_timm_are_refused(hub, attack, tmp_path):
    name, fields = attack
    save_vit(tmp_path, "timm_wrapper")
    edit_json(tmp_path / "config.json", **fields)
    requests_before = len(hub.requests)
    for opening in (open_vit, open_config, load_backbone, lambda folder: load_backbone(folder, random_seed=0)):
        with pytest.raises(ValueError, match=f"config.json.*{name}"):
            opening(str(tmp_path))
    assert len(hub.requests) == requests_before
    assert not (tmp_path / WEIGHTS).exists()


def test_sources_of_timm_inside_a_model_are_refused(hub, attack, model, processor, tmp_path):
    name, fields = attack
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    vision_config = {**config["vision_config"], "model_type": "timm_wrapper", "architecture": "vit_tiny_patch16_224"}
    edit_json(tmp_path / "config.json", vision_config={**vision_config, **fields})
    requests_before = len(hub.requests)
    for opening in (ViTPForConditionalGeneration.from_pretrained, ViTPConfig.from_pretrained, load_checkpoint):
        with pytest.raises(ValueError, match=f"config.json.*{name}"):
            opening(str(tmp_path))
    assert len(hub.requests) == requests_before


def test_source_of_timm_in_from_scratch_is_refused(attack):
    name, fields = attack
    vision_config = {"model_type": "timm_wrapper", **fields}
    with pytest.raises(ValueError, match=f"from_scratch.*{name}"):
        check_from_scratch({"vision_config": vision_config, "text_config": {}, "vocab_size": 300})


def add_code(folder, file, **fields):
    """Let a JSON file of a model name classes of a module that leaves the file `ran` where it is imported."""
    (folder / "evil.py").write_text(f"open({str(folder / 'ran')!r}, 'w')\nfrom modeling_vitp import *\n")
    edit_json(folder / file, **fields)


def backbone_with_code(folder):
    save_backbone(folder, "vitp")
    auto_map = {"AutoConfig": "evil.ViTPVisionConfig", "AutoModel": "evil.ViTPVisionModel"}
    add_code(folder, "config.json", model_type="evil", auto_map=auto_map)


def image_processor_with_code(folder):
    save_vit(folder, "dinov3_vit")
    auto_map = {"AutoImageProcessor": "evil.ViTPImageProcessor"}
    add_code(folder, "preprocessor_config.json", image_processor_type="Evil", auto_map=auto_map)


def language_model_with_code(folder):
    save_language_model(folder)
    auto_map = {"AutoConfig": "evil.ViTPConfig", "AutoModelForCausalLM": "evil.ViTPModel"}
    add_code(folder, "config.json", model_type="evil", auto_map=auto_map)


def compose_with(folder):
    vit = folder.parent / "vit"
    save_vit(vit, "vit")
    return compose(str(vit), str(folder))


@pytest.mark.parametrize(
    ("write", "opening"),
    [
        (backbone_with_code, lambda folder: load_backbone(str(folder))),
        (image_processor_with_code, lambda folder: load_backbone(str(folder))),
        (image_processor_with_code, lambda folder: export_onnx(folder, folder / "model.onnx")),
        (language_model_with_code, compose_with),
    ],
)
def test_code_of_a_model_is_refused(write, opening, tmp_path, monkeypatch):
    folder = tmp_path / "evil"
    write(folder)
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n" * 9))
    with pytest.raises(ValueError, match=f"{folder}.*trust_remote_code=True"):
        opening(folder)
    assert not (folder / "ran").exists()


def test_code_of_a_processor_needs_the_argument(processor, tmp_path, monkeypatch):
    processor.save_pretrained(tmp_path)
    auto_map = {"AutoTokenizer": [None, "evil.Tokenizer"]}
    add_code(tmp_path, "tokenizer_config.json", tokenizer_class="Tokenizer", auto_map=auto_map)
    with (tmp_path / "evil.py").open("a") as file:
        file.write(
            "from transformers import PreTrainedTokenizerFast\nclass Tokenizer(PreTrainedTokenizerFast):\n    pass\n"
        )
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n" * 9))
    with pytest.raises(ValueError, match=f"{tmp_path}.*trust_remote_code=True"):
        ViTPProcessor.from_pretrained(tmp_path)
    assert not (tmp_path / "ran").exists()
    assert ViTPProcessor.from_pretrained(tmp_path, trust_remote_code=True).tokenizer.get_vocab()
    assert (tmp_path / "ran").exists()


def test_each_auto_class_is_opened_without_remote_code():
    """transformers' Auto classes ask on the terminal, so that no line of the package calls their `from_pretrained`."""
    call = re.compile(r"(?<!['\"])\bAuto\w+\.from_pretrained\((?!\")")
    for folder in ("modeling_vitp", "recipes", "space"):
        for path in (ROOT / folder).rglob("*.py"):
            code = "\n".join(line for line in path.read_text().splitlines() if not line.lstrip().startswith("#"))
            assert not call.search(re.sub(r'""".*?"""', "", code, flags=re.DOTALL)), path
