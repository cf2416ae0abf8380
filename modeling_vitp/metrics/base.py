"""Base class of the metrics: results over all processes."""

from typing import Any

import evaluate
import torch


class DistributedMetric(evaluate.Metric):
    """Metric that keeps what it needs of each batch in `kept`, and computes the result over all processes.

    A subclass sets `kept` to an empty dictionary or list, adds to it in `add_batch`, and implements
    `_compute_parts(parts)`, which gets the `kept` of each process.

    Args:
        num_process, process_id: number of processes that have each added their own part of the data, and the index of
            this one. `compute` then gathers the parts (through `torch.distributed`) and gives all processes the result.
            Leave the default where every process has all data, as in `Trainer`, which gathers predictions first.

    The other arguments are those of `evaluate.load`.
    """

    kept: dict | list

    def __len__(self) -> int:
        return len(self.kept)

    def compute(self, *, predictions=None, references=None, **kwargs) -> dict[str, Any]:
        """Return the result for everything added so far, and forget it.

        Args:
            predictions, references, kwargs: a last batch for `add_batch`, if any.

        Raises:
            ValueError: if nothing was added, or if not exactly `num_process` processes run.
        """
        if predictions is not None:
            self.add_batch(predictions=predictions, references=references, **kwargs)
        parts, self.kept = gather_parts(self.kept, self.num_process, self.name), type(self.kept)()
        if not any(parts):
            raise ValueError(f"{self.name}: nothing to compute. Add predictions first.")
        return self._compute_parts(parts)


def gather_parts(part: Any, num_process: int, name: str) -> list[Any]:
    """Return the parts of all processes (through `torch.distributed`, by pickle), in the order of their ranks.

    Args:
        part: the part of this process.
        num_process: number of processes that have a part. If 1, the result is `[part]`.
        name: of the metric, for the error.

    Raises:
        ValueError: if not exactly `num_process` processes run.
    """
    if num_process == 1:
        return [part]
    processes = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
    if processes != num_process:
        raise ValueError(f"{name}: expected num_process={num_process} processes, got {processes}.")
    parts = [None] * processes
    torch.distributed.all_gather_object(parts, part)
    return parts
