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
        if self.shots == 1:
            return "1 shot"
        if self.shots is not None:
            return f"{self.shots} shots"
        if self.share == 1:
            return "all labels"
        return f"{100 * self.share:g}% of the labels"

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
        if self.share == 1:
            return np.arange(len(presence))
        if self.share is not None:
            presence = groups_of(presence)
            sizes = presence.sum(axis=0)
            rounded_shares = np.floor(self.share * sizes + 0.5)
            most_images = np.where(sizes > 0, np.maximum(rounded_shares, 1), 0)
        else:
            self.check_sizes(presence, names)
            most_images = np.full(presence.shape[1], self.shots)
        drawn_indices = []
        drawn_images = np.zeros(presence.shape[1], dtype=int)
        order = torch.randperm(len(presence), generator=keyed_generator(seed, "few labels"))
        for index in order.numpy():
            is_incomplete = drawn_images < most_images
            if (presence[index] & is_incomplete).any():
                drawn_indices.append(index)
                drawn_images += presence[index]
        return np.sort(np.array(drawn_indices, dtype=np.int64))

    def check_sizes(self, presence: np.ndarray, names: list[str]) -> None:
        """Raise a `ValueError` that names the classes with fewer images than `shots`."""
        small_classes = []
        for name, size in zip(names, presence.sum(axis=0)):
            if size < self.shots:
                small_classes.append(f"{name!r} ({size})")
        if small_classes:
            raise ValueError(
                f"Expected at least {self.shots} training images of each class, got {', '.join(small_classes)}."
            )


def groups_of(presence: np.ndarray) -> np.ndarray:
    """Return the groups that a share is drawn from, bool `(images, groups)`, each image in one of them.

    The groups are the classes, and one of the images without a class; or all images if one has several classes.
    """
    has_several_classes = presence.sum(axis=1) > 1
    if has_several_classes.any():
        return np.ones((len(presence), 1), dtype=bool)
    has_no_class = ~presence.any(axis=1)
    return np.column_stack([presence, has_no_class])


def draw_labels(
    shots: Sequence[int],
    shares: Sequence[float],
    seeds: Sequence[int],
    presence: np.ndarray,
    names: list[str],
) -> dict[FewLabels, list[np.ndarray]]:
    """Return the training images of each draw: one draw per seed, or a single one if all images are used.

    Args:
        shots, shares: numbers of labels, see [`FewLabels`].
        seeds: seeds of the draws.
        presence, names: see [`FewLabels.draw`].
    """
    numbers_of_labels = [FewLabels(shots=number) for number in shots]
    numbers_of_labels += [FewLabels(share=share) for share in shares]
    draws = {}
    for labels in numbers_of_labels or [FewLabels(share=1.0)]:
        different_seeds = seeds[:1] if labels.share == 1 else seeds
        draws[labels] = [labels.draw(presence, seed, names) for seed in different_seeds]
    return draws
