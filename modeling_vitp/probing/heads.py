"""What reads a task from features: nearest neighbours, a linear layer, and a small nonlinear one."""

from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

ROWS_AT_ONCE = 65536
KEPT_BYTES = 2**30  # features up to this are read and standardised once for all iterations of L-BFGS


def nearest_neighbours(
    features: np.ndarray,
    labels: np.ndarray,
    queries: np.ndarray,
    num_classes: int,
    num_neighbours: int = 20,
    temperature: float = 0.07,
    device: str | torch.device = "cpu",
) -> np.ndarray:
    """Weighted votes of the nearest neighbours, as in DINO (arXiv 2104.14294).

    Nearest is by cosine similarity s, and a neighbour's vote counts exp(s / temperature).

    Args:
        features: of the training images, float32 of shape `(images, width)`.
        labels: their classes, integers of shape `(images,)`.
        queries: features of the test images, `(queries, width)`.
        num_neighbours: as many vote, or all training images if there are fewer.

    Returns:
        Predicted classes, int64 of shape `(queries,)`.
    """
    known = F.normalize(torch.tensor(features, device=device), dim=-1)
    votes = F.one_hot(torch.tensor(labels, device=device), num_classes).float()
    predicted = []
    for part in torch.tensor(queries).split(1024):
        similarity = F.normalize(part.to(device), dim=-1) @ known.T
        nearest, places = similarity.topk(min(num_neighbours, len(known)), dim=-1)
        weights = torch.softmax(nearest / temperature, dim=-1)
        predicted.append((weights[..., None] * votes[places]).sum(1).argmax(-1))
    return torch.cat(predicted).cpu().numpy()


class LinearProbe:
    """A linear layer on features that are standardised as those it was fitted to.

    Args:
        weight, bias: of shapes `(classes, width)` and `(classes,)`.
        mean, std: of the training features, `(width,)`.
    """

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor, mean: torch.Tensor, std: torch.Tensor):
        self.weight, self.bias, self.mean, self.std = weight, bias, mean, std

    def __call__(self, features: torch.Tensor) -> torch.Tensor:
        """Logits, float32 of shape `(…, classes)`, of features of shape `(…, width)`."""
        return F.linear((features.to(self.weight.device) - self.mean) / self.std, self.weight, self.bias)


def fit_linear(
    features: np.ndarray,
    counts: np.ndarray,
    used: np.ndarray,
    l2: float = 1e-2,
    device: str | torch.device = "cpu",
    max_iterations: int = 500,
) -> LinearProbe:
    """Multinomial logistic regression on standardised features, by L-BFGS until it has converged.

    It minimises the mean cross-entropy plus l2 / 2 · |W|², the bias being free: with one label a row what
    `LogisticRegression` of scikit-learn does with C = 1 / (rows · l2), of two classes with twice that. The problem is
    convex, so there is one result.

    Args:
        features: float32 of shape `(rows, …, width)`; may be a map of a file, of which parts are read at a time.
        counts: how often each class is right, `(rows, …, classes)`: one 1 for an image's class, or for a patch the
            number of its pixels of each class. Places without any do not count.
        used: the rows to fit to, indices.
        max_iterations: of L-BFGS.

    Raises:
        ValueError: if nothing is labelled.
    """
    width, num_classes = features.shape[-1], counts.shape[-1]
    batches = labelled_places(features, counts, used, device)
    mean, std, total = standardisation(batches, width, device)

    def standardised() -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        return (((rows - mean) / std, targets) for rows, targets in batches())

    kept = list(standardised()) if features[used[:1]].nbytes * len(used) <= KEPT_BYTES else None
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
        for rows, targets in kept or standardised():
            logits = F.linear(rows, weight, bias)
            part = -(targets * logits.log_softmax(-1)).sum() / total
            part.backward()
            loss = loss + part.detach()
        return loss

    optimizer.step(closure)
    return LinearProbe(weight.detach(), bias.detach(), mean, std)


class NonlinearProbe(nn.Module):
    """A layer of `hidden_size` units and a linear layer, on features that are standardised as those it was fitted to.

    Args:
        mean, std: of the training features, `(width,)`.
    """

    def __init__(self, mean: torch.Tensor, std: torch.Tensor, num_classes: int, hidden_size: int = 64):
        super().__init__()
        self.register_buffer("mean", mean)
        self.register_buffer("std", std)
        self.layers = nn.Sequential(
            nn.Linear(len(mean), hidden_size), nn.GELU(), nn.Dropout(0.2), nn.Linear(hidden_size, num_classes)
        )

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """Logits, float32 of shape `(…, classes)`, of features of shape `(…, width)`."""
        return self.layers((features.to(self.mean.device) - self.mean) / self.std)


def fit_nonlinear(
    features: np.ndarray,
    counts: np.ndarray,
    used: np.ndarray,
    seed: int = 0,
    device: str | torch.device = "cpu",
    steps: int = 500,
    batch_size: int = 512,
) -> NonlinearProbe:
    """A [`NonlinearProbe`] after `steps` of AdamW (rate 1e-3 to 0 by a cosine, weight decay 0.05) on random places.

    Every backbone has the same budget, and nothing is chosen by a score. What the seed draws is drawn on the CPU, so
    that devices agree.

    Args:
        features, counts, used: as for [`fit_linear`].
        seed: of the weights, the batches and dropout.
    """
    width, num_classes = features.shape[-1], counts.shape[-1]
    mean, std, _ = standardisation(labelled_places(features, counts, used, device), width, device)
    labelled = [(image, *place) for image in used for place in np.argwhere(counts[image].sum(-1) > 0)]
    labelled = np.array(labelled).T  # of each place its index in `features`
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        probe = NonlinearProbe(mean.cpu(), std.cpu(), num_classes).to(device)
        optimizer = torch.optim.AdamW(probe.parameters(), lr=1e-3, weight_decay=0.05)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        for _ in range(steps):
            chosen = tuple(labelled[:, torch.randint(labelled.shape[1], (batch_size,)).numpy()])
            targets = torch.from_numpy(counts[chosen]).float().to(device)
            logits = probe(torch.from_numpy(features[chosen]).to(device))
            loss = -(targets * logits.log_softmax(-1)).sum() / targets.sum()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return probe.eval().requires_grad_(False)


def labelled_places(
    features: np.ndarray, counts: np.ndarray, used: np.ndarray, device: str | torch.device
) -> Callable[[], Iterator[tuple[torch.Tensor, torch.Tensor]]]:
    """What goes through the places with a label, as often as it is called: features and counts, parts of them.

    Returns:
        A function that gives float32 of shapes `(places, width)` and `(places, classes)`.
    """
    width, num_classes = features.shape[-1], counts.shape[-1]
    places = int(np.prod(features.shape[1:-1], dtype=int))
    parts = np.array_split(used, max(-(-len(used) * places // ROWS_AT_ONCE), 1))

    def load(part: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        rows = torch.from_numpy(np.asarray(features[part])).reshape(-1, width)
        targets = torch.from_numpy(counts[part]).float().reshape(-1, num_classes)
        labelled = targets.sum(1) > 0
        return rows[labelled].to(device), targets[labelled].to(device)

    return lambda: map(load, parts)


def standardisation(
    batches: Callable[[], Iterator[tuple[torch.Tensor, torch.Tensor]]], width: int, device: str | torch.device
) -> tuple[torch.Tensor, torch.Tensor, float]:
    """Mean and standard deviation of each feature (1 where it does not vary), and the sum of all counts."""
    number, total = 0, 0.0
    mean = torch.zeros(width, device=device)
    for rows, targets in batches():
        number, total = number + len(rows), total + targets.sum().item()
        mean += rows.sum(0)
    if not number:
        raise ValueError("A linear probe has nothing to learn from: no place of the training images has a label.")
    mean /= number
    variance = torch.zeros(width, device=device)
    for rows, _ in batches():
        variance += (rows - mean).square().sum(0)
    std = (variance / number).sqrt()
    return mean, torch.where(std > 1e-6 * mean.abs().clamp(min=1e-6), std, torch.ones_like(std)), total
