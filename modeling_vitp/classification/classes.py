"""Which classes images have: as names or numbers, as they are stored, and as what a model is trained on."""

import logging
from collections.abc import Callable, Mapping, Sequence
from numbers import Integral

import torch

logger = logging.getLogger(__name__)
Label = str | int  # the name of a class, or its place among the classes


def names_of(stored: Sequence[Sequence[Label]]) -> list[str]:
    """The classes that images have, in the order of their names; numbers are all places up to the largest."""
    found = {label for labels in stored for label in labels}
    numbers = [label for label in found if isinstance(label, Integral)]
    return sorted(found - {*numbers}) or [str(place) for place in range(max(numbers, default=-1) + 1)]


def encode(
    stored: Sequence[Sequence[Label]], names: Sequence[str], multi_label: bool, where: Callable[[int], str]
) -> torch.Tensor:
    """The classes of images as a model takes them.

    Args:
        stored: the classes of each image: one, or with `multi_label` any number.
        names: of all classes, in the order of the model.
        where: what an image is called in errors, by its place.

    Returns:
        int64 of shape `(images,)`; with `multi_label` float32 of shape `(images, classes)`, 1 for a class that an image
        has and 0 for the others.

    Raises:
        ValueError: names the first image whose classes are not as they should be.
    """
    places = {name: place for place, name in enumerate(names)}
    encoded = torch.zeros(len(stored), len(names))
    for index, labels in enumerate(stored):
        if len(labels) != 1 and not multi_label:
            kind = "has no class" if not labels else f"has {len(labels)} classes, {', '.join(map(str, labels))}"
            raise ValueError(f"{where(index)} {kind}: give one, or set `multi_label: true` in `data`.")
        for label in labels:
            place = label if isinstance(label, Integral) else places.get(label)
            if place is None or not 0 <= place < len(names):
                shown = ", ".join(names[:10]) + (" …" if len(names) > 10 else "")
                kind = f"the class {label!r}" if place is None else f"the label {label}"
                raise ValueError(
                    f"{where(index)} has {kind}, which is none of the {len(names)} classes that are trained on, from "
                    f"0: {shown}. Take it out, put images of it into training, or list it in `classes`."
                )
            encoded[index, place] = 1
    return encoded if multi_label else encoded.argmax(1)


def count(labels: torch.Tensor, names: Sequence[str]) -> dict[str, int]:
    """Images of each class, by name."""
    counts = labels.sum(0).long() if labels.ndim == 2 else labels.bincount(minlength=len(names))
    return dict(zip(names, counts.tolist()))


def check_trained(trained: Mapping[str, int], scored: Mapping[str, int], split: str, is_listed: bool) -> None:
    """Looks whether classes of images to score have images to train on.

    Args:
        trained, scored: images of each class, by name.
        split: that is scored.
        is_listed: whether the user has listed the classes, so that one without images is meant; it is only logged.

    Raises:
        ValueError: names the classes.
    """
    unknown = [name for name, number in scored.items() if number and not trained[name]]
    if unknown:
        said = f"Split {split!r} has images of the class(es) {', '.join(unknown)}, and no image to train on has these."
        if not is_listed:
            raise ValueError(f"{said} Take them out, put some into training, or list all `classes` in `data`.")
        logger.warning("%s", said)
