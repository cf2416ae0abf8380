"""Fine-tune a pretrained backbone for semantic segmentation.

    vitp finetune_segmentation --data_root my_fields --model_name_or_path my_backbone --output_dir outputs/fields
    vitp finetune_segmentation --config loveda --model_name_or_path my_backbone

A folder with images and masks of the same names needs no configuration. The configuration is a YAML file, and the
command line overrides its fields. If the command is started again with the same output folder, the run resumes from its
last checkpoint.
"""

from functools import partial

import vitp_command
from modeling_vitp.tasks.arguments import BackboneArguments
from modeling_vitp.tasks.segmentation.arguments import DenseArguments, DenseSettings
from modeling_vitp.training.command_line import load_plugins, parse

WHOLE = (
    "modeling_vitp.tasks.segmentation.arguments.DenseArguments",
    "modeling_vitp.tasks.segmentation.trainer.ViTPSegmentationTrainingConfig",
    "modeling_vitp.tasks.arguments.BackboneArguments",
)
INHERITED = ("transformers.training_args",)


def main(
    argv: list[str] | None = None,
    model_type: str = "vitp_segmentation",
    description: str = __doc__,
) -> int:
    own = DenseArguments, DenseSettings, BackboneArguments
    args, training_args, model_args = parse(argv, description, own, WHOLE, INHERITED)

    from transformers import set_seed

    from modeling_vitp import ViTPSegmentationImageProcessor
    from modeling_vitp.auto.registry import find_model
    from modeling_vitp.cards.sections import command_of
    from modeling_vitp.tasks import fine_tuning
    from modeling_vitp.tasks import plan as fine_tuning_plan
    from modeling_vitp.tasks.loading import load_image_processor
    from modeling_vitp.tasks.segmentation.data import DenseData, count_pixels, weigh_classes
    from modeling_vitp.tasks.segmentation.prediction import write_submission
    from modeling_vitp.tasks.segmentation.trainer import (
        ViTPSegmentationTrainer,
        check_dense_start,
        load_dense_model,
        loss_without_values,
    )
    from modeling_vitp.training.checkpointing import check_free

    entry = find_model(model_type)
    load_plugins(args.plugins)
    if args.dry_run:
        fine_tuning_plan.assume_start(model_args)
    check_dense_start(entry.model_class, model_args, training_args.do_train)
    check_free(training_args.output_dir)
    set_seed(training_args.seed)
    data = DenseData.from_arguments(args, training_args.output_dir)
    if args.dry_run:
        load = partial(load_dense_model, entry.model_class, model_args, data.encoding.names, None, data.image_spec)
        open_samples = partial(data.open, args.train_splits)
        size = training_args.crop_size
        return fine_tuning_plan.dry_run(args, training_args, model_args, load, open_samples, size, loss_without_values)
    splits = fine_tuning.check_splits(training_args, args)
    for split in splits:
        data.split_settings(split)  # raises an error for an unknown split
    data.check_disjoint(splits)
    train_dataset = data.open(args.train_splits) if training_args.do_train else None
    eval_dataset = data.open([args.eval_split]) if args.eval_split else None
    test_dataset = data.open([args.test_split]) if args.test_split else None

    expected = entry.model_class.images_per_sample
    for dataset in (train_dataset, eval_dataset, test_dataset):
        if dataset is not None and len(dataset[0]["images"]) != expected:
            other = "vitp finetune_change_detection" if expected == 1 else "vitp finetune_segmentation"
            raise ValueError(f"Expected {expected} image(s) in a sample, got {len(dataset[0]['images'])}. Use {other}.")

    pixels = weights = None
    if train_dataset is not None:
        workers = training_args.dataloader_num_workers
        pixels, weights = weigh_classes(train_dataset, data.encoding.names, args.class_weights, workers)
    model = load_dense_model(entry.model_class, model_args, data.encoding.names, weights, data.image_spec)
    model.config.volume_plane = data.plane
    for kind, dataset in (("evaluation", eval_dataset), ("test", test_dataset)):
        if train_dataset is not None and dataset is not None:  # A bad mask would stop the run when it is scored.
            count_pixels(dataset, data.encoding.names, training_args.dataloader_num_workers, kind)
    trainer = ViTPSegmentationTrainer(
        model,
        training_args,
        data.encoding,
        args.metric or entry.metric,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        processing_class=load_image_processor(ViTPSegmentationImageProcessor, model_args, input_spec=data.image_spec),
    )
    if train_dataset is not None:
        described = data.describe(args.train_splits, args.eval_split, args.test_split)
        recipe = "finetune_segmentation" if expected == 1 else "finetune_change_detection"
        trainer.record(command_of(recipe, argv), [model_args.model_name_or_path], *described)
    submit = partial(write_submission, trainer, data, args.submission) if args.submission is not None else None
    shown = args.num_pictures, submit, None, args.resample_test
    return fine_tuning.fine_tune(trainer, eval_dataset, test_dataset, *shown, train_pixels=pixels)


if __name__ == "__main__":
    vitp_command.run(main)
