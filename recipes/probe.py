"""What can be read from the features of one or several backbones: parse, data, probe, print.

    python recipes/probe.py --backbones my_backbone facebook/dinov2-base --dataset_name folder_of_classes
    python recipes/probe.py --backbones my_backbone facebook/dinov2-base --data recipes/configs/loveda.yaml \
        --data_root /datasets/LoveDA --test_split val

Images with classes are probed by nearest neighbours and a linear layer, images with masks by a linear layer on the
patches. Nothing of a backbone is trained.
"""

import json
import sys
from pathlib import Path

from trl import TrlParser

from modeling_vitp.evaluation.experiments import summarise, table
from modeling_vitp.metrics.report import without_nan
from modeling_vitp.probing.arguments import ProbeArguments
from modeling_vitp.probing.backbones import load_backbone
from modeling_vitp.probing.draws import draw_labels, open_task


def main(argv: list[str] | None = None) -> int:
    (args,) = TrlParser((ProbeArguments,)).parse_args_and_config(argv)
    output_dir = Path(args.output_dir)
    task = open_task(args)
    draws = draw_labels(args, task)
    metrics = {"arguments": vars(args), "classes": task.names, "control": task.control(), "results": []}
    output_dir.mkdir(parents=True, exist_ok=True)
    loading = {"batch_size": args.batch_size, "num_workers": args.num_workers}
    for name in args.backbones:
        for random_seed in (None, 0) if args.random_control else (None,):
            backbone = load_backbone(name, args.device, args.dtype, random_seed)
            scored = task.probe(backbone, draws, args.image_size, output_dir / "features", **loading)
            for (probe, labels), scores in scored.items():
                entry = {"backbone": backbone.name, "revision": backbone.revision, "probe": probe}
                entry |= {"labels": str(labels), "training_images": [len(used) for used in draws[labels]]}
                metrics["results"].append(entry | {"scores": summarise(scores)})
            (output_dir / "metrics.json").write_text(json.dumps(without_nan(metrics), indent=2) + "\n")
    print(table(metrics["results"], metrics["control"], task.score))
    print(f"\nAll scores: {output_dir / 'metrics.json'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
