import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import original_checkpoint
import pytest
import torch
from huggingface_hub import metadata_load, split_torch_state_dict_into_shards
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pictures import picture
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_models import TEXT, VISION
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    GotOcr2ImageProcessor,
    InternVLConfig,
    InternVLForConditionalGeneration,
    InternVLProcessor,
    InternVLVideoProcessor,
    InternVLVisionModel,
    Qwen2Tokenizer,
)

from modeling_vitp import (
    ViTPForConditionalGeneration,
    ViTPImageProcessor,
    ViTPProcessor,
    ViTPVisionModel,
    convert_checkpoint,
    export_backbone,
)
from modeling_vitp.convert import tensor_files
from modeling_vitp.convert.__main__ import main
from modeling_vitp.convert.internvl import from_internvl, internvl_processor
from modeling_vitp.convert.original_config import text_from_original, text_to_original
from modeling_vitp.training.from_scratch import build_tokenizer
from modeling_vitp.training.pretraining import check_compatible

FIXTURE = original_checkpoint.FOLDER
NAMED_TOKENS = {
    "start_image_token": "<img>",
    "end_image_token": "</img>",
    "context_image_token": "<IMG_CONTEXT>",
    "video_token": "<video>",
}

# The names in each kind of checkpoint, as they stand in such files: {} is the number of a layer.
LANGUAGE_MODEL = """
model.embed_tokens.weight
model.norm.weight
model.layers.{}.input_layernorm.weight
model.layers.{}.post_attention_layernorm.weight
model.layers.{}.self_attn.q_proj.weight
model.layers.{}.self_attn.q_proj.bias
model.layers.{}.self_attn.k_proj.weight
model.layers.{}.self_attn.k_proj.bias
model.layers.{}.self_attn.v_proj.weight
model.layers.{}.self_attn.v_proj.bias
model.layers.{}.self_attn.o_proj.weight
model.layers.{}.mlp.gate_proj.weight
model.layers.{}.mlp.up_proj.weight
model.layers.{}.mlp.down_proj.weight
lm_head.weight
"""
BACKBONE = """
embeddings.cls_token
embeddings.position_embeddings
embeddings.patch_embeddings.projection.weight
embeddings.patch_embeddings.projection.bias
encoder.layer.{}.lambda_1
encoder.layer.{}.lambda_2
encoder.layer.{}.layernorm_before.weight
encoder.layer.{}.layernorm_before.bias
encoder.layer.{}.layernorm_after.weight
encoder.layer.{}.layernorm_after.bias
encoder.layer.{}.attention.q_proj.weight
encoder.layer.{}.attention.q_proj.bias
encoder.layer.{}.attention.k_proj.weight
encoder.layer.{}.attention.k_proj.bias
encoder.layer.{}.attention.v_proj.weight
encoder.layer.{}.attention.v_proj.bias
encoder.layer.{}.attention.projection_layer.weight
encoder.layer.{}.attention.projection_layer.bias
encoder.layer.{}.mlp.fc1.weight
encoder.layer.{}.mlp.fc1.bias
encoder.layer.{}.mlp.fc2.weight
encoder.layer.{}.mlp.fc2.bias
"""
ORIGINAL_VISION = """
embeddings.class_embedding
embeddings.position_embedding
embeddings.patch_embedding.weight
embeddings.patch_embedding.bias
encoder.layers.{}.ls1
encoder.layers.{}.ls2
encoder.layers.{}.norm1.weight
encoder.layers.{}.norm1.bias
encoder.layers.{}.norm2.weight
encoder.layers.{}.norm2.bias
encoder.layers.{}.attn.qkv.weight
encoder.layers.{}.attn.qkv.bias
encoder.layers.{}.attn.proj.weight
encoder.layers.{}.attn.proj.bias
encoder.layers.{}.mlp.fc1.weight
encoder.layers.{}.mlp.fc1.bias
encoder.layers.{}.mlp.fc2.weight
encoder.layers.{}.mlp.fc2.bias
"""
PROJECTOR = ["layer_norm.weight", "layer_norm.bias", "linear_1.weight", "linear_1.bias"]
PROJECTOR += ["linear_2.weight", "linear_2.bias"]
MLP1 = ["mlp1.0.weight", "mlp1.0.bias", "mlp1.1.weight", "mlp1.1.bias", "mlp1.3.weight", "mlp1.3.bias"]


def names(template: str, num_layers: int, prefix: str = "") -> set[str]:
    return {prefix + line.format(index) for line in template.split() for index in range(num_layers)}


def expected_keys(kind: str, vision_layers: int = 3, text_layers: int = 2) -> set[str]:
    """Of the fixture's architecture: QKV bias, LayerNorm, no QK norm, a Qwen2 with a head of its own."""
    language_model = names(LANGUAGE_MODEL, text_layers)
    if kind == "backbone":
        return names(BACKBONE, vision_layers)
    if kind == "original_vision":
        return names(ORIGINAL_VISION, vision_layers)
    if kind == "original":
        keys = names(ORIGINAL_VISION, vision_layers, "vision_model.") | set(MLP1)
        return keys | {f"language_model.{key}" for key in language_model}
    if kind == "internvl":
        keys = names(BACKBONE, vision_layers, "vision_tower.") | {f"multi_modal_projector.{key}" for key in PROJECTOR}
        return keys | {f"language_model.{key}" for key in language_model}
    keys = names(BACKBONE, vision_layers, "model.vision_tower.")
    keys |= {f"model.multi_modal_projector.{key}" for key in PROJECTOR} | {"lm_head.weight"}
    return keys | {f"model.language_model.{key.removeprefix('model.')}" for key in language_model - {"lm_head.weight"}}


def load_weights(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a folder, which must not repeat any."""
    weights = {}
    for file in sorted(folder.glob("*.safetensors")):
        part = load_file(file)
        assert not weights.keys() & part.keys()
        weights |= part
    index = folder / "model.safetensors.index.json"
    if index.exists():
        weight_map = json.loads(index.read_text())["weight_map"]
        assert all(key in safe_open(folder / name, "pt").keys() for key, name in weight_map.items())
        assert weight_map.keys() == weights.keys()
    return weights


def assert_same(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for key, tensor in wanted.items():
        assert found[key].dtype == tensor.dtype and torch.equal(found[key], tensor), key


def vivid(model: nn.Module, seed: int = 0) -> nn.Module:
    """Random weights that show in the outputs, norms and layer scales included."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn(weight.shape, generator=generator) * 0.15)
    return model.eval()


def native_model(
    vision: dict | None = None,
    text: dict | None = None,
    dtype: torch.dtype = torch.float32,
    tied: bool = False,
    vocab_size: int = 320,
    image_token_id: int = 5,
) -> InternVLForConditionalGeneration:
    """transformers' own model with random weights."""
    text_config = {**TEXT, "tie_word_embeddings": tied, "vocab_size": vocab_size, **(text or {})}
    text_config = AutoConfig.for_model(text_config.pop("model_type"), **text_config)
    config = InternVLConfig(
        vision_config={**VISION, **(vision or {})},
        text_config=text_config.to_dict(),
        image_token_id=image_token_id,
        image_seq_length=4,
        tie_word_embeddings=tied,
    )
    return vivid(InternVLForConditionalGeneration(config)).to(dtype)


def save_original(model: InternVLForConditionalGeneration, folder: Path, max_shard_size: str = "5GB") -> Path:
    """A checkpoint as the original code writes it, with the configuration of the fixture adapted."""
    vision, text = model.config.vision_config, model.config.text_config
    state = dict(model.state_dict())
    if model.config.tie_word_embeddings:
        state.pop("lm_head.weight")
    state = original_checkpoint.as_original(state, vision.num_hidden_layers)
    folder.mkdir(parents=True, exist_ok=True)
    save_shards(state, folder, max_shard_size)
    config = json.loads((FIXTURE / "config.json").read_text())
    config["vision_config"] |= {
        "hidden_size": vision.hidden_size,
        "intermediate_size": vision.intermediate_size,
        "num_hidden_layers": vision.num_hidden_layers,
        "num_attention_heads": vision.num_attention_heads,
        "image_size": vision.image_size[0],
        "patch_size": vision.patch_size[0],
        "qkv_bias": vision.attention_bias,
        "qk_normalization": vision.use_qk_norm,
        "norm_type": vision.norm_type,
    }
    same = ("model_type", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    same += ("num_key_value_heads", "vocab_size", "tie_word_embeddings")
    config["llm_config"] |= {name: getattr(text, name) for name in same}
    config["llm_config"]["rope_theta"] = text.rope_parameters["rope_theta"]
    config |= {"force_image_size": vision.image_size[0], "hidden_size": text.hidden_size}
    config["tie_word_embeddings"] = model.config.tie_word_embeddings
    config["torch_dtype"] = str(model.dtype).removeprefix("torch.")
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def save_shards(state: dict[str, torch.Tensor], folder: Path, max_shard_size: str = "5GB") -> None:
    plan = split_torch_state_dict_into_shards(
        state, filename_pattern="model{suffix}.safetensors", max_shard_size=max_shard_size
    )
    for name, keys in plan.filename_to_tensors.items():
        save_file({key: state[key].contiguous() for key in keys}, folder / name, {"format": "pt"})
    if plan.is_sharded:
        index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def in_own_memory(model_class, folder):
    """The model with weights that are not mapped from the file, where they lie at any multiple of eight bytes: the last
    bit of a product may depend on that (on AMD EPYC it does)."""
    model = model_class.from_pretrained(folder)
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
    return model


def inputs_for(model: InternVLForConditionalGeneration, tiles: int = 2) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    image_token_id, height = model.config.image_token_id, model.config.vision_config.image_size[0]
    text = torch.randint(20, 300, (1, 9), generator=generator)
    num_tokens = tiles * model.config.image_seq_length
    input_ids = torch.cat([text[:, :3], torch.full((1, num_tokens), image_token_id), text[:, 3:]], 1)
    pixel_values = torch.randn(tiles, 3, height, height, generator=generator)
    return {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids), "pixel_values": pixel_values}


@pytest.fixture(scope="module")
def fixture_as_vitp(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fixture") / "vitp"
    convert_checkpoint(FIXTURE, folder, image_token_id=7)
    return folder


# The outputs of the original code


def close(actual: torch.Tensor, wanted: torch.Tensor) -> None:
    torch.testing.assert_close(actual, wanted.reshape(actual.shape), atol=1e-5, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["vitp", "internvl"])
def test_the_whole_model_gives_the_outputs_of_the_original_code(fixture_as_vitp, tmp_path, kind):
    folder = fixture_as_vitp
    if kind == "internvl":
        folder = convert_checkpoint(FIXTURE, tmp_path / "internvl", "internvl", image_token_id=7)
    model = AutoModelForImageTextToText.from_pretrained(folder)
    assert type(model) is {"vitp": ViTPForConditionalGeneration, "internvl": InternVLForConditionalGeneration}[kind]
    given = SimpleNamespace(**original_checkpoint.expected())
    tower = model.model.vision_tower
    close(tower(given.pixel_values).last_hidden_state, given.vision_last_hidden_state)
    close(tower(given.other_pixel_values).last_hidden_state, given.other_vision_last_hidden_state)
    close(model.get_image_features(given.pixel_values).pooler_output, given.projected_image_tokens)
    mask = torch.ones_like(given.input_ids)
    out = model(input_ids=given.input_ids, attention_mask=mask, pixel_values=given.pixel_values, labels=given.labels)
    close(out.logits, given.logits_full)
    close(out.loss[None], given.loss_full)


@torch.no_grad()
def test_the_kept_tokens_give_the_outputs_of_the_original_code(fixture_as_vitp):
    model = ViTPForConditionalGeneration.from_pretrained(fixture_as_vitp)
    given = SimpleNamespace(**original_checkpoint.expected())
    out = model(
        input_ids=given.vrl_input_ids,
        attention_mask=torch.ones_like(given.vrl_input_ids),
        position_ids=given.vrl_position_ids,
        pixel_values=given.pixel_values,
        visual_token_indices=given.vrl_keep,
    )
    close(out.logits, given.vrl_logits)
    full_labels = dict(enumerate(given.labels[0]))
    labels = torch.stack([full_labels[position] for position in given.vrl_position_ids[0].tolist()])[None]
    loss = nn.functional.cross_entropy(out.logits[0, :-1], labels[0, 1:])
    close(loss[None], given.vrl_loss)


@torch.no_grad()
@pytest.mark.parametrize("start", ["bare", "prefixed", "whole model", "vitp", "internvl"])
def test_the_backbone_gives_the_outputs_of_the_original_code(fixture_as_vitp, tmp_path, start):
    source = {"bare": FIXTURE / "vision_only.safetensors", "whole model": FIXTURE, "vitp": fixture_as_vitp}.get(start)
    if start == "prefixed":
        source = tmp_path / "prefixed"
        source.mkdir()
        bare = load_file(FIXTURE / "vision_only.safetensors")
        save_file({f"vision_model.{key}": value for key, value in bare.items()}, source / "vit.safetensors")
        shutil.copy(FIXTURE / "config.json", source)
    if start == "internvl":
        source = convert_checkpoint(FIXTURE, tmp_path / "internvl", "internvl", image_token_id=7)
    folder = convert_checkpoint(source, tmp_path / "backbone", "backbone")
    given = original_checkpoint.expected()
    for model in (AutoModel.from_pretrained(folder), ViTPVisionModel.from_pretrained(folder)):
        close(model(given["pixel_values"]).last_hidden_state, given["vision_last_hidden_state"])
        close(model(given["other_pixel_values"]).last_hidden_state, given["other_vision_last_hidden_state"])
    assert load_weights(folder).keys() == expected_keys("backbone")
    settings = json.loads((folder / "preprocessor_config.json").read_text())
    assert settings["image_mean"] == [0.485, 0.456, 0.406]
    assert settings["size"] == {"height": 112, "width": 112}
    assert settings["crop_to_patches"] is False


# Names and bits


@pytest.mark.parametrize("kind", ["vitp", "internvl", "backbone", "original"])
def test_each_target_has_exactly_the_names_of_its_kind(fixture_as_vitp, tmp_path, kind):
    folder = fixture_as_vitp
    if kind != "vitp":
        folder = convert_checkpoint(fixture_as_vitp, tmp_path / kind, kind)
    assert load_weights(folder).keys() == expected_keys(kind)
    model_type = {"vitp": "vitp", "internvl": "internvl", "backbone": "internvl_vision", "original": "internvl_chat"}
    assert json.loads((folder / "config.json").read_text())["model_type"] == model_type[kind]
    with safe_open(next(folder.glob("*.safetensors")), "pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_the_names_of_the_fixture_are_those_written_down():
    assert load_file(FIXTURE / "model.safetensors").keys() == expected_keys("original")
    assert load_file(FIXTURE / "vision_only.safetensors").keys() == expected_keys("original_vision")


def test_a_ViTP_checkpoint_is_as_the_model_saves_itself(fixture_as_vitp, tmp_path):
    model, report = ViTPForConditionalGeneration.from_pretrained(fixture_as_vitp, output_loading_info=True)
    assert not any(report.values())
    model.save_pretrained(tmp_path)
    assert_same(load_weights(fixture_as_vitp), load_weights(tmp_path))
    config, wanted = (json.loads((folder / "config.json").read_text()) for folder in (fixture_as_vitp, tmp_path))
    for part in ("vision_config", "text_config"):  # loading writes it into the parts too
        assert wanted[part].pop("dtype") == wanted["dtype"]
    assert config == wanted
    written = {path.name for path in fixture_as_vitp.iterdir()}
    added = {"README.md", "preprocessor_config.json", "image_processing_vitp.py"}
    assert written - {path.name for path in tmp_path.iterdir()} == added


def test_the_backbone_is_as_export_backbone_writes_it(fixture_as_vitp, tmp_path):
    converted = convert_checkpoint(fixture_as_vitp, tmp_path / "converted", "backbone")
    model = ViTPForConditionalGeneration.from_pretrained(fixture_as_vitp)
    exported = export_backbone(model, tmp_path / "exported", ViTPImageProcessor.from_pretrained(fixture_as_vitp))
    assert {path.name for path in converted.iterdir()} - {path.name for path in exported.iterdir()} == {"README.md"}
    assert_same(load_weights(converted), load_weights(exported))
    for name in ("config.json", "preprocessor_config.json"):
        assert json.loads((converted / name).read_text()) == json.loads((exported / name).read_text())


VARIANTS = {
    "plain": {},
    "rms_norm, QK norm": {"vision": {"norm_type": "rms_norm", "use_qk_norm": True, "attention_bias": False}},
    "layer_norm, QK norm, tied": {"vision": {"use_qk_norm": True}, "tied": True},
    "llama": {"text": {"model_type": "llama"}},
    "qwen3, tied": {"text": {"model_type": "qwen3"}, "tied": True},
}


FORMS = [
    ("plain", torch.float32, "5GB"),
    ("plain", torch.float32, "40KB"),
    ("plain", torch.bfloat16, "5GB"),
    ("plain", torch.float16, "40KB"),
    *((variant, torch.bfloat16, "40KB") for variant in VARIANTS if variant != "plain"),
    *((variant, torch.float16, "5GB") for variant in VARIANTS if variant != "plain"),
]


@pytest.mark.parametrize(("variant", "dtype", "max_shard_size"), FORMS)
@pytest.mark.parametrize("kind", ["internvl", "original"])
def test_there_and_back_is_the_same_to_the_bit(tmp_path, kind, variant, dtype, max_shard_size):
    model = native_model(**VARIANTS[variant], dtype=dtype)
    source = tmp_path / "source"
    if kind == "internvl":
        model.save_pretrained(source, max_shard_size=max_shard_size)
    else:
        save_original(model, source, max_shard_size)
    assert (len(list(source.glob("*.safetensors"))) > 3) == (max_shard_size == "40KB")
    middle = convert_checkpoint(source, tmp_path / "vitp", image_token_id=5 if kind == "original" else None)
    back = convert_checkpoint(middle, tmp_path / "back", kind)

    wanted = load_weights(source)
    assert {tensor.dtype for tensor in wanted.values()} == {dtype}
    assert_same(load_weights(back), wanted)
    ours, report = ViTPForConditionalGeneration.from_pretrained(middle, output_loading_info=True)
    assert not any(report.values())
    assert ours.dtype == dtype
    assert (ours.lm_head.weight is ours.get_input_embeddings().weight) == VARIANTS[variant].get("tied", False)
    assert_same(dict(ours.state_dict()), dict(model.state_dict()))
    if kind == "internvl":
        config, wanted = (json.loads((folder / "config.json").read_text()) for folder in (back, source))
        assert config.pop("vrl_drop_ratio") == 0.0 and config.pop("vrl_apply_prob") == 1.0
        assert config["vision_config"].pop("drop_path_rate") == 0.0
        assert config == wanted
        reopened, report = AutoModelForImageTextToText.from_pretrained(back, output_loading_info=True)
        assert type(reopened) is InternVLForConditionalGeneration and not any(report.values())
    else:
        config, wanted = (json.loads((folder / "config.json").read_text()) for folder in (back, source))
        same = set(config) - {"architectures", "vision_config", "llm_config"}
        assert {name: config[name] for name in same} == {name: wanted[name] for name in same}
        for part in ("vision_config", "llm_config"):
            same = set(config[part]) & set(wanted[part]) - {"use_flash_attn", "sliding_window", "architectures"}
            same.discard("transformers_version")
            assert len(same) > 12
            assert {name: config[part][name] for name in same} == {name: wanted[part][name] for name in same}


@pytest.mark.parametrize("prefix", ["", "vision_model."])
@pytest.mark.parametrize("vision", [{}, {"norm_type": "rms_norm", "use_qk_norm": True, "attention_bias": False}])
def test_a_ViT_there_and_back_is_the_same_to_the_bit(tmp_path, vision, prefix):
    source = save_original(native_model(vision, dtype=torch.bfloat16), tmp_path / "source")
    whole = load_file(source / "model.safetensors")
    bare = {key.removeprefix("vision_model."): value for key, value in whole.items() if key.startswith("vision_model.")}
    save_file({prefix + key: value for key, value in bare.items()}, source / "model.safetensors")
    backbone = convert_checkpoint(source, tmp_path / "backbone")
    back = convert_checkpoint(backbone, tmp_path / "back", "original")
    assert_same(load_weights(back), bare)
    again = convert_checkpoint(back, tmp_path / "again")
    assert_same(load_weights(again), load_weights(backbone))
    assert (again / "config.json").read_text() == (backbone / "config.json").read_text()


def test_a_tied_head_that_the_file_holds_all_the_same_stays(tmp_path):
    source = save_original(native_model(tied=True), tmp_path / "source")
    weights = load_file(source / "model.safetensors")
    weights["language_model.lm_head.weight"] = weights["language_model.model.embed_tokens.weight"].clone()
    save_file(weights, source / "model.safetensors")
    middle = convert_checkpoint(source, tmp_path / "vitp", image_token_id=5)
    assert_same(load_weights(convert_checkpoint(middle, tmp_path / "back", "original")), weights)
    model = ViTPForConditionalGeneration.from_pretrained(middle)
    assert model.lm_head.weight is model.get_input_embeddings().weight

    weights["language_model.lm_head.weight"][3, 3] += 1
    save_file(weights, source / "model.safetensors")
    with pytest.raises(ValueError, match="ties language_model.lm_head.weight and .*embed_tokens.weight, but .* differ"):
        convert_checkpoint(source, tmp_path / "again", image_token_id=5)


@pytest.mark.parametrize("width", [1024, 3200])
def test_a_published_ViT_needs_no_configuration_beside_it(tmp_path, width):
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
    save_file(state, tmp_path / "vit.safetensors")
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


@given(
    heads=st.integers(1, 3),
    head_dim=st.sampled_from([4, 8]),
    vision_layers=st.integers(1, 3),
    grid=st.sampled_from([2, 4, 6]),
    patch=st.integers(3, 6),
    norm_type=st.sampled_from(["layer_norm", "rms_norm"]),
    flags=st.tuples(st.booleans(), st.booleans(), st.booleans()),
    text_heads=st.sampled_from([(2, 1), (2, 2), (4, 2)]),
    text_layers=st.integers(1, 2),
    tiles=st.integers(1, 3),
    kind=st.sampled_from(["internvl", "original"]),
)
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], derandomize=True)
@torch.no_grad()
def test_converted_logits_are_those_of_plain_transformers(
    tmp_path, heads, head_dim, vision_layers, grid, patch, norm_type, flags, text_heads, text_layers, tiles, kind
):
    vision = {
        "hidden_size": heads * head_dim,
        "num_attention_heads": heads,
        "num_hidden_layers": vision_layers,
        "intermediate_size": 3 * head_dim,
        "image_size": [grid * patch, grid * patch],
        "patch_size": [patch, patch],
        "norm_type": norm_type,
        "attention_bias": flags[0],
        "use_qk_norm": flags[1],
    }
    text = {
        "hidden_size": 8 * text_heads[0],
        "num_attention_heads": text_heads[0],
        "num_key_value_heads": text_heads[1],
        "num_hidden_layers": text_layers,
        "intermediate_size": 24,
    }
    model = native_model(vision, text, tied=flags[2])
    model.config.image_seq_length = (grid // 2) ** 2
    for folder in ("source", "vitp", "internvl"):
        shutil.rmtree(tmp_path / folder, ignore_errors=True)
    if kind == "internvl":
        model.save_pretrained(tmp_path / "source")
    else:
        save_original(model, tmp_path / "source")
    convert_checkpoint(tmp_path / "source", tmp_path / "vitp", image_token_id=5 if kind == "original" else None)
    inputs = inputs_for(model, tiles)
    wanted = model(**inputs).logits
    assert torch.equal(in_own_memory(ViTPForConditionalGeneration, tmp_path / "vitp")(**inputs).logits, wanted)
    convert_checkpoint(tmp_path / "vitp", tmp_path / "internvl", "internvl")
    assert torch.equal(in_own_memory(AutoModelForImageTextToText, tmp_path / "internvl")(**inputs).logits, wanted)


# Configuration, tokenizer, processor, generation


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_theta": 1e6, "rope_scaling": None},
        {"rope_theta": 5e5, "rope_scaling": {"type": "dynamic", "rope_type": "dynamic", "factor": 2.0}},
    ],
)
def test_the_language_models_configuration_is_said_in_old_and_new_words(rope):
    llm_config = json.loads((FIXTURE / "config.json").read_text())["llm_config"] | rope
    config = text_from_original(llm_config)
    assert config.rope_parameters["rope_theta"] == rope["rope_theta"]
    assert config.rope_parameters["rope_type"] == (rope["rope_scaling"] or {}).get("rope_type", "default")
    back = text_to_original(config)
    assert (back["rope_theta"], back["rope_scaling"]) == (rope["rope_theta"], rope["rope_scaling"])
    assert back["architectures"] == ["Qwen2ForCausalLM"]
    for name in ("hidden_size", "vocab_size", "max_position_embeddings", "rms_norm_eps", "num_key_value_heads"):
        assert getattr(config, name) == llm_config[name] == back[name]
    assert not hasattr(config, "torchscript")


@pytest.fixture
def internvl_repo(tmp_path):
    """A checkpoint as transformers' own come: model, processor and generation configuration."""
    tokenizer = build_tokenizer(["How many trees are there? There are 12."], vocab_size=320)
    vocab_size = len(tokenizer)
    folder = tmp_path / "repo"
    model = native_model(vocab_size=vocab_size, image_token_id=tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>"))
    model.generation_config.update(eos_token_id=[1, 0], max_new_tokens=9)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "tokenizer", model_specific_special_tokens=NAMED_TOKENS)
    size = {"height": 56, "width": 56}
    image_processor = GotOcr2ImageProcessor(size=size, max_patches=5, image_mean=[0.4, 0.5, 0.6], image_std=[0.2] * 3)
    template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    InternVLProcessor(
        image_processor, tokenizer, InternVLVideoProcessor(size=size), image_seq_length=4, chat_template=template
    ).save_pretrained(folder)
    return folder


def test_processor_and_generation_come_along(internvl_repo, tmp_path):
    vitp = convert_checkpoint(internvl_repo, tmp_path / "vitp")
    native = AutoProcessor.from_pretrained(internvl_repo)
    processor = AutoProcessor.from_pretrained(vitp)
    model = ViTPForConditionalGeneration.from_pretrained(vitp)
    assert type(processor) is ViTPProcessor
    assert processor.image_processor.max_patches == 5
    assert "generation" in processor.chat_template
    assert (model.generation_config.eos_token_id, model.generation_config.max_new_tokens) == ([1, 0], 9)
    assert (processor.image_token_id, processor.image_seq_length) == (model.config.image_token_id, 4)
    # The video token has no embedding: a text with it must not become an index beyond the end.
    assert len(native.tokenizer) == len(processor.tokenizer) + 1 == model.config.text_config.vocab_size + 1
    assert max(processor.tokenizer("A <video> of trees")["input_ids"]) < model.config.text_config.vocab_size
    check_compatible(model, processor)

    back = convert_checkpoint(vitp, tmp_path / "internvl", "internvl")
    assert not list(back.glob("*.py"))
    reopened = AutoProcessor.from_pretrained(back)
    assert type(reopened) is InternVLProcessor
    assert reopened.chat_template == processor.chat_template
    assert reopened.tokenizer.get_vocab() == native.tokenizer.get_vocab()
    assert (back / "generation_config.json").read_bytes() == (internvl_repo / "generation_config.json").read_bytes()
    assert "auto_map" not in (back / "tokenizer_config.json").read_text()
    image, text = picture(130, 60), "<IMG_CONTEXT>How many trees are there?"
    wanted = native(images=image, text=text, return_tensors="pt")
    for other in (processor, reopened):
        found = other(images=image, text=text, return_tensors="pt")
        assert found["pixel_values"].shape == (3, 3, 56, 56)
        for name in ("input_ids", "attention_mask", "pixel_values"):
            assert torch.equal(found[name], wanted[name]), name

    again = convert_checkpoint(back, tmp_path / "again")
    assert (again / "tokenizer.json").read_text() == (vitp / "tokenizer.json").read_text()


def test_messages_are_read_alike_by_our_processor_and_transformers(model_and_processor, tmp_path):
    model, processor = model_and_processor
    model.save_pretrained(tmp_path / "vitp")
    processor.save_pretrained(tmp_path / "vitp")
    native = AutoProcessor.from_pretrained(convert_checkpoint(tmp_path / "vitp", tmp_path / "internvl", "internvl"))
    content = [{"type": "image", "image": picture(130, 60)}, {"type": "text", "text": "How many trees?"}]
    chat = [{"role": "user", "content": content}]
    options = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt"}
    found, wanted = (each.apply_chat_template(chat, **options) for each in (native, processor))
    for name in ("input_ids", "pixel_values"):
        assert torch.equal(found[name], wanted[name]), name


def qwen_tokenizer() -> Qwen2Tokenizer:
    """Of the class that original checkpoints name."""
    trained = build_tokenizer(["How many trees are there? There are 12."], vocab_size=320)
    model = json.loads(trained.backend_tokenizer.to_str())["model"]
    merges = [tuple(pair) for pair in model["merges"]]
    tokenizer = Qwen2Tokenizer(
        model["vocab"], merges, eos_token="<|im_end|>", pad_token="<|endoftext|>", unk_token=None
    )
    tokenizer.add_special_tokens({"extra_special_tokens": trained.extra_special_tokens})
    assert tokenizer.get_vocab() == trained.get_vocab()
    return tokenizer


def test_an_original_checkpoint_with_its_tokenizer(tmp_path):
    tokenizer = qwen_tokenizer()
    source = save_original(native_model(vocab_size=len(tokenizer)), tmp_path / "source")
    config = json.loads((source / "config.json").read_text())
    # As on the Hub: with code that is not needed, and is not run.
    config["auto_map"] = {"AutoConfig": "configuration_internvl_chat.InternVLChatConfig"}
    (source / "config.json").write_text(json.dumps(config))
    tokenizer.save_pretrained(source)
    (source / "generation_config.json").write_text('{"eos_token_id": [1, 0], "_from_model_config": true}')

    vitp = convert_checkpoint(source, tmp_path / "vitp")
    processor, model = AutoProcessor.from_pretrained(vitp), ViTPForConditionalGeneration.from_pretrained(vitp)
    assert model.config.image_token_id == processor.image_token_id == tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>")
    assert processor.image_processor.max_patches == 6  # max_dynamic_patch
    assert processor.image_processor.size["height"] == 56
    assert model.generation_config.eos_token_id == [1, 0]
    check_compatible(model, processor)
    inputs = processor(images=picture(130, 60), text="<IMG_CONTEXT>How many?", return_tensors="pt")
    assert inputs["pixel_values"].shape[0] == 3
    assert model(**inputs).logits.isfinite().all()

    back = convert_checkpoint(vitp, tmp_path / "back", "original")
    assert not list(back.glob("*.py"))
    assert {"vocab.json", "merges.txt", "added_tokens.json", "tokenizer.json"} <= {path.name for path in back.iterdir()}
    settings = json.loads((back / "tokenizer_config.json").read_text())
    assert "extra_special_tokens" not in settings and "<img>" in settings["additional_special_tokens"]
    text = "<img><IMG_CONTEXT></img>How many <|im_end|>"
    reopened = AutoTokenizer.from_pretrained(back)
    assert reopened.get_vocab() == tokenizer.get_vocab()
    assert reopened(text)["input_ids"] == tokenizer(text)["input_ids"]
    assert json.loads((back / "added_tokens.json").read_text())["<IMG_CONTEXT>"] == processor.image_token_id
    (back / "tokenizer.json").unlink()  # as published: for the slow class alone
    again = convert_checkpoint(back, tmp_path / "again")
    assert_same(load_weights(again), load_weights(vitp))
    assert (again / "config.json").read_text() == (vitp / "config.json").read_text()
    slow = AutoProcessor.from_pretrained(again).tokenizer
    assert slow.get_vocab() == tokenizer.get_vocab()
    assert slow(text)["input_ids"] == tokenizer(text)["input_ids"]


@pytest.mark.parametrize(
    ("settings", "max_patches"),
    [
        ({"dynamic_image_size": False, "use_thumbnail": False}, 1),
        ({"max_dynamic_patch": 12}, 12),
    ],
)
def test_tiling_of_the_original_code_comes_along(tmp_path, settings, max_patches):
    source = save_original(native_model(), tmp_path / "source")
    config = json.loads((source / "config.json").read_text()) | settings
    (source / "config.json").write_text(json.dumps(config))
    folder = convert_checkpoint(source, tmp_path / "vitp", image_token_id=5)
    assert json.loads((folder / "preprocessor_config.json").read_text())["max_patches"] == max_patches


# Licence


CARD = "---\nlicense: cc-by-nc-4.0\nbase_model: some/model\n---\n\n# A model\n"


def test_the_licence_of_the_source_is_in_every_card_and_cannot_be_changed(tmp_path):
    source = save_original(native_model(), tmp_path / "source")
    (source / "README.md").write_text(CARD)
    (source / "LICENSE").write_text("The terms.")
    vitp = convert_checkpoint(source, tmp_path / "vitp", image_token_id=5)
    folders = [vitp] + [convert_checkpoint(vitp, tmp_path / to, to) for to in ("internvl", "backbone", "original")]
    for folder in folders:
        card = metadata_load(folder / "README.md")
        assert card["license"] == "cc-by-nc-4.0"
        assert card["base_model"] == "some/model"
        assert "Licence of the source, and so of these weights: cc-by-nc-4.0" in (folder / "README.md").read_text()
        assert (folder / "LICENSE").read_text() == "The terms."
    before = sorted(tmp_path.iterdir())
    with pytest.raises(
        ValueError, match="licensed cc-by-nc-4.0: a conversion keeps that and cannot make it apache-2.0"
    ):
        convert_checkpoint(vitp, tmp_path / "free", "internvl", license="apache-2.0")
    assert sorted(tmp_path.iterdir()) == before


def test_a_licence_of_another_name_keeps_its_name_and_link(tmp_path):
    source = save_original(native_model(), tmp_path / "source")
    (source / "README.md").write_text("---\nlicense: other\nlicense_name: acme\nlicense_link: https://acme.org\n---\n")
    card = metadata_load(convert_checkpoint(source, tmp_path / "vitp", image_token_id=5) / "README.md")
    assert (card["license"], card["license_name"], card["license_link"]) == ("other", "acme", "https://acme.org")


def test_a_source_without_a_licence_says_so_until_one_is_given(tmp_path):
    source = save_original(native_model(), tmp_path / "source")
    vitp = convert_checkpoint(source, tmp_path / "vitp", image_token_id=5)
    assert metadata_load(vitp / "README.md")["license"] == "unknown"
    assert "states no licence" in (vitp / "README.md").read_text()
    backbone = convert_checkpoint(vitp, tmp_path / "backbone", "backbone", license="cc-by-nc-4.0")
    assert metadata_load(backbone / "README.md")["license"] == "cc-by-nc-4.0"
    (source / "LICENSE.txt").write_text("The terms.")
    other = convert_checkpoint(source, tmp_path / "other", image_token_id=5)
    assert metadata_load(other / "README.md")["license_link"] == "LICENSE.txt"


# Sources that are refused


def edit_json(path: Path, **changes) -> None:
    """Sets fields of a JSON file, and removes those given as `None`."""
    fields = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({name: value for name, value in fields.items() if value is not None}))


def edit_weights(folder: Path, edit) -> None:
    weights = load_file(folder / "model.safetensors")
    edit(weights)
    save_file({key: value.contiguous() for key, value in weights.items()}, folder / "model.safetensors")


def cut_short(folder: Path) -> None:
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[: len(whole) // 2])


def cut_header(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:30])


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
    "cut short": (cut_short, r"model\.safetensors is no whole safetensors file .*cut short"),
    "header cut": (cut_header, r"model\.safetensors is no whole safetensors file .*cut short"),
    "pickle": (as_pickle, r"holds no safetensors, which are expected, but \['pytorch_model\.bin'\]: pickles"),
    "empty": (lambda folder: (folder / "model.safetensors").unlink(), "holds no safetensors.*no weights at all"),
    "other model": (as_another_model, r"holds a 'gpt2' with tensors such as 'transformer\.wte\.weight', but a ViTP"),
    "no config": (lambda folder: (folder / "config.json").unlink(), "model_type in its config.json is None and not"),
    "broken config": (lambda folder: (folder / "config.json").write_text("{"), "config.json is no JSON"),
    "list": (lambda folder: (folder / "config.json").write_text("[]"), "config.json holds a list, but a JSON object"),
    "no number": (
        lambda f: edit_part(f, "vision_config", hidden_size="wide"),
        "config.json is not valid: .*hidden_size",
    ),
    "heads": (lambda f: edit_part(f, "vision_config", num_attention_heads=5), "divisible by num_heads"),
    "no vision_config": (
        lambda f: edit_json(f / "config.json", vision_config=None),
        "config.json has no vision_config",
    ),
    "no llm_config": (lambda f: edit_json(f / "config.json", llm_config=None), "config.json has no llm_config"),
    "other type": (lambda f: edit_json(f / "config.json", model_type="llava"), "'llava' and not 'internvl_chat'"),
    "missing": (lambda f: edit_weights(f, lambda w: w.pop(KEY)), f"missing: {KEY}$"),
    "unknown": (lambda f: edit_weights(f, lambda w: w.update(odd=w[KEY].clone())), "asks for. unknown: odd$"),
    "shape": (
        lambda f: edit_weights(f, lambda w: w.update({KEY: w[KEY][:-3]})),
        rf"of a wrong shape: {KEY} is \[93, 32\] and not \[96, 32\]$",
    ),
    "transposed": (
        lambda f: edit_weights(f, lambda w: w.update({"mlp1.1.weight": w["mlp1.1.weight"].T})),
        r"mlp1.1.weight is \[128, 48\] and not \[48, 128\]",
    ),
    "depth": (lambda f: edit_part(f, "llm_config", num_hidden_layers=1), "unknown: language_model.model.layers.1.inp"),
    "pixel shuffle": (lambda f: edit_json(f / "config.json", ps_version="v1"), "ps_version='v1', but only 'v2' can"),
    "pixel shuffle of old": (lambda f: edit_json(f / "config.json", ps_version=None), "ps_version='v1', but only 'v2'"),
    "select_layer": (lambda f: edit_json(f / "config.json", select_layer=-4), "select_layer=-4, but only -1 can"),
    "pad2square": (lambda f: edit_json(f / "config.json", pad2square=True), "pad2square=True"),
    "no thumbnail": (lambda f: edit_json(f / "config.json", use_thumbnail=False), "use_thumbnail=False, but only True"),
    "template": (lambda f: edit_json(f / "config.json", template="phi3-chat"), "template='phi3-chat', but only"),
    "image size": (lambda f: edit_json(f / "config.json", force_image_size=224), "force_image_size=224, but position"),
    "LoRA": (lambda f: edit_json(f / "config.json", use_llm_lora=16), "use_llm_lora=16, but only 0"),
    "LM": (lambda f: edit_part(f, "llm_config", model_type="internlm2"), "language model is of type 'internlm2'"),
    "activation": (lambda f: edit_part(f, "vision_config", hidden_act="relu"), "hidden_act='relu', but only 'gelu'"),
    "dropout": (lambda f: edit_part(f, "vision_config", dropout=0.1), r"dropout=0\.1, but only 0\.0"),
    "norm": (lambda f: edit_part(f, "vision_config", norm_type="batch"), "norm_type='batch'"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_wrong_source_is_named_in_one_line_and_nothing_is_written(tmp_path, capsys, mistake):
    spoil, message = MISTAKES[mistake]
    source = tmp_path / "source"
    source.mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copy(FIXTURE / name, source)
    spoil(source)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(SystemExit) as stop:
        main([str(source), str(tmp_path / "target"), "--image_token_id", "7"])
    assert stop.value.code.startswith("error: ") and "\n" not in stop.value.code
    assert re.search(message, stop.value.code), stop.value.code
    assert "Traceback" not in capsys.readouterr().err
    assert sorted(tmp_path.iterdir()) == before


def test_a_transformers_checkpoint_without_a_part_of_its_configuration_is_refused(tmp_path):
    native_model().save_pretrained(tmp_path / "source")
    edit_json(tmp_path / "source" / "config.json", vision_config=None)
    with pytest.raises(ValueError, match="of model_type 'internvl', has no vision_config, which is expected"):
        convert_checkpoint(tmp_path / "source", tmp_path / "target")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_shards_and_their_index_must_agree(tmp_path):
    source = save_original(native_model(), tmp_path / "source", "40KB")
    index_file = source / "model.safetensors.index.json"
    index = json.loads(index_file.read_text())
    key, shard = next(iter(index["weight_map"].items()))
    del index["weight_map"][key]
    index_file.write_text(json.dumps(index))
    with pytest.raises(ValueError, match=rf"do not agree: only in the index \[\], only in the shard \['{key}'\]"):
        convert_checkpoint(source, tmp_path / "target")
    (source / shard).unlink()
    with pytest.raises(ValueError, match=f"{shard} is missing, though the index names it"):
        convert_checkpoint(source, tmp_path / "target")
    index_file.write_text("{}")
    with pytest.raises(ValueError, match="is no index of safetensors shards"):
        convert_checkpoint(source, tmp_path / "target")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_a_ViT_of_an_unknown_width_needs_a_configuration(tmp_path):
    shutil.copy(FIXTURE / "vision_only.safetensors", tmp_path)
    with pytest.raises(
        ValueError, match="heads of a ViT of width 32 cannot be seen from its tensors: put a config.json"
    ):
        convert_checkpoint(tmp_path / "vision_only.safetensors", tmp_path / "target")
    (tmp_path / "config.json").write_text('{"model_type": "mmdet"}')
    with pytest.raises(ValueError, match="of model_type 'mmdet', has no vision_config"):
        convert_checkpoint(tmp_path / "vision_only.safetensors", tmp_path / "target")
    assert not (tmp_path / "target").exists()


@pytest.mark.parametrize(
    ("to", "message"),
    [
        ("vitp", "is of the kind 'vitp' already"),
        ("onnx", "no target 'onnx', only vitp, backbone, internvl, original"),
    ],
)
def test_targets_that_make_no_sense_are_refused(fixture_as_vitp, tmp_path, to, message):
    with pytest.raises(ValueError, match=message):
        convert_checkpoint(fixture_as_vitp, tmp_path / "target", to)
    assert not list(tmp_path.iterdir())


def test_a_ViT_alone_does_not_become_a_language_model(tmp_path):
    with pytest.raises(ValueError, match="holds a ViT alone, of which 'internvl' cannot be made"):
        convert_checkpoint(FIXTURE / "vision_only.safetensors", tmp_path / "target", "internvl")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("vision", "message"),
    [
        ({"use_mean_pooling": False}, "use_mean_pooling=False, but only True"),
        ({"projection_dropout": 0.1}, "projection_dropout=0.1"),
        ({"image_size": [56, 112]}, r"image_size=\[56, 112\], but the original code needs a square"),
    ],
)
def test_what_the_original_code_cannot_say_is_refused(tmp_path, vision, message):
    native_model(vision).save_pretrained(tmp_path / "source")
    with pytest.raises(ValueError, match=message):
        convert_checkpoint(tmp_path / "source", tmp_path / "target", "original")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


@pytest.mark.parametrize("to", ["internvl", "original"])
def test_an_input_spec_that_the_target_would_ignore_is_refused(model_and_processor, tmp_path, to):
    model, processor = model_and_processor
    processor.image_processor.input_spec = {"gamma": 0.5}
    model.save_pretrained(tmp_path / "source")
    processor.save_pretrained(tmp_path / "source")
    with pytest.raises(ValueError, match="which .* cannot say: its users would misread the images"):
        convert_checkpoint(tmp_path / "source", tmp_path / "target", to)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]
    backbone = convert_checkpoint(tmp_path / "source", tmp_path / "backbone", "backbone")
    assert json.loads((backbone / "preprocessor_config.json").read_text())["input_spec"] == {"gamma": 0.5}


def test_a_folder_that_holds_something_is_not_written_to(fixture_as_vitp, tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(ValueError, match="exists already: give a new folder"):
        convert_checkpoint(fixture_as_vitp, tmp_path, "internvl")
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]
    (tmp_path / "empty").mkdir()
    convert_checkpoint(fixture_as_vitp, tmp_path / "empty", "backbone")
    assert load_weights(tmp_path / "empty").keys() == expected_keys("backbone")


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError("no space left on device"), MemoryError])
def test_an_interrupted_conversion_leaves_nothing(fixture_as_vitp, tmp_path, monkeypatch, error):
    read, calls = tensor_files.TensorBytes.read, []

    def interrupted(tensor):
        calls.append(list(tmp_path.iterdir()))
        if len(calls) == 20:
            raise error
        return read(tensor)

    monkeypatch.setattr(tensor_files.TensorBytes, "read", interrupted)
    with pytest.raises(error if isinstance(error, type) else OSError):
        convert_checkpoint(fixture_as_vitp, tmp_path / "target", "internvl")
    assert [path.name.startswith(".target.") for path in calls[-1]] == [True]
    assert not list(tmp_path.iterdir())


# Hub ids


def test_a_hub_id_is_read_from_the_cache_without_a_network(tmp_path):
    cache, commit = tmp_path / "cache", "0123456789abcdef0123456789abcdef01234567"
    repo = cache / "models--someone--internvl"
    snapshot = save_original(native_model(), repo / "snapshots" / commit)
    (snapshot / "README.md").write_text("---\nlicense: mit\n---\n")
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(commit)
    done = run_convert("someone/internvl", tmp_path / "vitp", "--image_token_id", "5", HF_HUB_CACHE=str(cache))
    assert done.returncode == 0, done.stderr
    card = metadata_load(tmp_path / "vitp" / "README.md")
    assert (card["license"], card["base_model"]) == ("mit", "someone/internvl")
    assert len(load_weights(tmp_path / "vitp")) == len(expected_keys("vitp"))

    done = run_convert("someone/else", tmp_path / "other", HF_HUB_CACHE=str(cache))
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("error: someone/else is neither a file or folder nor a Hub repo that can be had")
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "other").exists()


def run_convert(*arguments, **environment) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "modeling_vitp.convert", *map(str, arguments)],
        env={**os.environ, "HF_HUB_OFFLINE": "1", **environment},
        capture_output=True,
        text=True,
    )


# Memory

# The peak of a process that has done its imports, and after the conversion. Not ru_maxrss, which a new process takes
# over from the one that started it.
MEASURE = """
import pathlib, sys
import modeling_vitp.convert as convert
status = pathlib.Path("/proc/self/status")
peak = lambda: next(int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith("VmHWM")) * 1024
before = peak()
convert.convert_checkpoint(sys.argv[1], sys.argv[2], sys.argv[3], image_token_id=int(sys.argv[4]) or None)
print(before, peak())
"""


@pytest.mark.slow
def test_memory_stays_far_below_the_largest_shard(tmp_path):
    """2.2 GB in 5 shards, original to ViTP (cuts `qkv`) and back (joins it)."""
    vision = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
    text = {"hidden_size": 1536, "intermediate_size": 8960, "num_attention_heads": 12, "num_hidden_layers": 12}
    with torch.device("meta"):
        config = InternVLConfig(
            vision_config={**VISION, **vision},
            text_config={**TEXT, **text, "vocab_size": 100_000},
            image_seq_length=4,
            tie_word_embeddings=False,
        )
        model = InternVLForConditionalGeneration(config).to(torch.bfloat16)
    source = save_original(model.to_empty(device="cpu"), tmp_path / "source", "500MB")
    del model
    sizes = [file.stat().st_size for file in source.glob("*.safetensors")]
    assert sum(sizes) > 2e9 and len(sizes) >= 4

    for start, target, to, token in ((source, "vitp", "vitp", 7), (tmp_path / "vitp", "back", "original", 0)):
        done = subprocess.run(
            [sys.executable, "-c", MEASURE, str(start), str(tmp_path / target), to, str(token)],
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        before, after = map(int, done.stdout.split())
        print(f"{to}: {(after - before) / 1e6:.0f} MB beyond the start; largest shard {max(sizes) / 1e6:.0f} MB")
        assert after - before <= 1.3 * max(sizes)
    for shard in source.glob("*.safetensors"):
        with safe_open(shard, "pt") as before, safe_open(tmp_path / "back" / shard.name, "pt") as after:
            assert set(before.keys()) == set(after.keys())
            assert all(
                torch.equal(before.get_tensor(key).view(torch.int16), after.get_tensor(key).view(torch.int16))
                for key in before.keys()
            )

    # Killed while it writes: nothing that could be taken for a checkpoint.
    for kind in (signal.SIGTERM, signal.SIGKILL):
        command = [sys.executable, "-m", "modeling_vitp.convert", str(source), str(tmp_path / "killed")]
        with subprocess.Popen([*command, "--image_token_id", "7"], stderr=subprocess.PIPE) as process:
            while process.poll() is None and not list(tmp_path.glob(".killed.*/*.safetensors")):
                time.sleep(0.01)
            process.send_signal(kind)
            process.communicate()
        assert process.returncode != 0
        assert not (tmp_path / "killed").exists()
        assert bool(list(tmp_path.glob(".killed.*"))) == (kind == signal.SIGKILL)


def test_the_processor_of_internvl_has_the_tokens_of_its_images_whatever_the_configuration_states(
    tmp_path, model, processor
):
    """transformers' own configuration does not compute them: 256 stands there unless somebody set them."""
    model.save_pretrained(tmp_path / "vitp")
    processor.save_pretrained(tmp_path / "vitp")
    convert_checkpoint(tmp_path / "vitp", tmp_path / "native", "internvl")
    config = json.loads((tmp_path / "native" / "config.json").read_text())
    (tmp_path / "native" / "config.json").write_text(json.dumps(config | {"image_seq_length": 256}))
    native = InternVLForConditionalGeneration.from_pretrained(tmp_path / "native")
    assert native.config.image_seq_length == 256
    converted = from_internvl(native)
    assert internvl_processor(tmp_path / "native").image_seq_length == converted.config.image_seq_length == 4
    assert all(torch.equal(value, converted.state_dict()[name]) for name, value in model.state_dict().items())
