"""The finding of the first page, computed anew on all held-out images of the sample, and its pictures."""

import io

import finding
import numpy as np
import pandas as pd
import pytest
import torch
from finding import PIXELS, TRAINED, UNTRAINED, patch_scores, patch_vectors, pictures_of, read_finding, tree_patches
from loading import TINY, Models
from paths import AERIAL_TREES
from PIL import Image
from sklearn.metrics import roc_auc_score


@pytest.mark.slow
def test_trained_vit_is_ahead_of_both_controls(packed):
    shown, areas = read_finding(packed), {TRAINED: [], UNTRAINED: [], PIXELS: []}
    rows = pd.read_parquet(AERIAL_TREES / "test.parquet")
    trees = {
        tuple(box + [left, top] * 2) for boxes, left, top in rows[["boxes", "left", "top"]].values for box in boxes
    }
    columns, steps = sorted(rows["left"].unique())[::2], sorted(rows["top"].unique())[::2]
    apart = rows[rows["left"].isin(columns) & rows["top"].isin(steps)]
    assert len(apart) == shown.num_images
    for image, left, top in apart[["image", "left", "top"]].values:
        pixels = np.asarray(Image.open(io.BytesIO(image["bytes"])).convert("RGB"))
        mask = np.zeros((224, 224), bool)
        for x0, y0, x1, y1 in trees:
            mask[max(y0 - top, 0) : max(y1 - top, 0), max(x0 - left, 0) : max(x1 - left, 0)] = True
        for name, vectors in patch_vectors(packed, pixels).items():
            scores = patch_scores(shown.probes[name], vectors)
            areas[name].append(roc_auc_score(mask[4::8, 4::8].ravel(), scores.ravel()))
    means = {name: np.mean(values) for name, values in areas.items()}
    assert means[TRAINED] > means[PIXELS] + 0.02 and means[TRAINED] > means[UNTRAINED] + 0.02
    assert means == pytest.approx(shown.areas, abs=2e-3)
    for name, lead in shown.leads.items():
        differences = np.subtract(areas[TRAINED], areas[name])
        half = 2.0369 * differences.std(ddof=1) / len(differences) ** 0.5  # Student's t, 32 degrees of freedom
        assert [differences.mean() - half, differences.mean() + half] == pytest.approx(lead, abs=4e-3)
        assert lead[0] > 0 and differences.mean() > half, name


def test_features_of_patches_are_those_of_the_image(packed):
    pixels = np.asarray(Image.open(finding.IMAGE))
    vectors = patch_vectors(packed, pixels)
    assert {name: one.shape for name, one in vectors.items()} == dict.fromkeys(vectors, (28, 28, 192))
    np.testing.assert_allclose(vectors[PIXELS][3, 5], pixels[24:32, 40:48].ravel() / 255, atol=1e-6)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    values = ((torch.tensor(pixels / 255).float() - mean) / std).permute(2, 0, 1)[None]
    with torch.no_grad():
        expected = packed.full().model.model.vision_tower(values).last_hidden_state[0, 1:].reshape(28, 28, -1)
    torch.testing.assert_close(vectors[TRAINED], expected, atol=1e-4, rtol=1e-4)


def test_map_is_green_where_trees_are_likely_and_boxes_are_white(packed):
    pixels = np.asarray(Image.open(finding.IMAGE))
    scores = np.full((28, 28), -4.0)
    scores[10:, 5:9] = 0.5
    drawn = np.asarray(finding.draw_finding(scores, pixels, [[8, 16, 40, 200]])).astype(int)
    middles = np.round((np.arange(28) + 0.5) * 768 / 28).astype(int)
    green = (drawn[..., 1] - drawn[..., 2])[np.ix_(middles, middles)]
    assert green[scores > 0].min() > 120 and green[scores < 0].max() < 0
    x, y = round(768 * 40 / 224), round(768 * 100 / 224)
    assert (drawn[y, x] == 255).all() and (drawn[y, x + 6] < 255).any()
    image, maps = pictures_of(packed, read_finding(packed))
    assert {one.size for one in (image, *maps.values())} == {(768, 768)} and len(maps) == 3


def test_other_models_have_no_finding():
    assert read_finding(Models(TINY)) is None


def test_patches_are_trees_by_their_centers():
    assert tree_patches([[4.5, 0, 13, 8]], 2, 3).tolist() == [[False, True, False], [False] * 3]
    assert tree_patches([[3.5, -5, 13, 12.5]], 2, 3).tolist() == [[True, True, False], [True, True, False]]
