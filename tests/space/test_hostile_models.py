"""Hostile models of visitors: each is rejected quickly with one line, and none of its code runs."""

import html
import json
import shutil
import threading
import time
from types import SimpleNamespace

import fetching
import limits
import numpy as np
import pytest
import torch
from about import plain
from answers import encode
from checking import UnavailableModel, check_files
from kinds import BACKBONE, open_full
from loading import TINY, Models
from pictures import picture
from safetensors.torch import load_file, save_file
from tiny_models import TEXT, VISION
from transformers import BitImageProcessor, Dinov2Config, Dinov2Model, PreTrainedModel

from modeling_vitp.training.loading import build_model

NAME = "tester/evil"


@pytest.fixture(scope="module")
def saved(tokenizer, tmp_path_factory):
    """Return the folder of a valid model."""
    torch.manual_seed(0)
    model, processor = build_model(tokenizer, VISION, TEXT, {"max_patches": 6})
    folder = tmp_path_factory.mktemp("saved")
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture
def evil(saved, tmp_path):
    shutil.copytree(saved, tmp_path / "evil")
    return tmp_path / "evil"


@pytest.fixture
def named(hub, evil):
    """Return a function that pushes the model to the Hub and opens it as a visitor does."""

    def name():
        hub.api().create_repo(NAME)
        hub.api().upload_folder(repo_id=NAME, folder_path=evil)
        return Models(TINY).full(NAME)

    return name


def change(path, value, *keys):
    fields = json.loads(path.read_text())
    inner = fields
    for key in keys[:-1]:
        inner = inner[key]
    inner[keys[-1]] = value
    path.write_text(json.dumps(fields))


def refused(open_model) -> str:
    start = time.monotonic()
    with pytest.raises(UnavailableModel) as caught:
        open_model()
    assert time.monotonic() - start < limits.SECONDS
    said = str(caught.value)
    assert "\n" not in said and len(said) < 400
    return said


@pytest.mark.parametrize(
    ("keys", "value", "complaint"),
    [
        (("text_config", "max_position_embeddings"), 10**9, "max_position_embeddings"),
        (("vision_config", "num_hidden_layers"), 10**9, "num_hidden_layers"),
        (("text_config", "num_hidden_layers"), 10**9, "num_hidden_layers"),
        (("vision_config", "patch_size"), [1, 1], "patch_size"),
        (("vision_config", "patch_size"), [192, 192], "patch_size"),
        (("vision_config", "image_size"), [2044, 2044], "146 patches a side"),
        (("vision_config", "hidden_size"), 10**6, "hidden_size"),
        (("text_config", "vocab_size"), 10**8, "vocab_size"),
        (("text_config", "surprise"), 10**12, "surprise"),
        (("quantization_config",), {"quant_method": "awq"}, "quantized"),
        (("text_config", "model_type"), "mamba", "'mamba'"),
        (("model_type",), "evil", "'evil'"),
    ],
)
def test_invalid_configuration_is_rejected_before_building(evil, named, keys, value, complaint):
    change(evil / "config.json", value, *keys)
    assert complaint in refused(named)


def test_tile_budget_is_limited(evil, named):
    change(evil / "processor_config.json", 100_000, "image_processor", "max_patches")
    assert "max_patches" in refused(named)


def test_visual_tokens_of_processor_must_match_model(evil, named):
    change(evil / "processor_config.json", 100_000, "image_seq_length")
    assert "image_seq_length" in refused(named)
    change(evil / "processor_config.json", 4000, "image_seq_length")
    assert "4000 visual tokens a tile" in refused(lambda: open_full(NAME, evil, False))


def test_tokenizer_that_lengthens_text_is_rejected(evil, named):
    """Seven steps that replace a letter by ten would exceed the memory."""
    step = {"type": "Replace", "pattern": {"String": "a"}, "content": "a" * 10}
    change(evil / "tokenizer.json", {"type": "Sequence", "normalizers": [step] * 7}, "normalizer")
    assert "its tokenizer replaces text" in refused(named)


@pytest.mark.parametrize(
    ("key", "step"),
    [
        ("normalizer", {"type": "Prepend", "prepend": 5000 * "a"}),
        (
            "post_processor",
            {
                "type": "TemplateProcessing",
                "single": 1000 * [{"SpecialToken": {"id": "a", "type_id": 0}}],
                "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
                "special_tokens": {"a": {"id": "a", "ids": [0], "tokens": ["a"]}},
            },
        ),
    ],
)
def test_tokenizer_that_adds_text_is_rejected(evil, named, key, step):
    change(evil / "tokenizer.json", step, key)
    assert "its tokenizer adds too much" in refused(named)


def test_beams_are_limited(evil, named):
    (evil / "generation_config.json").write_text(json.dumps({"num_beams": 200}))
    assert "num_beams" in refused(named)


def test_text_of_a_model_is_not_markdown():
    shown = plain("MIT ![](http://127.0.0.1/a.png) <img src=x>")
    assert not set("![]()<>:/`*_") & set(shown) and html.unescape(shown).startswith("MIT ![](http://127.0.0.1/a.png)")


def test_model_memory_is_limited(saved, monkeypatch):
    monkeypatch.setattr(limits, "memory", lambda: 200_000)
    assert "GB of memory" in refused(lambda: Models(str(saved)).full())


def test_weight_size_is_checked_before_download(saved, monkeypatch):
    files = [
        SimpleNamespace(rfilename="config.json", size=100),
        SimpleNamespace(rfilename="a.safetensors", size=10**10),
    ]
    listing = SimpleNamespace(siblings=files, sha="0")
    monkeypatch.setattr(fetching, "HfApi", lambda token: SimpleNamespace(model_info=lambda *_, **__: listing))
    monkeypatch.setattr(fetching, "hf_hub_download", None)  # must not be called
    assert "10.0 GB of safetensors" in refused(lambda: Models(TINY).full(NAME))


@pytest.mark.parametrize(("file", "size"), [("config.json", 15_000_000), ("tokenizer_config.json", 5 * 10**10)])
def test_file_size_is_checked_before_download(monkeypatch, file, size):
    sizes = {"config.json": 100, "a.safetensors": 10**6} | {file: size}
    listing = SimpleNamespace(siblings=[SimpleNamespace(rfilename=n, size=s) for n, s in sizes.items()], sha="0")
    monkeypatch.setattr(fetching, "HfApi", lambda token: SimpleNamespace(model_info=lambda *_, **__: listing))
    monkeypatch.setattr(fetching, "hf_hub_download", None)  # must not be called
    assert f"{file} is larger than" in refused(lambda: Models(TINY).kind(NAME))


def test_concurrent_loading_keeps_global_state(tmp_path):
    """The default dtype and the tying of weights change while a model is built."""
    paths = []
    for depth in (2, 6, 10):
        config = Dinov2Config(hidden_size=32, num_hidden_layers=depth, num_attention_heads=2, image_size=56)
        Dinov2Model(config).bfloat16().save_pretrained(tmp_path / str(depth))
        BitImageProcessor().save_pretrained(tmp_path / str(depth))
        paths.append(str(tmp_path / str(depth)))
    models, seen = Models(TINY, paths), set()
    before = PreTrainedModel.tie_weights, torch.linspace
    threads = [threading.Thread(target=models.backbone, args=(name,)) for name in models.names[1:] for _ in range(2)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        seen.add(torch.get_default_dtype())
    assert seen <= {torch.float32} and (PreTrainedModel.tie_weights, torch.linspace) == before
    assert torch.get_default_dtype() == torch.float32 and models.backbone(models.names[1]).model.dtype == torch.float32


def test_trusted_package_model_keeps_its_kind(saved):
    """Models of this package include code for users without the package."""
    assert "auto_map" in json.loads((saved / "config.json").read_text())
    assert Models(str(saved), trust_remote_code=True).full_names == [saved.name]


def test_default_model_may_be_any_hub_model(hub, tmp_path):
    config = Dinov2Config(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=56)
    Dinov2Model(config).save_pretrained(tmp_path / "dino")
    BitImageProcessor().save_pretrained(tmp_path / "dino")
    hub.api().create_repo("tester/dino")
    hub.api().upload_folder(repo_id="tester/dino", folder_path=tmp_path / "dino")
    models = Models("tester/dino")
    assert models.full_names == [] and models.kind("tester/dino") == BACKBONE
    assert Models("tester/nothing").full_names == ["tester/nothing"]


def test_weights_of_wrong_shape_are_rejected(evil, named):
    change(evil / "config.json", 96, "vision_config", "intermediate_size")
    said = refused(named)
    assert NAME in said and "of another shape, such as" in said and "mlp.fc" in said and "/tmp" not in said


def test_missing_weights_are_rejected(evil, named):
    tensors = load_file(evil / "model.safetensors")
    removed = next(name for name in tensors if "mlp.fc1.weight" in name)
    del tensors[removed]
    save_file(tensors, evil / "model.safetensors", {"format": "pt"})
    assert f"1 are missing or of another shape, such as {removed}" in refused(named)


def test_non_finite_weights_are_rejected(evil, named):
    tensors = load_file(evil / "model.safetensors")
    wrong = next(name for name in tensors if "mlp.fc1.weight" in name)
    tensors[wrong][0, 0] = np.nan
    save_file(tensors, evil / "model.safetensors", {"format": "pt"})
    assert f"NaN or infinite, such as {wrong}" in refused(named)


def test_visitor_template_and_code_do_not_run(evil, named, saved, tmp_path):
    loop = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}evil"
    (evil / "chat_template.jinja").write_text(loop)
    change(evil / "tokenizer_config.json", loop, "chat_template")
    marker = tmp_path / "ran"
    (evil / "modeling_vitp.py").write_text(f"open({str(marker)!r}, 'w')\n")
    full = named()
    start = time.monotonic()
    messages = [{"role": "user", "content": "How many trees?"}]
    ids = encode(full.processor, [picture(60, 50)], messages)["input_ids"]
    own = encode(Models(str(saved)).full().processor, [picture(60, 50)], messages)["input_ids"]
    assert ids.equal(own) and time.monotonic() - start < 10 and not marker.exists()


def test_unknown_tokenizer_regex_is_rejected(evil, named):
    slow = {"type": "Split", "pattern": {"Regex": "(a+)+$"}, "behavior": "Isolated", "invert": False}
    change(evil / "tokenizer.json", slow, "pre_tokenizer")
    assert "unknown regular expression" in refused(named)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json"])
def test_link_out_of_folder_is_rejected(evil, tmp_path, name):
    shutil.move(evil / name, tmp_path / "elsewhere")
    (evil / name).symlink_to(tmp_path / "elsewhere")
    assert f"{name} is a link" in refused(lambda: Models(str(evil)).full())


def test_snapshot_links_must_point_to_blobs(saved, tmp_path):
    repo = tmp_path / "models--tester--evil"
    snapshot, blobs = repo / "snapshots" / "0", repo / "blobs"
    snapshot.mkdir(parents=True)
    shutil.copytree(saved, blobs)
    for blob in blobs.iterdir():
        (snapshot / blob.name).symlink_to(blob)
    check_files(NAME, snapshot)
    shutil.move(blobs / "model.safetensors", repo / "model.safetensors")
    (snapshot / "model.safetensors").unlink()
    (snapshot / "model.safetensors").symlink_to(repo / "model.safetensors")
    assert "model.safetensors is a link" in refused(lambda: check_files(NAME, snapshot))


def test_shards_outside_the_folder_are_rejected(evil):
    shutil.move(evil / "model.safetensors", evil.parent / "model.safetensors")
    index = {"metadata": {}, "weight_map": {"lm_head.weight": "../model.safetensors"}}
    (evil / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "model.safetensors.index.json" in refused(lambda: Models(str(evil)).full())


def test_visitor_models_are_dropped_above_memory_limit(hub, saved, monkeypatch):
    for index in range(3):
        hub.api().create_repo(f"tester/{index}")
        hub.api().upload_folder(repo_id=f"tester/{index}", folder_path=saved)
    models = Models(TINY)
    own, first, second = models.full(), models.full("tester/0"), models.full("tester/1")
    assert models.full("tester/0") is first and models.full("tester/1") is second
    size = sum(parameter.nbytes for parameter in first.model.parameters())
    monkeypatch.setattr(limits, "memory", lambda: 10 * size)  # A quarter of the memory holds two models.
    models.full("tester/0")
    third = models.full("tester/2")
    assert models.full("tester/0") is first and models.full("tester/2") is third and models.full() is own
    assert models.full("tester/1") is not second


def test_loading_does_not_block_other_models(saved, monkeypatch):
    """Loaded and other models can be used meanwhile; the number of loading visitors' models is limited."""
    import threading

    going_on = threading.Event()
    models = Models(TINY, [str(saved)])
    models.full()
    original = models._read_kind

    def slow(name):
        if name.startswith("slow/"):
            assert going_on.wait(30)
            raise UnavailableModel(f"{name} is gone")
        return original(name)

    monkeypatch.setattr(models, "_read_kind", slow)
    monkeypatch.setattr("loading.seconds_left", lambda: 0.2)
    for index in range(limits.LOADING):
        assert "still being loaded" in refused(lambda: models.full(f"slow/{index}"))  # noqa: B023
    assert "slow/more" in refused(lambda: models.full("slow/more"))
    assert models.full() is models.full(TINY)
    monkeypatch.setattr("loading.seconds_left", lambda: 20)
    assert models.full(saved.name).name == saved.name
    going_on.set()
