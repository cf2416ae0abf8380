"""From the options of `make_instructions` to the images of a data set with the questions about each."""

import argparse
import sys
import zlib
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path

from tqdm.auto import tqdm

from ...images.reading import below, content_digest
from .annotations import AnnotatedImage
from .collages import draw_collages
from .formats import read_annotation, read_list
from .layouts import LAYOUTS, Layout
from .questions import PHRASINGS, Asker, Exchange, make_conversations
from .windows import windows_of

VOLUME_OPTIONS = ("plane", "intensities", "percentiles")


@dataclass
class Instructions:
    """Images with questions about them.

    Args:
        images: all images, windows and collages, also those about which nothing is asked.
        conversations: the questions about each.
        vocabulary: class -> number of images that have it.
        copies: files that are left out, with the held-out file that is the same.
    """

    images: list[AnnotatedImage]
    conversations: list[list[Exchange]]
    vocabulary: Counter
    copies: list[tuple[Path, Path]]

    @property
    def rows(self) -> list[tuple[AnnotatedImage, list[Exchange]]]:
        """The images about which something is asked, with the questions."""
        return [(image, asked) for image, asked in zip(self.images, self.conversations) if asked]


def option_error(args: argparse.Namespace) -> str | None:
    """Return what is wrong with the options of `make_instructions`, if anything is."""
    subject = LAYOUTS[args.layout].subject
    unknown = set(args.kinds or ()) - PHRASINGS[subject].keys()
    for_volumes = [name for name in VOLUME_OPTIONS if getattr(args, name) is not None and args.layout != "volumes"]
    if unknown:
        return f"{args.layout} cannot answer {', '.join(sorted(unknown))}, only {', '.join(PHRASINGS[subject])}."
    if args.window is not None and subject != "objects":
        return "--window needs annotated boxes: coco, voc or dota."
    if args.collages and subject not in ("objects", "regions"):
        return "--collages needs annotated boxes or masks: coco, voc, dota, masks or volumes."
    if args.window is not None and args.overlap >= args.window:
        return f"--overlap {args.overlap} is not below --window {args.window}."
    return f"--{for_volumes[0]} is for volumes." if for_volumes else None


def build_instructions(args: argparse.Namespace) -> Instructions:
    """Read the annotations of a split and ask about its images. The pixels of the images are not read.

    Raises:
        ValueError: if there are no images, their annotation cannot be used, or nothing can be asked.
    """
    names = read_annotation(args.names) if args.names else None
    options = {name: getattr(args, name) for name in VOLUME_OPTIONS if getattr(args, name) is not None}
    layout = LAYOUTS[args.layout](args.root, names, args.annotations, **options)
    chosen, held_out = choose_split(layout, args.split, read_list(args.split_list) if args.split_list else None)
    check_case_splits(layout, chosen, held_out)
    chosen, copies = leave_out_copies(chosen, held_out)
    for path, other in copies:
        print(f"{path} is left out: the same file as the held-out {other}.", file=sys.stderr)

    scenes = images = annotate_all(layout, chosen, args.on_error)
    if args.window is not None:
        images = [window for image in images for window in windows_of(image, args.window, args.overlap)]
    number = round(args.collages * len(images))
    images = images + draw_collages(scenes, number, args.collage_size, args.collage_grid, args.seed)
    vocabulary = Counter(label for image in images for label in sorted(image.classes))
    asker = Asker(layout.subject, vocabulary, args.max_boxes, args.map_side, args.seed)
    conversations = make_conversations(images, asker, args.kinds, args.turns)
    if not any(conversations):
        raise ValueError(f"The annotation of {args.root} answers no question of the kinds {', '.join(args.kinds)}.")
    return Instructions(images, conversations, vocabulary, copies)


def choose_split(
    layout: Layout, split: str, listed: list[str] | None = None
) -> tuple[dict[str, tuple[Path, ...]], set[Path]]:
    """Return the images of a split, id -> files, and the files of those that are held out from it.

    Held out are the test split of the layout and, unless `split` contains it, the validation split; an image that is in
    `split` too is held out all the same. With `listed` (ids, file names, or file names without suffix) only those
    images are chosen, and all others of the layout are held out.

    Raises:
        ValueError: if the layout has no such split, or no image of a listed name, or several.
    """
    splits = layout.splits()
    if listed is not None:
        chosen = choose_listed(layout, [splits[split]] if splits.get(split) else [*splits.values()], listed)
        taken = {path for paths in chosen.values() for path in paths}
        others = [paths for images in splits.values() for paths in images.values() if taken.isdisjoint(paths)]
    elif split in splits:
        chosen = splits[split]
        names = {"train": ("val", "test"), "test": ()}.get(split, ("test",))
        others = [paths for name in names for paths in splits.get(name, {}).values()]
    else:
        raise ValueError(
            f"{layout.root} shows no split {split!r}, only {sorted(splits)}. Give one of them, or name the images that "
            "may be used in a file: --split_list."
        )
    return chosen, {path for paths in others for path in paths}


def choose_listed(
    layout: Layout, splits: list[dict[str, tuple[Path, ...]]], listed: list[str]
) -> dict[str, tuple[Path, ...]]:
    """Return the images of a list, by their ids, otherwise by their file names with or without suffix."""
    by_id, by_name = defaultdict(list), defaultdict(list)
    for images in splits:
        for key, paths in images.items():
            by_id[key].append((key, paths))
            for name in {paths[0].stem, paths[0].name}:
                by_name[name].append((key, paths))
    found = {name: by_id.get(name) or by_name.get(name, []) for name in listed}
    missing = [name for name, images in found.items() if not images]
    if missing:
        raise ValueError(f"{len(missing)} of {len(listed)} listed images are not in {layout.root}: {missing[0]}, …")
    for name, images in found.items():
        if len(images) > 1:
            raise ValueError(
                f"{name} of the list could be {images[0][1][0]} or {images[1][1][0]}: list ids, here "
                f"{images[0][0]!r} and {images[1][0]!r}, or give the --split."
            )
    return dict(image for (image,) in found.values())


def check_case_splits(layout: Layout, chosen: dict[str, tuple[Path, ...]], held_out: set[Path]) -> None:
    """Raise a `ValueError` that names a case of which images are chosen and others held out."""
    known = {layout.case(path): path for path in sorted(held_out) if path.exists()}
    known.pop(None, None)
    for path in (path for paths in chosen.values() for path in paths if known and path not in held_out):
        case = layout.case(path) if path.exists() else None
        if case in known:
            raise ValueError(
                f"{case} is in two splits: {path} is to be used, and {known[case]} is held out. A case may be in one "
                "only; choose by --split_list, or give a name of its own to what is another case."
            )


def leave_out_copies(
    chosen: dict[str, tuple[Path, ...]], held_out: set[Path]
) -> tuple[dict[str, tuple[Path, ...]], list[tuple[Path, Path]]]:
    """Return the chosen images without those of which a file equals a held-out one, and the pairs of equal files."""
    known = {file_digest(path): path for path in tqdm(sorted(held_out), desc="held-out images")}
    known.pop(None, None)
    kept, copies = {}, []
    for image_id, paths in tqdm(chosen.items(), desc="images"):
        found = [(path, known[digest]) for path in paths if known and (digest := file_digest(path)) in known]
        copies += found
        if not found:
            kept[image_id] = paths
    return kept, copies


def file_digest(path: Path) -> bytes | None:
    """Return the digest of a file, `None` if it cannot be read: that is reported where its annotation is read."""
    try:
        return content_digest(path) if path.exists() else None
    except (OSError, EOFError, zlib.error):
        return None


def annotate_all(layout: Layout, chosen: dict[str, tuple[Path, ...]], on_error: str = "raise") -> list[AnnotatedImage]:
    """Read the annotations of all images.

    Args:
        on_error: "raise" stops at the first that cannot be used; "skip" leaves the image out and says so.

    Raises:
        ValueError: names the image or the file of its annotation; also if none is left. An image that is not below the
            layout's root, wherever its name or a link leads, is not read.
    """
    images = []
    for image_id, paths in tqdm(chosen.items(), desc="annotations"):
        try:
            for path in paths:
                below(layout.root, path)
            images += layout.annotate(image_id, paths)
        except Exception as error:  # of many kinds, where a file holds other things than it should
            message = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
            if str(layout.root) not in message and str(layout.annotations) not in message:
                message = f"{paths[0]}: its annotation cannot be read: {message}"
            if on_error == "raise":
                raise ValueError(message) from error
            print(f"{image_id} is left out: {message}", file=sys.stderr)
    if not images:
        raise ValueError(f"No image of {layout.root} has an annotation that can be read.")
    return images
