import numpy as np
import pytest
import torch
from launching import run_without_package
from pictures import picture
from safetensors.torch import save_file
from tiny_models import HEAD, VISION, VISION_16, adapter_config
from torch.nn import functional as F
from transformers import (
    AutoBackbone,
    InternVLVisionConfig,
    InternVLVisionModel,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    UperNetConfig,
    UperNetForSemanticSegmentation,
)
from transformers.models.internvl.modeling_internvl import InternVLVisionAttention

from modeling_vitp import (
    ViTPAdapter,
    ViTPBackbone,
    ViTPBackboneConfig,
    ViTPChangeDetectionConfig,
    ViTPFeaturePyramid,
    ViTPFeaturePyramidConfig,
    ViTPForChangeDetection,
    ViTPForImageClassification,
    ViTPForSemanticSegmentation,
    ViTPSegmentationConfig,
    ViTPSegmentationImageProcessor,
    ViTPVisionConfig,
    ViTPVisionModel,
    export_backbone,
    resize_backbone,
)


@pytest.fixture
def vision():
    torch.manual_seed(0)
    return ViTPVisionModel(ViTPVisionConfig(**VISION)).eval()


@torch.no_grad()
def test_backbone_maps_equal_vision_model_features(vision, tmp_path):
    """Check the training size, an exported folder and any choice of layers."""
    export_backbone(vision, tmp_path)
    images = torch.randn(2, 3, 56, 56)
    outputs = vision(images, output_hidden_states=True)
    backbone = ViTPBackbone.from_pretrained(tmp_path, out_features=["stem", "stage2", "stage3"]).eval()
    assert backbone.channels == [32, 32, 32]
    maps = backbone(images).feature_maps
    for state, features in zip((0, 2, 3), maps, strict=True):
        for row in range(4):
            for column in range(4):
                expected = outputs.hidden_states[state][:, 1 + row * 4 + column]
                assert torch.equal(features[:, :, row, column], expected)
    torch.testing.assert_close(outputs.hidden_states[3], outputs.last_hidden_state)
    (last,) = ViTPBackbone.from_pretrained(tmp_path).eval()(images).feature_maps
    assert torch.equal(last, maps[-1])


@torch.no_grad()
def test_backbone_pads_to_whole_patches(vision, tmp_path):
    export_backbone(vision, tmp_path)
    backbone = ViTPBackbone.from_pretrained(tmp_path).eval()
    image = torch.randn(1, 3, 50, 29)
    padded = F.pad(image, (0, 13, 0, 6))
    (features,) = backbone(image).feature_maps
    assert features.shape == (1, 32, 4, 3)
    assert torch.equal(features.flatten(2).transpose(1, 2), vision(padded).last_hidden_state[:, 1:])


def test_backbones_open_through_auto_backbone():
    backbone = AutoBackbone.from_config(ViTPBackboneConfig(**VISION, out_indices=[1, 3]))
    assert isinstance(backbone, ViTPBackbone)
    assert backbone.out_features == ["stage1", "stage3"]
    assert AutoBackbone.from_config(adapter_config()).channels == [32] * 4
    pyramid = AutoBackbone.from_config(ViTPFeaturePyramidConfig(**VISION_16, pyramid_channels=8))
    assert isinstance(pyramid, ViTPFeaturePyramid)


NECKS = {
    "adapter": (ViTPAdapter, {"deformable_heads": 4, "spatial_prior_channels": 8}),
    "pyramid": (ViTPFeaturePyramid, {"pyramid_channels": 16}),
}


@pytest.mark.parametrize(("neck", "asked"), [("adapter", "in the call"), ("pyramid", "in the configuration")])
@torch.no_grad()
def test_hidden_states_and_attentions_equal_vit(vision, neck, asked):
    """Compare with transformers' own layers one by one. The adapter's gates are closed, and it has no CLS token."""
    backbone_class, settings = NECKS[neck]
    settings = {**settings, "injector_init_value": 0.0} if neck == "adapter" else settings
    options = {"output_hidden_states": True, "output_attentions": True}
    backbone = backbone_class.from_backbone(vision, **settings).eval()
    backbone.set_attn_implementation("eager")
    native = InternVLVisionModel(InternVLVisionConfig(**{**VISION, "image_size": [64, 64], "patch_size": [16, 16]}))
    native.load_state_dict(backbone.state_dict(), strict=False)
    native = native.eval()
    native.set_attn_implementation("eager")
    images, others = torch.randn(2, 2, 3, 64, 64)

    def states_of(images: torch.Tensor) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        state = native.embeddings(images)[:, 0 if neck == "pyramid" else 1 :]
        states, attentions = [state], []
        for layer in native.encoder.layer:
            attentions.append(layer.attention(layer.layernorm_before(state), output_attentions=True)[1])
            state = layer(state)
            states.append(state)
        return states, attentions

    head = {"num_labels": 3, "hidden_size": 16, "auxiliary_channels": 16, "backbone_kwargs": settings}
    model = ViTPForSemanticSegmentation.from_backbone(vision, neck, **head).eval()
    change = ViTPForChangeDetection.from_backbone(vision, neck, **head).eval()
    model.backbone = change.backbone = backbone
    for network in (model, change):
        network.set_attn_implementation("eager")
    for network, inputs in ((backbone, [images]), (model, [images]), (change, [images, others])):
        silent = network(*inputs)
        assert silent.hidden_states is None and silent.attentions is None
        if asked == "in the configuration":
            for name in options:
                setattr(network.config, name, True)
        outputs = network(*inputs, **(options if asked == "in the call" else {}))
        states, attentions = states_of(torch.cat(inputs))
        if network is change:
            states, attentions = ([torch.stack([x[:2], x[2:]], 1) for x in each] for each in (states, attentions))
        torch.testing.assert_close(list(outputs.hidden_states), states)
        torch.testing.assert_close(list(outputs.attentions), attentions)
        as_tuple = network(*inputs, **options, return_dict=False)
        torch.testing.assert_close(list(as_tuple[1]), states)
        if asked == "in the configuration":
            for name in options:
                setattr(network.config, name, False)


@pytest.mark.parametrize(
    ("model_class", "neck"), [(ViTPForSemanticSegmentation, "adapter"), (ViTPForChangeDetection, "pyramid")]
)
def test_dense_model_starts_from_resampled_backbone(vision, tmp_path, neck, model_class):
    export_backbone(vision.to(torch.bfloat16), tmp_path / "backbone")
    backbone_class, settings = NECKS[neck]
    names = {0: "ground", 1: "tree", 2: "water"}
    settings = {**settings, "drop_path_rate": 0.3}
    arguments = {"id2label": names, "hidden_size": 16, "auxiliary_channels": 16, "backbone_kwargs": settings}
    torch.manual_seed(5)
    model = model_class.from_backbone(tmp_path / "backbone", neck, **arguments)
    assert type(model) is model_class and type(model.backbone) is backbone_class
    assert model.config.backbone_config is model.backbone.config
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert (model.config.id2label, model.config.label2id) == (names, {"ground": 0, "tree": 1, "water": 2})
    assert model.backbone.encoder.layer[-1].drop_path.drop_prob == 0.3
    assert (model.backbone.config.patch_size, model.backbone.config.image_size) == ([16, 16], [64, 64])
    loaded, wanted = model.backbone.state_dict(), resize_backbone(vision.float(), 16, 64).state_dict()
    for name, tensor in wanted.items():
        # The patch embeddings are interpolated in float32, here from weights stored in bfloat16.
        torch.testing.assert_close(loaded[name], tensor, msg=name)
    torch.manual_seed(5)
    again = model_class.from_backbone(vision, neck, **arguments)
    for name, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name

    model.backbone.save_pretrained(tmp_path / "finetuned")
    opened = model_class.from_backbone(tmp_path / "finetuned", neck, num_labels=3, hidden_size=16)
    for name, tensor in model.backbone.state_dict().items():
        assert torch.equal(opened.backbone.state_dict()[name], tensor), name


class Gradients(TrainerCallback):
    """Callback that keeps the gradients of the first step."""

    def on_pre_optimizer_step(self, args, state, control, model, **kwargs):
        self.found = {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}


@pytest.mark.parametrize("model_class", [ViTPForSemanticSegmentation, ViTPForChangeDetection])
def test_transformers_trainer_accumulates_gradients(vision, tmp_path, model_class):
    inputs = ["pixel_values"]
    if model_class is ViTPForChangeDetection:
        inputs = ["pixel_values_before", "pixel_values_after"]
    images, labels = torch.randn(4, 3, 32, 32), torch.randint(0, 3, (4, 32, 32))
    rows = [{**dict.fromkeys(inputs, image), "labels": label} for image, label in zip(images, labels)]

    def gradients(batch_size: int, steps: int) -> dict[str, torch.Tensor]:
        torch.manual_seed(0)
        model = model_class.from_backbone(vision, "pyramid", backbone_kwargs={"pyramid_channels": 8}, **HEAD)
        for module in model.modules():
            if hasattr(module, "batch_norm"):  # its statistics depend on the batch size
                module.batch_norm = torch.nn.Identity()
        arguments = TrainingArguments(
            str(tmp_path),
            per_device_train_batch_size=batch_size,
            gradient_accumulation_steps=steps,
            max_steps=1,
            max_grad_norm=0,
            save_strategy="no",
            report_to=[],
            use_cpu=True,
        )
        kept = Gradients()
        Trainer(model, arguments, train_dataset=rows, callbacks=[kept]).train()
        return kept.found

    whole, accumulated = gradients(4, 1), gradients(1, 4)
    assert whole.keys() == accumulated.keys() and len(whole) > 50
    assert max(gradient.abs().max() for gradient in whole.values()) > 1e-3
    for name, gradient in whole.items():
        torch.testing.assert_close(accumulated[name], gradient, atol=1e-6, rtol=1e-3)


@pytest.mark.parametrize("is_pair", [False, True])
def test_loss_equals_loop_over_labeled_pixels(is_pair):
    torch.manual_seed(0)
    if is_pair:
        config = ViTPChangeDetectionConfig(backbone_config=adapter_config(), **HEAD, class_weights=[0.5, 2.0, 1.0])
        model = ViTPForChangeDetection(config).eval()
        images = {name: torch.randn(2, 3, 40, 56) for name in ("pixel_values_before", "pixel_values_after")}
    else:
        config = ViTPSegmentationConfig(backbone_config=adapter_config(), **HEAD, class_weights=[0.5, 2.0, 1.0])
        model = ViTPForSemanticSegmentation(config).eval()
        images = {"pixel_values": torch.randn(2, 3, 40, 56)}
    labels = torch.randint(0, 3, (2, 40, 56))
    labels[0, :20] = 255
    model.config.auxiliary_loss_weight = 0.0
    outputs = model(**images, labels=labels)
    assert outputs.logits.shape == (2, 3, 40, 56)

    logits = outputs.logits.detach().double().numpy()
    total, count = 0.0, 0
    for image, row, column in np.argwhere(labels.numpy() != 255):
        label = labels[image, row, column]
        scores = logits[image, :, row, column]
        total += [0.5, 2.0, 1.0][label] * (np.log(np.exp(scores).sum()) - scores[label])
        count += 1
    assert outputs.loss.item() == pytest.approx(total / count, rel=1e-5)
    assert model(**images, labels=torch.full_like(labels, 255)).loss.item() == 0
    model.config.loss_average = "all"
    assert model(**images, labels=labels).loss.item() == pytest.approx(total / (2 * 40 * 56), rel=1e-5)


def test_head_has_given_classes(vision):
    """Check all ways to name the classes."""
    small = {"hidden_size": 16, "use_auxiliary_head": False, "backbone_kwargs": {"pyramid_channels": 8}}
    named = {"id2label": {0: "ground", 1: "tree"}, "label2id": {"ground": 0, "tree": 1}}
    for classes in ({"id2label": ["ground", "tree"]}, {"label2id": named["label2id"]}, {"id2label": named["id2label"]}):
        config = ViTPForSemanticSegmentation.from_backbone(vision, "pyramid", **classes, **small).config
        assert {name: getattr(config, name) for name in named} == named
    for wrong in ({}, {1: "ground", 2: "tree"}):
        with pytest.raises(ValueError, match="id2label"):
            ViTPForSemanticSegmentation.from_backbone(vision, "pyramid", id2label=wrong, **small)


def test_auxiliary_head_is_trained():
    torch.manual_seed(0)
    model = ViTPForSemanticSegmentation(ViTPSegmentationConfig(backbone_config=adapter_config(), **HEAD))
    model(torch.randn(2, 3, 64, 64), labels=torch.randint(0, 3, (2, 64, 64))).loss.backward()
    without = [name for name, parameter in model.named_parameters() if parameter.grad is None]
    assert without == ["backbone.embeddings.cls_token"]


@torch.no_grad()
def test_classifier_dropout_drops_channels_in_training():
    torch.manual_seed(0)
    config = ViTPSegmentationConfig(backbone_config=adapter_config(), **HEAD | {"hidden_size": 64})
    plain = ViTPForSemanticSegmentation(config).eval()
    config.classifier_dropout = 0.25
    model = ViTPForSemanticSegmentation(config)
    assert model.load_state_dict(plain.state_dict())
    inputs = []
    model.decode_head.classifier.register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
    image = torch.randn(1, 3, 32, 32)
    assert torch.equal(model.eval()(image).logits, plain(image).logits)
    model.decode_head.fpn_bottleneck.activation.train()
    for _ in range(20):
        model(image)
    whole, dropped = inputs[0], torch.stack(inputs[1:]).abs().sum((-2, -1)) == 0
    used = whole.abs().sum((-2, -1)) > 0
    assert dropped[:, used].float().mean().item() == pytest.approx(0.25, abs=0.05)
    kept = ~dropped[0, 0] & used[0]
    torch.testing.assert_close(inputs[1][0, kept], whole[0, kept] / 0.75)


@torch.no_grad()
def test_images_of_pair_share_one_backbone():
    """Concatenate the maps by hand, the channels of the image before first."""
    torch.manual_seed(0)
    model = ViTPForChangeDetection(ViTPChangeDetectionConfig(backbone_config=adapter_config(), **HEAD)).eval()
    before, after = torch.randn(2, 1, 3, 64, 64)
    maps = [torch.cat(pair, 1) for pair in zip(model.backbone(before).feature_maps, model.backbone(after).feature_maps)]
    expected = F.interpolate(model.decode_head(maps), size=(64, 64), mode="bilinear", align_corners=False)
    actual = model(before, after).logits
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(actual, model(after, before).logits, atol=1e-3)


class Places(torch.nn.Module):
    """Head that returns y and x of the center of each cell at stride 4, in pixels."""

    def forward(self, maps):
        rows, columns = (4 * (torch.arange(side) + 0.5) for side in maps[0].shape[-2:])
        return torch.stack(torch.meshgrid(rows, columns, indexing="ij"))[None]


@pytest.mark.parametrize("size", [(64, 96), (33, 61), (7, 129)])
def test_maps_are_aligned_with_pixels(size):
    torch.manual_seed(0)
    model = ViTPForSemanticSegmentation(ViTPSegmentationConfig(backbone_config=adapter_config(), **HEAD)).eval()
    image = torch.randn(1, 3, *size)
    padded = F.pad(image, (0, -size[1] % 32, 0, -size[0] % 32))
    with torch.no_grad():
        whole = model(padded).logits
        assert torch.equal(model(image).logits, whole[..., : size[0], : size[1]])
        model.decode_head = Places()
        rows, columns = model(image).logits[0]
    # Interpolation is exact except beyond the centers of the outermost cells.
    inner = tuple(slice(2, min(side, side + -side % 32 - 2)) for side in size)
    places = torch.meshgrid(*(torch.arange(side) + 0.5 for side in size), indexing="ij")
    for found, expected in zip((rows, columns), places):
        torch.testing.assert_close(found[inner], expected[inner])


@torch.no_grad()
def test_adapter_is_backbone_of_transformers_upernet():
    torch.manual_seed(0)
    config = UperNetConfig(backbone_config=adapter_config(), **HEAD, auxiliary_in_channels=None)
    theirs = UperNetForSemanticSegmentation(config).eval()
    ours = ViTPForSemanticSegmentation(ViTPSegmentationConfig(backbone_config=adapter_config(), **HEAD)).eval()
    ours.load_state_dict(theirs.state_dict())
    images, labels = torch.randn(2, 3, 64, 96), torch.randint(0, 3, (2, 64, 96))
    expected, actual = theirs(images, labels=labels), ours(images, labels=labels)
    assert torch.equal(actual.logits, expected.logits)
    torch.testing.assert_close(actual.loss, expected.loss)


@torch.no_grad()
@pytest.mark.slow
def test_saved_models_open_without_this_package(tmp_path):
    torch.manual_seed(0)
    expected = {"images": torch.randn(1, 3, 64, 64)}
    for name, config in (("adapter", adapter_config()), ("pyramid", ViTPFeaturePyramidConfig(**VISION_16))):
        model = ViTPForSemanticSegmentation(ViTPSegmentationConfig(backbone_config=config, **HEAD)).eval()
        model.save_pretrained(tmp_path / name)
        expected[name] = model(expected["images"]).logits
    pair = ViTPForChangeDetection(ViTPChangeDetectionConfig(backbone_config=config, **HEAD)).eval()
    pair.save_pretrained(tmp_path / "pair")
    expected["pair"] = pair(expected["images"], expected["images"].flip(-1)).logits
    processor = ViTPSegmentationImageProcessor(input_spec={"gamma": 0.5})
    processor.save_pretrained(tmp_path / "pyramid")
    picture(50, 40).save(tmp_path / "image.png")
    maps = model(**processor(picture(50, 40), return_tensors="pt")).logits[0].argmax(0)
    expected["classes"] = maps.unique()
    save_file(expected, tmp_path / "expected.safetensors")
    script = """
import torch
from safetensors.torch import load_file
from transformers import AutoModel, AutoModelForSemanticSegmentation, pipeline
expected = load_file("expected.safetensors")
for name in ("adapter", "pyramid"):
    model = AutoModelForSemanticSegmentation.from_pretrained(name, trust_remote_code=True).eval()
    with torch.no_grad():
        torch.testing.assert_close(model(expected["images"]).logits, expected[name])
pair = AutoModel.from_pretrained("pair", trust_remote_code=True).eval()
with torch.no_grad():
    torch.testing.assert_close(pair(expected["images"], expected["images"].flip(-1)).logits, expected["pair"])
parts = pipeline("image-segmentation", model="pyramid", trust_remote_code=True)("image.png")
assert [part["label"] for part in parts] == [f"LABEL_{index}" for index in expected["classes"]]
assert {part["mask"].size for part in parts} == {(50, 40)}
"""
    run_without_package(script, tmp_path)


EAGER = {"attn_implementation": "eager"}
MADE_OF_A_BACKBONE = {
    "adapter": lambda vit: ViTPAdapter.from_backbone(vit, deformable_heads=4, spatial_prior_channels=8),
    "pyramid": lambda vit: ViTPFeaturePyramid.from_backbone(vit, pyramid_channels=8),
    "resized": lambda vit: resize_backbone(vit, patch_size=8, image_size=32),
    "segmentation": lambda vit: ViTPForSemanticSegmentation.from_backbone(
        vit, "pyramid", image_size=96, backbone_kwargs={"pyramid_channels": 8}, **HEAD
    ),
    "classifier": lambda vit: ViTPForImageClassification.from_backbone(vit, num_labels=2),
}


@pytest.mark.parametrize("kind", MADE_OF_A_BACKBONE)
def test_models_on_backbone_keep_its_attention(vision, tmp_path, kind):
    """Only `"eager"` attention returns probabilities."""
    vision.save_pretrained(tmp_path)
    make = MADE_OF_A_BACKBONE[kind]
    assert "sdpa" in {module.config._attn_implementation for module in attentions(make(vision))}
    model = make(ViTPVisionModel.from_pretrained(tmp_path, **EAGER)).eval()
    found = model(torch.randn(1, 3, 64, 64), output_attentions=True).attentions
    assert len(found) == 3 and all(torch.allclose(given.sum(-1), torch.ones(())) for given in found)


def test_folder_keeps_attention_of_backbone(vision, tmp_path):
    vision.save_pretrained(tmp_path)
    adapter = {"deformable_heads": 4, "spatial_prior_channels": 8}
    for model in (
        ViTPAdapter.from_backbone(tmp_path, **adapter, **EAGER),
        ViTPForSemanticSegmentation.from_backbone(tmp_path, backbone_kwargs=adapter | EAGER, **HEAD),
        ViTPForImageClassification.from_backbone(tmp_path, backbone_kwargs=EAGER, num_labels=2),
    ):
        assert {module.config._attn_implementation for module in attentions(model)} == {"eager"}


def attentions(model):
    return [module for module in model.modules() if isinstance(module, InternVLVisionAttention)]


@torch.no_grad()
def test_return_dict_of_config_gives_tuples(vision, tmp_path):
    export_backbone(vision, tmp_path)
    images = torch.randn(2, 3, 56, 56)
    native = InternVLVisionModel.from_pretrained(tmp_path, return_dict=False).eval()
    ours = ViTPVisionModel.from_pretrained(tmp_path, return_dict=False).eval()
    (expected,), found = native(images), ours(images)
    assert isinstance(found, tuple) and torch.equal(found[0], expected)
    assert torch.equal(found[1], expected[:, 1:].mean(1))
    assert [len(states) for states in ours(images, output_hidden_states=True)[2:]] == [4]
    assert torch.equal(ours(images, return_dict=True).last_hidden_state, expected)
    ((maps,),) = ViTPBackbone.from_pretrained(tmp_path, return_dict=False).eval()(images)
    assert torch.equal(maps.flatten(2), expected[:, 1:].transpose(1, 2))
    classifier = ViTPForImageClassification.from_backbone(ours, num_labels=2).eval()
    assert torch.equal(classifier.backbone(images)[0], expected) and classifier(images).logits.shape == (2, 2)
    pyramid = {"pyramid_channels": 8, "return_dict": False}
    segmentation = ViTPForSemanticSegmentation.from_backbone(ours, "pyramid", backbone_kwargs=pyramid, **HEAD).eval()
    assert segmentation(images).logits.shape == (2, 3, 56, 56)
