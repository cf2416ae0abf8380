"""Memory and floating-point operations of a training step, found without weights, data or an accelerator.

The model runs forward and backward on tensors that have shapes and no values, in the code that trains it. What autograd
keeps for the backward pass is added up, and operations are counted by PyTorch's own counter. Layers are alike, so two
depths tell of any.
"""

import copy
import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from unittest.mock import patch

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode
from transformers.modeling_outputs import ModelOutput
from trl.trainer.utils import add_fused_lm_head

from ..configuration_vitp import ViTPConfig
from ..modeling_vitp import ViTPForConditionalGeneration
from ..vrl import num_kept_tokens
from .head import OUTPUTS

PARTS = {
    "ViT": "model.vision_tower",
    "projector": "model.multi_modal_projector",
    "language model": "model.language_model",
}
ACTIVATIONS = 2  # of what `run` returns
INTERNVL2_5_1B = {  # the shapes of InternViT-300M and Qwen2.5-0.5B
    "vision_config": {
        "hidden_size": 1024,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "intermediate_size": 4096,
        "image_size": [448, 448],
    },
    "text_config": {
        "model_type": "qwen2",
        "hidden_size": 896,
        "num_hidden_layers": 24,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
        "intermediate_size": 4864,
        "vocab_size": 151674,
    },
}
# Bytes of optimizer state for each trained weight in float32, by what the name of the optimizer begins or ends with.
ADAM_STATE, STATES = 8, {"8bit": 2, "adafactor": 0, "sgd": 0, "lion": 4}


@dataclass(frozen=True)
class BatchShape:
    """A batch of equal samples: `tiles` of each, `text_tokens` beside the visual ones, r, how many of the text's tokens
    are answers (all, if that is not known), and the places behind them that hold nothing.
    """

    samples: int
    tiles: int
    text_tokens: int
    drop_ratio: float = 0.0
    answer_tokens: int | None = None
    padding: int = 0

    @property
    def labels(self) -> int:
        return self.samples * (self.text_tokens if self.answer_tokens is None else self.answer_tokens)


@dataclass(frozen=True)
class StepCost:
    """Bytes by what holds them, and floating-point operations by part of the model.

    `activations` are what is kept for the backward pass, with checkpointing also those of one layer that are computed
    again. `forward`, by part, and `backward` are operations of one batch; `backward` has what is computed again: the
    head, of which TRL keeps no logits, and with checkpointing the layers.
    """

    weights: float
    gradients: float
    optimizer: float
    activations: float
    forward: dict[str, float]
    backward: float

    @property
    def memory(self) -> float:
        """Bytes at the peak: the sum, though gradients come as activations go, since there are copies beside them."""
        return self.weights + self.gradients + self.optimizer + self.activations

    @property
    def operations(self) -> float:
        return sum(self.forward.values()) + self.backward


def step_cost(
    config: ViTPConfig,
    batch: BatchShape,
    checkpoint_every: int = 0,
    bf16: bool = True,
    dtype: torch.dtype = torch.float32,
    optimizer: str = "adamw_torch",
    prepare: Callable[[ViTPForConditionalGeneration], LoraConfig | None] | None = None,
    layers_are_alike: bool = True,
) -> StepCost:
    """The cost of one step on one device, of which nothing is shared with others.

    Args:
        config: of the model.
        batch: what a device is given at once.
        checkpoint_every: one layer of so many, counted from the first of the ViT to the last of the language model,
            computes its activations again in the backward pass; 0 for none.
        bf16: autocast to bfloat16.
        dtype: of the weights.
        optimizer: its name, as in the arguments of the training.
        prepare: freezes what does not train, and returns the LoRA of the rest if there is one.
        layers_are_alike: `False` if some layers of the ViT train and others do not; it takes longer then.
    """
    depths = config.vision_config.num_hidden_layers, config.text_config.num_hidden_layers

    def measure(vision_layers: int, text_layers: int, every: int) -> np.ndarray:
        shallow = copy.deepcopy(config)
        shallow.vision_config.num_hidden_layers, shallow.text_config.num_hidden_layers = vision_layers, text_layers
        if getattr(shallow.text_config, "layer_types", None):
            shallow.text_config.layer_types = shallow.text_config.layer_types[:text_layers]
        return run(shallow, batch, every, bf16, dtype, prepare)

    def of_layers(every: int) -> np.ndarray:
        """The model with one layer of each kind, and what another of the ViT or of the language model adds."""
        one = measure(1, 1, every)
        return np.stack([one, measure(2, 1, every) - one, measure(1, 2, every) - one])

    if layers_are_alike:
        one, *added = of_layers(min(checkpoint_every, 1))
        total = one + (depths[0] - 1) * added[0] + (depths[1] - 1) * added[1]
    else:
        total = measure(*depths, checkpoint_every)
    if checkpoint_every:
        plain_one, *plain = of_layers(0)
        if layers_are_alike and checkpoint_every > 1:
            total += plain_one - sum(plain) - (one - sum(added))  # kept once, for all layers that are not checkpointed
            first = math.ceil(depths[0] / checkpoint_every)
            again = first, math.ceil(sum(depths) / checkpoint_every) - first
            for kept, depth, layers, computed in zip(plain, depths, again, added):
                total += (depth - layers) * (kept - computed)
        if (sum(depths) - 1) % checkpoint_every == 0:  # before it is computed again, no layer's activations have gone
            total[ACTIVATIONS] += max(layer[ACTIVATIONS] for layer in plain)
    weights, trained, activations, backward, *forward = total.tolist()
    state = next((size for name, size in STATES.items() if name in optimizer), ADAM_STATE)
    gradients = trained * dtype.itemsize
    parts = weights * dtype.itemsize, gradients, gradients * state / 4, activations
    return StepCost(*parts, dict(zip([*PARTS, "head"], forward)), backward)


def run(
    config: ViTPConfig,
    batch: BatchShape,
    checkpoint_every: int,
    bf16: bool,
    dtype: torch.dtype,
    prepare: Callable[[ViTPForConditionalGeneration], LoraConfig | None] | None,
) -> np.ndarray:
    """Weights, those that train, bytes kept for the backward pass, operations backward, and forward by part."""

    def keep_labelled(module: torch.nn.Module, inputs: tuple, outputs: ModelOutput) -> None:
        places = outputs.last_hidden_state.flatten(0, 1)
        outputs.last_hidden_state = places[torch.arange(batch.labels)][None]  # any will do: none has a value

    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of names that PEFT uses
        model = ViTPForConditionalGeneration(config).to(dtype).train()
        add_fused_lm_head(model, outputs=OUTPUTS)
        model.base_model.register_forward_hook(keep_labelled)
        lora = prepare(model) if prepare is not None else None
        if lora is not None:
            model = get_peft_model(model, lora)
    kept: dict[int, tuple[int, torch.Tensor]] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        kept[storage._cdata] = storage.nbytes(), tensor  # the tensor, so that the place is not given to another one
        return tensor

    # What checks values cannot be asked here: there are none.
    asks_nothing = (
        patch("torch.compiler.is_compiling", lambda: True),
        patch("torch._check_tensor_all", lambda *args: None),
    )
    counter = count_operations()
    prefix = "" if lora is None else "base_model.model."
    with FakeTensorMode(allow_non_fake_inputs=True), asks_nothing[0], asks_nothing[1]:
        model.to_empty(device="cpu")
        (model if lora is None else model.get_base_model()).tie_weights()
        if checkpoint_every:
            model.activation_checkpointing_enable(every_n_layers=checkpoint_every)
        own = {weight.untyped_storage()._cdata for weight in model.parameters()}
        inputs = empty_batch(config, batch)
        saving = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
        with counter, saving, torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            loss = model(**inputs, fused_lm_head=True).loss
        counts, whole = counter.get_flop_counts(), counter.get_total_flops()
        with counter:
            loss.backward()
    names = [f"{type(model).__name__}.{prefix}{name}" for name in PARTS.values()]
    forward = [sum(counts[name].values()) if name in counts else 0 for name in names]
    forward.append(whole - sum(forward))  # the head, whose weight the loss takes without calling it
    weights = [(weight.numel(), weight.requires_grad) for weight in model.parameters()]
    total, trained = sum(number for number, _ in weights), sum(number for number, trains in weights if trains)
    activations = sum(size for place, (size, _) in kept.items() if place not in own)
    return np.array([total, trained, activations, counter.get_total_flops(), *forward], dtype=float)


def count_operations() -> FlopCounterMode:
    """PyTorch's counter, which knows of all matrix products that a step has but for those that TRL's loss adds in place
    to the gradients of the head, and those of attention on CPUs, of which it counts the same on GPUs."""

    def added(total: torch.Size, left: torch.Size, right: torch.Size, *_, **__) -> int:
        return 2 * left[0] * left[1] * right[1]

    def attention(query: torch.Size, key: torch.Size, value: torch.Size, *_, **__) -> int:
        """Of scores and of what is read by them, also of those that a causal mask hides."""
        batch, heads, places, width = query
        return 2 * batch * heads * places * key[2] * (width + value[3])

    def backward(gradient: torch.Size, query: torch.Size, key: torch.Size, value: torch.Size, *_, **__) -> int:
        """Of the scores, which are computed again, and of four products for the gradients."""
        batch, heads, places, width = query
        return 2 * batch * heads * places * key[2] * (3 * width + 2 * value[3])

    operations = torch.ops.aten
    counted = {
        operations.addmm_: added,
        operations._scaled_dot_product_flash_attention_for_cpu: attention,
        operations._scaled_dot_product_flash_attention_for_cpu_backward: backward,
    }
    return FlopCounterMode(display=False, custom_mapping=counted)


def empty_batch(config: ViTPConfig, batch: BatchShape) -> dict[str, torch.Tensor]:
    """Tensors of the shapes that [`ViTPDataCollator`] would make, with the labels alone that TRL's loss scores."""
    visual = batch.tiles * config.image_seq_length
    kept = num_kept_tokens(visual, batch.drop_ratio)
    shape = batch.samples, kept + batch.text_tokens + batch.padding
    inputs = {name: torch.zeros(shape, dtype=torch.long) for name in ("input_ids", "attention_mask")}
    inputs["shift_labels"] = torch.zeros(1, batch.labels, dtype=torch.long)
    vision = config.vision_config
    tiles = batch.samples * batch.tiles, vision.num_channels, *vision.image_size
    inputs["pixel_values"] = torch.zeros(tiles)
    if batch.drop_ratio > 0:
        inputs["position_ids"] = torch.zeros(shape, dtype=torch.long)
        inputs["visual_token_indices"] = torch.zeros(batch.samples * kept, dtype=torch.long)
    return inputs
