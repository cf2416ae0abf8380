import json
import shutil
from types import SimpleNamespace

import original_checkpoint
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from internvl_checkpoints import FIXTURE, assert_same, expected_keys, load_weights, native_model, save_original
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    AutoModel,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    InternVLForConditionalGeneration,
)

from modeling_vitp import (
    ViTPForConditionalGeneration,
    ViTPImageProcessor,
    ViTPVisionModel,
    convert_checkpoint,
    export_backbone,
)
from modeling_vitp.convert import tensor_files


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
    assert type(AutoModelForMultimodalLM.from_pretrained(folder)) is type(model)
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
    added = {"README.md", "preprocessor_config.json", "image_processing_vitp.py", "input_spec.py"}
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
        assert config.pop("vrl_warmup_steps") == 0 and config.pop("answer_mask_ratio") == 0.0
        assert config["vision_config"].pop("drop_path_rate") == 0.0
        text_config = config["text_config"]  # which says it in words of transformers 4, too
        assert text_config.pop("rope_theta") == text_config["rope_parameters"]["rope_theta"]
        assert text_config.pop("rope_scaling") is None
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


@pytest.mark.parametrize("value", ["nan", "inf"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "float64"])
def test_weights_that_are_not_finite_are_converted_only_when_told(model_and_processor, tmp_path, value, dtype):
    model, processor = model_and_processor
    model = model.to(getattr(torch, dtype))
    with torch.no_grad():
        model.model.vision_tower.encoder.layer[1].mlp.fc1.weight[5, 3] = -float(value)
    for part in (model, processor):
        part.save_pretrained(tmp_path / "source")
    with pytest.raises(ValueError, match=r"NaN or infinite, in .*layer\.1\.mlp\.fc1\.weight"):
        convert_checkpoint(tmp_path / "source", tmp_path / "backbone", "backbone")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]
    with pytest.raises(ValueError, match="the backbone has weights that are NaN"):
        export_backbone(model, tmp_path / "exported")
    assert convert_checkpoint(tmp_path / "source", tmp_path / "backbone", "backbone", allow_nan=True).is_dir()
    assert export_backbone(model, tmp_path / "exported", allow_nan=True).is_dir()
