"""Scores of fine-tuned models on clean images and under twelve corruptions, side by side.

    vitp evaluate_robustness --models outputs/loveda_r_0 outputs/loveda_r_0.75

Each corruption has severities from 1 to 5. All models see the same corrupted images, and masks move with them. What a
model is scored on is by default what its fine-tuning was tested on. Started again with the same output folder, the
evaluation goes on: what is finished is not run again, and more models, corruptions or severities add to it.
"""

from pathlib import Path

import vitp_command
from modeling_vitp.evaluation.arguments import RobustnessArguments
from modeling_vitp.training.command_line import load_plugins, parse


def main(argv: list[str] | None = None) -> int:
    (args,) = parse(argv, __doc__, (RobustnessArguments,))

    from modeling_vitp.evaluation import robustness

    load_plugins(args.plugins)
    metrics = robustness.evaluate_robustness(args)
    output_dir = Path(args.output_dir)
    robustness.draw_robustness(metrics, output_dir / "robustness.png")
    print(f"{metrics['score']} of {metrics['images']} images; of a corruption, the mean over severities\n")
    print(robustness.robustness_table(metrics))
    if len(args.severities) > 1:
        for model in metrics["models"]:
            print(f"\n{robustness.severity_table(model)}")
    print(f"\nAll scores: {output_dir / 'metrics.json'}; plot: {output_dir / 'robustness.png'}")
    return 0


if __name__ == "__main__":
    vitp_command.run(main)
