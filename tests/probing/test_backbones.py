"""Backbones of this project and of other models in transformers."""

import json

import numpy as np
import pytest
import torch
from dense_data import picture_of, save
from launching import finish, start_program
from other_backbones import SMALL, save_backbone
from PIL import Image
from transformers import (
    AutoImageProcessor,
    AutoModel,
    BertConfig,
    BertModel,
    SamImageProcessor,
    SamVisionConfig,
    SamVisionModel,
    ViTImageProcessor,
)

from modeling_vitp import ViTPForImageClassification, ViTPImageClassificationConfig
from modeling_vitp.command.errors import WrongArguments
from modeling_vitp.probing.backbones import Preprocessing, load_backbone, square_size
from modeling_vitp.recipes.probe import main


@pytest.mark.parametrize(
    ("kind", "prefix", "grid"),
    [("vitp", 1, 4), ("vit", 1, 4), ("dinov2", 4, 4), ("clip", 1, 4), ("swin", 0, 8), ("convnext", 0, 8)],
)
def test_tokens_match_patch_positions(tmp_path, kind, prefix, grid):
    """Compare features with transformers, and positions in the map with those in the image."""
    backbone = load_backbone(str(save_backbone(tmp_path / "b", kind)))
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (48, 80, 3), dtype=np.uint8))
    model = AutoModel.from_pretrained(tmp_path / "b").eval()
    model = model.vision_model if kind == "clip" else model
    processor = AutoImageProcessor.from_pretrained(tmp_path / "b")
    tensor = torch.from_numpy(np.array(image)).permute(2, 0, 1)
    pixels = Preprocessing(backbone.image_processor, None)(tensor)[None]
    torch.testing.assert_close(pixels, processor(image, return_tensors="pt")["pixel_values"])
    with torch.no_grad():
        states = model(pixels).last_hidden_state
    before, maps = backbone.tokens(pixels)
    assert before.shape[1] == prefix and maps.shape[1:3] == (grid, grid)
    for row, column in ((0, 0), (1, 3), (grid - 1, 2)):
        place = states[..., row, column] if states.ndim == 4 else states[:, prefix + row * grid + column]
        torch.testing.assert_close(maps[:, row, column], place)
    torch.testing.assert_close(backbone.pool(pixels, "mean"), maps.flatten(1, 2).mean(1))
    if prefix:
        torch.testing.assert_close(backbone.pool(pixels, "cls"), states[:, 0])
        both = torch.cat([states[:, 0], states[:, prefix:].mean(1)], dim=1)
        torch.testing.assert_close(backbone.pool(pixels, "cls_mean"), both)
    else:
        with pytest.raises(ValueError, match="CLS token"):
            backbone.pool(pixels, "cls")
    # The whole image is used for masks, also if the image processor crops.
    assert square_size(backbone.image_processor) == 64
    whole = Preprocessing(backbone.image_processor, 32)(tensor)
    mean = torch.tensor(processor.image_mean).view(3, 1, 1)
    std = torch.tensor(processor.image_std).view(3, 1, 1)
    resized = np.array(image.resize((32, 32), Image.Resampling.BICUBIC)).transpose(2, 0, 1) / 255
    np.testing.assert_allclose(whole * std + mean, resized, atol=2 / 255)
    assert backbone.tokens(whole[None])[1].shape[1:3] == (grid // 2, grid // 2)


def test_resized_image_is_not_padded():
    processor = SamImageProcessor(size={"longest_edge": 64}, pad_size={"height": 64, "width": 64})
    image = torch.randint(0, 256, (3, 48, 80), dtype=torch.uint8)
    assert Preprocessing(processor, None)(image).shape == (3, 64, 64)
    assert Preprocessing(processor, 32)(image).shape == (3, 32, 32)


def test_checkpoint_uses_its_vision_tower(model_and_processor, tmp_path):
    model, processor = model_and_processor
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    backbone = load_backbone(str(tmp_path))
    image = torch.randint(0, 256, (3, 150, 60), dtype=torch.uint8)
    pixels = Preprocessing(backbone.image_processor, None)(image)[None]
    assert pixels.shape == (1, 3, 56, 56)
    expected = model.model.vision_tower.eval()(pixels).last_hidden_state[:, 1:].mean(1)
    torch.testing.assert_close(backbone.pool(pixels, "mean"), expected)


def test_random_weights_replace_trained_weights(tmp_path):
    folder = str(save_backbone(tmp_path / "b", "vitp"))
    trained = load_backbone(folder)
    first, again = (load_backbone(folder, random_seed=0) for _ in range(2))
    assert first.name == f"{folder}, random weights" and len({trained.state, first.state}) == 2
    states = [item.model.state_dict()["encoder.layer.0.attention.q_proj.weight"] for item in (trained, first, again)]
    assert torch.equal(states[1], states[2]) and not torch.equal(states[0], states[1])


@pytest.mark.parametrize(
    ("kind", "message"),
    [("nothing", "cannot be loaded"), ("bert", "of type 'bert'"), ("classifier", "from_pretrained.*backbone")],
)
def test_invalid_backbone_is_named(tmp_path, kind, message):
    if kind == "bert":
        BertModel(BertConfig(**SMALL, vocab_size=20)).save_pretrained(tmp_path / kind)
        ViTImageProcessor().save_pretrained(tmp_path / kind)
    if kind == "classifier":
        config = ViTPImageClassificationConfig(backbone_config={**SMALL, "image_size": [16, 16], "patch_size": [8, 8]})
        ViTPForImageClassification(config).save_pretrained(tmp_path / kind)
    with pytest.raises(ValueError, match=f"{kind}.*{message}"):
        load_backbone(str(tmp_path / kind))


def test_channels_last_layers_are_read(tmp_path):
    """Read the layers of SAM, which have the width last, unlike its output."""
    sizes = {"hidden_size": 32, "mlp_dim": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 32}
    sizes |= {"patch_size": 8, "output_channels": 16, "window_size": 2, "global_attn_indexes": [1]}
    torch.manual_seed(0)
    model = SamVisionModel(SamVisionConfig(**sizes)).eval()
    model.save_pretrained(tmp_path)
    ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(tmp_path)
    pixels = torch.randn(1, 3, 32, 32)
    states = model(pixels, output_hidden_states=True).hidden_states
    assert load_backbone(str(tmp_path)).maps(pixels, 2).equal(torch.cat([states[1], states[2]], dim=-1))


def test_image_size_must_be_multiple_of_patch(tmp_path):
    backbone = load_backbone(str(save_backbone(tmp_path / "b", "vit")))
    backbone.model.config.patch_size = 8
    assert backbone.in_patches(96) == 96
    with pytest.raises(ValueError, match="image_size must be a multiple of 8 x 8 pixels, .*100.* 104"):
        backbone.in_patches(100)


SPLITS = {"train": 11, "test": 6}  # Images of each of two classes.


@pytest.fixture
def words(tmp_path):
    rng = np.random.default_rng(0)
    for split, number in SPLITS.items():
        for label in (0, 1):
            for index in range(number):
                picture = picture_of(np.full((36, 40), label, dtype=np.uint8), rng)
                save(picture, tmp_path / "data" / split / f"class{label}" / f"{index:02d}.png")
    words = ["--backbones", str(save_backbone(tmp_path / "backbone", "vitp")), "--random_control", "true"]
    return [*words, "--dataset_name", str(tmp_path / "data"), "--batch_size", "4", "--device", "cpu"]


def features(folder) -> dict[str, np.ndarray]:
    return {path.name: np.load(path) for path in (folder / "features").glob("*.npy")}


@pytest.mark.slow
def test_sharded_extraction_equals_single_process(words, tmp_path):
    assert main([*words, "--output_dir", str(tmp_path / "one")]) == 0
    whole = features(tmp_path / "one")
    assert sorted(map(len, whole.values())) == [12, 12, 22, 22]

    two = [*words, "--output_dir", str(tmp_path / "two")]
    start = ["-m", "modeling_vitp.recipes.probe", *two, "--shard"]
    assert finish([start_program([*start, f"{number}/2"], tmp_path / "log") for number in (1, 2)]) == [0, 0]
    parts = features(tmp_path / "two")
    ranges = sorted(name.split(".")[1] for name in parts)
    assert ranges == sorted(2 * ["0-12", "12-22", "0-4", "4-12"])
    assert main(two) == 0
    joined = features(tmp_path / "two")
    assert joined.keys() == whole.keys() and all(np.array_equal(joined[name], whole[name]) for name in whole)
    one, other = (json.loads((tmp_path / name / "metrics.json").read_text())["results"] for name in ("one", "two"))
    assert one == other


def test_missing_shard_is_named(words, tmp_path):
    words += ["--output_dir", str(tmp_path / "out")]
    with pytest.raises(WrongArguments, match="'10/9'"):
        main([*words, "--shard", "10/9"])
    for number in range(1, 10):
        assert main([*words, "--shard", f"{number}/9"]) == 0
    assert len(features(tmp_path / "out")) == 2 * (6 + 3)  # Shards have whole batches of four.
    for path in (tmp_path / "out" / "features").glob("*.8-12.npy"):
        path.unlink()
    with pytest.raises(ValueError, match="images from 8 on, of 22"):
        main(words)
    assert [main([*words, "--shard", f"{number}/9"]) for number in range(1, 10)] == [0] * 9
    assert main(words) == 0 and len(features(tmp_path / "out")) == 4
