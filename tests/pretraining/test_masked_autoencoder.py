"""Masked autoencoders of each family of ViT, compared with transformers' own and with loops over patches."""

import copy
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from pictures import picture, write_bands
from safetensors.torch import load_file
from transformers import AutoImageProcessor, AutoModel, SwinConfig, SwinModel, ViTMAEConfig, ViTMAEForPreTraining
from vision_families import FAMILIES, MEAN, MLP, NAMES, SHAPE, SIZE, STD, library_features, save_vit

from modeling_vitp import VisionTower, ViTPImageProcessor, ViTPVisionConfig, ViTPVisionModel, export_backbone
from modeling_vitp.modeling_vitp_backbone import open_vit
from modeling_vitp.pretraining.distillation import ImageFiles
from modeling_vitp.pretraining.masked_autoencoder import (
    MaskedAutoencoder,
    MaskedAutoencoderConfig,
    mae_steps,
    train_masked_autoencoder,
)
from modeling_vitp.vision_towers import TOWERS, pair

OPTIONS = {
    "per_device_train_batch_size": 4,
    "max_steps": 4,
    "learning_rate": 1e-3,
    "report_to": "none",
    "bf16": False,
    "use_cpu": True,
    "watch_samples": 0,
    "disable_tqdm": True,
    "save_strategy": "steps",
    "save_steps": 2,
}
PATCH, SIDE = 4, 6


def vit(**changes) -> ViTPVisionModel:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    grid = {"image_size": [SIDE * PATCH] * 2, "patch_size": [PATCH] * 2, "initializer_range": 0.3}
    return ViTPVisionModel(ViTPVisionConfig(**sizes | grid | changes))


def save_internvit(folder: Path, **changes) -> Path:
    return export_backbone(vit(**changes), folder, ViTPImageProcessor(image_mean=MEAN, image_std=STD))


@pytest.fixture
def pixels():
    return torch.randn(2, 3, SIDE * PATCH, SIDE * PATCH, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def noise():
    return torch.rand(2, SIDE**2, generator=torch.Generator().manual_seed(2))


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> list[Path]:
    folder = tmp_path_factory.mktemp("images")
    for index in range(7):
        picture(60 + index, 70, index).save(folder / f"{index}.png")
    return sorted(folder.iterdir())


def train(start: Path, images: list[Path], output_dir: Path, **options) -> dict:
    return train_masked_autoencoder(start, images, MaskedAutoencoderConfig(str(output_dir), **OPTIONS | options))


def patch_at(image: torch.Tensor, index: int) -> torch.Tensor:
    """Return the pixels of a patch from left to right and top to bottom, with three values each."""
    top, left = PATCH * (index // SIDE), PATCH * (index % SIDE)
    return torch.stack([image[:, y, x] for y in range(top, top + PATCH) for x in range(left, left + PATCH)]).flatten()


@torch.no_grad()
def test_mae_loss_equals_loop_over_masked_patches(pixels, noise):
    model = MaskedAutoencoder(vit()).eval()
    outputs = model(pixels, noise=noise)
    encoder, decoder, errors = model.vit, model.decoder, []
    for image, order, logits in zip(pixels, noise.argsort(dim=1), outputs.logits):
        visible, masked = order[: SIDE**2 // 4].tolist(), order[SIDE**2 // 4 :].tolist()
        tokens = encoder.vit.embeddings(image[None])[0]
        states = torch.stack([tokens[0], *(tokens[1 + index] for index in visible)])[None]
        for layer in encoder.vit.encoder.layer:
            states = layer(states)
        states = decoder.decoder_embed(encoder.layernorm(states))[0]
        sequence = [states[0]] + [decoder.mask_token[0, 0]] * SIDE**2
        for place, index in enumerate(visible):
            sequence[1 + index] = states[1 + place]
        sequence = torch.stack(sequence)[None] + decoder.decoder_pos_embed
        for layer in decoder.decoder_layers:
            sequence = layer(sequence)
        predicted = decoder.decoder_pred(decoder.decoder_norm(sequence))[0, 1:]
        torch.testing.assert_close(predicted, logits, atol=1e-5, rtol=1e-5)
        for index in masked:
            target = patch_at(image, index)
            target = (target - target.mean()) / (target.var() + 1e-6).sqrt()
            errors.append((predicted[index] - target).square().mean())
    assert len(errors) == 2 * 27
    torch.testing.assert_close(outputs.loss, torch.stack(errors).mean())


@torch.no_grad()
@pytest.mark.parametrize("family", ["vit", "vit_mae"])
def test_loss_equals_transformers_masked_autoencoder(family, tmp_path):
    save_vit(tmp_path, family)
    model = MaskedAutoencoder(open_vit(tmp_path)).eval()
    decoder = {"decoder_hidden_size": 16, "decoder_intermediate_size": 24, "decoder_num_hidden_layers": 2}
    config = ViTMAEConfig(**SHAPE, **MLP, **SIZE, **decoder, decoder_num_attention_heads=2, norm_pix_loss=True)
    oracle = ViTMAEForPreTraining(config).eval()
    weights = {name: weight for name, weight in model.vit.vit.state_dict().items() if "pooler" not in name}
    oracle.vit.load_state_dict(weights)
    oracle.decoder.load_state_dict(model.decoder.state_dict())
    pixels, noise = torch.randn(3, 3, 64, 64), torch.rand(3, 16)
    ours, theirs = model(pixels, noise=noise), oracle(pixels, noise=noise)
    assert torch.equal(ours.mask, theirs.mask) and ours.mask.sum() == 3 * 12
    torch.testing.assert_close(ours.logits, theirs.logits, atol=1e-5, rtol=0)
    torch.testing.assert_close(ours.loss, theirs.loss, atol=1e-5, rtol=0)


@pytest.mark.parametrize("family", NAMES)
def test_whole_forward_equals_library_in_any_order(family, tmp_path):
    """Without masked patches, the patches are only shuffled: their features are those of the library."""
    library = save_vit(tmp_path, family)
    model = MaskedAutoencoder(open_vit(tmp_path)).eval()
    pixels = torch.randn(2, 3, *pair(model.vit.vit.config.image_size))
    loss = model.train()(pixels).loss
    loss.backward()
    idle = [name for name, weight in model.named_parameters() if weight.requires_grad and weight.grad is None]
    assert torch.isfinite(loss) and not idle
    model.eval().config.mask_ratio = 0.0
    with torch.no_grad():
        outputs = model.vit(pixels)
        patches = outputs.last_hidden_state[:, 1:]
        patches = patches.gather(1, outputs.ids_restore[..., None].expand_as(patches))
        torch.testing.assert_close(patches, model.vit.layernorm(library_features(library, pixels)), atol=1e-5, rtol=0)
    has_no_norm = family in ("clip_vision_model", "qwen3_vl_vision")
    assert isinstance(model.vit.layernorm, torch.nn.LayerNorm) == has_no_norm


@torch.no_grad()
@pytest.mark.parametrize("family", ["dinov3_vit", "dinov2_with_registers", "siglip_vision_model"])
def test_visible_patches_see_only_each_other(family, tmp_path):
    """Images with equal visible patches have equal features, and each visible patch changes those of the others."""
    save_vit(tmp_path, family)
    encoder = MaskedAutoencoder(open_vit(tmp_path)).eval().vit
    side, patch = pair(encoder.vit.config.image_size)[0], pair(encoder.vit.config.patch_size)[0]
    noise, first = torch.rand(1, 16), torch.randn(1, 3, side, side)
    mask = encoder(first, noise).mask.view(1, 1, 4, 4).repeat_interleave(patch, 2).repeat_interleave(patch, 3)
    features = encoder(first, noise).last_hidden_state
    assert features.shape == (1, 1 + 4, 32)
    torch.testing.assert_close(encoder(first + mask, noise).last_hidden_state, features, atol=1e-6, rtol=0)
    changed = encoder(first + (1 - mask) * torch.randn_like(first), noise).last_hidden_state
    assert ((changed - features).abs().amax(2)[:, 1:] > 1e-4).all()


def test_resumed_run_equals_undisturbed_run(images, tmp_path):
    start = save_internvit(tmp_path / "vit", drop_path_rate=0.3)
    metrics = train(start, images, tmp_path / "whole")
    shutil.copytree(tmp_path / "whole" / "checkpoint-2", tmp_path / "stopped" / "checkpoint-2")
    resumed = train(start, images, tmp_path / "stopped")
    folders = (tmp_path / "whole" / "backbone", tmp_path / "stopped" / "backbone", start)
    whole, stopped, before = (load_file(folder / "model.safetensors") for folder in folders)
    assert whole.keys() == stopped.keys()
    for name, weight in whole.items():
        assert torch.equal(weight, stopped[name])
        assert "projection.weight" not in name or not torch.equal(weight, before[name])
    assert resumed["train"]["train_loss"] == metrics["train"]["train_loss"] > 0
    with pytest.raises(ValueError, match="vertical_flip"):
        train(start, images, tmp_path / "stopped", vertical_flip=0.0, max_steps=6)


def test_trained_backbone_opens_in_transformers(images, tmp_path):
    metrics = train(save_internvit(tmp_path / "vit"), images, tmp_path / "run", max_steps=2, watch_samples=1)
    backbone = tmp_path / "run" / "backbone"
    assert json.loads((tmp_path / "run" / "metrics.json").read_text()) == metrics
    opened, processor = AutoModel.from_pretrained(backbone), AutoImageProcessor.from_pretrained(backbone)
    trained = load_file(tmp_path / "run" / "checkpoint-2" / "model.safetensors")
    assert all(torch.equal(weight, trained[f"vit.vit.{name}"]) for name, weight in opened.state_dict().items())
    assert [*processor.image_mean, *processor.image_std] == [*MEAN, *STD]
    card = (backbone / "README.md").read_text()
    assert "masked autoencoder" in card and "pretrained with" not in card
    assert (tmp_path / "run" / "watch" / "step-000002.png").is_file()


@pytest.mark.slow
@pytest.mark.parametrize("family", NAMES)
def test_every_family_trains_and_resumes(family, images, tmp_path):
    save_vit(tmp_path / "vit", family)
    options = {"activation_checkpointing": True, "bf16": True}
    train(tmp_path / "vit", images, tmp_path / "whole", **options)
    shutil.copytree(tmp_path / "whole" / "checkpoint-2", tmp_path / "stopped" / "checkpoint-2")
    train(tmp_path / "vit", images, tmp_path / "stopped", **options)
    whole, stopped = (open_vit(tmp_path / name / "backbone").state_dict() for name in ("whole", "stopped"))
    assert all(torch.equal(weight, stopped[name]) for name, weight in whole.items())


def test_bands_are_read_by_the_image_processor(tmp_path):
    spec = {"band_names": ["red", "green", "blue", "nir"], "window": [0, 1000]}
    processor = ViTPImageProcessor(input_spec=spec, image_mean=[0.1] * 4, image_std=[0.5] * 4)
    export_backbone(vit(band_names=spec["band_names"]), tmp_path / "vit", processor)
    for index in range(4):
        values = np.random.default_rng(index).integers(0, 1000, (4, 40, 50), dtype=np.uint16)
        write_bands(tmp_path / "images" / f"{index}.tif", values)
    train(tmp_path / "vit", [tmp_path / "images"], tmp_path / "run", max_steps=1)
    written = AutoImageProcessor.from_pretrained(tmp_path / "run" / "backbone")
    assert written.input_spec == processor.input_spec


def operations_by_hand(prefix: int, attention: float) -> float:
    """Return the operations of an image of 16 patches of 16 pixels, of which four are seen, in a ViT of width 32.

    Each product of a weight is counted once in the forward and twice in the backward pass, but for the patches' kernel,
    whose input needs no gradient.

    Args:
        prefix: tokens before the patches.
        attention: operations of attention in both passes, relative to those in the forward pass.
    """

    def layer(tokens: int, width: int, inner: int) -> float:
        return 3 * 2 * tokens * (4 * width * width + 2 * width * inner) + attention * 2 * 2 * tokens * tokens * width

    kernel = 2 * 2 * 16 * (3 * 16 * 16) * 32
    embedding, prediction = 3 * 2 * (4 + 1) * 32 * 16, 3 * 2 * 17 * 16 * (3 * 16 * 16)
    return kernel + 4 * layer(4 + prefix, 32, 48) + embedding + 2 * layer(17, 16, 24) + prediction


@pytest.mark.parametrize("family", ["vit", "siglip_vision_model", "dinov3_vit"])
def test_steps_have_the_given_operations(family):
    config = copy.deepcopy(FAMILIES[family][1])
    config._attn_implementation = "sdpa"
    # The backward pass of fused attention computes the scores again.
    one_step = 8 * operations_by_hand(FAMILIES[family][3], attention=3.5)
    assert mae_steps(config, 8, 1000 * one_step) == 1000


def test_unsuitable_starts_and_images_are_named(images, tmp_path, monkeypatch):
    class RotaryTower(type(TOWERS["dinov3_vit"])):
        select_patches = VisionTower.select_patches

    with pytest.raises(ValueError, match="24 x 48 and 4 x 8"):
        MaskedAutoencoder(vit(image_size=[24, 48], patch_size=[4, 8]))
    (tmp_path / "broken.png").write_bytes(images[0].read_bytes()[:200])
    for name in ("broken.png", "missing.png"):
        with pytest.raises(ValueError, match=name):
            train(save_internvit(tmp_path / "vit"), [*images, tmp_path / name], tmp_path / "run")
    SwinModel(SwinConfig(image_size=64, embed_dim=8, depths=[1, 1], num_heads=[1, 1])).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="swin"):
        train(tmp_path, [tmp_path], tmp_path / "run")
    monkeypatch.setitem(TOWERS, "dinov3_vit", RotaryTower())
    with pytest.raises(ValueError, match="RotaryTower.*position_embeddings"):
        mae_steps(FAMILIES["dinov3_vit"][1], 2, 1e9)


def test_images_of_one_name_are_told_apart(tmp_path):
    for name in ("a/1/image.png", "a/2/image.png", "b/image.png"):
        (tmp_path / name).parent.mkdir(parents=True)
        picture(8, 8).save(tmp_path / name)
    files = ImageFiles([tmp_path / "a" / "1" / "image.png", tmp_path / "a" / "2" / "image.png", tmp_path / "b"])
    assert [sample["id"] for sample in files] == ["a/1/image.png", "a/2/image.png", "b/image.png"]
