"""Cost estimate of a pretraining without loading weights: memory by part, operations, hours, and alternatives."""

import copy
import dataclasses
import functools
import gc
import json
import math
import re
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig
from trl import ModelConfig, SFTConfig

from ..cards.sections import table
from ..configuration_vitp import ViTPConfig
from ..instructions.dry_run import SourceSummary, print_commands, print_mixture
from ..instructions.mixture import load_mixture
from ..modeling_vitp import ViTPForConditionalGeneration, score_tokens
from ..training.batching import GlobalBatchSampler
from ..training.config import HAS_ACTIVATION_CHECKPOINTING
from ..training.costs import (
    CHECKPOINTING,
    MEMORY_HEADER,
    SPARE,
    Step,
    StepCost,
    describe_device,
    fastest_setting,
    measure_step,
    memory_cells,
)
from ..training.freezing import freeze, lora_config
from ..vision_towers import pair, tower_of
from ..vrl import num_kept_tokens
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
    """

    samples: int
    tiles: float
    text_tokens: int
    drop_ratio: float = 0.0
    answer_tokens: int | None = None
    padding: int = 0

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


@dataclass(frozen=True)
class Work:
    """Amount of work in a run.

    Args:
        steps: optimizer steps.
        undropped: share of samples without dropped tokens.
        accumulation: micro-batches per optimizer step.
        devices: number of devices.
        mean: micro-batch of samples with the mean number of tiles and tokens.
        longest: micro-batch of samples with the largest number of tiles and tokens.
    """

    steps: int
    undropped: float
    accumulation: int
    devices: int
    mean: BatchShape
    longest: BatchShape

    def operations_per_step(self, operations: float, undropped: float) -> float:
        """Return the operations of a device in one step.

        Args:
            operations: operations of a mean micro-batch whose tokens are dropped.
            undropped: operations of a mean micro-batch without dropped tokens.
        """
        return self.accumulation * ((1 - self.undropped) * operations + self.undropped * undropped)


def print_run(options: PretrainingOptions) -> None:
    """Print a summary of the mixture, the cost of the run, and the commands that create missing data."""
    # The garbage collector would search all imported modules again and again, which takes a tenth of the time.
    gc.freeze()
    args, training_args, model_args = options.data, options.training, options.model
    check_from_scratch(args.from_scratch)
    check_options(model_args, args.from_scratch, training_args.model_init_kwargs)
    image_processor, tokens_per_tile = tiling(
        model_args.model_name_or_path, args.from_scratch, args.vision_model, args.max_patches, args.vision_image_size
    )
    devices = max(args.plan_devices, training_args.world_size)
    training_args.gradient_accumulation_steps = training_args.accumulation_on(devices)
    mixture = load_mixture(args.mixture)
    summaries = print_mixture(mixture, training_args, image_processor, tokens_per_tile, devices)
    print_plan(args, training_args, model_args, summaries)
    print_commands(summaries)
    gc.freeze()  # nor does Python search the models for cycles when it ends


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
    config, assumed = config_of_start(args, model_args)
    if model_args.attn_implementation == "eager":  # other implementations need as little memory as sdpa
        config._attn_implementation = "eager"
    devices = max(args.plan_devices, training_args.world_size)
    work = work_of(training_args, devices, summaries, args.from_scratch is not None)
    configured = Setup(
        training_args.vrl_drop_ratio, training_args.checkpoint_every, model_args.use_peft, training_args.padding_free
    )
    print(
        f"\nOne of {work.devices} device(s), {name}, {device.memory:.0f} GiB, at {args.plan_utilization:.0%} of "
        f"{device.operations / 1e12:.0f} TFLOP/s; {work.steps:,} steps.{assumed}\n"
        f"Memory is estimated for a batch of {work.longest.samples} of the longest samples ({work.longest.tiles} "
        f"tiles, {work.longest.text_tokens} text tokens) in bf16 with all weights on each device, time for the mean "
        "sample."
    )
    if devices > 1:
        print("Gradients count twice, because DDP copies them to buckets.")
    padding = {
        ratio: padding_of_samples(training_args, devices, summaries, config.image_seq_length, ratio)
        for ratio in {0.0, 0.75, configured.drop_ratio}
    }
    if padding[configured.drop_ratio] and not configured.padding_free:
        print(f"Each row also has {padding[configured.drop_ratio]} padding tokens on average.")
    if work.undropped:
        print(f"VRL drops no tokens of {work.undropped:.0%} of the samples; memory is estimated for these.")
    frozen = args.freeze_vision, args.freeze_projector, args.freeze_language_model, args.unfreeze_vision_layers

    def prepare(lora: bool, model: ViTPForConditionalGeneration) -> LoraConfig | None:
        freeze(model, *frozen)
        with_lora = dataclasses.replace(model_args, use_peft=lora)
        return lora_config(model, with_lora, *frozen, args.lora_on_vision and lora)

    dtype = getattr(torch, str(model_args.dtype), torch.float32)

    @functools.cache
    def measure(batch: BatchShape, lora: bool) -> Step:
        layers_are_alike = args.unfreeze_vision_layers == 0
        prepare_model = functools.partial(prepare, lora)
        return measure_pretraining(config, batch, dtype=dtype, prepare=prepare_model, layers_are_alike=layers_are_alike)

    def cost(batch: BatchShape, setup: Setup) -> StepCost:
        step = measure(dataclasses.replace(batch, drop_ratio=setup.drop_ratio), setup.lora)
        return step.cost(setup.checkpoint_every, training_args.optim)

    def mean(setup: Setup) -> float:
        empty = 0 if setup.padding_free else padding[setup.drop_ratio]
        batch = dataclasses.replace(work.mean, padding=empty)
        return mean_operations(lambda batch: cost(batch, setup).operations, batch)

    rows, checkpointing = [], {}
    for change, setup in changes(configured, args.freeze_language_model, any(padding.values())).items():
        whole = dataclasses.replace(setup, drop_ratio=0.0)
        peak = cost(work.longest, whole if work.undropped else setup).with_buckets(devices)
        operations = work.operations_per_step(mean(setup), work.undropped and mean(whole))
        hours = device.hours(work.steps * operations, args.plan_utilization)
        if dataclasses.replace(setup, checkpoint_every=configured.checkpoint_every) == configured:
            checkpointing[setup.checkpoint_every] = peak, hours
        numbers = operations / 1e12, hours, hours * work.devices
        rows.append([change, *memory_cells(peak, device), *(f"{number:.3g}" for number in numbers)])
    print("\n" + table([*MEMORY_HEADER, "TFLOP per step", "hours", "device hours"], rows))
    samples = work.mean.samples * work.accumulation * work.devices
    _, hours = checkpointing[configured.checkpoint_every]
    print(f"\nAs configured, {work.steps:,} steps of {samples} samples take {hours:.3g} hours.")
    fastest = fastest_setting(checkpointing, device.memory)
    if fastest not in (None, configured.checkpoint_every):
        kwargs = json.dumps({"every_n_layers": fastest})
        option = f"true --activation_checkpointing_kwargs '{kwargs}'" if fastest else "false"
        print(f"\nFastest setting with {SPARE:.0%} of the device free: --activation_checkpointing {option}")
    if work.devices > 1:
        trained = cost(work.longest, configured).gradients / dtype.itemsize
        moved = traffic(config, trained, work.devices, work.accumulation)
        sizes = " and ".join(f"{size / 1e9:.3g} GB with {name}" for name, size in moved.items())
        print(f"\nAs configured, each device receives {sizes} per step, and sends the same amount.")


def pretraining_operations(config: ViTPConfig, work: Work, drop_ratio: float, **options: Any) -> float:
    """Return the floating-point operations of a pretraining over all devices, without padding and recomputed layers.

    Args:
        work: amount of work, see [`work_of`].
        drop_ratio: VRL's drop ratio r.
        options: arguments of [`step_cost`], such as `prepare`.
    """
    dropped, undropped = (
        mean_operations(
            lambda batch: step_cost(config, batch, **options).operations,
            dataclasses.replace(work.mean, drop_ratio=ratio),
        )
        for ratio in (drop_ratio, 0.0)
    )
    return work.steps * work.devices * work.operations_per_step(dropped, undropped)


def mean_operations(operations: Callable[[BatchShape], float], mean: BatchShape) -> float:
    """Return the operations of a batch with a mean number of tiles, interpolated between whole numbers of tiles."""
    share, whole = math.modf(mean.tiles)
    fewer, more = (dataclasses.replace(mean, tiles=int(whole) + extra) for extra in (0, 1))
    return operations(fewer) if share == 0 else (1 - share) * operations(fewer) + share * operations(more)


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
    blocks = [module for module in model.modules() if type(module).__name__ in model._no_split_modules]
    again = blocks if config.tie_word_embeddings else [*blocks, model.get_input_embeddings()]
    gathered = sum(weight.numel() for module in (model, *again) for weight in module.parameters())
    share = (devices - 1) / devices
    return {"DDP": share * 2 * 4 * trained, "FSDP2": share * itemsize * (accumulation * gathered + trained)}


def changes(configured: Setup, language_model_is_frozen: bool, is_padded: bool = False) -> dict[str, Setup]:
    """Return the configured setup and its variants by name."""
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
    """Return the configuration of the model to start from, and a note if it is assumed because it is not local."""
    if args.from_scratch is not None:
        text = {
            "model_type": "qwen2",
            **args.from_scratch["text_config"],
            "vocab_size": args.from_scratch["vocab_size"],
        }
        return ViTPConfig(vision_config=args.from_scratch["vision_config"], text_config=text), ""
    if args.vision_model is not None and all(Path(name).is_dir() for name in (args.vision_model, args.language_model)):
        vision = vision_config_of(args.vision_model, args.vision_image_size)
        text = AutoConfig.from_pretrained(args.language_model)
        return ViTPConfig(vision_config=vision, text_config=text.to_dict()), ""
    name = model_args.model_name_or_path
    if name is not None and Path(name).is_dir():
        start = AutoConfig.from_pretrained(name)
        config = ViTPConfig(
            vision_config=start.vision_config.to_dict(),
            text_config=start.text_config.to_dict(),
            downsample_ratio=start.downsample_ratio,
            tie_word_embeddings=start.tie_word_embeddings,
        )
        return config, ""
    return ViTPConfig(
        **INTERNVL2_5_1B
    ), " The model to start from is not on this machine: the shape of InternVL2.5-1B is assumed."


def work_of(args: SFTConfig, devices: int, summaries: Sequence[SourceSummary], from_scratch: bool) -> Work:
    """Return the steps of a run over a mixture, its mean sample, and a sample with the most tiles and the most text.

    Args:
        from_scratch: whether VRL's warm-up is half of the steps by default.
    """
    steps = args.number_of_steps(sum(summary.effective for summary in summaries), devices)
    tiles = round(sum(summary.share * summary.tiles for summary in summaries), 2)
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
    """Return the mean number of padding tokens per sample, for samples drawn by the shares of their sources.

    Args:
        args: training arguments; batches are formed according to `train_sampling_strategy`.
        devices: number of devices that share the samples of a step.
        drop_ratio: VRL's drop ratio r, which may differ from that of the training.
    """
    shares = np.array([summary.share for summary in summaries])
    if args.per_device_train_batch_size == 1 or not shares.sum():
        return 0
    accumulation = args.gradient_accumulation_steps
    step = args.per_device_train_batch_size * accumulation * devices
    number = step * math.ceil(LEAST_SAMPLES / step)
    generator = np.random.default_rng(args.seed)
    samples = np.empty((number, 2))  # tiles and text tokens
    drawn = generator.choice(len(summaries), number, p=shares / shares.sum())
    for index, summary in enumerate(summaries):
        own = drawn == index
        samples[own] = generator.choice(summary.samples, own.sum())

    def lengths(ratio: float) -> list[int]:
        tokens = [num_kept_tokens(round(tiles) * tokens_per_tile, ratio) + round(text) for tiles, text in samples]
        return np.minimum(tokens, args.max_length or math.inf).astype(int).tolist()

    sample_lengths, padding = lengths(drop_ratio), 0
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
            longest = max(sample_lengths[row] for row in batch)
            padding += sum(longest - sample_lengths[row] for row in batch)
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
    return measure_pretraining(config, batch, bf16, dtype, prepare, layers_are_alike).cost(checkpoint_every, optimizer)


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
    depths = config.vision_config.num_hidden_layers, config.text_config.num_hidden_layers
    measured = [min(depth, 2) for depth in depths] if layers_are_alike else depths
    shallow = copy.deepcopy(config)
    tower_of(shallow.vision_config).set_depth(shallow.vision_config, measured[0])
    shallow.text_config.num_hidden_layers = measured[1]
    if getattr(shallow.text_config, "layer_types", None):
        shallow.text_config.layer_types = (shallow.text_config.layer_types * 2)[: measured[1]]  # there may be one
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # names used by PEFT
        model = ViTPForConditionalGeneration(shallow).to(dtype).train()
        lora = prepare(model) if prepare is not None else None
        if lora is not None:
            model = get_peft_model(model, lora).get_base_model()
    step = measure_step(
        model,
        lambda model: answer_loss(model, empty_batch(config, batch), batch.labels),
        bf16,
        {part: name.replace("model", type(model.model).__name__, 1) for part, name in PARTS.items()},
    )
    last = step.layers[measured[0] - 1], step.layers[-1]
    for part, layer, depth, number in zip(("ViT", "language model"), last, depths, measured):
        step.repeat(layer, depth - number, part)
        place = re.compile(rf"{PARTS[part].split('.')[-1]}\..*?\.{number - 1}\.")  # PEFT keeps a copy of the ViT
        weights = [weight for name, weight in model.named_parameters() if place.search(name)]
        step.weights += (depth - number) * sum(weight.numel() for weight in weights)
        step.trained += (depth - number) * sum(weight.numel() for weight in weights if weight.requires_grad)
    return step


def answer_loss(model: ViTPForConditionalGeneration, inputs: dict[str, torch.Tensor], num_labels: int) -> torch.Tensor:
    """Return a loss that costs as much as that of the model with `answer_labels`.

    Labels without values have no positions, so the first positions are scored.
    """
    labels = inputs.pop("answer_labels")[:, 1:].flatten()
    hidden_states = model.model(**inputs, use_cache=False).last_hidden_state[:, :-1]
    positions = torch.arange(num_labels)
    logits = model.lm_head(hidden_states.flatten(0, 1)[positions])
    return score_tokens(logits, labels[positions]).log_probs.sum()


def empty_batch(config: ViTPConfig, batch: BatchShape) -> dict[str, torch.Tensor]:
    """Return tensors with the shapes of batches of [`ViTPDataCollator`]."""
    visual = batch.tiles * config.image_seq_length
    kept = num_kept_tokens(visual, batch.drop_ratio)
    shape = batch.samples, kept + batch.text_tokens + batch.padding
    inputs = {name: torch.zeros(shape, dtype=torch.long) for name in ("input_ids", "attention_mask", "answer_labels")}
    vision = config.vision_config
    tiles = batch.samples * batch.tiles, vision.num_channels, *pair(vision.image_size)
    inputs["pixel_values"] = torch.zeros(tiles)
    if batch.drop_ratio > 0:
        inputs["position_ids"] = torch.zeros(shape, dtype=torch.long)
        inputs["visual_token_indices"] = torch.zeros(batch.samples * kept, dtype=torch.long)
    return inputs
