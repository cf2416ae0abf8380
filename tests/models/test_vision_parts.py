"""The ViT of vision-language models of transformers, beside the whole model."""

import json
import logging

import pytest
import torch
from other_backbones import save_backbone
from paths import ROOT
from pictures import picture
from safetensors import safe_open
from transformers import AutoImageProcessor, AutoModel, LlavaConfig
from vision_families import MEAN, STD, blocks_of_patches, library_features, save_language_model
from vision_language_models import CLIP, LLAMA, VLMS, save_unknown, save_vlm

from modeling_vitp import ViTPForSemanticSegmentation, compose, export_backbone
from modeling_vitp.adaptation.arguments import AdaptArguments
from modeling_vitp.adaptation.backbones import start_settings
from modeling_vitp.adaptation.preparation import check_arguments
from modeling_vitp.cards.record import read_record
from modeling_vitp.convert.onnx import export_onnx
from modeling_vitp.modeling_vitp_backbone import open_vit, open_vit_config
from modeling_vitp.probing.backbones import Preprocessing, load_backbone
from modeling_vitp.recipes.export_backbone import main as export_main
from modeling_vitp.vision_parts import vision_part
from modeling_vitp.vision_towers import other_families, pair, tower_of

ODD_SIZES = [(64, 64), (80, 48), (100, 70), (16, 112)]
TILED = ("llava_next", "llava_onevision", "idefics3", "smolvlm")  # take several tiles of an image
WITHOUT_NORM = ("llava_onevision",)  # the features are those before the last norm


@pytest.fixture(params=VLMS)
def vlm(request, tmp_path):
    """Name, folder and model of a vision-language model."""
    return request.param, tmp_path / "vlm", save_vlm(tmp_path / "vlm", request.param)


def pixels_of(size=(64, 64)) -> torch.Tensor:
    return torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def features_of_vit(name: str, folder, pixels: torch.Tensor) -> torch.Tensor:
    """Return the features of the ViT that this package opens, before the last norm if the whole model takes those."""
    vit = open_vit(folder).eval()
    tower = tower_of(vit.config)
    inputs_of_norm = []
    if name in WITHOUT_NORM:
        norm = vit.get_submodule(tower.norm)
        norm.register_forward_pre_hook(lambda module, inputs: inputs_of_norm.append(inputs[0]))
    features = tower.patch_tokens(vit, pixels)
    return inputs_of_norm[0] if inputs_of_norm else features


def recorded(module: torch.nn.Module) -> list[torch.Tensor]:
    """Return a list that receives the first argument of each call of a module."""
    inputs = []

    def record(module, args, kwargs):
        inputs.append(args[0] if args else next(iter(kwargs.values())))

    module.register_forward_pre_hook(record, with_kwargs=True)
    return inputs


def test_features_are_those_that_the_projector_takes(vlm):
    name, folder, model = vlm
    pixels = pixels_of()
    taken = recorded(model.get_submodule(VLMS[name][4]))
    options = {"image_sizes": torch.tensor([[64, 64]])} if name in ("llava_next", "llava_onevision") else {}
    tiles = pixels[None] if name in TILED else pixels
    if name == "qwen3_vl":
        tiles, options["image_grid_thw"] = blocks_of_patches(pixels)
    with torch.no_grad():
        model.get_image_features(tiles, **options)
    features = features_of_vit(name, folder, pixels)
    (wanted,) = taken
    if name == "qwen3_vl":
        wanted = wanted.unflatten(0, (2, 2, 2, 2, 2)).transpose(2, 3).flatten(1, 4)
    if name == "internvl":  # whose pixel shuffle comes first
        merged = features.unflatten(1, (4, 4))
        features = model.model.pixel_shuffle(merged, scale_factor=0.5).flatten(1, 2)
    torch.testing.assert_close(features, wanted, atol=1e-5, rtol=0)


@pytest.mark.parametrize("size", ODD_SIZES)
def test_odd_sizes_equal_vit_in_whole_model(vlm, size):
    name, folder, model = vlm
    if name == "qwen3_vl":  # which takes blocks of two by two patches
        size = (96, 32)
    pixels = pixels_of(size)
    whole_vit = model.get_submodule(VLMS[name][3])
    is_interpolated_on_request = vlm[2].config.vision_config.model_type.startswith(("clip", "siglip"))
    options = {"interpolate_pos_encoding": True} if is_interpolated_on_request else {}
    if name == "internvl":  # which refuses pixels that fill no patch
        height, width = size
        pixels = pixels[..., : height - height % 16, : width - width % 16]
    if name == "qwen3_vl":
        wanted = library_features(whole_vit, pixels)
        torch.testing.assert_close(features_of_vit(name, folder, pixels), wanted, atol=1e-5, rtol=0)
        return
    with torch.no_grad():
        outputs = whole_vit(pixels, output_hidden_states=True, **options)
    layer = getattr(model.config, "vision_feature_layer", None)
    wanted = outputs.last_hidden_state if layer is None else outputs.hidden_states[layer]
    features = features_of_vit(name, folder, pixels)
    torch.testing.assert_close(features, wanted[:, -features.shape[1] :], atol=1e-5, rtol=0)
    assert wanted.shape[1] - features.shape[1] == (1 if name in ("llava", "llava_next", "internvl") else 0)


def test_deepest_of_several_layers_is_kept(tmp_path):
    for layers, depth in (([1, -3], 2), ([-1, 0], 4), (3, 3)):
        config = LlavaConfig(vision_config=CLIP, text_config=LLAMA, vision_feature_layer=layers)
        assert vision_part(config.to_dict()).num_hidden_layers == depth


def keys_of_file(path) -> list[str]:
    with safe_open(path, "pt") as file:
        return list(file.keys())


def test_files_without_the_vit_are_not_read(vlm):
    name, folder, model = vlm
    model.save_pretrained(folder, max_shard_size="2KB")
    removed = 0
    for path in folder.glob("*.safetensors"):
        has_vit = any(VLMS[name][3].rpartition(".")[2] in key for key in keys_of_file(path))
        if not has_vit:
            path.unlink()
            removed += 1
    assert removed
    vit = open_vit(folder)
    kernel = tower_of(vit.config).patch_kernel
    assert torch.equal(vit.get_parameter(kernel), model.get_parameter(f"{VLMS[name][3]}.{kernel}"))


def test_only_files_of_the_vit_are_downloaded(hub, tmp_path, caplog):
    model = save_vlm(tmp_path / "vlm", "gemma3", max_shard_size="2KB")
    files = {path.name: path for path in (tmp_path / "vlm").iterdir()}
    hub.create("org/gemma", files)
    with caplog.at_level(logging.WARNING):
        vit = open_vit("org/gemma")
    requested = {request.path.rpartition("/")[2] for request in hub.requests if request.path.endswith(".safetensors")}
    weight_map = json.loads(files["model.safetensors.index.json"].read_text())["weight_map"]
    assert requested == {file for key, file in weight_map.items() if "vision_tower" in key} < set(weight_map.values())
    assert torch.equal(vit.post_layernorm.weight, model.model.vision_tower.post_layernorm.weight)
    assert "org/gemma" in caplog.text and "gemma." in caplog.text
    backbone = load_backbone("org/gemma")
    assert list(backbone.image_processor.image_mean) == MEAN


@pytest.mark.parametrize("license", ["apache-2.0", None])
def test_license_of_card_is_logged_in_one_line(tmp_path, caplog, license):
    save_vlm(tmp_path, "smolvlm", license=license)
    with caplog.at_level(logging.WARNING):
        open_vit(tmp_path)
    (record,) = [record for record in caplog.records if record.name.startswith("modeling_vitp")]
    assert "\n" not in record.getMessage() and str(license) in record.getMessage()


def test_exported_vit_opens_with_transformers(vlm, tmp_path, capsys):
    name, folder, model = vlm
    assert export_main([str(folder), str(tmp_path / "vit")]) == 0
    opened, report = AutoModel.from_pretrained(tmp_path / "vit", output_loading_info=True)
    assert opened.__class__.__module__.startswith("transformers.models") and not any(report.values())
    vit = open_vit(folder).eval()
    tower, pixels = tower_of(vit.config), pixels_of()
    with torch.no_grad():
        wanted = tower.patch_tokens(vit, pixels)
        assert torch.equal(tower.patch_tokens(opened.eval(), pixels), wanted)
    image_processor = AutoImageProcessor.from_pretrained(tmp_path / "vit")
    assert (list(image_processor.image_mean), list(image_processor.image_std)) == (MEAN, STD)
    inputs = image_processor(picture(130, 60), return_tensors="pt")["pixel_values"]
    if name == "qwen3_vl":  # whole blocks of two by two patches, as many as fit into 64 x 64 pixels
        assert inputs.shape == (8, 2 * 3 * 16 * 16)
    else:
        assert (image_processor.size.height, image_processor.size.width) == (64, 64)
        assert inputs.shape == (1, 3, 64, 64)
    assert {"license": "gemma"} in read_record(tmp_path / "vit")["licenses"].values()
    assert "license: gemma" in (tmp_path / "vit" / "README.md").read_text()


def test_export_keeps_the_dtype(tmp_path):
    model = save_vlm(tmp_path / "vlm", "llava")
    model.to(torch.bfloat16).save_pretrained(tmp_path / "vlm")
    export_backbone(tmp_path / "vlm", tmp_path / "vit")
    assert AutoModel.from_pretrained(tmp_path / "vit", dtype="auto").dtype == torch.bfloat16
    assert open_vit(tmp_path / "vlm").dtype == torch.float32


def test_composed_model_has_vit_and_settings(vlm, tmp_path):
    name, folder, model = vlm
    save_language_model(tmp_path / "language")
    composed, processor = compose(str(folder), str(tmp_path / "language"))
    vit = composed.model.vision_tower.eval()
    kernel = tower_of(vit.config).patch_kernel
    assert torch.equal(vit.get_parameter(kernel), model.get_parameter(f"{VLMS[name][3]}.{kernel}"))
    assert (list(processor.image_processor.image_mean), list(processor.image_processor.image_std)) == (MEAN, STD)
    assert (processor.image_processor.size.height, *pair(vit.config.image_size)) == (64, 64, 64)


def test_probe_sees_whole_image_in_a_square(vlm):
    name, folder, _ = vlm
    backbone = load_backbone(str(folder))
    image = torch.randint(0, 256, (3, 48, 80), dtype=torch.uint8)
    pixels = Preprocessing(backbone.image_processor, None)(image)
    assert pixels.shape == (3, 64, 64)
    vit = open_vit(folder).eval()
    with torch.no_grad():
        wanted = tower_of(vit.config).patch_tokens(vit, pixels[None])
    torch.testing.assert_close(backbone.maps(pixels[None]).flatten(1, 2), wanted, atol=1e-5, rtol=0)
    random = load_backbone(str(folder), random_seed=0)
    assert not torch.allclose(random.maps(pixels[None]), backbone.maps(pixels[None]))


def test_adaptation_starts_from_vit(vlm, tmp_path):
    """InternVL starts with its own language model."""
    name, folder, _ = vlm
    (tmp_path / "data").mkdir()
    args = AdaptArguments(data=str(tmp_path / "data"), output_dir=str(tmp_path / "out"), start=str(folder))
    check_arguments(args)
    key = "model_name_or_path" if name == "internvl" else "vision_model"
    assert start_settings(args)[key] == str(folder)


def test_task_model_starts_from_vit(vlm):
    _, folder, _ = vlm
    model = ViTPForSemanticSegmentation.from_backbone(
        folder, "pyramid", id2label=["none", "tree"], hidden_size=16, auxiliary_channels=16
    )
    assert model.eval()(torch.randn(1, 3, 64, 64)).logits.shape == (1, 2, 64, 64)


def test_graph_has_normalization_of_vlm(tmp_path):
    import onnx

    save_vlm(tmp_path / "vlm", "paligemma")
    export_onnx(tmp_path / "vlm", tmp_path / "vit.onnx")
    metadata = {entry.key: entry.value for entry in onnx.load(tmp_path / "vit.onnx").metadata_props}
    assert json.loads(metadata["image_mean"]) == MEAN
    assert json.loads(metadata["size"]) == {"height": 64, "width": 64}


@pytest.mark.parametrize("opening", ["open", "compose", "export", "probe", "adapt"])
def test_unknown_vit_names_families_and_register_tower(tmp_path, opening):
    folder = tmp_path / "vlm"
    save_unknown(folder)
    (tmp_path / "data").mkdir()
    args = AdaptArguments(data=str(tmp_path / "data"), output_dir=str(tmp_path / "out"), start=str(folder))
    actions = {
        "open": lambda: open_vit_config(folder),
        "compose": lambda: compose(str(folder), str(save_language_model(tmp_path / "language"))),
        "export": lambda: export_backbone(folder, tmp_path / "vit"),
        "probe": lambda: load_backbone(str(folder)),
        "adapt": lambda: check_arguments(args),
    }
    with pytest.raises(ValueError, match="register_tower") as error:
        actions[opening]()
    message = str(error.value)
    assert "\n" not in message and "'qwen2_5_vl'" in message
    assert all(family in message for family in other_families())


def test_two_vits_are_refused(tmp_path):
    """The second one could be that of videos."""
    from safetensors.torch import load_file, save_file

    save_vlm(tmp_path, "llava")
    weights = load_file(tmp_path / "model.safetensors")
    copies = {key.replace("vision_tower", "video_tower"): weight.clone() for key, weight in weights.items()}
    save_file(weights | copies, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match="video_tower"):
        open_vit(tmp_path)


def test_missing_weights_of_vit_are_named(tmp_path):
    model = save_vlm(tmp_path, "llava")
    state = {name: weight for name, weight in model.state_dict().items() if "vision_tower.encoder.layers.1" not in name}
    model.save_pretrained(tmp_path, state_dict=state)
    with pytest.raises(ValueError, match=r"layers\.1"):
        open_vit(tmp_path)


def test_whole_clip_keeps_its_image_processor(tmp_path):
    folder = str(save_backbone(tmp_path / "clip", "clip"))
    assert type(load_backbone(folder).image_processor).__name__.startswith("CLIP")


def test_page_lists_each_model():
    lines = (ROOT / "recipes/any_vit.md").read_text().splitlines()
    names = set()
    for line in lines:
        cells = line.split("|")
        if len(cells) == 9 and cells[1].startswith(" `") and cells[1] != " `model_type` ":
            names |= set(cells[1].strip(" `").split("`, `"))
    assert names == {*VLMS}
