"""What each process has counted, brought together."""

from typing import Any

import torch


def gather(part: Any, num_process: int, name: str) -> list[Any]:
    """The parts of all processes (through `torch.distributed`, by pickle), in the order of their ranks, in each.

    Args:
        part: what this process has.
        num_process: how many processes have a part; `part` alone if 1.
        name: of the metric, for the error.

    Raises:
        ValueError: if so many processes are not there.
    """
    if num_process == 1:
        return [part]
    processes = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
    if processes != num_process:
        raise ValueError(f"{name}: num_process is {num_process}, but {processes} process(es) run.")
    parts = [None] * processes
    torch.distributed.all_gather_object(parts, part)
    return parts
