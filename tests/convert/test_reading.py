"""Sources of a conversion: recognition without a configuration, and errors."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from huggingface_hub import metadata_load
from internvl_checkpoints import (
    FIXTURE,
    ORIGINAL_VISION,
    edit_json,
    expected_keys,
    load_weights,
    names,
    native_model,
    save_original,
)
from safetensors.torch import load_file, save_file
from transformers import InternVLVisionModel

from modeling_vitp import convert_checkpoint
from modeling_vitp.convert.__main__ import main


def published_vit(width: int) -> dict[str, torch.Tensor]:
    """Return zeros under the names and shapes of a published ViT, with two layers and few positions."""
    state = {key: torch.zeros(1) for key in names(ORIGINAL_VISION, 2)}
    shapes = {"attn.qkv": 3 * width, "mlp.fc1": 64}
    for key in state:
        rows = next((rows for part, rows in shapes.items() if part in key), width)
        columns = 64 if "mlp.fc2" in key else width
        is_matrix = key.endswith("weight") and "norm" not in key
        state[key] = torch.zeros((rows, columns) if is_matrix else rows, dtype=torch.float16)
    state["embeddings.class_embedding"] = torch.zeros(1, 1, width, dtype=torch.float16)
    state["embeddings.position_embedding"] = torch.zeros(1, 17, width, dtype=torch.float16)
    state["embeddings.patch_embedding.weight"] = torch.zeros(width, 3, 14, 14, dtype=torch.float16)
    if width == 3200:
        state = {key: value for key, value in state.items() if "norm" not in key or not key.endswith("bias")}
        state = {key: value for key, value in state.items() if "qkv.bias" not in key}
        for index in range(2):
            for name in "qk":
                state[f"encoder.layers.{index}.attn.{name}_norm.weight"] = torch.zeros(width, dtype=torch.float16)
    return state


@pytest.mark.parametrize("width", [1024, 3200])
def test_published_vit_needs_no_configuration(tmp_path, width):
    save_file(published_vit(width), tmp_path / "vit.safetensors")
    convert_checkpoint(tmp_path / "vit.safetensors", tmp_path / "backbone")
    config = InternVLVisionModel.from_pretrained(tmp_path / "backbone").config
    assert config.num_attention_heads == {1024: 16, 3200: 25}[width]
    assert tuple(config.image_size) == (56, 56)
    assert config.num_hidden_layers == 2
    assert config.intermediate_size == 64
    assert config.attention_bias == (width == 1024)
    assert config.use_qk_norm == (width == 3200)
    assert config.norm_type == {1024: "layer_norm", 3200: "rms_norm"}[width]
    assert config.use_mean_pooling


def edit_weights(folder: Path, edit) -> None:
    weights = load_file(folder / "model.safetensors")
    edit(weights)
    save_file({key: value.contiguous() for key, value in weights.items()}, folder / "model.safetensors")


def cut_short(folder: Path) -> None:
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[: len(whole) // 2])


def as_pickle(folder: Path) -> None:
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def as_another_model(folder: Path) -> None:
    save_file({"transformer.wte.weight": torch.zeros(4, 4)}, folder / "model.safetensors")
    (folder / "config.json").write_text('{"model_type": "gpt2"}')


def edit_part(folder: Path, part: str, **changes) -> None:
    fields = json.loads((folder / "config.json").read_text())
    edit_json(folder / "config.json", **{part: fields[part] | changes})


KEY = "vision_model.encoder.layers.1.attn.qkv.weight"
MISTAKES = {
    "cut short": (cut_short, r"model\.safetensors .*cut short"),
    "pickle": (as_pickle, r"safetensors.*\['pytorch_model\.bin'\].*Pickles"),
    "other model": (as_another_model, r"'gpt2' with tensors such as 'transformer\.wte\.weight'"),
    "no config": (lambda folder: (folder / "config.json").unlink(), "model_type.*config.json.*None"),
    "broken config": (lambda folder: (folder / "config.json").write_text("{"), "config.json is not valid JSON"),
    "no number": (
        lambda f: edit_part(f, "vision_config", hidden_size="wide"),
        "config.json cannot be opened: .*hidden_size",
    ),
    "no vision_config": (
        lambda f: edit_json(f / "config.json", vision_config=None),
        "config.json.*vision_config",
    ),
    "no llm_config": (lambda f: edit_json(f / "config.json", llm_config=None), "config.json.*llm_config"),
    "other type": (lambda f: edit_json(f / "config.json", model_type="llava"), "'internvl_chat'.*'llava'"),
    "missing": (lambda f: edit_weights(f, lambda w: w.pop(KEY)), f"missing: {KEY}$"),
    "unknown": (lambda f: edit_weights(f, lambda w: w.update(odd=w[KEY].clone())), "unknown: odd$"),
    "shape": (
        lambda f: edit_weights(f, lambda w: w.update({KEY: w[KEY][:-3]})),
        rf"of a wrong shape: {KEY} is \[93, 32\], expected \[96, 32\]$",
    ),
    "pixel shuffle": (lambda f: edit_json(f / "config.json", ps_version=None), "ps_version='v1'"),
    "select_layer": (lambda f: edit_json(f / "config.json", select_layer=-4), "select_layer=-4"),
    "pad2square": (lambda f: edit_json(f / "config.json", pad2square=True), "pad2square=True"),
    "template": (lambda f: edit_json(f / "config.json", template="phi3-chat"), "template='phi3-chat'"),
    "image size": (lambda f: edit_json(f / "config.json", force_image_size=224), "force_image_size=224"),
    "LoRA": (lambda f: edit_json(f / "config.json", use_llm_lora=16), "use_llm_lora=16"),
    "LM": (lambda f: edit_part(f, "llm_config", model_type="internlm2"), "language model.*'internlm2'"),
    "activation": (lambda f: edit_part(f, "vision_config", hidden_act="relu"), "hidden_act='relu'"),
    "norm": (lambda f: edit_part(f, "vision_config", norm_type="batch"), "norm_type.*'batch'"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_wrong_source_is_named(tmp_path, mistake):
    spoil, message = MISTAKES[mistake]
    source = tmp_path / "source"
    source.mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copy(FIXTURE / name, source)
    spoil(source)
    before = sorted(tmp_path.iterdir())
    with pytest.raises((ValueError, OSError)) as stop:
        main([str(source), str(tmp_path / "target"), "--image_token_id", "7"])
    assert re.search(message, " ".join(str(stop.value).split())), stop.value
    assert sorted(tmp_path.iterdir()) == before


def test_missing_part_of_a_configuration_is_named(tmp_path):
    native_model().save_pretrained(tmp_path / "source")
    edit_json(tmp_path / "source" / "config.json", vision_config=None)
    with pytest.raises(ValueError, match="'internvl'.*vision_config"):
        convert_checkpoint(tmp_path / "source", tmp_path / "target")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_vit_of_unknown_width_needs_a_configuration(tmp_path):
    shutil.copy(FIXTURE / "vision_only.safetensors", tmp_path)
    with pytest.raises(ValueError, match="heads.*width 32.*config.json"):
        convert_checkpoint(tmp_path / "vision_only.safetensors", tmp_path / "target")
    (tmp_path / "config.json").write_text('{"model_type": "mmdet"}')
    with pytest.raises(ValueError, match="'mmdet'.*vision_config"):
        convert_checkpoint(tmp_path / "vision_only.safetensors", tmp_path / "target")
    assert not (tmp_path / "target").exists()


@pytest.mark.slow
def test_hub_id_is_read_from_the_cache(tmp_path):
    cache, commit = tmp_path / "cache", "0123456789abcdef0123456789abcdef01234567"
    repo = cache / "models--someone--internvl"
    snapshot = save_original(native_model(), repo / "snapshots" / commit)
    (snapshot / "README.md").write_text("---\nlicense: mit\n---\n")
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(commit)
    command = [sys.executable, "-m", "modeling_vitp.convert", "someone/internvl", str(tmp_path / "vitp")]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(cache)}
    done = subprocess.run([*command, "--image_token_id", "5"], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    card = metadata_load(tmp_path / "vitp" / "README.md")
    assert (card["license"], card["base_model"]) == ("mit", "someone/internvl")
    assert len(load_weights(tmp_path / "vitp")) == len(expected_keys("vitp"))


def test_lora_adapter_is_refused(tmp_path):
    weights = {"base_model.model.model.language_model.layers.0.self_attn.q_proj.lora_A.weight": torch.zeros(2, 4)}
    save_file(weights, tmp_path / "adapter_model.safetensors")
    with pytest.raises(ValueError, match="LoRA adapter"):
        convert_checkpoint(tmp_path, tmp_path / "out", to="backbone")


def test_one_file_of_a_repo_is_downloaded(hub, tmp_path):
    api = hub.api()
    repo = "org/weights"
    api.create_repo(repo)
    save_file(published_vit(1024), tmp_path / "vit.safetensors")
    for name in ("rs", "med"):
        api.upload_file(
            path_or_fileobj=tmp_path / "vit.safetensors",
            path_in_repo=f"ckpts/{name}.safetensors",
            repo_id="org/weights",
        )
    card = b"---\nlicense: cc-by-nc-4.0\n---\n"
    api.upload_file(path_or_fileobj=card, path_in_repo="README.md", repo_id="org/weights")
    api.upload_file(path_or_fileobj=b"{}", path_in_repo="ckpts/settings.json", repo_id="org/weights")
    hub.requests.clear()
    convert_checkpoint("org/weights", tmp_path / "backbone", file="ckpts/rs.safetensors")
    assert any("ckpts/settings.json" in request.path for request in hub.requests)
    assert not any("med.safetensors" in request.path for request in hub.requests)
    assert InternVLVisionModel.from_pretrained(tmp_path / "backbone").config.hidden_size == 1024
    assert metadata_load(tmp_path / "backbone" / "README.md")["license"] == "cc-by-nc-4.0"
    hub.requests.clear()
    with pytest.raises(ValueError, match="org/weights.*--file.*ckpts/med.safetensors, ckpts/rs.safetensors"):
        convert_checkpoint("org/weights", tmp_path / "other")
    assert not any(".safetensors" in request.path for request in hub.requests)
    with pytest.raises(ValueError, match="org/weights.*ckpts/sea.safetensors.*ckpts/med.safetensors"):
        convert_checkpoint("org/weights", tmp_path / "other", file="ckpts/sea.safetensors")
    (tmp_path / "folder").mkdir()
    shutil.move(tmp_path / "vit.safetensors", tmp_path / "folder" / "a.safetensors")
    with pytest.raises(ValueError, match="b.safetensors.*a.safetensors"):
        convert_checkpoint(tmp_path / "folder", tmp_path / "other", file="b.safetensors")
    convert_checkpoint(tmp_path / "folder", tmp_path / "other", file="a.safetensors", license="mit")
