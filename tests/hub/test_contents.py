"""What goes to a repo, and under which license."""

import json

import pytest
import torch
from datasets import Dataset
from huggingface_hub import SpaceCard
from paths import ROOT
from pushed_runs import in_repo, push
from transformers import AutoModel

from modeling_vitp import ViTPForConditionalGeneration, export_backbone
from modeling_vitp.auto.registry import MODELS
from modeling_vitp.cards.model_card import code_example


def test_only_what_belongs_to_a_model_goes(hub, logged_in, folder):
    assert push(folder, "tester/m", "--what", "model") == 0
    files = in_repo(hub, "tester/m")
    wanted = "README.md chat_template.jinja config.json configuration_vitp.py generation_config.json metrics.json "
    wanted += "image_processing_vitp.py model.safetensors modeling_vitp.py processing_vitp.py processor_config.json "
    wanted += "bands.py input_spec.py messages.py opening.py tokenizer.json tokenizer_config.json vrl.py"
    assert set(files) == set(wanted.split())
    assert files["model.safetensors"] == (folder / "model.safetensors").read_bytes()


def test_a_backbone_is_taken_out_of_a_model_or_sent_as_it_is(hub, logged_in, folder, tmp_path):
    assert push(folder, "tester/b", "--what", "backbone") == 0
    exported = export_backbone(folder, tmp_path / "backbone")
    assert push(exported, "tester/again", "--what", "backbone") == 0
    one, two = in_repo(hub, "tester/b"), in_repo(hub, "tester/again")
    assert one["model.safetensors"] == two["model.safetensors"] == (exported / "model.safetensors").read_bytes()
    assert one["config.json"] == two["config.json"] and set(one) == {*two, "metrics.json"}
    pulled = AutoModel.from_pretrained("tester/b").state_dict()
    tower = ViTPForConditionalGeneration.from_pretrained(folder).model.vision_tower.state_dict()
    assert all(torch.equal(pulled[name], tower[name]) for name in tower)
    # A model on the Hub is as good a start as a folder.
    assert push(folder, "tester/m", "--what", "model") == 0
    assert push("tester/m", "tester/third", "--what", "backbone") == 0
    assert in_repo(hub, "tester/third")["model.safetensors"] == one["model.safetensors"]


def test_a_data_set_goes_whole_but_for_what_is_hidden(hub, logged_in, tmp_path, capsys):
    rows = tmp_path / "rows"
    (rows / "images").mkdir(parents=True)
    Dataset.from_dict({"text": ["one", "two"]}).to_parquet(rows / "train.parquet")
    for name in ("images/a.png", "LICENSE", ".hidden", "_cache.json"):
        (rows / name).write_bytes(b"content")
    assert push(rows, "tester/none", "--what", "dataset", "--license", "mit") == 0
    assert hub.api().dataset_info("tester/none").card_data.license == "mit"
    (rows / "README.md").write_text("---\nlicense: cc-by-4.0\nconfigs: []\n---\n# Rows\n")
    assert push(rows, "tester/rows", "--what", "dataset", "--license", "mit") == 1
    assert "cannot be pushed under mit" in capsys.readouterr().err
    assert push(rows, "tester/rows", "--what", "dataset", "--private") == 0
    files = in_repo(hub, "tester/rows", repo_type="dataset")
    assert files == {
        "README.md": (rows / "README.md").read_bytes(),
        "train.parquet": (rows / "train.parquet").read_bytes(),
        "images/a.png": b"content",
        "LICENSE": b"content",
    }
    assert hub.repo("tester/rows", "dataset").state["private"]
    assert "license: cc-by-4.0" in capsys.readouterr().out
    (rows / "images" / ".env").write_text("")
    assert push(rows, "tester/rows", "--what", "dataset") == 1
    assert "images/.env (a file of secrets)" in capsys.readouterr().err


def test_the_demo_goes_with_the_name_of_its_model(hub, logged_in, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("modeling_vitp.hub.upload.SPACE", tmp_path / "space")
    (tmp_path / "space" / "__pycache__").mkdir(parents=True)
    (tmp_path / "space" / "__pycache__" / "app.pyc").touch()
    (tmp_path / "space" / "app.py").write_text("import gradio")
    assert push("tester/model", "tester/demo", "--what", "space") == 1
    assert "space/ has no README.md, requirements.txt" in capsys.readouterr().err
    (tmp_path / "space" / "requirements.txt").write_text("gradio")
    (tmp_path / "space" / "README.md").write_text("---\nsdk: gradio\nlicense: apache-2.0\nmodels: [x/y]\n---\n# Demo\n")
    for _ in range(2):
        assert push("tester/model", "tester/demo", "--what", "space") == 0
    files = in_repo(hub, "tester/demo", repo_type="space")
    package = {path.relative_to(ROOT).as_posix() for path in (ROOT / "modeling_vitp").rglob("*.py")}
    assert files.keys() == {"README.md", "app.py", "requirements.txt"} | package
    assert {"modeling_vitp/__init__.py", "modeling_vitp/modeling_vitp.py", "modeling_vitp/convert/export.py"} <= package
    card = SpaceCard(files["README.md"].decode())
    assert card.data.models == ["tester/model"] and card.data.sdk == "gradio" and "# Demo" in card.text
    card.validate()
    state = hub.repo("tester/demo", "space").state
    assert state["variables"] == {"VITP_MODEL": "tester/model"} and state["sdk"] == "gradio"


def test_absolute_paths_do_not_go(hub, logged_in, folder, capsys):
    config = json.loads((folder / "config.json").read_text())
    changed = {
        **config,
        "_name_or_path": "/home/me/model",
        "text_config": {**config["text_config"], "_name_or_path": "/a/b"},
    }
    (folder / "config.json").write_text(json.dumps(changed))
    assert push(folder, "tester/m", "--what", "model") == 0
    assert json.loads(hub.files("tester/m")["config.json"]) == config
    assert not any(str(folder.parent).encode() in content for content in hub.files("tester/m").values())

    for path in ("/home/me/teacher", "~/my models/teacher", "file:///data/teacher", "C:\\models\\teacher"):
        (folder / "config.json").write_text(json.dumps({**config, "vision_config": {"teacher": path}}))
        assert push(folder, "tester/n", "--what", "model") == 1
        assert "config.json has an absolute path under 'vision_config.teacher'" in capsys.readouterr().err
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "README.md").write_text("---\nlicense: mit\n---\n# M\n\nSee https://a.b/c/d and /home/me/notes.\n")
    assert push(folder, "tester/n", "--what", "model") == 1
    assert "README.md, has an absolute path, /home/me/notes. Make" in capsys.readouterr().err
    assert hub.repo("tester/n") is None


@pytest.mark.parametrize("where", ["README.md", "run.json"])
def test_weights_keep_their_license(hub, logged_in, folder, capsys, where):
    if where == "README.md":
        (folder / where).write_text("---\nlicense: cc-by-nc-4.0\n---\n# A model\n")
    else:
        (folder / where).write_text(json.dumps({"licenses": {"some/weights": {"license": "cc-by-nc-4.0"}}}))
    for what in ("model", "backbone"):
        assert push(folder, "tester/m", "--what", what, "--license", "apache-2.0") == 1
        assert "cc-by-nc-4.0" in capsys.readouterr().err and hub.repo("tester/m") is None
    for what in ("model", "backbone"):
        assert push(folder, f"tester/{what}", "--what", what) == 0
        assert hub.api().model_info(f"tester/{what}").card_data.license == "cc-by-nc-4.0"
        assert "license: cc-by-nc-4.0" in capsys.readouterr().out


def test_licenses_of_several_sources(hub, logged_in, folder, capsys):
    def sources(*licenses):
        stated = {f"org/{number}": {"license": name} for number, name in enumerate(licenses)}
        (folder / "run.json").write_text(json.dumps({"licenses": stated}))

    sources("apache-2.0", "cc-by-nc-4.0")
    assert push(folder, "tester/a", "--what", "model") == 0
    assert hub.api().model_info("tester/a").card_data.license == "cc-by-nc-4.0"
    sources("apache-2.0", "mit")
    assert push(folder, "tester/b", "--what", "model") == 1
    assert "apache-2.0 (org/0), mit (org/1). Give one: --license" in capsys.readouterr().err
    assert push(folder, "tester/b", "--what", "model", "--license", "mit") == 0
    sources("cc-by-nc-4.0", "gpl-3.0")
    assert push(folder, "tester/c", "--what", "model") == 1
    # What a user writes into the card does not change it either.
    sources("cc-by-nc-4.0")
    (folder / "README.md").write_text("---\nlicense: gpl-3.0\n---\n# A model\n")
    assert push(folder, "tester/c", "--what", "model") == 1 and hub.repo("tester/c") is None


def test_the_example_of_an_adapter_loads_its_base_if_there_is_one():
    """Which one of a model that was composed or built from scratch has not."""
    assert 'from_pretrained("org/base"' in code_example(
        MODELS["adapter"], {"base_model_name_or_path": "org/base"}, {}, "org/a"
    )
    without = code_example(MODELS["adapter"], {"base_model_name_or_path": None}, {}, "org/a")
    assert "merged model" in without and "from_pretrained" not in without and "None" not in without
