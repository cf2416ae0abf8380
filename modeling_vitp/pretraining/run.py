"""Pretraining from its options to the backbone and its scores."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import set_seed

from ..instructions.mixture import load_mixture
from ..instructions.rows import SourceSettings, sample_texts
from ..training import results
from ..training.checkpointing import check_free
from ..training.freezing import freeze, lora_config
from ..training.results import RunResult
from ..training.resuming import default_warmup
from .data import PretrainData, describe_data, describe_evaluation, open_data, report_training_images
from .loading import apply_input_spec, check_from_scratch, check_options, load_start
from .options import PretrainingOptions
from .requirements import check_requirements
from .results import keep_start, next_commands, remove_pictured
from .trainer import ViTPTrainer

Score = Callable[[PretrainingOptions, PretrainData], dict[str, Any]]


def pretrain(options: PretrainingOptions, score: Score | None = None, command: str | None = None) -> RunResult:
    """Pretrain a ViT within a vision-language model (paper, section 3), and write the results.

    The output folder gets the model, its backbone in `backbone`, their cards, `metrics.json` and pictures. If the
    folder has an unfinished run of the same options, it is resumed.

    Args:
        options: options of the run, see [`~modeling_vitp.pretraining.options.make_options`].
        score: function that returns scores of the finished run, such as
            [`~modeling_vitp.evaluation.pretraining.score_run`]. By default only the loss is computed.
        command: command that runs it again, for the card.

    Raises:
        ValueError: if the options, the data or the start are wrong.
    """
    args = options.data
    training_args = options.training
    model_args = options.model
    check_from_scratch(args.from_scratch)
    check_options(model_args, args.from_scratch, training_args.model_init_kwargs)
    mixture = load_mixture(args.mixture) if args.mixture else None
    output_dir = Path(training_args.output_dir)
    set_seed(training_args.seed)
    check_free(output_dir)
    data_seed = training_args.seed if training_args.data_seed is None else training_args.data_seed
    data = open_data(args, mixture, data_seed, evaluates=training_args.eval_strategy != "no")
    if data.eval is None and not data.test_images:
        training_args.eval_strategy = "no"
    if args.from_scratch is not None and training_args.vrl_warmup_steps is None:
        training_args.vrl_warmup_steps = default_warmup(training_args, data.train)

    trainer = make_trainer(options, data)
    if data.test_images or args.probe_data is not None or training_args.interpolation_alpha < 1:
        keep_start(trainer)
    elif trainer.is_world_process_zero():
        remove_pictured(output_dir)
    trainer.record(
        command,
        sources=[model_args.model_name_or_path, args.vision_model, args.language_model],
        data=describe_data(args, mixture, data.train),
        evaluated_on=describe_evaluation(args),
    )
    metrics = results.train(trainer)
    results.evaluate(trainer, metrics, "eval", trainer.eval_dataset)
    if not trainer.is_world_process_zero():
        return RunResult(metrics)

    if score is not None:
        with results.no_library_bars():
            metrics.update(score(options, data))
    metrics["requirements"] = check_requirements(args.require, metrics)
    results.save_metrics(trainer, metrics)
    finish_status = results.finish(trainer)
    model_type = trainer.model.config.model_type
    report_status = results.report(metrics, output_dir, model_type, next_commands(output_dir))
    return RunResult(metrics, finish_status | report_status)


def make_trainer(options: PretrainingOptions, data: PretrainData) -> ViTPTrainer:
    """Load the model to start from, freeze its parts, and return its trainer."""
    args = options.data
    training_args = options.training
    model_args = options.model
    model, processor = load_start(args, model_args, sample_texts(data.train, data.transform, training_args.seed))
    freeze(model, args.freeze, args.unfreeze_vision_layers)
    peft_config = lora_config(
        model,
        model_args,
        frozen_parts=args.freeze,
        unfreeze_vision_layers=args.unfreeze_vision_layers,
        lora_on_vision=args.lora_on_vision,
    )
    if args.max_patches is not None:
        processor.image_processor.max_patches = args.max_patches
    if args.input_spec is not None:
        apply_input_spec(args.input_spec, model, processor, model_args.use_peft)
    if data.transform is not None:
        data.read_with(SourceSettings().spec_for(processor.image_processor))
    report_training_images(data, processor.image_processor)
    return ViTPTrainer(
        model,
        training_args,
        train_dataset=data.train,
        eval_dataset=data.eval,
        processing_class=processor,
        sample_transform=data.transform,
        source_settings=data.settings,
        peft_config=peft_config,
    )
