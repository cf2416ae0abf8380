"""What can be read from the features of one or several backbones: parse, data, probe, print.

    python recipes/probe.py --backbones my_backbone facebook/dinov2-base --dataset_name folder_of_classes
    python recipes/probe.py --backbones my_backbone facebook/dinov2-base --data recipes/configs/loveda.yaml \
        --data_root /datasets/LoveDA --test_split val

Images with classes are probed by nearest neighbours and a linear layer, images with masks by a linear layer on the
patches. Nothing of a backbone is trained.
"""

import json
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from trl import TrlParser

from modeling_vitp.dense.data import DenseData
from modeling_vitp.probing.backbones import POOLINGS, load_backbone
from modeling_vitp.probing.classification import Classification
from modeling_vitp.probing.few_labels import Labels
from modeling_vitp.probing.segmentation import Segmentation


@dataclass
class ProbeArguments:
    backbones: list[str] = field(
        default_factory=list,
        metadata={"help": "Folders or Hub ids: exported backbones, or others that AutoModel opens; ID@REVISION too."},
    )
    random_control: bool = field(
        default=False, metadata={"help": "Probe each backbone with random weights too, to compare with."}
    )
    dataset_name: str | None = field(
        default=None, metadata={"help": "Images with a class each: Hub id, or folder with images as split/class/file."}
    )
    dataset_config: str | None = field(default=None, metadata={"help": "Its configuration, if it has several."})
    image_column: str = field(default="image", metadata={"help": "Its column of images."})
    label_column: str = field(default="label", metadata={"help": "Its column of classes."})
    test_share: float | None = field(
        default=None, metadata={"help": "If it has no test split: share of each class that is held out of training."}
    )
    input_spec: dict | str | None = field(
        default=None, metadata={"help": "How its images that are not 8-bit RGB are read, for all backbones."}
    )
    data: dict | str | None = field(
        default=None,
        metadata={"help": "Instead, images with masks: as in fine-tuning, or the file of such a configuration."},
    )
    data_root: str | None = field(default=None, metadata={"help": "Where they are, instead of data.root."})
    train_split: str = field(default="train", metadata={"help": "What the probes learn from."})
    test_split: str = field(default="test", metadata={"help": "What they are scored on."})
    shots: list[int] = field(default_factory=list, metadata={"help": "Few labels: training images of each class."})
    shares: list[float] = field(
        default_factory=list, metadata={"help": "Few labels: shares of the training images. 1 without these two."}
    )
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2], metadata={"help": "Of the draws of few labels."})
    pooling: str = field(default="mean", metadata={"help": f"Feature of an image: one of {', '.join(POOLINGS)}."})
    image_size: int | None = field(
        default=None, metadata={"help": "Side of the square that images become; else as the image processor says."}
    )
    num_neighbours: int = field(default=20, metadata={"help": "Of the nearest-neighbour probe."})
    temperature: float = field(default=0.07, metadata={"help": "Of its votes."})
    l2: float = field(default=1e-2, metadata={"help": "Weight decay of the linear probe, on standardised features."})
    output_dir: str = field(default="outputs/probe", metadata={"help": "For metrics.json and the features."})
    batch_size: int = field(default=32, metadata={"help": "Images that a backbone sees at once."})
    num_workers: int = field(default=0, metadata={"help": "Processes that read images."})
    dtype: str = field(default="float32", metadata={"help": "Of the backbones: float32, bfloat16 or float16."})
    device: str | None = field(default=None, metadata={"help": "The accelerator if there is one, and if not given."})

    def __post_init__(self):
        for name in ("data", "input_spec"):
            value = getattr(self, name)
            if isinstance(value, str):
                if value.endswith((".yaml", ".yml")):
                    setattr(self, name, yaml.safe_load(Path(value).read_text())[name])
                else:
                    setattr(self, name, json.loads(value))
        if not self.backbones:
            raise ValueError("Give `backbones`: what is probed.")
        if (self.dataset_name is None) == (self.data is None):
            raise ValueError("Give either `dataset_name`, images with a class each, or `data`, images with masks.")
        if self.data is not None and self.data_root is not None:
            self.data["root"] = self.data_root
        if self.pooling not in POOLINGS:
            raise ValueError(f"pooling={self.pooling!r} is none of {', '.join(POOLINGS)}.")
        if self.device is None:
            self.device = str(torch.accelerator.current_accelerator() or "cpu")

    @property
    def labels(self) -> list[Labels]:
        few = [Labels(shots=shots) for shots in self.shots] + [Labels(share=share) for share in self.shares]
        return few or [Labels(share=1.0)]


def open_task(args: ProbeArguments) -> Classification | Segmentation:
    if args.data is not None:
        data = DenseData.from_dict(args.data)
        return Segmentation(data, {"train": args.train_split, "test": args.test_split}, args.l2)
    splits = {name: getattr(args, name) for name in ("train_split", "test_split", "test_share", "label_column")}
    names = "image_column input_spec pooling num_neighbours temperature l2".split()
    settings = {name: getattr(args, name) for name in names}
    return Classification.open(args.dataset_name, args.dataset_config, splits, **settings)


def draw_labels(args: ProbeArguments, task: Classification | Segmentation) -> dict[Labels, list[np.ndarray]]:
    """The training images of each draw: one for each seed, or a single one where all are used."""
    draws = {}
    for labels in args.labels:
        seeds = args.seeds[:1] if labels.share == 1 else args.seeds
        draws[labels] = [labels.draw(task.presence, seed, task.names) for seed in seeds]
    return draws


def summarise(scores: Sequence[dict[str, float]]) -> dict[str, dict]:
    """Of each score the mean over the draws, its spread (the sample standard deviation), and the values."""
    summary = {}
    for name in scores[0]:
        values = np.array([score[name] for score in scores])
        spread = values.std(ddof=1) if len(values) > 1 else None
        summary[name] = {"mean": values.mean(), "spread": spread, "values": values.tolist()}
    return summary


def without_nan(value: Any) -> Any:
    """JSON has no NaN: what could not be scored, a class that never occurs, is null."""
    if isinstance(value, dict):
        return {key: without_nan(item) for key, item in value.items()}
    if isinstance(value, list):
        return [without_nan(item) for item in value]
    return None if isinstance(value, float) and math.isnan(value) else value


def table(results: Sequence[dict], control: dict[str, float], score: str) -> str:
    """Markdown with a row for each backbone, a column for each probe and number of labels."""
    columns = list(dict.fromkeys(f"{item['probe']}, {item['labels']}" for item in results))
    cells = {}
    for item in results:
        mean, spread = item["scores"][score]["mean"], item["scores"][score]["spread"]
        cell = f"{mean:.3f}" + (f" ± {spread:.3f}" if spread is not None else "")
        cells.setdefault(item["backbone"], {})[f"{item['probe']}, {item['labels']}"] = cell
    rows = [[name, *(row[column] for column in columns)] for name, row in cells.items()]
    rows.append(["largest class, whatever the image", *[f"{control[score]:.3f}"] * len(columns)])
    lines = [[score.replace("_", " "), *columns], ["---"] * (len(columns) + 1), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


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
