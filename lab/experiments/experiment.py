"""Run an experiment on pretraining: several arms over several seeds, compared with a control of the same seed.

    python -m lab.experiments.experiment --config experiment_passenger

A configuration is the plan: the claim, the result that would contradict it, the arms with the settings that differ from
the pretraining `base`, and the compared measures. A second start with the same output folder continues the experiment;
more `seeds` extend it. Several processes, such as one for each GPU, may run the same experiment and share its runs.
"""

from pathlib import Path

from lab.command import run, with_config
from lab.experiments.arguments import ExperimentArguments
from modeling_vitp.command.paths import read_yaml
from modeling_vitp.training.command_line import parse


def main(argv: list[str] | None = None) -> int:
    (args,) = parse(with_config(argv), __doc__, (ExperimentArguments,))

    base = read_yaml(args.base)
    if args.needs_task and (base.get("task") != "trees" or "dataset_name" not in base):
        raise ValueError(
            f"Expected task and dataset_name in the base {args.base!r} for objective, label_share, without_scenes, "
            "held_out_scene, probe_label_shares, corruption_severities or probe_color_jitter. To compare backbones on "
            "labels of any task instead, set finetuning: {data: FOLDER, steps: 1000, learning_rates: [1.0e-4]}."
        )

    from accelerate import PartialState

    from lab.experiments.variants import Experiment, draw_arms, paired_table, plan_of
    from modeling_vitp.evaluation.comparison import check_same_settings

    if PartialState().num_processes > 1:
        raise ValueError("Expected one process. Start the experiment without a launcher, once for each GPU.")
    output_dir, task = Path(args.output_dir), None
    if args.needs_task:
        from lab.trees.downstream import Downstream

        task = Downstream(args)
    check_same_settings(output_dir / "plan.json", plan_of(args))
    metrics = Experiment(args, task).run()
    draw_arms(metrics["summary"], output_dir / "arms.png")
    print(f"\n{args.claim}\nContradicted by: {args.against}\n")
    seeds = metrics["summary"][0]["seeds"]
    print(f"Mean and 95% interval over the seeds {seeds}; differences are paired by seed\n")
    print(paired_table(metrics["summary"], args.control))
    print(f"\nEvery run: {output_dir / 'metrics.json'}; picture: {output_dir / 'arms.png'}")
    return 0


if __name__ == "__main__":
    run(main)
