"""Cost estimate of a fine-tuning: memory and hours with bf16 and activation checkpointing on and off."""

import copy
import gc
from collections.abc import Callable, Sized
from pathlib import Path
from unittest.mock import patch

import torch
from transformers import PreTrainedModel, TrainingArguments

from ..cards.sections import table
from ..modeling_vitp_backbone import pad_to_multiple
from ..modeling_vitp_classification import ViTPForImageClassification
from ..modeling_vitp_detection import (
    BOX_CELLS,
    MASK_CELLS,
    STRIDES,
    ViTPForInstanceSegmentation,
    ViTPForObjectDetection,
    ViTPForOrientedObjectDetection,
)
from ..pretraining.plan import INTERNVL2_5_1B
from ..rotated_boxes import align_in_image
from ..training.checkpointing import check_free
from ..training.costs import GIB, MEMORY_HEADER, SPARE, describe_device, measure_step, memory_cells
from .arguments import SplitArguments, StartArguments
from .base import FineTuningOptions, Task

SMALL_CARD = 24  # GiB


def assume_start(args: StartArguments) -> None:
    """Replace a start that is not on this machine by random weights of the shape of ViTP's ViT."""
    name = args.model_name_or_path
    if args.from_scratch is None and (name is None or not Path(name).is_dir()):
        print(f"{name or 'The model to start from'} is not on this machine: the shape of ViTP's ViT is assumed.")
        args.model_name_or_path, args.from_scratch = None, INTERNVL2_5_1B["vision_config"]


def print_cost(task: Task, options: FineTuningOptions) -> None:
    """Print memory per device and hours of a fine-tuning, see [`dry_run`]. The start is not needed for it."""
    assume_start(options.start)
    task.check_start(options)
    check_free(options.training.output_dir)
    data = task.open_data(options)
    dry_run(
        options.data,
        options.training,
        options.start,
        load=lambda: task.load_model(data, options, {}),
        open_samples=lambda: task.training_samples(data, options),
        size=getattr(options.training, task.image_side),
    )


def dry_run(
    args: SplitArguments,
    training_args: TrainingArguments,
    model_args: StartArguments,
    load: Callable[[], PreTrainedModel],
    open_samples: Callable[[], Sized],
    size: int,
) -> int:
    """Print memory per device and hours of a fine-tuning.

    Args:
        model_args: arguments of the start, after [`assume_start`].
        load: function that returns the model.
        open_samples: function that returns the training samples.
        size: side of the training images in pixels.
    """
    name, device = describe_device(args.plan_device, "rtx4090")
    devices, batch = max(args.plan_devices, training_args.world_size), training_args.per_device_train_batch_size
    training_args.gradient_accumulation_steps = accumulation = training_args.accumulation_on(devices)
    root = args.data.get("root")
    samples = None
    if training_args.max_steps <= 0 and (root is None or Path(root).is_dir()):
        samples = len(open_samples())
    steps = training_args.number_of_steps(samples, devices)
    if model_args.from_scratch is None:
        model = load().to("meta")
    else:
        with torch.device("meta"), patch("modeling_vitp.tasks.loading.check_finite", lambda *args: None):
            model = load()

    speeds = {True: device.operations, False: device.float32_operations}
    rows, fitting = [], []
    for bf16 in speeds:
        step = measure_step(copy.deepcopy(model).train(), lambda model: task_loss(model, batch, size), bf16)
        for checkpointing in (False, True):
            cost = step.cost(int(checkpointing), training_args.optim).with_buckets(devices)
            operations, speed = accumulation * cost.operations, speeds[bf16]
            seconds = speed and operations / (speed * args.plan_utilization)
            if cost.memory / GIB <= (1 - SPARE) * device.memory:
                fitting.append((cost.operations / (speed or 1), bf16, checkpointing))
            rows.append(
                [
                    ("bf16" if bf16 else "float32") + ", activation checkpointing" * checkpointing,
                    *memory_cells(cost, device),
                    "fits" if cost.memory / GIB <= (1 - SPARE) * SMALL_CARD else "does not fit",
                    f"{operations / 1e12:.3g}",
                    f"{seconds * (steps or 1000) / 3600:.3g}" if seconds else "?",
                ]
            )
    print(
        f"One of {devices} device(s), {name}, {device.memory:.0f} GiB, at {args.plan_utilization:.0%} of its speed. "
        f"A step has {batch * accumulation * devices} samples of {size} x {size} pixels, {batch} at once on a device."
    )
    hours = f"hours of {steps:,} steps" if steps else "hours of 1,000 steps"
    print("\n" + table([*MEMORY_HEADER, f"{SMALL_CARD} GiB card", "TFLOP per step", hours], rows))
    if steps is None:
        print(f"\nThe training images are not in {root}, so the number of steps is unknown.")
    if not fitting:
        print(f"\nNothing leaves {SPARE:.0%} of the device free. Set a smaller per_device_train_batch_size or image.")
    else:
        _, bf16, checkpointing = min(fitting)
        options = f"--bf16 {str(bf16).lower()} --activation_checkpointing {str(checkpointing).lower()}"
        print(f"\nFastest setting with {SPARE:.0%} of the device free: {options}")
    gc.freeze()  # at its end, Python would search all of the model's objects for cycles, which takes seconds
    return 0


def task_loss(model: PreTrainedModel, samples: int, size: int) -> torch.Tensor:
    """Return the loss of a task model on samples of `size` x `size` pixels without values."""
    pixels = torch.zeros(samples, model.config.backbone_config.num_channels, size, size)
    if isinstance(model, ViTPForObjectDetection):
        return detection_loss(model, pixels)
    if isinstance(model, ViTPForImageClassification):
        labels = torch.zeros(samples, dtype=torch.long)
        if model.config.problem_type == "multi_label_classification":
            labels = torch.zeros(samples, model.config.num_labels)
        return model(pixels, labels=labels).loss
    labels = torch.zeros(samples, size, size, dtype=torch.long)
    return model(*[pixels] * model.images_per_sample, labels=labels).loss


def detection_loss(model: ViTPForObjectDetection, pixels: torch.Tensor) -> torch.Tensor:
    """Return a loss of all outputs of a detector in training.

    The boxes that the heads are trained on depend on values. Their number is the largest one, `roi_samples` per image.
    """
    config, samples = model.config, len(pixels)
    view = model.view(model.run_backbone(pad_to_multiple(pixels, 32, 32)).feature_maps)
    loss = view.logits.sum() + view.deltas.sum()

    def pool(number: int, cells: int) -> torch.Tensor:
        """Pool the features in `number` boxes of each image."""
        finest, scale = view.maps[0], 1 / STRIDES[0]
        if isinstance(model, ViTPForOrientedObjectDetection):
            boxes = torch.zeros(number, 5)
            return torch.cat([align_in_image(features[None], boxes, cells, scale) for features in finest])
        images = torch.zeros(samples * number, dtype=torch.long)
        return model.align(finest, torch.zeros(samples * number, 4), images, cells, scale)

    for head in model.box_heads:
        logits, deltas = head(pool(config.roi_samples, BOX_CELLS))
        loss = loss + logits.sum() + deltas.sum()
    if isinstance(model, ViTPForInstanceSegmentation):
        loss = loss + model.mask_head(pool(int(config.roi_samples * config.roi_positive_share), MASK_CELLS)).sum()
    return loss
