"""Each family of vision transformers beside its own library: in the vision-language model, exported, and in tasks."""

import copy

import pytest
import timm
import torch
from huggingface_hub.errors import StrictDataclassError
from internvl_oracle import blocked_mask
from paths import ROOT
from pictures import picture
from transformers import (
    AutoBackbone,
    AutoConfig,
    AutoModel,
    PreTrainedModel,
    SwinConfig,
    SwinModel,
    TimmWrapperConfig,
    TimmWrapperModel,
)
from vision_families import FAMILIES, MEAN, NAMES, STD, library_features, save_clip, save_language_model, save_vit

from modeling_vitp import (
    ViTPAdapter,
    ViTPConfig,
    ViTPFeaturePyramid,
    ViTPForConditionalGeneration,
    ViTPForImageClassification,
    ViTPForObjectDetection,
    ViTPForSemanticSegmentation,
    ViTPVisionModel,
    compose,
    export_backbone,
    resize_backbone,
)
from modeling_vitp.auto.registry import MODELS
from modeling_vitp.convert.onnx import export_onnx
from modeling_vitp.modeling_vitp_backbone import open_vit
from modeling_vitp.pretraining.model_patches import checkpoint_activations
from modeling_vitp.pretraining.plan import BatchShape, step_cost
from modeling_vitp.probing.backbones import load_backbone
from modeling_vitp.training.freezing import freeze, layer_decay_groups
from modeling_vitp.vision_towers import TOWERS, pair, tower_of

SIZES = {"native": (1, 1), "large": (2, 2), "wide": (1, 2)}
ADAPTER = {"deformable_heads": 2, "spatial_prior_channels": 8}
CLASSES = {0: "water", 1: "tree"}
TIMM_ARGS = {"img_size": 64, "embed_dim": 32, "depth": 4, "num_heads": 2, "num_classes": 1000}


IN_FAST_SUITE = ("dinov3_vit",)


@pytest.fixture(
    scope="module",
    params=[name if name in IN_FAST_SUITE else pytest.param(name, marks=pytest.mark.slow) for name in NAMES],
)
def folder(request, tmp_path_factory):
    """Folder of the model of a family, without a repetition of its creation."""
    folder = tmp_path_factory.mktemp(request.param)
    save_vit(folder, request.param)
    return folder


@pytest.fixture(scope="module")
def language_model(tmp_path_factory):
    return save_language_model(tmp_path_factory.mktemp("language"))


@pytest.fixture(scope="module")
def composed(folder, language_model):
    return compose(str(folder), str(language_model))


@pytest.fixture
def vlm(composed):
    model = copy.deepcopy(composed[0])
    freeze(model)
    return model


def library_model(folder) -> PreTrainedModel:
    """Load the model by its own class, which for a masked autoencoder has a decoder."""
    model_class, *_ = FAMILIES[AutoConfig.from_pretrained(folder).model_type]
    return model_class.from_pretrained(folder).eval()


def images(config, scale=(1, 1), number: int = 2) -> torch.Tensor:
    sides = [side * times for side, times in zip(pair(config.image_size), scale)]
    return torch.randn(number, 3, *sides, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("size", SIZES)
def test_features_equal_library(folder, vlm, size):
    vit = vlm.model.vision_tower.eval()
    pixels = images(vit.config, SIZES[size])
    wanted = library_features(library_model(folder), pixels)
    with torch.no_grad():
        torch.testing.assert_close(tower_of(vit.config).patch_tokens(vit, pixels), wanted, atol=1e-5, rtol=0)
        states = vlm.eval().get_image_features(pixels).last_hidden_state
        torch.testing.assert_close(states[:, -wanted.shape[1] :], wanted, atol=1e-5, rtol=0)


def test_pixels_that_fill_no_patch_are_ignored(vlm):
    vit = vlm.model.vision_tower.eval()
    tower = tower_of(vit.config)
    whole = images(vit.config)
    with_border = torch.nn.functional.pad(whole, (0, 3, 0, 5), value=7.0)
    with torch.no_grad():
        expected = tower.patch_tokens(vit, whole)
        torch.testing.assert_close(tower.patch_tokens(vit, with_border), expected, atol=1e-5, rtol=0)
        (tokens, _), (expected_tokens, _) = tower.embed(vit, with_border), tower.embed(vit, whole)
    torch.testing.assert_close(tokens, expected_tokens, atol=1e-5, rtol=0)


def test_layers_one_by_one_equal_model(vlm):
    vit = vlm.model.vision_tower.eval()
    tower, pixels = tower_of(vit.config), images(vit.config, SIZES["wide"])
    with torch.no_grad():
        states, options = tower.embed(vit, pixels)
        for layer in vit.get_submodule(tower.layers):
            states = tower.run_layer(layer, states, options)
        if tower.norm is not None:
            states = vit.get_submodule(tower.norm)(states)
        prefix = FAMILIES[vit.config.model_type][3]
        assert tower.num_prefix_tokens(vit.config) == prefix
        torch.testing.assert_close(states[:, prefix:], tower.patch_tokens(vit, pixels), atol=1e-6, rtol=0)


def test_short_sequence_equals_blocked_one(composed, vlm):
    """The oracle of VRL: the short forward equals the full one whose attention blocks every dropped position."""
    processor, full_model = composed[1], copy.deepcopy(vlm)
    call = {"images": [[picture(130, 60)]], "text": ["<IMG_CONTEXT>How many trees are there?"], "return_tensors": "pt"}
    full, short = processor(**call), processor(**call, vrl_drop_ratio=0.75, vrl_keys=[(0, 0, 0)])
    survives = torch.zeros_like(full["attention_mask"], dtype=torch.bool)
    survives[0, short["position_ids"][0]] = True
    assert short["input_ids"].shape[1] < full["input_ids"].shape[1]

    labels = short["input_ids"].masked_fill(short["input_ids"] == processor.image_token_id, -100)
    labels[:, :-4] = -100
    full_labels = torch.full_like(full["input_ids"], -100).masked_scatter(survives, labels)
    torch.manual_seed(0)
    actual = vlm.train()(**short, labels=labels, use_cache=False)
    torch.manual_seed(0)
    wanted = full_model.train()(
        input_ids=full["input_ids"],
        pixel_values=full["pixel_values"],
        position_ids=torch.arange(survives.shape[1])[None],
        attention_mask=blocked_mask(full["attention_mask"], survives),
        labels=full_labels,
        use_cache=False,
    )
    torch.testing.assert_close(actual.logits[0], wanted.logits[survives], atol=1e-5, rtol=0)
    actual.loss.backward()
    wanted.loss.backward()
    for (name, weight), other in zip(vlm.named_parameters(), full_model.parameters()):
        if weight.requires_grad:
            # Every tensor that is trained has a gradient.
            assert weight.grad is not None and other.grad.isfinite().all(), name
            assert (weight.grad - other.grad).norm() <= 1e-5 * max(other.grad.norm(), 1), name
        else:
            assert name.removeprefix("model.vision_tower.").startswith(
                TOWERS[vlm.config.vision_config.model_type].unused
            )


def test_saved_model_has_names_of_parameters(vlm, tmp_path):
    """A Trainer resumes by the names in memory, and misses all others with a warning."""
    vlm.save_pretrained(tmp_path)
    again, report = ViTPForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values())
    assert again.config.vision_config.to_dict() == vlm.config.vision_config.to_dict()
    for (name, weight), other in zip(vlm.state_dict().items(), again.state_dict().values()):
        assert torch.equal(weight, other), name


def test_export_stays_in_its_family(folder, vlm, composed, tmp_path):
    with torch.no_grad():
        for weight in vlm.model.vision_tower.parameters():
            weight.mul_(1.01)
    export_backbone(vlm, tmp_path, composed[1].image_processor)
    family = vlm.config.vision_config.model_type
    opened, report = AutoModel.from_pretrained(tmp_path, output_loading_info=True)
    assert opened.config.model_type == family
    assert opened.__class__.__module__.startswith("transformers.models")
    assert not any(report.values())
    vit = vlm.model.vision_tower.eval()
    tower, pixels = tower_of(vit.config), images(vit.config)
    with torch.no_grad():
        assert torch.equal(tower.patch_tokens(opened.eval(), pixels), tower.patch_tokens(vit, pixels))
    again = open_vit(tmp_path)
    fields = again.config.to_dict() | {"_name_or_path": vit.config.to_dict().get("_name_or_path")}
    assert fields == vit.config.to_dict() | {"architectures": [type(vit).__name__]}
    if family in ("dinov2", "dinov2_with_registers", "dinov3_vit"):
        (maps,) = AutoBackbone.from_config(opened.config)(pixels).feature_maps
        assert maps.shape == (2, 32, 4, 4)
    if family == "timm_wrapper":
        loaded = timm.create_model(f"local-dir:{tmp_path}", pretrained=True, num_classes=0, **vit.config.model_args)
        torch.testing.assert_close(loaded.eval().forward_features(pixels)[:, 3:], tower.patch_tokens(vit, pixels))
        settings = timm.data.resolve_model_data_config(loaded)
        assert (tuple(settings["input_size"]), settings["crop_pct"], settings["crop_mode"]) == (
            (3, 64, 64),
            1.0,
            "squash",
        )


def test_example_of_card_has_patches_in_order(vlm, composed, tmp_path):
    export_backbone(vlm, tmp_path, composed[1].image_processor)
    vit = open_vit(tmp_path).eval()
    example, names = MODELS[vit.config.model_type].example, {}
    exec(example.format(repo=tmp_path, source="local-dir", trust="", trust_processor=""), names)
    if "backbone" not in names or "spatial_shapes" in names["inputs"]:  # timm's own code, or patches as inputs
        return
    pixels = names["inputs"]["pixel_values"]
    if vit.config.model_type == "qwen3_vl_vision":
        pixels = image_of_blocks(pixels, *names["inputs"]["image_grid_thw"][0, 1:].tolist())
    wanted = tower_of(vit.config).patch_tokens(vit, pixels)
    torch.testing.assert_close(names["features"][:, -wanted.shape[1] :], wanted, atol=1e-5, rtol=1e-5)


def image_of_blocks(patches: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    """Return an image `(1, 3, height, width)` from patches as Qwen3-VL takes them, see `blocks_of_patches`."""
    image = torch.zeros(1, 3, 16 * rows, 16 * columns)
    remaining = iter(patches.view(-1, 3, 2, 16, 16)[:, :, 0])
    for top in range(0, 16 * rows, 32):
        for left in range(0, 16 * columns, 32):
            for row in (top, top + 16):
                for column in (left, left + 16):
                    image[0, :, row : row + 16, column : column + 16] = next(remaining)
    return image


def test_export_does_not_replace_the_original(folder, vlm, composed):
    before = (folder / "config.json").read_text()
    with pytest.raises(ValueError, match="exists"):
        export_backbone(vlm, folder, composed[1].image_processor)
    assert (folder / "config.json").read_text() == before
    with pytest.raises(ValueError, match="image_processor"):
        export_backbone(vlm, folder / "new")


def test_export_is_replaced_by_the_next(vlm, composed, tmp_path):
    for factor in (1.0, 2.0):
        with torch.no_grad():
            vlm.model.vision_tower.get_parameter(tower_of(vlm.config.vision_config).patch_kernel).mul_(factor)
        export_backbone(vlm, tmp_path, composed[1].image_processor)
    kernel = tower_of(vlm.config.vision_config).patch_kernel
    assert torch.equal(open_vit(tmp_path).get_parameter(kernel), vlm.model.vision_tower.get_parameter(kernel))


def test_folder_that_timm_writes_is_opened(tmp_path, language_model):
    torch.manual_seed(0)
    vit = timm.create_model("vit_tiny_patch16_224", img_size=64, embed_dim=32, depth=4, num_heads=2).eval()
    timm.models.save_for_hf(vit, tmp_path, model_config={"model_args": TIMM_ARGS}, safe_serialization=True)
    model, processor = compose(str(tmp_path), str(language_model))
    pixels = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        tower = tower_of(model.config.vision_config)
        features = tower.patch_tokens(model.model.vision_tower.eval(), pixels)
        torch.testing.assert_close(features, vit.forward_features(pixels)[:, 1:], atol=1e-5, rtol=0)
    assert list(processor.image_processor.image_mean) == list(vit.pretrained_cfg["mean"])


def test_resized_vit_keeps_frozen_weights_and_device(folder):
    vit = open_vit(folder)
    frozen = {name for name, weight in vit.named_parameters() if not weight.requires_grad}
    resized = resize_backbone(vit, image_size=2 * pair(vit.config.image_size)[0])
    assert {name for name, weight in resized.named_parameters() if not weight.requires_grad} == frozen
    assert resized.device == vit.device


def test_image_processor_has_mean_and_std_of_vit(composed):
    model, processor = composed
    assert list(processor.image_processor.image_mean) == MEAN
    assert list(processor.image_processor.image_std) == STD
    assert [processor.image_processor.size.height] * 2 == [*pair(model.config.vision_config.image_size)]
    assert processor.image_seq_length == model.config.image_seq_length == 4


def test_tiles_of_another_size(folder, language_model):
    model, processor = compose(str(folder), str(language_model), image_size=2 * 56 if "dinov2" in folder.name else 128)
    assert model.config.image_seq_length == processor.image_seq_length == 16
    vit = model.model.vision_tower.eval()
    pixels = images(vit.config)
    whole = library_model(folder)
    if folder.name.startswith(("idefics3", "smolvlm")):
        whole = with_bicubic_positions(whole)
    wanted = library_features(whole, pixels)
    # At run time DINOv2 with registers and timm resample positions with antialiasing.
    tolerance = 0.05 if folder.name.startswith(("timm", "dinov2_with")) else 1e-5
    with torch.no_grad():
        torch.testing.assert_close(tower_of(vit.config).patch_tokens(vit, pixels), wanted, atol=tolerance, rtol=0)


def with_bicubic_positions(model: PreTrainedModel) -> PreTrainedModel:
    """Return a model for images twice as large, whose own code would repeat each position."""
    state = model.state_dict()
    grid = state["embeddings.position_embedding.weight"].T.unflatten(1, (4, 4))
    large_grid = torch.nn.functional.interpolate(grid[None], scale_factor=2, mode="bicubic")
    state["embeddings.position_embedding.weight"] = large_grid[0].flatten(1).T
    large = type(model)(type(model.config).from_dict(model.config.to_dict() | {"image_size": 128}))
    large.load_state_dict(state)
    return large.eval()


def test_odd_grid_loses_one_patch(tmp_path, language_model):
    save_vit(tmp_path, "dinov2")
    resize_backbone(AutoModel.from_pretrained(tmp_path), image_size=70).save_pretrained(tmp_path)
    model, _ = compose(str(tmp_path), str(language_model))
    assert model.config.vision_config.image_size == 56
    with pytest.raises(ValueError, match="vision_image_size"):
        compose(str(tmp_path), str(language_model), image_size=70)


@pytest.mark.parametrize("neck", [ViTPAdapter, ViTPFeaturePyramid])
def test_multi_scale_maps_start_from_vit(folder, neck, tmp_path):
    settings = ADAPTER if neck is ViTPAdapter else {}
    backbone = neck.from_backbone(folder, drop_path_rate=0.2, **settings)
    maps = backbone(torch.randn(1, 3, 96, 64)).feature_maps
    assert [tuple(part.shape[2:]) for part in maps] == [(24, 16), (12, 8), (6, 4), (3, 2)]
    sum(part.square().sum() for part in maps).backward()
    assert [name for name, weight in backbone.named_parameters() if weight.requires_grad and weight.grad is None] == []
    resized = resize_backbone(open_vit(folder), patch_size=16, image_size=64)
    assert all(torch.equal(weight, backbone.vit.state_dict()[name]) for name, weight in resized.state_dict().items())

    backbone.save_pretrained(tmp_path)
    again, report = neck.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values())
    image = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        for actual, wanted in zip(again.eval()(image).feature_maps, backbone.eval()(image).feature_maps):
            assert torch.equal(actual, wanted)
    large = resize_backbone(backbone, image_size=128)
    assert pair(large.vit.config.image_size) == pair(large.config.image_size) == (128, 128)


def test_neck_keeps_stochastic_depth_of_vit(folder):
    vit = open_vit(folder)
    tower = tower_of(vit.config)
    assert ViTPFeaturePyramid.from_backbone(vit).config.drop_path_rate == 0.0
    if not tower.has_stochastic_depth(vit.config):
        return
    tower.set_drop_path_rate(vit.config, 0.3)
    for settings, rate in (({}, 0.3), ({"drop_path_rate": 0.1}, 0.1)):
        config = ViTPFeaturePyramid.from_backbone(vit, **settings).config
        assert config.drop_path_rate == tower.drop_path_rate(config.vit_config) == rate


@pytest.mark.parametrize("model_class", [ViTPForSemanticSegmentation, ViTPForObjectDetection])
def test_task_models_start_from_vit(folder, model_class, tmp_path):
    torch.manual_seed(0)
    if model_class is ViTPForObjectDetection:
        small = {"neck_channels": 16, "head_hidden_size": 16, "rpn_proposals_train": 20, "roi_samples": 20}
        pyramid = {"neck": "pyramid", "backbone_kwargs": {"pyramid_channels": 16}}
        model = model_class.from_backbone(folder, id2label=CLASSES, **pyramid, **small)
        box = {"class_labels": torch.tensor([1]), "boxes": torch.tensor([[0.5, 0.5, 0.4, 0.4]])}
        labels = [box, box]
    else:
        model = segmenter_on(folder)
        labels = torch.randint(0, 2, (2, 64, 64))
    model.train()(torch.randn(2, 3, 64, 64), labels=labels).loss.backward()
    assert [name for name, weight in model.named_parameters() if weight.requires_grad and weight.grad is None] == []
    model.save_pretrained(tmp_path)
    again, report = model_class.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values())
    assert all(torch.equal(weight, again.state_dict()[name]) for name, weight in model.state_dict().items())


def segmenter_on(vit, **backbone_kwargs) -> ViTPForSemanticSegmentation:
    settings = {"id2label": CLASSES, "hidden_size": 16, "auxiliary_channels": 16}
    return ViTPForSemanticSegmentation.from_backbone(
        vit, "pyramid", backbone_kwargs={"pyramid_channels": 16, **backbone_kwargs}, **settings
    )


def dtypes_of(model) -> set[torch.dtype]:
    return {weight.dtype for weight in model.parameters()}


def test_dtype_reaches_vit(folder, tmp_path):
    segmenter_on(folder).save_pretrained(tmp_path)
    model = ViTPForSemanticSegmentation.from_pretrained(tmp_path, dtype=torch.bfloat16).eval()
    assert dtypes_of(model) == {torch.bfloat16}
    assert model(torch.randn(1, 3, 64, 64)).logits.dtype == torch.bfloat16
    vit = open_vit(folder, dtype=torch.bfloat16)
    for model in (segmenter_on(vit), ViTPForImageClassification.from_backbone(vit, id2label=CLASSES)):
        assert dtypes_of(model) == {torch.float32}


def test_attention_reaches_vit(folder, tmp_path):
    eager = {"attn_implementation": "eager"}
    model = segmenter_on(folder, **eager)
    model.save_pretrained(tmp_path)
    again = ViTPForSemanticSegmentation.from_pretrained(tmp_path, **eager)
    assert model.config._attn_implementation == again.config._attn_implementation == "eager"
    for backbone in (model.backbone, again.backbone, resize_backbone(again.backbone, image_size=128)):
        assert backbone.config._attn_implementation == backbone.vit.config._attn_implementation == "eager"


def test_hidden_states_of_pyramid_equal_vit(folder):
    pyramid = ViTPFeaturePyramid.from_backbone(folder, pyramid_channels=8).eval()
    tower, vit = pyramid.tower
    pixels = torch.randn(1, 3, 64, 64)
    found = pyramid(pixels, output_hidden_states=True).hidden_states
    if vit.config.model_type == "timm_wrapper":
        assert not found
        return
    wanted = tower.run(vit, pixels, output_hidden_states=True).hidden_states
    assert len(found) == len(wanted) == 5
    torch.testing.assert_close(found[:-1], wanted[:-1])  # the model may return the last one with its norm


def test_other_bands_are_refused_by_neck(tmp_path):
    save_vit(tmp_path / "vit", "dinov3_vit")
    ViTPFeaturePyramid.from_backbone(tmp_path / "vit", pyramid_channels=8).save_pretrained(tmp_path / "neck")
    with pytest.raises(ValueError, match="band_names"):
        ViTPFeaturePyramid.from_backbone(tmp_path / "neck", band_names=["VV", "VH"])


def test_models_on_vit_are_not_opened_as_vit(tmp_path):
    """The weights would be missing."""
    folder = tmp_path / "vit"
    save_vit(folder, "dinov3_vit")
    segmenter = segmenter_on(folder)
    segmenter.save_pretrained(tmp_path / "segmenter")
    segmenter.backbone.save_pretrained(tmp_path / "neck")
    ViTPForImageClassification.from_backbone(folder, id2label=CLASSES).save_pretrained(tmp_path / "classifier")
    with pytest.raises(ValueError, match="ViTPFeaturePyramid"):
        ViTPForImageClassification.from_backbone(segmenter.backbone, id2label=CLASSES)
    with pytest.raises(ValueError, match="ViTPFeaturePyramid"):
        ViTPVisionModel.from_pretrained(tmp_path / "neck")
    with pytest.raises(ValueError, match="ViTPForSemanticSegmentation"):
        open_vit(tmp_path / "segmenter")
    with pytest.raises(ValueError, match="ViTPForImageClassification"):
        open_vit(tmp_path / "classifier")


def test_grid_that_is_not_square_is_refused(tmp_path):
    arguments = FAMILIES["timm_wrapper"][1].model_args | {"img_size": [64, 128]}
    config = TimmWrapperConfig(architecture="vit_tiny_patch16_224", model_args=arguments)
    TimmWrapperModel(config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"\[64, 128\]"):
        resize_backbone(open_vit(tmp_path), image_size=64)


@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_classifier_pools_patches_or_cls_token(folder, pooling):
    vit = open_vit(folder).eval()
    tower = tower_of(vit.config)
    prefix = tower.num_prefix_tokens(vit.config)
    if pooling == "cls" and not prefix:
        with pytest.raises(StrictDataclassError, match="pooling"):
            ViTPForImageClassification.from_backbone(folder, id2label=CLASSES, pooling=pooling)
        return
    model = ViTPForImageClassification.from_backbone(folder, id2label=CLASSES, pooling=pooling).eval()
    pixels = images(vit.config)
    with torch.no_grad():
        states = tower.run(vit, pixels).last_hidden_state
        pooled = states[:, 0] if pooling == "cls" else library_features(library_model(folder), pixels).mean(1)
        wanted = model.classifier(model.layernorm(pooled))
        torch.testing.assert_close(model(pixels).logits, wanted, atol=1e-5, rtol=0)


def test_layer_decay_has_rate_of_each_layer(folder):
    model = ViTPForSemanticSegmentation.from_backbone(
        folder, "adapter", id2label=CLASSES, backbone_kwargs=ADAPTER, hidden_size=16, auxiliary_channels=16
    )
    rates = {}
    for group in layer_decay_groups(model, 1.0, 0.1, 0.5, num_layers=4):
        rates |= {id(parameter): (group["lr"], group["weight_decay"]) for parameter in group["params"]}
    tower = tower_of(model.config.backbone_config.vit_config)
    for index, layer in enumerate(model.backbone.vit.get_submodule(tower.layers)):
        for parameter in layer.parameters():
            assert rates[id(parameter)] == (0.5 ** (4 - index), 0.1 if parameter.ndim > 1 else 0.0)
    kernel = model.backbone.vit.get_parameter(tower.patch_kernel)
    assert rates[id(kernel)] == (0.5**5, 0.1)
    if tower.positions and model.backbone.vit.get_parameter(tower.positions).requires_grad:
        assert rates[id(model.backbone.vit.get_parameter(tower.positions))] == (0.5**5, 0.0)
    assert rates[id(model.backbone.spatial_prior.stem[0].weight)] == (1.0, 0.1)
    assert rates[id(model.decode_head.classifier.weight)] == (1.0, 0.1)


def test_last_layers_of_frozen_vit_train(vlm):
    freeze(vlm, ["vision"], unfreeze_vision_layers=1)
    layers = vlm.model.vision_tower.get_submodule(tower_of(vlm.config.vision_config).layers)
    trained = {name for name, weight in vlm.model.vision_tower.named_parameters() if weight.requires_grad}
    assert len(trained) == len([*layers[-1].parameters()])
    assert all(weight.requires_grad for weight in layers[-1].parameters())


def test_cost_plan_counts_weights_and_operations(vlm):
    cost = step_cost(vlm.config, BatchShape(samples=1, tiles=1, text_tokens=8), bf16=False)
    assert cost.weights == sum(weight.numel() for weight in vlm.parameters()) * 4
    grid = 16 + FAMILIES[vlm.config.vision_config.model_type][3]
    layers = vlm.model.vision_tower.get_submodule(tower_of(vlm.config.vision_config).layers)
    matrices = sum(weight.numel() for weight in layers.parameters() if weight.ndim == 2)
    attention = 2 * grid * grid * 32 * 4
    kernel = vlm.model.vision_tower.get_parameter(tower_of(vlm.config.vision_config).patch_kernel)
    wanted = 2 * (matrices * grid + attention + kernel.numel() * 16)
    assert wanted <= cost.forward["ViT"] < 1.15 * wanted  # some families have a pooler


@pytest.mark.parametrize("opening", [open_vit, load_backbone])
def test_missing_weights_are_named(tmp_path, opening):
    model = save_vit(tmp_path, "dinov3_vit")
    state = {name: weight for name, weight in model.state_dict().items() if ".layer.2." not in name}
    model.save_pretrained(tmp_path, state_dict=state)
    with pytest.raises(ValueError, match=r"layer\.2"):
        opening(str(tmp_path))


def test_probes_open_vit(folder):
    backbone = load_backbone(str(folder))
    pixels = images(open_vit(folder).config, SIZES["wide"])
    maps = backbone.maps(pixels)
    wanted = library_features(library_model(folder), pixels).unflatten(1, maps.shape[1:3])
    torch.testing.assert_close(maps, wanted, atol=1e-5, rtol=0)


def test_depths_are_layers(folder):
    backbone, outputs = load_backbone(str(folder)), []
    tower = tower_of(backbone.model.config)
    middle = backbone.model.get_submodule(tower.layers)[1]
    middle.register_forward_hook(lambda module, inputs, output: outputs.append(output))
    maps = backbone.maps(images(backbone.model.config), 2)[..., :32].flatten(1, 2)
    states = outputs[0].view(2, -1, 32)  # Qwen3-VL has one sequence of all images
    torch.testing.assert_close(maps, states[:, tower.num_prefix_tokens(backbone.model.config) :])
    assert backbone.maps(images(backbone.model.config), 4).shape[-1] == 4 * 32


def test_vit_of_whole_clip_is_opened(tmp_path, language_model):
    whole = save_clip(tmp_path)
    vit = open_vit(tmp_path)
    assert all(torch.equal(weight, vit.state_dict()[name]) for name, weight in whole.vision_model.state_dict().items())
    model, processor = compose(str(tmp_path), str(language_model))
    assert model.config.vision_config.model_type == "clip_vision_model"
    assert list(processor.image_processor.image_mean) == MEAN
    pixels = images(whole.config.vision_config)
    with torch.no_grad():
        wanted = whole.vision_model(pixels).last_hidden_state[:, 1:]
    torch.testing.assert_close(load_backbone(str(tmp_path)).maps(pixels).flatten(1, 2), wanted, atol=1e-5, rtol=0)


def test_unknown_families_are_named(tmp_path, language_model):
    SwinModel(SwinConfig(image_size=64, embed_dim=8, depths=[1, 1], num_heads=[1, 1])).save_pretrained(tmp_path)
    TimmWrapperModel(TimmWrapperConfig(architecture="resnet10t")).save_pretrained(tmp_path / "resnet")
    for opening in (
        lambda: open_vit(tmp_path),
        lambda: compose(str(tmp_path), str(language_model)),
        lambda: ViTPConfig(vision_config={"model_type": "swin"}),
    ):
        with pytest.raises(ValueError, match="'swin'"):
            opening()
    with pytest.raises(ValueError, match="resnet10t"):
        open_vit(tmp_path / "resnet")


def test_stochastic_depth_needs_a_family_that_has_it(tmp_path, language_model):
    save_vit(tmp_path, "vit")
    with pytest.raises(ValueError, match="drop_path_rate.*'vit'"):
        compose(str(tmp_path), str(language_model), drop_path_rate=0.1)


def test_page_lists_each_family():
    lines = (ROOT / "recipes/any_vit.md").read_text().splitlines()
    rows = [[cell.strip(" `") for cell in line.split("|")] for line in lines if line.startswith("| `")]
    has_graph = {cells[1]: cells[-2] == "yes" for cells in rows if len(cells) == 11 and cells[1] != "model_type"}
    assert has_graph.keys() == {name for name in TOWERS if not name.startswith("vitp_")}
    assert has_graph.keys() - {"internvl_vision"} == {*NAMES}
    assert has_graph == {name: bool(MODELS[name].graph_outputs) or name == "internvl_vision" for name in has_graph}


@pytest.mark.slow
def test_graph_equals_model_at_three_sizes(folder, composed, tmp_path):
    model, processor = composed
    export_backbone(model, tmp_path / "backbone", processor.image_processor)
    if not MODELS[model.config.vision_config.model_type].graph_outputs:
        with pytest.raises(ValueError, match="cannot be exported"):
            export_onnx(tmp_path / "backbone", tmp_path / "vit.onnx")
        return
    compared = export_onnx(tmp_path / "backbone", tmp_path / "vit.onnx", tolerance=1e-4)
    assert len(compared) == 3 and max(largest for _, largest in compared) < 1e-4


def test_fsdp_and_checkpointing_know_the_layers(vlm):
    names = {type(module).__name__ for module in vlm.modules()}
    assert vlm._no_split_modules <= names  # accelerate raises an error for a missing one
    layers = vlm.model.vision_tower.get_submodule(tower_of(vlm.config.vision_config).layers)
    if vlm.config.vision_config.model_type == "timm_wrapper":
        pytest.skip("timm has its own checkpointing")
    assert type(layers[0]).__name__ in vlm._no_split_modules
    calls = []
    checkpoint_activations(vlm)
    norm = next(module for module in layers[0].modules() if isinstance(module, torch.nn.LayerNorm))
    norm.register_forward_pre_hook(lambda *_: calls.append(1))
    vlm.train().get_image_features(images(vlm.config.vision_config)).pooler_output.sum().backward()
    assert len(calls) == 2  # computed again in the backward pass
