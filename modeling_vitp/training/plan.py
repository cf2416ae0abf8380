"""What a pretraining will cost, before anything is loaded: memory by part, operations, hours, and what would help."""

import contextlib
import copy
import dataclasses
import functools
import json
import math
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig
from trl import ModelConfig, SFTConfig

from ..cards.sections import table
from ..configuration_vitp import ViTPConfig
from ..image_processing_vitp import ViTPImageProcessor
from ..instructions.dry_run import SourceSummary, print_commands, print_mixture
from ..instructions.mixture import Mixture
from ..modeling_vitp import ViTPForConditionalGeneration
from ..vrl import num_kept_tokens
from .arguments import PretrainArguments
from .batching import GlobalBatchSampler
from .freezing import freeze, lora_config
from .loading import tiling
from .model_patches import checkpoint_activations
from .vitp_config import HAS_ACTIVATION_CHECKPOINTING

GIB = 2**30


@dataclass(frozen=True)
class Device:
    """Memory in GiB, and dense bfloat16 operations a second, as its maker gives them."""

    memory: float
    operations: float


DEVICES = {
    "a40": Device(48, 149.7e12),
    "a100-40gb": Device(40, 312e12),
    "a100": Device(80, 312e12),
    "a800": Device(80, 312e12),
    "h100": Device(80, 989.4e12),
    "h200": Device(141, 989.4e12),
    "l40s": Device(48, 362e12),
    "rtx4090": Device(24, 165.2e12),
}
CHECKPOINTING = {
    0: "without activation checkpointing",
    4: "activation checkpointing of every 4th layer",
    2: "activation checkpointing of every 2nd layer",
    1: "activation checkpointing",
}
SPARE = 0.1  # of a device's memory: as exact is what is told of it
OWN_DEVICE = re.compile(r"(\d+\.?\d*)\s*GiB\s*,\s*(\d+\.?\d*)\s*TFLOP/s", re.IGNORECASE)


LEAST_SAMPLES = 4096  # that are drawn, as whole steps
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
    again. `forward`, by part, and `backward` are operations of one batch; `backward` has what is computed again: with
    checkpointing the layers.
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


@dataclass(frozen=True)
class Setup:
    """What decides the cost of a step, and what the plan varies."""

    drop_ratio: float
    checkpoint_every: int
    lora: bool
    padding_free: bool = False


@dataclass(frozen=True)
class Work:
    """How much there is to do: micro-batches of one device over the run, of the mean and of the longest sample; and the
    share of samples of which VRL drops nothing.
    """

    steps: int
    undropped: float
    accumulation: int
    devices: int
    mean: BatchShape
    longest: BatchShape


def dry_run(args: PretrainArguments, training_args: SFTConfig, model_args: ModelConfig, mixture: Mixture) -> int:
    """Print what a mixture amounts to, what the run costs, and the commands that make what is missing."""
    image_processor, tokens_per_tile = tiling(
        model_args.model_name_or_path, args.from_scratch, args.vision_model, args.max_patches
    )
    devices = max(args.plan_devices, training_args.world_size)
    training_args.gradient_accumulation_steps = training_args.accumulation_on(devices)
    summaries = print_mixture(mixture, training_args, image_processor, tokens_per_tile, devices)
    print_plan(args, training_args, model_args, summaries, image_processor)
    print_commands(summaries)
    return 0


def print_plan(
    args: PretrainArguments,
    training_args: SFTConfig,
    model_args: ModelConfig,
    summaries: Sequence[SourceSummary],
    image_processor: ViTPImageProcessor,
) -> None:
    """Print the run as it is configured, and each change alone: what a device of it needs, and how long it takes.

    Raises:
        ValueError: if the device is not known.
    """
    name, device = describe_device(args.plan_device)
    config, assumed = config_of_start(args, model_args)
    if model_args.attn_implementation == "eager":  # others keep as little as sdpa, which it is told by
        config._attn_implementation = "eager"
    devices = max(args.plan_devices, training_args.world_size)
    work = work_of(training_args, devices, summaries, args.from_scratch is not None)
    configured = Setup(
        training_args.vrl_drop_ratio, training_args.checkpoint_every, model_args.use_peft, training_args.padding_free
    )
    print(
        f"\nOne of {work.devices} device(s), {name}, {device.memory:.0f} GiB, at {args.plan_utilization:.0%} of",
        end=" ",
    )
    print(f"{device.operations / 1e12:.0f} TFLOP/s; {work.steps:,} steps.{assumed}")
    print(
        f"Memory is that of a batch of {work.longest.samples} of the longest samples ({work.longest.tiles} tiles, "
        f"{work.longest.text_tokens} tokens of text) in bf16, all weights on each device; time is that of the mean."
    )
    padding = {
        ratio: padding_of_samples(training_args, devices, summaries, config.image_seq_length, ratio)
        for ratio in {0.0, 0.75, configured.drop_ratio}
    }
    if padding[configured.drop_ratio] and not configured.padding_free:
        print(f"To it comes padding, {padding[configured.drop_ratio]} places of each row.")
    if work.undropped:
        print(f"Of {work.undropped:.0%} of the samples VRL drops nothing, by which memory is told.")
    frozen = args.freeze_vision, args.freeze_projector, args.freeze_language_model

    def prepare(lora: bool) -> Callable[[ViTPForConditionalGeneration], LoraConfig | None]:
        with_lora = dataclasses.replace(model_args, use_peft=lora)

        def freezing(model: ViTPForConditionalGeneration) -> LoraConfig | None:
            freeze(model, *frozen, args.unfreeze_vision_layers)
            return lora_config(model, with_lora, *frozen, args.unfreeze_vision_layers)

        return freezing

    dtype = getattr(torch, str(model_args.dtype), torch.float32)

    @functools.cache
    def cost(batch: BatchShape, setup: Setup) -> StepCost:
        return step_cost(
            config,
            dataclasses.replace(batch, drop_ratio=setup.drop_ratio),
            setup.checkpoint_every,
            True,
            dtype,
            training_args.optim,
            prepare(setup.lora),
            layers_are_alike=args.unfreeze_vision_layers == 0,
        )

    def mean(setup: Setup) -> StepCost:
        empty = 0 if setup.padding_free else padding[setup.drop_ratio]
        return cost(dataclasses.replace(work.mean, padding=empty), setup)

    rows, room = [], {}
    for change, setup in changes(configured, args.freeze_language_model, any(padding.values())).items():
        whole = dataclasses.replace(setup, drop_ratio=0.0)
        peak = cost(work.longest, whole if work.undropped else setup)
        operations = (1 - work.undropped) * mean(setup).operations
        operations += work.undropped and work.undropped * mean(whole).operations
        operations *= work.accumulation
        hours = work.steps * operations / (device.operations * args.plan_utilization) / 3600
        parts = [peak.weights, peak.gradients, peak.optimizer, peak.activations, peak.memory]
        left = device.memory - peak.memory / GIB
        if dataclasses.replace(setup, checkpoint_every=configured.checkpoint_every) == configured:
            room[setup.checkpoint_every] = left
        fits = f"{left:.1f} left" if left >= 0 else f"{-left:.1f} too much"
        cells = [*(f"{part / GIB:.2f}" for part in parts), fits, f"{operations / 1e12:.3g}", f"{hours:.3g}"]
        rows.append([change, *cells, f"{hours * work.devices:.3g}"])
    header = (
        "GiB:, weights, gradients, optimizer, activations, in all, of the device, TFLOP a step, hours, device hours"
    )
    print("\n" + table(header.split(", "), rows))
    fastest = fastest_checkpointing(room, SPARE * device.memory)
    if fastest not in (None, configured.checkpoint_every):
        kwargs = json.dumps({"every_n_layers": fastest})
        option = f"true --activation_checkpointing_kwargs '{kwargs}'" if fastest else "false"
        print(f"\nThe fastest that leaves {SPARE:.0%} of the device: --activation_checkpointing {option}")
    if work.devices > 1:
        trained = cost(work.mean, configured).gradients / dtype.itemsize
        moved = traffic(config, trained, work.devices, work.accumulation)
        told = " and ".join(f"{size / 1e9:.3g} GB with {name}" for name, size in moved.items())
        print(f"\nAs configured, each device receives {told} in a step, and sends as much.")


def fastest_checkpointing(room: Mapping[int, float], least: float) -> int | None:
    """One layer of how many has to be checkpointed, 0 for none, that `least` is left; `None` if less is in any case.

    Args:
        room: by one layer of how many is checkpointed, what is left of the device.
    """
    fitting = [every for every, left in room.items() if left >= least]
    return min(fitting, key=lambda every: every and 1 / every, default=None)


def traffic(config: ViTPConfig, trained: float, devices: int, accumulation: int, itemsize: int = 2) -> dict[str, float]:
    """Bytes that each device receives in an optimizer step, and as many that it sends, by how weights are kept.

    With DDP the gradients are summed in float32, in two passes of (n - 1) / n of them. With FSDP2 each micro-batch
    gathers the weights for the forward pass, and those of the blocks and of embeddings that are not tied again for the
    backward pass; gradients are scattered once a step.

    Args:
        trained: number of weights that train.
        itemsize: bytes of a weight and of a gradient on their way with FSDP2; those of bfloat16.
    """
    with torch.device("meta"):
        model = ViTPForConditionalGeneration(config)
    blocks = [module for module in model.modules() if type(module).__name__ in model._no_split_modules]
    again = blocks if config.tie_word_embeddings else [*blocks, model.get_input_embeddings()]
    gathered = sum(weight.numel() for module in (model, *again) for weight in module.parameters())
    share = (devices - 1) / devices
    return {"DDP": share * 2 * 4 * trained, "FSDP2": share * itemsize * (accumulation * gathered + trained)}


def changes(configured: Setup, language_model_is_frozen: bool, is_padded: bool = False) -> dict[str, Setup]:
    """Return the setups to compare, by name."""
    setups = {"as configured": configured}
    for ratio in (0.0, 0.75):
        if ratio != configured.drop_ratio:
            setups[f"r = {ratio:g}"] = dataclasses.replace(configured, drop_ratio=ratio)
    for every, text in CHECKPOINTING.items():
        if every != configured.checkpoint_every and (every < 2 or HAS_ACTIVATION_CHECKPOINTING):
            setups[text] = dataclasses.replace(configured, checkpoint_every=every)
    if is_padded:
        text = "with padding" if configured.padding_free else "without padding (padding_free)"
        setups[text] = dataclasses.replace(configured, padding_free=not configured.padding_free)
    if not language_model_is_frozen:
        text = "without LoRA on the language model" if configured.lora else "LoRA on the language model"
        setups[text] = dataclasses.replace(configured, lora=not configured.lora)
    return setups


def config_of_start(args: PretrainArguments, model_args: ModelConfig) -> tuple[ViTPConfig, str]:
    """The configuration of what training starts from, as far as it is known on this machine, and what is assumed."""
    if args.from_scratch is not None:
        text = {
            "model_type": "qwen2",
            **args.from_scratch["text_config"],
            "vocab_size": args.from_scratch["vocab_size"],
        }
        return ViTPConfig(vision_config=args.from_scratch["vision_config"], text_config=text), ""
    if args.vision_model is not None and all(Path(name).is_dir() for name in (args.vision_model, args.language_model)):
        vision, text = (AutoConfig.from_pretrained(name) for name in (args.vision_model, args.language_model))
        return ViTPConfig(vision_config=vision.to_dict(), text_config=text.to_dict()), ""
    name = model_args.model_name_or_path
    if name is not None and Path(name).is_dir():
        fields = AutoConfig.from_pretrained(name)
        return ViTPConfig(vision_config=fields.vision_config.to_dict(), text_config=fields.text_config.to_dict()), ""
    return ViTPConfig(
        **INTERNVL2_5_1B
    ), " What training starts from is not on this machine: the shape of InternVL2.5-1B is assumed."


def describe_device(name: str | None) -> tuple[str, Device]:
    """The device of that name, or of its memory and speed; or the accelerator of this machine, with the speed of the
    paper's, an A800, if its own is not known; without one the A800.

    Args:
        name: one of [`DEVICES`], or as "24GiB,71TFLOP/s".

    Raises:
        ValueError: if there is no device of the name.
    """
    own = OWN_DEVICE.fullmatch((name or "").strip())
    if own and float(own[1]) * float(own[2]) > 0:
        return "as given", Device(float(own[1]), float(own[2]) * 1e12)
    if name is None and torch.cuda.is_available():
        found = torch.cuda.get_device_properties(0)
        words = re.split(r"[^A-Z0-9]+", found.name.upper().replace("RTX ", "RTX"))
        known = next((key for key in DEVICES if key.split("-")[0].upper() in words), None)
        name = found.name if known else f"{found.name} (of unknown speed, so as an A800: give --plan_device)"
        return name, Device(found.total_memory / GIB, DEVICES[known or "a800"].operations)
    name = (name or "a800").lower()
    if name not in DEVICES:
        raise ValueError(
            f"plan_device={name!r}: known are {', '.join(DEVICES)}; of another one say memory and dense operations a "
            "second, as 24GiB,71TFLOP/s."
        )
    return name, DEVICES[name]


def work_of(args: SFTConfig, devices: int, summaries: Sequence[SourceSummary], from_scratch: bool) -> Work:
    """The steps of a run over a mixture, its mean sample, and one that has the most tiles and the most text.

    Args:
        from_scratch: whether VRL warms up over half of the steps where nothing else is said.
    """
    samples = args.per_device_train_batch_size * args.gradient_accumulation_steps * devices
    rows = sum(summary.effective for summary in summaries)
    batches = rows // samples if args.dataloader_drop_last else math.ceil(rows / samples)
    steps = args.max_steps if args.max_steps > 0 else math.ceil(args.num_train_epochs * batches)
    tiles = round(sum(summary.share * summary.tiles for summary in summaries))
    text = round(sum(summary.share * summary.text_tokens for summary in summaries))
    most, most_text = (max(lengths) for lengths in zip(*(summary.longest for summary in summaries)))
    most_text = min(most_text, args.max_length or most_text)
    batch = args.per_device_train_batch_size
    shapes = BatchShape(batch, max(tiles, 1), max(text, 2)), BatchShape(batch, most, max(most_text, 2))
    warmup = args.vrl_warmup_steps
    warmup = (steps // 2 if from_scratch else 0) if warmup is None else min(warmup, steps)
    undropped = 1 - (1 - warmup / max(steps, 1)) * args.vrl_apply_prob if args.vrl_drop_ratio else 0.0
    return Work(steps, undropped, args.gradient_accumulation_steps, devices, *shapes)


def padding_of_samples(
    args: SFTConfig, devices: int, summaries: Sequence[SourceSummary], tokens_per_tile: int, drop_ratio: float
) -> int:
    """Places of a sample's row that hold nothing, on average, where samples are drawn by the shares of their sources.

    Args:
        args: of the training; batches are those of its `train_sampling_strategy`.
        devices: on which a step's samples are shared out.
        summaries: of the sources, with the samples that were seen.
        tokens_per_tile: visual tokens of a tile.
        drop_ratio: r, which may be another than that of the training.
    """
    shares = np.array([summary.share for summary in summaries])
    if args.per_device_train_batch_size == 1 or not shares.sum():
        return 0
    accumulation = args.gradient_accumulation_steps
    step = args.per_device_train_batch_size * accumulation * devices
    number = step * math.ceil(LEAST_SAMPLES / step)
    generator = np.random.default_rng(args.seed)
    samples = np.empty((number, 2))  # tiles and tokens of text
    drawn = generator.choice(len(summaries), number, p=shares / shares.sum())
    for index, summary in enumerate(summaries):
        own = drawn == index
        samples[own] = generator.choice(summary.samples, own.sum())

    def lengths(ratio: float) -> list[int]:
        tokens = [num_kept_tokens(round(tiles) * tokens_per_tile, ratio) + round(text) for tiles, text in samples]
        return np.minimum(tokens, args.max_length or math.inf).astype(int).tolist()

    of_samples, padding = lengths(drop_ratio), 0
    for process in range(devices):
        batches = GlobalBatchSampler(
            number,
            args.per_device_train_batch_size,
            accumulation_steps=accumulation,
            num_processes=devices,
            process_index=process,
            seed=args.seed,
            strategy=args.train_sampling_strategy,
            lengths=lambda: lengths(args.vrl_drop_ratio),
        )
        for batch in batches:
            longest = max(of_samples[row] for row in batch)
            padding += sum(longest - of_samples[row] for row in batch)
    return round(padding / number)


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
    """Return the cost of one step on one device that shares nothing with others.

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
        return measure_step(shallow, batch, every, bf16, dtype, prepare)

    def of_layers(every: int) -> np.ndarray:
        """Measure the model with one layer of each kind, and what another of the ViT or language model adds."""
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


def measure_step(
    config: ViTPConfig,
    batch: BatchShape,
    checkpoint_every: int,
    bf16: bool,
    dtype: torch.dtype,
    prepare: Callable[[ViTPForConditionalGeneration], LoraConfig | None] | None,
) -> np.ndarray:
    """Return weights, those that train, bytes kept for backward, operations backward, and forward by part."""

    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of names that PEFT uses
        model = ViTPForConditionalGeneration(config).to(dtype).train()
        lora = prepare(model) if prepare is not None else None
        if lora is not None:
            model = get_peft_model(model, lora)
    kept: dict[int, tuple[int, torch.Tensor]] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        kept[storage._cdata] = storage.nbytes(), tensor  # the tensor, so that the place is not given to another one
        return tensor

    # Tensors have no values here: nothing is checked, and which positions have a label does not matter.
    without_values = contextlib.ExitStack()
    without_values.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
    without_values.enter_context(patch("torch.compiler.is_compiling", lambda: True))
    without_values.enter_context(patch("torch._check_tensor_all", lambda *args: None))
    positions = patch("modeling_vitp.modeling_vitp.answer_positions", lambda labels: torch.arange(batch.labels))
    without_values.enter_context(positions)
    counter = count_operations()
    prefix = "" if lora is None else "base_model.model."
    with without_values:
        model.to_empty(device="cpu")
        (model if lora is None else model.get_base_model()).tie_weights()
        if checkpoint_every:
            checkpoint_activations(model, checkpoint_every)
        own = {weight.untyped_storage()._cdata for weight in model.parameters()}
        inputs = empty_batch(config, batch)
        saving = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
        with counter, saving, torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            loss = model(**inputs).log_probs.sum()
        counts, whole = counter.get_flop_counts(), counter.get_total_flops()
        with counter:
            loss.backward()
    names = [f"{type(model).__name__}.{prefix}{name}" for name in PARTS.values()]
    forward = [sum(counts[name].values()) if name in counts else 0 for name in names]
    forward.append(whole - sum(forward))  # the head
    weights = [(weight.numel(), weight.requires_grad) for weight in model.parameters()]
    total, trained = sum(number for number, _ in weights), sum(number for number, trains in weights if trains)
    activations = sum(size for place, (size, _) in kept.items() if place not in own)
    return np.array([total, trained, activations, counter.get_total_flops(), *forward], dtype=float)


def count_operations() -> FlopCounterMode:
    """Return PyTorch's counter, with attention on CPUs counted as on GPUs."""

    def attention(query: torch.Size, key: torch.Size, value: torch.Size, *_, **__) -> int:
        """Count the products of scores and of what is read by them, also of those that a causal mask hides."""
        batch, heads, places, width = query
        return 2 * batch * heads * places * key[2] * (width + value[3])

    def backward(gradient: torch.Size, query: torch.Size, key: torch.Size, value: torch.Size, *_, **__) -> int:
        """Count the products of the scores, which are computed again, and four for the gradients."""
        batch, heads, places, width = query
        return 2 * batch * heads * places * key[2] * (3 * width + 2 * value[3])

    operations = torch.ops.aten
    counted = {
        operations._scaled_dot_product_flash_attention_for_cpu: attention,
        operations._scaled_dot_product_flash_attention_for_cpu_backward: backward,
    }
    return FlopCounterMode(display=False, custom_mapping=counted)


def empty_batch(config: ViTPConfig, batch: BatchShape) -> dict[str, torch.Tensor]:
    """Return tensors of the shapes that [`ViTPDataCollator`] makes."""
    visual = batch.tiles * config.image_seq_length
    kept = num_kept_tokens(visual, batch.drop_ratio)
    shape = batch.samples, kept + batch.text_tokens + batch.padding
    inputs = {name: torch.zeros(shape, dtype=torch.long) for name in ("input_ids", "attention_mask", "answer_labels")}
    vision = config.vision_config
    tiles = batch.samples * batch.tiles, vision.num_channels, *vision.image_size
    inputs["pixel_values"] = torch.zeros(tiles)
    if batch.drop_ratio > 0:
        inputs["position_ids"] = torch.zeros(shape, dtype=torch.long)
        inputs["visual_token_indices"] = torch.zeros(batch.samples * kept, dtype=torch.long)
    return inputs
