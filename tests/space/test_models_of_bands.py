"""Models with other bands than RGB, applied to an image with these bands."""

import numpy as np
import pytest
import rasterio
import torch
from compare_tab import open_backbones
from loading import RANDOM, TINY, Models
from maps import PCA, View, grid_of, image_of, look
from PIL import Image
from tiny_models import HEAD, VISION, adapter_config
from transformers import AutoModel

from modeling_vitp import (
    ViTPForSemanticSegmentation,
    ViTPImageProcessor,
    ViTPSegmentationConfig,
    ViTPSegmentationImageProcessor,
    ViTPVisionConfig,
    ViTPVisionModel,
    export_backbone,
)
from modeling_vitp.bands import spread_bands

BANDS = ["B2", "B3", "B4", "B8", "B11"]
SPEC = {"band_names": BANDS, "window": [0, 4000]}
VIEW = View(PCA, resolution=6)


@pytest.fixture
def scene(tmp_path):
    """Return the values of five bands and the file."""
    values = np.random.default_rng(0).integers(0, 5000, (5, 4 * 14, 6 * 14)).astype(np.uint16)
    options = {"driver": "GTiff", "height": 56, "width": 84, "count": 5, "dtype": "uint16"}
    with rasterio.open(tmp_path / "scene.tif", "w", **options) as target:
        target.write(values)
    return values, str(tmp_path / "scene.tif")


@pytest.fixture
def folder(tmp_path):
    torch.manual_seed(0)
    model = spread_bands(ViTPVisionModel(ViTPVisionConfig(**VISION, initializer_range=0.3)), BANDS)
    export_backbone(model, tmp_path / "bands", image_processor=ViTPImageProcessor(input_spec=SPEC))
    return tmp_path / "bands"


def test_multiband_features_equal_transformers(folder, scene):
    values, path = scene
    models = Models(str(folder))
    (first,), (_, twin) = look(models, path, ["bands", "bands" + RANDOM], VIEW)
    processor = ViTPImageProcessor.from_pretrained(folder)
    mean, std = (np.array(numbers)[:, None, None] for numbers in (processor.image_mean, processor.image_std))
    pixels = (np.clip(values / 4000, 0, 1) - mean) / std
    model = AutoModel.from_pretrained(folder).eval()
    with torch.no_grad():
        expected = model(torch.from_numpy(pixels)[None].float()).last_hidden_state[0, 1:].T.unflatten(1, (4, 6))
    torch.testing.assert_close(first.features, expected, atol=2e-4, rtol=1e-3)
    assert twin.features.shape == expected.shape and not torch.allclose(twin.features, expected, atol=0.1)
    rgb = image_of(models, path, "bands").rgb
    colors = np.rint(255 * np.clip(values[[2, 1, 0]] / 4000, 0, 1)).transpose(1, 2, 0)
    assert np.abs(rgb - colors).max() <= 1


def test_image_with_wrong_bands_is_rejected(folder, scene, tmp_path):
    Image.new("RGB", (20, 20)).save(tmp_path / "photo.png")
    models = Models(str(folder))
    with pytest.raises(ValueError, match=r"takes 5 bands \(B2, B3, B4, B8, B11\), but the image has 3") as caught:
        list(look(models, str(tmp_path / "photo.png"), ["bands"], VIEW))
    assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="bands takes 5 bands"):
        open_backbones(models, ["bands"])


def test_backbones_read_their_own_bands(folder, scene):
    _, path = scene
    *_, seen = look(Models(str(folder), [TINY]), path, ["bands", TINY], VIEW)
    assert [one.features.shape[1:] for one in seen] == [grid_of(56, 84, 6)] * 2


def test_multiband_segmentation_is_applied(scene, tmp_path):
    from apply_tab import result_of

    torch.manual_seed(0)
    config = ViTPSegmentationConfig(backbone_config=adapter_config(), **HEAD)
    model = spread_bands(ViTPForSemanticSegmentation(config), BANDS).eval()
    processor = ViTPSegmentationImageProcessor(input_spec=SPEC)
    model.save_pretrained(tmp_path / "land")
    processor.save_pretrained(tmp_path / "land")
    values, path = scene
    found, note = result_of(Models(TINY, fine_tuned=[str(tmp_path / "land")]), path, None, "land")
    inputs = processor(values, input_data_format="channels_first", return_tensors="pt")
    with torch.no_grad():
        outputs = model(**inputs)
    (expected,) = processor.post_process_semantic_segmentation(outputs, target_sizes=[(56, 84)])
    assert (found.labels == expected.numpy()).mean() > 0.999
    assert found.image.shape == (56, 84, 3) and "scene.tif" in note
