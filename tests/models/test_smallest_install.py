"""Backbones with what `pip install modeling-vitp` brings alone: of the extras nothing is imported."""

import configparser
import subprocess
import sys

from paths import ROOT

from modeling_vitp import ViTPImageProcessor, export_backbone

EXTRAS = ["accelerate", "cv2", "datasets", "evaluate", "faster_coco_eval", "gradio", "httpx", "matplotlib", "nibabel"]
EXTRAS += ["openai", "pandas", "peft", "pycocotools", "pydicom", "rasterio", "scipy", "sklearn", "trl"]
SMALL = {"deformable_heads": 4, "spatial_prior_channels": 8}
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


def test_backbones_are_opened_used_and_exported_without_any_extra(model, tmp_path):
    folder = export_backbone(model, tmp_path / "backbone", ViTPImageProcessor())
    program = PROGRAM.format(extras=set(EXTRAS), small=SMALL, folder=str(folder))
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


def test_what_the_package_needs_is_what_a_backbone_needs():
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    needed = {line.partition(">")[0] for line in setup["options"]["install_requires"].split()}
    assert needed == {"transformers", "torch", "torchvision", "safetensors", "huggingface-hub", "pillow"}
