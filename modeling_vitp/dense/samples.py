"""Images with masks, whatever they are stored as: files, windows of large files, or rows of a `datasets` data set."""

from collections.abc import Sequence

import datasets
import numpy as np
import PIL.Image
import torch
from tqdm import tqdm

from ..images.pixels import to_pixels
from ..images.ranges import ranged
from ..images.reading import (
    VALUES,
    Picture,
    check_file,
    check_upright,
    read_image,
    read_picture,
    stored_size,
    whole_numbers,
)
from ..images.windows import Window, windows
from ..input_spec import InputSpec
from ..instructions.rows import content_of, is_decoded
from ..training.files import CASES, FileSample
from .classes import LabelEncoding


class MaskedImages(torch.utils.data.Dataset):
    """Samples of one image, or two of a pair, with a mask.

    An item is a dictionary: `id`; `case`, what is scored as one where a metric is by case; `images`, see
    [`~modeling_vitp.images.pixels.to_pixels`]; and, unless there is none, `mask`, class indices, uint8 of shape
    `(height, width)`.

    Args:
        encoding: of the masks.
        input_spec: how images that are not 8-bit RGB become so, see [`~modeling_vitp.InputSpec`].
    """

    def __init__(self, encoding: LabelEncoding, input_spec: dict | None = None):
        self.encoding = encoding
        self.spec = None if input_spec is None else InputSpec.from_dict(input_spec)

    def __len__(self) -> int:
        raise NotImplementedError

    def case(self, index: int) -> str:
        raise NotImplementedError

    def read(self, index: int) -> tuple[str, list[tuple[str, Picture, InputSpec | None]], tuple[str, Picture] | None]:
        """The id, the images and the mask of a sample, each with its name for errors; of an image also how its values
        are read."""
        raise NotImplementedError

    def read_mask(self, index: int) -> tuple[str, Picture] | None:
        raise NotImplementedError

    def __getitem__(self, index: int) -> dict:
        name, images, mask = self.read(index)
        tensors = [self.to_pixels(*image) for image in images]
        for (image_name, *_), tensor in zip(images, tensors):
            if tensor.shape != tensors[0].shape:
                raise ValueError(f"{image_name} is {size(tensor)}, but {images[0][0]} {size(tensors[0])}.")
        item = {"id": name, "case": self.case(index), "images": tensors}
        if mask is not None:
            item["mask"] = torch.from_numpy(self.encode(mask))
            if item["mask"].shape != tensors[0].shape[-2:]:
                raise ValueError(
                    f"The mask {mask[0]} is {size(item['mask'])}, but its image {images[0][0]} {size(tensors[0])}."
                )
        return item

    def mask(self, index: int) -> torch.Tensor | None:
        """The mask of a sample alone."""
        mask = self.read_mask(index)
        return None if mask is None else torch.from_numpy(self.encode(mask))

    def encode(self, mask: tuple[str, Picture]) -> np.ndarray:
        name, values = mask
        if isinstance(values, PIL.Image.Image):
            # By color, grey and palettes of 8 bits are colors too.
            is_plain = values.mode in (VALUES if self.encoding.by == "value" else ("I", "I;16", "I;16B", "F"))
            values = np.asarray(values if is_plain else values.convert("RGB"))
        if values.ndim == 3 and self.encoding.by == "value" and (values == values[..., :1]).all():
            values = values[..., 0]  # grey, saved with three channels
        return self.encoding.encode(whole_numbers(values, name).astype(np.int32), name)

    def to_pixels(self, name: str, image: Picture, spec: InputSpec | None) -> torch.Tensor:
        try:
            return to_pixels(image, spec)
        except (OSError, ValueError) as error:
            raise ValueError(f"{name}: {error}") from error


def size(maps: torch.Tensor) -> str:
    return f"{maps.shape[-1]} x {maps.shape[-2]} pixels"


class ImageFiles(MaskedImages):
    """Files, each read whole or in overlapping windows that are cut when they are asked for.

    Args:
        samples: the files.
        tile: `size` of square windows in pixels and their `overlap`; the last of a row ends at the image's border.
            Smaller images stay whole.
    """

    def __init__(
        self,
        samples: Sequence[FileSample],
        encoding: LabelEncoding,
        input_spec: dict | None = None,
        tile: dict | None = None,
    ):
        super().__init__(encoding, input_spec)
        self.rows: list[tuple[FileSample, Window | None]] = []
        for sample in samples:
            places = [None] if tile is None else windows(stored_size(sample.images[0]), **tile)
            self.rows += [(sample, window) for window in places]

    def __len__(self) -> int:
        return len(self.rows)

    def case(self, index: int) -> str:
        return self.rows[index][0].case

    def check_files(self, name: str) -> None:
        """Reads the header and the end of every image and mask.

        Args:
            name: of the split.

        Raises:
            ValueError: names the file that is not whole, is stored with an orientation other than upright, or differs
                from the image of its sample in size.
        """
        samples = {sample.id: sample for sample, _ in self.rows}
        for sample in tqdm(samples.values(), desc=f"files of {name}", disable=None):
            first, *others = (*sample.images, *([] if sample.mask is None else [sample.mask]))
            for path in (first, *others):
                check_file(path)
                check_upright(path)
                if stored_size(path) != stored_size(first):
                    sizes = ["{1} x {0} pixels".format(*stored_size(file)) for file in (path, first)]
                    names = (f"The mask {path}", f"its image {first}") if path == sample.mask else (path, first)
                    raise ValueError(f"{names[0]} is {sizes[0]}, but {names[1]} {sizes[1]}.")

    def read(self, index: int):
        sample, window = self.rows[index]
        name = sample.id if window is None else f"{sample.id}/{window[0]}_{window[1]}"
        images = [
            (str(path), read_image(path, window, self.spec), ranged(self.spec, path, window is not None))
            for path in sample.images
        ]
        mask = self.read_mask(index)
        if mask is not None and window is not None and stored_size(sample.mask) != stored_size(sample.images[0]):
            raise ValueError(f"The mask {sample.mask} and its image {sample.images[0]} are of different size.")
        return name, images, mask

    def read_mask(self, index: int):
        sample, window = self.rows[index]
        # A mask in DICOM has the numbers of classes for its units.
        return None if sample.mask is None else (str(sample.mask), read_image(sample.mask, window, as_stored=True))


class Rows(MaskedImages):
    """Rows of a `datasets` data set, of the Hub or made from volumes.

    Args:
        rows: with columns for the images and the mask, and optionally `id` and `patient` or `case`.
        columns: names of the columns under `image` (or `before` and `after`) and `mask`, if they are not these; for
            the mask also `label`, `annotation` and `segmentation` are tried.
        name: of the split, for errors.
    """

    def __init__(
        self,
        rows: datasets.Dataset,
        encoding: LabelEncoding,
        input_spec: dict | None = None,
        columns: dict | None = None,
        name: str = "",
    ):
        super().__init__(encoding, input_spec)
        rows = rows.select_columns(rows.column_names)
        # The decoding of `datasets` would lose what 16-bit images and TIFF have more than 8-bit ones.
        rows.info.features = datasets.Features(
            {
                column: datasets.Image(decode=False) if is_decoded(feature) else feature
                for column, feature in rows.features.items()
            }
        )
        self.rows, self.name, columns = rows, name, columns or {}
        known = rows.column_names

        def column(role: str, *others: str) -> str | None:
            return columns.get(role) or next((other for other in (role, *others) if other in known), None)

        images = [column("before"), column("after")] if column("before") else [column("image")]
        self.mask_column = column("mask", "label", "annotation", "segmentation")
        self.image_columns = images
        missing = {*images, self.mask_column} - {*known, None}
        if None in images or missing:
            raise ValueError(f"Split {name!r} has no column {missing or 'image'}, only {known}: name it in `columns`.")
        self.cases = next((rows[name] for name in CASES if name in known), None)

    def __len__(self) -> int:
        return len(self.rows)

    def case(self, index: int) -> str:
        return str(index) if self.cases is None else self.cases[index]

    def read(self, index: int):
        row = self.rows[index]
        name = str(row.get("id", index))
        images = [self._picture(name, row, column) for column in self.image_columns]
        return name, images, self._mask(name, row)

    def __getitem__(self, index: int) -> dict:
        """With `place` and `spacing` of a slice, see [`~modeling_vitp.dense.volumes.slice_volumes`]."""
        item, of_volume = super().__getitem__(index), ["place", "spacing"]
        if not {*of_volume} <= {*self.rows.column_names}:
            return item
        return item | self.rows.select_columns(of_volume)[index]

    def read_mask(self, index: int):
        if self.mask_column is None:
            return None
        columns = [name for name in (self.mask_column, "id") if name in self.rows.column_names]
        row = self.rows.select_columns(columns)[index]
        return self._mask(str(row.get("id", index)), row)

    def _mask(self, name: str, row: dict):
        if self.mask_column is None:
            return None
        return self._picture(name, row, self.mask_column)[:2]

    def _picture(self, name: str, row: dict, column: str) -> tuple[str, Picture, InputSpec | None]:
        stored, where = row[column], f"{name} ({column})"
        if stored is None:
            raise ValueError(f"Row {name} of split {self.name!r} has no {column}.")
        if not isinstance(stored, dict):
            return where, stored, self.spec
        try:
            content = content_of(stored)
            if column == self.mask_column:
                return where, read_picture(content, as_stored=True), None
            return where, read_picture(content, self.spec), ranged(self.spec, content, False)
        except Exception as error:  # Pillow raises many kinds for a broken file
            raise ValueError(f"Row {name} of split {self.name!r}: {column} cannot be read: {error}") from error
