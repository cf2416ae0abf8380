"""The running Space, called by `gradio_client` and by plain HTTP: results and rejected requests."""

import configparser
import json
import os
import shutil
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path

import numpy as np
import pytest
import torch
from app import build_app, launch_options
from checking import UnavailableModel
from gradio_client import Client, handle_file
from gradio_client.exceptions import AppError
from handlers import cosine, normalized
from huggingface_hub import SpaceCard
from loading import RANDOM, TINY, Models
from maps import ATTENTION, FROM_CLS, FROM_POINT, PCA, ROLLOUT, SIMILARITY, TWIN
from packaging.requirements import Requirement
from paths import ROOT
from pictures import picture, png_file
from PIL import Image
from tiny_models import HEAD, VISION, adapter_config
from transformers import AutoModel

from modeling_vitp import (
    ViTPForSemanticSegmentation,
    ViTPSegmentationConfig,
    ViTPSegmentationImageProcessor,
    ViTPVisionConfig,
    ViTPVisionModel,
    convert_checkpoint,
    export_backbone,
)
from modeling_vitp.hub.upload import gather_contents


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("backbone")
    export_backbone(ViTPVisionModel(ViTPVisionConfig(**VISION, initializer_range=0.3)), folder)
    return str(folder)


@pytest.fixture(scope="module")
def fine_tuned(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fine_tuned")
    config = ViTPSegmentationConfig(backbone_config=adapter_config(), **HEAD)
    ViTPForSemanticSegmentation(config).save_pretrained(folder)
    ViTPSegmentationImageProcessor().save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def url(folder, fine_tuned, tmp_path_factory):
    os.environ["GRADIO_TEMP_DIR"] = str(tmp_path_factory.mktemp("uploads"))
    app = build_app(Models(TINY, backbones=[folder], fine_tuned=[fine_tuned]))
    _, url, _ = app.launch(prevent_thread_lock=True, quiet=True, server_name="127.0.0.1", **launch_options())
    yield url
    app.close()
    del os.environ["GRADIO_TEMP_DIR"]


@pytest.fixture(scope="module")
def client(url, tmp_path_factory):
    return Client(url, verbose=False, download_files=str(tmp_path_factory.mktemp("downloads")))


@pytest.fixture
def saved(tmp_path):
    """Return a function that saves an image and returns it as an upload."""

    def save(image, name="image.png"):
        image.save(tmp_path / name)
        return handle_file(str(tmp_path / name))

    return save


@pytest.mark.slow
def test_api_functions_return_plain_values(client, saved):
    """Each function is called once; their results are tested below and with the tabs."""
    image, later = saved(picture(64, 48)), saved(picture(64, 48, seed=1), "later.png")
    calls = {
        "/about": {},
        "/maps": {"image": image},
        "/corruptions": {"image": image, "resolution": 4},
        "/two_images": {"image": image, "second_image": later},
        "/visual_tokens": {"image": image, "drop_ratio": 0.5},
        "/drop_ratios": {"image": image, "draws": 1},
        "/saved": {"image": image},
        "/ask": {"image": image, "second_image": later, "question": "What has changed?", "longest": 8},
        "/apply": {"image": image, "second_image": None},
    }
    assert set(calls) == set(client.view_api(return_format="dict", print_info=False)["named_endpoints"])
    for name, arguments in calls.items():
        answer = client.predict(**arguments, api_name=name)
        assert answer and "__type__" not in str(answer), name


def test_maps_and_features_equal_transformers(client, folder, saved):
    image = picture(6 * 14, 4 * 14)
    upload = saved(image)
    model = AutoModel.from_pretrained(folder, attn_implementation="eager").eval()
    with torch.no_grad():
        outputs = model(normalized(np.asarray(image)), output_hidden_states=True, output_attentions=True)
    states = outputs.hidden_states[2][0, 1:].double().numpy().reshape(4, 6, -1)
    attentions = [layer[0].double().numpy() for layer in outputs.attentions]
    flow = np.eye(25)
    for weights in attentions:
        flow = (weights.mean(0) + np.eye(25)) / 2 @ flow
    place = 1 + 6 * 2 + 3  # row 2, column 3
    expected = {
        (SIMILARITY, FROM_CLS): np.array([[cosine(states[r, c], states[2, 3]) for c in range(6)] for r in range(4)]),
        (ATTENTION, FROM_CLS): attentions[1][3][0, 1:].reshape(4, 6),
        (ATTENTION, FROM_POINT): attentions[1][3][place, 1:].reshape(4, 6),
        (ROLLOUT, FROM_POINT): flow[place, 1:].reshape(4, 6),
    }
    name = Path(folder).name
    settings = {"backbone": name, "layer": 2, "head": 4, "x": 100 * 3.5 / 6, "y": 100 * 2.5 / 4, "resolution": 6}
    for (kind, source), values in expected.items():
        result = client.predict(upload, kind=kind, attention_of=source, api_name="/maps", **settings)
        shown, second, npz, facts = result
        with np.load(npz) as arrays:
            np.testing.assert_allclose(arrays["map_a"], values, atol=2e-5)
            np.testing.assert_allclose(arrays["features_a"], states.transpose(2, 0, 1), atol=2e-5)
            assert arrays["kind"] == kind and arrays["backbones"].tolist() == [name]
            assert arrays["image"] == "image.png" and arrays["layers"].tolist() == [2]
        assert Image.open(shown).size == (768, 512) and second is None
        assert (facts["rows"], facts["columns"]) == (4, 6) and facts["maps"][0]["depth"] == 3


def test_backbone_is_compared_with_random_weights(client, saved):
    a, b, npz, facts = client.predict(
        saved(picture(40, 90)), second_backbone=TWIN, resolution=9, kind=PCA, api_name="/maps"
    )
    assert len({Image.open(path).size for path in (a, b)}) == 1
    with np.load(npz) as arrays:
        assert arrays["map_a"].shape == arrays["map_b"].shape == (3, 9, 4)
        assert arrays["backbones"].tolist() == [TINY, TINY + RANDOM]
        assert np.abs(arrays["features_a"] - arrays["features_b"]).max() > 0.1
    assert [one["backbone"] for one in facts["maps"]] == [TINY, TINY + RANDOM]


@pytest.mark.parametrize("size", [(61, 83), (1, 500)])
def test_marked_patch_is_brightest_in_picture(client, saved, size):
    """The map has the aspect ratio of the image and is brightest in the marked patch."""
    width, height = size
    resolution = 12
    rows, columns = (max(1, round(resolution * side / max(size))) for side in (height, width))
    row, column = rows // 3, columns // 3
    image = np.full((height, width, 3), 40, np.uint8)
    top, left = round(row * height / rows), round(column * width / columns)
    bottom, right = round((row + 1) * height / rows), round((column + 1) * width / columns)
    image[top : max(bottom, top + 1), left : max(right, left + 1)] = (255, 0, 0)
    shown, _, npz, _ = client.predict(
        saved(Image.fromarray(image)),
        kind=SIMILARITY,
        layer=1,
        x=100 * (column + 0.2) / columns,
        y=100 * (row + 0.2) / rows,
        resolution=resolution,
        api_name="/maps",
    )
    with np.load(npz) as arrays:
        assert arrays["map_a"].shape == (rows, columns)
        assert np.unravel_index(arrays["map_a"].argmax(), (rows, columns)) == (row, column)
    drawn = np.asarray(Image.open(shown).convert("RGB")).astype(int).sum(-1)
    assert max(drawn.shape) == 768 and drawn.shape[0] == max(1, round(768 * height / max(size)))
    assert drawn.shape[1] == max(1, round(768 * width / max(size)))
    middles = [
        np.clip(np.round((np.arange(n) + 0.5) * side / n).astype(int), 0, side - 1)
        for n, side in zip((rows, columns), drawn.shape)
    ]
    patches = drawn[np.ix_(*middles)]
    assert np.unravel_index(patches.argmax(), patches.shape) == (row, column) or 1 in size


@pytest.mark.parametrize(
    "name, content, complaint",
    [
        ("bomb.png", png_file(13_300, 13_300), "13,300 × 13,300"),
        ("<img src=x onerror=alert(1)>.jpg", b"<script>alert(1)</script>", "cannot be opened"),
    ],
)
def test_bad_uploads_show_message(client, tmp_path, name, content, complaint):
    (tmp_path / name).write_bytes(content)
    upload = handle_file(str(tmp_path / name))
    for endpoint in ("/maps", "/corruptions"):
        with pytest.raises(AppError) as caught:
            client.predict(upload, api_name=endpoint)
        said = str(caught.value)
        assert complaint in said
        assert "Traceback" not in said and "<" not in said and "\n" not in said


def fetch(url, body=None):
    """Return status and text of the answer to a GET request, or to a POST request with a body."""
    request = urllib.request.Request(url, body and body.encode(), {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=60) as response:
            return response.status, response.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


@pytest.mark.parametrize("path", ["/etc/passwd", __file__, "../../etc/passwd"])
def test_only_uploads_are_readable(url, path):
    file = {"path": path, "meta": {"_type": "gradio.FileData"}}
    event = {"data": [file, TINY, "none", PCA, 1, 0, 0, FROM_CLS, 5, 5, 8]}
    started = json.loads(fetch(f"{url}gradio_api/call/maps", json.dumps(event))[1])
    answer = fetch(f"{url}gradio_api/call/maps/{started['event_id']}")[1]
    assert "event: error" in answer and "root:" not in answer and "event: complete" not in answer
    for address in (f"gradio_api/file={path}", f"file={path}", f"gradio_api/file={Path(path).resolve()}"):
        assert fetch(url + address)[0] in (403, 404)


def test_unknown_model_shows_message(client, saved, tmp_path):
    upload = saved(picture(20, 20))
    for name in ("..", str(tmp_path), "<script>alert(1)</script>"):
        with pytest.raises(AppError) as caught:
            client.predict(upload, backbone=name, api_name="/maps")
        assert "<" not in str(caught.value) and "Traceback" not in str(caught.value)


def test_folder_names_do_not_expose_paths(folder, tmp_path):
    for name in ("one", "two"):
        shutil.copytree(folder, tmp_path / name / "backbone")
    models = Models(TINY, [str(tmp_path / "one" / "backbone"), str(tmp_path / "two" / "backbone")])
    assert models.names == [TINY, "one/backbone", "two/backbone"]
    (tmp_path / "one" / "backbone" / "model.safetensors").write_bytes(b"damaged")
    with pytest.raises(UnavailableModel) as caught:
        models.backbone("one/backbone")
    assert str(tmp_path) not in str(caught.value) and "one/backbone" in str(caught.value)


def test_environment_variables_name_models(monkeypatch):
    monkeypatch.setenv("VITP_MODEL", "someone/model")
    monkeypatch.setenv("VITP_BACKBONES", " someone/a , b,")
    models = Models.from_environment()
    assert models.default == "someone/model" and not models.trust_remote_code
    assert models.names == ["someone/model", "someone/a", "b"]
    monkeypatch.setenv("VITP_TRUST_REMOTE_CODE", "1")
    assert Models.from_environment().trust_remote_code


def test_full_model_and_vit_share_weights(tmp_path, model, processor):
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    models = Models(str(tmp_path))
    assert models.full_names == models.names == [tmp_path.name]
    full, backbone = models.full(), models.backbone()
    assert backbone.model is full.model.model.vision_tower and full is models.full()
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(full.model.state_dict()[name], tensor)


def test_transformers_own_full_model(tmp_path, model, processor):
    model.save_pretrained(tmp_path / "vitp")
    processor.save_pretrained(tmp_path / "vitp")
    convert_checkpoint(tmp_path / "vitp", tmp_path / "native", "internvl")
    full = Models(str(tmp_path / "native")).full()
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(full.model.state_dict()[name], tensor)
    image = picture(60, 50)
    expected = processor(images=image, text=processor.image_token, return_tensors="pt")
    given = full.processor(images=image, text=full.processor.image_token, return_tensors="pt")
    torch.testing.assert_close(given["pixel_values"], expected["pixel_values"])


def test_remote_code_requires_trust(folder, tmp_path):
    evil = tmp_path / "evil"
    shutil.copytree(folder, evil)
    marker = tmp_path / "ran"
    (evil / "code.py").write_text(f"open({str(marker)!r}, 'w')\nfrom modeling_vitp import *\n")
    config = json.loads((evil / "config.json").read_text())
    config["model_type"] = "evil"
    config["auto_map"] = {"AutoConfig": "code.ViTPVisionConfig", "AutoModel": "code.ViTPVisionModel"}
    (evil / "config.json").write_text(json.dumps(config))
    with pytest.raises(UnavailableModel, match="'evil'"):
        Models(TINY, backbones=[str(evil)])
    config["model_type"] = "internvl_vision"
    (evil / "config.json").write_text(json.dumps(config))
    assert type(Models(backbones=[str(evil)]).backbone("evil").model).__name__ == "InternVLVisionModel"
    assert not marker.exists()


def test_visitor_downloads_use_no_token_and_are_limited(hub, folder, monkeypatch):
    for name, private in (("tester/backbone", False), ("tester/private", True)):
        hub.api().create_repo(name, private=private)
        hub.api().upload_folder(repo_id=name, folder_path=folder)
    opened = Models().backbone("tester/backbone")
    reference = AutoModel.from_pretrained(folder).state_dict()
    for name, tensor in opened.model.state_dict().items():
        torch.testing.assert_close(tensor, reference[name])
    with pytest.raises(UnavailableModel, match="GB of safetensors"):
        Models(max_gb=1e-9).backbone("tester/backbone")
    monkeypatch.setenv("HF_TOKEN", hub.token("read"))
    for name in ("no/such", "tester/private"):
        with pytest.raises(UnavailableModel, match=f"'{name}'"):
            Models().backbone(name)
    assert Models(backbones=["tester/private"]).backbone("tester/private").model is not None


def test_requirements_are_those_of_the_package():
    lines = (ROOT / "space" / "requirements.txt").read_text().splitlines()
    found = {Requirement(line) for line in lines if not line.startswith(("#", "--"))}
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    needed = setup["options"]["install_requires"] + setup["options.extras_require"]["space"]
    assert found == set(map(Requirement, needed.split()))
    card = SpaceCard.load(ROOT / "space" / "README.md").data
    gradio = next(requirement for requirement in found if requirement.name == "gradio")
    assert card.sdk == "gradio" and gradio.specifier.contains(card.sdk_version)
    assert len(card.short_description) <= 60 and card.suggested_hardware == "cpu-basic"
    assert card.app_file == "app.py" and card.license == "apache-2.0" and "remote-sensing" in card.tags


@pytest.mark.slow
def test_pushed_demo_runs_without_recipe_dependencies(tmp_path):
    """Packages of the extra `recipes` that are not in `space/requirements.txt` are not imported."""
    contents = gather_contents("space", ROOT / "space/quickstart", "tester/demo")
    for name, content in contents.files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.read_bytes())
    absent = ["trl", "datasets", "peft", "evaluate", "accelerate", "cv2"]
    code = (
        f"import sys; sys.modules.update(dict.fromkeys({absent})); import app, modeling_vitp; "
        "from loading import Models; models = Models.from_environment(); app.build_app(models); app.launch_options(); "
        "print(modeling_vitp.__file__, models.default, models.full().processor.tokenizer)"
    )
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | contents.variables
    run = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert run.stdout.startswith(f"{tmp_path}/modeling_vitp/__init__.py quickstart"), run.stderr
    assert "<box>" in run.stdout
