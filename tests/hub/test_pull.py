"""Pushed repos loaded by processes without this package."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from pictures import picture
from safetensors.torch import load_file, save_file
from tiny_models import vivid_model
from transformers import AutoModel
from trl import ModelConfig

from modeling_vitp import ViTPForConditionalGeneration, export_backbone
from modeling_vitp.convert.checkpoint import convert_checkpoint
from modeling_vitp.pretraining.arguments import PretrainArguments
from modeling_vitp.pretraining.loading import load_start

GENERATION = {"max_new_tokens": 8, "do_sample": False}
QUESTION = "How many trees are there?"

# The package cannot be imported, so the remote code has to work without it.
START = """
import json, sys

sys.modules["modeling_vitp"] = None

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel

arguments = json.loads(sys.argv[1])
torch.set_num_threads(arguments["threads"])
torch.set_grad_enabled(False)
given, classes, tensors = load_file("given.safetensors"), {}, {}


def keep(name, model, **inputs):
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()  # copied from the mapped file, whose alignment can change the last bit
    classes[name] = type(model).__name__
    outputs = model(**inputs)
    tensors[name] = outputs.last_hidden_state
    if "pooler_output" in outputs:
        tensors[f"{name}, pooled"] = outputs.pooler_output
"""
BACKBONE = """
keep("plain", AutoModel.from_pretrained("tester/backbone"), **given)
keep("pinned", AutoModel.from_pretrained("tester/backbone", revision=arguments["revision"]), **given)
classes["remote code"] = [name for name in sys.modules if name.startswith("transformers_modules.")]
"""
EVERYTHING = """
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

keep("ours", AutoModel.from_pretrained("tester/backbone", trust_remote_code=True), **given)
content = [{"type": "image", "image": Image.open("image.png")}, {"type": "text", "text": arguments["question"]}]
for name, trust in (("full", True), ("internvl", False)):
    model = AutoModelForImageTextToText.from_pretrained(f"tester/{name}", trust_remote_code=trust)
    processor = AutoProcessor.from_pretrained(f"tester/{name}", trust_remote_code=trust)
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt",
    )
    classes[name] = [type(model).__name__, type(processor).__name__]
    tensors[name] = model.generate(**inputs, **arguments["generation"])
"""
# AutoBackbone asks the Hub whether the repo exists, even if it is in the cache.
MAPS = """
from transformers import AutoBackbone

backbone = AutoBackbone.from_pretrained("tester/backbone", trust_remote_code=True)
classes["maps"], tensors["maps"] = type(backbone).__name__, backbone(**given).feature_maps[0]
"""
END = """
save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, "tensors.safetensors")
print(json.dumps(classes))
"""


@pytest.fixture
def pushed(hub, tokenizer, tmp_path):
    """Model, and the repos pushed from it: `backbone` (in two versions), `full` and `internvl`."""
    model, processor = vivid_model(tokenizer)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    api = hub.api()
    with torch.no_grad():
        model.model.vision_tower.embeddings.cls_token.add_(1)
        export_backbone(model, tmp_path / "older", processor.image_processor)
        model.model.vision_tower.embeddings.cls_token.sub_(1)
    export_backbone(model, tmp_path / "backbone", processor.image_processor)
    model.save_pretrained(tmp_path / "full")
    processor.save_pretrained(tmp_path / "full")
    convert_checkpoint(tmp_path / "full", tmp_path / "internvl", "internvl")
    for folder in ("older", "backbone", "full", "internvl"):
        repo_id = "tester/backbone" if folder == "older" else f"tester/{folder}"
        api.create_repo(repo_id, exist_ok=True, private=True)
        api.upload_folder(repo_id=repo_id, folder_path=tmp_path / folder)
    given = torch.randn(3, 3, 56, 56, generator=torch.Generator().manual_seed(2))
    save_file({"pixel_values": given}, tmp_path / "given.safetensors")
    picture(130, 60).save(tmp_path / "image.png")
    return model, processor, given


def run(hub, folder: Path, program: str, **environment) -> tuple[dict, dict, str]:
    """Run a program in a new process connected to the Hub; return names of classes, tensors and its log."""
    revision = hub.repo("tester/backbone").history("main")[1][0]
    arguments = {"threads": torch.get_num_threads(), "revision": revision}
    arguments |= {"generation": GENERATION, "question": QUESTION}
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "PYTHON", "PYTEST"))}
    done = subprocess.run(
        [sys.executable, "-c", START + program + END, json.dumps(arguments)],
        cwd=folder,
        env={**inherited, **hub.environment(folder / "fresh", hub.token("read")), **environment},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1]), load_file(folder / "tensors.safetensors"), done.stderr


@torch.no_grad()
def check_backbone(classes: dict, tensors: dict, model, given) -> None:
    tower = model.model.vision_tower
    wanted = tower(given).last_hidden_state
    assert classes["plain"] == classes["pinned"] == "InternVLVisionModel" and classes["remote code"] == []
    assert torch.equal(tensors["plain"], wanted)
    tower.embeddings.cls_token.add_(1)
    assert torch.equal(tensors["pinned"], tower(given).last_hidden_state) and not torch.equal(tensors["pinned"], wanted)
    tower.embeddings.cls_token.sub_(1)


@pytest.mark.slow
@torch.no_grad()
def test_every_kind_is_loaded_without_this_package(hub, pushed, tmp_path):
    model, processor, given = pushed
    classes, tensors, log = run(hub, tmp_path, BACKBONE + EVERYTHING + MAPS)
    check_backbone(classes, tensors, model, given)

    assert classes["ours"] == "ViTPVisionModel"
    outputs = model.model.vision_tower(given)
    assert torch.equal(tensors["ours"], outputs.last_hidden_state)
    assert torch.equal(tensors["ours, pooled"], outputs.pooler_output)
    assert classes.pop("maps") == "ViTPBackbone"
    maps = tensors.pop("maps").flatten(2).transpose(1, 2)
    torch.testing.assert_close(maps, outputs.last_hidden_state[:, 1:], atol=1e-5, rtol=0)
    assert "You are using a model of type" not in log

    assert classes["full"] == ["ViTPForConditionalGeneration", "ViTPProcessor"]
    assert classes["internvl"] == ["InternVLForConditionalGeneration", "InternVLProcessor"]
    content = [{"type": "image", "image": picture(130, 60)}, {"type": "text", "text": QUESTION}]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )
    wanted = model.generate(**inputs, **GENERATION)
    assert wanted.shape[1] == inputs["input_ids"].shape[1] + GENERATION["max_new_tokens"]
    assert torch.equal(tensors["full"], wanted) and torch.equal(tensors["internvl"], wanted)

    seen = len(hub.requests)
    again = run(hub, tmp_path, BACKBONE + EVERYTHING, HF_HUB_OFFLINE="1")
    assert len(hub.requests) == seen
    assert again[0] == classes and again[1].keys() == tensors.keys()
    assert all(torch.equal(again[1][name], tensors[name]) for name in tensors)


# Uses of a Hub id by recipes and package.
LOADERS = {
    "model": lambda name, folder: ViTPForConditionalGeneration.from_pretrained(name).model.vision_tower,
    "start": lambda name, folder: load_start(PretrainArguments("rows"), ModelConfig(name), ())[0].model.vision_tower,
    "export": lambda name, folder: AutoModel.from_pretrained(export_backbone(name, folder / "exported")),
    "convert": lambda name, folder: AutoModel.from_pretrained(convert_checkpoint(name, folder / "new", "backbone")),
}


@pytest.mark.parametrize("load", LOADERS.values(), ids=LOADERS)
def test_busy_hub_is_asked_again(hub, pauses, tokenizer, tmp_path, load):
    model, processor = vivid_model(tokenizer)
    model.save_pretrained(tmp_path / "full")
    processor.save_pretrained(tmp_path / "full")
    hub.create("tester/full", {path.name: path for path in (tmp_path / "full").iterdir()})
    failures = [
        hub.fail("HEAD", "*/config.json", 503, times=2),
        hub.fail("GET", "*/config.json", 429, retry_after=7),
        hub.fail("GET", "/lfs/*", cut=1000),
    ]
    found, wanted = load("tester/full", tmp_path).state_dict(), model.model.vision_tower.state_dict()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    assert [failure.count for failure in failures] == [2, 1, 1] and sorted(pauses) == [1, 1, 8]


@pytest.mark.parametrize("load", LOADERS.values(), ids=LOADERS)
def test_refusal_is_not_retried(hub, pauses, tmp_path, load):
    for status, code in ((401, "RepoNotFound"), (403, "GatedRepo"), (404, "RevisionNotFound")):
        hub.fail("*", "*", status, code=code, times=None)
        with pytest.raises((OSError, ValueError), match="tester/full|not a valid git identifier"):
            load("tester/full", tmp_path)
        assert pauses == [] and not list(tmp_path.iterdir())
        hub.failures.clear()
