"""Maps of the Space, compared with NumPy on the outputs of `AutoModel` for an exported backbone."""

import base64
from dataclasses import replace

import cv2
import numpy as np
import pytest
import torch
from handlers import cosine, normalized
from loading import Models
from maps import (
    ATTENTION,
    CIVIDIS,
    FROM_POINT,
    PALETTE,
    PCA,
    SEGMENTS,
    View,
    attention_heads,
    draw,
    draw_foreground,
    draw_heads,
    foreground_scores,
    heat_of,
    most_similar,
    pack_features,
    patch_features,
    rollout_map,
    segment_labels,
    similarity_to_point,
    smoothed,
)
from matplotlib import colormaps
from pictures import picture
from PIL import ImageColor
from sklearn.cluster import KMeans
from tiny_models import VISION
from transformers import AutoModel

from modeling_vitp import ViTPVisionConfig, ViTPVisionModel, export_backbone
from modeling_vitp.images.pixels import align_scores, colors_of, principal_scores

VIEW = View(PCA, resolution=6, opacity=1.0)


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
        return model(normalized(image), output_hidden_states=True, output_attentions=True)

    return run


@pytest.fixture(scope="module")
def image():
    return np.asarray(picture(6 * 14, 4 * 14))


@pytest.mark.parametrize("layer", [1, 3, None])
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
    expected = np.sqrt(len(states)) * left[:, :5]
    expected *= np.sign([right[k, np.abs(right[k]).argmax()] for k in range(5)])
    features = patch_features(backbone, image, 6)
    scores = principal_scores(features)
    np.testing.assert_allclose(scores.flatten(1).T, expected[:, :3], atol=1e-4)
    colors = np.round(255 * np.clip(expected[:, :3] / 4 + 0.5, 0, 1)).reshape(4, 6, 3)
    assert np.abs(colors_of(scores) - colors).max() <= 1
    view = replace(VIEW, component=5, colors=CIVIDIS)
    values = view.values(backbone, 3, image, features)
    np.testing.assert_allclose(values[0].flatten(), expected[:, 4], atol=1e-4)
    ((drawn, meaning),) = draw(view, [values], image)
    shown = colormaps["cividis"](np.clip(expected[:, 4] / 4 + 0.5, 0, 1), bytes=True)[:, :3].reshape(4, 6, 3)
    assert np.abs(np.asarray(drawn)[64::128, 64::128].astype(int) - shown).max() <= 3 and "component 5" in meaning


@pytest.mark.parametrize("query", [None, (3, 1)])
def test_attention(backbone, plain, image, query):
    attentions = [layer[0].double().numpy() for layer in plain(image).attentions]
    token = 0 if query is None else 1 + 6 * query[0] + query[1]
    for layer in (1, 3):
        for head in (1, 4, None):
            weights = attentions[layer - 1].mean(0) if head is None else attentions[layer - 1][head - 1]
            view = replace(VIEW, kind=ATTENTION, head=head or 0)
            if query is not None:
                view = replace(view, source=FROM_POINT, x=100 * (query[1] + 0.5) / 6, y=100 * (query[0] + 0.5) / 4)
            result = view.values(backbone, layer, image, torch.zeros(1, 4, 6))
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
    sheet = np.asarray(draw_heads(heads, image, VIEW)).astype(int).sum(-1)
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
    drawn = np.asarray(draw_foreground(torch.from_numpy(scores), np.full((80, 90, 3), 90, np.uint8), VIEW)).astype(int)
    middles = [((np.arange(count) + 0.5) * side / count).astype(int) for count, side in zip((8, 9), drawn.shape)]
    colored = (drawn.max(-1) != drawn.min(-1))[np.ix_(*middles)]
    assert not colored[~inside].any() and colored[inside].mean() > 0.9


def test_segments_are_kmeans_of_normalized_features():
    rng = np.random.default_rng(0)
    centers = rng.normal(size=(4, 16))
    truth = rng.choice(4, size=(9, 11), p=[0.1, 0.2, 0.3, 0.4])
    scales = rng.uniform(0.5, 5, (9, 11, 1))  # The length of the features does not count.
    features = torch.from_numpy(scales * (centers[truth] + 0.02 * rng.normal(size=(9, 11, 16)))).movedim(-1, 0)
    labels = segment_labels(features, 4).numpy()
    assert len(set(zip(labels.ravel(), truth.ravel()))) == 4
    assert (np.diff(np.bincount(labels.ravel())) <= 0).all()
    noise = torch.from_numpy(rng.normal(size=(8, 12, 12)))
    labels = segment_labels(noise, 5).numpy().ravel()
    patches = noise.flatten(1).numpy().T / np.linalg.norm(noise.flatten(1), axis=0)[:, None]
    means = np.stack([patches[labels == label].mean(0) for label in range(5)])
    again = KMeans(5, init=means, n_init=1).fit(patches)
    np.testing.assert_array_equal(again.labels_, labels)
    assert again.inertia_ < 1.05 * KMeans(5, n_init=10, random_state=0).fit(patches).inertia_
    assert torch.equal(segment_labels(noise, 5), segment_labels(noise, 5))
    assert not segment_labels(torch.ones(5, 3, 4), 4).any()
    image, colors = np.zeros((12, 12, 3), np.uint8), [ImageColor.getrgb(color) for color in PALETTE]
    ((drawn, _),) = draw(replace(VIEW, kind=SEGMENTS), [torch.from_numpy(labels.reshape(12, 12))], image)
    np.testing.assert_array_equal(np.asarray(drawn)[32::64, 32::64].reshape(-1, 3), np.array(colors)[labels])


def test_most_similar_patches_are_found():
    values = torch.rand(6, 9, generator=torch.Generator().manual_seed(0))
    order = [divmod(index, 9) for index in np.argsort(-values.numpy(), axis=None)]
    assert most_similar(values, 4) == order[:4] and most_similar(values, 4, order[1]) == [order[0], *order[2:5]]


def test_packed_features_keep_similarities():
    rng = np.random.default_rng(0)
    weights = rng.normal(size=(24, 96))
    features = [
        torch.from_numpy(weights.T @ rng.normal(size=(24, 30 * columns)) + 1).float().unflatten(1, (30, columns))
        for columns in (40, 25)
    ]
    packed = pack_features(*features)
    exact = [one.flatten(1).numpy() / np.linalg.norm(one.flatten(1), axis=0) for one in features]
    codes = [np.frombuffer(base64.b64decode(one["codes"]), np.int8) for one in packed.images]
    assert [(one["rows"], one["columns"]) for one in packed.images] == [(30, 40), (30, 25)]
    assert max(map(len, codes)) <= 100_000
    restored = [one.reshape(-1, len(packed.scales)) * packed.scales for one in codes]
    restored = [(one / np.linalg.norm(one, axis=1, keepdims=True)).T for one in restored]
    errors = [np.abs(restored[0].T @ a - exact[0].T @ b).max() for a, b in zip(restored, exact)]
    assert packed.error == pytest.approx(max(errors), abs=1e-5) and packed.error < 0.02


def test_smooth_maps_interpolate_values():
    values = torch.rand(2, 5, 7, generator=torch.Generator().manual_seed(0))
    image = np.zeros((50, 70, 3), np.uint8)
    fine = smoothed(values, image)
    assert fine.shape == (2, 549, 768)
    for one, expected in zip(fine, values.numpy()):
        np.testing.assert_allclose(one, cv2.resize(expected, (768, 549), interpolation=cv2.INTER_CUBIC), atol=1e-4)


def test_hooks_are_removed(backbone, image):
    def hooks():
        return sum(len(module._forward_hooks) for module in backbone.model.modules())

    before = hooks()
    rollout_map(backbone, image, 6)
    assert hooks() == before


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
