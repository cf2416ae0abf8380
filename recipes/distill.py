"""Distill a small ViT from the patch features of a pretrained backbone.

    vitp distill --teacher my_backbone --data my_images --output_dir outputs/my_student

The images need no labels. The student is any ViT, from scratch or pretrained, and is exported to the folder `backbone`
of the output folder. If the command is started again with the same output folder, the run resumes from its last
checkpoint.
"""

import vitp_command
from modeling_vitp.pretraining.arguments import DistillationArguments, DistillationSettings
from modeling_vitp.training.command_line import parse

WHOLE = (
    "modeling_vitp.pretraining.arguments.DistillationArguments",
    "modeling_vitp.pretraining.distillation.ViTPDistillationConfig",
)
INHERITED = ("transformers.training_args",)


def main(argv: list[str] | None = None) -> int:
    args, training_args = parse(
        argv,
        __doc__,
        (DistillationArguments, DistillationSettings),
        WHOLE,
        INHERITED,
    )

    from transformers import set_seed

    from modeling_vitp.cards.record import public_name
    from modeling_vitp.cards.sections import command_of
    from modeling_vitp.images.reading import identity
    from modeling_vitp.pretraining.distillation import ImageFiles, ViTPDistillationTrainer, load_student, load_teacher
    from modeling_vitp.training import results
    from modeling_vitp.training.checkpointing import check_free

    if training_args.eval_strategy != "no" and not args.eval_data:
        raise ValueError("eval_strategy needs eval_data: set it, or eval_strategy: no.")
    check_free(training_args.output_dir)
    set_seed(training_args.seed)
    teacher, image_processor = load_teacher(args.teacher, training_args.bf16)
    spec = image_processor.input_spec
    trainer = ViTPDistillationTrainer(
        load_student(args, teacher, image_processor),
        teacher,
        training_args,
        train_dataset=ImageFiles(args.data, spec),
        eval_dataset=ImageFiles(args.eval_data, spec) if args.eval_data else None,
        processing_class=image_processor,
    )
    evaluated_on = None
    if args.eval_data:
        training_images = {identity(path) for path, _ in trainer.train_dataset.samples.files}
        for path, _ in trainer.eval_dataset.samples.files:
            if identity(path) in training_images:
                raise ValueError(f"{path} is in both data and eval_data. Remove it from one of them.")
        evaluated_on = {
            "name": ", ".join(map(public_name, args.eval_data)),
            "eval": "held-out images",
        }
    data = {
        "name": ", ".join(map(public_name, args.data)),
        "images": len(trainer.train_dataset),
    }
    sources = [args.teacher, args.student]
    trainer.record(command_of("distill", argv), sources, [data], evaluated_on)
    metrics = results.train(trainer)
    results.evaluate(trainer, metrics, "eval", trainer.eval_dataset)
    if not trainer.is_world_process_zero():
        return 0
    status = results.finish(trainer)
    if "eval" in metrics:
        print(f"\nCosine similarity to the teacher: {metrics['eval']['eval_cosine']:.3f}")
    print(f"The student is in {training_args.output_dir}/backbone")
    return status


if __name__ == "__main__":
    vitp_command.run(main)
