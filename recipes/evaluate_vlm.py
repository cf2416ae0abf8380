"""Scores of pretrained vision-language models on questions of rows, beside the same questions about other images.

    vitp evaluate_vlm --models outputs/my_run --dataset_name my_rows --split test

Boxes are scored by their IoU, choices, maps and short answers by their accuracy, captions by BLEU, ROUGE-L and CIDEr.
What a model says of other images is its own blind control: what it scores there, it scores without looking.
"""

from pathlib import Path

import vitp_command
from modeling_vitp.evaluation.arguments import VLMArguments
from modeling_vitp.training.command_line import parse


def main(argv: list[str] | None = None) -> int:
    (args,) = parse(argv, __doc__, (VLMArguments,))

    from modeling_vitp.evaluation import vlm

    metrics = vlm.evaluate_vlm(args)
    number = sum(metrics["questions"].values())
    print(f"{number} questions about {metrics['images']} images; {metrics['not_scored']} answers are of no kind\n")
    print(vlm.answers_table(metrics))
    output_dir = Path(args.output_dir)
    print(f"\nAll scores: {output_dir / 'metrics.json'}; answers and pictures: {output_dir}/answers_*")
    return 0


if __name__ == "__main__":
    vitp_command.run(main)
