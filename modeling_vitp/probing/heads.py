"""Heads of the probes: nearest neighbors, a linear layer, and a small nonlinear network."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

ROWS_AT_ONCE = 65536
HIDDEN_SIZE, BATCH_SIZE = 64, 512  # Of the nonlinear probe.
KEPT_BYTES = 2**30  # Features up to this size are read and standardized once for all iterations of L-BFGS.


def nearest_neighbours(
    features: np.ndarray,
    labels: np.ndarray,
    queries: np.ndarray,
    num_classes: int,
    num_neighbours: int = 20,
    temperature: float = 0.07,
    device: str | torch.device = "cpu",
) -> np.ndarray:
    """Predict classes by weighted votes of the nearest neighbors, as in DINO (arXiv 2104.14294).

    Neighbors have the highest cosine similarity s, and the weight of a vote is exp(s / temperature).

    Args:
        features: features of the training images, float32 `(images, width)`.
        labels: classes of the training images, integers `(images,)`.
        queries: features of the test images, `(queries, width)`.
        num_classes: number of classes.
        num_neighbours: number of neighbors, limited to the number of training images.
        temperature: temperature of the votes.
        device: device of the computation.

    Returns:
        Predicted classes, int64 `(queries,)`.
    """
    known = F.normalize(torch.tensor(features, device=device), dim=-1)
    votes = F.one_hot(torch.tensor(labels, device=device), num_classes).float()
    predicted = []
    for part in torch.tensor(queries).split(1024):
        similarity = F.normalize(part.to(device), dim=-1) @ known.T
        nearest, indices = similarity.topk(min(num_neighbours, len(known)), dim=-1)
        weights = torch.softmax(nearest / temperature, dim=-1)
        predicted.append((weights[..., None] * votes[indices]).sum(1).argmax(-1))
    return torch.cat(predicted).cpu().numpy()


@dataclass(eq=False)
class LinearProbe:
    """Linear layer on features, which are standardized with the statistics of the training features.

    Args:
        weight, bias: parameters, `(classes, width)` and `(classes,)`.
        mean, std: statistics of the training features, `(width,)`.
    """

    weight: torch.Tensor
    bias: torch.Tensor
    mean: torch.Tensor
    std: torch.Tensor

    def __call__(self, features: torch.Tensor) -> torch.Tensor:
        """Return logits, float32 `(…, classes)`, of features `(…, width)`."""
        return F.linear((features.to(self.weight.device) - self.mean) / self.std, self.weight, self.bias)


def fit_linear(
    features: np.ndarray,
    counts: np.ndarray,
    used: np.ndarray,
    l2: float = 1e-2,
    device: str | torch.device = "cpu",
    max_iterations: int = 500,
) -> LinearProbe:
    """Fit a multinomial logistic regression on standardized features with L-BFGS.

    The loss is the mean cross-entropy plus l2 / 2 · |W|²; the bias is not regularized. With one label per row, this
    equals `LogisticRegression` of scikit-learn with C = 1 / (rows · l2), or twice this value for two classes. The
    problem is convex, so the solution is unique.

    Args:
        features: float32 `(rows, …, width)`; may be a memory-mapped file, which is read in parts.
        counts: number of labels of each class, `(rows, …, classes)`: a one-hot class of an image, or the number of
            pixels of each class in a patch. Positions without labels are ignored.
        used: indices of the rows to fit to.
        l2: weight decay.
        device: device of the computation.
        max_iterations: maximum number of iterations of L-BFGS.

    Raises:
        ValueError: If there are no labels.
    """
    width, num_classes = features.shape[-1], counts.shape[-1]
    batches = labeled_positions(features, counts, used, device)
    mean, std, total = standardization(batches, width, device)

    def standardized() -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        return (((rows - mean) / std, targets) for rows, targets in batches())

    kept = list(standardized()) if features[used[:1]].nbytes * len(used) <= KEPT_BYTES else None
    weight = torch.zeros(num_classes, width, device=device, requires_grad=True)
    bias = torch.zeros(num_classes, device=device, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [weight, bias],
        max_iter=max_iterations,
        max_eval=2 * max_iterations,
        history_size=20,
        tolerance_grad=1e-6,
        tolerance_change=1e-9,
        line_search_fn="strong_wolfe",
    )

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = l2 / 2 * weight.square().sum()
        loss.backward()
        loss = loss.detach()
        for rows, targets in kept or standardized():
            logits = F.linear(rows, weight, bias)
            part = -(targets * logits.log_softmax(-1)).sum() / total
            part.backward()
            loss = loss + part.detach()
        return loss

    optimizer.step(closure)
    return LinearProbe(weight.detach(), bias.detach(), mean, std)


class NonlinearProbe(nn.Module):
    """Network with one hidden layer on features, which are standardized with the statistics of the training features.

    Args:
        mean, std: statistics of the training features, `(width,)`.
        num_classes: number of classes.
    """

    def __init__(self, mean: torch.Tensor, std: torch.Tensor, num_classes: int):
        super().__init__()
        self.register_buffer("mean", mean)
        self.register_buffer("std", std)
        self.layers = nn.Sequential(
            nn.Linear(len(mean), HIDDEN_SIZE), nn.GELU(), nn.Dropout(0.2), nn.Linear(HIDDEN_SIZE, num_classes)
        )

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """Return logits, float32 `(…, classes)`, of features `(…, width)`."""
        return self.layers((features.to(self.mean.device) - self.mean) / self.std)


def fit_nonlinear(
    features: np.ndarray,
    counts: np.ndarray,
    used: np.ndarray,
    seed: int = 0,
    device: str | torch.device = "cpu",
    steps: int = 500,
) -> NonlinearProbe:
    """Fit a [`NonlinearProbe`] on random positions with AdamW (cosine decay from 1e-3, weight decay 0.05).

    All backbones have the same training budget, and no model selection takes place. Weights and batches are drawn on
    the CPU, and dropout on the device, so that scores differ a little between devices.

    Args:
        features, counts, used: see [`fit_linear`].
        seed: seed of the weights, the batches and dropout.
        device: device of the computation.
        steps: number of training steps, each on `BATCH_SIZE` positions.
    """
    width, num_classes = features.shape[-1], counts.shape[-1]
    mean, std, _ = standardization(labeled_positions(features, counts, used, device), width, device)
    labeled = np.argwhere(counts.any(-1)[used]).T  # Indices of each labeled position in `features`.
    labeled[0] = used[labeled[0]]
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        probe = NonlinearProbe(mean.cpu(), std.cpu(), num_classes).to(device)
        optimizer = torch.optim.AdamW(probe.parameters(), lr=1e-3, weight_decay=0.05)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        for _ in range(steps):
            chosen = tuple(labeled[:, torch.randint(labeled.shape[1], (BATCH_SIZE,)).numpy()])
            targets = torch.from_numpy(counts[chosen]).float().to(device)
            logits = probe(torch.from_numpy(features[chosen]).to(device))
            loss = -(targets * logits.log_softmax(-1)).sum() / targets.sum()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return probe.eval().requires_grad_(False)


def labeled_positions(
    features: np.ndarray, counts: np.ndarray, used: np.ndarray, device: str | torch.device
) -> Callable[[], Iterator[tuple[torch.Tensor, torch.Tensor]]]:
    """Return a function that iterates over the labeled positions, in parts.

    Returns:
        Function that yields features, float32 `(positions, width)`, and counts, float32 `(positions, classes)`.
    """
    width, num_classes = features.shape[-1], counts.shape[-1]
    positions = int(np.prod(features.shape[1:-1], dtype=int))
    parts = np.array_split(used, max(-(-len(used) * positions // ROWS_AT_ONCE), 1))

    def load(part: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        rows = torch.from_numpy(np.asarray(features[part])).reshape(-1, width)
        targets = torch.from_numpy(counts[part]).float().reshape(-1, num_classes)
        labeled = targets.sum(1) > 0
        return rows[labeled].to(device), targets[labeled].to(device)

    return lambda: map(load, parts)


def standardization(
    batches: Callable[[], Iterator[tuple[torch.Tensor, torch.Tensor]]], width: int, device: str | torch.device
) -> tuple[torch.Tensor, torch.Tensor, float]:
    """Return mean and standard deviation of each feature, with 1 for constant features, and the sum of all counts."""
    number, total = 0, 0.0
    mean = torch.zeros(width, device=device)
    for rows, targets in batches():
        number, total = number + len(rows), total + targets.sum().item()
        mean += rows.sum(0)
    if not number:
        raise ValueError("No labels found in the training images.")
    mean /= number
    variance = torch.zeros(width, device=device)
    for rows, _ in batches():
        variance += (rows - mean).square().sum(0)
    std = (variance / number).sqrt()
    return mean, torch.where(std > 1e-6 * mean.abs().clamp(min=1e-6), std, torch.ones_like(std)), total
