"""Maps of the Space, compared with NumPy on the outputs of `AutoModel` for an exported backbone."""

import numpy as np
import pytest
import torch
from loading import Models
from maps import (
    attention_heads,
    attention_map,
    draw_map,
    foreground_scores,
    grid_of,
    heat_of,
    patch_at,
    patch_features,
    rollout_map,
    similarity_elsewhere,
    similarity_to_point,
)
from pictures import picture
from PIL import Image
from tiny_models import VISION
from transformers import AutoModel
from views import draw_foreground, draw_heads

from modeling_vitp import ViTPVisionConfig, ViTPVisionModel, export_backbone
from modeling_vitp.images.pixels import align_scores, colors_of, principal_scores

MEAN, STD = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
GRIDS = {"odd": (61, 83), "tall": (400, 30), "one pixel wide": (500, 1), "one pixel high": (1, 77), "square": (56, 56)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("backbone")
    config = ViTPVisionConfig(**VISION, initializer_range=0.3, layer_scale_init_value=1.0)
    export_backbone(ViTPVisionModel(config), folder)
    return str(folder)


@pytest.fixture(scope="module")
def backbone(folder):
    return Models(folder).backbone()


@pytest.fixture(scope="module")
def plain(folder):
    """Return the outputs of transformers' class for an image of whole patches, which needs no resizing."""
    model = AutoModel.from_pretrained(folder, attn_implementation="eager").eval()

    @torch.no_grad()
    def run(image):
        pixels = torch.from_numpy((image / 255 - MEAN) / STD).movedim(-1, 0)[None].float()
        return model(pixels, output_hidden_states=True, output_attentions=True)

    return run


@pytest.fixture(scope="module")
def image():
    return np.asarray(picture(6 * 14, 4 * 14))


def cosine(a, b):
    return a @ b / np.sqrt((a @ a) * (b @ b))


@pytest.mark.parametrize("layer", [1, 2, 3, None])
def test_features_and_similarity(backbone, plain, image, layer):
    outputs = plain(image)
    states = outputs.last_hidden_state if layer in (3, None) else outputs.hidden_states[layer]
    expected = states[0, 1:].double().numpy().reshape(4, 6, -1)
    features = patch_features(backbone, image, 6, layer)
    np.testing.assert_allclose(features.movedim(0, -1), expected, atol=2e-5)
    similarity = similarity_to_point(features, 2, 5).numpy()
    for row in range(4):
        for column in range(6):
            assert similarity[row, column] == pytest.approx(cosine(expected[row, column], expected[2, 5]), abs=1e-5)


def test_principal_components(backbone, plain, image):
    states = plain(image).last_hidden_state[0, 1:].double().numpy()
    centered = states - states.mean(0)
    left, singular, right = np.linalg.svd(centered, full_matrices=False)
    expected = np.sqrt(len(states)) * left[:, :3]
    expected *= np.sign([right[k, np.abs(right[k]).argmax()] for k in range(3)])
    scores = principal_scores(patch_features(backbone, image, 6))
    np.testing.assert_allclose(scores.flatten(1).T, expected, atol=1e-4)
    colors = np.round(255 * np.clip(expected / 4 + 0.5, 0, 1)).reshape(4, 6, 3)
    assert np.abs(colors_of(scores) - colors).max() <= 1


@pytest.mark.parametrize("query", [None, (0, 0), (3, 1)])
def test_attention(backbone, plain, image, query):
    attentions = [layer[0].double().numpy() for layer in plain(image).attentions]
    token = 0 if query is None else 1 + 6 * query[0] + query[1]
    for layer in (1, 3):
        for head in (1, 4, None):
            weights = attentions[layer - 1].mean(0) if head is None else attentions[layer - 1][head - 1]
            result = attention_map(backbone, image, 6, layer, head, query)
            np.testing.assert_allclose(result, weights[token, 1:].reshape(4, 6), atol=1e-6)
            assert result.max() > 0
    flow = np.eye(25)
    for weights in attentions:
        flow = (0.5 * weights.mean(0) + 0.5 * np.eye(25)) @ flow
    np.testing.assert_allclose(rollout_map(backbone, image, 6, query), flow[token, 1:].reshape(4, 6), atol=1e-6)
    assert flow[token].sum() == pytest.approx(1)


def test_attention_of_every_head(backbone, plain, image):
    weights = plain(image).attentions[1][0, :, 0, 1:].reshape(4, 4, 6).numpy()
    heads = attention_heads(backbone, image, 6, 2)
    np.testing.assert_allclose(heads, weights, atol=1e-6)
    sheet = np.asarray(draw_heads(heads, image, 1.0)).astype(int).sum(-1)
    assert sheet.shape == (512, 768)  # two by two, in the aspect ratio of the image
    for index, one in enumerate(weights):
        small = sheet[index // 2 * 256 :, index % 2 * 384 :][:256, :384]
        cells = np.median(small.reshape(4, 64, 6, 64), axis=(1, 3))
        assert np.unravel_index(cells.argmax(), cells.shape) == np.unravel_index(one.argmax(), one.shape)


def test_foreground_differs_from_border():
    rng = np.random.default_rng(0)
    features = rng.normal(size=(6, 8, 9)) * 0.05
    features[0] += 1
    inside = np.zeros((8, 9), bool)
    inside[2:6, 3:7] = True
    features[0, inside] -= 4
    features[1, inside] += rng.normal(size=inside.sum())
    scores = foreground_scores(torch.from_numpy(features)).numpy()
    np.testing.assert_array_equal(np.isfinite(scores[0]), inside)
    flat = features[:, inside].T - features[:, inside].T.mean(0)
    first = np.linalg.svd(flat, full_matrices=False)[0][:, 0] * np.sqrt(inside.sum())
    assert abs(np.dot(first, scores[0, inside]) / inside.sum()) == pytest.approx(1, abs=1e-6)
    assert np.isnan(foreground_scores(torch.ones(4, 3, 3))).all()
    drawn = np.asarray(draw_foreground(torch.from_numpy(scores), np.full((80, 90, 3), 90, np.uint8), 1.0)).astype(int)
    middles = [((np.arange(count) + 0.5) * side / count).astype(int) for count, side in zip((8, 9), drawn.shape)]
    colored = (drawn.max(-1) != drawn.min(-1))[np.ix_(*middles)]
    assert not colored[~inside].any() and colored[inside].mean() > 0.9


def test_similarity_to_patch_in_another_image(backbone):
    first, second = (patch_features(backbone, np.asarray(picture(84, 56, seed)), 6) for seed in (0, 1))
    found = similarity_elsewhere(first, 1, 2, second)
    for row, column in ((0, 0), (3, 5)):
        assert found[row, column] == pytest.approx(
            cosine(second[:, row, column].numpy(), first[:, 1, 2].numpy()), abs=1e-5
        )


def test_hooks_are_removed(backbone, image):
    def hooks():
        return sum(len(module._forward_hooks) for module in backbone.model.modules())

    before = hooks()
    rollout_map(backbone, image, 6)
    assert hooks() == before


def test_missing_attention_weights_raise(folder, image):
    backbone = Models(folder).backbone()
    backbone.model.set_attn_implementation("sdpa")
    with pytest.raises(RuntimeError, match="eager attention"):
        attention_map(backbone, image, 6, 1)


@pytest.mark.parametrize("height, width", GRIDS.values(), ids=GRIDS)
def test_marked_patch_is_brightest(backbone, height, width):
    resolution = 12
    rows, columns = grid_of(height, width, resolution)
    assert max(rows, columns) == resolution
    assert rows / columns == pytest.approx(height / width, rel=0.1) or 1 in (rows, columns)
    row, column = rows // 3, columns // 3
    top, bottom = round(row * height / rows), round((row + 1) * height / rows)
    left, right = round(column * width / columns), round((column + 1) * width / columns)
    image = np.full((height, width, 3), 40, np.uint8)
    image[top : max(bottom, top + 1), left : max(right, left + 1)] = (255, 0, 0)
    clean = patch_features(backbone, np.full_like(image, 40), resolution, 1)
    marked = patch_features(backbone, image, resolution, 1)
    assert marked.shape[1:] == (rows, columns)
    change = (marked - clean).square().sum(0)
    assert divmod(int(change.argmax()), columns) == (row, column)
    middle = ((left + right) / 2 / width, (top + bottom) / 2 / height)
    assert patch_at(middle, rows, columns) == (row, column)
    similarity = similarity_to_point(marked, *patch_at(middle, rows, columns))
    assert similarity[row, column] == pytest.approx(1) and (similarity > 0.9999).sum() == 1
    drawn = np.asarray(draw_map(heat_of(similarity, -1, 1), image))
    assert drawn.shape[:2] == tuple(max(1, round(768 * side / max(height, width))) for side in (height, width))
    where = np.argwhere(drawn.sum(-1, dtype=int) == drawn.sum(-1, dtype=int).max())
    patch = [side / count for side, count in zip(drawn.shape, (rows, columns))]
    np.testing.assert_allclose(where.min(0), [row * patch[0], column * patch[1]], atol=1)
    np.testing.assert_allclose(where.max(0), [(row + 1) * patch[0] - 1, (column + 1) * patch[1] - 1], atol=1)


def test_pca_colors_of_backbones_are_aligned():
    """A map in rotated and mirrored coordinates of a wider space gets the same colors."""
    rng = np.random.default_rng(0)
    features = torch.from_numpy(rng.normal(size=(8, 7, 9)) * (2.0 ** -np.arange(8))[:, None, None])
    turned = torch.from_numpy(np.linalg.qr(rng.normal(size=(12, 8)))[0]) @ features.flatten(1)
    turned = 3 * turned.unflatten(1, (7, 9)) + 5
    reference, other = principal_scores(features), principal_scores(turned)
    np.testing.assert_allclose(align_scores(other, reference), reference, atol=1e-9)
    mixed = torch.from_numpy(np.linalg.qr(rng.normal(size=(3, 3)))[0]) @ reference.flatten(1)
    np.testing.assert_allclose(align_scores(mixed.view_as(reference), reference), reference, atol=1e-9)


def test_constant_maps_are_gray():
    constant = colors_of(principal_scores(torch.ones(5, 4, 3)))
    assert constant.shape == (4, 3, 3) and (constant == 128).all()
    assert (colors_of(principal_scores(torch.randn(5, 1, 1))) == 128).all()
    two_patches = principal_scores(torch.randn(5, 2, 1))
    assert two_patches[0].abs().flatten().tolist() == pytest.approx([1, 1]) and not two_patches[1:].any()
    assert np.unique(heat_of(torch.full((2, 2), 0.3)).reshape(-1, 3), axis=0).shape == (1, 3)


def test_map_shows_ring_and_image():
    colors, image = np.zeros((4, 6, 3), np.uint8), np.full((40, 60, 3), 200, np.uint8)
    plain, ringed = draw_map(colors, image), draw_map(colors, image, point=(0.5, 0.25))
    assert plain.size == ringed.size == (768, 512)
    where = np.argwhere(np.asarray(ringed).any(-1))
    np.testing.assert_allclose(where.mean(0), [128, 384], atol=1)
    assert np.asarray(draw_map(colors, image, opacity=0.5)).mean() == pytest.approx(100, abs=1)
    assert isinstance(draw_map(colors, image, (0.0, 1.0)), Image.Image)
