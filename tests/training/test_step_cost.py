"""Memory and operations of a step, found without weights, against real steps and counts by hand."""

import copy
import subprocess
import sys

import pytest
import torch
from peft import LoraConfig
from tiny_models import FROM_SCRATCH
from training_run import make_trainer

from modeling_vitp import ViTPConfig, ViTPForConditionalGeneration
from modeling_vitp.training.model_patches import OUTPUTS, add_head_of_loss
from modeling_vitp.training.plan import INTERNVL2_5_1B, BatchShape, empty_batch, run, step_cost

SHAPE = BatchShape(samples=2, tiles=3, text_tokens=20, drop_ratio=0.5, answer_tokens=12)


@pytest.fixture(scope="module")
def config():
    text = {"model_type": "qwen2", **FROM_SCRATCH["text_config"], "num_hidden_layers": 3, "vocab_size": 300}
    vision = FROM_SCRATCH["vision_config"] | {"num_hidden_layers": 4}
    return ViTPConfig(vision_config=vision, text_config=text, image_token_id=7)


def real_step(config, dtype=torch.float32):
    """The bytes that autograd keeps and the operations of the linear layers, forward, of a real model as TRL trains
    it."""
    model = ViTPForConditionalGeneration(config).to(dtype).train()
    add_head_of_loss(model)
    operations = 0

    def count(module, inputs, output):
        nonlocal operations
        operations += 2 * inputs[0].numel() * module.out_features

    for module in model.modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_hook(count)
    batch = empty_batch(config, SHAPE)
    operations += 2 * SHAPE.labels * model.lm_head.weight.numel()  # of which its loss calls no layer
    image_tokens = len(batch["visual_token_indices"]) // SHAPE.samples
    del batch["shift_labels"]
    batch["labels"] = torch.zeros_like(batch["input_ids"])
    batch["labels"][:, : -SHAPE.answer_tokens] = -100
    batch["input_ids"][:, :image_tokens] = config.image_token_id
    batch["attention_mask"].fill_(1)
    batch["visual_token_indices"] = torch.arange(SHAPE.samples * image_tokens)
    batch["position_ids"] += torch.arange(batch["input_ids"].shape[1])
    kept = {}

    def keep(tensor):
        kept[tensor.untyped_storage()._cdata] = tensor.untyped_storage().nbytes(), tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model(**batch, fused_lm_head=True).loss.backward()
    own = {weight.untyped_storage()._cdata for weight in model.parameters()}
    return model, sum(size for place, (size, _) in kept.items() if place not in own), operations


def test_weights_and_what_is_kept_are_those_of_a_real_step(config):
    model, kept, operations = real_step(config)
    cost = step_cost(config, SHAPE, bf16=False)
    number = sum(weight.numel() for weight in model.parameters())
    assert (cost.weights, cost.gradients, cost.optimizer) == (4 * number, 4 * number, 8 * number)
    assert cost.activations == pytest.approx(kept, rel=0.05)
    # Beside linear layers there are the patch embedding and two products of attention, of each place with each.
    vision, text = config.vision_config, config.text_config
    patches = vision.image_size[0] // vision.patch_size[0] * vision.image_size[1] // vision.patch_size[1]
    embedding = 2 * 2 * 3 * patches * vision.num_channels * vision.patch_size[0] ** 2 * vision.hidden_size
    places = SHAPE.tiles * patches // 4 // 2 + SHAPE.text_tokens
    in_vit = vision.num_hidden_layers * 2 * 3 * 4 * (patches + 1) ** 2 * vision.hidden_size
    in_text = text.num_hidden_layers * 2 * 4 * places**2 * text.hidden_size
    assert sum(cost.forward.values()) == operations + embedding + in_vit + in_text
    # The head is computed again, since no logits are kept, and attention's scores; pixels need no gradient.
    again = cost.forward["head"] + (in_vit + in_text) / 2
    assert cost.backward == 2 * sum(cost.forward.values()) + again - embedding
    assert cost.forward["head"] == 2 * 2 * 12 * 300 * config.text_config.hidden_size


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_tied_embeddings_are_there_once_and_eager_attention_keeps_its_scores(config, attention):
    text = config.text_config.to_dict() | {"tie_word_embeddings": True}
    vision = config.vision_config.to_dict()
    tied = ViTPConfig(vision_config=vision, text_config=text, image_token_id=7, tie_word_embeddings=True)
    tied._attn_implementation = attention
    model, kept, _ = real_step(tied)
    number = sum(weight.numel() for weight in model.parameters())
    assert number == sum(weight.numel() for weight in real_step(config)[0].parameters()) - model.lm_head.weight.numel()
    cost = step_cost(tied, SHAPE, bf16=False)
    assert (cost.weights, cost.gradients, cost.optimizer) == (4 * number, 4 * number, 8 * number)
    assert cost.activations == pytest.approx(kept, rel=0.05)
    lora = LoraConfig(target_modules=["q_proj"])
    adapted = step_cost(tied, SHAPE, bf16=False, prepare=lambda model: lora)
    assert adapted.weights == 4 * number + adapted.gradients


def test_the_step_is_that_of_the_trainer(monkeypatch, tmp_path):
    asked = []
    monkeypatch.setattr("trl.trainer.sft_trainer.add_fused_lm_head", lambda model, **kwargs: asked.append(kwargs))
    make_trainer(tmp_path)
    assert asked == [{"outputs": OUTPUTS}]


def with_depth(config, vision_layers, text_layers):
    config = copy.deepcopy(config)
    config.vision_config.num_hidden_layers, config.text_config.num_hidden_layers = vision_layers, text_layers
    config.text_config.layer_types = config.text_config.layer_types[:text_layers]
    return config


@pytest.mark.parametrize("every", [0, 1, 4, 8, *(pytest.param(every, marks=pytest.mark.slow) for every in (2, 3, 7))])
def test_a_model_of_any_depth_costs_what_two_depths_tell(config, every):
    whole = run(config, SHAPE, every, True, torch.float32, None)
    if every in (1, 2, 3):  # the last of seven layers is computed again, while nothing has gone
        depths = [(4, 3), (3, 3), (4, 2)]
        plain = [run(with_depth(config, *depth), SHAPE, 0, True, torch.float32, None)[2] for depth in depths]
        whole[2] += max(plain[0] - plain[1], plain[0] - plain[2])
    cost = step_cost(config, SHAPE, every)
    forward = list(cost.forward.values())
    found = [cost.weights / 4, cost.gradients / 4, cost.activations, cost.backward, *forward]
    assert found == pytest.approx(whole.tolist())
    assert config.vision_config.num_hidden_layers == 4  # not changed


def test_checkpointing_keeps_less_and_computes_more_and_a_drop_ratio_less_of_both(config):
    plain, checkpointed = step_cost(config, SHAPE), step_cost(config, SHAPE, 1)
    assert checkpointed.activations < plain.activations / 2
    assert checkpointed.backward > plain.backward and checkpointed.forward == plain.forward
    full = step_cost(config, BatchShape(2, 3, 20))
    assert full.activations > plain.activations and full.forward["language model"] > plain.forward["language model"]
    assert full.forward["ViT"] == plain.forward["ViT"]


def test_what_is_frozen_has_no_gradients_and_lora_trains_little(config):
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


@pytest.mark.parametrize(
    ("optimizer", "share"), [("adamw_torch_fused", 2), ("adamw_bnb_8bit", 0.5), ("adafactor", 0), ("lion_32bit", 1)]
)
def test_the_state_is_that_of_the_optimizer(config, optimizer, share):
    cost = step_cost(config, SHAPE, optimizer=optimizer)
    assert cost.optimizer == share * cost.weights


def test_the_shape_of_internvl_has_the_weights_of_its_card():
    """0.94 billion: 0.30 of InternViT, 0.49 of Qwen2.5-0.5B, 0.14 of a head that is not tied, and the projector."""
    cost = step_cost(ViTPConfig(**INTERNVL2_5_1B), BatchShape(1, 1, 8))
    assert cost.weights / 4 == pytest.approx(0.938e9, rel=0.01)


MEASURE = """
import torch
from modeling_vitp.evaluation import step_time
layer, conv = torch.nn.TransformerEncoderLayer(64, 4, 64), torch.nn.Conv2d(3, 64, 14, 14)  # loads kernels
layer(conv(torch.randn(1, 3, 56, 56)).flatten(2).mT).sum().backward()
before = step_time.most_resident()
step_time.has_fast_bf16 = lambda: False
print(step_time.time_steps("ViTP, r = {ratio}", "small", {tiles}, 1, 2, {every})["peak"] - before)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("ratio", "tiles", "every"), [("0.75", 7, 0), ("0", 7, 0), ("0", 12, 0), ("0.75", 12, 1), ("0", 12, 2)]
)
def test_the_peak_of_memory_is_found_to_a_tenth(ratio, tiles, every):
    from modeling_vitp.recipes.benchmarks.step_time import ANSWER_TOKENS, TEXT_TOKENS, options_of

    script = MEASURE.format(ratio=ratio, tiles=tiles, every=every)
    done = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True)
    shape = BatchShape(1, tiles, TEXT_TOKENS, float(ratio), ANSWER_TOKENS)
    cost = step_cost(ViTPConfig(**options_of("small")), shape, every, bf16=False)
    assert cost.memory / 2**30 == pytest.approx(float(done.stdout), rel=0.1)
