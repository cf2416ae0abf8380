"""What is shown of the backbone in a fine-tuning."""

import dense_data
import numpy as np
import pytest
import torch
from torchvision.transforms.v2 import functional as F

from modeling_vitp import ViTPForSemanticSegmentation, ViTPSegmentationImageProcessor
from modeling_vitp.dense.data import DenseData
from modeling_vitp.dense.trainer import DenseTrainer, DenseTrainingArguments


@pytest.mark.parametrize(("neck", "first"), [("adapter", 0), ("pyramid", 1)])
@pytest.mark.parametrize(("size", "rows"), [((20, 100), 1), ((40, 100), 2), ((64, 64), 4)])
def test_features_are_those_of_the_patches_in_the_image(tmp_path, neck, first, size, rows):
    kwargs = dense_data.BACKBONE if neck == "adapter" else {"pyramid_channels": 16}
    model = ViTPForSemanticSegmentation.from_backbone(
        dense_data.tiny_backbone(), neck, num_labels=2, backbone_kwargs=kwargs, **dense_data.HEAD
    ).eval()
    args = DenseTrainingArguments(output_dir=str(tmp_path), use_cpu=True, bf16=False)
    encoding = DenseData(classes=dense_data.TWO, splits={"train": {"image": "{name}.png"}}, root=str(tmp_path)).encoding
    trainer = DenseTrainer(model, args, encoding, "mean_iou")
    image = torch.randint(0, 256, (3, *size), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))

    scale = 64 / max(size)
    resized = F.resize(image, [round(size[0] * scale), 64], antialias=True).double().numpy() / 255
    processor = ViTPSegmentationImageProcessor()
    mean, std = (np.array(values)[:, None, None] for values in (processor.image_mean, processor.image_std))
    pixels = torch.from_numpy((resized - mean) / std).float()[None]
    with torch.no_grad():
        features = trainer.patch_features(image)
        states = model.backbone(pixels, output_hidden_states=True).hidden_states[-1][0, first:]
        pair = trainer.component_maps([[image, image]], tmp_path)[0]
    assert features.shape == (32, rows, 4)
    for row in range(rows):
        for column in range(4):
            torch.testing.assert_close(features[:, row, column], states[4 * row + column], atol=1e-5, rtol=1e-4)
    assert pair.shape == (rows, 8, 3) and np.array_equal(pair[:, :4], pair[:, 4:])
