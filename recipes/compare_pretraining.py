"""What ViTP's pretraining brings: tree crowns from a random ViT and from ViTs pretrained with and without VRL.

    vitp compare_pretraining --config compare_aerial_trees

For each seed and share of the labels, ViTs are pretrained on instructions about the labelled windows, and they and a
random ViT are fine-tuned on the masks of the same windows, all with the same budget, schedule and augmentation. Seeds
draw the windows, the weights and the batches. Each start has the learning rate of fine-tuning that is best on a part of
the training ground that neither its pretraining nor its fine-tuning saw. The last checkpoint is scored, once, on the
test ground.

Started again with the same output folder, the comparison goes on: parts that are finished are not run again, and more
`seeds` add to it. `metrics.json` has every run and the summary.
"""

from pathlib import Path

import yaml

from modeling_vitp.evaluation.arguments import CompareArguments
from modeling_vitp.training.command_line import parse, run


def main(argv: list[str] | None = None) -> int:
    (args,) = parse(argv, __doc__, (CompareArguments,))

    from datasets import load_dataset

    from modeling_vitp.evaluation.experiments import arms_table, check_settings
    from modeling_vitp.recipes.tasks.trees.comparison import RANDOM, Comparison

    output_dir = Path(args.output_dir)
    settings = {name: value for name, value in vars(args).items() if name not in ("output_dir", "seeds")}
    settings |= {"finetuning": yaml.safe_load(Path(args.finetuning).read_text()), "first seed": args.seeds[0]}
    check_settings(output_dir / "settings.json", settings)
    datasets = load_dataset(args.dataset_name)
    metrics = Comparison(args, datasets["train"], datasets["test"]).run()
    print(f"\nIoU of trees on the test ground, mean ± standard deviation over the seeds {args.seeds}\n")
    print(arms_table(metrics["summary"], RANDOM))
    print("\nLearning rates, chosen on held-out training ground:", metrics["learning_rates"])
    print(f"Every run: {output_dir / 'metrics.json'}")
    return 0


if __name__ == "__main__":
    run(main)
