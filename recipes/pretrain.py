"""Pretrain on visual instructions, from a vision-language model, a ViT with a language model, or random weights.

    vitp pretrain --config quickstart
    accelerate launch -m modeling_vitp.recipes.pretrain --config my_recipe.yaml --learning_rate 1e-5

The configuration is a YAML file, and the command line overrides its fields. If the command is started again with the
same output folder, the run resumes from its last checkpoint.
"""

from pathlib import Path
from typing import Any

from trl import ModelConfig

import vitp_command
from modeling_vitp.pretraining.arguments import SFT_MODULES, PretrainArguments, VRLArguments
from modeling_vitp.training.command_line import load_plugins, parse

WHOLE = (
    "modeling_vitp.pretraining.arguments.PretrainArguments",
    "modeling_vitp.pretraining.config.ViTPTrainingConfig",
    "trl.ModelConfig",
)


def main(argv: list[str] | None = None) -> int:
    own = PretrainArguments, VRLArguments, ModelConfig
    args, training_args, model_args = parse(argv, __doc__, own, WHOLE, SFT_MODULES)

    from modeling_vitp.instructions.mixture import load_mixture
    from modeling_vitp.pretraining.loading import apply_input_spec, check_from_scratch, check_options, load_start

    load_plugins(args.plugins)
    check_from_scratch(args.from_scratch)
    check_options(model_args, args.from_scratch, training_args.model_init_kwargs)
    mixture = load_mixture(args.mixture) if args.mixture else None
    if args.dry_run:  # without the imports of a training, which take seconds
        from modeling_vitp.pretraining import plan

        return plan.dry_run(args, training_args, model_args, mixture)

    from transformers import set_seed

    from modeling_vitp import ViTPTrainer
    from modeling_vitp.cards.sections import command_of
    from modeling_vitp.instructions.rows import SourceSettings, sample_texts
    from modeling_vitp.pretraining.data import describe_data, describe_evaluation, open_data
    from modeling_vitp.pretraining.requirements import check_requirements
    from modeling_vitp.pretraining.results import keep_start, remove_pictured
    from modeling_vitp.tasks.segmentation.data import DenseData
    from modeling_vitp.training import results
    from modeling_vitp.training.checkpointing import check_free
    from modeling_vitp.training.freezing import freeze, lora_config
    from modeling_vitp.training.resuming import default_warmup

    output_dir = Path(training_args.output_dir)
    set_seed(training_args.seed)
    check_free(output_dir)
    if args.probe_data is not None:  # an error after the training would be late
        from modeling_vitp.probing.segmentation import SegmentationProbe

        SegmentationProbe(DenseData.from_dict(args.probe_data), dict(zip(("train", "test"), args.probe_splits)), 1e-2)
    seed = training_args.seed if training_args.data_seed is None else training_args.data_seed
    data = open_data(args, mixture, seed, training_args.eval_strategy != "no")
    if data.eval is None and not data.test_images:
        training_args.eval_strategy = "no"
    if args.from_scratch is not None and training_args.vrl_warmup_steps is None:
        training_args.vrl_warmup_steps = default_warmup(training_args, data.train)

    model, processor = load_start(args, model_args, sample_texts(data.train, data.transform, training_args.seed))
    frozen = args.freeze_vision, args.freeze_projector, args.freeze_language_model, args.unfreeze_vision_layers
    freeze(model, *frozen)
    peft_config = lora_config(model, model_args, *frozen, args.lora_on_vision)
    if args.max_patches is not None:
        processor.image_processor.max_patches = args.max_patches
    if args.input_spec is not None:
        apply_input_spec(args.input_spec, model, processor, model_args.use_peft)
    if data.transform is not None:
        data.read_with(SourceSettings().spec_for(processor.image_processor))

    trainer = ViTPTrainer(
        model,
        training_args,
        train_dataset=data.train,
        eval_dataset=data.eval,
        processing_class=processor,
        sample_transform=data.transform,
        source_settings=data.settings,
        peft_config=peft_config,
    )
    sources = [model_args.model_name_or_path, args.vision_model, args.language_model]
    if data.test_images or args.probe_data is not None:
        keep_start(trainer)
    elif trainer.is_world_process_zero():
        remove_pictured(output_dir)
    described = describe_data(args, mixture, data.train), describe_evaluation(args)
    trainer.record(command_of("pretrain", argv), sources, *described)
    metrics = results.train(trainer)
    results.evaluate(trainer, metrics, "eval", trainer.eval_dataset)
    if not trainer.is_world_process_zero():
        return 0

    with results.no_library_bars():
        metrics |= score_run(args, data, output_dir, training_args)
    metrics["requirements"] = check_requirements(args.require, metrics)
    results.save_metrics(trainer, metrics)
    status = results.finish(trainer)
    return results.report(metrics, output_dir, model.config.model_type) or status


def score_run(args: PretrainArguments, data: Any, output_dir: Path, training_args: Any) -> dict[str, Any]:
    """Return the scores of a finished run: probes of its frozen backbone, and answers about unseen images."""
    from datasets import Dataset

    from modeling_vitp import ViTPForConditionalGeneration, ViTPProcessor
    from modeling_vitp.evaluation.pretraining import answers_table, probe_labels, score_pretraining, texts_of
    from modeling_vitp.probing.gains import gains_table, probe_run

    scores, tables, seed, device = {}, [], training_args.seed, training_args.device
    if args.probe_data is not None:
        scores["probe"] = probe_run(args.probe_data, args.probe_splits, output_dir, seed, device)
    elif data.test_images:
        jitter = training_args.color_jitter
        scores["probe"] = probe_labels(data.transform, data.test_images, output_dir, seed, device, jitter)
    if scores.get("probe"):
        tables += ["Probes of frozen features:", gains_table(scores["probe"])]
    if isinstance(data.eval, Dataset):
        model = ViTPForConditionalGeneration.from_pretrained(output_dir).to(device)
        processor = ViTPProcessor.from_pretrained(output_dir)
        trained = texts_of(data.train, data.transform, seed)
        scores["answers"] = score_pretraining(model, processor, data.eval, trained, seed, data.transform is not None)
        if scores["answers"]:
            tables += ["Answers about unseen images:", answers_table(scores["answers"])]
    if tables:
        scores["summary"] = "\n\n".join(tables)
        print(f"\n{scores['summary']}")
    return {name: value for name, value in scores.items() if value}


if __name__ == "__main__":
    vitp_command.run(main)
