"""Storage of instruction rows as Parquet files with a data card, in a folder for `load_dataset`."""

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby
from pathlib import Path

import pyarrow.parquet
from datasets import Dataset, Features, Image, List, Value
from tqdm.auto import tqdm

from ...cards.sections import set_metadata, set_section, table
from ...command.paths import Shard
from ...data.annotations import AnnotatedImage
from ...data.folders import UNSPLIT
from ...data.layouts import Layout
from ..arguments import AnnotationOptions
from .collages import Collage, encode_collages
from .drawing import messages_of
from .encoding import image_bytes
from .pipeline import Instructions
from .questions import PHRASINGS, Exchange

FEATURES = Features(
    {
        "id": Value("string"),
        "images": List(Image()),
        "messages": List({"role": Value("string"), "content": Value("string")}),
    }
)
FILE_BYTES = 400 * 2**20
INTRODUCTION = """
Conversations about images, created from the annotation of {root} by `recipes/make_instructions.py`. All answers
follow from the annotation, which is assumed to be complete: objects without an annotation do not occur in the image.
Boxes are integers on a grid of 0 to 1000 over the width and height of the image, `[x1, y1, x2, y2]`. Questions about
the largest, smallest, leftmost … of several objects require a margin. For each class, yes and no are equally frequent.
Columns: `id`, `images`, `messages`.
"""


def stored_split(split: str) -> str:
    """Return the name of a split in the Parquet files; the split of a data set without splits is `train`."""
    return "train" if split == UNSPLIT else split


def shard_stem(split: str, shard: Shard | None) -> str:
    """Return the prefix of the file names of a split or a shard; the order of the names is that of the rows."""
    return split if shard is None else f"{split}-{shard.number:05d}-of-{shard.count:05d}"


def encode_rows(instructions: Sequence[tuple[AnnotatedImage, list[Exchange]]]) -> Iterator[dict]:
    """Yield the rows of conversations, with encoded images. Consecutive collages are encoded together."""
    encoded_images = encode_images([image for image, _ in instructions])
    for (image, conversation), files in zip(tqdm(instructions, desc="rows"), encoded_images):
        yield {
            "id": image.id,
            "images": files,
            "messages": messages_of(conversation),
        }


def encode_images(images: Sequence[AnnotatedImage]) -> Iterator[list[dict]]:
    """Yield the encoded files of each image, see [`image_bytes`] and [`encode_collages`]."""
    for are_collages, group in groupby(images, lambda image: isinstance(image, Collage)):
        if are_collages:
            yield from encode_collages(group)
        else:
            yield from map(image_bytes, group)


def save_rows(
    rows: Iterable[dict],
    folder: Path,
    split: str,
    shard: Shard | None = None,
    file_bytes: int = FILE_BYTES,
) -> list[Path]:
    """Write rows to `SPLIT-00000.parquet`, …, which replace the files of this split. One file is in memory at a time.

    Args:
        rows: rows of the split or the shard, whose images are `{"bytes", "path"}`.
        shard: shard of the rows. The files of other shards of the same division are kept.
        file_bytes: size of the images, in bytes, at which a new file is started.
    """
    folder.mkdir(parents=True, exist_ok=True)
    remove_stored_files(folder, split, shard)
    files = []
    for rows_of_file in group_by_size(rows, file_bytes):
        file = folder / f"{shard_stem(split, shard)}-{len(files):05d}.parquet"
        Dataset.from_list(rows_of_file, features=FEATURES).to_parquet(file)
        files.append(file)
    return files


def remove_stored_files(folder: Path, split: str, shard: Shard | None) -> None:
    """Remove the files of a split, except those of the other shards of the same division."""
    stems_of_other_shards = set()
    if shard is not None:
        stems_of_other_shards = {shard_stem(split, peer) for peer in Shard.all_of(shard.count)}
        stems_of_other_shards.remove(shard_stem(split, shard))
    for path in folder.glob(f"{split}-[0-9]*.parquet"):
        stem, _, _ = path.stem.rpartition("-")
        if stem not in stems_of_other_shards:
            path.unlink(missing_ok=True)


def group_by_size(rows: Iterable[dict], file_bytes: int) -> Iterator[list[dict]]:
    """Yield consecutive rows whose images have together at least `file_bytes` bytes, and then the remaining rows."""
    group = []
    size = 0
    for row in rows:
        group.append(row)
        size += sum(len(image["bytes"]) for image in row["images"])
        if size >= file_bytes:
            yield group
            group = []
            size = 0
    if group:
        yield group


def check_shards(folder: Path, split: str, count: int, num_rows: int) -> None:
    """Raise a `ValueError` that names the first shard whose number of rows in the folder is wrong."""
    for shard in Shard.all_of(count):
        num_stored = 0
        for path in folder.glob(f"{shard_stem(split, shard)}-*.parquet"):
            num_stored += pyarrow.parquet.read_metadata(path).num_rows
        num_expected = len(shard.part(num_rows))
        if num_stored != num_expected:
            raise ValueError(
                f"Expected {num_expected} rows of shard {shard} in {folder}, found {num_stored}. Run --shard {shard} "
                "again."
            )


def write_card(
    output_dir: Path,
    layout: Layout,
    options: AnnotationOptions,
    made: Instructions,
    license: str | None = None,
    command: str | None = None,
) -> None:
    """Write the README.md of the folder: metadata of all splits in it, and a section about the new split."""
    card = output_dir / "README.md"
    data_files = []
    for split in stored_splits(output_dir):
        data_files.append({"split": split, "path": f"{split}-*.parquet"})
    name = layout.root.name
    set_metadata(
        card,
        title=f"Instructions from {name}",
        text=INTRODUCTION.format(root=name),
        license=license,
        task_categories=["visual-question-answering", "image-text-to-text"],
        tags=["vitp", "instruction-tuning"],
        configs=[{"config_name": "default", "data_files": data_files}],
    )
    section = describe_split(layout, options, made)
    if command is not None:
        section += f"\n\n```bash\n{command}\n```"
    set_section(card, f"Split `{stored_split(options.split)}`", section)


def stored_splits(folder: Path) -> list[str]:
    """Return the sorted names of the splits whose Parquet files are in a folder."""
    splits = set()
    for path in folder.glob("*-[0-9]*.parquet"):
        splits.add(re.sub(r"(-\d+-of-\d+)?-\d+$", "", path.stem))
    return sorted(splits)


def describe_split(layout: Layout, options: AnnotationOptions, made: Instructions) -> str:
    """Return what a split has: rows, questions of each kind with an example, and classes."""
    num_images = len(made.images)
    num_rows = len(made.rows)
    num_collages = sum(isinstance(image, Collage) for image in made.images)
    exchanges = []
    for conversation in made.conversations:
        exchanges += conversation
    num_yes = sum(exchange.answer == "yes" for exchange in exchanges if exchange.kind == "presence")
    num_no = sum(exchange.kind == "presence" for exchange in exchanges) - num_yes

    sources = f"{num_images - num_collages} {'windows' if options.window else 'images'}"
    if num_collages > 0:
        sources += f" and {num_collages} collages of crops"
    classes = ", ".join(f"{label} {count}" for label, count in made.vocabulary.most_common())
    kinds = options.kinds or PHRASINGS[layout.subject]
    paragraphs = [
        f"{num_rows} rows with {len(exchanges)} questions, from {sources}, of which {num_images - num_rows} have no "
        f"question. Presence: {num_yes} times yes, {num_no} times no.",
        f"{len(made.copies)} files were excluded because they are identical to held-out images.",
        table(["kind", "questions", "for example", "answer"], rows_of_kinds(kinds, exchanges)),
        f"Classes, with the number of images that have them: {classes}.",
    ]
    return "\n\n".join(paragraphs)


def rows_of_kinds(kinds: Iterable[str], exchanges: Sequence[Exchange]) -> list[list]:
    """Return a row of each kind that is asked: kind, number of questions, and the first question with its answer."""
    counts = Counter(exchange.kind for exchange in exchanges)
    examples = {}
    for exchange in exchanges:
        examples.setdefault(exchange.kind, exchange)
    rows = []
    for kind in kinds:
        if kind in examples:
            question = as_code(examples[kind].question)
            answer = as_code(examples[kind].answer)
            rows.append([kind, counts[kind], question, answer])
    return rows


def as_code(text: str) -> str:
    """Return the beginning of a text in the format of code, in which Markdown shows tags."""
    if len(text) > 100:
        text = f"{text[:100]} …"
    return f"`{text}`"
