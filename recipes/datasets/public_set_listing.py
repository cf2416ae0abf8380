"""What is printed about public data sets: all of them, one of them, and what was made of it."""

import sys
import textwrap
from pathlib import Path

import yaml

from modeling_vitp.recipes.datasets.public_set import PublicSet
from modeling_vitp.recipes.datasets.public_set_rows import Made, load_public_set, public_set_names

NAMED = 20  # of what cannot be used; all of it is in a file


def list_sets() -> None:
    """A line for each set of the package."""
    sets = {name: load_public_set(name) for name in public_set_names()}
    for name, kind in sets.items():
        rows = "" if kind.paper_rows is None else f"{kind.paper_rows:,}"
        print(f"{name:<{max(map(len, sets))}}  {rows:>9} rows  {kind.license}: {kind.obtain}")


def describe(kind: type[PublicSet], name: str) -> None:
    """What is read of a set, and where it can be had."""
    splits = " and ".join(kind.splits)
    print(f"{kind.title}\nlicense: {kind.license}\nobtain: {kind.obtain}\ntrained on: {splits}\nlayout ({kind.seen}):")
    print(textwrap.indent(textwrap.dedent(kind.layout).strip(), "  "))
    print(f"then: vitp make_public_set {name} DATA_DIR")
    warn(kind)


def print_result(kind: type[PublicSet], made: Made) -> None:
    """What was made, what was not and why, how that compares to the paper, and the mixture of it."""
    for line in made.unused[:NAMED]:
        print(f"not used: {line}", file=sys.stderr)
    if made.unused:
        print(f"{len(made.unused):,} not used, all in {made.listed}", file=sys.stderr)
    if made.held_out:
        print(f"{made.held_out:,} left out: of a split that is held out, or about an image that is also in one")
    print(f"{made.annotation}: {compared(kind, made.rows)}")
    print(f"{write_mixture(kind, made)}: the same as a mixture, whose source can be copied into others")
    warn(kind)


def warn(kind: type[PublicSet]) -> None:
    if kind.caution:
        print(f"Caution: {kind.caution}")


def write_mixture(kind: type[PublicSet], made: Made) -> Path:
    """`NAME.yaml`, a mixture of the set alone, with where it comes from."""
    source = {"name": made.annotation.stem, "annotation": str(made.annotation), "image_root": str(made.image_root)}
    source |= {"rows": made.rows, "tasks": list(kind.tasks), "obtain": kind.obtain}
    source |= {"general": True} if kind.general else {"modality": list(kind.modality)}
    path = made.annotation.with_suffix(".yaml")
    text = yaml.safe_dump({"sources": [source]}, sort_keys=False, allow_unicode=True)
    path.write_text(f"# {kind.title}\n# license: {kind.license}\n{text}", encoding="utf-8")
    return path


def compared(kind: type[PublicSet], rows: int) -> str:
    """How many rows there are beside those of the paper's table and of the released mixture, in a line."""
    said = [f"{rows:,} rows"]
    for expected, where in ((kind.paper_rows, "the paper's table"), (kind.released_rows, "the released mixture")):
        if expected is not None:
            said.append(f"{where} has {expected:,}, a difference of {rows - expected:+,}")
    if kind.paper_rows is not None and not 0.9 < rows / kind.paper_rows < 1.1:
        said.append(f"with {kind.paper_rows / rows:.3g} times the paper's rate it has its share of that mixture")
    return "; ".join(said)
