"""Visual instruction pretraining: parse, model, data, trainer, save.

    python recipes/pretrain.py --config recipes/configs/quickstart.yaml
    accelerate launch recipes/pretrain.py --config my_recipe.yaml --learning_rate 1e-5

The configuration is YAML; every field can be given on the command line too (`--help` lists them). Started again with
the same output folder, a run goes on from its last checkpoint.
"""

import importlib
import json
import logging
import sys
from pathlib import Path

from transformers import set_seed
from trl import ModelConfig, TrlParser

from modeling_vitp import ViTPForConditionalGeneration, ViTPTrainer, ViTPTrainingConfig, export_backbone
from modeling_vitp.cards.record import copy_record
from modeling_vitp.hub.contents import write_card
from modeling_vitp.hub.run import begin, finish
from modeling_vitp.instructions.dry_run import print_mixture
from modeling_vitp.instructions.mixture import open_mixture
from modeling_vitp.instructions.mixture_file import load_mixture
from modeling_vitp.instructions.rows import sample_texts
from modeling_vitp.instructions.sources import load_rows
from modeling_vitp.training.arguments import PretrainArguments, describe_data, describe_evaluation
from modeling_vitp.training.checkpointing import last_checkpoint
from modeling_vitp.training.freezing import freeze, lora_config
from modeling_vitp.training.plots import draw_losses
from modeling_vitp.training.pretraining import count_skipped, mean_loss
from modeling_vitp.training.start import load_start

logger = logging.getLogger("pretrain")


def main(argv: list[str] | None = None) -> int:
    parser = TrlParser((PretrainArguments, ViTPTrainingConfig, ModelConfig))
    script_args, training_args, model_args = parser.parse_args_and_config(argv)
    output_dir = Path(training_args.output_dir)
    set_seed(training_args.seed)

    mixture = load_mixture(script_args.mixture) if script_args.mixture else None
    if script_args.dry_run:
        if mixture is None:
            raise ValueError("dry_run is about a mixture, and the configuration has none.")
        print_mixture(mixture, training_args, script_args.max_patches)
        return 0

    task = importlib.import_module(f"modeling_vitp.recipes.tasks.{script_args.task}") if script_args.task else None
    source_settings = eval_dataset = None
    if mixture is not None:
        seed = training_args.seed if training_args.data_seed is None else training_args.data_seed
        train_dataset = open_mixture(mixture, seed)
        source_settings = {source.name: source.settings for source in mixture.sources}
    elif task is not None:
        datasets = load_rows(script_args)
        train_dataset, eval_dataset = task.prepare(datasets)
    else:
        datasets = load_rows(script_args)
        train_dataset = datasets[script_args.dataset_train_split]
        eval_dataset = datasets.get(script_args.dataset_test_split)
    sample_transform = task.transform if task is not None else None

    model, processor = load_start(
        model_args,
        script_args.from_scratch,
        sample_texts(train_dataset, sample_transform, training_args.seed),
        script_args.drop_path_rate,
        script_args.vision_model,
        script_args.language_model,
    )
    frozen = script_args.freeze_vision, script_args.freeze_projector, script_args.freeze_language_model
    freeze(model, *frozen, script_args.unfreeze_vision_layers)
    peft_config = lora_config(model, model_args, *frozen, script_args.unfreeze_vision_layers)
    if script_args.max_patches is not None:
        processor.image_processor.max_patches = script_args.max_patches
    if script_args.input_spec is not None:
        processor.image_processor.input_spec = script_args.input_spec

    trainer = ViTPTrainer(
        model,
        training_args,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        processing_class=processor,
        sample_transform=sample_transform,
        source_settings=source_settings,
        peft_config=peft_config,
    )
    starts = [model_args.model_name_or_path, script_args.vision_model, script_args.language_model]
    begin(trainer, argv, starts, describe_data(script_args, mixture, train_dataset), describe_evaluation(script_args))
    checkpoint = training_args.resume_from_checkpoint
    if checkpoint is None:
        checkpoint = last_checkpoint(output_dir)
        if checkpoint is not None:
            logger.info("Going on from %s. To start afresh, give another output_dir.", checkpoint)
    batch_size = trainer.get_total_train_batch_size(training_args)
    logger.info("Training in %d process(es), %d samples a step.", training_args.world_size, batch_size)
    result = trainer.train(resume_from_checkpoint=checkpoint)
    metrics = {"seed": training_args.seed, "train": result.metrics | mean_loss(trainer.state.log_history)}
    skipped = count_skipped(trainer.data_collator)
    if skipped:
        metrics["skipped_rows"] = skipped
        logger.warning("Rows skipped in this run, by source: %s", json.dumps(skipped))
    if eval_dataset is not None:
        metrics["eval"] = trainer.evaluate()
    trainer.save_model(output_dir if peft_config is None else output_dir / "adapter", _internal_call=True)
    if not trainer.is_world_process_zero():
        return 0

    if peft_config is not None:
        trainer.accelerator.unwrap_model(trainer.model).merge_and_unload().save_pretrained(output_dir)
        processor.save_pretrained(output_dir)
    # Not the trainer's model, of which FSDP and ZeRO leave each process a part.
    model = ViTPForConditionalGeneration.from_pretrained(output_dir).to(training_args.device)
    backbone = export_backbone(model, output_dir / "backbone", processor.image_processor)
    draw_losses(trainer.state.log_history, output_dir / "loss.png")
    if task is not None:
        metrics["task"] = task.evaluate(model, processor, datasets, output_dir, training_args.seed)
    (output_dir / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n")
    parts = {"backbone": backbone} | ({} if peft_config is None else {"adapter": output_dir / "adapter"})
    for what, folder in parts.items():
        copy_record(output_dir, folder)
        write_card(what, folder)
    is_shared = finish(trainer) == 0
    return report(metrics, output_dir, backbone) or int(not is_shared)


def report(metrics: dict, output_dir: Path, backbone: Path) -> int:
    """Prints what a user needs next; the exit status says whether the task's gate was passed."""
    print(json.dumps(metrics, indent=2))
    print(f"""
Model, processor, metrics.json and pictures: {output_dir}
The backbone, on its own:                    {backbone}

    from transformers import AutoImageProcessor, AutoModel
    backbone = AutoModel.from_pretrained("{backbone}")
    image_processor = AutoImageProcessor.from_pretrained("{backbone}")

Train on from here with your own data:
    python recipes/pretrain.py --model_name_or_path {output_dir} --dataset_name YOUR_DATA --output_dir NEW_FOLDER

Share the backbone on the Hub (--dry_run shows what would go):
    python recipes/push_to_hub.py {output_dir} NAMESPACE/NAME --what backbone --dry_run
""")
    if metrics.get("task", {}).get("passed", True):
        return 0
    print(f"The task's gate was NOT passed: {metrics['task']['gate']}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logger.setLevel(logging.INFO)
    sys.exit(main())
