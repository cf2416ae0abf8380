"""What of a long prediction is finished, kept on disk: a run that was killed goes on, and results appear whole."""

import hashlib
import json
import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch


class PartFile:
    """A file that is added to and survives a kill; what was cut short at its end is taken off when it is opened.

    Args:
        path: of the file; what it is made of stands in a file beside it.
        made_of: what it depends on, as JSON has it.

    Raises:
        ValueError: if the file is there, but made of something else.
    """

    def __init__(self, path: Path, made_of: dict[str, Any]):
        self.path = path
        self.made_of = json.loads(json.dumps(made_of))
        self.made_of_path = path.with_name(path.name + ".json")

    def __enter__(self) -> Self:
        if self.path.exists():
            begun_with = json.loads(self.made_of_path.read_text())
            changed = [name for name, value in self.made_of.items() if begun_with.get(name) != value]
            if changed:
                raise ValueError(
                    f"{self.path} was begun with other {', '.join(changed)}: go on with the same, or delete it."
                )
        else:
            self.made_of_path.write_text(json.dumps(self.made_of))
        self.file = open(self.path, "a+b")
        self.file.truncate(self.whole_size())
        return self

    def __exit__(self, *_) -> None:
        self.file.close()

    def whole_size(self) -> int:
        """Bytes of what is whole."""
        raise NotImplementedError

    def __len__(self) -> int:
        """How many are whole."""
        raise NotImplementedError

    def write(self, content: bytes | memoryview) -> None:
        """Adds to the file, on the disk itself."""
        self.file.write(content)
        self.file.flush()
        os.fsync(self.file.fileno())

    def delete(self) -> None:
        self.path.unlink()
        self.made_of_path.unlink()


class RowFile(PartFile):
    """Rows of uint8, all of one shape.

    Args:
        path, made_of: see [`PartFile`].
        shape: of a row.
    """

    def __init__(self, path: Path, shape: tuple[int, ...], made_of: dict[str, Any]):
        super().__init__(path, made_of)
        self.shape = shape

    def whole_size(self) -> int:
        return len(self) * math.prod(self.shape)

    def __len__(self) -> int:
        return self.path.stat().st_size // math.prod(self.shape)

    def append(self, rows: np.ndarray) -> None:
        self.write(np.ascontiguousarray(rows).data)

    def whole(self) -> np.memmap:
        """All rows, `(number, *shape)`, mapped from the file."""
        return np.memmap(self.path, np.uint8, "r", shape=(len(self), *self.shape))

    def read(self, count: int) -> Iterator[tuple[int, np.ndarray]]:
        """The place of the first of `count` rows (at the end fewer), and the rows, from the beginning."""
        self.file.seek(0)
        for top in range(0, len(self), count):
            values = np.frombuffer(self.file.read(count * math.prod(self.shape)), dtype=np.uint8)
            yield top, values.reshape(-1, *self.shape)


class LineFile(PartFile):
    """Values, each as JSON in a line."""

    def whole_size(self) -> int:
        with open(self.path, "rb") as file:
            return sum(len(line) for line in file if line.endswith(b"\n"))

    def __len__(self) -> int:
        with open(self.path, "rb") as file:
            return sum(line.endswith(b"\n") for line in file)

    def append(self, value: Any) -> None:
        self.write(json.dumps(value).encode() + b"\n")

    def __iter__(self) -> Iterator[Any]:
        with open(self.path, "rb") as file:
            yield from map(json.loads, file)


def part_of(outputs: Sequence[Path]) -> Path:
    """Where the unfinished first one of the files to write is kept.

    Raises:
        FileNotFoundError: if the folder of one does not exist.
        FileExistsError: if one of them exists, and not because a run was killed when all was done.
    """
    part = outputs[0].with_name(outputs[0].name + ".part")
    for path in outputs:
        if not path.parent.is_dir():
            raise FileNotFoundError(f"{path}: there is no folder {path.parent}.")
        if path.exists() and not part.exists():
            raise FileExistsError(f"{path} exists: delete it, or give another name.")
    return part


@contextmanager
def appears_whole(path: Path) -> Iterator[Path]:
    """Where to write a file, which appears under its name when it is whole."""
    unfinished = path.with_name(path.name + ".writing")
    yield unfinished
    unfinished.replace(path)


def fingerprint(path: Path) -> list:
    """Of a file: its place, size and time of change."""
    status = path.stat()
    return [str(path.resolve()), status.st_size, status.st_mtime_ns]


def digest(model: torch.nn.Module) -> str:
    """Hash of the weights."""
    result = hashlib.blake2b(digest_size=16)
    for name, tensor in model.state_dict().items():
        result.update(name.encode())
        result.update(tensor.cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return result.hexdigest()
