"""Loading of the model to pretrain."""

import json

import pytest
import torch
import yaml
from huggingface_hub.errors import StrictDataclassError
from paths import ROOT
from pictures import picture
from pushed_runs import train
from safetensors.torch import load_file
from tiny_models import FROM_SCRATCH, TEXT, VISION, VISION_16
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    DFineConfig,
    GotOcr2ImageProcessor,
    InternVLConfig,
    InternVLForConditionalGeneration,
    InternVLVisionConfig,
    InternVLVisionModel,
    LlavaConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
)
from trl import ModelConfig

from modeling_vitp import (
    ViTPAdapterConfig,
    ViTPForConditionalGeneration,
    ViTPForObjectDetection,
    ViTPForSemanticSegmentation,
    ViTPImageProcessor,
    ViTPObjectDetectionConfig,
    ViTPProcessor,
    ViTPSegmentationConfig,
    ViTPVisionConfig,
    ViTPVisionModel,
    convert_checkpoint,
)
from modeling_vitp.command.errors import MISTAKE, explain_error
from modeling_vitp.configuration_vitp import known_keys
from modeling_vitp.pretraining.arguments import PretrainArguments
from modeling_vitp.pretraining.loading import (
    build_tokenizer,
    check_compatible,
    check_config,
    check_from_scratch,
    check_options,
    compose,
    load_start,
    tiling,
)
from modeling_vitp.tasks.arguments import BackboneArguments
from modeling_vitp.tasks.loading import check_start


def assert_same_weights(found: dict, expected: dict) -> None:
    assert found.keys() == expected.keys()
    for name, weight in expected.items():
        assert torch.equal(found[name], weight), name


def load(model_args=None, texts=(), **arguments):
    return load_start(PretrainArguments("rows", **arguments), model_args or ModelConfig(), texts)


def test_internvl_checkpoint_is_loaded(tmp_path):
    tokenizer = build_tokenizer(["How many trees?"], 320)
    config = InternVLConfig(
        vision_config=VISION,
        text_config=Qwen2Config(**{**TEXT, "vocab_size": len(tokenizer)}).to_dict(),
        image_token_id=tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>"),
        image_seq_length=4,
        tie_word_embeddings=False,
    )
    native = InternVLForConditionalGeneration(config).eval()
    native.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    GotOcr2ImageProcessor(size={"height": 56, "width": 56}, image_mean=[0.4, 0.5, 0.6]).save_pretrained(tmp_path)

    model, processor = load(ModelConfig(model_name_or_path=str(tmp_path)), drop_path_rate=0.1)
    assert isinstance(model, ViTPForConditionalGeneration)
    assert [layer.drop_path.drop_prob for layer in model.model.vision_tower.encoder.layer] == [0.0, 0.05, 0.1]
    assert list(processor.image_processor.image_mean) == [0.4, 0.5, 0.6]
    inputs = processor(images=picture(130, 60), text="<IMG_CONTEXT>How many trees?", return_tensors="pt")
    with torch.no_grad():
        assert torch.equal(model.eval()(**inputs).logits, native(**inputs).logits)
    assert not any(parameter.is_meta for parameter in model.parameters())


def test_model_from_scratch_has_requested_attention():
    for implementation in ("eager", "sdpa"):
        model, _ = load(ModelConfig(attn_implementation=implementation), ["How many?"], from_scratch=FROM_SCRATCH)
        configs = (model.config, model.config.vision_config, model.config.text_config)
        assert {config._attn_implementation for config in configs} == {implementation}


def test_unsuitable_checkpoint_is_refused(model_and_processor, tmp_path):
    Qwen2Config(**TEXT).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="'qwen2'"):
        load(ModelConfig(model_name_or_path=str(tmp_path)))
    model, processor = model_and_processor
    del model.model.vision_tower.encoder.layer[0].lambda_1
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="missing_keys.*lambda_1"):
        load(ModelConfig(model_name_or_path=str(tmp_path)))


@pytest.mark.parametrize(
    ("options", "from_scratch", "kwargs", "name"),
    [
        ({"load_in_4bit": True}, None, None, "load_in_4bit"),
        ({"bnb_4bit_quant_type": "fp4"}, None, None, "bnb_4bit_quant_type"),
        ({"lora_r": 3}, None, None, "lora_r"),
        ({"dtype": "bfloat16"}, FROM_SCRATCH, None, "dtype"),
        ({}, None, {"attn_implementation": "eager"}, "model_init_kwargs"),
    ],
    ids=str,
)
def test_options_without_effect_are_refused(options, from_scratch, kwargs, name):
    with pytest.raises(ValueError, match=name):
        check_options(ModelConfig(**options), from_scratch, kwargs)
    check_options(ModelConfig(dtype="bfloat16", use_peft=True), None)


SMALL_TEXT = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
ADDED = ["<|im_end|>", "<|im_start|>", "<img>", "</img>", "<IMG_CONTEXT>", "<ref>", "</ref>", "<box>", "</box>"]


@pytest.fixture
def vision_folder(tmp_path):
    """Return the folder of a backbone of transformers' class, with an image processor with other statistics."""
    torch.manual_seed(0)
    InternVLVisionModel(InternVLVisionConfig(**VISION)).save_pretrained(tmp_path / "vit")
    size = {"height": 56, "width": 56}
    ViTPImageProcessor(size=size, image_mean=[0.1, 0.2, 0.3], max_patches=4).save_pretrained(tmp_path / "vit")
    return tmp_path / "vit"


def plain_tokenizer() -> PreTrainedTokenizerFast:
    """Return a byte-level tokenizer without special tokens of turns and images."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({token: index for index, token in enumerate([*alphabet, "</s>"])}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>")


def save_language_model(folder, model_type="llama", tokenizer=None, **settings):
    tokenizer = tokenizer or plain_tokenizer()
    heads = {} if model_type in ("llama", "gpt_neox", "phi") else {"num_key_value_heads": 2, "head_dim": 8}
    config = AutoConfig.for_model(
        model_type,
        **{**SMALL_TEXT, **heads, "vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id, **settings},
    )
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(config)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model.eval()


def composed(vision_folder, language_folder, **kwargs):
    start = {"vision_model": str(vision_folder), "language_model": str(language_folder)}
    return load(**start, **kwargs)


@pytest.mark.parametrize(
    ("model_type", "tied"),
    [("llama", True), ("qwen3", False), ("gpt_neox", False)],
)
@torch.no_grad()
def test_composed_parts_keep_weights_and_outputs(vision_folder, tmp_path, model_type, tied):
    language = save_language_model(tmp_path / "lm", model_type, tie_word_embeddings=tied)
    model, processor = composed(vision_folder, tmp_path / "lm", drop_path_rate=0.1)
    vision = InternVLVisionModel.from_pretrained(vision_folder)
    assert_same_weights(model.model.vision_tower.state_dict(), vision.state_dict())
    assert [layer.drop_path.drop_prob for layer in model.model.vision_tower.encoder.layer] == [0.0, 0.05, 0.1]
    assert (model.lm_head.weight is model.get_input_embeddings().weight) == tied
    assert not any(parameter.is_meta for parameter in model.parameters())
    assert not any(buffer.is_meta for buffer in model.buffers())

    text = plain_tokenizer()("How many trees are there?", return_tensors="pt")
    inputs = processor(text="How many trees are there?", return_tensors="pt")
    assert inputs["input_ids"].tolist() == text["input_ids"].tolist()
    old = len(plain_tokenizer())
    logits = model.eval()(input_ids=text["input_ids"], attention_mask=text["attention_mask"]).logits
    wanted = language(input_ids=text["input_ids"], attention_mask=text["attention_mask"]).logits
    torch.testing.assert_close(logits[..., :old], wanted, atol=1e-6, rtol=0)

    check_compatible(model, processor)
    pixels = processor(images=picture(130, 60), text="<IMG_CONTEXT>How many?", return_tensors="pt")
    assert model(**pixels).logits.isfinite().all()
    assert model.model.multi_modal_projector.linear_1.weight.std() == pytest.approx(0.02, rel=0.2)
    assert model.model.multi_modal_projector.layer_norm.weight.eq(1).all()


def test_special_tokens_template_and_stop_tokens_are_set(vision_folder, tmp_path):
    save_language_model(tmp_path / "lm")
    model, processor = composed(vision_folder, tmp_path / "lm")
    old = len(plain_tokenizer())
    assert processor.tokenizer.convert_tokens_to_ids(ADDED) == list(range(old, old + len(ADDED)))
    assert model.config.text_config.vocab_size == model.lm_head.out_features == old + len(ADDED)
    assert model.config.image_token_id == old + ADDED.index("<IMG_CONTEXT>")
    assert processor.tokenizer.pad_token == "</s>"
    end = processor.tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert model.generation_config.eos_token_id == [end, plain_tokenizer().eos_token_id]
    embeddings = model.get_input_embeddings().weight
    spread = embeddings[:old].std()
    assert embeddings[old:].std() < 2 * spread and embeddings[old:].abs().max() > 0

    chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "How many?"}]}]
    text = processor.apply_chat_template(chat, add_generation_prompt=True)
    assert text == "<|im_start|>user\n<IMG_CONTEXT>\nHow many?<|im_end|>\n<|im_start|>assistant\n"
    inputs = processor(images=picture(56, 56), text=text, return_tensors="pt")
    assert (inputs["input_ids"] == model.config.image_token_id).sum() == processor.image_seq_length == 4
    assert list(processor.image_processor.image_mean) == [0.1, 0.2, 0.3]
    assert processor.image_processor.max_patches == 4


def test_known_tokens_keep_the_vocabulary(vision_folder, tmp_path):
    tokenizer = build_tokenizer(["How many trees?"], 320)
    language = save_language_model(tmp_path / "lm", "qwen2", tokenizer, vocab_size=330)
    model, processor = composed(vision_folder, tmp_path / "lm")
    assert model.config.text_config.vocab_size == 330  # padded like published models
    assert torch.equal(model.get_input_embeddings().weight, language.get_input_embeddings().weight)
    assert len(processor.tokenizer) == len(tokenizer)
    assert model.generation_config.eos_token_id == [tokenizer.eos_token_id]


@pytest.mark.parametrize("tied", [True, False])
def test_new_tokens_use_spare_embedding_rows(vision_folder, tmp_path, tied):
    """Embedding tables are often padded with equal rows."""
    old = len(plain_tokenizer())
    language = save_language_model(tmp_path / "lm", vocab_size=old + 40, tie_word_embeddings=tied)
    with torch.no_grad():
        for embeddings in (language.get_input_embeddings(), language.get_output_embeddings()):
            embeddings.weight[old:] = 0
    language.save_pretrained(tmp_path / "lm")
    model, processor = composed(vision_folder, tmp_path / "lm")
    ids = processor.tokenizer.convert_tokens_to_ids(ADDED)
    assert ids == list(range(old, old + len(ADDED))) and model.config.text_config.vocab_size == old + 40
    for found, given in (
        (model.get_input_embeddings(), language.get_input_embeddings()),
        (model.lm_head, language.get_output_embeddings()),
    ):
        assert torch.equal(found.weight[:old], given.weight[:old])
        assert torch.cdist(found.weight[ids], found.weight[ids]).fill_diagonal_(1).min() > 0.01


@torch.no_grad()
def test_composed_model_is_saved_and_reloaded(vision_folder, tmp_path):
    save_language_model(tmp_path / "lm")
    model, processor = composed(vision_folder, tmp_path / "lm")
    model.save_pretrained(tmp_path / "whole")
    processor.save_pretrained(tmp_path / "whole")
    again, report = ViTPForConditionalGeneration.from_pretrained(tmp_path / "whole", output_loading_info=True)
    assert not any(report.values())
    inputs = processor(images=picture(56, 56), text="<IMG_CONTEXT>How many?", return_tensors="pt")
    reopened = ViTPProcessor.from_pretrained(tmp_path / "whole")
    assert torch.equal(
        reopened(images=picture(56, 56), text="<IMG_CONTEXT>How many?", return_tensors="pt")["input_ids"],
        inputs["input_ids"],
    )
    assert torch.equal(again.eval()(**inputs).logits, model.eval()(**inputs).logits)
    backbone = convert_checkpoint(tmp_path / "whole", tmp_path / "backbone", "backbone")
    assert_same_weights(load_file(backbone / "model.safetensors"), load_file(vision_folder / "model.safetensors"))


def test_composed_model_trains(vision_folder, data_folder, tmp_path):
    save_language_model(tmp_path / "lm")
    parts = {"vision_model": str(vision_folder), "language_model": str(tmp_path / "lm")}
    assert train(tmp_path, **parts, dataset_name=str(data_folder), learning_rate=1e-2) == 0
    assert json.loads((tmp_path / "out" / "metrics.json").read_text())["train"]["train_loss"] > 0
    trained = load_file(tmp_path / "out" / "backbone" / "model.safetensors")
    start = load_file(vision_folder / "model.safetensors")
    assert trained.keys() == start.keys()
    assert all(not torch.equal(trained[key], start[key]) for key in start)


def test_from_scratch_loads_weights_of_backbone(vision_folder):
    model, _ = load(from_scratch=FROM_SCRATCH, vision_model=str(vision_folder))
    assert_same_weights(model.model.vision_tower.state_dict(), load_file(vision_folder / "model.safetensors"))
    other = FROM_SCRATCH | {"vision_config": VISION | {"intermediate_size": 24}}
    with pytest.raises(ValueError, match="from_scratch.vision_config.*size mismatch"):
        load(from_scratch=other, vision_model=str(vision_folder))


def test_from_scratch_reads_images_as_its_backbone(vision_folder, tmp_path):
    """Settings of `from_scratch` override those of the backbone, also in the dry run."""
    own = {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.5] * 3, "max_patches": 3}
    own["input_spec"] = {"window": [-160, 240]}
    ViTPImageProcessor(**own).save_pretrained(vision_folder)
    for settings in ({}, {"max_patches": 1, "image_mean": [0.5] * 3}):
        scratch = FROM_SCRATCH | {"image_processor": settings}
        _, processor = load(from_scratch=scratch, vision_model=str(vision_folder))
        planned, tokens = tiling(None, scratch, str(vision_folder))
        found = [one.to_dict() for one in (processor.image_processor, planned)]
        for name, value in (own | settings).items():
            assert [list(one[name]) if isinstance(value, list) else one[name] for one in found] == [value] * 2
        assert processor.image_processor.size == planned.size and tokens == processor.image_seq_length


def test_tiling_equals_composed_image_processor(vision_folder, tmp_path):
    save_language_model(tmp_path / "lm")
    _, processor = compose(str(vision_folder), str(tmp_path / "lm"))
    planned, tokens = tiling(None, None, str(vision_folder))
    assert planned.to_dict() == processor.image_processor.to_dict() and tokens == processor.image_seq_length
    assert planned.size != ViTPImageProcessor().size


def test_composed_weights_are_float32(vision_folder, tmp_path):
    save_language_model(tmp_path / "lm")
    for folder, model_class in ((vision_folder, ViTPVisionModel), (tmp_path / "lm", AutoModelForCausalLM)):
        model_class.from_pretrained(folder).bfloat16().save_pretrained(folder)
    for options, dtype in (({}, torch.float32), ({"dtype": "bfloat16"}, torch.bfloat16)):
        model, _ = compose(str(vision_folder), str(tmp_path / "lm"), **options)
        assert {weight.dtype for weight in model.parameters()} == {dtype}


def test_incompatible_starts_are_refused(vision_folder, tmp_path):
    save_language_model(tmp_path / "lm")
    both = {"vision_model": str(vision_folder), "language_model": str(tmp_path / "lm")}
    for part in both:
        with pytest.raises(ValueError, match="vision_model and language_model"):
            load(**{part: both[part]})
    with pytest.raises(ValueError, match="model_name_or_path"):
        load(ModelConfig(model_name_or_path="x"), **both)
    with pytest.raises(ValueError, match="vision_model .*'llama'"):
        composed(tmp_path / "lm", tmp_path / "lm")
    with pytest.raises(ValueError, match="vit is a backbone"):
        tiling(str(vision_folder), None)


@pytest.mark.parametrize(
    ("model_type", "settings", "named"),
    [
        ("gemma2", {"final_logit_softcapping": 1e-3}, "'gemma2', computes its logits"),
        ("phi", {}, "linear LM head"),
        ("gpt_neox", {"tie_word_embeddings": True}, "'gpt_neox'.*embed_tokens"),
    ],
)
def test_other_heads_are_refused(vision_folder, tmp_path, model_type, settings, named):
    """The combined model would not cap logits, as Gemma 2 does, and its linear head has no bias."""
    save_language_model(tmp_path / "lm", model_type, **settings)
    with pytest.raises(ValueError, match=named):
        composed(vision_folder, tmp_path / "lm")


def test_language_model_with_missing_weights_is_refused(vision_folder, tmp_path):
    language = save_language_model(tmp_path / "lm")
    del language.model.layers[1].mlp.up_proj
    language.save_pretrained(tmp_path / "lm")
    with pytest.raises(ValueError, match="missing_keys.*up_proj"):
        composed(vision_folder, tmp_path / "lm")


CLASSES = [ViTPVisionConfig, ViTPSegmentationConfig, ViTPObjectDetectionConfig, Qwen2Config]


@pytest.mark.parametrize("config_class", CLASSES, ids=lambda cls: cls.__name__)
def test_saved_configuration_has_known_keys(config_class, tmp_path):
    config_class().save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    saved = {name: value for name, value in saved.items() if name != "backbone_config"}
    assert "model_type" in saved and "dtype" in known_keys(config_class)
    check_config("head", saved, config_class)


def test_names_of_configuration_fields():
    for key in ("id2label", "num_labels", "torch_dtype", "hidden_size", "model_type"):
        check_config("backbone", {key: None}, ViTPAdapterConfig)
        check_config("head", {key: None}, DFineConfig)
    check_config("backbone", {"out_features": None}, ViTPAdapterConfig)
    part = {"text_config": {"model_type": "qwen2", "num_hiden_layers": 2}}
    with pytest.raises(ValueError, match=r"'num_hiden_layers'.*'num_hidden_layers'"):
        check_config("text", part, LlavaConfig)


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"vision_config": VISION | {"num_hiden_layers": 2}}, "'num_hiden_layers'.*'num_hidden_layers'"),
        ({"text_config": {"model_type": "qwn2"}}, "'qwn2'.*'qwen2'"),
        ({"text_config": TEXT | {"zzz": 2}}, "'zzz'.*Qwen2Config"),
        ({"image_processor": {"max_patch": 1}}, "'max_patch'.*'max_patches'"),
        ({"vision_config": 24}, "vision_config.*24"),
    ],
)
def test_mistyped_key_from_scratch_is_refused(changed, named):
    check_from_scratch(FROM_SCRATCH)
    check_from_scratch(FROM_SCRATCH | {"text_config": {"rope_parameters": {"rope_theta": 100.0}, "rope_theta": 1.0}})
    with pytest.raises(ValueError, match=f"from_scratch.*{named}|{named}.*from_scratch"):
        check_from_scratch(FROM_SCRATCH | changed)


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"backbone": {"deformable_head": 4}}, "'deformable_head'.*'deformable_heads'"),
        ({"backbone": {"deformable_heads": 4}, "neck": "pyramid"}, "'deformable_heads'.*adapter"),
        ({"head": {"neck_chanels": 32}}, "'neck_chanels'.*'neck_channels'"),
        ({"head": {"id2label": {0: "tree"}}}, "'id2label'"),
    ],
)
def test_mistyped_key_of_fine_tuning_is_refused(settings, named):
    args = {"from_scratch": VISION_16, "backbone": {"deformable_heads": 4}, "head": {"neck_channels": 16}}
    check_start(ViTPForObjectDetection, BackboneArguments(**args))
    with pytest.raises(ValueError, match=named):
        check_start(ViTPForObjectDetection, BackboneArguments(**args | {"backbone": None} | settings))


def test_random_weights_are_not_scored():
    args = BackboneArguments(from_scratch=VISION_16)
    with pytest.raises(ValueError, match="do_train.*model_name_or_path"):
        check_start(ViTPForSemanticSegmentation, args, do_train=False)


@pytest.mark.parametrize("settings", [{"deformable_heads": 5}, {"hidden_size": "wide"}])
def test_invalid_configuration_value_is_a_mistake(settings):
    with pytest.raises(StrictDataclassError) as caught:
        ViTPAdapterConfig(**VISION_16 | {"deformable_heads": 4} | settings)
    what, remedy, status = explain_error(caught.value)
    assert status == MISTAKE and remedy is None
    assert next(iter(settings)) in what


def test_package_configurations_have_known_keys():
    checked = 0
    for path in sorted((ROOT / "recipes" / "configs").glob("*.yaml")):
        settings = yaml.safe_load(path.read_text())
        if "vocab_size" in (settings.get("from_scratch") or {}):
            check_from_scratch(settings["from_scratch"])
            checked += 1
        elif {"neck", "head", "backbone"} & {*settings}:
            names = {name: settings.get(name) for name in ("from_scratch", "backbone", "head")}
            names |= {"neck": settings.get("neck", "adapter")}
            start = {} if names["from_scratch"] else {"model_name_or_path": "backbone"}
            model_class = ViTPForObjectDetection if "image_size" in settings else ViTPForSemanticSegmentation
            check_start(model_class, BackboneArguments(**names, **start))
            checked += 1
    assert checked >= 5
