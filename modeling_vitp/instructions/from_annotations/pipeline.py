"""Pipeline of `make_instructions`: from its options to annotated images with questions."""

import argparse
import os
import re
import sys
import zlib
from collections import Counter, defaultdict
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from ...images.reading import below, content_digest
from .annotations import AnnotatedImage
from .collages import draw_collages
from .formats import read_annotation, read_list
from .layouts import LAYOUTS, Layout, recognize_layout
from .questions import PHRASINGS, Asker, Exchange, make_conversations, vocabulary_of
from .windows import windows_of

VOLUME_OPTIONS = ("plane", "intensities", "percentiles")
LAYOUT_OPTIONS = (*VOLUME_OPTIONS, "class_property")
OWN_FILE = re.compile(r"\..*|README\.md|.+-\d{5}\.parquet")  # in the output folder; hidden files are ignored


@dataclass
class Instructions:
    """Images with questions about them.

    Args:
        images: all images, windows and collages, including those without questions.
        conversations: questions about each image.
        vocabulary: number of images of each class.
        copies: excluded files, each with the identical held-out file.
    """

    images: list[AnnotatedImage]
    conversations: list[list[Exchange]]
    vocabulary: Counter
    copies: list[tuple[Path, Path]]

    @property
    def rows(self) -> list[tuple[AnnotatedImage, list[Exchange]]]:
        """Images that have questions, with their questions."""
        return [(image, asked) for image, asked in zip(self.images, self.conversations) if asked]


def option_error(args: argparse.Namespace) -> str | None:
    """Return an error message if the options of `make_instructions` are invalid, or `None`."""
    subject = LAYOUTS[args.layout].subject
    unknown = set(args.kinds or ()) - PHRASINGS[subject].keys()
    for_volumes = [name for name in VOLUME_OPTIONS if getattr(args, name) is not None and args.layout != "volumes"]
    if unknown:
        return f"Unknown kinds for {args.layout}: {', '.join(sorted(unknown))}. Known: {', '.join(PHRASINGS[subject])}."
    if args.window is not None and subject != "objects":
        return f"--window needs annotated boxes: {layouts_about('objects')}."
    if args.collages and subject not in ("objects", "regions"):
        return f"--collages needs annotated boxes or masks: {layouts_about('objects', 'regions')}."
    if args.window is not None and args.overlap >= args.window:
        return f"--overlap must be below --window {args.window}, got {args.overlap}."
    if for_volumes:
        return f"--{for_volumes[0]} needs the layout volumes."
    if args.class_property is not None and args.layout != "geojson":
        return "--class_property needs the layout geojson."
    if args.layout == "volumes" and args.intensities is None and args.percentiles is None:
        return "Volumes need --intensities LOW HIGH, or --percentiles LOW HIGH: the values shown as black and white."
    root, output_dir = args.root.resolve(), args.output_dir.resolve()
    if root in (output_dir, *output_dir.parents) or output_dir in root.parents:
        return f"--output_dir {args.output_dir} and the data set {args.root} overlap. Set another output folder."
    foreign = sorted(path.name for path in output_dir.glob("*") if not OWN_FILE.fullmatch(path.name))
    if foreign:
        return f"--output_dir {args.output_dir} has other files, such as {foreign[0]}. Set a new folder."
    return None


def layouts_about(*subjects: str) -> str:
    return ", ".join(name for name, layout in LAYOUTS.items() if layout.subject in subjects)


@dataclass
class LabeledImages:
    """Labeled images of a split.

    Args:
        layout: layout of the labels.
        images: images with their labels.
        copies: excluded files, each with the identical held-out file.
    """

    layout: Layout
    images: list[AnnotatedImage]
    copies: list[tuple[Path, Path]]


def read_labeled_images(root: Path, args: Any, split: str, split_list: Path | None = None) -> LabeledImages:
    """Read the labels of a split. The pixels of the images are not read, but those of masks are.

    Args:
        root: folder of the labeled images.
        args: options `layout`, `names` (a mapping, or a JSON file), `annotations`, `on_error` and `LAYOUT_OPTIONS`.
        split: split of the images, see [`choose_split`].
        split_list: file with the names of the images to read, one per line; all images of the split if `None`.

    Raises:
        ValueError: If no images are found, or a label is invalid.
    """
    names = read_annotation(args.names) if isinstance(args.names, Path) else args.names
    options = {name: getattr(args, name) for name in LAYOUT_OPTIONS if getattr(args, name) is not None}
    found = recognize_layout(root) if args.layout == "folders" else None
    if found not in (None, "folders"):
        raise ValueError(
            f"{root} has the layout {found!r}, whose folders are not classes. Run vitp make_instructions {found}."
        )
    layout = LAYOUTS[args.layout](root, names, args.annotations, **options)
    listed = read_list(split_list) if split_list else None
    if listed == []:
        raise ValueError(f"Expected the name of an image in each line of {split_list}, found no name.")
    chosen, held_out = choose_split(layout, split, listed)
    check_case_splits(layout, chosen, held_out)
    chosen, copies = leave_out_copies(chosen, held_out)
    for path, other in copies:
        print(f"{path} is excluded: it is identical to the held-out {other}.", file=sys.stderr)
    images = annotate_all(layout, chosen, args.on_error)
    if layout.subject in ("objects", "scene"):  # masks have values instead of class names, and may lack some of them
        check_names(layout)
    return LabeledImages(layout, images, copies)


def build_instructions(args: argparse.Namespace) -> Instructions:
    """Read the annotations of a split and generate questions. The pixels of the images are not read.

    Raises:
        ValueError: If no images are found, an annotation is invalid, or the annotations answer no question.
    """
    labeled = read_labeled_images(args.root, args, args.split, args.split_list)
    scenes = images = labeled.images
    if args.window is not None:
        images = [window for image in images for window in windows_of(image, args.window, args.overlap)]
    number = round(args.collages * len(images))
    images = images + draw_collages(scenes, number, args.collage_size, args.collage_grid, args.seed)
    vocabulary = vocabulary_of(images)
    asker = Asker(labeled.layout.subject, vocabulary, args.max_boxes, args.map_side, args.seed)
    conversations = make_conversations(images, asker, args.kinds, args.turns)
    if not any(conversations):
        raise ValueError(f"The annotation of {args.root} answers no question of the kinds {', '.join(args.kinds)}.")
    return Instructions(images, conversations, vocabulary, labeled.copies)


def check_names(layout: Layout) -> None:
    """Raise a `ValueError` if a class of --names occurs in no split. Images are read until all classes are found."""
    for image_id, paths in (item for images in layout.splits().values() for item in images.items()):
        if layout.names.keys() <= layout.found:
            return
        with suppress(Exception):  # an image that is not used may be invalid
            layout.annotate(image_id, paths)
    if wrong := sorted(layout.names.keys() - layout.found):
        found = ", ".join(sorted(layout.found))
        raise ValueError(
            f"--names: class {wrong[0]!r} not found in {layout.root}. Found: {found}. Correct or remove it."
        )


def choose_split(
    layout: Layout, split: str, listed: list[str] | None = None
) -> tuple[dict[str, tuple[Path, ...]], set[Path]]:
    """Return the files of the images of a split, by id, and the files of the held-out images.

    The test split of the layout is held out, and so is the validation split unless `split` contains it. Images that are
    also in `split` are held out as well. With `listed`, only the listed images are chosen, and all others of the layout
    are held out.

    Args:
        listed: ids, paths below the root of the layout, file names, or file names without suffix.

    Raises:
        ValueError: If the layout does not have the split, or a listed name matches no image or several.
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
            f"Split {split!r} not found in {layout.root}. Found: {sorted(splits)}. Set --split to one of them, or list "
            "the images in a file and set --split_list."
        )
    return chosen, {path for paths in others for path in paths}


def choose_listed(
    layout: Layout, splits: list[dict[str, tuple[Path, ...]]], listed: list[str]
) -> dict[str, tuple[Path, ...]]:
    """Return the listed images, found by id, by path below the root, or by file name with or without suffix."""
    by_id, by_path, by_name = defaultdict(list), defaultdict(list), defaultdict(list)
    for images in splits:
        for key, paths in images.items():
            by_id[key].append((key, paths))
            by_path[Path(os.path.relpath(paths[0], layout.root)).as_posix()].append((key, paths))
            for name in {paths[0].stem, paths[0].name}:
                by_name[name].append((key, paths))
    found = {name: by_id.get(name) or by_path.get(name) or by_name.get(name, []) for name in listed}
    found = {name: [*dict.fromkeys(images)] for name, images in found.items()}  # an image may be in several splits
    missing = [name for name, images in found.items() if not images]
    if missing:
        more = ", …" if len(missing) > 1 else ""
        raise ValueError(
            f"{len(missing)} of {len(listed)} listed images not found in {layout.root}: {missing[0]}{more}"
        )
    for name, images in found.items():
        if len(images) > 1:
            raise ValueError(
                f"The listed name {name} is ambiguous: {images[0][1][0]} or {images[1][1][0]}. List the id "
                f"({images[0][0]!r} or {images[1][0]!r}), or set --split."
            )
    return dict(image for (image,) in found.values())


def check_case_splits(layout: Layout, chosen: dict[str, tuple[Path, ...]], held_out: set[Path]) -> None:
    """Raise a `ValueError` that names a case with both chosen and held-out images."""
    known = {layout.case(path): path for path in sorted(held_out) if path.exists()}
    known.pop(None, None)
    for path in (path for paths in chosen.values() for path in paths if known and path not in held_out):
        case = layout.case(path) if path.exists() else None
        if case in known:
            raise ValueError(
                f"{case} is in two splits: {path} is used, and {known[case]} is held out. A case must be in one split "
                "only. Select the images with --split_list, or rename them if they are different cases."
            )


def leave_out_copies(
    chosen: dict[str, tuple[Path, ...]], held_out: set[Path]
) -> tuple[dict[str, tuple[Path, ...]], list[tuple[Path, Path]]]:
    """Return the chosen images without copies of held-out files, and the pairs of identical files."""
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
    """Return the digest of a file, or `None` if it cannot be read, which is reported with its annotation."""
    try:
        return content_digest(path) if path.exists() else None
    except (OSError, EOFError, zlib.error):
        return None


def annotate_all(layout: Layout, chosen: dict[str, tuple[Path, ...]], on_error: str = "raise") -> list[AnnotatedImage]:
    """Read the annotations of all images.

    Args:
        chosen: files of the images, by id. Images outside of the layout's root are invalid, also through links.
        on_error: "raise" raises an error for an invalid annotation; "skip" reports it and excludes the image.

    Raises:
        ValueError: If an annotation is invalid, or no image is left; the message names the image or the annotation.
    """
    images = []
    for image_id, paths in tqdm(chosen.items(), desc="annotations"):
        try:
            for path in paths:
                below(layout.root, path)
            images += layout.annotate(image_id, paths)
        except Exception as error:  # Files with unexpected content raise many types.
            message = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
            if str(layout.root) not in message and str(layout.annotations) not in message:
                message = f"{paths[0]}: its annotation cannot be read: {message}"
            if on_error == "raise":
                raise ValueError(message) from error
            print(f"{image_id} is excluded: {message}", file=sys.stderr)
    if not images:
        raise ValueError(f"No valid annotations found in {layout.root}.")
    return images
