"""What can be read from the features of backbones: probes on classes, masks or boxes, beside controls.

    vitp probe --backbones my_backbone facebook/dinov2-base --dataset_name folder_of_classes
    vitp probe --backbones my_backbone facebook/dinov2-base --data loveda \
        --data_root /datasets/LoveDA --test_split val

Images with classes are probed by nearest neighbours and a linear layer, images with masks or boxes by a linear layer on
the patches. Nothing of a backbone is trained.
"""

import json
from pathlib import Path

from modeling_vitp.probing.arguments import ProbeArguments
from modeling_vitp.training.command_line import parse, run


def main(argv: list[str] | None = None) -> int:
    (args,) = parse(argv, __doc__, (ProbeArguments,))

    import torch

    from modeling_vitp.evaluation.experiments import probe_table, summarise
    from modeling_vitp.metrics.report import without_nan
    from modeling_vitp.probing.backbones import load_with_controls
    from modeling_vitp.probing.draws import draw_labels, open_task

    output_dir = Path(args.output_dir)
    args.device = args.device or str(torch.accelerator.current_accelerator() or "cpu")
    task = open_task(args)
    draws = draw_labels(args, task)
    metrics = {"arguments": vars(args), "classes": task.names, "control": task.control(), "results": []}
    output_dir.mkdir(parents=True, exist_ok=True)
    loading = {"batch_size": args.batch_size, "num_workers": args.num_workers}
    for name in args.backbones:
        for backbone in load_with_controls(name, args.device, args.dtype, args.random_control, args.pixel_control):
            scored = task.probe(backbone, draws, args.image_size, output_dir / "features", **loading)
            for (probe, labels), scores in scored.items():
                entry = {"backbone": backbone.name, "revision": backbone.revision, "probe": probe}
                entry |= {"labels": str(labels), "training_images": [len(used) for used in draws[labels]]}
                metrics["results"].append(entry | {"scores": summarise(scores)})
            (output_dir / "metrics.json").write_text(json.dumps(without_nan(metrics), indent=2) + "\n")
    print(probe_table(metrics["results"], metrics["control"], task.shown, task.control_name))
    print(f"\nAll scores: {output_dir / 'metrics.json'}")
    return 0


if __name__ == "__main__":
    run(main)
