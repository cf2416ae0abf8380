"""Whether weights are numbers."""

import math
from collections.abc import Iterable, Mapping

import torch

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def not_finite(tensors: Mapping[str, torch.Tensor]) -> list[str]:
    """The names of the tensors that hold NaN or infinity; of a tensor that is sharded, this process's part counts."""
    parts = {name: getattr(tensor, "to_local", lambda tensor=tensor: tensor)() for name, tensor in tensors.items()}
    parts = {name: part.detach() for name, part in parts.items() if part.dtype in FLOATS and part.numel()}
    # The largest magnitude of all at once: it is NaN where one is.
    if not parts or torch.nn.utils.get_total_norm(list(parts.values()), math.inf).isfinite():
        return []
    return [name for name, part in parts.items() if not part.isfinite().all()]


def check_finite(tensors: Mapping[str, torch.Tensor], name: object) -> None:
    """Raises a `ValueError` that names tensors that hold NaN or infinity."""
    refuse(name, not_finite(tensors))


def refuse(name: object, wrong: Iterable[str]) -> None:
    wrong = list(wrong)
    if wrong:
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise ValueError(
            f"{name} has weights that are NaN or infinite, in {', '.join(wrong[:3])}{more}: the training that they "
            "come from diverged. Take an earlier checkpoint; conversion and export take these with allow_nan."
        )
