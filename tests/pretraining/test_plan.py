"""Cost estimate of a run, compared with costs that are computed independently."""

import copy
import dataclasses
import json
import shlex
from types import SimpleNamespace

import pytest
import torch
import yaml
from peft import LoraConfig
from pictures import picture
from tiny_models import FROM_SCRATCH, TEXT, VISION
from trl import ModelConfig

from modeling_vitp import ViTPConfig, ViTPForConditionalGeneration, ViTPTrainingConfig
from modeling_vitp.instructions.dry_run import summarize_sources
from modeling_vitp.instructions.mixture import load_mixture
from modeling_vitp.pretraining import plan
from modeling_vitp.pretraining.arguments import PretrainArguments
from modeling_vitp.pretraining.model_patches import checkpoint_activations
from modeling_vitp.pretraining.plan import (
    INTERNVL2_5_1B,
    BatchShape,
    Setup,
    Work,
    changes,
    config_of_start,
    empty_batch,
    mean_operations,
    measure_pretraining,
    padding_of_samples,
    pretraining_operations,
    shares_of_drops,
    step_cost,
    work_of,
)
from modeling_vitp.recipes import pretrain
from modeling_vitp.training.config import HAS_ACTIVATION_CHECKPOINTING
from modeling_vitp.training.costs import DEVICES, Device, StepCost, count_operations, describe_device, fastest_setting

ARGUMENTS = ["--config", "remote_sensing_paper", "--dry_run"]


def test_start_keeps_its_ratio_and_tied_weights(tmp_path):
    parts = {"vision_config": VISION, "text_config": TEXT}
    ViTPConfig(**parts, downsample_ratio=0.25, tie_word_embeddings=True).save_pretrained(tmp_path)
    config, assumed = config_of_start(PretrainArguments("rows"), ModelConfig(str(tmp_path)))
    assert (config.image_seq_length, config.tie_word_embeddings, assumed) == (1, True, "")


@pytest.mark.slow
def test_memory_and_hours_follow_the_samples(capsys):
    assert pretrain.main(ARGUMENTS) == 0
    text = capsys.readouterr().out
    assert "8,000 steps of 128 samples take 24.2 hours" in text
    assert "each device receives 6.57 GB with DDP and 50.2 GB with FSDP2 per step" in text
    peak = step_cost(ViTPConfig(**INTERNVL2_5_1B), BatchShape(1, 13, 200, 0.75), 1).with_buckets(8)
    row = next(line for line in text.splitlines() if line.startswith("| as configured"))
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    *memory, room, tera, hours, device_hours = cells[1:]
    parts = [peak.weights, peak.gradients, peak.optimizer, peak.activations, peak.memory]
    assert memory == [f"{part / 2**30:.2f}" for part in parts]
    assert room == f"{48 - peak.memory / 2**30:.1f} free"
    assert float(hours) == pytest.approx(8000 * float(tera) / (0.4 * 149.7) / 3600, rel=0.01)
    assert float(device_hours) == pytest.approx(8 * float(hours), rel=0.01)


@pytest.mark.skipif(not HAS_ACTIVATION_CHECKPOINTING, reason="every_n_layers needs transformers 5.23")
def test_plan_inverts_each_setting():
    compared = changes(Setup(0.9, 0, True), False)
    assert [(setup.drop_ratio, setup.checkpoint_every, setup.lora) for setup in compared.values()] == [
        (0.9, 0, True),
        (0.0, 0, True),
        (0.75, 0, True),
        (0.9, 4, True),
        (0.9, 2, True),
        (0.9, 1, True),
        (0.9, 0, False),
    ]
    assert not any("LoRA" in name for name in changes(Setup(0.0, 0, False), True))
    compared = changes(Setup(0.75, 0, False, patch_drop_ratio=0.5), True)
    assert compared["patch_drop_ratio = 0"] == Setup(0.75, 0, False)
    for padding_free in (False, True):
        compared = changes(Setup(0.75, 0, False, padding_free), False, is_padded=True)
        assert Setup(0.75, 0, False, not padding_free) in compared.values()


def test_unknown_device_is_named():
    with pytest.raises(ValueError, match="plan_device .*a40, .*h100.*'tpu'"):
        describe_device("tpu")
    with pytest.raises(ValueError, match="'24gib,0tflop/s'"):
        describe_device("24GiB,0TFLOP/s")
    assert describe_device("H100")[1] == DEVICES["h100"]
    assert describe_device(" 24.0 gib, 71.5 tflop/s") == ("custom", Device(24.0, 71.5e12))


def test_default_device_has_memory_of_this_machine(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    for name, memory, known in [
        ("NVIDIA A100-SXM4-40GB", 40, "a100"),
        ("NVIDIA GeForce RTX 4090", 24, "rtx4090"),
        ("NVIDIA RTX A4000", 16, None),
    ]:
        properties = SimpleNamespace(name=name, total_memory=memory * 2**30)
        monkeypatch.setattr("torch.cuda.get_device_properties", lambda index, properties=properties: properties)
        description, device = describe_device(None)
        assert device == dataclasses.replace(DEVICES[known or "a40"], memory=memory)
        assert description.startswith(name) and ("--plan_device" in description) == (known is None)


def test_work_counts_longest_and_undropped_rows(tmp_path, processor):
    """Rows have four images, which have more tiles than one image; one row has a long text."""
    pictures = [str(tmp_path / f"{index}.png") for index in range(4)]
    for index, path in enumerate(pictures):
        picture(56, 56, index).save(path)
    question = "Which?"
    asked, lengths = {"from": "human", "value": "<image>" * 4 + question}, [40, 4000, 40]
    lines = [{"image": pictures, "conversations": [asked, {"from": "gpt", "value": "a" * size}]} for size in lengths]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")
    source = {"name": "four", "annotation": str(tmp_path / "rows.jsonl"), "image_root": str(tmp_path)}
    (tmp_path / "mixture.yaml").write_text(yaml.safe_dump({"sources": [source]}))
    summaries = summarize_sources(load_mixture(str(tmp_path / "mixture.yaml")), processor.image_processor)
    tiles = sum(processor.image_processor.num_tiles([(56, 56)] * 4))
    characters = [len(question) + size for size in lengths]
    for settings, from_scratch, undropped in [
        ({}, False, 0),
        ({}, True, 0.5),
        ({"vrl_warmup_steps": 25}, True, 0.25),
        ({"vrl_warmup_steps": 0}, True, 0),
        ({"vrl_warmup_steps": 500}, False, 1),
        ({"vrl_warmup_steps": 50, "vrl_apply_prob": 0.5}, False, 0.75),
        ({"vrl_drop_ratio": 0.0}, True, 0),
    ]:
        settings = {"max_steps": 100, "max_length": 700, "vrl_drop_ratio": 0.75, **settings}
        work = work_of(ViTPTrainingConfig(str(tmp_path), **settings), 1, summaries, from_scratch)
        assert (work.longest.tiles, work.mean.tiles) == (max(tiles, 7), tiles)
        assert work.mean.text_tokens == round(sum(characters) / 3 / 4)
        assert work.longest.text_tokens == 700 < max(characters) / 4
        assert work.undropped == pytest.approx(undropped), settings


@pytest.mark.parametrize(("drop_last", "steps"), [(False, 9), (True, 6)])
def test_steps_equal_whole_epochs(tmp_path, drop_last, steps):
    """The Trainer counts the same: an epoch of 10 rows in batches of 4 has three steps, or two with drop_last."""
    summary = SimpleNamespace(effective=10, share=1, tiles=1.5, text_tokens=5, longest=(2, 5))
    settings = {"per_device_train_batch_size": 4, "num_train_epochs": 3, "dataloader_drop_last": drop_last}
    work = work_of(ViTPTrainingConfig(str(tmp_path), **settings), 1, [summary], False)
    assert (work.steps, work.mean.tiles) == (steps, 1.5)


def test_operations_of_a_pretraining_are_those_of_its_steps(monkeypatch):
    """One of four samples keeps all tokens, on four devices with two micro-batches each, for ten steps."""

    def step_cost(config, batch):
        return StepCost(0, 0, 0, 0, {"ViT": 1000 * (1 - batch.drop_ratio)}, 2000 * (1 - batch.drop_ratio))

    monkeypatch.setattr(plan, "step_cost", step_cost)
    batch = BatchShape(2, 1, 12)
    drops = {(True, True): 0.0, (True, False): 0.75, (False, True): 0.0, (False, False): 0.25}
    work = Work(steps=10, drops=drops, accumulation=2, devices=4, mean=batch, longest=batch)
    assert pretraining_operations(None, work, 0.75) == 10 * 4 * 2 * (0.75 * 750 + 0.25 * 3000)


def test_operations_of_a_pretraining_count_dropped_patches(monkeypatch):
    def step_cost(config, batch):
        return StepCost(0, 0, 0, 0, {"ViT": 1000 * (1 - batch.patch_drop_ratio) - 100 * batch.drop_ratio}, 0)

    monkeypatch.setattr(plan, "step_cost", step_cost)
    batch = BatchShape(2, 1, 12)
    drops = {(True, True): 0.4, (True, False): 0.3, (False, True): 0.2, (False, False): 0.1}
    work = Work(steps=10, drops=drops, accumulation=1, devices=1, mean=batch, longest=batch)
    expected = 10 * (0.4 * (250 - 50) + 0.3 * (1000 - 50) + 0.2 * 250 + 0.1 * 1000)
    assert pretraining_operations(None, work, 0.5, 0.75) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("warmup", "end", "apply_prob"), [(0, 0.1, 1.0), (5, 0.1, 1.0), (15, 0.3, 0.5), (20, 1.0, 0.8)]
)
def test_shares_of_drops_equal_a_loop(tmp_path, warmup, end, apply_prob):
    settings = {"patch_drop_ratio": 0.5, "patch_drop_end": end, "vrl_apply_prob": apply_prob, "vrl_drop_ratio": 0.75}
    args = ViTPTrainingConfig(str(tmp_path), **settings)
    shares = dict.fromkeys([(True, True), (True, False), (False, True), (False, False)], 0.0)
    for step in range(20):
        drops_patches = step < 20 - max(1, round(end * 20))
        has_vrl = apply_prob * (step >= warmup)
        shares[True, drops_patches] += has_vrl / 20
        shares[False, drops_patches] += (1 - has_vrl) / 20
    assert shares_of_drops(args, 20, warmup) == pytest.approx(shares)
    args.patch_drop_ratio = 0.0
    assert shares_of_drops(args, 20, warmup)[True, True] == 0.0
    args.vrl_drop_ratio = 0.0
    assert shares_of_drops(args, 20, warmup)[True, False] == 1.0


def test_operations_of_a_mean_sample_are_interpolated():
    assert mean_operations(lambda batch: batch.tiles**2, BatchShape(1, 1.5, 12)) == (1 + 4) / 2
    assert mean_operations(lambda batch: batch.tiles**2, BatchShape(1, 2, 12)) == 4


def test_gradients_have_buckets_on_several_devices():
    cost = StepCost(4, 2, 8, 1, {}, 0)
    assert cost.with_buckets(1) == cost and cost.with_buckets(2).memory == cost.memory + cost.gradients


def sampled(share: float, *samples: tuple[int, float]) -> SimpleNamespace:
    """Return a summary of a source with the given samples of tiles and text tokens."""
    return SimpleNamespace(share=share, samples=list(samples))


def test_padding_equals_expectation_over_sources(tmp_path):
    """Two thirds of the samples have 4 + 20 tokens, one third has 8 + 96 tokens at r = 0.

    Therefore 4/9 of the batches have one sample of each length, and 80 padding tokens in two rows.
    """
    summaries = [sampled(2 / 3, (1, 20.0)), sampled(1 / 3, (2, 96.0))]

    def padding(ratio: float, patch_ratio: float = 0.0, devices: int = 1, **options) -> int:
        args = ViTPTrainingConfig(str(tmp_path), **{"per_device_train_batch_size": 2, "max_length": None} | options)
        return padding_of_samples(args, devices, summaries, 4, ratio, patch_ratio)

    accumulation = {"gradient_accumulation_steps": 32}
    assert padding(0.0, **accumulation) == pytest.approx(4 / 9 * 80 / 2, abs=1.5)
    assert padding(0.75, **accumulation) == pytest.approx(4 / 9 * (98 - 21) / 2, abs=1.5)
    assert padding(0.0, 0.5, **accumulation) == pytest.approx(4 / 9 * (100 - 22) / 2, abs=1.5)
    assert padding(0.0, devices=32) == pytest.approx(4 / 9 * 80 / 2, abs=1.5)
    assert padding(0.0, max_length=64, **accumulation) == pytest.approx(4 / 9 * 40 / 2, abs=1)
    assert padding(0.0, per_device_train_batch_size=1) == 0
    for strategy in ("batch_rebalance", "group_by_length"):
        assert padding(0.0, train_sampling_strategy=strategy, **accumulation) <= 2
    summaries = [sampled(0.0, (1, 20.0))]
    assert padding(0.0) == 0  # a source without known samples


def test_padding_has_no_labels():
    config = ViTPConfig(**INTERNVL2_5_1B)
    batch = empty_batch(config, BatchShape(2, 1, 30, 0.75, answer_tokens=10, padding=8))
    assert batch["input_ids"].shape == (2, 64 + 30 + 8) and batch["answer_labels"].shape == (2, 64 + 30 + 8)


@pytest.mark.slow
def test_fastest_checkpointing_that_fits_is_printed(capsys):
    """The configured run needs 19.2 GiB, checkpointing of every fourth layer 30.4."""
    device = ["--plan_device", "35GiB,10TFLOP/s"]
    options = "--activation_checkpointing true --activation_checkpointing_kwargs '{\"every_n_layers\": 4}'"
    assert pretrain.main([*ARGUMENTS, *device]) == 0
    assert f"Fastest setting with 10% of the device free: {options}\n" in capsys.readouterr().out
    assert pretrain.main([*ARGUMENTS, *device, *shlex.split(options)]) == 0
    assert "Fastest setting" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("room", "fastest"),
    [
        ({1: 9.0, 8: 4.0, 0: 3.0, 2: 8.0, 4: 7.0}, 0),
        ({1: 9.0, 8: 4.0, 0: 2.9, 2: 8.0, 4: 7.0}, 8),
        ({1: 9.0, 8: 2.0, 0: -1.0, 2: 8.0, 4: 3.0}, 4),
        ({1: 3.0, 2: 2.0, 0: -1.0}, 1),
        ({1: 2.9, 2: 2.0, 0: -1.0}, None),
    ],
)
def test_fastest_setting_fits_the_device(room, fastest):
    """A device of 30 GiB must have 3 GiB free. Checkpointing of more layers takes longer."""
    settings = {}
    for every, free in room.items():
        duration = 1 / every if every else 0.0
        settings[every] = StepCost((30 - free) * 2**30, 0, 0, 0, {}, 0), duration
    assert fastest_setting(settings, 30) == fastest


def test_hours_follow_the_speed():
    device = Device(24, 2e12, 1e12)
    assert (device.hours(3.6e15, 0.5), device.hours(3.6e15, 0.5, bf16=False)) == (1, 2)
    assert Device(24, 2e12).hours(3.6e15, 0.5, bf16=False) is None


SHAPE = BatchShape(samples=2, tiles=3, text_tokens=20, drop_ratio=0.5, answer_tokens=12)


@pytest.fixture(scope="module")
def config():
    text = {"model_type": "qwen2", **FROM_SCRATCH["text_config"], "num_hidden_layers": 3, "vocab_size": 300}
    vision = FROM_SCRATCH["vision_config"] | {"num_hidden_layers": 4}
    return ViTPConfig(vision_config=vision, text_config=text, image_token_id=7)


@pytest.fixture(scope="module")
def plain_step(config):
    return real_step(config)


def real_step(config, every=0):
    """Return a trained model, its step on real tensors, and the forward operations of its linear layers.

    The step has the bytes that autograd keeps after the forward pass and those after the last layer, and the operations
    of the backward pass.
    """
    model = ViTPForConditionalGeneration(config).train()
    operations, kept, own = 0, {}, {weight.untyped_storage()._cdata for weight in model.parameters()}

    def count(module, inputs, output):
        nonlocal operations
        operations += 2 * inputs[0].numel() * module.out_features

    for module in model.modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_hook(count)
    batch = empty_batch(config, SHAPE)
    image_tokens = len(batch["visual_token_indices"]) // SHAPE.samples
    batch["answer_labels"][:, : -SHAPE.answer_tokens] = -100
    batch["input_ids"][:, :image_tokens] = config.image_token_id
    batch["attention_mask"].fill_(1)
    batch["visual_token_indices"] = torch.arange(SHAPE.samples * image_tokens)
    batch["position_ids"] += torch.arange(batch["input_ids"].shape[1])

    def keep(tensor):
        kept[tensor.untyped_storage()._cdata] = tensor.untyped_storage().nbytes(), tensor
        return tensor

    def size():
        return sum(size for address, (size, _) in kept.items() if address not in own)

    sizes = []
    model.model.language_model.layers[-1].register_forward_hook(lambda *_: sizes.append(size()))
    if every:
        checkpoint_activations(model, every)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = model(**batch).log_probs.sum()
    forward = operations
    with count_operations() as counter:
        loss.backward()
    step = SimpleNamespace(kept=size(), after_layers=sizes[0], backward=counter.get_total_flops())
    return model, step, forward


def test_step_cost_equals_a_real_step(config, plain_step):
    model, step, operations = plain_step
    cost = step_cost(config, SHAPE, bf16=False)
    number = sum(weight.numel() for weight in model.parameters())
    assert (cost.weights, cost.gradients, cost.optimizer) == (4 * number, 4 * number, 8 * number)
    assert cost.activations == pytest.approx(step.kept, rel=0.05)
    # Further operations are those of the patch embedding and of two products of attention over all pairs of tokens.
    vision, text = config.vision_config, config.text_config
    patches = vision.image_size[0] // vision.patch_size[0] * vision.image_size[1] // vision.patch_size[1]
    embedding = 2 * 2 * 3 * patches * vision.num_channels * vision.patch_size[0] ** 2 * vision.hidden_size
    places = SHAPE.tiles * patches // 4 // 2 + SHAPE.text_tokens
    in_vit = vision.num_hidden_layers * 2 * 3 * 4 * (patches + 1) ** 2 * vision.hidden_size
    in_text = text.num_hidden_layers * 2 * 4 * places**2 * text.hidden_size
    assert sum(cost.forward.values()) == operations + embedding + in_vit + in_text
    # Scores of attention are recomputed; pixels need no gradient.
    again = (in_vit + in_text) / 2
    assert cost.backward == 2 * sum(cost.forward.values()) + again - embedding
    assert cost.forward["head"] == 2 * 2 * 12 * 300 * config.text_config.hidden_size


@pytest.mark.parametrize("drop_ratio", [0.0, 0.75])
def test_step_cost_of_dropped_patches_equals_formula(config, drop_ratio):
    """The layers of the ViT compute the CLS token and the patches of half of the four tokens of each tile."""
    shape = dataclasses.replace(SHAPE, drop_ratio=drop_ratio, patch_drop_ratio=0.5)
    cost = step_cost(config, shape, bf16=False)
    vision, text = config.vision_config, config.text_config
    num_tiles = shape.samples * shape.tiles
    width, inner = vision.hidden_size, vision.intermediate_size
    places = 1 + 4 * 2
    layer = 2 * places * (4 * width**2 + 2 * width * inner) + 4 * places**2 * width
    kernel = 2 * 16 * vision.num_channels * vision.patch_size[0] ** 2 * width
    assert cost.forward["ViT"] == num_tiles * (kernel + vision.num_hidden_layers * layer)
    num_kept = shape.samples * shape.tiles * 2 if drop_ratio == 0 else shape.samples * shape.tiles
    projector = 2 * num_kept * (4 * width + text.hidden_size) * text.hidden_size
    assert cost.forward["projector"] == projector
    whole = step_cost(config, dataclasses.replace(shape, patch_drop_ratio=0.0), bf16=False)
    assert cost.forward["head"] == whole.forward["head"]
    assert cost.activations < whole.activations and cost.weights == whole.weights


def test_tied_embeddings_and_eager_attention(config, plain_step):
    text = config.text_config.to_dict() | {"tie_word_embeddings": True}
    vision = config.vision_config.to_dict()
    tied = ViTPConfig(vision_config=vision, text_config=text, image_token_id=7, tie_word_embeddings=True)
    tied._attn_implementation = "eager"
    model, step, _ = real_step(tied)
    number = sum(weight.numel() for weight in model.parameters())
    assert number == sum(weight.numel() for weight in plain_step[0].parameters()) - model.lm_head.weight.numel()
    cost = step_cost(tied, SHAPE, bf16=False)
    assert (cost.weights, cost.gradients, cost.optimizer) == (4 * number, 4 * number, 8 * number)
    assert cost.activations == pytest.approx(step.kept, rel=0.05)
    lora = LoraConfig(target_modules=["q_proj"])
    adapted = step_cost(tied, SHAPE, bf16=False, prepare=lambda model: lora)
    assert adapted.weights == 4 * number + adapted.gradients


def with_depth(config, vision_layers, text_layers):
    config = copy.deepcopy(config)
    config.vision_config.num_hidden_layers, config.text_config.num_hidden_layers = vision_layers, text_layers
    config.text_config.layer_types = config.text_config.layer_types[:text_layers]
    return config


@pytest.mark.skipif(not HAS_ACTIVATION_CHECKPOINTING, reason="every_n_layers needs transformers 5.23")
@pytest.mark.parametrize("every", [1, 2, 4])
def test_checkpointing_equals_a_real_step(config, plain_step, every):
    """In a model of seven layers, the last one is recomputed while the inputs of all layers are kept."""
    _, step, _ = real_step(config, every)
    expected = step.kept
    if every < 4:
        inputs = 4 * SHAPE.samples * (SHAPE.tiles * 4 // 2 + SHAPE.text_tokens) * config.text_config.hidden_size
        layer = plain_step[1].kept - real_step(with_depth(config, 4, 2))[1].kept
        expected = max(expected, step.after_layers + layer - inputs)
    cost = step_cost(config, SHAPE, every, bf16=False)
    assert cost.activations == pytest.approx(expected, rel=0.05)
    assert cost.backward == step.backward
    assert config.vision_config.num_hidden_layers == 4  # not changed


def test_step_cost_of_one_layer_equals_a_real_step(config):
    shallow = with_depth(config, 1, 1)
    _, step, _ = real_step(shallow)
    cost = step_cost(shallow, SHAPE, bf16=False)
    assert cost.activations == pytest.approx(step.kept, rel=0.05) and cost.backward == step.backward


def test_layers_that_are_alike_stand_for_all(config):
    """The costs of two layers of each kind, extended to all layers, equal those of the whole model."""
    step, whole = (measure_pretraining(config, SHAPE, layers_are_alike=alike) for alike in (True, False))
    for every in (0, 1, 2, 4):
        assert step.cost(every) == whole.cost(every)


def test_frozen_parts_and_lora_cost_less(config):
    def freeze(model):
        model.model.vision_tower.requires_grad_(False)
        return LoraConfig(r=2, target_modules=r"model\.language_model\..*q_proj", modules_to_save=[])

    def only_lora(model):
        return LoraConfig(r=2, target_modules=r"model\.language_model\..*q_proj")

    text = config.text_config
    for prepare in (freeze, only_lora):
        cost = step_cost(config, SHAPE, prepare=prepare)
        assert cost.gradients == 4 * text.num_hidden_layers * 2 * (text.hidden_size + text.hidden_size)
    assert cost.weights > 100 * cost.gradients


def test_optimizer_state_depends_on_optimizer(config):
    shares = {"adamw_bnb_8bit": 0.5, "adafactor": 0, "lion_32bit": 1}
    for optimizer, share in shares.items():
        cost = step_cost(config, SHAPE, optimizer=optimizer)
        assert cost.optimizer == share * cost.weights, optimizer


def test_internvl_shape_has_published_weights():
    """The 0.94 billion weights are 0.30 of InternViT, 0.49 of Qwen2.5-0.5B, 0.14 of the head, and the projector."""
    cost = step_cost(ViTPConfig(**INTERNVL2_5_1B), BatchShape(1, 1, 8))
    assert cost.weights / 4 == pytest.approx(0.938e9, rel=0.01)
