"""Classification of images from a pretrained backbone, with one label an image or several.

    vitp finetune_classification --data_root my_images --test_split test --model_name_or_path my_backbone \
        --output_dir outputs/my_classes

A folder has the images of each split and class, as in my_images/train/forest/1.png; a data set of the Hub has columns
`image` and `label`. The configuration is YAML; every field can be given on the command line too. Started again with the
same output folder, a run goes on from its last checkpoint.
"""

from pathlib import Path

import vitp_command
from modeling_vitp.classification.arguments import (
    ClassificationArguments,
    ClassificationModelArguments,
    ClassificationSettings,
)
from modeling_vitp.training.command_line import parse

WHOLE = (
    "modeling_vitp.classification.arguments.ClassificationArguments",
    "modeling_vitp.classification.trainer.ClassificationTrainingArguments",
    "modeling_vitp.classification.arguments.ClassificationModelArguments",
)
INHERITED = ("transformers.training_args",)


def main(argv: list[str] | None = None) -> int:
    own = ClassificationArguments, ClassificationSettings, ClassificationModelArguments
    args, training_args, model_args = parse(argv, __doc__, own, WHOLE, INHERITED)

    from transformers import set_seed

    from modeling_vitp import ViTPForImageClassification
    from modeling_vitp.classification.data import ClassificationData, check_trained, count
    from modeling_vitp.classification.trainer import (
        ClassificationTrainer,
        classes_of,
        labels_of,
        load_classifier,
        load_image_processor,
    )
    from modeling_vitp.training import results
    from modeling_vitp.training.checkpointing import check_free
    from modeling_vitp.training.fine_tuning import check_start

    check_start(ViTPForImageClassification, model_args, training_args.do_train)
    check_free(training_args.output_dir)
    set_seed(training_args.seed)
    data = ClassificationData.from_dict(args.data)
    results.check_eval_split(training_args, args.train_splits, args.eval_split)
    train_splits = args.train_splits if training_args.do_train else []
    data.check_disjoint(list(dict.fromkeys([*train_splits, *filter(None, (args.eval_split, args.test_split))])))
    names = data.find_classes(train_splits, classes_of(model_args))
    train_dataset = data.open(train_splits) if train_splits else None
    scored = {split: data.open([split]) for split in (args.eval_split, args.test_split) if split}
    counted = {}
    if train_dataset is not None:
        counted = {"train_images": count(labels_of(train_dataset), names)}
        for split, samples in scored.items():
            check_trained(counted["train_images"], count(labels_of(samples), names), split, data.is_listed)

    side = training_args.image_size
    trainer = ClassificationTrainer(
        load_classifier(model_args, names, data.multi_label, side, data.input_spec),
        training_args,
        train_dataset=train_dataset,
        eval_dataset=scored.get(args.eval_split),
        processing_class=load_image_processor(model_args, data.input_spec, side),
    )
    if train_dataset is not None:
        described = data.describe(args.train_splits, args.eval_split, args.test_split)
        trainer.record(argv, [model_args.model_name_or_path], *described)
    metrics = results.train(trainer, **counted)
    results.evaluate(trainer, metrics, "eval", scored.get(args.eval_split))
    results.evaluate(trainer, metrics, "test", scored.get(args.test_split))
    if not trainer.is_world_process_zero():
        return 0

    status = results.finish(trainer, scored.get(args.test_split or args.eval_split), args.num_pictures)
    results.save_metrics(trainer, metrics)
    return results.report(metrics, Path(training_args.output_dir)) or status


if __name__ == "__main__":
    vitp_command.run(main)
