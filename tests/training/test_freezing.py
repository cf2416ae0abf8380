import copy
import json
import shutil
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from pictures import picture
from pushed_runs import train
from safetensors.torch import load_file
from tiny_models import TEXT, VISION
from transformers import AutoModel
from trl import ModelConfig

from modeling_vitp import (
    ViTPForConditionalGeneration,
    ViTPProcessor,
    ViTPTrainer,
    ViTPTrainingConfig,
    ViTPVisionModel,
    export_backbone,
)
from modeling_vitp.convert.export import trained_vision_model
from modeling_vitp.pretraining.loading import build_model
from modeling_vitp.pretraining.options import parse_options
from modeling_vitp.training.freezing import freeze, lora_config

PARTS = {
    "vision": "model.vision_tower.",
    "projector": "model.multi_modal_projector.",
    "language_model": ("model.language_model.", "lm_head."),
}
LORA = {"use_peft": True, "lora_r": 4, "lora_alpha": 8, "lora_dropout": 0.0}


def run(data_folder: Path, output_dir: Path, **settings) -> int:
    """Run `pretrain.main` with a configuration file."""
    output_dir.parent.mkdir(exist_ok=True)
    settings = {"learning_rate": 1e-2, "output_dir": str(output_dir), "dataset_name": str(data_folder)} | settings
    return train(data_folder.parent, **settings, eval_strategy="no")


@pytest.fixture(scope="module")
def start(tokenizer, tmp_path_factory):
    """Return the folder of a model to start from, for comparison with later weights."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("start")
    for part in build_model(tokenizer, VISION, TEXT, {"max_patches": 2}):
        part.save_pretrained(folder)
    return folder


def trains(name: str, frozen: set[str], unfrozen_layers: set[int]) -> bool:
    part = next(part for part, prefix in PARTS.items() if name.startswith(prefix))
    if part == "vision" and "vision" in frozen:
        return any(name.startswith(f"model.vision_tower.encoder.layer.{index}.") for index in unfrozen_layers)
    return part not in frozen


COMBINATIONS = [
    (set(), 0),
    ({"vision"}, 2),
    ({"vision"}, 3),
    ({"projector"}, 0),
    ({"vision", "language_model"}, 0),
    ({"vision", "projector"}, 1),
]


def step_inputs(processor) -> dict:
    images = [picture(56, 56), picture(56, 56, 1)]
    inputs = processor(images=images, text=["<IMG_CONTEXT>How many trees?"] * 2, return_tensors="pt")
    return {**inputs, "labels": inputs["input_ids"]}


@pytest.mark.parametrize(("frozen", "layers"), COMBINATIONS)
def test_only_unfrozen_parts_have_gradients(model_and_processor, frozen, layers):
    model, processor = model_and_processor
    freeze(model, frozen, layers)
    model.train()(**step_inputs(processor)).loss.backward()
    last = set(range(3 - layers, 3))
    for name, parameter in model.named_parameters():
        wanted = trains(name, frozen, last)
        assert parameter.requires_grad == wanted, name
        assert (parameter.grad is not None and parameter.grad.abs().sum() > 0) == wanted, name


def test_wrapped_vit_drops_patches(model_and_processor):
    """The copy of the ViT that is trained beside LoRA computes as the ViT alone."""
    model, processor = model_and_processor
    model.eval()
    inputs = {"pixel_values": step_inputs(processor)["pixel_values"]}
    inputs["visible_token_indices"] = torch.tensor([[0, 3]]).expand(len(inputs["pixel_values"]), -1)
    with torch.no_grad():
        expected = model.get_image_features(**inputs).pooler_output
    config = lora_config(model, ModelConfig(**LORA), [], 0)
    wrapped = get_peft_model(model, config).eval().get_base_model()
    features = wrapped.get_image_features(**inputs).pooler_output
    torch.testing.assert_close(features, expected)
    features.sum().backward()
    trained = [weight for name, weight in wrapped.model.vision_tower.named_parameters() if "modules_to_save" in name]
    assert trained and any(weight.grad is not None for weight in trained)


@pytest.mark.parametrize(("frozen", "layers"), [case for case in COMBINATIONS if "language_model" not in case[0]])
def test_only_lora_and_unfrozen_parts_have_gradients(model_and_processor, frozen, layers):
    model, processor = model_and_processor
    names = dict(model.named_parameters())
    config = lora_config(model, ModelConfig(**LORA), frozen, layers)
    freeze(model, frozen, layers)
    peft_model = get_peft_model(model, config)
    with torch.no_grad():  # B is zero at the start, so that A has no gradient
        for name, parameter in peft_model.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    peft_model.train()(**step_inputs(processor)).loss.backward()
    last, trained, with_lora = set(range(3 - layers, 3)), set(), set()
    for name, parameter in peft_model.named_parameters():
        plain = name.removeprefix("base_model.model.").replace("modules_to_save.default.", "")
        if "lora_" in name:
            with_lora.add(plain.split(".lora_")[0])
            wanted = True
        elif "modules_to_save" in name:
            wanted = True
            trained.add(plain)
            assert trains(plain, frozen, last), name
        else:
            wanted = False
        assert parameter.requires_grad == wanted, name
        assert (parameter.grad is not None and parameter.grad.abs().sum() > 0) == wanted, name
    not_language = {name for name in names if not name.startswith(PARTS["language_model"])}
    assert trained == {name for name in not_language if trains(name, frozen, last)}
    projections = ["self_attn." + name for name in ("q_proj", "k_proj", "v_proj", "o_proj")]
    projections += ["mlp." + name for name in ("gate_proj", "up_proj", "down_proj")]
    assert with_lora == {f"model.language_model.layers.{index}.{name}" for index in range(2) for name in projections}


def test_lora_targets_never_match_the_vit(model):
    for targets in (["q_proj", "v_proj"], "q_proj", "all-linear", r"layers\.1\.mlp\..*_proj"):
        args = ModelConfig(**LORA, lora_target_modules=targets)
        peft_model = get_peft_model(copy.deepcopy(model), lora_config(model, args))
        places = {name.split(".lora_")[0] for name, _ in peft_model.named_parameters() if ".lora_" in name}
        assert places and all(".language_model." in name for name in places)
    assert {name.split(".language_model.")[1] for name in places} == {
        f"layers.1.mlp.{name}" for name in ("gate_proj", "up_proj", "down_proj")
    }


def test_lora_on_vision_reaches_linear_layers_of_the_vit(model):
    config = lora_config(model, ModelConfig(**LORA), lora_on_vision=True)
    peft_model = get_peft_model(copy.deepcopy(model), config)
    adapted = {name.split(".lora_")[0] for name, _ in peft_model.named_parameters() if ".lora_" in name}
    vit = "base_model.model.model.vision_tower.encoder.layer"
    wanted = {f"attention.{name}" for name in ("q_proj", "k_proj", "v_proj", "projection_layer")}
    wanted |= {"mlp.fc1", "mlp.fc2"}
    assert {name for name in adapted if "vision_tower" in name} == {
        f"{vit}.{index}.{name}" for index in range(3) for name in wanted
    }
    trained = [name for name, weight in peft_model.named_parameters() if weight.requires_grad]
    assert all("lora_" in name or "multi_modal_projector" in name for name in trained)
    with torch.no_grad():
        for name, weight in peft_model.named_parameters():
            if "lora_B" in name:
                weight.normal_()
    pixels = torch.randn(1, 3, 56, 56)
    exported = trained_vision_model(peft_model)
    with torch.no_grad():
        wanted = peft_model.base_model.model.model.vision_tower.eval()(pixels).last_hidden_state
        torch.testing.assert_close(exported.eval()(pixels).last_hidden_state, wanted, atol=1e-5, rtol=1e-5)
        assert (model.model.vision_tower.eval()(pixels).last_hidden_state - wanted).abs().max() > 1e-2


def test_invalid_freezing_is_refused(model):
    for parts, layers, named in [
        (PARTS, 0, "all frozen"),
        ([], 2, "unfreeze_vision_layers=2 .*vision in freeze"),
        (["vision"], 4, "unfreeze_vision_layers .*3.*got 4"),
    ]:
        with pytest.raises(ValueError, match=named):
            freeze(model, parts, layers)
    peft, no_peft = ModelConfig(**LORA), ModelConfig()
    for args, options, named in [
        (peft, {"frozen_parts": ["language_model"]}, "language_model from freeze"),
        (no_peft, {"lora_on_vision": True}, "lora_on_vision"),
        (peft, {"frozen_parts": ["vision"], "lora_on_vision": True}, "lora_on_vision"),
    ]:
        with pytest.raises(ValueError, match=named):
            lora_config(model, args, **options)
    assert lora_config(model, no_peft, frozen_parts=["language_model"]) is None


@pytest.mark.parametrize(("words", "frozen"), [(["vision", "projector"], ["vision", "projector"]), ([""], [])])
def test_freeze_option_names_parts(words, frozen):
    argv = ["--dataset_name", "rows", "--output_dir", "out", "--freeze", *words]
    assert parse_options(argv, "").data.freeze == frozen


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return ViTPForConditionalGeneration.from_pretrained(folder).state_dict()


@pytest.mark.parametrize(
    ("frozen", "layers"), [({"vision"}, 1), pytest.param({"language_model"}, 0, marks=pytest.mark.slow)]
)
def test_run_changes_only_unfrozen_parts(data_folder, start, tmp_path, frozen, layers):
    before = weights_of(start)
    settings = {"freeze": sorted(frozen), "unfreeze_vision_layers": layers, "weight_decay": 0.1}
    assert run(data_folder, tmp_path / "run", model_name_or_path=str(start), **settings) == 0
    after, last = weights_of(tmp_path / "run"), set(range(3 - layers, 3))
    for name, weight in before.items():
        assert torch.equal(weight, after[name]) != trains(name, frozen, last), name
    assert_backbone_is_that_of_the_model(tmp_path / "run")


def assert_backbone_is_that_of_the_model(output_dir: Path) -> None:
    exported = load_file(output_dir / "backbone" / "model.safetensors")
    whole, prefix = weights_of(output_dir), PARTS["vision"]
    wanted = {name.removeprefix(prefix): weight for name, weight in whole.items() if name.startswith(prefix)}
    assert exported.keys() == wanted.keys()
    assert all(torch.equal(exported[name], weight) for name, weight in wanted.items())


@pytest.mark.parametrize(
    ("frozen", "layers"), [({"vision"}, 2), pytest.param({"vision", "projector"}, 0, marks=pytest.mark.slow)]
)
def test_lora_run_is_resumed_merged_and_exported(data_folder, start, tmp_path, frozen, layers):
    before = weights_of(start)
    settings = {"freeze": sorted(frozen), "unfreeze_vision_layers": layers, **LORA}
    settings |= {"model_name_or_path": str(start), "max_steps": 3}
    assert run(data_folder, tmp_path / "whole", **settings, save_total_limit=None) == 0

    # Resume the same run after two steps.
    output = tmp_path / "stopped"
    output.mkdir()
    checkpoint = tmp_path / "whole" / "checkpoint-2"
    checkpoint.rename(output / "checkpoint-2")
    assert run(data_folder, output, **settings) == 0

    whole, resumed = weights_of(tmp_path / "whole"), weights_of(output)
    last = set(range(3 - layers, 3))
    for name, weight in before.items():
        assert torch.equal(whole[name], resumed[name]), name
        has_lora = "language_model.layers" in name and name.endswith("_proj.weight")
        trained = trains(name, frozen, last) if not name.startswith(PARTS["language_model"]) else has_lora
        assert torch.equal(weight, whole[name]) != trained, name

    # The adapter contains LoRA and the fully trained parts. Loaded on the start, it equals the merged model.
    adapter = load_file(output / "adapter" / "adapter_model.safetensors")
    saved = {name.removeprefix("base_model.model.") for name in adapter}
    in_full = {name for name in saved if "lora_" not in name}
    not_language = {name for name in before if not name.startswith(PARTS["language_model"])}
    assert in_full == {name for name in not_language if trains(name, frozen, last)}
    lora = {name for name in saved if "lora_" in name}
    assert len(lora) == 2 * 2 * 7  # A and B, layers, projections
    base = ViTPForConditionalGeneration.from_pretrained(start)
    model = PeftModel.from_pretrained(base, output / "adapter").eval()
    merged = ViTPForConditionalGeneration.from_pretrained(output).eval()
    inputs = step_inputs(ViTPProcessor.from_pretrained(output))
    with torch.no_grad():
        torch.testing.assert_close(model(**inputs).logits, merged(**inputs).logits, atol=1e-5, rtol=1e-5)
    assert_backbone_is_that_of_the_model(output)
    assert not list(output.glob("adapter_*")) and (output / "processor_config.json").exists()

    # The merged weight is W + alpha / r * B A.
    name = "model.language_model.layers.0.self_attn.q_proj"
    a, b = (adapter[f"base_model.model.{name}.lora_{side}.weight"] for side in "AB")
    torch.testing.assert_close(merged.state_dict()[f"{name}.weight"], before[f"{name}.weight"] + 2.0 * b @ a)


def test_peft_model_exports_its_trained_vit(model, tmp_path):
    """PEFT keeps a copy of the initial ViT, which must not be exported."""
    pixels = torch.randn(2, 3, 56, 56)
    start = copy.deepcopy(model.model.vision_tower).eval()
    text, layer = r".*language_model.*q_proj", "vision_tower.encoder.layer.2"
    configs = {
        "full": (model, LoraConfig(target_modules=text, modules_to_save=["vision_tower"])),
        "layer": (model, LoraConfig(target_modules=text, modules_to_save=[layer])),
        "LoRA": (model, LoraConfig(target_modules=r".*vision_tower.*(q_proj|fc1)")),
        "alone": (model.model.vision_tower, LoraConfig(target_modules=["q_proj", "fc1"])),
    }
    for case, (wrapped, config) in configs.items():
        peft_model = get_peft_model(copy.deepcopy(wrapped), config)
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in peft_model.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
        state = {name: value.clone() for name, value in peft_model.state_dict().items()}
        export_backbone(peft_model, tmp_path / case)
        assert all(torch.equal(value, state[name]) for name, value in peft_model.state_dict().items())
        with torch.no_grad():
            base = peft_model.eval().get_base_model()
            tower = base if isinstance(base, ViTPVisionModel) else base.model.vision_tower
            wanted = tower(pixels).last_hidden_state
            native = AutoModel.from_pretrained(tmp_path / case)
            torch.testing.assert_close(native(pixels).last_hidden_state, wanted, atol=1e-4, rtol=1e-4)
            assert (wanted - start(pixels).last_hidden_state).abs().max() > 0.01
        assert load_file(tmp_path / case / "model.safetensors").keys() == start.state_dict().keys()


@pytest.mark.slow
def test_lora_checkpoint_exports_the_backbone_of_the_run(data_folder, start, tmp_path):
    half = tmp_path / "half"
    shutil.copytree(start, half)
    ViTPForConditionalGeneration.from_pretrained(start, dtype=torch.float16).save_pretrained(half)
    settings = {"model_name_or_path": str(half), "save_total_limit": None}
    assert run(data_folder, tmp_path / "run", **settings, **LORA) == 0
    exported = load_file(export_backbone(tmp_path / "run" / "checkpoint-2", tmp_path / "out") / "model.safetensors")
    of_run = load_file(tmp_path / "run" / "backbone" / "model.safetensors")
    assert exported.keys() == of_run.keys()
    for name, weight in of_run.items():
        assert exported[name].dtype == weight.dtype == torch.float32 and torch.equal(exported[name], weight), name


@pytest.mark.slow
def test_gradient_checkpointing_works_with_frozen_vit_and_lora(model_and_processor, data_folder, tmp_path):
    model, processor = model_and_processor
    freeze(model, ["vision"], unfreeze_vision_layers=1)
    config = lora_config(model, ModelConfig(**LORA), frozen_parts=["vision"], unfreeze_vision_layers=1)
    settings = {"max_steps": 1, "learning_rate": 1e-2, "bf16": False, "report_to": "none"}
    args = ViTPTrainingConfig(str(tmp_path / "run"), **settings, gradient_checkpointing=True)
    dataset = Dataset.from_parquet(str(data_folder / "train.parquet"))
    trainer = ViTPTrainer(model, args, train_dataset=dataset, processing_class=processor, peft_config=config)
    before = {name: value.clone() for name, value in trainer.model.named_parameters() if value.requires_grad}
    trainer.train()
    for name, value in trainer.model.named_parameters():
        if name in before and "lora_A" not in name:  # A has no gradient while B is zero
            assert not value.equal(before[name]), name
    assert json.loads((tmp_path / "run" / "checkpoint-1" / "adapter_config.json").read_text())["r"] == 4
