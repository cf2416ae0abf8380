"""Checks that two splits share no image, patient or case."""

import gzip
import hashlib
import io
import zlib
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset, ReadInstruction
from tqdm.auto import tqdm

from ..images.reading import content_digest, identity, packed_key, patient_of, read_picture
from ..images.volumes import files_of
from .files import CASES, FileSample
from .layouts import Layout
from .rows import cases_of_rows, content_of

PIECE = 1 << 16  # bytes compared at the beginning, middle and end of files before whole files are compared


def check_owner(
    owners: dict[Hashable, tuple[str, str]],
    key: Hashable,
    split: str,
    description: str,
    hint: str = "",
) -> None:
    """Note the split of a key, or raise a `ValueError` if another split has the same key.

    Args:
        owners: first split of each key, and what the key describes there. It is extended in place.
        key: what must be in one split only.
        split: name of the split.
        description: what the key describes in this split.
        hint: end of the message.
    """
    first_split, first_description = owners.setdefault(key, (split, description))
    if first_split != split:
        place = "" if first_description == description else f", as {first_description} in {first_split!r}"
        raise ValueError(f"{description} is in both splits {first_split!r} and {split!r}{place}{hint}.")


def check_disjoint(splits: Mapping[str, list[FileSample]]) -> None:
    """Raise a `ValueError` if two splits share a patient, a case, or a file, also under different names."""
    owners = {}
    for split, samples in splits.items():
        for sample in samples:
            for key, description in keys_of_sample(sample):
                check_owner(owners, key, split, description)


def keys_of_sample(sample: FileSample) -> Iterator[tuple[Hashable, str]]:
    """Yield what must be in one split only, and its description: patient, case and each image file of a sample."""
    for field in CASES:
        if field in sample.fields:
            case = f"{field} {sample.fields[field]}"
            yield case, case
    for path in sample.images:
        yield identity(path), str(path)


def check_patients(splits: Mapping[str, list[FileSample]]) -> None:
    """Raise a `ValueError` if two splits have images of the same patient according to their DICOM tags."""
    hint = (
        ": take the patient out of one of them. If the tag does not identify patients, set allow_shared_images in "
        "`data`"
    )
    owners = {}
    for split, samples in splits.items():
        for sample in samples:
            for path in sample.images:
                patient = patient_of(path)
                if patient is not None:
                    check_owner(owners, patient, split, f"{patient} of {path}", hint)


def check_shared_rows(splits: Mapping[str, Dataset]) -> None:
    """Raise a `ValueError` if two splits of a data set, such as "train[:80%]", share rows, a patient or a case."""
    earlier_ranges: list[tuple[str, str, int, int]] = []
    owners = {}
    for name, rows in splits.items():
        for stored_split, start, end in ranges_of_rows(rows):
            for earlier_name, earlier_split, earlier_start, earlier_end in earlier_ranges:
                if earlier_name == name or earlier_split != stored_split:
                    continue
                first_common_row = max(start, earlier_start)
                common_end = min(end, earlier_end)
                if first_common_row < common_end:
                    raise ValueError(f"Splits {earlier_name!r} and {name!r} share rows of {stored_split!r}.")
            earlier_ranges.append((name, stored_split, start, end))
        for case in set(cases_of_rows(rows) or ()):
            check_owner(owners, case, name, f"The case {case!r}")


def ranges_of_rows(rows: Dataset) -> list[tuple[str, int, int]]:
    """Return the stored split, the first row and the end of each range that the rows of a data set come from."""
    lengths = {split: info.num_examples for split, info in rows.info.splits.items()}
    stated_ranges = ReadInstruction.from_spec(str(rows.split))
    ranges = []
    for stated_range in stated_ranges.to_absolute(lengths):
        stored_split = stated_range.splitname
        start = stated_range.from_ or 0
        end = stated_range.to
        if end is None:
            end = lengths[stored_split]
        ranges.append((stored_split, start, end))
    return ranges


def check_case_splits(layout: Layout, chosen: dict[str, tuple[Path, ...]], held_out: set[Path]) -> None:
    """Raise a `ValueError` that names a case with both chosen and held-out images."""
    held_out_cases = {}
    for path in sorted(held_out):
        case = layout.case(path) if path.exists() else None
        if case is not None:
            held_out_cases[case] = path
    if not held_out_cases:
        return
    for paths in chosen.values():
        for path in paths:
            if path in held_out or not path.exists():
                continue
            case = layout.case(path)
            if case in held_out_cases:
                raise ValueError(
                    f"{case} is in two splits: {path} is used, and {held_out_cases[case]} is held out. A case must be "
                    "in one split only. Select the images with --split_list, or rename them if they are different "
                    "cases."
                )


def leave_out_copies(
    chosen: dict[str, tuple[Path, ...]], held_out: set[Path]
) -> tuple[dict[str, tuple[Path, ...]], list[tuple[Path, Path]]]:
    """Return the chosen images without copies of held-out files, and the pairs of identical files."""
    held_out_files = {}
    for path in tqdm(sorted(held_out), desc="held-out images"):
        digest = file_digest(path)
        if digest is not None:
            held_out_files[digest] = path
    images_without_copies = {}
    copies = []
    for image_id, paths in tqdm(chosen.items(), desc="images"):
        copies_of_image = []
        for path in paths if held_out_files else ():
            original = held_out_files.get(file_digest(path))
            if original is not None:
                copies_of_image.append((path, original))
        copies += copies_of_image
        if not copies_of_image:
            images_without_copies[image_id] = paths
    return images_without_copies, copies


def file_digest(path: Path) -> bytes | None:
    """Return the digest of a file, or `None` if it cannot be read, which is reported with its annotation."""
    try:
        return content_digest(path) if path.exists() else None
    except (OSError, EOFError, zlib.error):
        return None


@dataclass(frozen=True)
class StoredImage:
    """Encoded image of a split.

    Args:
        split: name of the split.
        name: name of the image in errors.
        size: size in bytes, or another number that is equal for equal images.
        open: function that opens the image as a binary file.
    """

    split: str
    name: str
    size: int
    open: Callable[[], BinaryIO]


def images_of_files(splits: Mapping[str, Iterable[FileSample]]) -> Iterator[StoredImage]:
    """Yield the files of splits, with each file of a series, and gzipped NIfTI as its unpacked content."""
    for split, samples in splits.items():
        yielded_paths = set()
        for sample in samples:
            for path in sample.images:
                if path not in yielded_paths:
                    yielded_paths.add(path)
                    yield from stored_files(split, path)


def stored_files(split: str, path: Path) -> Iterator[StoredImage]:
    """Yield the file of an image, or the files of a volume."""
    for file in files_of(path):
        unpack = gzip.open if file.name.lower().endswith(".nii.gz") else open

        def open_file(file=file, unpack=unpack):
            return unpack(file, "rb")

        yield StoredImage(split, str(file), packed_key(file), open_file)


def images_of_rows(splits: Mapping[str, tuple[Dataset, Sequence[str]]]) -> Iterator[StoredImage]:
    """Yield the images of tables, reading only their sizes.

    Args:
        splits: rows with encoded images, and the names of their image columns, by split.
    """
    for split, (rows, columns) in splits.items():
        for column in columns:
            yield from images_of_column(split, rows, column)


def images_of_column(split: str, rows: Dataset, column: str) -> Iterator[StoredImage]:
    """Yield the images of a column, without missing ones and those of which only a URL is stored."""
    index = 0
    stored_column = rows.select_columns([column]).with_format("arrow")
    for batch in stored_column.iter(1000):
        for size, path in sizes_and_paths(batch.column(column)):
            if size is None and path is not None and Path(path).is_file():
                size = Path(path).stat().st_size

            def open_row(index=index):
                row = rows[index]
                return io.BytesIO(content_of(row[column]))

            if size is not None:
                yield StoredImage(split, f"row {index} ({column})", size, open_row)
            index += 1


def sizes_and_paths(column: pa.ChunkedArray) -> Iterator[tuple[int | None, str | None]]:
    """Yield size and path of the encoded images in a column, nothing if it does not store encoded images."""
    for chunk in column.chunks:
        if isinstance(chunk.type, pa.BaseExtensionType):
            chunk = chunk.storage
        if not isinstance(chunk.type, pa.StructType):
            return
        field_names = {field.name for field in chunk.type}
        if field_names != {"bytes", "path"}:
            return
        contents = pc.struct_field(chunk, "bytes")
        sizes = pc.binary_length(contents)
        paths = pc.struct_field(chunk, "path")
        yield from zip(sizes.to_pylist(), paths.to_pylist())


def shared_images(images: Iterable[StoredImage]) -> Iterator[list[StoredImage]]:
    """Yield the images of several splits with identical bytes, as one list for each content.

    Images of one color are ignored, because empty tiles are equal in all splits. Sizes are compared first, then three
    pieces of files of equal size, and then whole files whose pieces are equal.
    """
    groups = [list(images)]
    for key in (lambda image: image.size, digest_of_pieces, digest_of_all):
        smaller_groups = []
        for group in groups:
            smaller_groups += groups_of_several_splits(group, key)
        groups = smaller_groups
    for group in groups:
        if not is_of_one_color(group[0]):
            yield group


def check_no_shared_images(images: Iterable[StoredImage]) -> None:
    """Raise a `ValueError` that names both images if two splits have images with identical bytes."""
    for first, *copies in shared_images(images):
        for copy in copies:
            if copy.split != first.split:
                raise ValueError(
                    f"{copy.name} in split {copy.split!r} is the same image as {first.name} in {first.split!r}: take "
                    "it out of one of them. If these are the published splits, set allow_shared_images in `data`."
                )


def groups_of_several_splits(
    images: Iterable[StoredImage], key: Callable[[StoredImage], Hashable]
) -> list[list[StoredImage]]:
    """Return the groups of images with equal keys that are in more than one split."""
    groups: dict[Hashable, list[StoredImage]] = defaultdict(list)
    for image in images:
        groups[key(image)].append(image)
    groups_across_splits = []
    for group in groups.values():
        splits = {image.split for image in group}
        if len(splits) > 1:
            groups_across_splits.append(group)
    return groups_across_splits


def digest_of_pieces(image: StoredImage) -> bytes:
    """Return the digest of the beginning, the middle and the end of a file."""
    digest = hashlib.blake2b()
    with image.open() as file:
        size = file.seek(0, io.SEEK_END)
        middle_start = max(size // 2 - PIECE // 2, 0)
        last_start = max(size - PIECE, 0)
        for start in sorted({0, middle_start, last_start}):
            file.seek(start)
            digest.update(file.read(PIECE))
    return digest.digest()


def digest_of_all(image: StoredImage) -> bytes:
    with image.open() as file:
        return hashlib.file_digest(file, hashlib.blake2b).digest()


def is_of_one_color(image: StoredImage) -> bool:
    with image.open() as file:
        content = file.read()
    try:
        pixels = np.asarray(read_picture(content))
    except Exception:  # a volume, or a broken file, which causes an error when it is read for training
        return False
    pixels = pixels.reshape(pixels.shape[0] * pixels.shape[1], -1)
    return bool((pixels == pixels[0]).all())
