"""Cost estimate of a fine-tuning: memory and hours with bf16 and activation checkpointing on and off."""

import copy
import gc
import math
from pathlib import Path

import torch

from ..cards.sections import table
from ..pretraining.plan import INTERNVL2_5_1B
from ..training.checkpointing import check_free
from ..training.costs import MEMORY_HEADER, SPARE, describe_device, fastest_setting, measure_step, memory_cells
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
    args, training_args, model_args = options.data, options.training, options.start
    assume_start(model_args)
    task.check_start(options)
    check_free(training_args.output_dir)
    data = task.open_data(options)
    size = getattr(training_args, task.image_side)
    name, device = describe_device(args.plan_device, "rtx4090")
    devices, batch = max(args.plan_devices, training_args.world_size), training_args.per_device_train_batch_size
    training_args.gradient_accumulation_steps = accumulation = training_args.accumulation_on(devices)
    root = args.data.get("root")
    samples = None
    if training_args.max_steps <= 0 and (root is None or Path(root).is_dir()):
        samples = len(task.training_samples(data, options))
    steps = training_args.number_of_steps(samples, devices)
    if model_args.from_scratch is None:
        model = task.load_model(data, options, {}).to("meta")
    else:
        with torch.device("meta"):
            model = task.load_model(data, options, {})

    rows, settings = [], {}
    for bf16 in (True, False):
        step = measure_step(copy.deepcopy(model).train(), lambda model: task.loss(model, batch, size), bf16)
        for checkpointing in (False, True):
            cost = step.cost(int(checkpointing), training_args.optim).with_buckets(devices)
            operations = accumulation * cost.operations
            hours = device.hours((steps or 1000) * operations, args.plan_utilization, bf16)
            # A setting whose speed is unknown is the last choice.
            settings[bf16, checkpointing] = cost, math.inf if hours is None else hours
            rows.append(
                [
                    ("bf16" if bf16 else "float32") + ", activation checkpointing" * checkpointing,
                    *memory_cells(cost, device),
                    "fits" if cost.fits(SMALL_CARD) else "does not fit",
                    f"{operations / 1e12:.3g}",
                    "?" if hours is None else f"{hours:.3g}",
                ]
            )
    print(
        f"One of {devices} device(s), {name}, {device.memory:.0f} GiB, at {args.plan_utilization:.0%} of its speed. "
        f"A step has {batch * accumulation * devices} samples of {size} x {size} pixels, {batch} at once on a device."
    )
    duration = f"hours of {steps or 1000:,} steps"
    print("\n" + table([*MEMORY_HEADER, f"{SMALL_CARD} GiB card", "TFLOP per step", duration], rows))
    if steps is None:
        print(f"\nThe training images are not in {root}, so the number of steps is unknown.")
    fastest = fastest_setting(settings, device.memory)
    if fastest is None:
        print(f"\nNothing leaves {SPARE:.0%} of the device free. Set a smaller per_device_train_batch_size or image.")
    else:
        bf16, checkpointing = fastest
        words = f"--bf16 {str(bf16).lower()} --activation_checkpointing {str(checkpointing).lower()}"
        print(f"\nFastest setting with {SPARE:.0%} of the device free: {words}")
    gc.freeze()  # at its end, Python would search all of the model's objects for cycles, which takes seconds
