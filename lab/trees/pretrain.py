"""Pretrain on instructions about trees, which are drawn from boxes during training, and score backbone and answers.

    python -m lab.trees.pretrain --config lab/trees/quickstart.yaml

The arguments are those of `vitp pretrain`, and `task_options`. The rows are those of `lab/data/aerial_trees`. If the
command is started again with the same output folder, the run resumes from its last checkpoint.
"""

import sys
from pathlib import Path

from trl import ModelConfig

from lab.command import run
from lab.trees.arguments import TreePretrainArguments
from modeling_vitp.pretraining.arguments import SFT_MODULES, VRLArguments
from modeling_vitp.training.command_line import parse

WHOLE = (
    "lab.trees.arguments.TreePretrainArguments",
    "modeling_vitp.pretraining.config.ViTPTrainingConfig",
    "trl.ModelConfig",
)


def main(argv: list[str] | None = None) -> int:
    own = TreePretrainArguments, VRLArguments, ModelConfig
    args, training_args, model_args = parse(argv, __doc__, own, WHOLE, SFT_MODULES)

    from transformers import set_seed

    from lab.trees import evaluation
    from lab.trees.instructions import TreeInstructions, prepare
    from modeling_vitp import ViTPForConditionalGeneration, ViTPTrainer
    from modeling_vitp.cards.sections import command_of
    from modeling_vitp.instructions.rows import sample_texts
    from modeling_vitp.instructions.sources import base_of, load_rows, take
    from modeling_vitp.pretraining.data import describe_data, describe_evaluation
    from modeling_vitp.pretraining.loading import apply_input_spec, check_from_scratch, check_options, load_start
    from modeling_vitp.pretraining.results import keep_start, next_commands
    from modeling_vitp.training import results
    from modeling_vitp.training.checkpointing import check_free
    from modeling_vitp.training.freezing import freeze, lora_config
    from modeling_vitp.training.resuming import default_warmup

    check_from_scratch(args.from_scratch)
    check_options(model_args, args.from_scratch, training_args.model_init_kwargs)
    output_dir = Path(training_args.output_dir)
    set_seed(training_args.seed)
    check_free(output_dir)
    splits = load_rows(args)
    splits["train"] = take(splits[base_of(args.dataset_train_split)], args.dataset_train_split)
    train_rows, eval_rows = prepare(splits)
    transform = TreeInstructions(splits["train"], **(args.task_options or {}))
    if args.from_scratch is not None and training_args.vrl_warmup_steps is None:
        training_args.vrl_warmup_steps = default_warmup(training_args, train_rows)

    model, processor = load_start(args, model_args, sample_texts(train_rows, transform, training_args.seed))
    freeze(model, args.freeze, args.unfreeze_vision_layers)
    peft_config = lora_config(model, model_args, args.freeze, args.unfreeze_vision_layers, args.lora_on_vision)
    if args.max_patches is not None:
        processor.image_processor.max_patches = args.max_patches
    if args.input_spec is not None:
        apply_input_spec(args.input_spec, model, processor, model_args.use_peft)

    trainer = ViTPTrainer(
        model,
        training_args,
        train_dataset=train_rows,
        eval_dataset=eval_rows,
        processing_class=processor,
        sample_transform=transform,
        peft_config=peft_config,
    )
    keep_start(trainer)
    sources = [model_args.model_name_or_path, args.vision_model, args.language_model]
    command = command_of("pretrain", argv).replace("vitp pretrain", "python -m lab.trees.pretrain", 1)
    trainer.record(command, sources, describe_data(args, None, train_rows), describe_evaluation(args))
    metrics = results.train(trainer)
    results.evaluate(trainer, metrics, "eval", trainer.eval_dataset)
    if not trainer.is_world_process_zero():
        return 0

    with results.no_library_bars():
        trained = ViTPForConditionalGeneration.from_pretrained(output_dir).to(training_args.device)
        metrics["task"] = evaluation.evaluate(trained, processor, splits, output_dir, training_args.seed)
    results.save_metrics(trainer, metrics)
    status = results.finish(trainer) | results.report(
        metrics, output_dir, model.config.model_type, next_commands(output_dir)
    )
    for check in metrics["task"]["checks"]:
        result = "passed" if check["passed"] else "failed"
        print(f"{result}: {check['name']}: {check['reached']:.3f} (required: {check['required']})")
    if not metrics["task"]["passed"]:
        print(f"The gate was NOT passed: {metrics['task']['gate']}", file=sys.stderr)
        return 1
    return status


if __name__ == "__main__":
    run(main)
