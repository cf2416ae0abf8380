"""Cost estimate of a pretraining without loading weights: memory by part, operations, hours, and alternatives."""

import copy
import dataclasses
import functools
import gc
import itertools
import json
import math
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from trl import ModelConfig, SFTConfig

from ..cards.sections import table
from ..configuration_vitp import ViTPConfig
from ..instructions.dry_run import SourceSummary, print_commands, print_mixture
from ..instructions.mixture import load_mixture
from ..modeling_vitp import ViTPForConditionalGeneration, score_tokens
from ..opening import open_config
from ..training.batching import GlobalBatchSampler
from ..training.config import HAS_ACTIVATION_CHECKPOINTING
from ..training.costs import (
    CHECKPOINTING,
    MEMORY_HEADER,
    SPARE,
    UTILIZATION,
    Device,
    Scope,
    Step,
    StepCost,
    describe_device,
    fastest_setting,
    measure_step,
    memory_cells,
)
from ..training.freezing import freeze, lora_config
from ..vision_towers import pair, tower_of
from ..vrl import num_kept_tokens, num_language_tokens
from .arguments import PretrainArguments
from .loading import check_from_scratch, check_options, tiling, vision_config_of
from .options import PretrainingOptions

LEAST_SAMPLES = 4096  # minimum number of drawn samples, rounded up to whole steps
PARTS = {
    "ViT": "model.vision_tower",
    "projector": "model.multi_modal_projector",
    "language model": "model.language_model",
}
INTERNVL2_5_1B = {  # shapes of InternViT-300M and Qwen2.5-0.5B
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


@dataclass(frozen=True)
class BatchShape:
    """Shape of a batch of equal samples.

    Args:
        samples: number of samples.
        tiles: tiles per sample. A mean may be a fraction, see [`mean_operations`].
        text_tokens: text tokens per sample.
        drop_ratio: VRL's drop ratio r.
        answer_tokens: text tokens per sample that are answers, by default all.
        padding: padding tokens per sample.
        patch_drop_ratio: share of the patches that is dropped before the ViT.
    """

    samples: int
    tiles: float
    text_tokens: int
    drop_ratio: float = 0.0
    answer_tokens: int | None = None
    padding: int = 0
    patch_drop_ratio: float = 0.0

    @property
    def labels(self) -> int:
        return self.samples * (self.text_tokens if self.answer_tokens is None else self.answer_tokens)


@dataclass(frozen=True)
class Setup:
    """Settings that determine the cost of a step and that the estimate varies."""

    drop_ratio: float
    checkpoint_every: int
    lora: bool
    padding_free: bool = False
    patch_drop_ratio: float = 0.0


def with_drops(shape: BatchShape | Setup, has_vrl: bool, drops_patches: bool) -> BatchShape | Setup:
    """Return a copy whose drop ratios are 0 unless VRL applies and patches are dropped."""
    return dataclasses.replace(
        shape,
        drop_ratio=shape.drop_ratio if has_vrl else 0.0,
        patch_drop_ratio=shape.patch_drop_ratio if drops_patches else 0.0,
    )


@dataclass(frozen=True)
class Work:
    """Amount of work in a run.

    Args:
        steps: optimizer steps.
        drops: share of the samples by whether VRL applies to them, and by whether patches are dropped.
        accumulation: micro-batches per optimizer step.
        devices: number of devices.
        mean: micro-batch of samples with the mean number of tiles and tokens.
        longest: micro-batch of samples with the largest number of tiles and tokens.
    """

    steps: int
    drops: Mapping[tuple[bool, bool], float]
    accumulation: int
    devices: int
    mean: BatchShape
    longest: BatchShape

    @property
    def undropped(self) -> float:
        """Share of samples that VRL does not apply to."""
        return self.drops[False, False] + self.drops[False, True]

    def operations_per_step(self, operations: Callable[[bool, bool], float]) -> float:
        """Return the operations of a device in one step.

        Args:
            operations: function that returns the operations of a mean micro-batch, from whether VRL applies to it and
                whether patches are dropped.
        """
        operations_per_batch = 0.0
        for (has_vrl, drops_patches), share in self.drops.items():
            if share > 0:
                operations_per_batch += share * operations(has_vrl, drops_patches)
        return self.accumulation * operations_per_batch


def print_run(options: PretrainingOptions) -> None:
    """Print a summary of the mixture, the cost of the run, and the commands that create missing data."""
    # The garbage collector would search all imported modules again and again, which takes a tenth of the time.
    gc.freeze()
    args = options.data
    training_args = options.training
    model_args = options.model
    check_from_scratch(args.from_scratch)
    check_options(model_args, args.from_scratch, training_args.model_init_kwargs)
    image_processor, tokens_per_tile = tiling(
        model_args.model_name_or_path,
        args.from_scratch,
        args.vision_model,
        args.max_patches,
        args.vision_image_size,
    )
    devices = max(args.plan_devices, training_args.world_size)
    training_args.gradient_accumulation_steps = training_args.accumulation_on(devices)
    mixture = load_mixture(args.mixture)
    summaries = print_mixture(mixture, training_args, image_processor, tokens_per_tile, devices)
    print_plan(args, training_args, model_args, summaries)
    print_commands(summaries)
    gc.freeze()  # nor does Python search the models for cycles when it ends


class CostEstimates:
    """Costs of the setups of a run, each of which is measured once.

    Args:
        config: configuration of the model.
        args: frozen parts of the model.
        training_args: training arguments.
        model_args: options of LoRA and of the dtype.
        work: amount of work.
        padding: mean number of padding tokens per sample, by VRL's drop ratio and that of patches.
    """

    def __init__(
        self,
        config: ViTPConfig,
        args: PretrainArguments,
        training_args: SFTConfig,
        model_args: ModelConfig,
        work: Work,
        padding: dict[tuple[float, float], int],
    ):
        self.config = config
        self.args = args
        self.training_args = training_args
        self.model_args = model_args
        self.work = work
        self.padding = padding
        self.dtype = getattr(torch, str(model_args.dtype), torch.float32)
        self._steps: dict[tuple[BatchShape, bool], Step] = {}

    def prepare(self, lora: bool, model: ViTPForConditionalGeneration) -> LoraConfig | None:
        """Freeze parts of a model, and return its LoRA configuration."""
        args = self.args
        freeze(model, args.freeze, args.unfreeze_vision_layers)
        return lora_config(
            model,
            dataclasses.replace(self.model_args, use_peft=lora),
            frozen_parts=args.freeze,
            unfreeze_vision_layers=args.unfreeze_vision_layers,
            lora_on_vision=args.lora_on_vision and lora,
        )

    def cost(self, batch: BatchShape, setup: Setup) -> StepCost:
        """Return the cost of a micro-batch."""
        batch = dataclasses.replace(batch, drop_ratio=setup.drop_ratio, patch_drop_ratio=setup.patch_drop_ratio)
        key = (batch, setup.lora)
        if key not in self._steps:
            self._steps[key] = measure_pretraining(
                self.config,
                batch,
                dtype=self.dtype,
                prepare=functools.partial(self.prepare, setup.lora),
                layers_are_alike=self.args.unfreeze_vision_layers == 0,
            )
        return self._steps[key].cost(setup.checkpoint_every, self.training_args.optim)

    def mean_operations(self, setup: Setup) -> float:
        """Return the operations of a micro-batch of mean samples."""
        padding = 0 if setup.padding_free else self.padding[setup.drop_ratio, setup.patch_drop_ratio]
        batch = dataclasses.replace(self.work.mean, padding=padding)
        return mean_operations(lambda batch: self.cost(batch, setup).operations, batch)

    def peak(self, setup: Setup) -> StepCost:
        """Return the cost of a micro-batch of the longest samples, with all patches, and all tokens if any have all."""
        setup = with_drops(setup, has_vrl=not self.work.undropped, drops_patches=False)
        return self.cost(self.work.longest, setup).with_buckets(self.work.devices)

    def operations_per_step(self, setup: Setup) -> float:
        """Return the operations of a device in one step."""
        return self.work.operations_per_step(lambda *drops: self.mean_operations(with_drops(setup, *drops)))


def print_plan(
    args: PretrainArguments,
    training_args: SFTConfig,
    model_args: ModelConfig,
    summaries: Sequence[SourceSummary],
) -> None:
    """Print memory per device and duration of the configured run and of variants with one changed setting.

    Raises:
        ValueError: if the device is unknown.
    """
    name, device = describe_device(args.plan_device)
    config, assumption = config_of_start(args, model_args)
    if model_args.attn_implementation == "eager":  # other implementations need as little memory as sdpa
        config._attn_implementation = "eager"
    devices = max(args.plan_devices, training_args.world_size)
    work = work_of(training_args, devices, summaries, args.from_scratch is not None)
    configured = Setup(
        drop_ratio=training_args.vrl_drop_ratio,
        checkpoint_every=training_args.checkpoint_every,
        lora=model_args.use_peft,
        padding_free=training_args.padding_free,
        patch_drop_ratio=training_args.patch_drop_ratio,
    )
    print(
        f"\nOne of {work.devices} device(s), {name}, {device.memory:.0f} GiB, at {UTILIZATION:.0%} of "
        f"{device.operations / 1e12:.0f} TFLOP/s; {work.steps:,} steps.{assumption}\n"
        f"Memory is estimated for a batch of {work.longest.samples} of the longest samples ({work.longest.tiles} "
        f"tiles, {work.longest.text_tokens} text tokens) in bf16 with all weights on each device, time for the mean "
        "sample."
    )
    if devices > 1:
        print("Gradients count twice, because DDP copies them to buckets.")
    padding = {}
    for ratios in itertools.product({0.0, 0.75, configured.drop_ratio}, {0.0, configured.patch_drop_ratio}):
        padding[ratios] = padding_of_samples(training_args, devices, summaries, config.image_seq_length, *ratios)
    padding_as_configured = padding[configured.drop_ratio, configured.patch_drop_ratio]
    if padding_as_configured and not configured.padding_free:
        print(f"Each row also has {padding_as_configured} padding tokens on average.")
    if configured.patch_drop_ratio:
        print("No patches are dropped in the last steps; memory is estimated for these.")
    if work.undropped:
        print(f"VRL drops no tokens of {work.undropped:.0%} of the samples; memory is estimated for these.")

    estimates = CostEstimates(config, args, training_args, model_args, work, padding)
    rows = []
    checkpointing = {}  # peak and hours, by the setting of activation checkpointing
    setups = changes(configured, "language_model" in args.freeze, any(padding.values()))
    for change, setup in setups.items():
        peak = estimates.peak(setup)
        operations = estimates.operations_per_step(setup)
        hours = device.hours(work.steps * operations, UTILIZATION)
        if dataclasses.replace(setup, checkpoint_every=configured.checkpoint_every) == configured:
            checkpointing[setup.checkpoint_every] = peak, hours
        numbers = [f"{number:.3g}" for number in (operations / 1e12, hours, hours * work.devices)]
        rows.append([change, *memory_cells(peak, device), *numbers])
    print("\n" + table([*MEMORY_HEADER, "TFLOP per step", "hours", "device hours"], rows))
    print_summary(estimates, configured, checkpointing, device)


def print_summary(
    estimates: CostEstimates,
    configured: Setup,
    checkpointing: dict[int, tuple[StepCost, float]],
    device: Device,
) -> None:
    """Print the duration of the configured run, the fastest setting of checkpointing, and the traffic.

    Args:
        checkpointing: cost at the peak and hours of the run, by the setting of activation checkpointing.
    """
    work = estimates.work
    samples = work.mean.samples * work.accumulation * work.devices
    _, hours = checkpointing[configured.checkpoint_every]
    print(f"\nAs configured, {work.steps:,} steps of {samples} samples take {hours:.3g} hours.")
    fastest = fastest_setting(checkpointing, device.memory)
    if fastest not in (None, configured.checkpoint_every):
        option = "false"
        if fastest:
            kwargs = json.dumps({"every_n_layers": fastest})
            option = f"true --activation_checkpointing_kwargs '{kwargs}'"
        print(f"\nFastest setting with {SPARE:.0%} of the device free: --activation_checkpointing {option}")
    if work.devices > 1:
        num_trained = estimates.cost(work.longest, configured).gradients / estimates.dtype.itemsize
        sizes = []
        for method, size in traffic(estimates.config, num_trained, work.devices, work.accumulation).items():
            sizes.append(f"{size / 1e9:.3g} GB with {method}")
        print(f"\nAs configured, each device receives {' and '.join(sizes)} per step, and sends the same amount.")


def pretraining_operations(
    config: ViTPConfig, work: Work, drop_ratio: float, patch_drop_ratio: float = 0.0, **options: Any
) -> float:
    """Return the floating-point operations of a pretraining over all devices, without padding and recomputed layers.

    Args:
        work: amount of work, see [`work_of`].
        drop_ratio: VRL's drop ratio r.
        patch_drop_ratio: share of the patches that is dropped before the ViT.
        options: arguments of [`step_cost`], such as `prepare`.
    """
    mean = dataclasses.replace(work.mean, drop_ratio=drop_ratio, patch_drop_ratio=patch_drop_ratio)

    def operations(*drops: bool) -> float:
        return mean_operations(lambda batch: step_cost(config, batch, **options).operations, with_drops(mean, *drops))

    return work.steps * work.devices * work.operations_per_step(operations)


def mean_operations(operations: Callable[[BatchShape], float], mean: BatchShape) -> float:
    """Return the operations of a batch with a mean number of tiles, interpolated between whole numbers of tiles."""
    fraction, num_tiles = math.modf(mean.tiles)
    num_tiles = int(num_tiles)
    fewer = operations(dataclasses.replace(mean, tiles=num_tiles))
    if fraction == 0:
        return fewer
    more = operations(dataclasses.replace(mean, tiles=num_tiles + 1))
    return (1 - fraction) * fewer + fraction * more


def traffic(config: ViTPConfig, trained: float, devices: int, accumulation: int, itemsize: int = 2) -> dict[str, float]:
    """Return the bytes that each device receives per optimizer step with DDP and FSDP2; it sends the same amount.

    With DDP, gradients are summed in float32, in two passes of (n - 1) / n of their size. With FSDP2, each micro-batch
    gathers the weights for the forward pass, and the weights of blocks and untied embeddings again for the backward
    pass; gradients are scattered once per step.

    Args:
        trained: number of trainable weights.
        devices: number of devices n.
        accumulation: micro-batches per optimizer step.
        itemsize: bytes of a transferred weight or gradient with FSDP2, by default those of bfloat16.
    """
    with torch.device("meta"):
        model = ViTPForConditionalGeneration(config)
    gathered_modules = [model]
    for module in model.modules():
        if type(module).__name__ in model._no_split_modules:
            gathered_modules.append(module)
    if not config.tie_word_embeddings:
        gathered_modules.append(model.get_input_embeddings())
    num_gathered = 0
    for module in gathered_modules:
        num_gathered += sum(weight.numel() for weight in module.parameters())
    share = (devices - 1) / devices
    return {
        "DDP": share * 2 * 4 * trained,
        "FSDP2": share * itemsize * (accumulation * num_gathered + trained),
    }


def changes(configured: Setup, language_model_is_frozen: bool, is_padded: bool = False) -> dict[str, Setup]:
    """Return the configured setup and its variants by name."""
    setups = {"as configured": configured}
    for ratio in (0.0, 0.75):
        if ratio != configured.drop_ratio:
            setups[f"r = {ratio:g}"] = dataclasses.replace(configured, drop_ratio=ratio)
    if configured.patch_drop_ratio:
        setups["patch_drop_ratio = 0"] = dataclasses.replace(configured, patch_drop_ratio=0.0)
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
    """Return the configuration of the model to start from, and a note if it is assumed because it is not local."""
    if args.from_scratch is not None:
        text_config = {
            "model_type": "qwen2",
            **args.from_scratch["text_config"],
            "vocab_size": args.from_scratch["vocab_size"],
        }
        return ViTPConfig(vision_config=args.from_scratch["vision_config"], text_config=text_config), ""
    if args.vision_model is not None and Path(args.vision_model).is_dir() and Path(args.language_model).is_dir():
        vision_config = vision_config_of(args.vision_model, args.vision_image_size)
        text_config = open_config(args.language_model)
        return ViTPConfig(vision_config=vision_config, text_config=text_config.to_dict()), ""
    name = model_args.model_name_or_path
    if name is not None and Path(name).is_dir():
        start = open_config(name)
        config = ViTPConfig(
            vision_config=start.vision_config.to_dict(),
            text_config=start.text_config.to_dict(),
            downsample_ratio=start.downsample_ratio,
            tie_word_embeddings=start.tie_word_embeddings,
        )
        return config, ""
    note = " The model to start from is not on this machine: the shape of InternVL2.5-1B is assumed."
    return ViTPConfig(**INTERNVL2_5_1B), note


def work_of(args: SFTConfig, devices: int, summaries: Sequence[SourceSummary], from_scratch: bool) -> Work:
    """Return the steps of a run over a mixture, its mean sample, and a sample with the most tiles and the most text.

    Args:
        from_scratch: whether VRL's warm-up is half of the steps by default.
    """
    steps = args.number_of_steps(sum(summary.effective for summary in summaries), devices)
    mean_tiles = round(sum(summary.share * summary.tiles for summary in summaries), 2)
    mean_text = round(sum(summary.share * summary.text_tokens for summary in summaries))
    most_tiles = max(summary.longest[0] for summary in summaries)
    most_text = max(summary.longest[1] for summary in summaries)
    if args.max_length:
        most_text = min(most_text, args.max_length)
    if args.vrl_warmup_steps is not None:
        warmup = min(args.vrl_warmup_steps, steps)
    elif from_scratch:
        warmup = steps // 2
    else:
        warmup = 0
    return Work(
        steps=steps,
        drops=shares_of_drops(args, steps, warmup),
        accumulation=args.gradient_accumulation_steps,
        devices=devices,
        mean=BatchShape(args.per_device_train_batch_size, max(mean_tiles, 1), max(mean_text, 2)),
        longest=BatchShape(args.per_device_train_batch_size, most_tiles, max(most_text, 2)),
    )


def shares_of_drops(args: SFTConfig, steps: int, warmup: int) -> dict[tuple[bool, bool], float]:
    """Return the share of the samples by whether VRL applies to them, and by whether patches are dropped.

    VRL applies after `warmup` steps, or to all samples if its ratio is 0. Patches are dropped until the last steps.
    """
    shares = dict.fromkeys(itertools.product((True, False), repeat=2), 0.0)
    num_dropping_steps = args.patch_drop_steps(steps) if args.patch_drop_ratio else 0
    first_vrl_step = warmup if args.vrl_drop_ratio else 0
    apply_prob = args.vrl_apply_prob if args.vrl_drop_ratio else 1.0
    for drops_patches, first_step, end in ((True, 0, num_dropping_steps), (False, num_dropping_steps, steps)):
        num_steps_with_vrl = max(end - max(first_step, first_vrl_step), 0)
        shares[True, drops_patches] = apply_prob * num_steps_with_vrl / max(steps, 1)
        shares[False, drops_patches] = (end - first_step) / max(steps, 1) - shares[True, drops_patches]
    return shares


def padding_of_samples(
    args: SFTConfig,
    devices: int,
    summaries: Sequence[SourceSummary],
    tokens_per_tile: int,
    drop_ratio: float,
    patch_drop_ratio: float = 0.0,
) -> int:
    """Return the mean number of padding tokens per sample, for samples drawn by the shares of their sources.

    Args:
        args: training arguments; batches are formed according to `train_sampling_strategy`.
        devices: number of devices that share the samples of a step.
        drop_ratio, patch_drop_ratio: drop ratios, which may differ from those of the training.
    """
    shares = np.array([summary.share for summary in summaries])
    if args.per_device_train_batch_size == 1 or not shares.sum():
        return 0
    accumulation = args.gradient_accumulation_steps
    samples_of_step = args.per_device_train_batch_size * accumulation * devices
    num_samples = samples_of_step * math.ceil(LEAST_SAMPLES / samples_of_step)
    generator = np.random.default_rng(args.seed)
    samples = np.empty((num_samples, 2))  # tiles and text tokens
    source_of_sample = generator.choice(len(summaries), num_samples, p=shares / shares.sum())
    for index, summary in enumerate(summaries):
        is_of_source = source_of_sample == index
        samples[is_of_source] = generator.choice(summary.samples, is_of_source.sum())

    def lengths(*ratios: float) -> list[int]:
        num_tokens = []
        for tiles, text_tokens in samples:
            visual_tokens = num_language_tokens(tiles, tokens_per_tile, *ratios)
            num_tokens.append(visual_tokens + round(text_tokens))
        return np.minimum(num_tokens, args.max_length or math.inf).astype(int).tolist()

    sample_lengths = lengths(drop_ratio, patch_drop_ratio)
    padding = 0
    for process in range(devices):
        batches = GlobalBatchSampler(
            num_samples,
            args.per_device_train_batch_size,
            accumulation_steps=accumulation,
            num_processes=devices,
            process_index=process,
            seed=args.seed,
            strategy=args.train_sampling_strategy,
            lengths=lambda: lengths(args.vrl_drop_ratio, args.patch_drop_ratio),
        )
        for batch in batches:
            batch_lengths = [sample_lengths[row] for row in batch]
            padding += max(batch_lengths) * len(batch_lengths) - sum(batch_lengths)
    return round(padding / num_samples)


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
    """Return the cost of one step on one device without sharding.

    Args:
        batch: shape of a micro-batch.
        checkpoint_every: N, where every N-th layer, counted over the ViT and the language model, is recomputed in the
            backward pass; 0 for none.
        bf16: whether to autocast to bfloat16.
        dtype: dtype of the weights.
        optimizer: name of the optimizer in the training arguments.
        prepare: function that freezes parts of a model and returns the LoRA configuration or `None`.
        layers_are_alike: whether all layers of the ViT train, or none. Otherwise the estimate takes longer.
    """
    step = measure_pretraining(config, batch, bf16, dtype, prepare, layers_are_alike)
    return step.cost(checkpoint_every, optimizer)


def measure_pretraining(
    config: ViTPConfig,
    batch: BatchShape,
    bf16: bool = True,
    dtype: torch.dtype = torch.float32,
    prepare: Callable[[ViTPForConditionalGeneration], LoraConfig | None] | None = None,
    layers_are_alike: bool = True,
) -> Step:
    """Measure a step of a pretraining, see [`step_cost`].

    If the layers are alike, the model has two layers of each kind, and the second one stands for all further layers.
    """
    vision_depth = config.vision_config.num_hidden_layers
    text_depth = config.text_config.num_hidden_layers
    measured_vision_depth = min(vision_depth, 2) if layers_are_alike else vision_depth
    measured_text_depth = min(text_depth, 2) if layers_are_alike else text_depth
    shallow = copy.deepcopy(config)
    tower_of(shallow.vision_config).set_depth(shallow.vision_config, measured_vision_depth)
    shallow.text_config.num_hidden_layers = measured_text_depth
    layer_types = getattr(shallow.text_config, "layer_types", None)
    if layer_types:
        shallow.text_config.layer_types = (layer_types * 2)[:measured_text_depth]  # there may be one
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # names used by PEFT
        model = ViTPForConditionalGeneration(shallow).to(dtype).train()
        lora = prepare(model) if prepare is not None else None
        if lora is not None:
            model = get_peft_model(model, lora).get_base_model()
    class_name = type(model.model).__name__
    step = measure_step(
        model,
        lambda model: answer_loss(model, empty_batch(config, batch), batch.labels),
        bf16,
        {part: name.replace("model", class_name, 1) for part, name in PARTS.items()},
    )
    last_vision_layer = step.layers[measured_vision_depth - 1]
    last_text_layer = step.layers[-1]
    repeat_layer(step, model, "ViT", last_vision_layer, measured_vision_depth, vision_depth)
    repeat_layer(step, model, "language model", last_text_layer, measured_text_depth, text_depth)
    return step


def repeat_layer(
    step: Step, model: ViTPForConditionalGeneration, part: str, layer: Scope, measured_depth: int, depth: int
) -> None:
    """Let the last measured layer of a part of the model stand for all further layers.

    Args:
        model: model with the measured layers.
        part: part of the model, in `PARTS`.
        measured_depth: number of measured layers of the part.
        depth: number of layers of the part.
    """
    num_copies = depth - measured_depth
    step.repeat(layer, num_copies, part)
    module_name = PARTS[part].split(".")[-1]
    name_of_layer = re.compile(rf"{module_name}\..*?\.{measured_depth - 1}\.")  # PEFT keeps a copy of the ViT
    for name, weight in model.named_parameters():
        if name_of_layer.search(name):
            step.weights += num_copies * weight.numel()
            if weight.requires_grad:
                step.trained += num_copies * weight.numel()


def answer_loss(model: ViTPForConditionalGeneration, inputs: dict[str, torch.Tensor], num_labels: int) -> torch.Tensor:
    """Return a loss that costs as much as that of the model with `answer_labels`.

    Labels without values have no positions, so the first positions are scored.
    """
    labels = inputs.pop("answer_labels")[:, 1:].flatten()
    outputs = model.model(**inputs, use_cache=False)
    hidden_states = outputs.last_hidden_state[:, :-1].flatten(0, 1)
    positions = torch.arange(num_labels)
    logits = model.lm_head(hidden_states[positions])
    scores = score_tokens(logits, labels[positions])
    return scores.log_probs.sum()


def empty_batch(config: ViTPConfig, batch: BatchShape) -> dict[str, torch.Tensor]:
    """Return tensors with the shapes of batches of [`ViTPDataCollator`]."""
    vision_config = config.vision_config
    tokens_of_tile = config.image_seq_length
    visual_tokens = num_language_tokens(batch.tiles, tokens_of_tile, batch.drop_ratio, batch.patch_drop_ratio)
    num_tokens = visual_tokens + batch.text_tokens + batch.padding
    shape = (batch.samples, num_tokens)
    num_tiles = batch.samples * batch.tiles
    inputs = {
        "input_ids": torch.zeros(shape, dtype=torch.long),
        "attention_mask": torch.zeros(shape, dtype=torch.long),
        "answer_labels": torch.zeros(shape, dtype=torch.long),
        "pixel_values": torch.zeros(num_tiles, vision_config.num_channels, *pair(vision_config.image_size)),
    }
    if batch.drop_ratio > 0 or batch.patch_drop_ratio > 0:
        inputs["position_ids"] = torch.zeros(shape, dtype=torch.long)
        inputs["visual_token_indices"] = torch.zeros(batch.samples * visual_tokens, dtype=torch.long)
    if batch.patch_drop_ratio > 0:
        num_visible = num_kept_tokens(tokens_of_tile, batch.patch_drop_ratio)
        inputs["visible_token_indices"] = torch.zeros(num_tiles, num_visible, dtype=torch.long)
    return inputs
