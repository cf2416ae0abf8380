"""Semantic segmentation from a pretrained backbone: parse, model, data, trainer, save.

    python recipes/finetune_segmentation.py --config recipes/configs/loveda.yaml --model_name_or_path my_backbone

The configuration is YAML; every field can be given on the command line too (`--help` lists them). Started again with
the same output folder, a run goes on from its last checkpoint.
"""

import json
import logging
import math
import sys
from pathlib import Path

from transformers import PreTrainedModel, set_seed
from trl import TrlParser

from modeling_vitp import ViTPForSemanticSegmentation
from modeling_vitp.cards.record import public_name
from modeling_vitp.dense.arguments import DenseModelArguments, DenseTrainingArguments, FinetuneArguments
from modeling_vitp.dense.data import DenseData, balanced_weights, count_pixels
from modeling_vitp.dense.pictures import draw_predictions
from modeling_vitp.dense.start import load_dense_model, load_image_processor
from modeling_vitp.dense.submission import write_masks
from modeling_vitp.dense.trainer import DenseTrainer
from modeling_vitp.hub.run import begin, finish
from modeling_vitp.training.checkpointing import last_checkpoint
from modeling_vitp.training.plots import draw_losses

logger = logging.getLogger("finetune")


def main(
    argv: list[str] | None = None,
    model_class: type[PreTrainedModel] = ViTPForSemanticSegmentation,
    metric: str = "mean_iou",
) -> int:
    parser = TrlParser((FinetuneArguments, DenseTrainingArguments, DenseModelArguments))
    args, training_args, model_args = parser.parse_args_and_config(argv)
    output_dir = Path(training_args.output_dir)
    set_seed(training_args.seed)

    data = DenseData.from_dict(args.data)
    if training_args.load_best_model_at_end and args.eval_split in {*args.train_splits, None}:
        raise ValueError("load_best_model_at_end needs an eval_split that is not trained on.")
    data.check_disjoint(list(dict.fromkeys([*args.train_splits, *filter(None, (args.eval_split, args.test_split))])))
    train_dataset = data.open(args.train_splits) if training_args.do_train else None
    eval_dataset = data.open([args.eval_split]) if args.eval_split else None
    test_dataset = data.open([args.test_split]) if args.test_split else None

    pixels, weights = None, args.class_weights
    if train_dataset is not None:
        pixels = count_pixels(train_dataset, data.encoding.names, training_args.dataloader_num_workers)
        weights = balanced_weights(pixels) if weights == ["balanced"] else weights and [float(item) for item in weights]
    model = load_dense_model(model_class, model_args, data.encoding.names, weights)
    trainer = DenseTrainer(
        model,
        training_args,
        data.encoding,
        args.metric or metric,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        processing_class=load_image_processor(model_args, data.image_spec),
    )

    metrics = {"seed": training_args.seed}
    if train_dataset is not None:
        name = public_name(data.dataset_name or data.root)
        on_hub = {"dataset": data.dataset_name} if data.dataset_name and not Path(data.dataset_name).exists() else {}
        trained_on = [{"name": name, "split": split, **on_hub} for split in args.train_splits]
        evaluated_on = {"name": name, "eval": args.eval_split, "test": args.test_split, **on_hub}
        begin(trainer, argv, [model_args.model_name_or_path], trained_on, evaluated_on)
        checkpoint = training_args.resume_from_checkpoint or last_checkpoint(output_dir)
        if checkpoint is not None:
            logger.info("Going on from %s. To start afresh, give another output_dir.", checkpoint)
        metrics |= {"train": trainer.train(resume_from_checkpoint=checkpoint).metrics, "train_pixels": pixels}
        trainer.save_model(output_dir, _internal_call=True)
    if eval_dataset is not None:
        metrics["eval"] = trainer.evaluate()
    if test_dataset is not None:
        metrics["test"] = trainer.evaluate(test_dataset, metric_key_prefix="test")
    if not trainer.is_world_process_zero():
        return 0

    output_dir.mkdir(parents=True, exist_ok=True)
    if train_dataset is not None:
        draw_losses(trainer.state.log_history, output_dir / "loss.png")
    shown = test_dataset or eval_dataset
    if shown is not None and args.num_pictures:
        samples = [shown[index * len(shown) // args.num_pictures] for index in range(args.num_pictures)]
        predictions = [trainer.predict_labels(sample["images"], is_test=True) for sample in samples]
        draw_predictions(samples, predictions, data.encoding, output_dir / "predictions.png")
    if args.submission is not None:
        split, settings = args.submission["split"], args.submission
        folder = write_masks(data.open([split]), trainer, data.encoding, settings, output_dir / "submission")
        print(f"For the server: {folder}.zip")
    (output_dir / "metrics.json").write_text(json.dumps(without_nan(metrics), indent=2) + "\n")
    status = finish(trainer) if train_dataset is not None else 0
    print(json.dumps(without_nan(metrics), indent=2))
    print(f"\nModel, image processor, metrics.json and pictures: {output_dir}")
    return status


def without_nan(value):
    """JSON has no NaN: what could not be scored, a class that never occurs, is null."""
    if isinstance(value, dict):
        return {key: without_nan(item) for key, item in value.items()}
    return None if isinstance(value, float) and math.isnan(value) else value


if __name__ == "__main__":
    sys.exit(main())
