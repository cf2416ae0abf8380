"""What the pixels of a mask stand for: classes by value or by colour, and what is to be ignored."""

import colorsys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ..image_processing_vitp_dense import IGNORE_INDEX
from ..training.values import check_type, is_of

Color = tuple[int, int, int]
SPELLINGS = {"colour": "color"}  # of keys and values in configurations
LARGEST_VALUE = (1 << 24) - 1  # in masks by value


@dataclass(frozen=True)
class DenseClass:
    """A class.

    Args:
        name: as it is saved in the model's `id2label`.
        value: of its pixels in the masks, or the first and the last of several values; by default its place among the
            classes, from 0.
        color: red, green and blue, from 0 to 255: of its pixels in masks that are coded by colour, and in pictures.
    """

    name: str
    value: int | tuple[int, int]
    color: Color


class LabelEncoding:
    """Masks as they are stored to class indices, and back.

    Args:
        classes: one mapping with `name`, `value` and `color` (see [`DenseClass`]) for each class, in the order of
            their indices. Without a colour one is chosen.
        by: `"value"`, also the index of a palette, or `"color"`.
        ignore: values or colours of the pixels without a class; of values also negative ones, as many rasters have
            them for "no data".

    Raises:
        ValueError: if the classes are not distinct, or not told completely.
    """

    def __init__(self, classes: Sequence[Mapping], by: str = "value", ignore: Sequence = ()):
        by = SPELLINGS.get(by, by)
        if by not in ("value", "color"):
            raise ValueError(f"mask_encoding={by!r} is neither 'value' nor 'color'.")
        if not 2 <= len(classes) < IGNORE_INDEX:
            raise ValueError(f"{len(classes)} classes are given; two or more are needed, background included.")
        self._negative = [item for item in ignore if by == "value" and is_of(item, int) and item < 0]
        ignore = [tuple(item) if isinstance(item, list) else item for item in ignore if item not in self._negative]
        self.by, self.ignore = by, ignore
        self.classes = []
        for index, settings in enumerate(classes):
            settings = {SPELLINGS.get(name, name): value for name, value in settings.items()}
            unknown = set(settings) - set(DenseClass.__dataclass_fields__)
            if unknown or "name" not in settings or (by == "color" and "color" not in settings):
                raise ValueError(f"Class {index}, {settings}, needs a name{', a color' * (by == 'color')}.")
            value, color = settings.get("value", index), settings.get("color", distinct_color(index, len(classes)))
            check_type(f"Class {index}: name", settings["name"], str)
            if not is_value(value) or not is_color(color):
                raise ValueError(
                    f"Class {index}, {settings}: `value` is a number from 0 to {LARGEST_VALUE}, or the first and the "
                    "last of several; `color` is red, green and blue from 0 to 255."
                )
            value = tuple(value) if isinstance(value, (list, tuple)) else value
            self.classes.append(DenseClass(settings["name"], value, tuple(color)))
        wrong = [item for item in self.ignore if not (is_color if by == "color" else is_value)(item)]
        if wrong:
            raise ValueError(f"ignore: {str(wrong[0])[:80]!r} is no {by} of a mask.")
        repeated = {name for name in self.names if self.names.count(name) > 1}
        if repeated:
            raise ValueError(f"Two classes are called {sorted(repeated)[0]!r}.")
        self._lookup = self._table()

    @property
    def names(self) -> list[str]:
        return [item.name for item in self.classes]

    @property
    def palette(self) -> np.ndarray:
        """The colours of the classes, uint8 of shape `(num_classes, 3)`."""
        return np.array([item.color for item in self.classes], dtype=np.uint8)

    def codes(self) -> list[tuple[int, int, int]]:
        """First code, last code and class index of all that a mask may hold; colours are coded as 0xRRGGBB."""
        if self.by == "color":
            known = [(pack(item.color), pack(item.color), index) for index, item in enumerate(self.classes)]
            return known + [(pack(color), pack(color), IGNORE_INDEX) for color in self.ignore]
        known = [(*span(item.value), index) for index, item in enumerate(self.classes)]
        return known + [(*span(value), IGNORE_INDEX) for value in self.ignore]

    def _table(self) -> dict[int, int] | np.ndarray:
        codes = self.codes()
        if self.by == "color":
            if len({first for first, _, _ in codes}) < len(codes):
                raise ValueError("Two classes, or a class and what is ignored, have one colour.")
            return {first: index for first, _, index in codes}
        table = np.full(max(last for _, last, _ in codes) + 1, -1, dtype=np.int16)
        for first, last, index in codes:
            if not 0 <= first <= last or (table[first : last + 1] != -1).any():
                raise ValueError(f"The value {first} to {last} is empty, negative, or stands for two things.")
            table[first : last + 1] = index
        return table

    def encode(self, mask: np.ndarray, name: str) -> np.ndarray:
        """A mask as class indices.

        Args:
            mask: integers of shape `(height, width)`, or colours of shape `(height, width, 3)`.
            name: of the file, for errors.

        Returns:
            uint8 of shape `(height, width)`, 255 where there is no class.

        Raises:
            ValueError: names the file and the values that stand for nothing.
        """
        if (mask.ndim == 3) != (self.by == "color"):
            kind, other = ("colours", "values") if mask.ndim == 3 else ("values", "colours")
            raise ValueError(f"The mask {name} holds {kind}, but mask_encoding says {other}.")
        if self.by == "color":
            codes = mask.astype(np.int32) @ np.array([1 << 16, 1 << 8, 1], dtype=np.int32)
            indices = np.full(codes.shape, -1, dtype=np.int16)
            for code, index in self._lookup.items():
                indices[codes == code] = index
        else:
            codes = mask
            inside = (codes >= 0) & (codes < len(self._lookup))
            indices = np.where(inside, self._lookup[np.where(inside, codes, 0)], -1)
            indices[np.isin(codes, self._negative)] = IGNORE_INDEX
        unknown = indices == -1
        if unknown.any():
            values = np.unique(codes[unknown])
            shown = [f"({value >> 16}, {value >> 8 & 255}, {value & 255})" for value in values[:5].tolist()]
            shown = ", ".join(shown if self.by == "color" else map(str, values[:5].tolist()))
            raise ValueError(
                f"The mask {name} has {unknown.sum()} pixel(s) of {len(values)} value(s) outside the classes: {shown}. "
                "Add them to `classes` or to `ignore`."
            )
        return indices.astype(np.uint8)

    def decode(self, indices: np.ndarray) -> np.ndarray:
        """Class indices as a mask would store them: uint8 (or uint16) of shape `(height, width[, 3])`."""
        if self.by == "color":
            return self.palette[indices]
        values = [span(item.value)[1] for item in self.classes]
        return np.array(values, dtype=np.uint8 if max(values) < 256 else np.uint16)[indices]


def span(value: int | tuple[int, int]) -> tuple[int, int]:
    return value if isinstance(value, tuple) else (value, value)


def is_value(value: object) -> bool:
    """Whether it is a code of a mask, or the first and the last of several."""
    numbers = value if isinstance(value, (list, tuple)) else [value]
    return len(numbers) == (2 if numbers is value else 1) and all(
        is_of(number, int) and 0 <= number <= LARGEST_VALUE for number in numbers
    )


def is_color(color: object) -> bool:
    return isinstance(color, (list, tuple)) and len(color) == 3 and all(is_of(n, int) and 0 <= n <= 255 for n in color)


def pack(color: Color) -> int:
    red, green, blue = color
    return red << 16 | green << 8 | blue


def distinct_color(index: int, number: int) -> Color:
    """Black for the first class, and hues at equal distances for the others."""
    if index == 0:
        return (0, 0, 0)
    hue = (index - 1) / (number - 1)
    return tuple(round(255 * part) for part in colorsys.hsv_to_rgb(hue, 0.8, 0.95 if index % 2 else 0.65))


def change_label(names: Sequence[str]) -> int:
    """The class of change: the one that is called `change` or `changed`, or else the second of two.

    Raises:
        ValueError: if there are more, and none is called so.
    """
    found = [label for label, name in enumerate(names) if name.casefold() in ("change", "changed")]
    if not found and len(names) != 2:
        raise ValueError(
            f"metric: change_detection scores one class against all others, and of {list(names)} none is called "
            "'change': call one so, or give metric: mean_iou."
        )
    return found[0] if found else 1
