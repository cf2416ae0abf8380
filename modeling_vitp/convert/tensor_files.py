"""Safetensors checkpoints as byte ranges: tensors are renamed, cut and joined on disk without loading, and checked.

Cutting a tensor into blocks of rows and joining such blocks moves only contiguous bytes. A conversion therefore needs
no more memory than its copy buffer, and keeps every bit for any dtype.
"""

import json
import math
import struct
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

SINGLE_FILE, INDEX_FILE = "model.safetensors", "model.safetensors.index.json"
DTYPE_BITS = {"F64": 64, "I64": 64, "U64": 64, "F32": 32, "I32": 32, "U32": 32, "F16": 16, "BF16": 16, "I16": 16}
DTYPE_BITS |= {"U16": 16, "I8": 8, "U8": 8, "BOOL": 8, "F8_E4M3": 8, "F8_E5M2": 8}
EXPONENTS = {"F64": (np.uint64, np.uint64(0x7FF << 52)), "F32": (np.uint32, np.uint32(0xFF << 23))}
EXPONENTS |= {"BF16": (np.uint16, np.uint16(0xFF << 7)), "F16": (np.uint16, np.uint16(0x1F << 10))}
DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
FLOATS = tuple(getattr(torch, name) for name in DTYPES.values())
BUFFER_BYTES = 1 << 20  # fits the processor's cache
FROM_PICKLE = (
    "Convert it: safetensors.torch.save_file(torch.load(FILE, weights_only=True)['state_dict'], 'model.safetensors')."
)


@dataclass(frozen=True)
class TensorBytes:
    """Location of a tensor, or of a block of its rows, in a file."""

    path: Path
    start: int
    dtype: str
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * DTYPE_BITS[self.dtype] // 8

    def rows(self, part: int, num_parts: int) -> "TensorBytes":
        """Return the `part`-th of `num_parts` equal blocks of rows."""
        if num_parts == 1:
            return self
        block = replace(self, shape=(self.shape[0] // num_parts, *self.shape[1:]))
        return replace(block, start=self.start + part * block.num_bytes)

    def read(self) -> Iterator[memoryview]:
        """Yield the bytes in chunks; each chunk overwrites the previous one."""
        buffer = memoryview(bytearray(min(self.num_bytes, BUFFER_BYTES)))
        with open(self.path, "rb") as file:
            file.seek(self.start)
            remaining = self.num_bytes
            while remaining:
                count = file.readinto(buffer[:remaining])
                if not count:
                    raise ValueError(f"{self.path} was truncated while it was read.")
                remaining -= count
                yield buffer[:count]


def read_checkpoint(path: Path) -> dict[str, TensorBytes]:
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


def read_shards(index_file: Path) -> dict[str, TensorBytes]:
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


def read_tensors(path: Path) -> dict[str, TensorBytes]:
    """Return the tensors of one safetensors file, from its header, in the order of their bytes."""
    try:
        size = path.stat().st_size
        with open(path, "rb") as file:
            (header_size,) = struct.unpack("<Q", file.read(8))
            if header_size > size - 8:
                raise ValueError(f"expected a header of {header_size} bytes, found {size - 8}")
            header = json.loads(file.read(header_size))
        header.pop("__metadata__", None)
        tensors, ends = {}, [0]
        for key, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
            start, end = entry["data_offsets"]
            tensor = TensorBytes(path, 8 + header_size + start, entry["dtype"], tuple(entry["shape"]))
            if tensor.num_bytes != end - start or start != ends[-1]:
                raise ValueError(f"the byte range of {key} is invalid")
            tensors[key] = tensor
            ends.append(end)
        if 8 + header_size + ends[-1] != size:
            raise ValueError(f"the tensors end at byte {8 + header_size + ends[-1]}, the file at {size}")
    except FileNotFoundError as error:
        raise ValueError(f"{path} is missing, but listed in the index.") from error
    except (OSError, struct.error, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(
            f"{path} is not a valid safetensors file ({error}): it is damaged or cut short. Download it again."
        ) from error
    return tensors


def write_checkpoint(folder: Path, tensors: dict[str, list[TensorBytes]]) -> list[str]:
    """Write each tensor as its blocks of rows one after another, with the shards of the source.

    Returns:
        The names of the tensors with NaN or infinite values.
    """
    shards = {}
    for key, blocks in tensors.items():
        shards.setdefault(blocks[0].path, {})[key] = blocks
    total_size = sum(block.num_bytes for blocks in tensors.values() for block in blocks)
    weight_map, wrong = {}, []
    with tqdm(total=total_size, unit="B", unit_scale=True, desc="Converting") as progress:
        for number, source in enumerate(sorted(shards), start=1):
            name = SINGLE_FILE if len(shards) == 1 else f"model-{number:05}-of-{len(shards):05}.safetensors"
            wrong += write_file(folder / name, shards[source], progress)
            weight_map |= dict.fromkeys(shards[source], name)
    if len(shards) > 1:
        index = {"metadata": {"total_size": total_size}, "weight_map": dict(sorted(weight_map.items()))}
        (folder / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n")
    return wrong


def write_file(path: Path, tensors: dict[str, list[TensorBytes]], progress: tqdm) -> list[str]:
    # Widest dtype first, as safetensors itself does, so that every tensor lies at a multiple of its item size.
    order = sorted(tensors, key=lambda key: (-DTYPE_BITS[tensors[key][0].dtype], key))
    header, end = {"__metadata__": {"format": "pt"}}, 0
    for key in order:
        blocks = tensors[key]
        start, end = end, end + sum(block.num_bytes for block in blocks)
        shape = (
            [sum(block.shape[0] for block in blocks), *blocks[0].shape[1:]] if len(blocks) > 1 else [*blocks[0].shape]
        )
        header[key] = {"dtype": blocks[0].dtype, "shape": shape, "data_offsets": [start, end]}
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    wrong = []
    with open(path, "xb") as file:
        file.write(struct.pack("<Q", len(encoded)) + encoded)
        for key in order:
            for block in tensors[key]:
                for chunk in block.read():
                    file.write(chunk)
                    progress.update(len(chunk))
                    if wrong[-1:] != [key] and not is_finite(chunk, block.dtype):
                        wrong.append(key)
    return wrong


def is_finite(chunk: memoryview, dtype: str) -> bool:
    """Return whether the numbers in a chunk of a tensor are finite: no exponent has all its bits set."""
    if dtype not in EXPONENTS:
        return True
    kind, exponent = EXPONENTS[dtype]
    return not ((np.frombuffer(chunk, kind) & exponent) == exponent).any()


def open_like_folder(folder: str | Path) -> None:
    """Set the mode of weights to that of their folder; safetensors makes them readable by their owner only."""
    for path in Path(folder).glob("*.safetensors"):
        with suppress(OSError):  # another owner, or a file system without modes
            path.chmod(Path(folder).stat().st_mode & 0o666)


def main_dtype(weights: dict[str, TensorBytes]) -> str:
    """Return the dtype of most bytes."""
    counts = Counter()
    for tensor in weights.values():
        counts[tensor.dtype] += tensor.num_bytes
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
