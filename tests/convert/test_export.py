import copy
import json
import logging
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from pictures import picture
from safetensors.torch import load_file, save_file
from tiny_models import vivid_model
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2.functional import normalize, pil_to_tensor, resize
from transformers import InternVLVisionConfig, InternVLVisionModel, Qwen2Config
from transformers.dynamic_module_utils import get_class_from_dynamic_module

from modeling_vitp import (
    ViTPBackbone,
    ViTPForConditionalGeneration,
    ViTPImageProcessor,
    ViTPVisionConfig,
    ViTPVisionModel,
    export_backbone,
    export_timm,
    spread_bands,
)

SPEC = {"bands": [2, 0, 1], "window": [100, 2000], "gamma": 0.5}
SIZES = [(37, 91), (200, 33), (56, 56)]  # width, height
TEXT_PROMPT = "<IMG_CONTEXT>\nHow many trees are there?"

# Run without this package, as by users who have only transformers installed.
PROGRAM = """
import contextlib, io, json, sys
from pathlib import Path
from types import SimpleNamespace

import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import (
    AutoBackbone, AutoConfig, AutoImageProcessor, AutoModel, AutoModelForImageTextToText, AutoProcessor, pipeline
)
from transformers.models.auto import auto_factory
from transformers.utils.logging import disable_progress_bar

disable_progress_bar()

torch.set_num_threads(int(sys.argv[1]))
given, facts, tensors = load_file("given.safetensors"), {}, {}
pictures = sorted(Path("pictures").iterdir())


def class_of(thing):
    return f"{type(thing).__module__}.{type(thing).__qualname__}"


def refusal(load, *args, **kwargs):
    try:
        return "loaded " + class_of(load(*args, **kwargs))
    except ValueError as error:
        return str(error)


with torch.no_grad():
    with contextlib.redirect_stderr(io.StringIO()) as stderr, contextlib.redirect_stdout(io.StringIO()) as stdout:
        plain = AutoModel.from_pretrained("backbone")
    facts["plain"], facts["plain_says"] = class_of(plain), stderr.getvalue() + stdout.getvalue()
    facts["plain_config"] = class_of(AutoConfig.from_pretrained("backbone"))
    tensors["plain"] = plain(given["pixel_values"]).last_hidden_state
    tensors["other_size"] = plain(given["other_pixel_values"]).last_hidden_state
    facts["processor"] = class_of(AutoImageProcessor.from_pretrained("backbone"))
    extract = pipeline("image-feature-extraction", model="backbone")
    for index, features in enumerate(extract([str(path) for path in pictures], return_tensors=True)):
        tensors[f"pipeline_{index}"] = features
    facts["refused_processor"] = refusal(AutoImageProcessor.from_pretrained, "with_spec")
    facts["refused_processor_false"] = refusal(
        AutoImageProcessor.from_pretrained, "with_spec", trust_remote_code=False
    )
    facts["refused_model"] = refusal(AutoModelForImageTextToText.from_pretrained, "full")
    facts["remote_modules_before_trust"] = [name for name in sys.modules if name.startswith("transformers_modules.")]

    ours = AutoModel.from_pretrained("backbone", trust_remote_code=True)
    facts["ours"] = class_of(ours)
    facts["ours_config"] = class_of(ours.config)
    facts["ours_drop_path"] = [layer.drop_path.drop_prob for layer in ours.encoder.layer]
    outputs = ours(given["pixel_values"])
    tensors["ours"], tensors["ours_pooled"] = outputs.last_hidden_state, outputs.pooler_output

    extract = pipeline("image-feature-extraction", model="backbone", pool=True, trust_remote_code=True)
    tensors["pipeline_pooled"] = extract(str(pictures[0]), return_tensors=True)
    facts["refused_folder"] = refusal(AutoBackbone.from_pretrained, "./backbone", trust_remote_code=True)
    auto_factory.hf_api = lambda: SimpleNamespace(repo_exists=lambda name: True)  # AutoBackbone checks this first
    facts["refused_backbone"] = refusal(AutoBackbone.from_pretrained, "backbone", trust_remote_code=False)
    options = {"out_indices": [1, 3], "attn_implementation": "eager", "drop_path_rate": 0.5}
    for name, options in (("last", {}), ("asked", options), ("again", options)):
        backbone = AutoBackbone.from_pretrained("backbone", trust_remote_code=True, **options)
        config = backbone.config
        facts[name] = [class_of(backbone), config._attn_implementation, config.drop_path_rate, backbone.out_features]
        for index, features in enumerate(backbone(given["other_pixel_values"][..., :-3]).feature_maps):
            tensors[f"{name}_{index}"] = features
    backbone.save_pretrained("saved_backbone")

    processor = AutoImageProcessor.from_pretrained("with_spec", trust_remote_code=True)
    facts["spec_processor"] = class_of(processor)
    tensors["with_spec"] = processor(given["bands"], return_tensors="pt")["pixel_values"]

    model = AutoModelForImageTextToText.from_pretrained("full", trust_remote_code=True)
    processor = AutoProcessor.from_pretrained("full", trust_remote_code=True)
    facts["full"], facts["full_processor"] = class_of(model), class_of(processor)
    inputs = processor(
        images=[Image.open(pictures[0])], text=[sys.argv[2]], vrl_drop_ratio=0.75, vrl_keys=[(0, "a", 0)],
        return_tensors="pt",
    )
    tensors["full_logits"] = model(**inputs).logits
    tensors |= {f"full_{name}": value for name, value in inputs.items()}

facts["imported"] = [name for name in sys.modules if name.split(".")[0] == "modeling_vitp"]
save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, "tensors.safetensors")
Path("facts.json").write_text(json.dumps(facts))
"""


@pytest.fixture(scope="module")
def exported(tokenizer, tmp_path_factory):
    """Model, the folders created from it, and the results of a process without this package."""
    folder = tmp_path_factory.mktemp("export")
    model, processor = vivid_model(tokenizer)
    model.save_pretrained(folder / "full")
    processor.save_pretrained(folder / "full")
    export_backbone(model, folder / "backbone", processor.image_processor)
    spec_processor = ViTPImageProcessor(size={"height": 56, "width": 56}, input_spec=SPEC)
    export_backbone(model, folder / "with_spec", spec_processor)

    generator = torch.Generator().manual_seed(2)
    given = {
        "pixel_values": torch.randn(3, 3, 56, 56, generator=generator),
        "other_pixel_values": torch.randn(2, 3, 84, 56, generator=generator),
        "bands": torch.randint(0, 3000, (4, 80, 64), generator=generator).to(torch.uint16),
    }
    save_file(given, folder / "given.safetensors")
    (folder / "pictures").mkdir()
    for index, size in enumerate(SIZES):
        picture(*size, seed=index).save(folder / "pictures" / f"{index}.png")

    environment = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "PYTEST"))}
    environment |= {
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(folder / "hf_home"),
        "HF_MODULES_CACHE": str(folder / "hf_modules"),
    }
    environment.pop("PYTHONPATH", None)
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(torch.get_num_threads()), TEXT_PROMPT],
        cwd=folder,
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return SimpleNamespace(
        folder=folder,
        model=model,
        processor=processor,
        spec_processor=spec_processor,
        given=given,
        stderr=done.stderr,
        facts=json.loads((folder / "facts.json").read_text()),
        tensors=load_file(folder / "tensors.safetensors"),
    )


@pytest.fixture
def tower(exported):
    return exported.model.model.vision_tower


def file_names(folder) -> set[str]:
    return {path.name for path in folder.iterdir()}


def warnings_of(load) -> str:
    """Return the messages that transformers logs during a call."""
    records = []
    handler = logging.Handler()
    handler.emit = lambda record: records.append(record.getMessage())
    logger = logging.getLogger("transformers")
    logger.addHandler(handler)
    try:
        load()
    finally:
        logger.removeHandler(handler)
    return "\n".join(records)


@torch.no_grad()
def test_plain_transformers_gives_same_features(exported, tower):
    assert exported.facts["plain"] == "transformers.models.internvl.modeling_internvl.InternVLVisionModel"
    assert exported.facts["plain_config"].endswith("configuration_internvl.InternVLVisionConfig")
    for name, pixels in (("plain", "pixel_values"), ("other_size", "other_pixel_values")):
        assert torch.equal(exported.tensors[name], tower(exported.given[pixels]).last_hidden_state)
    assert tower(exported.given["pixel_values"]).last_hidden_state.std() > 0.3
    assert exported.facts["plain_says"] == ""
    assert exported.facts["imported"] == exported.facts["remote_modules_before_trust"] == []


@torch.no_grad()
def test_remote_code_gives_the_same_features(exported, tower):
    for fact, name in (
        ("ours", "modeling_vitp.ViTPVisionModel"),
        ("ours_config", "configuration_vitp.ViTPVisionConfig"),
    ):
        assert exported.facts[fact].startswith("transformers_modules.")
        assert exported.facts[fact].endswith(name)
    assert exported.facts["ours_drop_path"] == pytest.approx([0.0, 0.1, 0.2])
    states = tower(exported.given["pixel_values"]).last_hidden_state
    assert torch.equal(exported.tensors["ours"], states)
    assert torch.equal(exported.tensors["ours_pooled"], states[:, 1:].mean(1))


@torch.no_grad()
def test_feature_extraction_gives_one_row_per_image(exported, tower):
    assert exported.facts["processor"].split(".")[-1] == "GotOcr2ImageProcessor"
    for index, size in enumerate(SIZES):
        pixels = resize(pil_to_tensor(picture(*size, seed=index)), [56, 56], InterpolationMode.BICUBIC, antialias=True)
        pixels = normalize(pixels / 255, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
        found = exported.tensors[f"pipeline_{index}"]
        assert found.shape == (1, 17, 32)
        torch.testing.assert_close(found, tower(pixels[None]).last_hidden_state, atol=1e-4, rtol=0)
    pooled, states = exported.tensors["pipeline_pooled"], exported.tensors["pipeline_0"]
    torch.testing.assert_close(pooled, states[:, 1:].mean(1), atol=1e-5, rtol=0)


@torch.no_grad()
def test_auto_backbone_gives_requested_maps(exported):
    name, stages = "modeling_vitp_backbone.ViTPBackbone", ["stage1", "stage3"]
    for fact, wanted in (("last", ["sdpa", 0.2, ["stage3"]]), ("asked", ["eager", 0.5, stages])):
        loaded, *found = exported.facts[fact]
        assert loaded.startswith("transformers_modules.") and loaded.endswith(name) and found == wanted
    assert exported.facts["again"] == exported.facts["asked"]

    ours = ViTPBackbone.from_pretrained(exported.folder / "backbone", out_features=stages, attn_implementation="eager")
    maps = ours.eval()(exported.given["other_pixel_values"][..., :-3]).feature_maps
    assert [features.shape for features in maps] == [(2, 32, 6, 4)] * 2 and not torch.equal(*maps)
    for fact in ("asked", "again"):
        assert all(torch.equal(exported.tensors[f"{fact}_{index}"], features) for index, features in enumerate(maps))
    torch.testing.assert_close(exported.tensors["last_0"], maps[1], atol=1e-4, rtol=0)


def test_auto_backbone_asks_for_trust_and_is_saved_as_ours(exported):
    assert "Repo id must" in exported.facts["refused_folder"]
    assert "trust_remote_code=True" in exported.facts["refused_backbone"]
    folder = exported.folder / "saved_backbone"
    assert "auto_map" not in json.loads((folder / "config.json").read_text())
    model, loading = ViTPBackbone.from_pretrained(folder, output_loading_info=True)
    assert model.out_features == ["stage1", "stage3"] and not any(loading.values())


def test_folder_opens_without_warning(exported, tower):
    folder, found = exported.folder / "backbone", {}

    def load():
        found["model"], found["loading"] = ViTPVisionModel.from_pretrained(folder, output_loading_info=True)

    assert "You are using a model of type" in warnings_of(lambda: Qwen2Config.from_pretrained(folder))
    assert "You are using a model of type" not in warnings_of(load)
    assert not any(found["loading"].values())
    model = found["model"]
    assert type(model) is ViTPVisionModel
    assert model.config.drop_path_rate == 0.2
    assert all(torch.equal(value, tower.state_dict()[name]) for name, value in model.state_dict().items())
    for config in (model.config, exported.model.config.vision_config):  # the trained model is unchanged
        assert type(config) is ViTPVisionConfig and config.model_type == "vitp_vision"
    assert not hasattr(exported.model.config.vision_config, "auto_map")
    assert exported.processor.image_processor.crop_to_patches is False
    assert exported.processor.image_processor.max_patches == 6


def test_weights_are_safetensors_only(exported):
    for folder in ("backbone", "with_spec", "full"):
        names = file_names(exported.folder / folder)
        assert {name for name in names if name.split(".")[-1] not in ("json", "py", "jinja")} == {"model.safetensors"}
        weights = load_file(exported.folder / folder / "model.safetensors")
        model = exported.model if folder == "full" else exported.model.model.vision_tower
        assert weights.keys() == model.state_dict().keys()


def test_export_of_other_sources_equals_export_of_model(exported, tower, tmp_path):
    wanted = exported.folder / "backbone"
    from_folder = export_backbone(str(exported.folder / "full"), str(tmp_path / "text"))
    assert file_names(from_folder) == file_names(wanted)
    for name in file_names(wanted):
        assert (from_folder / name).read_bytes() == (wanted / name).read_bytes(), name
    for model in (tower, exported.model.model):
        folder = export_backbone(model, tmp_path / type(model).__name__)
        for name in ("model.safetensors", "config.json"):
            assert (folder / name).read_bytes() == (wanted / name).read_bytes(), name


@pytest.mark.parametrize("export", [export_backbone, export_timm])
def test_export_has_the_record_of_its_checkpoint(model_and_processor, tmp_path, export):
    run, (model, processor) = tmp_path / "run", model_and_processor
    model.save_pretrained(run)
    processor.save_pretrained(run)
    record = {"base_model": ["org/start"], "licenses": {"org/start": {"license": "cc-by-nc-4.0"}}}
    for name, fields in (("run.json", record), ("metrics.json", {"eval": {"eval_loss": 0.25}})):
        (run / name).write_text(json.dumps(fields))
    folder = export(run, tmp_path / "backbone")
    assert json.loads((folder / "run.json").read_text()) == record and (folder / "metrics.json").is_file()
    export(model, folder)  # the weights of another run
    assert not {"run.json", "metrics.json"} & file_names(folder)


def test_export_replaces_only_its_own_folder(exported, tmp_path):
    for name in ("notes.txt", "config.json"):
        (tmp_path / name).mkdir()
        (tmp_path / name / name).write_text("{}")
        with pytest.raises(ValueError, match=f"{name} exists"):
            export_backbone(exported.model, tmp_path / name)
        assert [path.name for path in (tmp_path / name).iterdir()] == [name]
    folder = export_backbone(exported.model, tmp_path / "new")
    (folder / "README.md").write_text("mine")
    assert export_backbone(exported.model, folder) == folder and (folder / "README.md").is_file()


def test_bands_need_their_image_processor(exported, tmp_path):
    radar = spread_bands(copy.deepcopy(exported.model.model.vision_tower), ["VV", "VH", "ratio"])
    with pytest.raises(ValueError, match="VV, VH.*ratio.*image_processor=ViTPImageProcessor"):
        export_backbone(radar, tmp_path / "radar")
    assert not (tmp_path / "radar").exists()
    spec = {"band_names": ["VV", "VH", "ratio"], "window": [-25, 0]}
    export_backbone(radar, tmp_path / "radar", ViTPImageProcessor(input_spec=spec))
    image_processor = ViTPImageProcessor.from_pretrained(tmp_path / "radar")
    assert image_processor.input_spec == spec and len(image_processor.image_mean) == 3


def test_exported_processor_does_not_tile(exported, tmp_path):
    export_backbone(exported.model, tmp_path)
    settings = json.loads((tmp_path / "preprocessor_config.json").read_text())
    assert (settings["image_mean"], settings["image_std"]) == ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    tiling = ViTPImageProcessor(
        size={"height": 28, "width": 28}, crop_to_patches=True, image_mean=[0.1, 0.2, 0.3], image_std=[0.4, 0.5, 0.6]
    )
    export_backbone(exported.model, tmp_path, tiling)
    settings = json.loads((tmp_path / "preprocessor_config.json").read_text())
    assert settings["crop_to_patches"] is False
    assert settings["size"] == {"height": 56, "width": 56}
    assert (settings["image_mean"], settings["image_std"]) == ([0.1, 0.2, 0.3], [0.4, 0.5, 0.6])


def test_input_spec_is_kept_and_needs_our_code(exported):
    settings = json.loads((exported.folder / "with_spec" / "preprocessor_config.json").read_text())
    assert settings["input_spec"] == SPEC
    assert settings["image_processor_type"] == "ViTPImageProcessor"
    for fact in ("refused_processor", "refused_processor_false"):
        assert "trust_remote_code=True" in exported.facts[fact]
        assert not exported.facts[fact].startswith("loaded")
    assert exported.facts["spec_processor"].startswith("transformers_modules.")
    assert exported.facts["spec_processor"].endswith("image_processing_vitp.ViTPImageProcessor")


def test_input_spec_is_applied_by_the_exported_code(exported):
    found = exported.tensors["with_spec"]
    bands = exported.given["bands"].double()[SPEC["bands"]]
    low, high = SPEC["window"]
    rgb = 255 * ((bands - low) / (high - low)).clamp(0, 1) ** SPEC["gamma"]
    pixels = resize(rgb.float(), [56, 56], InterpolationMode.BICUBIC, antialias=True).clamp(0, 255)
    wanted = normalize(pixels / 255, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    assert found.shape == (1, 3, 56, 56)
    torch.testing.assert_close(found[0], wanted, atol=1e-4, rtol=0)


@torch.no_grad()
def test_remote_code_of_whole_model_gives_same_logits(exported):
    assert "trust_remote_code=True" in exported.facts["refused_model"]
    for fact, name in (("full", "ViTPForConditionalGeneration"), ("full_processor", "ViTPProcessor")):
        assert exported.facts[fact].startswith("transformers_modules.")
        assert exported.facts[fact].endswith(f".{name}")
    inputs = exported.processor(
        images=[picture(*SIZES[0])],
        text=[TEXT_PROMPT],
        vrl_drop_ratio=0.75,
        vrl_keys=[(0, "a", 0)],
        return_tensors="pt",
    )
    assert "visual_token_indices" in inputs
    for name, value in inputs.items():
        assert torch.equal(exported.tensors[f"full_{name}"], value), name
    assert torch.equal(exported.tensors["full_logits"], exported.model(**inputs).logits)


@pytest.mark.parametrize(
    ("vision", "dtype"),
    [
        ({"use_qk_norm": True, "norm_type": "rms_norm"}, torch.bfloat16),
        ({"use_mean_pooling": False, "attention_bias": False, "use_mask_token": True}, torch.float32),
    ],
    ids=["qk_norm", "no_bias"],
)
@torch.no_grad()
def test_variants_keep_features_and_dtype(tokenizer, tmp_path, vision, dtype):
    model = vivid_model(tokenizer, **vision)[0].to(dtype)
    export_backbone(model, tmp_path)
    native, loading = InternVLVisionModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(loading.values())
    assert type(native.config) is InternVLVisionConfig
    assert native.dtype == model.dtype == dtype
    pixels = torch.randn(2, 3, 56, 56, generator=torch.Generator().manual_seed(0)).to(dtype)
    wanted = model.model.vision_tower(pixels).last_hidden_state
    assert torch.equal(native(pixels).last_hidden_state, wanted)


def test_remote_code_model_is_exported_as_ours(tmp_path, model, processor):
    """Remote code defines other classes under the same names."""
    model.save_pretrained(tmp_path / "run")
    processor.save_pretrained(tmp_path / "run")
    remote = get_class_from_dynamic_module("modeling_vitp.ViTPForConditionalGeneration", str(tmp_path / "run"))
    assert not issubclass(remote, ViTPForConditionalGeneration)
    loaded = remote.from_pretrained(tmp_path / "run")
    for part, folder in (
        (loaded, "whole"),
        (loaded.model, "base"),
        (loaded.model.vision_tower, "vit"),
        (model, "ours"),
    ):
        export_backbone(part, tmp_path / folder, processor.image_processor)
    for folder in ("whole", "base", "vit"):
        for file in ("model.safetensors", "config.json", "preprocessor_config.json", "modeling_vitp.py"):
            assert (tmp_path / folder / file).read_bytes() == (tmp_path / "ours" / file).read_bytes(), (folder, file)
