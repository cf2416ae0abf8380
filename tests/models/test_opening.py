"""Errors of damaged checkpoints name the file in one line; `tests/fuzz` has thousands of cases."""

import configparser
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from internvl_checkpoints import edit_json
from paths import ROOT
from tiny_models import HEAD, VISION_16

from modeling_vitp import (
    ViTPAdapter,
    ViTPBackbone,
    ViTPDetectionImageProcessor,
    ViTPFeaturePyramid,
    ViTPForChangeDetection,
    ViTPForConditionalGeneration,
    ViTPForImageClassification,
    ViTPForInstanceSegmentation,
    ViTPForObjectDetection,
    ViTPForOrientedObjectDetection,
    ViTPForSemanticSegmentation,
    ViTPImageProcessor,
    ViTPModel,
    ViTPProcessor,
    ViTPVisionConfig,
    ViTPVisionModel,
    export_backbone,
)

MISTAKES = {
    "cut short": lambda folder: cut(folder / "model.safetensors"),
    "no config": lambda folder: (folder / "config.json").unlink(),
    "no part": lambda folder: edit_json(folder / "config.json", text_config=None),
    "no number": lambda folder: edit_json(folder / "config.json", vrl_drop_ratio="x"),
    "shard missing": lambda folder: (
        (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": "b.safetensors"}}')
        and (folder / "model.safetensors").unlink()
    ),
}


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-9])


@pytest.mark.parametrize("mistake", MISTAKES)
def test_damaged_model_is_named(model, tmp_path, mistake):
    model.save_pretrained(tmp_path)
    MISTAKES[mistake](tmp_path)
    with pytest.raises((ValueError, OSError), match=str(tmp_path)) as caught:
        ViTPForConditionalGeneration.from_pretrained(tmp_path)
    assert type(caught.value) in (ValueError, OSError)


@pytest.mark.parametrize("name", ["processor_config.json", "tokenizer.json", "tokenizer_config.json"])
def test_damaged_processor_is_named(processor, tmp_path, name):
    processor.save_pretrained(tmp_path)
    cut(tmp_path / name)
    with pytest.raises(ValueError, match=f"{tmp_path}/{name}"):
        ViTPProcessor.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("image_std", [0.2, 0, 0.2]),
        ("image_mean", [float("nan")] * 3),
        ("image_mean", [1e38, 0.5, 0.5]),
        ("rescale_factor", float("inf")),
        ("rescale_factor", 0),
        ("do_normalize", []),
        ("size", {"height": -5, "width": 5}),
        ("image_std", ["a"] * 3),
        ("image_mean", None),
        ("resample", "bicubic"),
    ],
)
def test_impossible_image_setting_is_named(tmp_path, field, value):
    for processor_class in (ViTPImageProcessor, ViTPDetectionImageProcessor):
        processor_class().save_pretrained(tmp_path)
        path = tmp_path / "preprocessor_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {field: value}))
        with pytest.raises(ValueError, match=f"preprocessor_config.json.*{field} "):
            processor_class.from_pretrained(tmp_path)


def test_missing_pad_token_and_broken_template_are_named(processor, tmp_path):
    processor.save_pretrained(tmp_path)
    edit_json(tmp_path / "tokenizer_config.json", pad_token=None)
    edit_json(tmp_path / "tokenizer.json", padding=None)  # of an earlier call; it names the token, too
    with pytest.raises(ValueError, match=f"{tmp_path}.* pad_token"):
        ViTPProcessor.from_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    (tmp_path / "chat_template.jinja").write_text("{% for message in messages %}\n{{ message.content }")
    with pytest.raises(ValueError, match=f"{tmp_path}.* chat_template"):
        ViTPProcessor.from_pretrained(tmp_path)


def test_vision_config_of_whole_model_is_opened(model, tmp_path):
    model.config.vision_config.layer_norm_eps = 1e-3
    model.save_pretrained(tmp_path)
    assert ViTPVisionConfig.from_pretrained(tmp_path).layer_norm_eps == 1e-3


ADAPTER = {"deformable_heads": 4, "spatial_prior_channels": 8}
VITS = (ViTPVisionModel, ViTPBackbone)
HEADS = (
    ViTPForSemanticSegmentation,
    ViTPForChangeDetection,
    ViTPForObjectDetection,
    ViTPForOrientedObjectDetection,
    ViTPForInstanceSegmentation,
    ViTPForImageClassification,
)
CLASSES = (*VITS, ViTPAdapter, ViTPFeaturePyramid, *HEADS, ViTPModel, ViTPForConditionalGeneration)
# Classes that load each kind of folder.
KINDS = {
    "exported": VITS,
    "vit": VITS,
    "backbone": VITS,
    "adapter": (ViTPVisionModel, ViTPAdapter),
    "pyramid": (ViTPVisionModel, ViTPFeaturePyramid),
    "segmentation": (ViTPForSemanticSegmentation,),
    "change": (ViTPForChangeDetection,),
    "detector": (ViTPForObjectDetection,),
    "classifier": (ViTPForImageClassification,),
    "whole": (ViTPModel, ViTPForConditionalGeneration),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Folders of each kind, all with the same ViT except the last one."""
    torch.manual_seed(0)
    root = tmp_path_factory.mktemp("kinds")
    vit = ViTPVisionModel(ViTPVisionConfig(**VISION_16))
    export_backbone(vit, root / "exported")
    vit.save_pretrained(root / "vit")
    ViTPBackbone.from_pretrained(root / "vit", out_features=["stage1", "stage4"]).save_pretrained(root / "backbone")
    ViTPAdapter.from_backbone(vit, **ADAPTER).save_pretrained(root / "adapter")
    ViTPFeaturePyramid.from_backbone(vit, pyramid_channels=8).save_pretrained(root / "pyramid")
    for name, model_class in (("segmentation", ViTPForSemanticSegmentation), ("change", ViTPForChangeDetection)):
        model_class.from_backbone(vit, backbone_kwargs=ADAPTER, **HEAD).save_pretrained(root / name)
    detector = ViTPForObjectDetection.from_backbone(
        vit, "pyramid", backbone_kwargs={"pyramid_channels": 8}, neck_channels=16, head_hidden_size=16, num_labels=2
    )
    detector.save_pretrained(root / "detector")
    ViTPForImageClassification.from_backbone(vit, num_labels=2).save_pretrained(root / "classifier")
    return root, vit.state_dict()


def check_vit(model, weights):
    """Check that a model contains these weights of a ViT."""
    found = getattr(model, "backbone", model).state_dict()
    assert {name for name, weight in weights.items() if not torch.equal(weight, found[name])} == set()


@pytest.mark.parametrize("kind", KINDS)
def test_folder_opens_by_its_model_type(folders, tokenizer, model, kind):
    root, weights = folders
    classes = KINDS[kind]
    if kind == "whole":
        model.save_pretrained(root / kind)
    for model_class in CLASSES:
        # A neck class may initialize a new neck on a ViT alone.
        if issubclass(model_class, (ViTPAdapter, ViTPFeaturePyramid)) and classes == VITS:
            continue
        if model_class in classes:
            opened, report = model_class.from_pretrained(root / kind, output_loading_info=True)
            assert not report["missing_keys"], model_class
            if kind != "whole":
                check_vit(opened, weights)
        elif (kind, model_class) in (("adapter", ViTPBackbone), ("pyramid", ViTPBackbone)):
            with pytest.raises(ValueError, match="vitp_backbone"):
                model_class.from_pretrained(root / kind)
        else:
            with pytest.raises(ValueError, match=f"{root / kind} is a "):
                model_class.from_pretrained(root / kind)


@pytest.mark.parametrize("kind", ["segmentation", "detector"])
def test_backbone_of_fine_tuned_model_starts_others(folders, tmp_path, kind):
    """The saved backbone is loaded with its neck by `from_backbone`, and its ViT as a backbone of other models."""
    root, weights = folders
    (model_class,) = KINDS[kind]
    tuned = model_class.from_pretrained(root / kind)
    for start in (ViTPAdapter.from_backbone, ViTPForImageClassification.from_backbone):
        with pytest.raises(ValueError, match=model_class.__name__):
            start(root / kind)
    tuned.backbone.save_pretrained(tmp_path / "maps")
    again = type(tuned.backbone).from_backbone(tmp_path / "maps").state_dict()
    assert all(torch.equal(again[name], weight) for name, weight in tuned.backbone.state_dict().items())
    vit = ViTPVisionModel.from_pretrained(tmp_path / "maps")
    check_vit(ViTPVisionModel.from_pretrained(export_backbone(vit, tmp_path / "vit")), weights)
    check_vit(ViTPFeaturePyramid.from_backbone(vit, pyramid_channels=8), weights)


def test_backbone_of_classifier_is_exported(folders, tmp_path):
    root, weights = folders
    with pytest.raises(ValueError, match="ViTPForImageClassification"):
        ViTPForImageClassification.from_backbone(root / "classifier")
    with pytest.raises(ValueError, match="ViTPForImageClassification"):
        export_backbone(root / "classifier", tmp_path / "vit")
    vit = ViTPForImageClassification.from_pretrained(root / "classifier").backbone
    check_vit(ViTPVisionModel.from_pretrained(export_backbone(vit, tmp_path / "vit")), weights)
    check_vit(ViTPAdapter.from_backbone(vit, **ADAPTER), weights)


def test_model_on_vit_is_not_exported(folders, tmp_path):
    root, _ = folders
    for kind in ("adapter", "pyramid", "segmentation", "classifier"):
        model_class = KINDS[kind][-1]
        with pytest.raises(ValueError, match=model_class.__name__):
            export_backbone(model_class.from_pretrained(root / kind), tmp_path / "vit")
        assert not (tmp_path / "vit").exists()


def test_layer_backbone_starts_models(folders):
    root, weights = folders
    for start in (root / "backbone", ViTPBackbone.from_pretrained(root / "backbone")):
        adapter = ViTPAdapter.from_backbone(start, **ADAPTER)
        check_vit(adapter, weights)
        assert adapter.out_features == ["stride4", "stride8", "stride16", "stride32"]


EXTRAS = ["accelerate", "cv2", "datasets", "evaluate", "faster_coco_eval", "gradio", "httpx", "matplotlib", "nibabel"]
EXTRAS += ["openai", "pandas", "peft", "pycocotools", "pydicom", "rasterio", "scipy", "sklearn", "trl"]
PROGRAM = """
import sys

class WithoutExtras:
    def __init__(self, finder):
        self.finder = finder

    def __getattr__(self, name):
        return getattr(self.finder, name)

    def find_spec(self, name, *args):
        return None if name.partition(".")[0] in {extras} else self.finder.find_spec(name, *args)

sys.meta_path[:] = map(WithoutExtras, sys.meta_path)

import torch
from PIL import Image
from transformers import AutoBackbone, AutoImageProcessor, AutoModel
from modeling_vitp import ViTPBackbone, ViTPForSemanticSegmentation, ViTPVisionModel, export_backbone

image = Image.new("RGB", (90, 70), (40, 90, 30))
inputs = AutoImageProcessor.from_pretrained({folder!r})(image, return_tensors="pt")
with torch.no_grad():
    plain = AutoModel.from_pretrained({folder!r})(**inputs).last_hidden_state
    assert torch.equal(ViTPVisionModel.from_pretrained({folder!r})(**inputs).last_hidden_state, plain)
    assert plain.shape == (1, 17, 32)
    backbone = ViTPBackbone.from_pretrained({folder!r}, out_indices=[1, 3])
    assert [tuple(one.shape) for one in backbone(**inputs).feature_maps] == [(1, 32, 4, 4)] * 2
    model = ViTPForSemanticSegmentation.from_backbone({folder!r}, backbone_kwargs={small}, num_labels=3)
    assert model.eval()(**inputs).logits.shape[:2] == (1, 3)
export_backbone(ViTPVisionModel.from_pretrained({folder!r}), {folder!r} + "_again")
assert not {extras} & {{name.partition(".")[0] for name in sys.modules}}
"""


@pytest.mark.slow
def test_backbones_work_without_extras(model, tmp_path):
    folder = export_backbone(model, tmp_path / "backbone", ViTPImageProcessor())
    program = PROGRAM.format(extras=set(EXTRAS), small=ADAPTER, folder=str(folder))
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


def test_requirements_are_those_of_backbone():
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    needed = {line.partition(">")[0] for line in setup["options"]["install_requires"].split()}
    assert needed == {"transformers", "torch", "torchvision", "safetensors", "huggingface-hub", "pillow"}
