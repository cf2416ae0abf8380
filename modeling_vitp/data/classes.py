"""Classes of labels: their names in a model and in annotations, and their values or colors in masks."""

import colorsys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

import numpy as np

from ..command.settings import Interval, check_keys, check_value, from_mapping, matches
from ..image_processing_vitp_dense import IGNORE_INDEX

LARGEST_VALUE = (1 << 24) - 1  # Largest allowed value in a mask.
MaskValue = Annotated[int, Interval(f"[0, {LARGEST_VALUE}]")]
ValueRange = tuple[MaskValue, MaskValue]
Level = Annotated[int, Interval("[0, 255]")]
Color = tuple[Level, Level, Level]


class ClassNames:
    """Class names of a model and their names in annotations, compared without case.

    Args:
        classes: name of each class in the order of the model, or a mapping with `name` and `as`, the name or names of
            the class in annotations.
        leave_out: annotated class names that are ignored.

    Raises:
        ValueError: if a name is used for two classes.
    """

    def __init__(self, classes: Sequence[str | Mapping], leave_out: Sequence[str] = ()):
        self.names: list[str] = []
        self._indices: dict[str, int | None] = {}
        for index, class_settings in enumerate(classes):
            if not isinstance(class_settings, Mapping):
                class_settings = {"name": class_settings}
            check_keys(f"Class {index}", class_settings, ("name", "as"))
            check_value(f"Class {index}: name", class_settings.get("name"), str)
            name = class_settings["name"]
            annotated_names = class_settings.get("as", name)
            check_value(f"Class {index}: as", annotated_names, str | Sequence[str])
            if isinstance(annotated_names, str):
                annotated_names = [annotated_names]
            self.names.append(name)
            self._add(annotated_names, index)
        self._add(leave_out, None)

    def _add(self, names: Iterable[str], index: int | None) -> None:
        for name in names:
            first_index = self._indices.setdefault(name.casefold(), index)
            if first_index != index or self.names.count(name) > 1:
                raise ValueError(f"The name {name!r} is used for two classes, or for a class and in `leave_out`.")

    def index(self, label: str | int, where: str) -> int | None:
        """Return the class index of an annotated name or index, or `None` if the name is in `leave_out`."""
        if isinstance(label, int) and 0 <= label < len(self.names):
            return label
        if not isinstance(label, str) or label.casefold() not in self._indices:
            raise ValueError(
                f"{where}: unknown class {label!r}. Classes: {self.names}. Add it to `classes` or to `leave_out`."
            )
        return self._indices[label.casefold()]


@dataclass(frozen=True)
class DenseClass:
    """Class of a segmentation data set.

    Args:
        name: name of the class, saved in `id2label` of the model.
        value: value of the class in the masks, or first and last value of a range. Default in a configuration: the
            index of the class, from 0.
        color: red, green and blue in [0, 255], used for masks that are encoded by color, and in figures.
    """

    name: str
    value: MaskValue | ValueRange
    color: Color


class LabelEncoding:
    """Conversion between stored masks and class indices.

    Args:
        classes: one mapping with `name`, `value` and `color` (see [`DenseClass`]) per class, in the order of the class
            indices. Missing colors are chosen automatically.
        by: `"value"` for masks of integers or palette indices, `"color"` for masks of RGB colors.
        ignore: values or colors of unlabeled pixels. Values may be negative, which many rasters use for "no data".

    Raises:
        ValueError: if a class is incomplete, or if two classes share a name, value or color.
    """

    def __init__(self, classes: Sequence[Mapping], by: str = "value", ignore: Sequence = ()):
        check_value("mask_encoding", by, Literal["value", "color"])
        check_value("classes", classes, Sequence[Mapping])
        self.by = by
        self.negative = []
        self.ignore = []
        for ignored_value in ignore:
            if by == "value" and matches(ignored_value, int) and ignored_value < 0:
                self.negative.append(ignored_value)
                continue
            check_value("ignore", ignored_value, Color if by == "color" else MaskValue | ValueRange)
            if isinstance(ignored_value, list):
                ignored_value = tuple(ignored_value)
            self.ignore.append(ignored_value)
        self.classes = []
        for index, settings in enumerate(classes):
            defaults = {"value": index}
            # Masks that are encoded by color need the color of each class.
            if by == "value":
                defaults["color"] = distinct_color(index, len(classes))
            self.classes.append(from_mapping(DenseClass, {**defaults, **settings}, f"Class {index}"))
        repeated_names = []
        for name, number in Counter(self.names).items():
            if number > 1:
                repeated_names.append(name)
        if repeated_names or not 2 <= len(classes) < IGNORE_INDEX:
            raise ValueError(
                f"Expected 2 to {IGNORE_INDEX - 1} `classes` of different names, including the background, got "
                f"{len(classes)} with the repeated names {repeated_names}."
            )
        self._lookup = self._table()

    @property
    def names(self) -> list[str]:
        return [item.name for item in self.classes]

    @property
    def palette(self) -> np.ndarray:
        """Colors of the classes, uint8 of shape `(num_classes, 3)`."""
        return np.array([item.color for item in self.classes], dtype=np.uint8)

    def codes(self) -> list[tuple[int, int, int]]:
        """Return first code, last code and class index of each allowed mask value; colors are coded as 0xRRGGBB."""
        values_and_indices = []
        for index, item in enumerate(self.classes):
            value = item.color if self.by == "color" else item.value
            values_and_indices.append((value, index))
        for value in self.ignore:
            values_and_indices.append((value, IGNORE_INDEX))
        codes = []
        for value, index in values_and_indices:
            code = pack(value) if self.by == "color" else value
            first, last = span(code)
            codes.append((first, last, index))
        return codes

    def _table(self) -> dict[int, int] | np.ndarray:
        """Return the class index of each code: an array for values, -1 for unknown ones, and a mapping for colors."""
        codes = self.codes()
        end = 0
        for first, last, _ in sorted(codes):
            if not end <= first <= last:
                values = f"color {unpack(first)}" if self.by == "color" else f"values {first} to {last}"
                raise ValueError(
                    f"The {values} are empty, negative, or overlap with another class or an entry of `ignore`."
                )
            end = last + 1
        if self.by == "color":
            return {first: index for first, _, index in codes}
        table = np.full(end, -1, dtype=np.int16)
        for first, last, index in codes:
            table[first : last + 1] = index
        return table

    def encode(self, mask: np.ndarray, name: str) -> np.ndarray:
        """Convert a mask to class indices.

        Args:
            mask: integers of shape `(height, width)`, or colors of shape `(height, width, 3)`.
            name: name of the file in errors.

        Returns:
            uint8 of shape `(height, width)`, 255 for unlabeled pixels.

        Raises:
            ValueError: if the mask has values outside the classes and `ignore`.
        """
        if (mask.ndim == 3) != (self.by == "color"):
            kind = "colors" if mask.ndim == 3 else "values"
            raise ValueError(f"The mask {name} has {kind}, but `mask_encoding` is {self.by!r}.")
        if self.by == "color":
            place_values = np.array([1 << 16, 1 << 8, 1], dtype=np.int32)
            codes = mask.astype(np.int32) @ place_values
            indices = np.full(codes.shape, -1, dtype=np.int16)
            for code, index in self._lookup.items():
                indices[codes == code] = index
        else:
            codes = mask
            is_in_table = (codes >= 0) & (codes < len(self._lookup))
            codes_in_table = np.where(is_in_table, codes, 0)
            indices = np.where(is_in_table, self._lookup[codes_in_table], -1)
            indices[np.isin(codes, self.negative)] = IGNORE_INDEX
        is_unknown = indices == -1
        if is_unknown.any():
            unknown_codes = np.unique(codes[is_unknown])
            examples = []
            for code in unknown_codes[:5].tolist():
                value = unpack(code) if self.by == "color" else code
                examples.append(str(value))
            raise ValueError(
                f"The mask {name} has {is_unknown.sum()} pixel(s) with {len(unknown_codes)} value(s) outside the "
                f"classes: {', '.join(examples)}. Add the values to `classes` or to `ignore`."
            )
        return indices.astype(np.uint8)

    def decode(self, indices: np.ndarray) -> np.ndarray:
        """Convert class indices to a stored mask, uint8 or uint16 of shape `(height, width[, 3])`."""
        if self.by == "color":
            return self.palette[indices]
        last_values = []
        for item in self.classes:
            _, last = span(item.value)
            last_values.append(last)
        dtype = np.uint8 if max(last_values) < 256 else np.uint16
        values = np.array(last_values, dtype)
        return values[indices]


def span(value: int | tuple[int, int]) -> tuple[int, int]:
    return value if isinstance(value, tuple) else (value, value)


def pack(color: Color) -> int:
    red, green, blue = color
    return red << 16 | green << 8 | blue


def unpack(code: int) -> Color:
    """Return the color of a code 0xRRGGBB."""
    red = code >> 16
    green = code >> 8 & 255
    blue = code & 255
    return (red, green, blue)


def distinct_color(index: int, number: int) -> Color:
    """Return a color for a class: black for the first class, evenly spaced hues for the others."""
    if index == 0:
        return (0, 0, 0)
    hue = (index - 1) / (number - 1)
    brightness = 0.95 if index % 2 else 0.65
    levels = colorsys.hsv_to_rgb(hue, 0.8, brightness)
    return tuple(round(255 * level) for level in levels)
