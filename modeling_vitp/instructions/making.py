"""Instructions about labeled images that are made once and stored; others are drawn while training."""

from pathlib import Path

from ..command.paths import Shard
from .arguments import AnnotationOptions
from .from_annotations.labels import describe_default_names, open_layout
from .from_annotations.pipeline import build_instructions, check_options, check_output
from .from_annotations.questions import PHRASINGS
from .from_annotations.storage import check_shards, encode_rows, save_rows, stored_split, write_card


def kinds_of_questions(subject: str) -> list[str]:
    """Return the kinds of questions about a subject of labels, an attribute of their layout."""
    return list(PHRASINGS[subject])


def make_instructions(
    root: str | Path,
    output_dir: str | Path,
    options: AnnotationOptions | None = None,
    seed: int = 0,
    license: str | None = None,
    shard: Shard | None = None,
    merge: int | None = None,
    command: str | None = None,
) -> None:
    """Make conversations about labeled images, and store them as Parquet with a card.

    Args:
        root: folder of the labeled images.
        output_dir: output folder, which may have other splits of the same labels.
        options: options of the questions, by default those of the class.
        seed: seed of the questions.
        license: license of images and labels, for the card.
        shard: part of the rows that is written, without a card.
        merge: number of finished shards, for which the card is written.
        command: command that makes them again, for the card.

    Raises:
        ValueError: if the labels cannot be read, or do not answer the questions.
    """
    options = options or AnnotationOptions()
    output_dir = Path(output_dir)
    layout = open_layout(root, options)
    check_options(layout, options)
    check_output(Path(root), output_dir)
    names = describe_default_names(layout)
    if names is not None:
        print(names)
    made = build_instructions(layout, options, seed)
    split = stored_split(options.split)
    if shard is not None:
        rows_of_shard = [made.rows[index] for index in shard.part(len(made.rows))]
        save_rows(encode_rows(rows_of_shard), output_dir, split, shard)
        print(
            f"Shard {shard}: {len(rows_of_shard)} of {len(made.rows)} rows in {output_dir}. When all shards are "
            f"finished, run the same command with --merge {shard.count} instead of --shard."
        )
        return
    if merge is not None:
        check_shards(output_dir, split, merge, len(made.rows))
    else:
        save_rows(encode_rows(made.rows), output_dir, split)
    write_card(output_dir, layout, options, made, license, command)
    questions = sum(map(len, made.conversations))
    print(f"{len(made.rows)} rows and {questions} questions are in {output_dir}, see README.md there.")
