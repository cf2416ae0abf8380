"""Cost estimate of a fine-tuning: memory and hours with bf16 and activation checkpointing on and off."""

import copy
import gc
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from ..cards.sections import table
from ..data.settings import DataSettings
from ..pretraining.plan import INTERNVL2_5_1B
from ..training.checkpointing import check_free
from ..training.costs import (
    MEMORY_HEADER,
    SPARE,
    UTILIZATION,
    describe_device,
    fastest_setting,
    measure_step,
    memory_cells,
)
from .arguments import StartArguments
from .base import FineTuningOptions, Task

SMALL_CARD = 24  # GiB


def assume_start(args: StartArguments) -> None:
    """Replace a start that is not on this machine by random weights of the shape of ViTP's ViT."""
    name = args.model_name_or_path
    if args.from_scratch is None and (name is None or not Path(name).is_dir()):
        print(f"{name or 'The model to start from'} is not on this machine: the shape of ViTP's ViT is assumed.")
        args.model_name_or_path, args.from_scratch = None, INTERNVL2_5_1B["vision_config"]


def print_cost(task: Task, options: FineTuningOptions) -> None:
    """Print memory per device and hours of a fine-tuning. The start is not needed for it.

    Args:
        task: object of `TASKS`.
        options: options of the run. Their accumulation steps become those on `plan_devices`.

    Raises:
        ValueError: if the options are wrong.
    """
    args = options.data
    training_args = options.training
    assume_start(options.start)
    task.check_start(options)
    check_free(training_args.output_dir)
    data = task.open_data(options)
    image_side = getattr(training_args, task.image_side)
    device_name, device = describe_device(args.plan_device, "rtx4090")
    num_devices = max(args.plan_devices, training_args.world_size)
    batch_size = training_args.per_device_train_batch_size
    accumulation_steps = training_args.accumulation_on(num_devices)
    training_args.gradient_accumulation_steps = accumulation_steps
    steps = training_args.number_of_steps(count_samples(task, data, options), num_devices)
    model = load_without_values(task, data, options)

    rows = []
    hours_by_setting = {}
    for bf16 in (True, False):
        step = measure_step(copy.deepcopy(model).train(), lambda model: task.loss(model, batch_size, image_side), bf16)
        for checkpointing in (False, True):
            cost = step.cost(int(checkpointing), training_args.optim).with_buckets(num_devices)
            operations = accumulation_steps * cost.operations
            hours = device.hours((steps or 1000) * operations, UTILIZATION, bf16)
            # A setting whose speed is unknown is the last choice.
            hours_by_setting[bf16, checkpointing] = cost, math.inf if hours is None else hours
            setting = "bf16" if bf16 else "float32"
            if checkpointing:
                setting += ", activation checkpointing"
            rows.append(
                [
                    setting,
                    *memory_cells(cost, device),
                    "fits" if cost.fits(SMALL_CARD) else "does not fit",
                    f"{operations / 1e12:.3g}",
                    "?" if hours is None else f"{hours:.3g}",
                ]
            )
    print(
        f"One of {num_devices} device(s), {device_name}, {device.memory:.0f} GiB, at {UTILIZATION:.0%} of "
        f"its speed. A step has {batch_size * accumulation_steps * num_devices} samples of {image_side} x "
        f"{image_side} pixels, {batch_size} at once on a device."
    )
    duration = f"hours of {steps or 1000:,} steps"
    print("\n" + table([*MEMORY_HEADER, f"{SMALL_CARD} GiB card", "TFLOP per step", duration], rows))
    if steps is None:
        print(f"\nThe training images are not in {args.data.get('root')}, so the number of steps is unknown.")
    print(f"\n{recommend_setting(hours_by_setting, device.memory)}")
    gc.freeze()  # at its end, Python would search all of the model's objects for cycles, which takes seconds


def recommend_setting(hours_by_setting: Mapping[tuple[bool, bool], tuple[Any, float]], memory: float) -> str:
    """Return a sentence with the options of the fastest setting that fits.

    Args:
        hours_by_setting: cost and hours by bf16 and activation checkpointing.
        memory: memory of the device in GiB.
    """
    fastest = fastest_setting(hours_by_setting, memory)
    if fastest is None:
        return f"Nothing leaves {SPARE:.0%} of the device free. Set a smaller per_device_train_batch_size or image."
    bf16, checkpointing = fastest
    words = f"--bf16 {str(bf16).lower()} --activation_checkpointing {str(checkpointing).lower()}"
    return f"Fastest setting with {SPARE:.0%} of the device free: {words}"


def count_samples(task: Task, data: DataSettings, options: FineTuningOptions) -> int | None:
    """Return the number of training samples; `None` if it is not needed, or the images are not on this machine."""
    root = options.data.data.get("root")
    is_on_this_machine = root is None or Path(root).is_dir()
    if options.training.max_steps > 0 or not is_on_this_machine:
        return None
    return len(task.training_samples(data, options))


def load_without_values(task: Task, data: DataSettings, options: FineTuningOptions) -> PreTrainedModel:
    """Return the model of a run on the meta device."""
    if options.start.from_scratch is None:
        return task.load_model(data, options, {}).to("meta")
    with torch.device("meta"):
        return task.load_model(data, options, {})
