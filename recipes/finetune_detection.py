"""Fine-tune a pretrained backbone for detection of horizontal boxes, oriented boxes, or instances.

    vitp finetune_detection --data_root my_ships --model_name_or_path my_backbone --output_dir outputs/ships
    vitp finetune_detection --config dior_r --model_name_or_path my_backbone

A folder with COCO, VOC, DOTA, YOLO, GeoJSON or GeoPackage annotations needs no configuration. The configuration is a
YAML file, and the command line overrides its fields. If the command is started again with the same output folder, the
run resumes from its last checkpoint.
"""

from functools import partial

import vitp_command
from modeling_vitp.tasks.arguments import BackboneArguments
from modeling_vitp.tasks.detection.arguments import DetectionArguments, DetectionSettings
from modeling_vitp.training.command_line import load_plugins, parse

WHOLE = (
    "modeling_vitp.tasks.detection.arguments.DetectionArguments",
    "modeling_vitp.tasks.detection.trainer.ViTPDetectionTrainingConfig",
    "modeling_vitp.tasks.arguments.BackboneArguments",
)
INHERITED = ("transformers.training_args",)


def main(argv: list[str] | None = None) -> int:
    own = DetectionArguments, DetectionSettings, BackboneArguments
    args, training_args, model_args = parse(argv, __doc__, own, WHOLE, INHERITED)

    from torch.utils.data import Dataset
    from transformers import PreTrainedModel, set_seed

    from modeling_vitp.cards.sections import command_of
    from modeling_vitp.tasks import fine_tuning
    from modeling_vitp.tasks import plan as fine_tuning_plan
    from modeling_vitp.tasks.detection.controls import blind_scores
    from modeling_vitp.tasks.detection.data import DetectionData, with_few_empty
    from modeling_vitp.tasks.detection.prediction import write_submission
    from modeling_vitp.tasks.detection.trainer import (
        ViTPDetectionTrainer,
        check_detector,
        load_detection_image_processor,
        load_detector,
        loss_without_values,
    )
    from modeling_vitp.training.checkpointing import check_free

    load_plugins(args.plugins)
    if args.dry_run:
        fine_tuning_plan.assume_start(model_args)
    check_detector(args.task, model_args, training_args.do_train, args.detector)
    check_free(training_args.output_dir)
    set_seed(training_args.seed)
    data = DetectionData.from_arguments(args, training_args.output_dir)
    if args.submission is not None:
        data.split_settings(args.submission.split)

    def open_samples() -> Dataset:
        return with_few_empty(data.open(args.train_splits, args.task), args.empty_share, training_args.seed)

    def load() -> PreTrainedModel:
        return load_detector(args.task, model_args, data.names.names, training_args, args.detector, data.input_spec)

    if args.dry_run:
        size = training_args.image_size
        return fine_tuning_plan.dry_run(args, training_args, model_args, load, open_samples, size, loss_without_values)
    image_processor = load_detection_image_processor(model_args, training_args, data.input_spec, args.detector)
    data.check_disjoint(fine_tuning.check_splits(training_args, args), args.task)
    train_dataset = open_samples() if training_args.do_train else None
    eval_dataset = data.open([args.eval_split], args.task) if args.eval_split else None
    test_dataset = data.open([args.test_split], args.task) if args.test_split else None

    trainer = ViTPDetectionTrainer(
        load(),
        training_args,
        args.task,
        args.metric,
        args.metric_options,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        processing_class=image_processor,
    )
    counted = {}
    if train_dataset is not None:
        described = data.describe(args.train_splits, args.eval_split, args.test_split)
        trainer.record(command_of("finetune_detection", argv), [model_args.model_name_or_path], *described)
        counted = {"train_images": len(train_dataset), "train_objects": train_dataset.count(data.names.names)}
    submit = partial(write_submission, trainer, data, args.submission) if args.submission is not None else None
    controls = None
    if args.blind_controls:
        controls = partial(blind_scores, trainer, test_dataset, data.open(args.train_splits, args.task))
    shown = args.num_pictures, submit, controls, args.resample_test
    return fine_tuning.fine_tune(trainer, eval_dataset, test_dataset, *shown, **counted)


if __name__ == "__main__":
    vitp_command.run(main)
