r"""Fine-tune a pretrained backbone for image classification with one or several labels per image.

    vitp finetune_classification --data_root my_images --test_split test --model_name_or_path my_backbone \
        --output_dir outputs/my_classes

A folder has the images of each split and class, such as my_images/train/forest/1.png; a data set on the Hub has columns
`image` and `label`. The configuration is a YAML file, and the command line overrides its fields. If the command is
started again with the same output folder, the run resumes from its last checkpoint.
"""

from functools import partial

import vitp_command
from modeling_vitp.tasks.arguments import StartArguments
from modeling_vitp.tasks.classification.arguments import ClassificationArguments, ClassificationSettings
from modeling_vitp.training.command_line import parse

WHOLE = (
    "modeling_vitp.tasks.classification.arguments.ClassificationArguments",
    "modeling_vitp.tasks.classification.trainer.ViTPClassificationTrainingConfig",
    "modeling_vitp.tasks.arguments.StartArguments",
)
INHERITED = ("transformers.training_args",)


def main(argv: list[str] | None = None) -> int:
    own = ClassificationArguments, ClassificationSettings, StartArguments
    args, training_args, model_args = parse(argv, __doc__, own, WHOLE, INHERITED)

    from transformers import set_seed

    from modeling_vitp import ViTPForImageClassification, ViTPImageProcessor
    from modeling_vitp.cards.sections import command_of
    from modeling_vitp.tasks import fine_tuning
    from modeling_vitp.tasks import plan as fine_tuning_plan
    from modeling_vitp.tasks.classification.data import ClassificationData, check_trained, count
    from modeling_vitp.tasks.classification.trainer import (
        ViTPClassificationTrainer,
        classes_of,
        labels_of,
        load_classifier,
        loss_without_values,
    )
    from modeling_vitp.tasks.loading import check_start, load_image_processor
    from modeling_vitp.training.checkpointing import check_free

    if args.dry_run:
        fine_tuning_plan.assume_start(model_args)
    check_start(ViTPForImageClassification, model_args, training_args.do_train)
    check_free(training_args.output_dir)
    set_seed(training_args.seed)
    data = ClassificationData.from_dict(args.data)
    splits = fine_tuning.check_splits(training_args, args)
    if not args.dry_run:
        data.check_disjoint(splits)
    train_splits = args.train_splits if training_args.do_train else []
    names = data.find_classes(train_splits, classes_of(model_args))
    load = partial(load_classifier, model_args, names, data.multi_label, training_args.image_size, data.input_spec)
    if args.dry_run:
        open_samples = partial(data.open, train_splits)
        size = training_args.image_size
        return fine_tuning_plan.dry_run(args, training_args, model_args, load, open_samples, size, loss_without_values)
    train_dataset = data.open(train_splits) if train_splits else None
    scored = {split: data.open([split]) for split in (args.eval_split, args.test_split) if split}
    counted = {}
    if train_dataset is not None:
        counted = {"train_images": count(labels_of(train_dataset), names)}
        for split, samples in scored.items():
            check_trained(counted["train_images"], count(labels_of(samples), names), split, data.is_listed)

    size = {"height": training_args.image_size, "width": training_args.image_size}
    own = {"input_spec": data.input_spec, "size": size}
    trainer = ViTPClassificationTrainer(
        load(),
        training_args,
        train_dataset=train_dataset,
        eval_dataset=scored.get(args.eval_split),
        processing_class=load_image_processor(ViTPImageProcessor, model_args, training_args.do_train, **own),
    )
    if train_dataset is not None:
        described = data.describe(args.train_splits, args.eval_split, args.test_split)
        trainer.record(command_of("finetune_classification", argv), [model_args.model_name_or_path], *described)
    scored = scored.get(args.eval_split), scored.get(args.test_split)
    return fine_tuning.fine_tune(trainer, *scored, args.num_pictures, resample_test=args.resample_test, **counted)


if __name__ == "__main__":
    vitp_command.run(main)
