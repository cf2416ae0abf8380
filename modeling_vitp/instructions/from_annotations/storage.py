"""Storage of instruction rows as Parquet files with a data card, in a folder for `load_dataset`."""

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
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


def encode_rows(asked: Sequence[tuple[AnnotatedImage, list[Exchange]]]) -> Iterator[dict]:
    """Yield the rows of conversations, with encoded images. Consecutive collages are encoded together."""

    def encode() -> Iterator[list[dict]]:
        for are_collages, images in groupby((image for image, _ in asked), lambda image: isinstance(image, Collage)):
            encode_all = encode_collages if are_collages else partial(map, image_bytes)
            yield from encode_all(images)

    for (image, conversation), encoded in zip(tqdm(asked, desc="rows"), encode()):
        messages = [message for exchange in conversation for message in exchange.messages]
        yield {"id": image.id, "images": encoded, "messages": messages}


def save_rows(
    rows: Iterable[dict], folder: Path, split: str, shard: Shard | None = None, file_bytes: int = FILE_BYTES
) -> list[Path]:
    """Write rows to `SPLIT-00000.parquet`, …, which replace the files of this split. One file is in memory at a time.

    Args:
        rows: rows of the split or the shard, whose images are `{"bytes", "path"}`.
        shard: shard of the rows. The files of other shards of the same division are kept.
        file_bytes: size of the images, in bytes, at which a new file is started.
    """
    folder.mkdir(parents=True, exist_ok=True)
    kept = (
        {shard_stem(split, other) for other in Shard.all_of(shard.count)} - {shard_stem(split, shard)} if shard else ()
    )
    for path in folder.glob(f"{split}-[0-9]*.parquet"):
        if path.stem.rpartition("-")[0] not in kept:
            path.unlink(missing_ok=True)
    files, pending, size = [], [], 0

    def flush():
        files.append(folder / f"{shard_stem(split, shard)}-{len(files):05d}.parquet")
        Dataset.from_list(pending, features=FEATURES).to_parquet(files[-1])

    for row in rows:
        pending.append(row)
        size += sum(len(image["bytes"]) for image in row["images"])
        if size >= file_bytes:
            flush()
            pending, size = [], 0
    if pending:
        flush()
    return files


def check_shards(folder: Path, split: str, count: int, num_rows: int) -> None:
    """Raise a `ValueError` that names the first shard whose number of rows in the folder is wrong."""
    for shard in Shard.all_of(count):
        files = folder.glob(f"{shard_stem(split, shard)}-*.parquet")
        found, wanted = sum(pyarrow.parquet.read_metadata(path).num_rows for path in files), len(shard.part(num_rows))
        if found != wanted:
            raise ValueError(
                f"Expected {wanted} rows of shard {shard} in {folder}, found {found}. Run --shard {shard} again."
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
    files = output_dir.glob("*-[0-9]*.parquet")
    splits = sorted({re.sub(r"(-\d+-of-\d+)?-\d+$", "", path.stem) for path in files})
    data_files = [{"split": split, "path": f"{split}-*.parquet"} for split in splits]
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


def describe_split(layout: Layout, options: AnnotationOptions, made: Instructions) -> str:
    """Return what a split has: rows, questions of each kind with an example, and classes."""
    images, num_rows = made.images, len(made.rows)
    exchanges = [exchange for conversation in made.conversations for exchange in conversation]
    by_kind = Counter(exchange.kind for exchange in exchanges)
    examples = {exchange.kind: exchange for exchange in reversed(exchanges)}
    yes = sum(exchange.answer == "yes" for exchange in exchanges if exchange.kind == "presence")
    num_collages = sum(isinstance(image, Collage) for image in images)
    made_of = f"{len(images) - num_collages} {'windows' if options.window else 'images'}"
    made_of += f" and {num_collages} collages of crops" if num_collages else ""

    def shown(text: str) -> str:  # Code formatting keeps tags visible in Markdown.
        return f"`{text if len(text) <= 100 else text[:100] + ' …'}`"

    rows = []
    for kind in options.kinds or PHRASINGS[layout.subject]:
        if kind in examples:
            rows.append([kind, by_kind[kind], shown(examples[kind].question), shown(examples[kind].answer)])
    lines = [
        f"{num_rows} rows with {len(exchanges)} questions, from {made_of}, of which "
        f"{len(images) - num_rows} have no question. Presence: {yes} times yes, {by_kind['presence'] - yes} times no.",
        f"{len(made.copies)} files were excluded because they are identical to held-out images.",
        table(["kind", "questions", "for example", "answer"], rows),
        f"Classes, with the number of images that have them: "
        f"{', '.join(f'{label} {count}' for label, count in made.vocabulary.most_common())}.",
    ]
    return "\n\n".join(lines)
