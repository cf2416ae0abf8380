"""What a pretraining will cost, before anything is loaded: memory by part, operations, hours, and what would help."""

import dataclasses
import functools
import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import LoraConfig
from transformers import AutoConfig
from trl import ModelConfig, SFTConfig

from ..cards.sections import table
from ..configuration_vitp import ViTPConfig
from ..image_processing_vitp import ViTPImageProcessor
from ..instructions.dry_run import SourceSummary, print_commands, print_mixture
from ..instructions.mixture_file import Mixture
from ..modeling_vitp import ViTPForConditionalGeneration
from .arguments import PretrainArguments
from .freezing import freeze, lora_config
from .padding import padding_of_samples
from .start import tiling
from .step_cost import INTERNVL2_5_1B, BatchShape, StepCost, step_cost

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
    """Prints what a mixture amounts to, what the run costs, and the commands that make what is missing."""
    image_processor, tokens_per_tile = tiling(
        model_args.model_name_or_path, args.from_scratch, args.vision_model, args.max_patches
    )
    devices = max(args.plan_devices, training_args.world_size)
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
    """Prints the run as it is configured, and each change alone: what a device of it needs, and how long it takes.

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
    """What is compared, by name."""
    setups = {"as configured": configured}
    for ratio in (0.0, 0.75):
        if ratio != configured.drop_ratio:
            setups[f"r = {ratio:g}"] = dataclasses.replace(configured, drop_ratio=ratio)
    for every, text in CHECKPOINTING.items():
        if every != configured.checkpoint_every:
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
