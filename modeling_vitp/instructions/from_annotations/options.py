"""What the options of `make_instructions` need of each other."""

import argparse
from typing import Any

from .layouts import LAYOUTS
from .wording import PHRASINGS

OF_VOLUMES = ("plane", "intensities", "percentiles")


def mistake(args: argparse.Namespace) -> str | None:
    """What is wrong with the options, if anything is."""
    subject, possible = LAYOUTS[args.layout].subject, PHRASINGS[LAYOUTS[args.layout].subject]
    unknown = set(args.kinds or ()) - possible.keys()
    foreign = [name for name in OF_VOLUMES if getattr(args, name) is not None and args.layout != "volumes"]
    if unknown:
        return f"{args.layout} cannot answer {', '.join(sorted(unknown))}, only {', '.join(possible)}."
    if args.window is not None and subject != "objects":
        return "--window needs annotated boxes: coco, voc or dota."
    if args.collages and subject not in ("objects", "regions"):
        return "--collages needs annotated boxes or masks: coco, voc, dota, masks or volumes."
    if args.window is not None and args.overlap >= args.window:
        return f"--overlap {args.overlap} is not below --window {args.window}."
    return f"--{foreign[0]} is for volumes." if foreign else None


def layout_options(args: argparse.Namespace) -> dict[str, Any]:
    """The options that the layout itself takes."""
    given = {name: getattr(args, name) for name in OF_VOLUMES} if args.layout == "volumes" else {}
    return {name: value for name, value in given.items() if value is not None}
