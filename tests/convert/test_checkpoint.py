import json
import shutil
from types import SimpleNamespace

import original_checkpoint
import pytest
import torch
from huggingface_hub import metadata_load, metadata_save
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from internvl_checkpoints import FIXTURE, assert_same, expected_keys, load_weights, native_model, save_original
from pictures import picture
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_models import HEAD, adapter_config
from torch import nn
from transformers import (
    AutoImageProcessor,
    AutoModel,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    AutoProcessor,
    AutoTokenizer,
    GotOcr2ImageProcessor,
    InternVLForConditionalGeneration,
    InternVLProcessor,
    InternVLVideoProcessor,
    Qwen2Tokenizer,
)

from modeling_vitp import (
    ViTPForConditionalGeneration,
    ViTPForSemanticSegmentation,
    ViTPImageProcessor,
    ViTPProcessor,
    ViTPSegmentationConfig,
    ViTPSegmentationImageProcessor,
    ViTPVisionModel,
    convert_checkpoint,
    export_backbone,
    spread_bands,
)
from modeling_vitp.convert import __main__ as command
from modeling_vitp.convert import tensor_files
from modeling_vitp.pretraining.loading import build_tokenizer, check_compatible


def in_own_memory(model_class, folder):
    """Load a model with weights copied from the mapped file.

    In the file, weights are aligned to eight bytes, which may change the last bit of a product (as on AMD EPYC).
    """
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


# Outputs of the original code


def close(actual: torch.Tensor, wanted: torch.Tensor) -> None:
    torch.testing.assert_close(actual, wanted.reshape(actual.shape), atol=1e-5, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["vitp", "internvl"])
def test_model_gives_outputs_of_original_code(fixture_as_vitp, tmp_path, kind):
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
def test_kept_tokens_give_outputs_of_original_code(fixture_as_vitp):
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
def test_backbone_gives_outputs_of_original_code(fixture_as_vitp, tmp_path, start):
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
def test_target_has_the_names_of_its_layout(fixture_as_vitp, tmp_path, kind):
    assert load_file(FIXTURE / "model.safetensors").keys() == expected_keys("original")
    assert load_file(FIXTURE / "vision_only.safetensors").keys() == expected_keys("original_vision")
    folder = fixture_as_vitp
    if kind != "vitp":
        folder = convert_checkpoint(fixture_as_vitp, tmp_path / kind, kind)
    assert load_weights(folder).keys() == expected_keys(kind)
    model_type = {"vitp": "vitp", "internvl": "internvl", "backbone": "internvl_vision", "original": "internvl_chat"}
    assert json.loads((folder / "config.json").read_text())["model_type"] == model_type[kind]
    with safe_open(next(folder.glob("*.safetensors")), "pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_converted_checkpoint_equals_saved_model(fixture_as_vitp, tmp_path):
    model, report = ViTPForConditionalGeneration.from_pretrained(fixture_as_vitp, output_loading_info=True)
    assert not any(report.values())
    model.save_pretrained(tmp_path)
    assert_same(load_weights(fixture_as_vitp), load_weights(tmp_path))
    config, wanted = (json.loads((folder / "config.json").read_text()) for folder in (fixture_as_vitp, tmp_path))
    for part in ("vision_config", "text_config"):  # loading also writes it to the parts
        assert wanted[part].pop("dtype") == wanted["dtype"]
    assert config == wanted
    written = {path.name for path in fixture_as_vitp.iterdir()}
    added = {"README.md", "preprocessor_config.json", "image_processing_vitp.py", "image_decoding.py", "input_spec.py"}
    assert written - {path.name for path in tmp_path.iterdir()} == added


def test_converted_backbone_equals_export_backbone(fixture_as_vitp, tmp_path):
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
    ("plain", torch.float16, "40KB"),
    ("rms_norm, QK norm", torch.bfloat16, "40KB"),
    ("layer_norm, QK norm, tied", torch.float16, "5GB"),
    ("llama", torch.bfloat16, "5GB"),
    ("qwen3, tied", torch.bfloat16, "40KB"),
]


@pytest.mark.parametrize(("variant", "dtype", "max_shard_size"), FORMS)
@pytest.mark.parametrize("kind", ["internvl", "original"])
def test_round_trip_is_exact(tmp_path, kind, variant, dtype, max_shard_size):
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
        text_config = config["text_config"]  # also has the settings in transformers 4's format
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


@pytest.mark.parametrize(
    ("prefix", "vision"),
    [("", {}), ("vision_model.", {"norm_type": "rms_norm", "use_qk_norm": True, "attention_bias": False})],
)
def test_round_trip_of_a_vit_is_exact(tmp_path, vision, prefix):
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


def test_stored_tied_head_is_kept(tmp_path):
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
@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], derandomize=True)
@torch.no_grad()
def test_logits_equal_transformers(
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


def test_invalid_targets_are_refused(fixture_as_vitp, tmp_path):
    for source, to in (
        (fixture_as_vitp, "vitp"),
        (fixture_as_vitp, "onnx"),
        (FIXTURE / "vision_only.safetensors", "internvl"),
    ):
        with pytest.raises(ValueError, match=f"'{to}'"):
            convert_checkpoint(source, tmp_path / "target", to)
    assert not list(tmp_path.iterdir())


def test_nonempty_folder_is_not_written(fixture_as_vitp, tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(ValueError, match="already exists"):
        convert_checkpoint(fixture_as_vitp, tmp_path, "internvl")
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]
    (tmp_path / "empty").mkdir()
    convert_checkpoint(fixture_as_vitp, tmp_path / "empty", "backbone")
    assert load_weights(tmp_path / "empty").keys() == expected_keys("backbone")


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError("no space left on device")])
def test_interrupted_conversion_leaves_nothing(fixture_as_vitp, tmp_path, monkeypatch, error):
    load, calls = tensor_files.StoredTensor.load, []

    def interrupted(tensor, *files):
        calls.append(list(tmp_path.iterdir()))
        if len(calls) == 20:
            raise error
        return load(tensor, *files)

    monkeypatch.setattr(tensor_files.StoredTensor, "load", interrupted)
    with pytest.raises(error if isinstance(error, type) else OSError):
        convert_checkpoint(fixture_as_vitp, tmp_path / "target", "internvl")
    assert [path.name.startswith(".target.") for path in calls[-1]] == [True]
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("value", "dtype"), [("nan", "float32"), ("inf", "bfloat16")])
def test_nonfinite_weights_need_allow_nan(model_and_processor, tmp_path, value, dtype):
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


NAMED_TOKENS = {
    "start_image_token": "<img>",
    "end_image_token": "</img>",
    "context_image_token": "<IMG_CONTEXT>",
    "video_token": "<video>",
}


@pytest.fixture
def internvl_repo(tmp_path):
    """Hub repo like those of transformers' InternVL: model, processor and generation configuration."""
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


def test_processor_and_generation_config_are_converted(internvl_repo, tmp_path):
    vitp = convert_checkpoint(internvl_repo, tmp_path / "vitp")
    native = AutoProcessor.from_pretrained(internvl_repo)
    processor = AutoProcessor.from_pretrained(vitp)
    model = ViTPForConditionalGeneration.from_pretrained(vitp)
    assert type(processor) is ViTPProcessor
    assert processor.image_processor.max_patches == 5
    assert "generation" in processor.chat_template
    assert (model.generation_config.eos_token_id, model.generation_config.max_new_tokens) == ([1, 0], 9)
    assert (processor.image_token_id, processor.image_seq_length) == (model.config.image_token_id, 4)
    # The video token has no embedding, so a text with it must not be encoded as an index out of range.
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


def test_processors_encode_messages_alike(model_and_processor, tmp_path):
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
    """Return a tokenizer of the class that original checkpoints name."""
    trained = build_tokenizer(["How many trees are there? There are 12."], vocab_size=320)
    model = json.loads(trained.backend_tokenizer.to_str())["model"]
    merges = [tuple(pair) for pair in model["merges"]]
    tokenizer = Qwen2Tokenizer(
        model["vocab"], merges, eos_token="<|im_end|>", pad_token="<|endoftext|>", unk_token=None
    )
    tokenizer.add_special_tokens({"extra_special_tokens": trained.extra_special_tokens})
    assert tokenizer.get_vocab() == trained.get_vocab()
    return tokenizer


def test_tokenizer_of_an_original_checkpoint(tmp_path):
    tokenizer = qwen_tokenizer()
    source = save_original(native_model(vocab_size=len(tokenizer)), tmp_path / "source")
    config = json.loads((source / "config.json").read_text())
    # As on the Hub, the repo names remote code, which is not run.
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
    (back / "tokenizer.json").unlink()  # published checkpoints have files of the slow class only
    again = convert_checkpoint(back, tmp_path / "again")
    assert_same(load_weights(again), load_weights(vitp))
    assert (again / "config.json").read_text() == (vitp / "config.json").read_text()
    slow = AutoProcessor.from_pretrained(again).tokenizer
    assert slow.get_vocab() == tokenizer.get_vocab()
    assert slow(text)["input_ids"] == tokenizer(text)["input_ids"]


def test_file_in_a_subfolder_is_converted_as_its_folder(internvl_repo, tmp_path):
    folder = convert_checkpoint(internvl_repo, tmp_path / "models" / "chat", license="mit")
    build_tokenizer(["Wie viele sind es?"], vocab_size=330).save_pretrained(folder.parent)
    (folder.parent / "generation_config.json").write_text('{"eos_token_id": 3}')
    shutil.move(folder / "README.md", folder.parent)  # the card is that of the repo
    found = convert_checkpoint(folder.parent, tmp_path / "found", "original", file="chat/model.safetensors")
    wanted = convert_checkpoint(folder, tmp_path / "wanted", "original", license="mit")
    names = {path.name for path in wanted.iterdir()}
    assert names == {path.name for path in found.iterdir()} and "tokenizer.json" in names
    assert [name for name in names if (found / name).read_bytes() != (wanted / name).read_bytes()] == ["README.md"]
    assert metadata_load(found / "README.md")["license"] == "mit"


def test_settings_of_the_original_image_processor_are_converted(tmp_path):
    source = save_original(native_model(), tmp_path / "source")
    config = json.loads((source / "config.json").read_text())
    colors = {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6]}
    (source / "preprocessor_config.json").write_text(json.dumps(colors))
    for name, tiling, max_patches in (
        ("one", {"dynamic_image_size": False, "use_thumbnail": False}, 1),
        ("tiles", {"max_dynamic_patch": 12}, 12),
    ):
        (source / "config.json").write_text(json.dumps(config | tiling))
        vitp = convert_checkpoint(source, tmp_path / name, image_token_id=5)
        assert ViTPImageProcessor.from_pretrained(vitp).max_patches == max_patches
    again = convert_checkpoint(convert_checkpoint(vitp, tmp_path / "there", "original"), tmp_path / "again")
    for folder in (vitp, again):
        image_processor = ViTPImageProcessor.from_pretrained(folder)
        assert {name: list(getattr(image_processor, name)) for name in colors} == colors


def test_input_spec_that_the_target_ignores_is_refused(model_and_processor, tmp_path):
    model, processor = model_and_processor
    processor.image_processor.input_spec = {"gamma": 0.5}
    model.save_pretrained(tmp_path / "source")
    processor.save_pretrained(tmp_path / "source")
    for to in ("internvl", "original"):
        with pytest.raises(ValueError, match="input_spec="):
            convert_checkpoint(tmp_path / "source", tmp_path / "target", to)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]
    backbone = convert_checkpoint(tmp_path / "source", tmp_path / "backbone", "backbone")
    assert json.loads((backbone / "preprocessor_config.json").read_text())["input_spec"] == {"gamma": 0.5}


CARD = "---\nlicense: cc-by-nc-4.0\nbase_model: some/model\n---\n\n# A model\n"


def test_license_is_kept_in_every_card(tmp_path):
    source = save_original(native_model(), tmp_path / "source")
    (source / "README.md").write_text(CARD)
    (source / "LICENSE").write_text("The terms.")
    vitp = convert_checkpoint(source, tmp_path / "vitp", image_token_id=5)
    folders = [vitp] + [convert_checkpoint(vitp, tmp_path / to, to) for to in ("internvl", "backbone", "original")]
    for folder in folders:
        card = metadata_load(folder / "README.md")
        assert card["license"] == "cc-by-nc-4.0"
        assert card["base_model"] == "some/model"
        assert "these weights: cc-by-nc-4.0" in (folder / "README.md").read_text()
        assert (folder / "LICENSE").read_text() == "The terms."
    before = sorted(tmp_path.iterdir())
    with pytest.raises(ValueError, match="license cc-by-nc-4.0.*apache-2.0"):
        convert_checkpoint(vitp, tmp_path / "free", "internvl", license="apache-2.0")
    assert sorted(tmp_path.iterdir()) == before


def test_license_of_a_run_is_kept(tmp_path):
    """The weights of a checkpoint have the license of those that the run started from."""
    source = save_original(native_model(), tmp_path / "run" / "checkpoint-2")
    record = {"licenses": {"org/start": {"license": "cc-by-nc-4.0"}}, "base_model": ["org/start"]}
    (tmp_path / "run" / "run.json").write_text(json.dumps(record))
    (tmp_path / "run" / "LICENSE").write_text("The terms.")
    with pytest.raises(ValueError, match="cc-by-nc-4.0.*org/start.*mit"):
        convert_checkpoint(source, tmp_path / "free", image_token_id=5, license="mit")
    vitp = convert_checkpoint(source, tmp_path / "vitp", image_token_id=5)
    card = metadata_load(vitp / "README.md")
    assert (card["license"], card["base_model"]) == ("cc-by-nc-4.0", ["org/start"])
    assert (vitp / "LICENSE").read_text() == "The terms."


def test_other_license_and_missing_license_are_stated(tmp_path):
    source = save_original(native_model(), tmp_path / "source")
    vitp = convert_checkpoint(source, tmp_path / "vitp", image_token_id=5)
    assert metadata_load(vitp / "README.md")["license"] == "unknown"
    assert "states no license" in (vitp / "README.md").read_text()
    backbone = convert_checkpoint(vitp, tmp_path / "backbone", "backbone", license="cc-by-nc-4.0")
    assert metadata_load(backbone / "README.md")["license"] == "cc-by-nc-4.0"
    (source / "LICENSE.txt").write_text("The terms.")
    other = convert_checkpoint(source, tmp_path / "other", image_token_id=5)
    assert metadata_load(other / "README.md")["license_link"] == "LICENSE.txt"
    (source / "LICENSE.txt").unlink()
    named = {"license": "other", "license_name": "acme", "license_link": "https://acme.org"}
    metadata_save(source / "README.md", named)
    card = metadata_load(convert_checkpoint(source, tmp_path / "named", image_token_id=5) / "README.md")
    assert {name: card[name] for name in named} == named


SPEC = {"band_names": ["VV", "VH"], "window": [-25, 0]}


def test_converted_bands_equal_spread_bands(fixture_as_vitp, tmp_path):
    dtype = torch.bfloat16
    convert_checkpoint(fixture_as_vitp, tmp_path / "three", "backbone")
    ViTPVisionModel.from_pretrained(tmp_path / "three", dtype=dtype).save_pretrained(tmp_path / "three")
    words = [str(tmp_path / "three"), str(tmp_path / "two"), "--license", "mit", "--input_spec", json.dumps(SPEC)]
    command.main([*words[:4], "--to", "backbone", *words[4:]])
    found = AutoModel.from_pretrained(tmp_path / "two")
    expected = spread_bands(ViTPVisionModel.from_pretrained(tmp_path / "three"), SPEC["band_names"])
    assert found.dtype == dtype and found.config.band_names == SPEC["band_names"] and found.config.num_channels == 2
    state = expected.state_dict()
    assert state.keys() == found.state_dict().keys()
    assert all(torch.equal(state[name], value) for name, value in found.state_dict().items())
    image_processor = AutoImageProcessor.from_pretrained(tmp_path / "two")
    assert image_processor.input_spec == SPEC and len(image_processor.image_mean) == 2

    convert_checkpoint(tmp_path / "two", tmp_path / "again", input_spec={"window": [-30, 0]})
    same, other = (load_file(tmp_path / name / "model.safetensors") for name in ("two", "again"))
    assert all(torch.equal(same[name], other[name]) for name in same)
    spec = AutoImageProcessor.from_pretrained(tmp_path / "again").input_spec
    assert spec == {"band_names": SPEC["band_names"], "window": [-30, 0]}
    with pytest.raises(ValueError, match=r"takes 2 bands \(VV, VH\), but the input spec has 1 band \(HH\)"):
        convert_checkpoint(tmp_path / "two", tmp_path / "wrong", input_spec={"band_names": ["HH"]})
    assert not (tmp_path / "wrong").exists()


def test_only_patch_kernel_of_model_is_spread(fixture_as_vitp, tmp_path):
    folder = convert_checkpoint(fixture_as_vitp, tmp_path / "two", "vitp", input_spec=SPEC)
    before, after = (load_file(path / "model.safetensors") for path in (fixture_as_vitp, folder))
    assert before.keys() == after.keys()
    changed = [name for name in before if not torch.equal(before[name], after[name])]
    assert changed == ["model.vision_tower.embeddings.patch_embeddings.projection.weight"]
    assert "spread over 2 bands (VV, VH)" in (folder / "README.md").read_text()
    with pytest.raises(ValueError, match="'internvl'"):
        convert_checkpoint(fixture_as_vitp, tmp_path / "internvl", "internvl", input_spec=SPEC)


def test_stem_of_an_adapter_is_spread(tmp_path):
    model = ViTPForSemanticSegmentation(ViTPSegmentationConfig(backbone_config=adapter_config(), **HEAD))
    model.save_pretrained(tmp_path / "three")
    ViTPSegmentationImageProcessor().save_pretrained(tmp_path / "three")
    folder = convert_checkpoint(tmp_path / "three", tmp_path / "two", license="mit", input_spec=SPEC)
    found = ViTPForSemanticSegmentation.from_pretrained(folder).state_dict()
    expected = spread_bands(model, SPEC["band_names"]).state_dict()
    assert all(torch.equal(expected[name], value) for name, value in found.items())
    assert found["backbone.spatial_prior.stem.0.weight"].shape[1] == 2
