"""Few labels: parts of the training images, the same for every backbone."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from ..vrl import keyed_generator


@dataclass(frozen=True)
class FewLabels:
    """Number of labels that are used.

    Args:
        shots: images of each class; where an image has several classes, images until each class is in that many.
        share: instead, share of the images in (0, 1]: of each class where an image has one class.

    Raises:
        ValueError: if not exactly one of them is given, or it is out of range.
    """

    shots: int | None = None
    share: float | None = None

    def __post_init__(self):
        if (self.shots is None) == (self.share is None):
            raise ValueError("FewLabels: give either `shots` or `share`.")
        if self.shots is not None and self.shots < 1:
            raise ValueError(f"shots={self.shots} must be at least 1.")
        if self.share is not None and not 0 < self.share <= 1:
            raise ValueError(f"share={self.share} must be above 0 and at most 1.")

    def __str__(self) -> str:
        if self.shots is not None:
            return f"{self.shots} shot{'s' * (self.shots > 1)}"
        return "all labels" if self.share == 1 else f"{100 * self.share:g}% of the labels"

    def draw(self, presence: np.ndarray, seed: int, names: list[str]) -> np.ndarray:
        """
        Args:
            presence: bool of shape `(images, classes)`: which classes an image has.
            seed: with one seed, fewer labels are a part of more labels where an image has one class.
            names: of the classes, for errors.

        Returns:
            The images, int64 in ascending order.

        Raises:
            ValueError: if a class has too few images, by name.
        """
        images = presence.sum(axis=0)
        if self.share == 1:
            return np.arange(len(presence))
        if self.share is not None:
            if (presence.sum(axis=1) > 1).any():
                presence = np.ones((len(presence), 1), dtype=bool)
            else:  # what has none of them is drawn like a class
                presence = np.column_stack([presence, ~presence.any(axis=1)])
            images = presence.sum(axis=0)
            wanted = np.where(images > 0, np.maximum(np.floor(self.share * images + 0.5), 1), 0)
        else:
            wanted = np.full(len(images), self.shots)
            few = [f"{name!r} ({count})" for name, count in zip(names, images) if count < self.shots]
            if few:
                raise ValueError(f"{self}: there are less training images than that of {', '.join(few)}.")
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
    """Return the training images of each draw: one for each seed, or a single one where all are used.

    Args:
        presence, names: see [`FewLabels.draw`].
    """
    few = [FewLabels(shots=number) for number in shots] + [FewLabels(share=share) for share in shares]
    return {
        labels: [labels.draw(presence, seed, names) for seed in (seeds[:1] if labels.share == 1 else seeds)]
        for labels in few or [FewLabels(share=1.0)]
    }
