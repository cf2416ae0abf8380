"""Check that all models of an adaptation can be built at their sizes, before anything is made or trained."""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from huggingface_hub.errors import StrictDataclassError

from ..command.errors import one_line
from ..modeling_vitp_backbone import open_vit
from ..pretraining.loading import load_start
from ..pretraining.masked_autoencoder import mae_steps
from ..pretraining.plan import BatchShape, config_of_start, measure_pretraining
from ..tasks import TASKS
from ..tasks.arguments import BackboneArguments
from ..tasks.plan import load_without_values
from ..training.costs import measure_step
from .arguments import MAE
from .backbones import Backbones
from .comparison import settings_of_backbone
from .masked_autoencoder import mae_config
from .plan import FIRST_SAMPLES
from .pretraining import Pretraining
from .runs import fine_tuning_options

TEXTS = ["The trees stand in rows."]  # for the tokenizer of a model from scratch
FAILURES = (ValueError, OSError, RuntimeError, StrictDataclassError)  # of models that cannot be built or run
SMALL_BATCH = BatchShape(samples=1, tiles=1, text_tokens=16)


def check_models(
    pretraining: Pretraining, task: str, fine_tuning: Mapping[str, Any], backbones: Backbones, needs_weights: bool
) -> None:
    """Build the model of the pretraining, and the fine-tuned model of each backbone, and run each without values.

    Args:
        pretraining: settings of the pretraining.
        task: name of the task of the fine-tuning.
        fine_tuning: configuration of the fine-tuning.
        backbones: compared backbones.
        needs_weights: whether weights are loaded. The estimates of a dry run do without them.

    Raises:
        ValueError: if a model cannot be built. The message names the option of `vitp adapt` that mends it.
    """
    check_pretraining(pretraining, needs_weights)
    for backbone in backbones.of_each_shape(needs_weights):
        option = "baselines" if backbone in backbones.models.values() else "start"
        try:
            open_vit(backbone)
        except (ValueError, OSError) as error:
            raise ValueError(
                f"{option}: {backbone} cannot be loaded: {one_line(str(error))} Give a folder or Hub id of a ViT with "
                f"its weights, or remove it from {option}."
            ) from error
        check_fine_tuning(task, settings_of_backbone(task, fine_tuning, backbone), option, pretraining.folder)
    if MAE in backbones.models:
        try:
            mae_config(pretraining, backbones, backbones.folder)
            mae_steps(pretraining.start.config, 1, 1.0)
        except ValueError as error:
            raise ValueError(
                f"baselines: mae cannot be trained: {error} Set mae, or remove mae from baselines."
            ) from error


def check_pretraining(pretraining: Pretraining, needs_weights: bool) -> None:
    """Raise a `ValueError` if the model of the pretraining cannot be built.

    Args:
        pretraining, needs_weights: as for [`check_models`].
    """
    arguments = pretraining.arguments
    try:
        settings = pretraining.start.settings
        if needs_weights and pretraining.start.vit is not None:  # Random weights fit.
            paths = {name: settings.get(name) for name in ("vision_model", "language_model")}
            args = replace(arguments.args, **paths)
            model_args = replace(arguments.model_args, model_name_or_path=settings.get("model_name_or_path"))
            load_start(args, model_args, TEXTS)
        config, _ = config_of_start(arguments.args, arguments.model_args)
        measure_pretraining(config, SMALL_BATCH, bf16=arguments.training_args.bf16)
    except FAILURES as error:
        raise ValueError(
            f"start: the model of the pretraining cannot be built: {one_line(str(error))} Set start, language_model or "
            "image_size, or settings of the model in pretraining."
        ) from error


def check_fine_tuning(task: str, settings: Mapping[str, Any], option: str, folder: Path) -> None:
    """Raise a `ValueError` if the fine-tuned model of a backbone cannot be built.

    Args:
        task: name of the task.
        settings: configuration of the fine-tuning of the backbone.
        option: option that names the backbone.
        folder: folder for the configuration that is parsed.
    """
    task_object = TASKS[task]
    options = fine_tuning_options(task, settings, folder)
    side = getattr(options.training, task_object.image_side)
    try:
        data = task_object.open_data(options)
        model = load_without_values(task_object, data, options)
        measure_step(model.train(), lambda model: task_object.loss(model, FIRST_SAMPLES, side), options.training.bf16)
    except FAILURES as error:
        remedy = f"set another ViT in {option}, or {task_object.image_side} in fine_tuning"
        if isinstance(options.start, BackboneArguments):
            example = json.dumps({"neck": "pyramid"})
            remedy += f", or neck, backbone and head there, such as --fine_tuning '{example}'"
        raise ValueError(
            f"{option}: {settings['model_name_or_path']} cannot be fine-tuned at {side} x {side} pixels: "
            f"{one_line(str(error))} With adapt, {remedy}."
        ) from error
