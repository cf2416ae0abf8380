"""The card of a data set that `make_instructions.py` made."""

import argparse
from collections import Counter

from ...cards.sections import portable_command, set_metadata, set_section, table
from .asking import Asked
from .collages import Collage
from .storage import split_of, stored_split

INTRODUCTION = """
Conversations about images, made from the annotation of {root} by `recipes/make_instructions.py`. Every answer
follows from the annotation, which is taken to be complete: what is not annotated in an image is not there. Boxes are
integers on a grid of 0 to 1000 over the width and height of the image, `[x1, y1, x2, y2]`; the largest, smallest,
leftmost … of several is asked for only where it is so by a margin. To each class, yes and no are the answer equally
often. Columns: `id`, `images`, `messages`.
"""


def write_card(args: argparse.Namespace, asked: Asked) -> None:
    """Writes the folder's README.md: metadata for all splits that it has, and the section of the split just made."""
    card = args.output_dir / "README.md"
    splits = sorted({split_of(path) for path in args.output_dir.glob("*-[0-9]*.parquet")})
    set_metadata(
        card,
        title=f"Instructions from {args.root.name}",
        text=INTRODUCTION.format(root=args.root.name),
        license=args.license,
        task_categories=["visual-question-answering", "image-text-to-text"],
        tags=["vitp", "instruction-tuning"],
        configs=[
            {
                "config_name": "default",
                "data_files": [{"split": split, "path": f"{split}-*.parquet"} for split in splits],
            }
        ],
    )
    set_section(card, f"Split `{stored_split(args.split)}`", describe_split(args, asked))


def describe_split(args: argparse.Namespace, asked: Asked) -> str:
    images, num_rows = asked.images, len(asked.rows)
    exchanges = [exchange for conversation in asked.conversations for exchange in conversation]
    by_kind = Counter(exchange.kind for exchange in exchanges)
    examples = {exchange.kind: exchange for exchange in reversed(exchanges)}
    yes = sum(exchange.answer == "yes" for exchange in exchanges if exchange.kind == "presence")
    num_collages = sum(isinstance(image, Collage) for image in images)
    made_of = f"{len(images) - num_collages} {'windows' if args.window else 'images'}"
    made_of += f" and {num_collages} collages of pieces of them" if num_collages else ""
    lines = [
        f"{num_rows} rows with {len(exchanges)} questions. Of {made_of}, "
        f"{len(images) - num_rows} have no question. Presence: {yes} times yes, {by_kind['presence'] - yes} times no.",
        f"{len(asked.copies)} files were left out because held-out images are the same to the byte.",
        table(
            ["kind", "questions", "for example", "answer"],
            [
                [kind, by_kind[kind], *map(shown, (examples[kind].question, examples[kind].answer))]
                for kind in args.kinds
                if kind in examples
            ],
        ),
        f"Classes, with the number of images that have them: "
        f"{', '.join(f'{label} {count}' for label, count in asked.vocabulary.most_common())}.",
        f"```bash\n{command(args)}\n```",
    ]
    return "\n\n".join(lines)


def shown(text: str, length: int = 100) -> str:
    """A text as it is, its tags visible; cut if it is long."""
    return f"`{text if len(text) <= length else text[:length] + ' …'}`"


def command(args: argparse.Namespace) -> str:
    """The command that makes the split again."""
    words = [args.layout, str(args.root)]
    for name, value in vars(args).items():
        if name not in ("layout", "root", "push_to_hub", "merge") and value is not None:
            words += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    return portable_command("make_instructions", words)
