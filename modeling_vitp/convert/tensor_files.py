"""Safetensors checkpoints whose tensors are renamed, cut and joined without loading a model, and checked."""

import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tqdm import tqdm

from ..cards.record import write_json

SINGLE_FILE, INDEX_FILE = "model.safetensors", "model.safetensors.index.json"
DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
FLOATS = tuple(getattr(torch, name) for name in DTYPES.values())
FROM_PICKLE = (
    "Convert it: safetensors.torch.save_file(torch.load(FILE, weights_only=True)['state_dict'], 'model.safetensors')."
)


@dataclass(frozen=True)
class StoredTensor:
    """Tensor of a safetensors file, or one of `num_parts` equal blocks of its rows, which is loaded on demand."""

    path: Path
    key: str
    dtype: str
    shape: tuple[int, ...]
    part: int = 0
    num_parts: int = 1

    def rows(self, part: int, num_parts: int) -> "StoredTensor":
        """Return the `part`-th of `num_parts` equal blocks of rows."""
        if num_parts == 1:
            return self
        shape = (self.shape[0] // num_parts, *self.shape[1:])
        return replace(self, shape=shape, part=part, num_parts=num_parts)

    def load(self, files: dict[Path, safe_open] | None = None) -> torch.Tensor:
        """Return the tensor, in memory that is mapped to the file; tensors of the same `files` share the mapping."""
        files = {} if files is None else files
        if self.path not in files:
            files[self.path] = safe_open(self.path, "pt")
        tensor = files[self.path].get_tensor(self.key)
        return tensor if self.num_parts == 1 else tensor.chunk(self.num_parts)[self.part]


def read_checkpoint(path: Path) -> dict[str, StoredTensor]:
    """Return the tensors of a safetensors file, or of a folder with one file or with shards and their index.

    Raises:
        ValueError: if safetensors are missing, a file is damaged, or the index and its shards disagree.
    """
    if path.is_file():
        if path.suffix != ".safetensors":
            raise ValueError(
                f"Expected a safetensors file, got {path}. Pickles are not read, as they can run code. {FROM_PICKLE}"
            )
        return read_tensors(path)
    if (path / INDEX_FILE).is_file():
        return read_shards(path / INDEX_FILE)
    if (path / SINGLE_FILE).is_file():
        return read_tensors(path / SINGLE_FILE)
    found = sorted(path.glob("*.safetensors"))
    if len(found) == 1:
        return read_tensors(found[0])
    if found:
        raise ValueError(
            f"Expected {SINGLE_FILE} or {INDEX_FILE} in {path}, found {[file.name for file in found]}. Pass one file."
        )
    pickles = sorted(file.name for ending in ("*.bin", "*.pt", "*.pth") for file in path.glob(ending))
    raise ValueError(
        f"{path} holds no safetensors. Found: {pickles or 'no weights'}."
        f"{f' Pickles are not read, because they can run code. {FROM_PICKLE}' if pickles else ''}"
    )


def read_shards(index_file: Path) -> dict[str, StoredTensor]:
    try:
        weight_map = json.loads(index_file.read_text())["weight_map"]
        shards = {name: read_tensors(index_file.with_name(name)) for name in sorted(set(weight_map.values()))}
    except (KeyError, TypeError, AttributeError, json.JSONDecodeError) as error:
        raise ValueError(f"{index_file} is not a valid index of safetensors shards ({error!r}).") from error
    for name, shard in shards.items():
        listed = {key for key, shard_name in weight_map.items() if shard_name == name}
        if listed != shard.keys():
            raise ValueError(
                f"{index_file} and its shard {name} disagree: only in the index {sorted(listed - shard.keys())}, "
                f"only in the shard {sorted(shard.keys() - listed)}."
            )
    return {key: tensor for shard in shards.values() for key, tensor in shard.items()}


def read_tensors(path: Path) -> dict[str, StoredTensor]:
    """Return the tensors of one safetensors file, from its header."""
    try:
        with safe_open(path, "pt") as file:
            slices = {key: file.get_slice(key) for key in file.keys()}
            return {
                key: StoredTensor(path, key, found.get_dtype(), tuple(found.get_shape()))
                for key, found in slices.items()
            }
    except FileNotFoundError as error:
        raise ValueError(f"{path} is missing, but listed in the index.") from error
    except (OSError, SafetensorError) as error:
        raise ValueError(
            f"{path} is not a valid safetensors file ({error}): it is damaged or cut short. Download it again."
        ) from error


def write_checkpoint(folder: Path, tensors: dict[str, list[StoredTensor]]) -> list[str]:
    """Write each tensor as its blocks of rows one after another, with the shards of the source.

    One shard is in memory at a time.

    Returns:
        The names of the tensors with NaN or infinite values.
    """
    shards = {}
    for key, blocks in tensors.items():
        shards.setdefault(blocks[0].path, {})[key] = blocks
    weight_map, total_size, wrong = {}, 0, []
    for number, source in enumerate(tqdm(sorted(shards), desc="Converting", unit="shard"), start=1):
        name = SINGLE_FILE if len(shards) == 1 else f"model-{number:05}-of-{len(shards):05}.safetensors"
        shard, files = {}, {}
        for key, blocks in shards[source].items():
            if len(blocks) == 1:
                shard[key] = blocks[0].load(files)
            else:  # mappings of their own end with the copy
                shard[key] = torch.cat([block.load() for block in blocks])
        wrong += not_finite(shard)
        save_file(shard, folder / name, {"format": "pt"})
        weight_map |= dict.fromkeys(shard, name)
        total_size += sum(tensor.nbytes for tensor in shard.values())
    if len(shards) > 1:
        index = {"metadata": {"total_size": total_size}, "weight_map": dict(sorted(weight_map.items()))}
        write_json(folder / INDEX_FILE, index)
    open_like_folder(folder)
    return wrong


def open_like_folder(folder: str | Path) -> None:
    """Set the mode of weights to that of their folder; safetensors makes them readable by their owner only."""
    for path in Path(folder).glob("*.safetensors"):
        with suppress(OSError):  # another owner, or a file system without modes
            path.chmod(Path(folder).stat().st_mode & 0o666)


def main_dtype(weights: dict[str, StoredTensor]) -> str:
    """Return the dtype of most weights."""
    counts = Counter()
    for tensor in weights.values():
        counts[tensor.dtype] += math.prod(tensor.shape)
    dtype = counts.most_common(1)[0][0]
    if dtype not in DTYPES:
        raise ValueError(f"Expected weights of dtype {', '.join(DTYPES)}, got {dtype}.")
    return DTYPES[dtype]


def not_finite(tensors: Mapping[str, torch.Tensor]) -> list[str]:
    """Return the names of the tensors with NaN or infinite values, in this process's part of sharded tensors."""
    parts = {name: getattr(tensor, "to_local", lambda tensor=tensor: tensor)() for name, tensor in tensors.items()}
    parts = {name: part.detach() for name, part in parts.items() if part.dtype in FLOATS and part.numel()}
    # The largest magnitude of all tensors is NaN if a value is NaN.
    if not parts or torch.nn.utils.get_total_norm(list(parts.values()), math.inf).isfinite():
        return []
    return [name for name, part in parts.items() if not part.isfinite().all()]


def check_finite(tensors: Mapping[str, torch.Tensor], name: object) -> None:
    """Raise a `ValueError` that names tensors with NaN or infinite values."""
    refuse_not_finite(name, not_finite(tensors))


def refuse_not_finite(name: object, wrong: Iterable[str]) -> None:
    """Raise a `ValueError` about the weights of `name` if tensors are listed in `wrong`."""
    wrong = list(wrong)
    if wrong:
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise ValueError(
            f"{name} has weights that are NaN or infinite, in {', '.join(wrong[:3])}{more}: its training diverged. Use "
            "an earlier checkpoint. To convert or export these weights anyway, set allow_nan."
        )
