"""Random subsets of the training images for few-label probes, the same for all backbones."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from ..vrl import keyed_generator


@dataclass(frozen=True)
class FewLabels:
    """Number of training labels, either as `shots` or as `share`.

    Args:
        shots: number of images per class. If images have several classes, images are drawn until each class occurs in
            this many.
        share: share of the images in (0, 1], applied to each class if each image has one class.
    """

    shots: int | None = None
    share: float | None = None

    def __str__(self) -> str:
        if self.shots is not None:
            return f"{self.shots} shot{'s' * (self.shots > 1)}"
        return "all labels" if self.share == 1 else f"{100 * self.share:g}% of the labels"

    def draw(self, presence: np.ndarray, seed: int, names: list[str]) -> np.ndarray:
        """Draw training images.

        Args:
            presence: classes of each image, bool `(images, classes)`.
            seed: seed of the draw. With the same seed, a smaller draw is a subset of a larger one if each image has one
                class.
            names: names of the classes, for error messages.

        Returns:
            Indices of the images, int64 in ascending order.

        Raises:
            ValueError: If a class has too few images; the message names it.
        """
        images = presence.sum(axis=0)
        if self.share == 1:
            return np.arange(len(presence))
        if self.share is not None:
            if (presence.sum(axis=1) > 1).any():
                presence = np.ones((len(presence), 1), dtype=bool)
            else:  # Images without a class are drawn like a class.
                presence = np.column_stack([presence, ~presence.any(axis=1)])
            images = presence.sum(axis=0)
            wanted = np.where(images > 0, np.maximum(np.floor(self.share * images + 0.5), 1), 0)
        else:
            wanted = np.full(len(images), self.shots)
            few = [f"{name!r} ({count})" for name, count in zip(names, images) if count < self.shots]
            if few:
                raise ValueError(f"Expected at least {self.shots} training images of each class, got {', '.join(few)}.")
        chosen, have = [], np.zeros(len(images), dtype=int)
        order = torch.randperm(len(presence), generator=keyed_generator(seed, "few labels")).numpy()
        for index in order:
            if (presence[index] & (have < wanted)).any():
                chosen.append(index)
                have += presence[index]
        return np.sort(np.array(chosen, dtype=np.int64))


def draw_labels(
    shots: Sequence[int], shares: Sequence[float], seeds: Sequence[int], presence: np.ndarray, names: list[str]
) -> dict[FewLabels, list[np.ndarray]]:
    """Return the training images of each draw: one draw per seed, or a single one if all images are used.

    Args:
        shots, shares: numbers of labels, see [`FewLabels`].
        seeds: seeds of the draws.
        presence, names: see [`FewLabels.draw`].
    """
    few = [FewLabels(shots=number) for number in shots] + [FewLabels(share=share) for share in shares]
    return {
        labels: [labels.draw(presence, seed, names) for seed in (seeds[:1] if labels.share == 1 else seeds)]
        for labels in few or [FewLabels(share=1.0)]
    }
