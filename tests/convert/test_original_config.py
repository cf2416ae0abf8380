"""Configurations of the original code."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from huggingface_hub import metadata_load
from internvl_checkpoints import FIXTURE, native_model
from original_adapter import FOLDER, MMCV_FOLDER, original_weights
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers.utils import logging

from modeling_vitp import (
    ViTPAdapter,
    ViTPAdapterConfig,
    ViTPChangeDetectionConfig,
    ViTPForChangeDetection,
    ViTPForSemanticSegmentation,
    ViTPSegmentationConfig,
    ViTPSegmentationImageProcessor,
    convert_checkpoint,
)
from modeling_vitp.convert.__main__ import main
from modeling_vitp.convert.keys import locate_tensor
from modeling_vitp.convert.original_config import (
    TensorShapes,
    adapter_from_original,
    text_from_original,
    text_to_original,
)
from modeling_vitp.modeling_vitp_dense import HEADS


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_theta": 1e6, "rope_scaling": None},
        {"rope_theta": 5e5, "rope_scaling": {"type": "dynamic", "rope_type": "dynamic", "factor": 2.0}},
    ],
)
def test_language_model_config_round_trip(rope):
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


@pytest.mark.parametrize(
    ("vision", "message"),
    [
        ({"use_mean_pooling": False}, "use_mean_pooling=False"),
        ({"projection_dropout": 0.1}, "projection_dropout=0.1"),
        ({"image_size": [56, 28], "patch_size": [14, 7]}, r"image_size.*\[56, 28\]"),
        ({"image_size": [56, 112]}, r"\[56, 112\].*4 x 8 patches"),
    ],
)
def test_settings_unknown_to_the_original_code_are_refused(tmp_path, vision, message):
    native_model(vision).save_pretrained(tmp_path / "source")
    with pytest.raises(ValueError, match=message):
        convert_checkpoint(tmp_path / "source", tmp_path / "target", "original")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


CONV_MODULE = ["conv.weight", "bn.weight", "bn.bias", "bn.running_mean", "bn.running_var", "bn.num_batches_tracked"]
MODULES = [f"psp_modules.{index}.1" for index in range(4)]
MODULES += [
    "bottleneck",
    "fpn_bottleneck",
    *(f"{kind}.{i}" for kind in ("lateral_convs", "fpn_convs") for i in range(3)),
]
OPENMMLAB_HEADS = {f"decode_head.{module}.{part}" for module in MODULES for part in CONV_MODULE}
OPENMMLAB_HEADS |= {f"auxiliary_head.convs.0.{part}" for part in CONV_MODULE}
OPENMMLAB_HEADS |= {
    f"{head}.conv_seg.{part}" for head in ("decode_head", "auxiliary_head") for part in ("weight", "bias")
}
NORMS = {f"spm.stem.{index}" for index in (1, 4, 7)} | {f"spm.conv{number}.1" for number in (2, 3, 4)}
NORMS |= {f"norm{number}" for number in (1, 2, 3, 4)}


def adapter_config(norm: str = "layer_norm") -> ViTPAdapterConfig:
    settings = json.loads((FOLDER / "settings.json").read_text())
    return ViTPAdapterConfig(
        hidden_size=settings["embed_dim"],
        num_hidden_layers=settings["depth"],
        num_attention_heads=settings["num_heads"],
        intermediate_size=64,
        attention_bias=True,
        image_size=settings["img_size"],
        deformable_heads=settings["deform_num_heads"],
        spatial_prior_channels=settings["conv_inplane"],
        interaction_layers=settings["interaction_indexes"],
        spatial_prior_norm=norm,
    )


def original_keys(norm: str = "layer_norm") -> set[str]:
    keys = set(load_file(FOLDER / "adapter.safetensors"))
    if norm == "batch_norm":
        buffers = ("running_mean", "running_var", "num_batches_tracked")
        keys |= {f"{name}.{buffer}" for name in NORMS for buffer in buffers}
    return keys


def vivid(model: torch.nn.Module) -> torch.nn.Module:
    torch.manual_seed(1)
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            if tensor.is_floating_point():
                tensor.add_(0.1 * torch.rand_like(tensor))
    return model.eval()


def save_source(model: torch.nn.Module, folder: Path, processor: ViTPSegmentationImageProcessor | None = None) -> Path:
    vivid(model).save_pretrained(folder)
    if processor is not None:
        processor.save_pretrained(folder)
    return folder


def segmentation_model(is_pair: bool = False, **settings) -> ViTPForSemanticSegmentation:
    config_class = ViTPChangeDetectionConfig if is_pair else ViTPSegmentationConfig
    model_class = ViTPForChangeDetection if is_pair else ViTPForSemanticSegmentation
    config = {"hidden_size": 16, "auxiliary_channels": 24, "num_labels": 5, **settings}
    torch.manual_seed(0)
    return model_class(
        config_class(backbone_config=adapter_config("batch_norm" if is_pair else "layer_norm"), **config)
    )


def assert_same(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for key, tensor in wanted.items():
        assert found[key].dtype == tensor.dtype and torch.equal(found[key], tensor), key


def as_a_source(fixture: Path, folder: Path) -> Path:
    """Write a folder with an original checkpoint and its settings."""
    folder.mkdir()
    shutil.copyfile(fixture / "adapter.safetensors", folder / "model.safetensors")
    shutil.copyfile(fixture / "settings.json", folder / "config.json")
    return folder


@pytest.fixture
def original(tmp_path):
    return as_a_source(FOLDER, tmp_path / "original")


@pytest.fixture
def warnings(caplog, monkeypatch):
    """Capture log messages."""
    monkeypatch.setattr(logging.get_logger("transformers"), "propagate", True)
    monkeypatch.setattr(logging.get_logger("modeling_vitp"), "propagate", True)
    return caplog


@pytest.mark.parametrize("fixture", [FOLDER, MMCV_FOLDER], ids=["native", "mmcv"])
@torch.no_grad()
def test_adapter_gives_maps_of_original_code(fixture, tmp_path, warnings):
    original = as_a_source(fixture, tmp_path / "original")
    folder = convert_checkpoint(original, tmp_path / "adapter")
    assert "full width" not in warnings.text
    assert_same(load_file(folder / "model.safetensors"), original_weights(fixture))
    adapter, report = ViTPAdapter.from_pretrained(folder, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    expected = load_file(fixture / "expected.safetensors")
    for stride, features in zip((4, 8, 16, 32), adapter.eval()(expected["pixel_values"]).feature_maps, strict=True):
        torch.testing.assert_close(features, expected[f"map_stride_{stride}"], rtol=0, atol=1e-5)
    assert {"modeling_vitp_adapter.py", "preprocessor_config.json", "README.md"} <= {
        file.name for file in folder.iterdir()
    }
    assert metadata_load(folder / "README.md")["pipeline_tag"] == "image-feature-extraction"

    back = convert_checkpoint(folder, tmp_path / "back", "original")
    assert_same(load_file(back / "model.safetensors"), load_file(fixture / "adapter.safetensors"))
    settings, given = (
        json.loads((back / "config.json").read_text()),
        json.loads((fixture / "settings.json").read_text()),
    )
    given.pop("input", None)
    # mmcv's attention has values of full width for any setting.
    assert {name: settings[name] for name in given} == given | {"deform_ratio": 1.0 if fixture == MMCV_FOLDER else 0.25}


@pytest.mark.parametrize(
    ("settings", "given", "residual", "is_open"),
    [
        ({"deform_ratio": 0.25}, None, "normed_tokens", False),
        ({}, None, "normed_tokens", True),
        ({"deform_ratio": 1.0}, None, "tokens", True),
        ({"deform_ratio": 1.0, "deformable_attention": "mmcv"}, None, "normed_tokens", False),
        ({"deformable_attention": "native"}, None, "tokens", False),
        ({"deform_ratio": 1.0}, "mmcv", "normed_tokens", False),
        ({}, "native", "tokens", False),
    ],
)
def test_deformable_attention_is_recognized(settings, given, residual, is_open, tmp_path, warnings):
    original = as_a_source(MMCV_FOLDER, tmp_path / "original")
    known = json.loads((original / "config.json").read_text())
    known = {name: known[name] for name in ("num_heads", "interaction_indexes")}
    (original / "config.json").write_text(json.dumps(known | settings))
    folder = convert_checkpoint(original, tmp_path / "adapter", deformable_attention=given)
    config = ViTPAdapterConfig.from_pretrained(folder)
    dropout = {"tokens": 0.0, "normed_tokens": 0.1}[residual]
    assert (config.extractor_residual, config.deformable_dropout) == (residual, dropout)
    assert config.deformable_ratio == 1
    assert ("Set deformable_attention" in warnings.text) == is_open


@pytest.mark.parametrize(
    ("settings", "given"),
    [({"deformable_attention": "flash"}, None), ({}, "mmcv"), ({"deformable_attention": "native"}, "mmcv")],
)
def test_contradicting_attention_is_refused(original, settings, given, tmp_path):
    known = json.loads((original / "config.json").read_text())
    (original / "config.json").write_text(json.dumps(known | settings))
    with pytest.raises(ValueError, match="deformable_attention"):
        convert_checkpoint(original, tmp_path / "target", deformable_attention=given)


@pytest.mark.parametrize(
    "attention",
    [
        {},
        {"deformable_ratio": 1.0},
        {"deformable_ratio": 1.0, "extractor_residual": "normed_tokens"},
    ],
    ids=["narrow", "full", "mmcv without dropout"],
)
@pytest.mark.parametrize(("norm", "dtype"), [("layer_norm", torch.float32), ("batch_norm", torch.bfloat16)])
def test_round_trip_of_an_adapter_is_exact(tmp_path, norm, dtype, attention):
    torch.manual_seed(0)
    config = ViTPAdapterConfig.from_dict(adapter_config(norm).to_dict() | attention)
    source = save_source(ViTPAdapter(config).to(dtype), tmp_path / "source")
    there = convert_checkpoint(source, tmp_path / "there", "original")
    assert set(load_file(there / "model.safetensors")) == original_keys(norm)
    back = convert_checkpoint(there, tmp_path / "back")
    wanted = load_file(source / "model.safetensors")
    wanted.pop("embeddings.cls_token")
    assert_same(load_file(back / "model.safetensors"), wanted)
    ignored = {"architectures", "transformers_version", "auto_map"}
    before, after = (ViTPAdapterConfig.from_pretrained(folder).to_dict() for folder in (source, back))
    assert {k: v for k, v in before.items() if k not in ignored} == {k: v for k, v in after.items() if k not in ignored}


@pytest.mark.parametrize("is_pair", [pytest.param(False, marks=pytest.mark.slow), True])
@torch.no_grad()
def test_round_trip_of_a_segmentation_model_is_exact(tmp_path, is_pair):
    names = ["ground", "tree", "roof", "road", "water"]
    said = {"id2label": dict(enumerate(names)), "class_weights": [0.5, 2.0, 1.0, 1.0, 1.0], "loss_ignore_index": 7}
    said |= {"classifier_dropout": 0.1, "pool_scales": [1, 2, 4, 8]}
    model = segmentation_model(is_pair, pool_scales=said["pool_scales"])
    model.config.update({**said, "label2id": {name: index for index, name in said["id2label"].items()}})
    processor = ViTPSegmentationImageProcessor(do_reduce_labels=True, image_mean=[0.1, 0.2, 0.3])
    source = save_source(model, tmp_path / "source", processor)
    there = convert_checkpoint(source, tmp_path / "there", "original")
    names = {f"backbone.{key}" for key in original_keys("batch_norm" if is_pair else "layer_norm")} | OPENMMLAB_HEADS
    assert set(load_file(there / "model.safetensors")) == names

    back = convert_checkpoint(there, tmp_path / "back")
    wanted = load_file(source / "model.safetensors")
    wanted.pop("backbone.embeddings.cls_token")
    assert_same(load_file(back / "model.safetensors"), wanted)
    opened, report = type(model).from_pretrained(back, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    assert {name: getattr(opened.config, name) for name in said} == said
    assert opened.config.label2id == model.config.label2id
    assert ViTPSegmentationImageProcessor.from_pretrained(back).to_dict() == processor.to_dict()
    images = [torch.randn(1, 3, 64, 96) for _ in range(1 + is_pair)]
    torch.testing.assert_close(opened.eval()(*images).logits, model(*images).logits)

    adapter = ViTPAdapter.from_pretrained(convert_checkpoint(there, tmp_path / "adapter", "adapter")).eval()
    for found, expected in zip(adapter(images[0]).feature_maps, model.backbone(images[0]).feature_maps, strict=True):
        torch.testing.assert_close(found, expected)
    again = convert_checkpoint(source, tmp_path / "again", "adapter")
    assert ViTPSegmentationImageProcessor.from_pretrained(again).do_reduce_labels


def test_auxiliary_head_is_recognized(tmp_path):
    for number, settings in enumerate(
        [{"use_auxiliary_head": False}, {"auxiliary_num_convs": 2, "auxiliary_concat_input": True}]
    ):
        folder = tmp_path / str(number)
        source = save_source(segmentation_model(**settings), folder / "source")
        back = convert_checkpoint(convert_checkpoint(source, folder / "there", "original"), folder / "back")
        config = ViTPSegmentationConfig.from_pretrained(back)
        assert {name: getattr(config, name) for name in settings} == settings
        wanted = load_file(source / "model.safetensors")
        wanted.pop("backbone.embeddings.cls_token")
        assert_same(load_file(back / "model.safetensors"), wanted)


def test_backbone_of_an_unknown_head_is_converted(original, tmp_path, warnings):
    weights = {f"backbone.{name}": tensor for name, tensor in load_file(original / "model.safetensors").items()}
    heads = {"neck.lateral_convs.0.conv.weight": torch.zeros(2), "rpn_head.rpn_cls.weight": torch.zeros(2)}
    save_file(weights | heads | {"rpn_head.rpn_cls.bias": torch.zeros(2)}, original / "model.safetensors")
    folder = convert_checkpoint(original, tmp_path / "adapter")
    assert "only the backbone is converted. Left out: neck (1 tensors), rpn_head (2 tensors)." in warnings.text
    assert_same(load_file(folder / "model.safetensors"), original_weights())


def test_published_adapter_needs_no_config():
    """Only the shapes of the paper's model are used; nothing is allocated."""
    config = ViTPAdapterConfig(num_hidden_layers=24, hidden_size=1024, num_attention_heads=16, attention_bias=True)
    config = ViTPAdapterConfig.from_dict(config.to_dict() | {"intermediate_size": 4096, "image_size": [512, 512]})
    with torch.device("meta"):
        state = ViTPAdapter(config).state_dict()
    shapes = TensorShapes()
    for name, tensor in state.items():
        found = locate_tensor(f"backbone.{name}", "original_adapter")
        if found is not None:
            shapes[found.key] = (tensor.shape[0] * found.num_blocks, *tensor.shape[1:])
    assert adapter_from_original({}, shapes).to_dict() == config.to_dict()


MISTAKES = {  # change of the configuration, a renamed tensor (without a new name, it is removed), and the error
    "no settings": (None, None, "not visible in the tensors"),
    "interactions": ({"interaction_indexes": [[0, 1], [2, 3], [4, 5], [6, 6]]}, None, "must be four"),
    "width": ({"embed_dim": 64}, None, "embed_dim=64, expected 32"),
    "final norm": ({"use_final_norm": False}, None, "use_final_norm=False"),
    "unknown": ({}, ("interactions.1.injector.gamma", "spm.fc5.weight"), "unknown: spm.fc5.weight"),
    "missing": ({}, ("interactions.1.injector.gamma", None), "missing: interactions.1.injector.gamma"),
    "other ViT": ({}, ("embeddings.position_embedding", "pos_embed"), "'embeddings.position_embedding' is missing"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_wrong_adapter_is_named(original, tmp_path, mistake):
    changes, renamed, message = MISTAKES[mistake]
    weights = load_file(original / "model.safetensors")
    settings = json.loads((original / "config.json").read_text())
    if renamed is not None:
        name, new_name = renamed
        tensor = weights.pop(name)
        if new_name is not None:
            weights[new_name] = tensor
    save_file(weights, original / "model.safetensors")
    (original / "config.json").write_text(json.dumps({} if changes is None else settings | changes))
    with pytest.raises(ValueError) as error:
        main([str(original), str(tmp_path / "target")])
    assert message in " ".join(str(error.value).split())
    assert [path.name for path in tmp_path.iterdir()] == ["original"]


def test_pickle_is_refused(tmp_path):
    torch.save({"state_dict": {"spm.stem.0.weight": torch.zeros(1)}}, tmp_path / "iter_80000.pth")
    for source in (tmp_path, tmp_path / "iter_80000.pth"):
        with pytest.raises(ValueError, match=r"Pickles.*safetensors\.torch\.save_file\(torch\.load"):
            convert_checkpoint(source, tmp_path / "target")


def test_unsupported_targets_are_refused(tmp_path):
    source = save_source(ViTPAdapter(adapter_config()), tmp_path / "source")
    for to in ("adapter", "segmentation", "backbone"):
        with pytest.raises(ValueError, match=f"'{to}'"):
            convert_checkpoint(source, tmp_path / "target", to)
    with pytest.raises(ValueError, match="deformable_attention"):
        convert_checkpoint(source, tmp_path / "target", "original", deformable_attention="mmcv")
    config = ViTPAdapterConfig.from_dict(adapter_config().to_dict() | {"extractor_residual": "normed_tokens"})
    source = save_source(ViTPAdapter(config), tmp_path / "residual")
    with pytest.raises(ValueError, match="deformable_ratio=0.25"):
        convert_checkpoint(source, tmp_path / "target", "original")
    assert not (tmp_path / "target").exists()


def test_head_with_one_output_is_refused(tmp_path):
    there = convert_checkpoint(save_source(segmentation_model(), tmp_path / "source"), tmp_path / "there", "original")
    weights = load_file(there / "model.safetensors")
    weights["decode_head.conv_seg.weight"] = weights["decode_head.conv_seg.weight"][:1].clone()
    save_file(weights, there / "model.safetensors")
    with pytest.raises(ValueError, match="decode head.*1 classes on 32 channels"):
        convert_checkpoint(there, tmp_path / "target")


def test_head_from_outside_has_no_original_layout(tmp_path, monkeypatch):
    monkeypatch.setitem(HEADS, "one_map", lambda config, channels: torch.nn.Conv2d(channels[0], config.num_labels, 1))
    source = save_source(segmentation_model(decode_head="one_map"), tmp_path / "source")
    with pytest.raises(ValueError, match="decode_head='one_map', expected 'upernet'"):
        convert_checkpoint(source, tmp_path / "target", "original")
    adapter = convert_checkpoint(source, tmp_path / "adapter", "adapter")
    assert not any(ViTPAdapter.from_pretrained(adapter, output_loading_info=True)[1].values())


def test_shards_are_kept(tmp_path):
    vivid(ViTPAdapter(adapter_config())).save_pretrained(tmp_path / "source", max_shard_size="100KB")
    there = convert_checkpoint(tmp_path / "source", tmp_path / "there", "original")
    keys = [set(safe_open(file, "pt").keys()) for file in there.glob("model-*.safetensors")]
    assert len(keys) > 1 and set.union(*keys) == original_keys() and sum(map(len, keys)) == len(original_keys())
