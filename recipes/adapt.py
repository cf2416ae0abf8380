r"""Adapt a ViT to a domain: from labels to a verdict against its start and other backbones, in one command.

    vitp adapt --data my_coco --start facebook/dinov2-base --baselines start random mae --budget 24h \
        --output_dir outputs/my_domain

The command splits the labeled images, makes instructions from the training part, plans to the time and memory of this
machine, pretrains, compares frozen and fine-tuned backbones, and writes the verdict as a page. `--dry_run` stops after
the plan. If the command is started again with the same output folder, it goes on where it was stopped.
"""

import vitp_command
from modeling_vitp.adaptation.arguments import AdaptArguments
from modeling_vitp.training.command_line import parse


def main(argv: list[str] | None = None) -> int:
    (args,) = parse(argv, __doc__, (AdaptArguments,))

    from modeling_vitp.adaptation.adapt import run_adaptation
    from modeling_vitp.adaptation.bundle import bundle_folder

    report = run_adaptation(args)
    if report is not None:
        bundle = bundle_folder(args.output_dir)
        print(f"\n{report.verdict}\n\nReport: {bundle / 'report.html'}")
        print(f"Backbone, models, embeddings and the report: {bundle}")
    return 0


if __name__ == "__main__":
    vitp_command.run(main)
