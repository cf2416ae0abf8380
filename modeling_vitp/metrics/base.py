"""Base class of the metrics, which computes results over all processes."""

from typing import Any

import evaluate
import torch


class DistributedMetric(evaluate.Metric):
    """Base class of metrics that keep statistics of each batch in `kept`, and compute the result over all processes.

    A subclass sets `kept` to an empty dictionary or list, adds to it in `add_batch`, and implements
    `_compute_parts(parts)`, which receives the `kept` of each process.

    Args:
        num_process, process_id: number of processes that each add a part of the data, and index of this process.
            `compute` gathers the parts through `torch.distributed` and returns the result on all processes. Leave the
            default if every process has all data, as in `Trainer`, which gathers predictions first.

    The other arguments are those of `evaluate.load`.
    """

    kept: dict | list

    def __len__(self) -> int:
        return len(self.kept)

    def compute(self, *, predictions=None, references=None, **kwargs) -> dict[str, Any]:
        """Return the result for all batches added so far, and reset the metric.

        Args:
            predictions, references, kwargs: last batch for `add_batch`, optional.

        Raises:
            ValueError: if no batch was added, or if the number of running processes is not `num_process`.
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
        name: name of the metric in errors.

    Raises:
        ValueError: if the number of running processes is not `num_process`.
    """
    if num_process == 1:
        return [part]
    processes = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
    if processes != num_process:
        raise ValueError(f"{name}: expected num_process={num_process} processes, got {processes}.")
    parts = [None] * processes
    torch.distributed.all_gather_object(parts, part)
    return parts
