"""The tab VRL: kept tokens, compared with a loop over tiles; answers, attention and savings, with the plain model."""

import numpy as np
import pytest
import torch
import vrl_tab
from answers import answers_by_drop_ratio, decode, encode, greedy
from handlers import run, start_of
from loading import TINY, FullModel
from pictures import picture
from PIL import Image
from tiny_models import TEXT, TOKENS_PER_TILE
from uploading import CROWNS
from vrl_tab import (
    DIMMED,
    MAX_NEW_TOKENS,
    answers_at,
    build_tab,
    costs,
    draw_tokens,
    explain,
    kept_tokens,
    token_maps,
)

SIDE = 2  # tokens along a tile of the small model
QUESTION = "How many trees are there?"
TOKENS = 16  # of a tile of the app's tiny model: (112 / 14 / 2) ** 2


@pytest.mark.parametrize(
    ("size", "grid"),
    [((168, 112), (2, 3)), ((56, 56), (1, 1)), ((1, 90), (6, 1))],
)
@pytest.mark.parametrize("drop_ratio", [0.0, 0.75])
def test_maps_show_kept_tokens_of_processor(processor, size, grid, drop_ratio):
    image = picture(*size)
    inputs = encode(processor, [image], QUESTION, drop_ratio, seed=3)
    kept, num_tiles = inputs.get("visual_token_indices"), len(inputs["pixel_values"])
    maps = token_maps(processor, image.size, num_tiles, kept)
    assert maps.grid == grid
    rows, columns = grid
    wanted = np.zeros((rows * SIDE, columns * SIDE), dtype=bool)
    thumbnail = np.zeros((SIDE, SIDE), dtype=bool)
    for index in range(num_tiles * TOKENS_PER_TILE) if kept is None else kept.tolist():
        tile, token = divmod(index, TOKENS_PER_TILE)
        row, column = divmod(token, SIDE)
        if tile < rows * columns:
            wanted[tile // columns * SIDE + row, tile % columns * SIDE + column] = True
        else:
            thumbnail[row, column] = True
    assert (maps.tiles == wanted).all()
    assert maps.thumbnail is None if num_tiles == 1 else (maps.thumbnail == thumbnail).all()
    total = num_tiles * TOKENS_PER_TILE
    assert maps.tiles.sum() + thumbnail.sum() * (num_tiles > 1) == np.ceil(total * (1 - drop_ratio))


def test_model_orders_tokens_by_row(model):
    """A marked patch is in the token that covers it after the pixel shuffle."""
    for row in (0, 3):
        for column in range(4):
            patches = torch.zeros(1, 4, 4, 8)
            patches[0, row, column] = 1
            tokens = model.model.pixel_shuffle(patches, scale_factor=0.5).flatten(1, 2)[0]
            assert tokens.any(-1).nonzero().flatten().tolist() == [row // 2 * SIDE + column // 2]


def test_processor_orders_tiles_by_row(processor):
    """The bright sixth of an image is the tile at that position of the map."""
    for row in range(2):
        for column in range(3):
            pixels = np.zeros((112, 168, 3), dtype=np.uint8)
            pixels[row * 56 : (row + 1) * 56, column * 56 : (column + 1) * 56] = 255
            tiles = encode(processor, [Image.fromarray(pixels)], QUESTION)["pixel_values"]
            assert tiles[:6].mean((1, 2, 3)).argmax() == 3 * row + column
            kept = torch.arange(TOKENS_PER_TILE) + TOKENS_PER_TILE * (3 * row + column)
            maps = token_maps(processor, (168, 112), len(tiles), kept)
            shown = np.array(draw_tokens(Image.fromarray(pixels), maps.tiles))
            assert (shown == pixels).all()


def test_draw_depends_on_the_seed_alone(processor):
    draws = [
        encode(processor, [picture(168, 112, seed)], QUESTION, 0.5, key)["visual_token_indices"]
        for seed, key in ((0, 1), (1, 1), (0, 2))
    ]
    assert draws[0].equal(draws[1]) and not draws[0].equal(draws[2])


def test_tokens_are_shown_over_tiles_and_thumbnail(models, scene):
    tiles, thumbnail, summary, note = kept_tokens(models, scene, TINY, 0.75, 5)
    assert summary == "28 of 112 visual tokens are kept, over 2 × 3 tiles and a thumbnail."
    assert note == "scene.png: PNG, RGB, 336 × 224 pixels"
    image = picture(336, 224)
    inputs = encode(models.full().processor, [image], "?", 0.75, seed=5)
    shown, pixels = np.array(tiles).astype(float), np.array(image)
    for index in range(6 * TOKENS):
        tile, token = divmod(index, TOKENS)
        top, left = tile // 3 * 112 + token // 4 * 28, tile % 3 * 112 + token % 4 * 28
        inner = np.s_[top + 4 : top + 24, left + 4 : left + 24]  # without tile borders
        factor = 1 if index in inputs["visual_token_indices"] else DIMMED
        assert np.abs(shown[inner] - factor * pixels[inner]).max() <= 0.5
    brightness = np.array(thumbnail).reshape(4, 112, 4, 112, 3).mean((1, 3, 4)).flatten()
    kept = [index - 6 * TOKENS for index in inputs["visual_token_indices"].tolist()]
    assert (brightness > 60).nonzero()[0].tolist() == [token for token in kept if token >= 0]


def test_table_by_drop_ratio_shows_model_answers(models, scene, monkeypatch):
    ratios = (0.0, 0.5, 0.9)
    monkeypatch.setattr(vrl_tab, "DROP_RATIOS", ratios)
    steps = list(answers_at(models, scene, TINY, QUESTION, 0, 2))
    full = models.full()
    arguments = full, picture(336, 224), QUESTION, ratios, (0, 1), MAX_NEW_TOKENS
    wanted = list(answers_by_drop_ratio(*arguments))
    assert len(steps) == len(wanted) == 1 + 2 * 2
    table, answer = steps[-1]
    assert answer == wanted[0].text
    assert table["drop ratio"].tolist() == [one.drop_ratio for one in wanted]
    assert table["seed"].tolist() == [one.seed for one in wanted]
    assert table["answer"].tolist() == [one.text for one in wanted]
    np.testing.assert_allclose(table["probability"], [one.probability for one in wanted], atol=1e-4)
    np.testing.assert_allclose(
        table["probability of the full answer"], [one.full_probability for one in wanted], atol=1e-4
    )


def test_answer_attention_equals_language_model_attention(models):
    full, image = models.full(), picture(336, 224)
    found = explain(full, image, QUESTION, 0.75, 5, max_new_tokens=6)
    inputs = encode(full.processor, [image], QUESTION, 0.75, seed=5)
    with torch.no_grad():
        ids = full.model.generate(**inputs, **greedy(full.model, 6))
        new = ids.shape[1] - inputs["input_ids"].shape[1]
        positions = inputs["position_ids"]
        given = dict(inputs) | {
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids),
            "position_ids": torch.cat([positions, positions[:, -1:] + 1 + torch.arange(new)], 1),
        }
        attentions = full.model(**given, output_attentions=True, use_cache=False).attentions
    length = inputs["input_ids"].shape[1]
    mean = torch.stack(attentions)[:, 0, :, length - 1 : -1].mean((0, 1, 2)).numpy()
    is_visual = inputs["input_ids"][0] == full.model.config.image_token_id
    kept = inputs["visual_token_indices"].numpy()
    assert found.text == decode(full.processor, ids[0, length:])
    assert (found.num_visual_tokens, found.sequence_length) == (len(kept), length)
    assert found.share == pytest.approx(mean[:length][is_visual].sum() / mean.sum(), rel=1e-3)
    for index, value in zip(kept, mean[:length][is_visual]):
        tile, token = divmod(int(index), TOKENS)
        if tile < 6:
            place = tile // 3 * 4 + token // 4, tile % 3 * 4 + token % 4
            assert found.attention[place] == pytest.approx(value, rel=1e-3)
    assert np.isfinite(found.attention).sum() == (kept < 6 * TOKENS).sum()


def test_operations_equal_manual_sum(model, processor):
    drop_ratio = 0.75
    model.set_attn_implementation("eager")  # as in the app
    whole, short = costs(FullModel("small", model.eval(), processor), picture(168, 112), QUESTION, drop_ratio)
    total = 7 * TOKENS_PER_TILE
    assert (whole.drop_ratio, whole.num_visual_tokens) == (0.0, total)
    assert (short.drop_ratio, short.num_visual_tokens) == (drop_ratio, np.ceil(total * (1 - drop_ratio)))
    assert whole.sequence_length - short.sequence_length == whole.num_visual_tokens - short.num_visual_tokens
    width, inner, heads, groups = (
        TEXT[name] for name in ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads")
    )
    head = width // heads
    for cost in (whole, short):
        length = cost.sequence_length
        projections = length * width * (2 * heads * head + 2 * groups * head)
        layer = projections + 2 * length * length * heads * head + 3 * length * width * inner
        answer = width * model.config.text_config.vocab_size  # the LM head, for one position
        assert cost.flops == 2 * (TEXT["num_hidden_layers"] * layer + answer)
        assert 0 < cost.language_seconds < 10 and 0 < cost.vision_seconds < 10


def test_tab_opens_with_example(packed):
    """The handlers at the start compute every result of the tab from its default inputs."""
    (show_tokens, inputs), (run_all, (*others, _)) = start_of(build_tab, packed)
    tiles, thumbnail, summary = run(show_tokens, inputs)
    *both, cost_table, saved, table, curve = run(run_all, [*others, 2])  # draws
    assert tiles.size == (224, 224) and not thumbnail.visible
    assert summary.startswith(CROWNS) and "13 of 49 visual tokens are kept" in summary
    assert both[0].startswith(f"{CROWNS}: ") and "from 49 visual tokens" in both[0] and "from 13" in both[2]
    assert "fewer operations" in saved and len(cost_table) == 2 and len(table) == 11
    for ratio, mean in curve.itertuples(index=False):
        draws = table.loc[table["drop ratio"] == ratio, "probability of the full answer"]
        assert len(draws) == (2 if ratio else 1) and mean == pytest.approx(sum(draws) / len(draws))
