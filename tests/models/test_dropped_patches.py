"""Patches dropped before the ViT, compared with attention in the whole ViT that blocks them."""

import itertools
from collections.abc import Callable
from unittest.mock import patch

import pytest
import torch
from tiny_models import TEXT, VISION, vivid
from vision_families import FAMILIES, NAMES

from modeling_vitp import ViTPConfig, ViTPForConditionalGeneration
from modeling_vitp.pretraining.model_patches import checkpoint_activations
from modeling_vitp.vision_towers import pair, tower_of

VISIONS = {"vitp_vision": VISION} | {name: FAMILIES[name][1].to_dict() for name in NAMES}
IN_FAST_SUITE = ("vitp_vision", "dinov3_vit")
SIZES = {"native": (1, 1), "wide": (1, 2)}


@pytest.fixture(
    scope="module",
    params=[name if name in IN_FAST_SUITE else pytest.param(name, marks=pytest.mark.slow) for name in VISIONS],
)
def vlm(request):
    torch.manual_seed(0)
    text_config = TEXT | {"vocab_size": 60}
    config = ViTPConfig(vision_config=VISIONS[request.param], text_config=text_config, image_token_id=7)
    return vivid(ViTPForConditionalGeneration(config))


def images(model, scale=(1, 1), number: int = 3) -> torch.Tensor:
    sides = [side * times for side, times in zip(pair(model.config.vision_config.image_size), scale)]
    return torch.randn(number, 3, *sides, generator=torch.Generator().manual_seed(0))


def some_tokens(num_tokens: int, num_visible: int, number: int = 3) -> torch.LongTensor:
    """Return other tokens of each tile, in order."""
    generator = torch.Generator().manual_seed(1)
    drawn = [torch.randperm(num_tokens, generator=generator)[:num_visible] for _ in range(number)]
    return torch.stack(drawn).sort(1).values


def attention_to(is_visible: torch.BoolTensor) -> Callable:
    """Return attention in float32, in which nothing attends to tokens `(batch_size, number)` that are not visible.

    Some families call it for all images at once, others for one image after the other.
    """
    calls = itertools.count()

    def attend(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, **kwargs):
        visible = is_visible
        if len(query) < len(is_visible):
            image = next(calls) % len(is_visible)
            visible = is_visible[image : image + 1]
        scores = query @ key.transpose(-1, -2) * (scale or query.shape[-1] ** -0.5)
        return scores.masked_fill(~visible[:, None, None], -torch.inf).softmax(-1) @ value

    return attend


def tokens_by_blocking(model, pixels: torch.Tensor, visible: torch.LongTensor) -> torch.Tensor:
    """Return the projected visible tokens of the whole ViT, in which the patches of other tokens are blocked."""
    vit = model.model.vision_tower
    tower = tower_of(vit.config)
    patch_height, patch_width = pair(vit.config.patch_size)
    grid = pixels.shape[2] // patch_height, pixels.shape[3] // patch_width
    blocks = []
    is_visible = torch.zeros(len(pixels), *grid, dtype=torch.bool)
    for tile, tokens in enumerate(visible.tolist()):
        for token in tokens:
            row, column = divmod(token, grid[1] // 2)
            block = slice(2 * row, 2 * row + 2), slice(2 * column, 2 * column + 2)
            is_visible[tile][block] = True
            blocks.append((tile, *block))
    prefix = torch.ones(len(pixels), tower.num_prefix_tokens(vit.config), dtype=torch.bool)
    attend = attention_to(torch.cat([prefix, is_visible.flatten(1)], 1))
    with patch.object(torch.nn.functional, "scaled_dot_product_attention", attend):
        features = tower.patch_tokens(vit, pixels).unflatten(1, grid)
    return model.model.multi_modal_projector(torch.stack([features[block].flatten() for block in blocks]))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("share", [0.5, 0.25])
def test_tokens_equal_attention_to_visible_patches(vlm, size, share):
    pixels = images(vlm, SIZES[size])
    num_tokens = 4 * SIZES[size][1]
    visible = some_tokens(num_tokens, int(share * num_tokens))
    with torch.no_grad():
        outputs = vlm.get_image_features(pixels, visible_token_indices=visible)
        expected = tokens_by_blocking(vlm, pixels, visible)
        whole = vlm.get_image_features(pixels)
    assert outputs.pooler_output.shape == (*visible.shape, TEXT["hidden_size"])
    torch.testing.assert_close(outputs.pooler_output.flatten(0, 1), expected, atol=1e-5, rtol=0)
    num_prefix = tower_of(vlm.config.vision_config).num_prefix_tokens(vlm.config.vision_config)
    assert outputs.last_hidden_state.shape[1] == num_prefix + 4 * visible.shape[1]
    same_tokens = whole.pooler_output.take_along_dim(visible[..., None], 1)
    assert (outputs.pooler_output - same_tokens).abs().max() > 1e-3  # the dropped patches do change the others


def test_all_tokens_equal_the_whole_vit(vlm):
    pixels = images(vlm)
    with torch.no_grad():
        whole = vlm.get_image_features(pixels).pooler_output
        outputs = vlm.get_image_features(pixels, visible_token_indices=torch.arange(4).expand(3, -1))
    torch.testing.assert_close(outputs.pooler_output, whole, atol=1e-5, rtol=0)


def test_vrl_gathers_among_visible_tokens(vlm):
    pixels = images(vlm)
    visible = torch.tensor([[0, 2, 3], [1, 2, 3], [0, 1, 3]])
    kept = torch.tensor([2, 5, 7, 8, 11])
    places = [(0, 1), (1, 0), (1, 2), (2, 0), (2, 2)]  # tile, and place among its visible tokens
    with torch.no_grad():
        tokens = vlm.get_image_features(pixels, visible_token_indices=visible).pooler_output
        found = vlm.get_image_features(pixels, visual_token_indices=kept, visible_token_indices=visible)
    torch.testing.assert_close(found.pooler_output[:, 0], torch.stack([tokens[place] for place in places]))


def test_language_model_reads_visible_tokens(vlm):
    """The model equals a language model on the projected tokens, in logits and in the gradients of the ViT."""
    pixels = images(vlm)
    visible = torch.tensor([[0, 3], [1, 2], [0, 1]])
    kept = torch.tensor([0, 3, 6, 9])
    input_ids = torch.tensor([[1, 2, 7, 7, 7, 7, 3, 4]])
    position_ids = torch.tensor([[0, 1, 2, 5, 8, 11, 14, 15]])
    batch = {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids), "position_ids": position_ids}
    vlm.zero_grad()
    drops = {"visual_token_indices": kept, "visible_token_indices": visible}
    logits = vlm(**batch, pixel_values=pixels, **drops, use_cache=False).logits
    logits.square().sum().backward()
    gradients = {name: weight.grad.clone() for name, weight in vlm.named_parameters() if weight.grad is not None}

    vlm.zero_grad()
    embeddings = vlm.get_input_embeddings()(input_ids)
    tokens = tokens_by_blocking(vlm, pixels, visible)[[0, 1, 3, 5]]
    embeddings = torch.cat([embeddings[:, :2], tokens[None], embeddings[:, 6:]], 1)
    del batch["input_ids"]
    expected = vlm(**batch, inputs_embeds=embeddings, use_cache=False).logits
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-5)
    expected.square().sum().backward()
    # The gradient of a bias of keys is zero except for rounding, because attention does not change with it.
    rounding = 1e-4 * sum(gradient.square().sum() for gradient in gradients.values()).sqrt()
    for name, weight in vlm.named_parameters():
        if name in gradients:
            assert (gradients[name] - weight.grad).norm() <= 1e-4 * max(weight.grad.norm(), rounding), name
    layers = tower_of(vlm.config.vision_config).layers
    assert any(name.startswith(f"model.vision_tower.{layers}.0.") for name in gradients)


def test_checkpointed_layers_are_computed_again(vlm):
    vit = vlm.model.vision_tower
    if vit.config.model_type == "timm_wrapper":
        pytest.skip("timm has its own checkpointing")
    layers = vit.get_submodule(tower_of(vit.config).layers)
    norm = next(module for module in layers[0].modules() if isinstance(module, torch.nn.LayerNorm))
    calls = []
    handle = norm.register_forward_pre_hook(lambda *_: calls.append(1))
    checkpoint_activations(vlm)
    try:
        features = vlm.train().get_image_features(images(vlm), visible_token_indices=some_tokens(4, 2)).pooler_output
        features.sum().backward()
    finally:
        handle.remove()
        vlm.gradient_checkpointing_disable()
        vlm.eval()
    assert len(calls) == 2


def test_features_of_other_layers_are_refused(vlm):
    visible = some_tokens(4, 2)
    with pytest.raises(ValueError, match="vision_feature_layer=-1, got -2.*patch_drop_ratio"):
        vlm.get_image_features(images(vlm), vision_feature_layer=-2, visible_token_indices=visible)
