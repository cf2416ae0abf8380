"""Safetensors checkpoints whose tensors are renamed, cut and joined without loading a model, and checked."""

import math
from collections import Counter
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tqdm import tqdm

from ..cards.record import read_json, write_json

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
FLOATS = tuple(getattr(torch, name) for name in DTYPES.values())
PICKLE_SUFFIXES = (".bin", ".pt", ".pth")
FROM_PICKLE = (
    "Convert it: safetensors.torch.save_file(torch.load(FILE, weights_only=True)['state_dict'], 'model.safetensors')."
)


@dataclass(frozen=True)
class StoredTensor:
    """Tensor of a safetensors file, or one of `num_blocks` equal blocks of its rows, which is loaded on demand."""

    path: Path
    key: str
    dtype: str
    shape: tuple[int, ...]
    block_index: int = 0
    num_blocks: int = 1

    def rows(self, block_index: int, num_blocks: int) -> "StoredTensor":
        """Return one of `num_blocks` equal blocks of rows."""
        if num_blocks == 1:
            return self
        shape = (self.shape[0] // num_blocks, *self.shape[1:])
        return replace(self, shape=shape, block_index=block_index, num_blocks=num_blocks)

    def load(self, files: dict[Path, safe_open] | None = None) -> torch.Tensor:
        """Return the tensor, in memory that is mapped to the file; tensors of the same `files` share the mapping."""
        if files is None:
            files = {}
        if self.path not in files:
            files[self.path] = safe_open(self.path, "pt")
        tensor = files[self.path].get_tensor(self.key)
        if self.num_blocks == 1:
            return tensor
        return tensor.chunk(self.num_blocks)[self.block_index]


def read_checkpoint(path: Path) -> dict[str, StoredTensor]:
    """Return the tensors of a safetensors file, or of a folder with one file or with shards and their index.

    Raises:
        ValueError: if safetensors are missing, a file is damaged, or the index and its shards disagree.
    """
    if (path / INDEX_FILE).is_file():
        return read_shards(path / INDEX_FILE)
    if (path / SINGLE_FILE).is_file():
        return read_tensors(path / SINGLE_FILE)
    files = [path] if path.is_file() else sorted(path.iterdir())
    candidates = [file for file in files if file.suffix == ".safetensors"]
    if len(candidates) == 1:
        return read_tensors(candidates[0])
    weights = candidates or [file for file in files if file.suffix in PICKLE_SUFFIXES]
    advice = "Pass one file."
    if not candidates:
        advice = f"Pickles are not read, because they can run code. {FROM_PICKLE}"
    names = [file.name for file in weights]
    raise ValueError(
        f"Expected a safetensors file or a folder with {SINGLE_FILE} or {INDEX_FILE}, got {path}. Found weights: "
        f"{names or 'none'}. {advice}"
    )


def read_shards(index_file: Path) -> dict[str, StoredTensor]:
    weight_map = read_json(index_file).get("weight_map")
    if not weight_map:
        raise ValueError(f"Expected an index of safetensors shards, but {index_file} has no weight_map.")
    tensors = {}
    for shard_name in sorted(set(weight_map.values())):
        shard = read_tensors(index_file.with_name(shard_name))
        listed_keys = {key for key, name in weight_map.items() if name == shard_name}
        if listed_keys != shard.keys():
            raise ValueError(
                f"{index_file} and its shard {shard_name} disagree: only in the index "
                f"{sorted(listed_keys - shard.keys())}, only in the shard {sorted(shard.keys() - listed_keys)}."
            )
        tensors |= shard
    return tensors


def read_tensors(path: Path) -> dict[str, StoredTensor]:
    """Return the tensors of one safetensors file, from its header."""
    tensors = {}
    try:
        with safe_open(path, "pt") as file:
            for key in file.keys():
                header = file.get_slice(key)
                tensors[key] = StoredTensor(path, key, header.get_dtype(), tuple(header.get_shape()))
    except (OSError, SafetensorError) as error:
        raise ValueError(
            f"{path} is not a valid safetensors file ({error}): it is missing, damaged or cut short. Download it again."
        ) from error
    return tensors


def write_checkpoint(folder: Path, tensors: dict[str, list[StoredTensor]]) -> list[str]:
    """Write each tensor as its blocks of rows one after another, with the shards of the source.

    One shard is in memory at a time.

    Returns:
        The names of the tensors with NaN or infinite values.
    """
    blocks_by_source: dict[Path, dict[str, list[StoredTensor]]] = {}
    for key, blocks in tensors.items():
        blocks_by_source.setdefault(blocks[0].path, {})[key] = blocks
    num_shards = len(blocks_by_source)
    weight_map = {}
    total_size = 0
    not_finite_names = []
    for number, source in enumerate(tqdm(sorted(blocks_by_source), desc="Converting", unit="shard"), start=1):
        shard = load_shard(blocks_by_source[source])
        not_finite_names += not_finite(shard)
        file_name = SINGLE_FILE
        if num_shards > 1:
            file_name = f"model-{number:05}-of-{num_shards:05}.safetensors"
        save_file(shard, folder / file_name, {"format": "pt"})
        weight_map.update(dict.fromkeys(shard, file_name))
        # Not a loop: its variable would keep one tensor, and with it the whole mapped file, until the next shard.
        total_size += sum(tensor.nbytes for tensor in shard.values())
        del shard  # before the next one is loaded
    if num_shards > 1:
        index = {"metadata": {"total_size": total_size}, "weight_map": dict(sorted(weight_map.items()))}
        write_json(folder / INDEX_FILE, index)
    open_like_folder(folder)
    return not_finite_names


def load_shard(blocks_by_key: dict[str, list[StoredTensor]]) -> dict[str, torch.Tensor]:
    """Return the tensors of one file of the source, each joined from its blocks of rows."""
    shard = {}
    open_files = {}
    for key, blocks in blocks_by_key.items():
        if len(blocks) == 1:
            shard[key] = blocks[0].load(open_files)
        else:  # mappings of their own end with the copy
            shard[key] = torch.cat([block.load() for block in blocks])
    return shard


def open_like_folder(folder: str | Path) -> None:
    """Set the mode of weights to that of their folder; safetensors makes them readable by their owner only."""
    for path in Path(folder).glob("*.safetensors"):
        with suppress(OSError):  # another owner, or a file system without modes
            path.chmod(Path(folder).stat().st_mode & 0o666)


def main_dtype(weights: dict[str, StoredTensor]) -> str:
    """Return the dtype of most weights."""
    weights_by_dtype = Counter()
    for tensor in weights.values():
        weights_by_dtype[tensor.dtype] += math.prod(tensor.shape)
    (dtype, _), *_ = weights_by_dtype.most_common(1)
    if dtype not in DTYPES:
        raise ValueError(f"Expected weights of dtype {', '.join(DTYPES)}, got {dtype}.")
    return DTYPES[dtype]


def not_finite(tensors: Mapping[str, torch.Tensor]) -> list[str]:
    """Return the names of the tensors with NaN or infinite values, in this process's part of sharded tensors."""
    local_tensors = {}
    for name, tensor in tensors.items():
        if hasattr(tensor, "to_local"):
            tensor = tensor.to_local()
        if tensor.dtype in FLOATS and tensor.numel() > 0:
            local_tensors[name] = tensor.detach()
    if not local_tensors:
        return []
    # The largest magnitude of all tensors is NaN if a value is NaN: one pass for the usual case.
    largest_magnitude = torch.nn.utils.get_total_norm(list(local_tensors.values()), math.inf)
    if largest_magnitude.isfinite():
        return []
    return [name for name, tensor in local_tensors.items() if not tensor.isfinite().all()]


def check_finite(tensors: Mapping[str, torch.Tensor], name: object) -> None:
    """Raise a `ValueError` that names tensors with NaN or infinite values."""
    refuse_not_finite(name, not_finite(tensors))


def refuse_not_finite(name: object, not_finite_names: list[str]) -> None:
    """Raise a `ValueError` about the weights of `name` if tensors with NaN or infinite values are listed."""
    if not_finite_names:
        listed_names = ", ".join(not_finite_names[:3])
        if len(not_finite_names) > 3:
            listed_names += f" and {len(not_finite_names) - 3} more"
        raise ValueError(
            f"{name} has weights that are NaN or infinite, in {listed_names}: its training diverged. Use an earlier "
            "checkpoint. To convert or export these weights anyway, set allow_nan."
        )
