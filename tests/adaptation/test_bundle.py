"""Bundles of adaptations: opened by the libraries they are for, written twice, and pushed to the Hub of the tests."""

import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import onnxruntime
import pandas as pd
import pyarrow.parquet as pq
import pytest
import timm
import torch
import yaml
from huggingface_hub import ModelCard
from pictures import picture
from pushed_runs import card_of, in_repo, push
from tiny_models import VISION
from transformers import AutoImageProcessor, AutoModel, AutoModelForImageClassification
from vision_families import save_vit

from modeling_vitp import (
    ViTPForImageClassification,
    ViTPImageProcessor,
    ViTPVisionConfig,
    ViTPVisionModel,
    export_backbone,
)
from modeling_vitp.adaptation.bundle import write_bundle
from modeling_vitp.hub.upload import write_model_card
from modeling_vitp.modeling_vitp_backbone import open_vit

NO_ONNX = "The backbone was not exported for ONNX: import of onnxruntime halted; None in sys.modules."
NO_TIMM = "The backbone was not exported for timm: Expected an InternViT for the format of timm, got a 'dinov2'."
UNREAD = "1 of 6 images have no embedding, because they cannot be read."
PICTURE = "pictures/side by side.png"


@dataclass
class Report:
    pictures: list[str]
    models: dict[str, str]
    command: str = ""

    def save(self, folder: Path) -> None:
        texts = ["# Adaptation", "**Keep dinov2-base.**", *self.models.values(), self.command]
        (folder / "README.md").write_text("\n\n".join(texts) + "\n\n![side](pictures/side%20by%20side.png)\n")
        (folder / "report.html").write_text("<p>Keep dinov2-base.</p>")
        (folder / "report.json").write_text(json.dumps(asdict(self)))


def without_onnx(patch) -> None:
    patch.setitem(sys.modules, "onnxruntime", None)


def make_run(folder: Path, family: str) -> None:
    """Write what `vitp adapt` has before the bundle: backbone, fine-tuned model, images and pictures."""
    backbone = folder / "pretraining/backbone"
    if family == "internvit":
        torch.manual_seed(0)
        vit = ViTPVisionModel(ViTPVisionConfig(**VISION))
        with torch.no_grad():
            for weight in vit.parameters():
                weight.add_(torch.randn_like(weight) * 0.15)
        export_backbone(vit, backbone)
    else:
        save_vit(folder / "start", family)
        export_backbone(open_vit(folder / "start"), backbone, ViTPImageProcessor())
    record = {"base_model": ["org/start"], "licenses": {"org/start": {"license": "cc-by-nc-4.0"}}}
    (backbone / "run.json").write_text(json.dumps(record))
    torch.manual_seed(0)
    model = ViTPForImageClassification.from_backbone(backbone, id2label={0: "field", 1: "forest"})
    model.save_pretrained(folder / "tuned")
    AutoImageProcessor.from_pretrained(backbone).save_pretrained(folder / "tuned")
    write_model_card("model", folder / "tuned")
    (folder / "tuned/optimizer.pt").write_bytes(b"state")
    for index in range(5):
        path = folder / "data" / "ab"[index % 2] / f"{index}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        picture(50 + 9 * index, 60, index).save(path)
    (folder / "data/a/broken.png").write_bytes(b"no image")
    (folder / "pictures").mkdir()
    picture(20, 10).save(folder / PICTURE)


def write(folder: Path) -> list[str]:
    models = {"adapted": "the backbone of this run", "start": f"{folder}/start, the start"}
    report = Report([PICTURE], models, f"vitp adapt --data {folder}/data")
    config = {"data": str(folder / "data"), "baselines": ["start", str(folder / "tuned")], "scene_pattern": "/(.*)_"}
    images = sorted((folder / "data").rglob("*.png"))
    backbone, tuned = folder / "pretraining/backbone", folder / "tuned"
    return write_bundle(report, backbone, tuned, images, folder / "bundle", config | {"seed": 0})


def read_files(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module", params=["internvit", "dinov2"])
def written(request, tmp_path_factory):
    """Return the family, the output folder and the notes of a bundle without ONNX."""
    folder = tmp_path_factory.mktemp(request.param)
    make_run(folder, request.param)
    with pytest.MonkeyPatch.context() as patch:
        without_onnx(patch)
        patch.chdir(folder)  # a path relative to a folder elsewhere may go by the root
        return request.param, folder, write(folder)


@pytest.fixture
def output(written, tmp_path):
    """Copy of the output folder of an adaptation."""
    shutil.copytree(written[1], tmp_path / "run")
    return tmp_path / "run"


@torch.no_grad()
def states_of(folder: Path | str, pixels: torch.Tensor) -> torch.Tensor:
    return AutoModel.from_pretrained(folder, dtype=torch.float32).eval()(pixels).last_hidden_state


def noise() -> torch.Tensor:
    return torch.randn(2, 3, 56, 56, generator=torch.Generator().manual_seed(0))


def test_backbone_and_fine_tuned_model_open(written):
    family, folder, notes = written
    assert notes == [NO_ONNX, *[NO_TIMM] * (family == "dinov2"), UNREAD]
    original, found = (states_of(folder / name, noise()) for name in ("pretraining/backbone", "bundle"))
    torch.testing.assert_close(found, original, atol=1e-6, rtol=0)
    if family == "internvit":
        vit = timm.create_model(f"local-dir:{folder / 'bundle/timm'}", pretrained=True).eval()
        torch.testing.assert_close(vit(noise()), original[:, 1:].mean(1), atol=1e-5, rtol=0)
    tuned = AutoModelForImageClassification.from_pretrained(folder / "bundle/fine_tuned")
    assert tuned.config.id2label == {0: "field", 1: "forest"}
    assert not (folder / "bundle/fine_tuned/optimizer.pt").exists()
    assert not (folder / "bundle/fine_tuned/README.md").exists()
    code = [path.name for path in (folder / "bundle/fine_tuned").glob("*.py")]
    assert code and all((folder / "bundle" / name).is_file() for name in code)


def test_embeddings_have_a_row_for_each_image(written):
    _, folder, _ = written
    path = folder / "bundle/embeddings.parquet"
    assert str(folder).encode() not in b"".join(pq.read_metadata(path).metadata.values())
    rows = pd.read_parquet(path)
    assert list(rows.path) == ["a/0.png", "a/2.png", "a/4.png", "b/1.png", "b/3.png"]
    processor = AutoImageProcessor.from_pretrained(folder / "pretraining/backbone")
    for row in rows.itertuples():
        image = picture(50 + 9 * int(Path(row.path).stem), 60, int(Path(row.path).stem))
        states = states_of(folder / "bundle", processor(image, return_tensors="pt")["pixel_values"])
        torch.testing.assert_close(torch.tensor(row.embedding), states[0, 1:].mean(0), atol=1e-4, rtol=0)


def test_card_report_and_configuration_are_relative(written):
    family, folder, _ = written
    files = read_files(folder / "bundle")
    found = {name for name, content in files.items() if str(folder).encode() in content}
    assert found <= {"fine_tuned/config.json"}  # transformers' `_name_or_path`, which a push leaves out
    card = ModelCard(files["README.md"].decode())
    assert card.data.license == "cc-by-nc-4.0" and card.data.base_model == ["org/start"] and "vitp" in card.data.tags
    assert card.text.lstrip().startswith("# Adaptation\n\n**Keep dinov2-base.**")
    assert "start, the start" in card.text and "vitp adapt --config adapt.yaml" in card.text
    listed = ["timm", "fine_tuned", "embeddings.parquet", "report.html", "adapt.yaml"]
    assert [name for name in listed if f"| `{name}` |" not in card.text] == ["timm"] * (family == "dinov2")
    assert NO_ONNX in card.text and "backbone.onnx" not in card.text
    assert files[PICTURE] == (folder / PICTURE).read_bytes()
    assert json.loads(files["report.json"])["pictures"] == [PICTURE]
    config = yaml.safe_load(files["adapt.yaml"])
    assert config["scene_pattern"] == "/(.*)_" and config["baselines"][0] == "start" and config["seed"] == 0
    assert config["data"] == "data" and config["baselines"][1] == "tuned"


def test_second_call_writes_the_same_files(written, output, monkeypatch):
    family, _, notes = written
    without_onnx(monkeypatch)
    monkeypatch.chdir(output)
    files = read_files(output / "bundle")
    (output / "bundle/model.safetensors").write_bytes(b"half")
    for name in ("timm/config.json", "fine_tuned/half.safetensors", ".backbone.onnx.abc/backbone.onnx"):
        (output / "bundle" / name).parent.mkdir(exist_ok=True)
        (output / "bundle" / name).write_bytes(b"{}")
    assert write(output) == notes
    found = read_files(output / "bundle")
    assert found.keys() == files.keys()
    assert [name for name in files if found[name] != files[name]] == []


def test_timm_opens_its_own_vit_from_the_root(tmp_path, monkeypatch):
    make_run(tmp_path, "timm_wrapper")
    without_onnx(monkeypatch)
    assert write(tmp_path) == [NO_ONNX, UNREAD]
    vit = timm.create_model(f"local-dir:{tmp_path / 'bundle'}", pretrained=True, num_classes=0).eval()
    pixels = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = states_of(tmp_path / "pretraining/backbone", pixels)
        torch.testing.assert_close(vit.forward_features(pixels), expected, atol=1e-5, rtol=0)
    assert "| `timm` |" not in (tmp_path / "bundle/README.md").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("family", ["internvit", "dinov2"])
def test_graph_has_the_features(tmp_path, family):
    make_run(tmp_path, family)
    assert write(tmp_path) == [*[NO_TIMM] * (family == "dinov2"), UNREAD]
    files = read_files(tmp_path / "bundle")
    session = onnxruntime.InferenceSession(files["backbone.onnx"])
    found = session.run(["last_hidden_state"], {"pixel_values": noise().numpy()})[0]
    expected = states_of(tmp_path / "pretraining/backbone", noise())
    torch.testing.assert_close(torch.from_numpy(found), expected, atol=1e-4, rtol=0)
    write(tmp_path)
    assert read_files(tmp_path / "bundle") == files


def test_bundle_is_pushed_whole(hub, logged_in, written, capsys):
    _, folder, _ = written
    assert push(folder, "tester/adapted", "--what", "adaptation") == 0
    files, sent = read_files(folder / "bundle"), in_repo(hub, "tester/adapted")
    assert sent.keys() == files.keys() - {"run.json"} and PICTURE in sent
    assert [name for name in sent if sent[name] != files[name]] == ["README.md", "fine_tuned/config.json"]
    torch.testing.assert_close(states_of("tester/adapted", noise()), states_of(folder / "bundle", noise()))
    card = card_of(hub, "tester/adapted")
    assert 'from_pretrained("tester/adapted"' in card.text and 'from_pretrained("bundle"' not in card.text
    text, section, code = card.text.partition("\n## Fine-tuned model\n")
    assert text == ModelCard(files["README.md"].decode()).text.replace('"bundle"', '"tester/adapted"')
    assert section and 'AutoModelForImageClassification.from_pretrained(\n    "tester/adapted"' in code
    assert card.data.license == "cc-by-nc-4.0"
    assert len(hub.repo("tester/adapted").history("main")) == 2  # of the new repo, and of the push
    assert push(folder / "bundle", "tester/again", "--what", "adaptation") == 0
    assert in_repo(hub, "tester/again").keys() == sent.keys()


@pytest.mark.slow
def test_fine_tuned_model_opens_from_the_hub(hub, logged_in, written, tmp_path):
    """The code of the card runs without this package."""
    assert push(written[1], "tester/adapted", "--what", "adaptation") == 0
    (code,) = re.findall(r"```python\n(.*?)```", card_of(hub, "tester/adapted").text.split("## Fine-tuned")[1], re.S)
    program = f"import sys\nsys.modules['modeling_vitp'] = None\n{code}\nprint(*model.config.id2label.values())"
    environment = {**os.environ, **hub.environment(tmp_path / "fresh", logged_in)}
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0 and done.stdout.split() == ["field", "forest"], done.stderr[-3000:]


WRONG_FILES = [
    ("fine_tuned/notes.txt", b"hf_" + b"a" * 34, "fine_tuned/notes.txt (a Hugging Face token)"),
    ("timm/Weights.PTH", b"weights", "timm/Weights.PTH is a pickle"),
    ("adapt.yaml", b"data: /home/me/coco\n", "adapt.yaml has an absolute path"),
    ("fine_tuned/config.json", b'{"backbone": "/home/me/vit"}', "config.json has an absolute path"),
    ("README.md", b"---\nlicense: mit\n---\n# Mine\n", "different licenses"),
]


@pytest.mark.parametrize(("name", "content", "says"), WRONG_FILES)
def test_bundle_is_refused_by_name(hub, logged_in, output, capsys, name, content, says):
    (output / "bundle" / name).parent.mkdir(exist_ok=True)
    (output / "bundle" / name).write_bytes(content)
    if name == "README.md":
        (output / "bundle/run.json").write_text('{"licenses": {"org/start": {"license": "apache-2.0"}}}')
    assert push(output, "tester/adapted", "--what", "adaptation") == 1
    assert says in capsys.readouterr().err and hub.repo("tester/adapted") is None
