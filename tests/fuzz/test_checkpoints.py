"""Damaged checkpoints and configurations of models are opened as they are, or an error names the file."""

import random
import shutil

import pytest
import torch
from fuzzing import alter_file, check_outcomes, limits, outcome
from internvl_checkpoints import FIXTURE
from safetensors.torch import load_file, save_file
from tiny_models import HEAD, adapter_config, vivid_model
from transformers.utils import logging

from modeling_vitp import (
    ViTPDetectionImageProcessor,
    ViTPForConditionalGeneration,
    ViTPForInstanceSegmentation,
    ViTPForSemanticSegmentation,
    ViTPImageProcessor,
    ViTPProcessor,
    ViTPSegmentationConfig,
    ViTPSegmentationImageProcessor,
    ViTPVisionModel,
    convert_checkpoint,
    export_backbone,
)
from modeling_vitp.pretraining.loading import load_checkpoint

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]
DETECTOR = {"neck_channels": 16, "head_hidden_size": 32, "num_labels": 3}
PREPROCESSOR = "preprocessor_config.json"
PROCESSOR = ("chat_template.jinja", "processor_config.json", "tokenizer.json", "tokenizer_config.json")


@pytest.fixture(scope="module")
def sound(tokenizer, tmp_path_factory):
    """Return a folder of each model type, without code and cards."""
    folder = tmp_path_factory.mktemp("sound")
    model, processor = vivid_model(tokenizer)
    for name, size in (("vitp", "5GB"), ("sharded", "100KB")):
        model.save_pretrained(folder / name, max_shard_size=size)
        processor.save_pretrained(folder / name)
    export_backbone(model, folder / "backbone", processor.image_processor)
    dense = ViTPForSemanticSegmentation(ViTPSegmentationConfig(backbone_config=adapter_config(), **HEAD))
    dense.save_pretrained(folder / "dense")
    ViTPSegmentationImageProcessor().save_pretrained(folder / "dense")
    config = ViTPForInstanceSegmentation.config_class(backbone_config=adapter_config(), **DETECTOR)
    ViTPForInstanceSegmentation(config).save_pretrained(folder / "detector")
    ViTPDetectionImageProcessor().save_pretrained(folder / "detector")
    (folder / "original").mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copy(FIXTURE / name, folder / "original")
    for path in folder.glob("*/*.py"):
        path.unlink()
    return folder


@pytest.fixture(autouse=True)
def quiet():
    """Collect the loading reports."""
    before = logging.get_verbosity()
    logging.set_verbosity(logging.CRITICAL)
    logging.disable_progress_bar()
    yield
    logging.set_verbosity(before)
    logging.enable_progress_bar()


def alter_tensors(rng, path):
    """Change the tensors: one missing, renamed, of another shape or dtype, NaN, or one more."""
    tensors = load_file(path)
    name = rng.choice(sorted(tensors))
    way = rng.choice(["missing", "renamed", "shape", "dtype", "more", "nan"])
    tensor = tensors.pop(name) if way in ("missing", "renamed") else tensors[name]
    if way == "dtype":
        tensors[name] = tensor.to(rng.choice([torch.int8, torch.bool, torch.int64]))
    elif way != "missing":
        changed = {"renamed": tensor, "more": tensor.clone(), "nan": tensor * torch.nan}
        changed["shape"] = tensor.flatten()[:-1].clone()
        tensors[{"renamed": f"{name}x", "more": "x"}.get(way, name)] = changed[way]
    save_file(tensors, path, {"format": "pt"})


def alter(rng, folder, names):
    """Damage one file of a folder."""
    path = rng.choice(sorted(path for path in folder.iterdir() if names is None or path.name in names))
    way = rng.random()
    if way < 0.08:
        path.unlink()
        if way < 0.03:
            path.mkdir()
    elif path.suffix == ".safetensors" and way < 0.5:
        alter_tensors(rng, path)
    else:
        alter_file(rng, path)


def opened(cls):
    """Open a folder, and compare the weights with the file and missing weights with the report."""

    def open_it(folder):
        model, report = cls.from_pretrained(folder, output_loading_info=True)
        held = {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}
        found = model.state_dict()
        tied = {} if not hasattr(model, "all_tied_weights_keys") else model.all_tied_weights_keys
        for name, tensor in found.items():
            if name in held:
                assert torch.equal(tensor, held[name].to(tensor.dtype)) or held[name].isnan().any()
            else:
                is_created = name.endswith(("cls_token", "num_batches_tracked"))
                assert name in report["missing_keys"] or name in tied or is_created

    return open_it


def converted(**options):
    def convert(folder):
        target = folder.with_name("target")
        shutil.rmtree(target, ignore_errors=True)
        try:
            convert_checkpoint(folder, target, license="mit", **options)
        finally:
            assert target.exists() or not list(folder.parent.glob(".target*"))

    return convert


def build_dense(folder):
    return ViTPForSemanticSegmentation.from_backbone(folder, "pyramid", **HEAD)


WAYS = {
    "the vision-language model": ("vitp", opened(ViTPForConditionalGeneration), None),
    "shards": ("sharded", opened(ViTPForConditionalGeneration), None),
    "the ViT": ("backbone", opened(ViTPVisionModel), ("config.json", "model.safetensors")),
    "a dense model": ("dense", opened(ViTPForSemanticSegmentation), ("config.json", "model.safetensors")),
    "a detector": ("detector", opened(ViTPForInstanceSegmentation), ("config.json", "model.safetensors")),
    "a detector's image processor": ("detector", ViTPDetectionImageProcessor.from_pretrained, (PREPROCESSOR,)),
    "a dense model on a ViT": ("backbone", build_dense, None),
    "the processor": ("vitp", ViTPProcessor.from_pretrained, PROCESSOR),
    "the image processor": ("backbone", ViTPImageProcessor.from_pretrained, (PREPROCESSOR,)),
    "the start of a training": ("vitp", load_checkpoint, None),
    "convert, original": ("original", converted(), None),
    "convert, to internvl": ("vitp", converted(to="internvl"), None),
    "convert, to original": ("dense", converted(to="original"), None),
    "export": ("vitp", lambda folder: export_backbone(folder, folder.with_name("exported")), None),
}


@pytest.mark.parametrize("way", WAYS)
def test_damaged_checkpoint_is_named(way, sound, tmp_path):
    source, load, names = WAYS[way]
    load(shutil.copytree(sound / source, tmp_path / "as it was"))
    results = []
    with limits():
        for number in range(40):
            folder = tmp_path / "damaged"
            shutil.copytree(sound / source, folder)
            alter(random.Random(f"{way} {number}"), folder, names)
            kinds = (ValueError, OSError)
            results.append(outcome(lambda: load(folder), str(folder), kinds=kinds))  # noqa: B023 called at once
            shutil.rmtree(folder)
    check_outcomes(results, 5)
