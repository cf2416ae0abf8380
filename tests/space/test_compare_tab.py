"""The tab Compare: similarity under corruption, compared with NumPy and with features that move with the image."""

import math

import gradio as gr
import numpy as np
import pandas as pd
import pytest
import torch
from compare_tab import (
    COLUMNS,
    build_tab,
    compare,
    open_backbones,
    patch_features,
    similarity_map,
    summary_of,
    two_images,
)
from handlers import button_of, cosine, normalized, run
from loading import RANDOM, TINY
from maps import TWIN
from pictures import picture
from PIL import Image
from tiny_models import VISION
from transformers import AutoModel

from modeling_vitp import ViTPVisionConfig, ViTPVisionModel, export_backbone
from modeling_vitp.images.corruptions import SEVERITIES, corrupt, motion


@pytest.fixture(scope="module")
def backbone(tmp_path_factory):
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("backbone")
    export_backbone(ViTPVisionModel(ViTPVisionConfig(**VISION)), folder)
    return AutoModel.from_pretrained(folder).eval()


def encoder(backbone, layer=-1):
    @torch.no_grad()
    def encode(image):
        states = backbone(normalized(image), output_hidden_states=True).hidden_states[layer][0, 1:]
        return states.T.unflatten(1, (image.shape[0] // 14, image.shape[1] // 14))

    return encode


def bilinear(features, x, y):
    """Interpolate at a position in [-1, 1] from edge to edge; `None` if it is not between patch centers."""
    _, rows, columns = features.shape
    column, row = (x + 1) / 2 * columns - 0.5, (y + 1) / 2 * rows - 0.5
    if not (-1e-6 <= column <= columns - 1 + 1e-6 and -1e-6 <= row <= rows - 1 + 1e-6):
        return None
    value = 0
    for r in (math.floor(row), math.floor(row) + 1):
        for c in (math.floor(column), math.floor(column) + 1):
            weight = (1 - abs(row - r)) * (1 - abs(column - c))
            value = value + weight * features[:, min(max(r, 0), rows - 1), min(max(c, 0), columns - 1)]
    return value


def expected(image, encode, name, severity, seed):
    """Compute the mean similarity and the share of compared patches with a loop."""
    clean = encode(image).numpy().astype(np.float64)
    corrupted = encode(corrupt(image, name, severity, seed)).numpy().astype(np.float64)
    matrix = motion(name, severity, *image.shape[:2], seed=seed)
    if matrix is None:
        return cosine(clean, corrupted).mean(), 1.0
    _, rows, columns = clean.shape
    values = []
    for row in range(rows):
        for column in range(columns):
            place = np.array([(column + 0.5) / columns * 2 - 1, (row + 0.5) / rows * 2 - 1, 1])
            moved = bilinear(corrupted, *(matrix.numpy() @ place))
            if moved is not None:
                values.append(cosine(clean[:, row, column, None, None], moved[:, None, None]).item())
    return np.mean(values), len(values) / (rows * columns)


def test_corruption_similarity_equals_numpy(backbone):
    image = np.asarray(picture(6 * 14, 5 * 14))
    backbones = {"last layer": encoder(backbone), "first layer": encoder(backbone, 1)}
    results = list(compare(image, backbones, severities=(1, 4), seed=3))
    assert [(r.corruption, r.severity, r.backbone) for r in results] == [
        (name, severity, backbone) for severity in (1, 4) for name in SEVERITIES for backbone in backbones
    ]
    for result in results:
        similarity, compared = expected(image, backbones[result.backbone], result.corruption, result.severity, 3)
        assert result.similarity == pytest.approx(similarity, abs=1e-5)
        assert result.compared == pytest.approx(compared, abs=1e-6)
        assert result.parameters == {
            key: values[result.severity - 1] for key, values in SEVERITIES[result.corruption].items()
        }
    unchanged = [r.similarity for r in results if (r.corruption, r.severity) == ("brightness_contrast", 1)]
    assert unchanged == pytest.approx([1, 1], abs=1e-6)
    assert min(r.similarity for r in results) < 0.99


def test_share_is_relative_to_floor(backbone):
    image, others = np.asarray(picture(6 * 14, 5 * 14)), [np.asarray(picture(6 * 14, 5 * 14, seed)) for seed in (1, 2)]
    encode = encoder(backbone)
    floor = np.mean([cosine(encode(image).numpy(), encode(other).numpy()).mean() for other in others])
    (result,) = compare(image, {"one": encode}, ("haze",), others=others)
    assert result.floor == pytest.approx(floor, abs=1e-6) and 0.01 < floor < 1
    assert result.share == pytest.approx((result.similarity - floor) / (1 - floor), abs=1e-6)

    def blind(image):  # maps all images to the same features
        return torch.ones(4, 5, 6) + 1e-3 * encode(image)[:4]

    (alike,) = compare(image, {"blind": blind}, ("haze",), (5,), others=others)
    assert alike.similarity > 0.99 and alike.share < 0.9


def test_moved_features_are_aligned():
    """Smooth pixel features agree only if the motion is undone."""
    y, x = np.mgrid[:112, :140]
    image = np.stack([127 + 120 * np.sin(x / 40), 127 + 120 * np.cos(y / 35), 127 + 120 * np.sin((x + y) / 50)], -1)
    image = image.round().astype(np.uint8)

    def encode(image):
        pixels = torch.from_numpy(image).movedim(-1, 0).float() - 127
        return torch.nn.functional.avg_pool2d(pixels, 4)

    for result in compare(image, {"pooled": encode}, ("rotation", "translation"), range(1, 6)):
        assert result.similarity > 0.999 and 0.3 < result.compared < 1
        corrupted = encode(corrupt(image, result.corruption, result.severity))
        assert similarity_map(encode(image), corrupted).mean() < 0.995
    for result in compare(image, {"pooled": encode}, ("scale",), range(1, 6)):
        assert result.similarity > 0.96 and result.compared == 1  # The black border is interpolated along the edge.


def test_patches_outside_the_image_are_nan():
    features = torch.rand(4, 6, 6)
    shifted = motion("translation", 3, 50, 50, seed=0)
    result = similarity_map(features, features, shifted)
    assert result.isnan().any() and result.isfinite().any()
    left, up = shifted[:, 2] < 0
    assert result[:, 0 if left else -1].isnan().all() and result[0 if up else -1].isnan().all()
    # A shift by the whole image leaves no patch to compare.
    nothing = similarity_map(features, features, torch.tensor([[1.0, 0, 2], [0, 1, 2]], dtype=torch.float64))
    assert nothing.isnan().all()


@pytest.fixture
def pair(tmp_path):
    for seed, name in enumerate(("before.png", "after.png")):
        picture(64, 48, seed).save(tmp_path / name)
    return str(tmp_path / "before.png"), str(tmp_path / "after.png")


def run_pair(models, first, second):
    """Press the button "Compare the two images" and return what the page shows."""
    return run(button_of(build_tab, models, "run_pair"), [first, None, second, TINY, TWIN, 6])


def test_two_images_are_compared_by_both_backbones(models, pair):
    *maps, note = run_pair(models, *pair)
    pixels = [np.asarray(picture(64, 48, seed)) for seed in range(2)]
    for shown, one in zip(maps, open_backbones(models, [TINY, TINY + RANDOM])):
        values = cosine(*(patch_features(one, image, 6) for image in pixels))
        assert shown.label == one.name and shown.visible and f"{values.mean():.3f} on average" in note
        assert Image.open(shown.value["path"]).size == (768, 576)
    assert "before.png: PNG" in note and "after.png: PNG" in note
    first, second, facts, _ = two_images(models, pair[0], pair[0], TINY, "none", 6)
    assert first.size == (768, 576) and second is None and facts[0]["mean"] == pytest.approx(1, abs=1e-5)


def test_missing_or_differing_second_image_is_named(models, pair, tmp_path):
    with pytest.raises(gr.Error, match="second image"):
        run_pair(models, pair[0], None)
    with pytest.raises(gr.Error, match="No image"):
        run_pair(models, None, pair[1])
    picture(64, 64).save(tmp_path / "square.png")
    with pytest.raises(gr.Error, match="64 × 48 and 64 × 64"):
        run_pair(models, pair[0], str(tmp_path / "square.png"))


def results():
    """Return shares of two corruptions at five severities, for a backbone and its random twin."""
    shares = {("haze", "vit"): -0.3, ("haze", "random"): 0.2, ("blur", "vit"): 0.1, ("blur", "random"): 0.15}
    rows = [
        (name, severity, backbone, severity * share, 0.0, 0.0, "", "100%")
        for (name, backbone), share in shares.items()
        for severity in range(1, 6)
    ]
    return pd.DataFrame(rows, columns=COLUMNS)


def test_summary_describes_the_numbers():
    words = summary_of(results())
    assert "**vit** keeps -0.30" in words and "**random** keeps 0.53" in words and "not more robust" in words
    assert "most under blur (0.30) and least under haze (-0.90)" in words
    assert "Under haze, the image is less similar" in words
