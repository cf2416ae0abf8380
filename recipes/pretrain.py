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
from dataclasses import dataclass, field
from pathlib import Path

from datasets import Dataset, IterableDataset
from transformers import set_seed
from trl import ModelConfig, ScriptArguments, TrlParser

from modeling_vitp import ViTPForConditionalGeneration, ViTPTrainer, ViTPTrainingConfig, export_backbone
from modeling_vitp.cards.model_card import write_card
from modeling_vitp.cards.record import copy_record, public_name
from modeling_vitp.hub.run import begin, finish
from modeling_vitp.instructions.dry_run import print_mixture
from modeling_vitp.instructions.mixture import open_mixture
from modeling_vitp.instructions.sources import Mixture, load_mixture, load_rows
from modeling_vitp.training.checkpointing import last_checkpoint
from modeling_vitp.training.freezing import freeze, lora_config
from modeling_vitp.training.from_scratch import sample_texts
from modeling_vitp.training.plots import draw_losses
from modeling_vitp.training.pretraining import count_skipped
from modeling_vitp.training.start import load_start

logger = logging.getLogger("pretrain")


@dataclass
class PretrainArguments(ScriptArguments):
    mixture: dict | str | None = field(
        default=None,
        metadata={
            "help": "Instead of dataset_name: a mixture of sources with their rates, or the file that holds one, see "
            "README. A released meta JSON can be given as it is."
        },
    )
    dry_run: bool = field(
        default=False,
        metadata={"help": "Prints what the mixture amounts to and stops; needs neither data nor Hub nor GPU."},
    )
    task: str | None = field(
        default=None,
        metadata={
            "help": "Module under recipes/tasks that turns annotated rows into instructions while training and scores "
            "the model at the end. Not needed for a data set that has `messages`."
        },
    )
    from_scratch: dict | str | None = field(
        default=None,
        metadata={
            "help": "Instead of model_name_or_path: `vision_config`, `text_config`, `vocab_size` and, optionally, "
            "`image_processor` of a model and tokenizer to build."
        },
    )
    vision_model: str | None = field(
        default=None,
        metadata={"help": "Instead of model_name_or_path: a pretrained backbone, to be trained with language_model."},
    )
    language_model: str | None = field(
        default=None,
        metadata={"help": "The causal LM that vision_model is joined to, by a projector that starts fresh."},
    )
    freeze_vision: bool = field(default=False, metadata={"help": "The ViT does not train."})
    freeze_projector: bool = field(default=False, metadata={"help": "The projector does not train."})
    freeze_language_model: bool = field(
        default=False, metadata={"help": "The language model does not train. For LoRA on it, give use_peft instead."}
    )
    unfreeze_vision_layers: int = field(
        default=0, metadata={"help": "How many of the last layers of a frozen ViT train all the same."}
    )
    drop_path_rate: float | None = field(
        default=None,
        metadata={"help": "Stochastic depth of the ViT, growing linearly over its layers. The paper uses 0.1."},
    )
    max_patches: int | None = field(
        default=None, metadata={"help": "Most tiles of a sample; its images share them. The paper uses 12, or 6."}
    )
    input_spec: dict | str | None = field(
        default=None,
        metadata={"help": "How images that are not 8-bit RGB are read: `bands`, `window`, `percentiles`, `gamma`."},
    )

    def __post_init__(self):
        for name in ("from_scratch", "input_spec", "mixture"):
            value = getattr(self, name)
            if isinstance(value, str) and value.lstrip().startswith("{"):
                setattr(self, name, json.loads(value))
        if (self.mixture is None) == (self.dataset_name is None):
            raise ValueError("Give either dataset_name or mixture in the configuration: what is trained on.")
        if self.mixture is not None and self.task is not None:
            raise ValueError("A task makes its own instructions from dataset_name; with a mixture there is none.")


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


def describe_data(args: PretrainArguments, mixture: Mixture | None, dataset: Dataset | IterableDataset) -> list[dict]:
    """What is trained on, for the record of the run; `dataset` is a Hub id."""
    if mixture is None:
        is_on_hub = not Path(args.dataset_name).exists()
        split = {"split": args.dataset_train_split, "rows": len(dataset) if isinstance(dataset, Dataset) else None}
        return [{"name": public_name(args.dataset_name), "dataset": args.dataset_name if is_on_hub else None, **split}]
    return [
        {
            "name": source.name,
            "dataset": source.dataset if source.is_on_hub else None,
            "rows": source.rows,
            "rate": source.rate,
            "modality": source.modality,
            "tasks": source.tasks,
        }
        for source in mixture.sources
    ]


def describe_evaluation(args: PretrainArguments) -> dict[str, str] | None:
    """What `metrics.json` will be about, for the record of the run."""
    if args.dataset_name is None:
        return None
    on_hub = {} if Path(args.dataset_name).exists() else {"dataset": args.dataset_name}
    return {"name": public_name(args.dataset_name), "eval": args.dataset_test_split, **on_hub}


def mean_loss(log_history: list[dict]) -> dict[str, float]:
    """Over the whole run; the Trainer's divides the losses of all steps by the number of those since it was resumed."""
    losses = [logs["loss"] for logs in log_history if "loss" in logs]
    return {"train_loss": sum(losses) / len(losses)} if losses else {}


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
