"""Classes of images, by nearest neighbours and by a linear layer."""

from dataclasses import dataclass
from pathlib import Path

import datasets
import numpy as np
import torch

from .backbones import Backbone
from .features import extract
from .few_labels import Labels
from .heads import fit_linear, nearest_neighbours
from .labelled_images import LabelledImages, open_splits


@dataclass
class Classification:
    """
    Args:
        rows, labels, names: see [`~modeling_vitp.probing.labelled_images.open_splits`].
        where: the data set, for errors.
        image_column: name of the column of images.
        input_spec: for all backbones; without it each reads images by its own.
        pooling: the feature of an image: `mean` (of the patch tokens), `cls`, or both, `cls_mean`.
        num_neighbours, temperature: see [`~modeling_vitp.probing.heads.nearest_neighbours`].
        l2: see [`~modeling_vitp.probing.heads.fit_linear`].
    """

    rows: dict[str, datasets.Dataset]
    labels: dict[str, np.ndarray]
    names: list[str]
    where: str
    image_column: str
    input_spec: dict | None
    pooling: str
    num_neighbours: int
    temperature: float
    l2: float

    shown = "accuracy"  # of the scores
    control_name = "largest class, whatever the image"

    @classmethod
    def open(cls, name: str, config: str | None, splits: dict, **settings) -> "Classification":
        opened = open_splits(name, config, image_column=settings["image_column"], **splits)
        return cls(*opened, name, **settings)

    @property
    def presence(self) -> np.ndarray:
        return np.eye(len(self.names), dtype=bool)[self.labels["train"]]

    def control(self) -> dict[str, float]:
        """Of always answering the class that is most frequent in training."""
        return self.scores(np.full(len(self.labels["test"]), np.bincount(self.labels["train"]).argmax()))

    def scores(self, predicted: np.ndarray) -> dict[str, float]:
        """`accuracy`, and `mean_class_accuracy` over the classes that the test has."""
        right = predicted == self.labels["test"]
        classes = [right[self.labels["test"] == label].mean() for label in np.unique(self.labels["test"])]
        return {"accuracy": float(right.mean()), "mean_class_accuracy": float(np.mean(classes))}

    def probe(
        self, backbone: Backbone, draws: dict[Labels, list[np.ndarray]], image_size: int | None, folder: Path, **loading
    ) -> dict[tuple[str, Labels], list[dict[str, float]]]:
        """The scores of each draw of training images, by probe and labels."""
        train, test = (self.features(backbone, split, image_size, folder, **loading) for split in ("train", "test"))
        one_hot, device = self.presence.astype(np.float32), backbone.model.device
        results = {}
        for labels, subsets in draws.items():
            for used in subsets:
                known = (train[used], self.labels["train"][used])
                settings = (len(self.names), self.num_neighbours, self.temperature, device)
                neighbours = nearest_neighbours(*known, test, *settings)
                linear = fit_linear(train, one_hot, used, self.l2, device)(torch.tensor(test)).argmax(-1).cpu().numpy()
                for probe, predicted in ((f"{self.num_neighbours}-NN", neighbours), ("linear", linear)):
                    results.setdefault((probe, labels), []).append(self.scores(predicted))
        return results

    def features(self, backbone: Backbone, split: str, image_size: int | None, folder: Path, **loading) -> np.ndarray:
        """Those of all images of a split, `train` or `test`: float32 of shape `(images, width)`."""
        rows, spec = self.rows[split], backbone.reading(self.input_spec)
        return extract(
            backbone,
            LabelledImages(rows, f"{self.where}, {split}", self.image_column, spec),
            lambda pixels: backbone.pool(pixels, self.pooling),
            image_size,
            f"{rows._fingerprint} {self.image_column} {spec} {self.pooling}",
            folder,
            description=f"{backbone.name}, {split}",
            **loading,
        )
