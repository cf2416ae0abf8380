r"""Probe frozen features of backbones on classes, masks or boxes, and compare them with controls.

    vitp probe --backbones my_backbone facebook/dinov2-base --dataset_name folder_of_classes
    vitp probe --backbones my_backbone facebook/dinov2-base --data loveda \
        --data_root /datasets/LoveDA --test_split val

With `--shard 3/8`, one of eight processes or jobs only extracts its part of the features.

Images with classes are probed by nearest neighbors and a linear layer, images with masks or boxes by a linear layer on
the patches. The backbones are frozen.
"""

import json
from pathlib import Path

import vitp_command
from modeling_vitp.probing.arguments import ProbeArguments
from modeling_vitp.training.command_line import load_plugins, parse


def main(argv: list[str] | None = None) -> int:
    (args,) = parse(argv, __doc__, (ProbeArguments,))

    from modeling_vitp.cards.sections import table
    from modeling_vitp.command.paths import Shard
    from modeling_vitp.evaluation.comparison import probe_table, summarize_draws
    from modeling_vitp.metrics.report import without_nan
    from modeling_vitp.metrics.resampling import paired_difference
    from modeling_vitp.probing.backbones import load_with_controls
    from modeling_vitp.probing.few_labels import draw_labels
    from modeling_vitp.training.checkpointing import check_no_model
    from modeling_vitp.training.config import default_device

    load_plugins(args.plugins)
    check_no_model(args.output_dir)
    output_dir, main_scores = Path(args.output_dir), {}
    args.device = args.device or str(default_device())
    task, features = open_probe(args), output_dir / "features"
    loading = {"batch_size": args.batch_size, "num_workers": args.num_workers}

    def backbones():
        for name in args.backbones:
            yield from load_with_controls(name, args.device, args.dtype, args.random_control, args.pixel_control)

    if args.shard is not None:
        for backbone in backbones():
            for split in ("train", "test"):
                task.features(backbone, split, args.image_size, features, shard=Shard.parse(args.shard), **loading)
        print(f"Shard {args.shard}: {features}. When all shards are finished, run the same command without --shard.")
        return 0
    draws = draw_labels(args.shots, args.shares, args.seeds, task.presence, task.names)
    metrics = {"arguments": vars(args), "classes": task.names, "control": task.control(), "results": []}
    output_dir.mkdir(parents=True, exist_ok=True)
    for backbone in backbones():
        scored = task.probe(backbone, draws, args.image_size, features, **loading)
        for (probe, labels), scores in scored.items():
            entry = {"backbone": backbone.name, "revision": backbone.revision, "probe": probe}
            entry |= {"labels": str(labels), "training_images": [len(used) for used in draws[labels]]}
            entry["scores"] = summarize_draws(scores)
            if args.intervals:
                entry |= {"resampled": [one.main.resampled for one in scores], "cases": scores[0].main.cases}
            metrics["results"].append(entry)
            main_scores.setdefault(backbone.name, {})[f"{probe}, {labels}"] = [one.main for one in scores]
        (output_dir / "metrics.json").write_text(json.dumps(without_nan(metrics), indent=2) + "\n")
    print(probe_table(metrics["results"], metrics["control"], task.shown, task.control_name))
    if args.intervals:
        (first, theirs), *others = main_scores.items()
        rows = [[name, *(str(paired_difference(ours[one], theirs[one])) for one in theirs)] for name, ours in others]
        title = f"{task.shown.replace('_', ' ')}, difference to {first} (95 %)"
        print("\n" + table([title, *theirs], rows))
    print(f"\nAll scores: {output_dir / 'metrics.json'}")
    return 0


def open_probe(args: ProbeArguments):
    """Return the task of the probe: classes, masks or boxes, with their train and test images."""
    from modeling_vitp.probing.classification import ClassificationProbe, open_samples
    from modeling_vitp.probing.detection import DetectionProbe
    from modeling_vitp.probing.segmentation import SegmentationProbe
    from modeling_vitp.tasks.classification.data import ClassificationData
    from modeling_vitp.tasks.detection.data import DetectionData
    from modeling_vitp.tasks.segmentation.data import DenseData

    settings = args.pooling, args.num_neighbours, args.temperature, args.l2, args.intervals
    if args.data is not None and args.annotations == "classes":
        data = ClassificationData.from_dict(args.data)
        if data.multi_label:
            raise ValueError("Probes need one class for each image, but `data` has multi_label: true.")
        if args.train_split == args.test_split:
            raise ValueError(f"train_split and test_split must differ, got {args.train_split!r}.")
        names = data.find_classes([args.train_split])
        data.check_disjoint([args.train_split, args.test_split])
        samples = {"train": data.open([args.train_split]), "test": data.open([args.test_split])}
        return ClassificationProbe(samples, names, data.input_spec, *settings)
    if args.data is not None:
        task, data = (DetectionProbe, DetectionData) if args.annotations == "boxes" else (SegmentationProbe, DenseData)
        splits = {"train": args.train_split, "test": args.test_split}
        return task(data.from_dict(data.complete(args.data)), splits, args.l2, args.depths, args.intervals)
    columns = args.image_column, args.label_column
    samples = open_samples(
        args.dataset_name, args.dataset_config, args.train_split, args.test_split, args.test_share, *columns
    )
    return ClassificationProbe(*samples, args.input_spec, *settings)


if __name__ == "__main__":
    vitp_command.run(main)
