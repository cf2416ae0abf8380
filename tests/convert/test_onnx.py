import contextlib
import io
import json
import shutil
import sys
from types import SimpleNamespace

import onnxruntime
import pytest
import torch
from onnxscript import ir
from PIL import Image
from tiny_models import VISION, adapter_config
from transformers import AutoModel

from modeling_vitp import (
    ViTPConfig,
    ViTPImageProcessor,
    ViTPVisionConfig,
    ViTPVisionModel,
    export_backbone,
    export_timm,
)
from modeling_vitp.__main__ import main
from modeling_vitp.convert import onnx

SIZES = [(1, 56, 56), (2, 42, 126), (3, 28, 28)]  # batch, height, width; the first is the position embeddings' size

pytestmark = pytest.mark.slow


def write_backbone(folder, seed=0):
    torch.manual_seed(seed)
    model = ViTPVisionModel(ViTPVisionConfig(**VISION | {"num_hidden_layers": 1})).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn_like(weight) * 0.15)
    return export_backbone(model.to(torch.bfloat16), folder)


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """Backbone in bfloat16, the folder with its graph, and the output of the command."""
    folder = tmp_path_factory.mktemp("onnx")
    write_backbone(folder / "backbone")
    (folder / "graphs").mkdir()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as printed:
        patch.setattr(sys, "argv", ["vitp"])
        with pytest.raises(SystemExit) as end:
            main(["export_onnx", str(folder / "backbone"), str(folder / "graphs/vit.onnx")])
    assert end.value.code == 0
    return SimpleNamespace(folder=folder, printed=printed.getvalue())


@pytest.fixture
def features(exported):
    """Return a function from pixels to transformers' own features and their mean over the patches."""
    model = AutoModel.from_pretrained(exported.folder / "backbone", dtype=torch.float32).eval()

    @torch.no_grad()
    def run(pixels):
        states = model(pixels).last_hidden_state
        assert states.std() > 0.3
        return states, states[:, 1:].mean(1)

    return run


@pytest.mark.parametrize("size", SIZES)
def test_graph_has_the_features_at_other_sizes(exported, features, size):
    pixels = torch.randn(size[0], 3, *size[1:], generator=torch.Generator().manual_seed(1))
    session = onnxruntime.InferenceSession(exported.folder / "graphs/vit.onnx")
    found = session.run(["last_hidden_state", "pooler_output"], {"pixel_values": pixels.numpy()})
    for one, other in zip(found, features(pixels)):
        torch.testing.assert_close(torch.from_numpy(one), other, atol=1e-4, rtol=0)


def test_metadata_has_the_settings_of_the_image_processor(exported):
    metadata = onnxruntime.InferenceSession(exported.folder / "graphs/vit.onnx").get_modelmeta().custom_metadata_map
    metadata = {key: json.loads(value) for key, value in metadata.items()}
    keys = {"model_type", "image_mean", "image_std", "rescale_factor", "do_resize", "size", "resample"}
    assert metadata.keys() == keys and metadata["resample"] == Image.Resampling.BICUBIC
    assert metadata["image_mean"] == [0.485, 0.456, 0.406] and metadata["image_std"] == [0.229, 0.224, 0.225]
    assert metadata["size"] == {"height": 56, "width": 56} and metadata["do_resize"] is True


def test_metadata_is_the_same_for_timm(tmp_path):
    model = ViTPVisionModel(ViTPVisionConfig(**VISION))
    image_processor = ViTPImageProcessor(image_mean=[0.1, 0.2, 0.3], input_spec={"window": [0, 3000]})
    found = []
    for export in (export_backbone, export_timm):
        folder = export(model, tmp_path / export.__name__, image_processor)
        found.append(onnx.describe_inputs(folder, onnx.open_model(folder)))
        assert found[-1].pop("model_type")
    assert found[0] == found[1] and "[0.1, 0.2, 0.3]" in found[1]["image_mean"] and "3000" in found[1]["input_spec"]


def failing(words, capsys, patch) -> tuple[str, int]:
    """Return the last line and the status of a command that fails."""
    patch.setattr(sys, "argv", ["vitp"])
    with pytest.raises(SystemExit) as end:
        main(["export_onnx", *map(str, words)])
    return capsys.readouterr().err.splitlines()[-1], end.value.code


@pytest.fixture
def other_graph(exported, monkeypatch):
    """Replace the export of any model by the graph of another one."""
    graph = exported.folder / "graphs/vit.onnx"
    monkeypatch.setattr(onnx, "export_program", lambda model: None)
    written = SimpleNamespace(model=ir.load(graph), save=lambda file: shutil.copyfile(graph, file))
    monkeypatch.setattr(torch.onnx, "export", lambda *args, **kwargs: written)


def test_graph_with_other_features_is_not_written(other_graph, exported, tmp_path, capsys, monkeypatch):
    write_backbone(tmp_path / "backbone", seed=1)
    (tmp_path / "graphs").mkdir()
    words = [tmp_path / "backbone", tmp_path / "graphs/vit.onnx"]
    line, status = failing(words, capsys, monkeypatch)
    assert status == 1 and "outputs of the graph differ" in line and "1.0e-03" in line
    assert list((tmp_path / "graphs").iterdir()) == []
    words = [exported.folder / "backbone", tmp_path / "graphs/vit.onnx", "--tolerance", "1e-9"]
    line, status = failing(words, capsys, monkeypatch)
    assert status == 1 and "1.0e-09" in line and list((tmp_path / "graphs").iterdir()) == []


def test_nan_features_differ(other_graph, exported, tmp_path, monkeypatch):
    monkeypatch.setattr(onnx, "difference", lambda graph, session, size: float("nan"))
    with pytest.raises(onnx.FeaturesDiffer, match="by nan"):
        onnx.export_onnx(exported.folder / "backbone", tmp_path / "vit.onnx")
    assert list(tmp_path.iterdir()) == []


def test_other_models_are_refused(tmp_path, capsys, monkeypatch):
    ViTPConfig(vision_config=VISION).save_pretrained(tmp_path / "whole")
    adapter_config().save_pretrained(tmp_path / "adapter")
    line, status = failing([tmp_path / "whole", tmp_path / "vit.onnx"], capsys, monkeypatch)
    assert status == 2 and "is a vision-language model" in line and "vitp export_backbone" in line
    line, status = failing([tmp_path / "adapter", tmp_path / "vit.onnx"], capsys, monkeypatch)
    assert status == 2 and "'vitp_adapter'" in line and "vitp_segmentation" in line
    assert not list(tmp_path.glob("*vit.onnx*"))
