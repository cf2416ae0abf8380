"""Score pretrained vision-language models on the questions of a data set, with a blind control.

    vitp evaluate_vlm --models outputs/my_run --dataset_name my_rows --split test

Boxes are scored by IoU, choices, maps and short answers by accuracy, captions by BLEU, ROUGE-L and CIDEr. The blind
control asks the same questions about other images: its scores do not depend on the image of the question.
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
    print(f"{number} questions about {metrics['images']} images; {metrics['not_scored']} answers cannot be scored\n")
    print(vlm.answers_table(metrics))
    output_dir = Path(args.output_dir)
    print(f"\nAll scores: {output_dir / 'metrics.json'}; answers and pictures: {output_dir}/answers_*")
    return 0


if __name__ == "__main__":
    vitp_command.run(main)
