"""Heads of the probes: nearest neighbors, a linear layer, and a small nonlinear network."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

ROWS_AT_ONCE = 65536
# Of the nonlinear probe.
HIDDEN_SIZE = 64
BATCH_SIZE = 512
MOST_BYTES_IN_MEMORY = 2**30  # Features up to this size are read and standardized once for all iterations of L-BFGS.
Batch = tuple[torch.Tensor, torch.Tensor]  # Features and counts of some positions.


def nearest_neighbours(
    features: np.ndarray,
    presence: np.ndarray,
    queries: np.ndarray,
    num_neighbours: int = 20,
    temperature: float = 0.07,
    device: str | torch.device = "cpu",
) -> np.ndarray:
    """Score classes by weighted votes of the nearest neighbors, as in DINO (arXiv 2104.14294).

    Neighbors have the highest cosine similarity s, and the weight of a vote is exp(s / temperature).

    Args:
        features: features of the training images, float32 `(images, width)`.
        presence: classes of the training images, bool `(images, classes)`.
        queries: features of the test images, `(queries, width)`.
        num_neighbours: number of neighbors, limited to the number of training images.
        temperature: temperature of the votes.
        device: device of the computation.

    Returns:
        Share of the votes of each class, float32 `(queries, classes)`.
    """
    neighbours = F.normalize(torch.tensor(features, device=device), dim=-1)
    num_neighbours = min(num_neighbours, len(neighbours))
    classes = torch.tensor(presence, device=device).float()
    votes = []
    for query_batch in torch.tensor(queries).split(1024):
        query_batch = F.normalize(query_batch.to(device), dim=-1)
        similarities = query_batch @ neighbours.T
        nearest_similarities, indices = similarities.topk(num_neighbours, dim=-1)
        weights = torch.softmax(nearest_similarities / temperature, dim=-1)
        votes.append((weights[..., None] * classes[indices]).sum(1))
    return torch.cat(votes).cpu().numpy()


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
        standardized = (features.to(self.weight.device) - self.mean) / self.std
        return F.linear(standardized, self.weight, self.bias)


def fit_linear(
    features: np.ndarray,
    counts: np.ndarray,
    used: np.ndarray,
    l2: float = 1e-2,
    device: str | torch.device = "cpu",
    max_iterations: int = 500,
    multi_label: bool = False,
) -> LinearProbe:
    """Fit a multinomial logistic regression, or one of each class, on standardized features with L-BFGS.

    The loss is the mean cross-entropy plus l2 / 2 · |W|²; the bias is not regularized. With one label per row, this
    equals `LogisticRegression` of scikit-learn with C = 1 / (rows · l2), or twice this value for two classes. The
    problem is convex, so the solution is unique. With `multi_label`, each class has a logistic regression with
    C = 1 / (rows · l2).

    Args:
        features: float32 `(rows, …, width)`; may be a memory-mapped file, which is read in parts.
        counts: number of labels of each class, `(rows, …, classes)`: a one-hot class of an image, or the number of
            pixels of each class in a patch. With `multi_label` as many columns follow, for the absence of each class.
            Positions without labels are ignored.
        used: indices of the rows to fit to.
        l2: weight decay.
        device: device of the computation.
        max_iterations: maximum number of iterations of L-BFGS.
        multi_label: whether a row may have any number of classes.

    Raises:
        ValueError: If there are no labels.
    """
    num_classes = counts.shape[-1] // 2 if multi_label else counts.shape[-1]
    batches = labeled_positions(features, counts, used, device)
    mean, std, total = standardization(batches, features.shape[-1], device)

    def standardized() -> Iterator[Batch]:
        for rows, targets in batches():
            yield (rows - mean) / std, targets

    read_batches = standardized
    num_bytes = features[used[:1]].nbytes * len(used)
    if num_bytes <= MOST_BYTES_IN_MEMORY:
        batches_in_memory = list(standardized())
        read_batches = partial(iter, batches_in_memory)
    weight, bias = minimize_cross_entropy(
        read_batches,
        binary_cross_entropy if multi_label else cross_entropy,
        width=features.shape[-1],
        num_classes=num_classes,
        total=total / num_classes if multi_label else total,
        l2=l2,
        device=device,
        max_iterations=max_iterations,
    )
    return LinearProbe(weight, bias, mean, std)


def cross_entropy(logits: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    """Return the sum of the cross-entropy over all labels, of logits and counts `(rows, classes)`."""
    return -(counts * logits.log_softmax(-1)).sum()


def binary_cross_entropy(logits: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    """Return the sum of the binary cross-entropy over all labels.

    Args:
        logits: float32 `(rows, classes)`.
        counts: presence, then absence of each class, `(rows, 2 * classes)`.
    """
    present, absent = counts.chunk(2, dim=-1)
    return -(present * F.logsigmoid(logits) + absent * F.logsigmoid(-logits)).sum()


def minimize_cross_entropy(
    read_batches: Callable[[], Iterator[Batch]],
    summed_loss: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    width: int,
    num_classes: int,
    total: float,
    l2: float,
    device: str | torch.device,
    max_iterations: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return weight and bias of a linear layer with the lowest loss, see [`fit_linear`], on standardized features.

    Args:
        read_batches: function that iterates over all batches.
        summed_loss: loss of logits and counts, summed over a batch.
        width: number of features.
        num_classes: number of classes.
        total: number that the sum of the loss is divided by.
        l2, device, max_iterations: see [`fit_linear`].
    """
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
        for rows, targets in read_batches():
            logits = F.linear(rows, weight, bias)
            batch_loss = summed_loss(logits, targets) / total
            batch_loss.backward()
            loss = loss + batch_loss.detach()
        return loss

    optimizer.step(closure)
    return weight.detach(), bias.detach()


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
            nn.Linear(len(mean), HIDDEN_SIZE),
            nn.GELU(),
            nn.Dropout(0.2),
            nn.Linear(HIDDEN_SIZE, num_classes),
        )

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """Return logits, float32 `(…, classes)`, of features `(…, width)`."""
        standardized = (features.to(self.mean.device) - self.mean) / self.std
        return self.layers(standardized)


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
    batches = labeled_positions(features, counts, used, device)
    mean, std, _ = standardization(batches, features.shape[-1], device)
    # Indices of each labeled position in `features`: a row with that of the image, then those of the patch.
    is_labeled = counts.any(-1)[used]
    labeled_indices = np.argwhere(is_labeled).T
    labeled_indices[0] = used[labeled_indices[0]]
    num_labeled = labeled_indices.shape[1]
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        probe = NonlinearProbe(mean.cpu(), std.cpu(), num_classes=counts.shape[-1]).to(device)
        optimizer = torch.optim.AdamW(probe.parameters(), lr=1e-3, weight_decay=0.05)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        for _ in range(steps):
            batch = torch.randint(num_labeled, (BATCH_SIZE,)).numpy()
            positions = tuple(labeled_indices[:, batch])
            targets = torch.from_numpy(counts[positions]).float().to(device)
            inputs = torch.from_numpy(features[positions]).to(device)
            logits = probe(inputs)
            loss = cross_entropy(logits, targets) / targets.sum()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return probe.eval().requires_grad_(False)


def labeled_positions(
    features: np.ndarray,
    counts: np.ndarray,
    used: np.ndarray,
    device: str | torch.device,
) -> Callable[[], Iterator[Batch]]:
    """Return a function that iterates over the labeled positions, in parts.

    Returns:
        Function that yields features, float32 `(positions, width)`, and counts, float32 `(positions, classes)`.
    """
    width = features.shape[-1]
    num_classes = counts.shape[-1]
    positions_per_image = math.prod(features.shape[1:-1])
    num_parts = math.ceil(len(used) * positions_per_image / ROWS_AT_ONCE)
    indices_of_parts = np.array_split(used, max(num_parts, 1))

    def read() -> Iterator[Batch]:
        for indices in indices_of_parts:
            rows = torch.from_numpy(np.asarray(features[indices])).reshape(-1, width)
            targets = torch.from_numpy(counts[indices]).float().reshape(-1, num_classes)
            is_labeled = targets.sum(1) > 0
            yield rows[is_labeled].to(device), targets[is_labeled].to(device)

    return read


def standardization(
    batches: Callable[[], Iterator[Batch]],
    width: int,
    device: str | torch.device,
) -> tuple[torch.Tensor, torch.Tensor, float]:
    """Return mean and standard deviation of each feature, with 1 for constant features, and the sum of all counts."""
    num_rows = 0
    total = 0.0
    mean = torch.zeros(width, device=device)
    for rows, targets in batches():
        num_rows += len(rows)
        total += targets.sum().item()
        mean += rows.sum(0)
    if num_rows == 0:
        raise ValueError("No labels found in the training images.")
    mean /= num_rows
    variance = torch.zeros(width, device=device)
    for rows, _ in batches():
        variance += (rows - mean).square().sum(0)
    std = (variance / num_rows).sqrt()
    # Rounding gives a constant feature a small deviation, relative to its mean.
    rounding_error = 1e-6 * mean.abs().clamp(min=1e-6)
    std = torch.where(std > rounding_error, std, torch.ones_like(std))
    return mean, std, total
