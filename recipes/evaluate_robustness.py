"""Score fine-tuned models on clean images and under twelve corruptions, and compare them.

    vitp evaluate_robustness --models outputs/loveda_r_0 outputs/loveda_r_0.75

Each corruption has severities from 1 to 5. All models receive the same corrupted images; geometric corruptions also
move masks and boxes. By default, a model is scored on the test split of its fine-tuning. If the command is started
again with the same output folder, finished evaluations are read from it. Name all models, corruptions and severities
again, because the results are written anew.
"""

from pathlib import Path

import vitp_command
from modeling_vitp.tasks.robustness_arguments import RobustnessArguments
from modeling_vitp.training.command_line import load_plugins, parse


def main(argv: list[str] | None = None) -> int:
    (args,) = parse(argv, __doc__, (RobustnessArguments,))

    from modeling_vitp.evaluation import robustness

    load_plugins(args.plugins)
    metrics = robustness.evaluate_robustness(args)
    output_dir = Path(args.output_dir)
    robustness.draw_robustness(metrics, output_dir / "robustness.png")
    print(f"{metrics['score']} on {metrics['images']} images; for each corruption, the mean over severities\n")
    print(robustness.robustness_table(metrics))
    if len(args.severities) > 1:
        for model in metrics["models"]:
            print(f"\n{robustness.severity_table(model)}")
    print(f"\nAll scores: {output_dir / 'metrics.json'}; plot: {output_dir / 'robustness.png'}")
    return 0


if __name__ == "__main__":
    vitp_command.run(main)
