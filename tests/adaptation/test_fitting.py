"""Models of an adaptation that do not fit are reported at once; images that look alike are not called the same."""

import time
from pathlib import Path

import numpy as np
import pytest
from classification_data import write_folders
from PIL import Image, ImageFilter
from vision_families import save_language_model, save_vit

from modeling_vitp import ViTPVisionConfig, ViTPVisionModel, adapt, export_backbone
from modeling_vitp.adaptation import adapt as adapting
from modeling_vitp.adaptation.labels import read_labels
from modeling_vitp.adaptation.overlap import find_pairs, images_of_files, index_images, likeness
from modeling_vitp.evaluation.comparison import Progress
from modeling_vitp.input_spec import InputSpec

MOST_SECONDS = 30
WIDTH_48 = {"hidden_size": 48, "num_hidden_layers": 4, "num_attention_heads": 3, "intermediate_size": 96}


class Built(Exception):
    """Raised where the models are built, and questions would be made."""


@pytest.fixture
def stop_when_built(monkeypatch):
    def make_all_questions(*args):
        raise Built

    monkeypatch.setattr(adapting, "make_all_questions", make_all_questions)


@pytest.fixture
def in_time():
    """Check that a test takes at most 30 seconds."""
    start = time.monotonic()
    yield
    assert time.monotonic() - start < MOST_SECONDS


@pytest.fixture
def models(tmp_path):
    """Return a folder with a ViT `vit` with patches of 14, and a language model `text`."""
    save_vit(tmp_path / "vit", "dinov2")
    save_language_model(tmp_path / "text")
    return tmp_path


def run(folder: Path, **settings):
    """Run `vitp adapt` on small models."""
    given = {
        "start": str(folder / "vit"),
        "language_model": str(folder / "text"),
        "output_dir": folder / "out",
        "pretraining": {"bf16": False},
        "fine_tuning": {"bf16": False},
    }
    return adapt(folder / "data", **given | settings)


def write_masks(folder: Path) -> None:
    for index in range(12):
        pixels = np.random.default_rng(index).integers(0, 256, (64, 64, 3), dtype=np.uint8)
        mask = np.zeros((64, 64), np.uint8)
        mask[: 8 + index, :32] = 1
        for name, values in (("images", pixels), ("masks", mask)):
            (folder / name).mkdir(parents=True, exist_ok=True)
            Image.fromarray(values).save(folder / name / f"{index:03d}.png")


def test_baseline_with_other_patches_fits(models, in_time, stop_when_built):
    """The start has patches of 14 and the baseline of 16 pixels."""
    write_folders(models / "data", {"": 6}, ("field", "forest"))
    save_vit(models / "clip", "clip_vision_model")
    with pytest.raises(Built):
        run(models, baselines=["start", "mae", str(models / "clip")])
    assert "models" in Progress(models / "out" / "progress.json").parts


def test_baseline_without_weights_is_named(models, in_time, stop_when_built):
    write_folders(models / "data", {"": 6}, ("field", "forest"))
    save_vit(models / "empty", "clip_vision_model")
    (models / "empty" / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="baselines: .*empty.*weights"):
        run(models, baselines=["start", str(models / "empty")])
    with pytest.raises(Built):  # The settings may change, because nothing was trained.
        run(models, baselines=["start"])


@pytest.mark.parametrize("option", ["start", "baselines"])
def test_neck_that_does_not_fit_is_mended_by_an_option_of_adapt(models, in_time, stop_when_built, option):
    write_masks(models / "data")
    narrow = str(models / "narrow")
    export_backbone(ViTPVisionModel(ViTPVisionConfig(**WIDTH_48, image_size=[64, 64], patch_size=[16, 16])), narrow)
    settings = {"start": narrow} if option == "start" else {"baselines": ["start", narrow]}
    heads = {"deformable_heads": 8}  # of the start of 32 channels, and not of 48
    with pytest.raises(ValueError, match=f"{option}: .*narrow.*--fine_tuning '.*pyramid"):
        run(models, fine_tuning={"bf16": False, "backbone": heads}, **settings)
    with pytest.raises(Built):
        run(models, fine_tuning={"bf16": False, "neck": "pyramid"}, **settings)


def write_alike(folder: Path, number: int, share: float) -> None:
    """Write images of two classes that share a pattern and differ in a texture, which has a share of the contrast."""
    rows, columns = np.mgrid[:96, :96]
    pattern = np.sin(rows / 9) + np.cos(columns / 13) + np.sin((rows + columns) / 17)
    pattern /= pattern.std()
    for index in range(number):
        noise = np.random.default_rng(index).integers(0, 256, (96, 96), dtype=np.uint8)
        texture = np.asarray(Image.fromarray(noise).filter(ImageFilter.GaussianBlur(2)), float)
        texture = (texture - texture.mean()) / texture.std()
        gray = 128 + 40 * (np.sqrt(1 - share) * pattern + np.sqrt(share) * texture)
        path = folder / ("field", "forest")[index % 2] / f"{index:03d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(gray.clip(0, 255).astype(np.uint8)).convert("RGB").save(path)


@pytest.fixture
def stop_when_checked(monkeypatch):
    def make_plan(*args):
        raise Built

    monkeypatch.setattr(adapting, "make_plan", make_plan)


def test_independent_images_that_look_alike_do_not_stop(models, in_time, stop_when_checked, quick_prior):
    write_alike(models / "data", 24, 0.15)
    labels = read_labels(models / "data", models / "splits")
    spec = InputSpec.from_dict(None)
    training_images = images_of_files(labels.images["train"])
    pairs = find_pairs(index_images(images_of_files(labels.images["test"]), spec), training_images)
    assert pairs and 0.8 < pairs[0].match.score < 0.95
    assert likeness(training_images, spec, 0) > pairs[0].match.score
    with pytest.raises(Built):
        run(models)
    checks = Progress(models / "out" / "progress.json").parts["checks"]["result"]
    assert (checks["overlap"], checks["overlap_problems"], checks["compared"]) == (0, [], [1.0, 1.0])


def test_test_image_in_the_training_data_stops_unless_allowed(models, in_time, stop_when_checked, quick_prior):
    """The finding is kept, shows the pair, and has an option of its own."""
    write_alike(models / "data", 24, 0.9)
    labels = read_labels(models / "data", models / "out" / "splits")
    copied = labels.images["test"][0]
    for split, images in labels.images.items():
        for path in images:
            target = models / "split" / split / path.parent.name / path.name
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(path.read_bytes())
    with Image.open(copied) as image:
        image.save(models / "split" / "train" / copied.parent.name / "copy.jpg", quality=85)
    settings = {"output_dir": models / "again"}
    (models / "data").rename(models / "unsplit")
    (models / "split").rename(models / "data")
    for _ in range(2):
        with pytest.raises(ValueError, match=rf"^1 test image.*{copied.name}.*overlap\.png.*--allow_overlap"):
            run(models, **settings)
    assert (models / "again" / "validation" / "overlap.png").is_file()
    with pytest.raises(Built):
        run(models, allow_overlap=True, **settings)


def test_suspicion_is_stated_as_one(models, in_time, stop_when_checked, quick_prior):
    """Training images do not resemble each other, and a test image resembles one of them, but not exactly."""
    write_alike(models / "data", 24, 0.9)
    labels = read_labels(models / "data", models / "out" / "splits")
    test_image, training_image = labels.images["test"][0], labels.images["train"][0]
    pixels = np.asarray(Image.open(test_image), float)
    noise = np.random.default_rng(0).normal(0, 60, pixels.shape[:2])
    similar = Image.fromarray((pixels + noise[..., None]).clip(0, 255).astype(np.uint8))
    similar.filter(ImageFilter.GaussianBlur(1)).save(training_image)
    spec = InputSpec.from_dict(None)
    pairs = find_pairs(index_images(images_of_files([test_image]), spec), images_of_files([training_image]))
    assert pairs and not pairs[0].is_same
    # The same files in the same splits, because the labels are those of an earlier call.
    with pytest.raises(ValueError, match="perhaps in the training data"):
        run(models, output_dir=models / "out2")
