"""Segmentation data sets that are described by a configuration: classes, splits, files, rows or volumes."""

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Self

import datasets
import numpy as np
import PIL.Image
import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from torch.utils.data import DataLoader, Dataset, Subset
from tqdm import tqdm

from ...command.settings import Percentile, PositiveInt, from_mapping
from ...data.classes import LabelEncoding, pack, span
from ...data.files import CASES, FileSample, fields_of, find_samples, hold_out, match_files, read_split
from ...data.folders import UNSPLIT, images_in, level_of
from ...data.layouts import LAYOUTS, ChangePairs, Masks, layouts_of, recognize_layout
from ...data.rows import cases_of_rows, check_image_columns, content_of, encoded_rows, find_columns, missing_column
from ...data.settings import DataSettings, parts_of
from ...image_processing_vitp_dense import IGNORE_INDEX
from ...images.large import ranged
from ...images.pixels import to_pixels
from ...images.reading import (
    VALUES,
    Picture,
    Window,
    check_file,
    check_upright,
    read_image,
    read_picture,
    stored_size,
    whole_numbers,
    windows,
)
from ...images.volumes import VolumeSlices, check_cut, files_of
from ...input_spec import InputSpec
from ...training.batching import share
from .arguments import DenseArguments

# Usual names of columns.
USUAL = {
    "image": ("image",),
    "before": ("before",),
    "after": ("after",),
    "mask": ("mask", "label", "annotation", "segmentation"),
}
SPLITS = ("train", "val", "test")

logger = logging.getLogger(__name__)


class MaskedImages(torch.utils.data.Dataset):
    """Base class of segmentation data sets: one image, or the two of a pair, with a mask.

    An item is a dictionary with `id`, `case` (the unit of metrics per case), `images` (see
    [`~modeling_vitp.images.pixels.to_pixels`]) and, if annotated, `mask` (class indices, uint8 of shape
    `(height, width)`).

    Args:
        encoding: encoding of the masks.
        input_spec: conversion of images that are not 8-bit RGB, see [`~modeling_vitp.InputSpec`].

    Attributes:
        rows: sources of the samples.
        cases: patient or case of each sample, the unit of resamples.
    """

    rows: Sequence
    cases: Sequence[str]

    def __init__(self, encoding: LabelEncoding, input_spec: dict | None = None):
        self.encoding = encoding
        self.spec = None if input_spec is None else InputSpec.from_dict(input_spec)

    def __len__(self) -> int:
        return len(self.rows)

    def read(self, index: int) -> tuple[str, list[tuple[str, Picture, InputSpec | None]], tuple[str, Picture] | None]:
        """Return the id, the images and the mask of a sample.

        Each image and mask comes with its name in errors, each image also with its input spec.
        """
        raise NotImplementedError

    def read_mask(self, index: int) -> tuple[str, Picture] | None:
        raise NotImplementedError

    def source(self, index: int) -> Path | bytes:
        """Return the file or the content of an image for [`~modeling_vitp.images.seen.describe_images`]."""
        raise NotImplementedError

    def files_or_rows(self) -> Any:
        """Return the paths or rows that the samples are read from."""
        return self.rows

    def __getitem__(self, index: int) -> dict:
        name, images, mask = self.read(index)
        tensors = []
        for image_name, image, spec in images:
            tensor = self.to_pixels(image_name, image, spec)
            tensors.append(tensor)
            if tensor.shape != tensors[0].shape:
                first_name = images[0][0]
                raise ValueError(
                    f"Expected images of the same size and bands, {image_name} has {size(tensor)}, {first_name} has "
                    f"{size(tensors[0])}."
                )
        item = {"id": name, "case": self.cases[index], "images": tensors}
        if mask is not None:
            class_indices = torch.from_numpy(self.encode(mask))
            if class_indices.shape != tensors[0].shape[-2:]:
                first_name = images[0][0]
                raise ValueError(
                    f"Expected a mask of the size of its image, the mask {mask[0]} has {size(class_indices)}, the "
                    f"image {first_name} has {size(tensors[0])}."
                )
            item["mask"] = class_indices
        return item

    def mask(self, index: int) -> torch.Tensor | None:
        """Return the mask of a sample without reading its images."""
        mask = self.read_mask(index)
        if mask is None:
            return None
        return torch.from_numpy(self.encode(mask))

    def encode(self, mask: tuple[str, Picture]) -> np.ndarray:
        name, picture = mask
        values = mask_array(picture, name, self.encoding.by)
        return self.encoding.encode(values, name)

    def to_pixels(
        self,
        name: str,
        image: Picture,
        spec: InputSpec | None,
    ) -> torch.Tensor:
        try:
            return to_pixels(image, spec)
        except (OSError, ValueError) as error:
            raise ValueError(f"{name}: {error}") from error


def mask_array(mask: Picture, name: str, by: str) -> np.ndarray:
    """Return the values `(height, width)` or colors `(height, width, 3)` of a mask; `by` as in [`LabelEncoding`]."""
    if isinstance(mask, PIL.Image.Image):
        # With `color`, 8-bit gray and palette images are converted to RGB too.
        plain_modes = VALUES if by == "value" else ("I", "I;16", "I;16B", "F")
        if mask.mode not in plain_modes:
            mask = mask.convert("RGB")
        mask = np.asarray(mask)
    if mask.ndim == 3 and mask.shape[2] in (2, 4):
        mask = mask[..., :-1]  # Without the transparency of a TIFF.
    if mask.ndim == 3:
        is_gray = mask.shape[2] == 1
        if by == "value" and not is_gray:
            # A gray mask may have been saved with three channels.
            is_gray = (mask == mask[..., :1]).all()
        if is_gray:
            mask = mask[..., 0]
    return whole_numbers(mask, name).astype(np.int32)


def size(maps: torch.Tensor) -> str:
    return f"{maps.shape[-1]} x {maps.shape[-2]} pixels"


class ImageFiles(MaskedImages):
    """Segmentation data set of image files, read whole or in overlapping windows.

    Args:
        samples: image and mask files of the samples.
        encoding: encoding of the masks.
        input_spec: conversion of images that are not 8-bit RGB, see [`~modeling_vitp.InputSpec`].
        tile: `size` and `overlap` of square windows in pixels. The last window of a row ends at the image border.
            Images smaller than `size` are read whole.
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
        self.cases = []
        for sample in samples:
            sample_windows = [None]
            if tile is not None:
                sample_windows = windows(stored_size(sample.images[0]), **tile)
            for window in sample_windows:
                self.rows.append((sample, window))
                self.cases.append(sample.case)

    def files_or_rows(self) -> list[Path]:
        paths = []
        for sample in self.unique_samples():
            paths += files_of_sample(sample)
        return paths

    def unique_samples(self) -> list[FileSample]:
        """Return each sample once, also if it is read in several windows."""
        samples = {sample.id: sample for sample, _ in self.rows}
        return list(samples.values())

    def check_files(self, name: str) -> None:
        """Check the header and the end of every image and mask file.

        Args:
            name: name of the split.

        Raises:
            ValueError: if a file is truncated, has an orientation other than upright, or differs in size from the other
                files of its sample.
        """
        for sample in tqdm(self.unique_samples(), desc=f"files of {name}", disable=None):
            first_path = sample.images[0]
            for path in files_of_sample(sample):
                check_file(path)
                check_upright(path)
                height, width = stored_size(path)
                first_height, first_width = stored_size(first_path)
                if (height, width) != (first_height, first_width):
                    role, first_role = ("The mask ", "its image ") if path == sample.mask else ("", "")
                    raise ValueError(
                        f"{role}{path} is {width} x {height} pixels, but {first_role}{first_path} is {first_width} x "
                        f"{first_height} pixels."
                    )

    def read(self, index: int):
        sample, window = self.rows[index]
        name = sample.id
        if window is not None:
            left, top, _, _ = window
            name = f"{sample.id}/{left}_{top}"
        images = []
        for path in sample.images:
            image = read_image(path, window, self.spec)
            spec = ranged(self.spec, path, is_part=window is not None)
            images.append((str(path), image, spec))
        return name, images, self.read_mask(index)

    def source(self, index: int) -> Path:
        sample, _ = self.rows[index]
        return sample.images[0]

    def read_mask(self, index: int):
        sample, window = self.rows[index]
        if sample.mask is None:
            return None
        # DICOM masks are read as stored, because a rescale slope would change the class values.
        return str(sample.mask), read_image(sample.mask, window, as_stored=True)


def files_of_sample(sample: FileSample) -> list[Path]:
    """Return the images and the mask of a sample."""
    paths = list(sample.images)
    if sample.mask is not None:
        paths.append(sample.mask)
    return paths


class Rows(MaskedImages):
    """Segmentation data set of the rows of a `datasets` data set, from the Hub or from volumes.

    Args:
        rows: data set with image columns, a mask column, and optionally `id` and `patient` or `case`. With both, a
            case is a volume of the patient.
        encoding: encoding of the masks.
        input_spec: conversion of images that are not 8-bit RGB, see [`~modeling_vitp.InputSpec`].
        columns: names of the columns `image` (or `before` and `after`) and `mask`, if they are not those of `USUAL`.
        name: name of the split in errors.
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
        self.rows = encoded_rows(rows)
        self.cases = cases_of_rows(rows) or [str(index) for index in range(len(rows))]
        self.name = name
        columns_by_role = find_columns(
            rows.column_names,
            USUAL,
            columns or {},
            name,
        )
        image_roles = ("before", "after") if "before" in columns_by_role else ("image",)
        for role in image_roles:
            if role not in columns_by_role:
                raise missing_column(rows.column_names, role, name)
        self.image_columns = [columns_by_role[role] for role in image_roles]
        self.mask_column = columns_by_role.get("mask")
        picture_columns = list(self.image_columns)
        if self.mask_column:
            picture_columns.append(self.mask_column)
        check_image_columns(rows, picture_columns, name)

    def read(self, index: int):
        row = self.rows[index]
        name = str(row.get("id", index))
        images = []
        for column in self.image_columns:
            image, spec = self._picture(name, row, column)
            images.append((f"{name} ({column})", image, spec))
        mask = None
        if self.mask_column is not None:
            mask = self._mask(name, row)
        return name, images, mask

    def __getitem__(self, index: int) -> dict:
        """Return a sample, for slices of volumes with `patient`, `place` and `spacing`, see [`slice_volumes`]."""
        item = super().__getitem__(index)
        column_names = set(self.rows.column_names)
        if column_names.issuperset(CASES):
            item["patient"] = item["case"]
            item["case"] = str(self._values(index, ["case"])["case"])
        if column_names.issuperset(("place", "spacing")):
            item.update(self._values(index, ["place", "spacing"]))
        return item

    def read_mask(self, index: int):
        if self.mask_column is None:
            return None
        columns = [self.mask_column]
        if "id" in self.rows.column_names:
            columns.append("id")
        row = self._values(index, columns)
        return self._mask(str(row.get("id", index)), row)

    def _values(
        self,
        index: int,
        columns: list[str],
    ) -> dict[str, Any]:
        """Return some columns of a row, without reading the others."""
        return self.rows.select_columns(columns)[index]

    def source(self, index: int) -> bytes:
        return content_of(self.rows[index][self.image_columns[0]])

    def _mask(self, name: str, row: dict) -> tuple[str, Picture]:
        mask, _ = self._picture(name, row, self.mask_column)
        return f"{name} ({self.mask_column})", mask

    def _picture(
        self,
        name: str,
        row: dict,
        column: str,
    ) -> tuple[Picture, InputSpec | None]:
        """Return an image with its input spec, or the mask."""
        stored = row[column]
        if stored is None:
            raise ValueError(f"Row {name} of split {self.name!r}: the column {column!r} is empty.")
        try:
            content = content_of(stored)
            if column == self.mask_column:
                return read_picture(content, as_stored=True), None
            return read_picture(content, self.spec), ranged(self.spec, content, is_part=False)
        except Exception as error:  # Pillow raises many error types for a broken file.
            raise ValueError(f"Row {name} of split {self.name!r}: {column} cannot be read: {error}") from error


@dataclass(frozen=True)
class VolumeSettings:
    """Settings of volumes, see [`slice_volumes`]."""

    plane: Literal["axial", "coronal", "sagittal"] = "axial"
    window: tuple[float, float] | None = None
    percentiles: tuple[Percentile, Percentile] | None = None
    num_proc: PositiveInt | None = None


def slice_volumes(
    samples: Sequence[FileSample],
    encoding: LabelEncoding,
    plane: str = "axial",
    window: Sequence[float] | None = None,
    percentiles: Sequence[float] | None = None,
    foreground_only: bool = False,
    num_proc: int | None = None,
) -> datasets.Dataset:
    """Convert volumes to a data set with one row per slice.

    The columns are `id`, `patient` (or another case of the sample, see [`FileSample`]), `case` (id of the volume),
    `image`, and `mask` if the samples have masks. Without `foreground_only` the rows also have `place`, the index of
    the slice in its volume, and `spacing` (see [`~modeling_vitp.images.volumes.Volume.spacing`]).
    [`~modeling_vitp.images.volumes.Volume`] cuts the slices.

    Args:
        samples: samples with one file (NIfTI, or the folder of a DICOM series), which becomes a gray image, or with
            three files, which become the channels of an image.
        encoding: encoding of the masks, to find slices with foreground.
        plane: `"axial"`, `"coronal"` or `"sagittal"`.
        window: low and high value in the units of the volume, mapped to black and white.
        percentiles: low and high percentile in [0, 100] of the non-zero values of each volume, instead of `window`.
        foreground_only: whether to leave out slices that have no pixel of a class other than the first.
        num_proc: number of processes.

    Raises:
        ValueError: if a volume cannot be read (see [`~modeling_vitp.images.volumes.open_volume`]), differs in shape or
            position from its mask or the other channels, or has a mask with values that are not integers.
    """
    check_cut(plane, window, percentiles)
    # The modification times are part of the cache key, so that changed files are converted again.
    files = [(sample, modification_times(sample)) for sample in samples]
    settings = {
        "plane": plane,
        "window": window,
        "percentiles": percentiles,
        "foreground_only": foreground_only,
        "classes": [(item.value, item.name) for item in encoding.classes],
        "ignore": encoding.ignore + encoding.negative,
        "first_column": "right or anterior",  # Part of the cache key: slices of older caches are mirrored.
    }
    try:
        return datasets.Dataset.from_generator(
            slices,
            features=features_of_slices(samples[0].mask is not None, foreground_only),
            gen_kwargs={"files": files, "settings": settings},
            num_proc=min(num_proc, len(files)) if num_proc else None,
        )
    except datasets.exceptions.DatasetGenerationError as error:
        raise error.__cause__ from None


def features_of_slices(has_masks: bool, foreground_only: bool) -> datasets.Features:
    """Return the columns of [`slice_volumes`]."""
    features = {
        "id": datasets.Value("string"),
        "patient": datasets.Value("string"),
        "case": datasets.Value("string"),
        "image": datasets.Image(),
    }
    if has_masks:
        features["mask"] = datasets.Image()
    if not foreground_only:
        features["place"] = datasets.Value("int32")
        features["spacing"] = datasets.List(datasets.Value("float64"), length=3)
    return datasets.Features(features)


def modification_times(sample: FileSample) -> list[int]:
    """Return the modification time of each file of a sample, in nanoseconds."""
    times = []
    for path in files_of_sample(sample):
        for file in files_of(path):
            times.append(file.stat().st_mtime_ns)
    return times


def slices(files: list[tuple[FileSample, list[int]]], settings: Mapping) -> Iterator[dict]:
    classes = [{"name": name, "value": value} for value, name in settings["classes"]]
    encoding = LabelEncoding(classes, ignore=settings["ignore"])
    plane = settings["plane"]
    for sample, _ in files:
        volume_slices = VolumeSlices(
            sample.images,
            plane,
            settings["window"],
            settings["percentiles"],
            sample.mask,
        )
        for index in range(len(volume_slices)):
            row = {
                "id": f"{sample.id}/{plane}_{index:04d}",
                "patient": sample.case,
                "case": sample.id,
                "image": volume_slices.image(index),
            }
            if sample.mask is not None:
                labels = volume_slices.mask(index)
                class_indices = encoding.encode(labels.astype(np.int32), str(sample.mask))
                is_foreground = (class_indices > 0) & (class_indices < len(classes))
                if settings["foreground_only"] and not is_foreground.any():
                    continue
                row["mask"] = PIL.Image.fromarray(labels)
            if not settings["foreground_only"]:
                row["place"] = index
                row["spacing"] = volume_slices.volumes[0].spacing(plane)
            yield row


@dataclass(kw_only=True)
class DenseData(DataSettings):
    """Segmentation settings in `data` of a configuration, see [`DataSettings`].

    Args:
        classes: classes of the masks, see [`LabelEncoding`].
        splits: settings of each split. For files: arguments of [`find_samples`], and optionally `tile` for windows
            (see [`ImageFiles`]) or, with `volumes`, `foreground_only`. For `dataset_name`: name of the split in
            `datasets`.
        columns: column names, see [`Rows`].
        mask_encoding, ignore: encoding of the masks, see [`LabelEncoding`].
        volumes: `plane`, and `window` or `percentiles`, if the files are volumes (NIfTI or folders of DICOM series),
            see [`slice_volumes`]. `input_spec` is for images.
        images: expected number of images (or pairs) of all splits. Another number is a warning. Not used
            for volumes and for splits that are cut into windows.
    """

    infer_options = ("classes",)
    roles = tuple(USUAL)
    template = (
        "data: {root: FOLDER, splits: {train: {image: 'train/images/{name}.png', mask: 'train/masks/{name}.png'}, "
        "test: {image: 'test/images/{name}.png', mask: 'test/masks/{name}.png'}}, "
        "classes: [{name: soil, value: 0}, {name: crop, value: 1}], ignore: [255]}"
    )

    classes: Sequence[Mapping]
    splits: Mapping[str, Mapping | str]
    columns: Mapping[str, str] | None = None
    mask_encoding: Literal["value", "color"] = "value"
    ignore: Sequence = ()
    volumes: Mapping | None = None
    images: PositiveInt | None = None
    encoding: LabelEncoding = field(init=False)

    def __post_init__(self):
        super().__post_init__()
        self._check_options()
        self.encoding = LabelEncoding(self.classes, self.mask_encoding, self.ignore)
        self.volume_settings = None
        if self.volumes is not None:
            self.volume_settings = from_mapping(VolumeSettings, self.volumes, "volumes")

    def _check_options(self) -> None:
        """Raise a `ValueError` if an option is only for images or only for volumes, and the data are the other."""
        options = set()
        if self.input_spec is not None:
            options.add("input_spec")
        if self.dataset_name is not None:
            options.add("dataset_name")
        for split in self.splits.values():
            if isinstance(split, Mapping):
                options.update(split)
        if self.volumes is None:
            options_without_effect = options & {"foreground_only"}
            remedy = "without `volumes`. Set it, or remove"
        else:
            options_without_effect = options & {"input_spec", "dataset_name", "tile"}
            remedy = "with `volumes`. Remove"
        if options_without_effect:
            name = min(options_without_effect)
            raise ValueError(f"`{name}` has no effect {remedy} `{name}`.")

    @classmethod
    def from_arguments(cls, args: DenseArguments, output_dir: str) -> Self:
        """Create the settings as the parent does, also for a folder in another layout than that of the configuration.

        If the folder has no file of `splits`, but a standard layout, its splits are used. The classes of the
        configuration are kept if they fit the values in the masks. If only their number fits, the values get their
        names in order; otherwise the classes are those of [`infer_classes`]. An `eval_split` that the folder lacks, and
        a `submission` of a split that it lacks or with fields that its file names lack, are left out.

        Training splits named train or val are replaced by the split trainval if the folder has no split train.

        Raises:
            ValueError: as the parent.
        """
        if has_other_layout(args.data):
            use_settings_of_folder(args)
        data = super().from_arguments(args, output_dir)
        has_only_trainval = "trainval" in data.splits and "train" not in data.splits
        if has_only_trainval and set(args.train_splits) <= {"train", "val"}:
            args.train_splits = ["trainval"]
            args.eval_split = None
        if args.submission is not None:
            data.check_submission(args.submission)
        data._warn_of_missing_images()
        return data

    def _warn_of_missing_images(self) -> None:
        """Log a warning if the splits do not have the expected number of images."""
        is_cut = self.volumes is not None or any("tile" in split for split in self.splits.values())
        if is_cut or self.images is None or self.root is None or not Path(self.root).is_dir():
            return
        number = 0
        for name, split in self.splits.items():
            number += len(find_samples(self.root, split, name))
        if number != self.images:
            logger.warning(
                "%s has %s images, but %s are expected: scores may not be comparable.",
                self.root,
                f"{number:,}",
                f"{self.images:,}",
            )

    @classmethod
    def infer(cls, root, classes=None):
        layout_name = recognize_layout(root, layouts_of(Masks, ChangePairs))
        if layout_name is None:
            raise cls.unknown_layout(
                root,
                "images and masks of the same name, such as train/images and train/masks (volumes need a "
                "configuration, see recipes/medical.md)",
            )
        # Folder names and images by split of each role: `image`, or `before` and `after`, and `mask`.
        folder_names = {}
        images_by_role = {}
        for role in ("image", "before", "after", "mask"):
            names = getattr(LAYOUTS[layout_name], f"{role}_folders", ())
            if names:
                folder_names[role] = names
                images_by_role[role] = images_in(root, names)
        first_role = list(images_by_role)[0]
        splits = {}
        for split in images_by_role[first_role]:
            splits[split] = {}
            for role, images_by_split in images_by_role.items():
                if split in images_by_split:
                    splits[split][role] = pattern_of(images_by_split[split], root, folder_names[role])
        splits = divide_splits(splits, root)
        masks = []
        for images in images_by_role["mask"].values():
            for (path,) in images.values():
                masks.append(path)
        inferred = infer_classes(masks)
        number = len(inferred["classes"])
        if number < 2 and not classes:
            found = ", ".join(item["name"] for item in inferred["classes"]) or "none"
            raise ValueError(
                f"Expected at least two classes in the masks of {root}, such as {masks[0]}, found: {found}. Export "
                "masks with one value for each class."
            )
        lossy_masks = [path for path in masks if path.suffix.lower() in (".jpg", ".jpeg")]
        if lossy_masks and number > 2 and not classes:
            raise ValueError(
                f"{lossy_masks[0]} is a JPEG, whose compression changes the values of a mask: {number} values "
                "found. Save the masks as PNG with one value for each class, or set `classes` in a configuration, "
                "with the first and the last value of each."
            )
        return {"root": str(root), "splits": splits, **inferred}

    @property
    def image_spec(self) -> dict | None:
        """Input spec for the image processor of the model: the window or percentiles of volumes, or `input_spec`."""
        if self.volume_settings is not None:
            for name in ("window", "percentiles"):
                if getattr(self.volume_settings, name) is not None:
                    return {name: self.volumes[name]}
        return self.input_spec

    @property
    def plane(self) -> str | None:
        """Plane of the slices of volumes; `None` for images."""
        if self.volume_settings is None:
            return None
        return self.volume_settings.plane

    def _open(self, name: str) -> MaskedImages:
        settings = self.split_settings(name)
        if self.dataset_name is not None:
            rows = self.load_rows(settings)
            return Rows(
                rows,
                self.encoding,
                self.input_spec,
                self.columns,
                name,
            )
        samples = find_samples(self.root, settings, name)
        if self.volumes is None:
            files = ImageFiles(
                samples,
                self.encoding,
                self.input_spec,
                settings.get("tile"),
            )
            files.check_files(name)
            return files
        # The other processes read the slices that the first one has cached.
        with PartialState().main_process_first():
            rows = slice_volumes(
                samples,
                self.encoding,
                plane=self.volume_settings.plane,
                window=self.volume_settings.window,
                percentiles=self.volume_settings.percentiles,
                foreground_only=settings.get("foreground_only", False),
                num_proc=self.volume_settings.num_proc,
            )
        return Rows(rows, self.encoding, name=name)

    def check_submission(self, settings: Mapping[str, str]) -> None:
        """Raise a `ValueError` if masks of a split cannot be written as `submission` says."""
        name = settings["split"]
        split = self.split_settings(name)
        if self.volumes is not None or "tile" in split:
            raise ValueError(f"submission: expected whole images in {name!r}, got `tile` or `volumes`. Remove it.")
        image_patterns = list(read_split(split, name).images.values())
        available_fields = fields_of(image_patterns[0])
        if "cases" in split:
            available_fields.append("case")
        for field_name in fields_of(settings["file"]):
            if field_name not in available_fields:
                raise ValueError(
                    f"submission: file has the unknown field {field_name!r}. Fields of {name!r}: {available_fields}."
                )

    def check_disjoint(self, names: Sequence[str]) -> None:
        """Raise a `ValueError` if two of the splits share an image, even under different names, a patient or a case."""
        if self.root is not None:
            samples = {name: find_samples(self.root, self.splits[name], name) for name in names}
            self.check_files(samples)
        elif len(names) > 1:
            rows_and_columns = {}
            for name in names:
                split_rows = self._open(name)
                rows_and_columns[name] = (split_rows.rows, split_rows.image_columns)
            self.check_splits(rows_and_columns)


def has_other_layout(settings: Mapping[str, Any]) -> bool:
    """Return whether a folder has no file of the `splits` of its settings, but a standard layout."""
    root = settings.get("root")
    splits = settings.get("splits")
    if not isinstance(root, str) or not isinstance(splits, Mapping):
        return False
    patterns = []
    for name, split in splits.items():
        patterns += read_split(split, name).images.values()
    for pattern in patterns:
        if match_files(Path(root), pattern, fields_of(pattern)):
            return False
    return recognize_layout(root, layouts_of(Masks, ChangePairs)) is not None


def use_settings_of_folder(args: DenseArguments) -> None:
    """Replace the settings of the data by those of their folder, and leave out splits that it lacks."""
    args.data = settings_of_folder(args.data)
    splits = args.data["splits"]
    if args.eval_split not in splits:
        args.eval_split = None
    if args.submission is not None:
        needs_other_fields = set(fields_of(args.submission["file"])) > {"name"}
        if args.submission["split"] not in splits or needs_other_fields:
            args.submission = None


def settings_of_folder(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings with the splits and the classes of the masks in a folder.

    Args:
        settings: settings of a configuration, with the folder as `root`. The classes get their names from its `classes`
            if these describe the masks, see [`match_classes`]. Its `images`, `input_spec` and `allow_shared_images` are
            kept.
    """
    configured_classes = settings.get("classes", ())
    folder_settings = DenseData.infer(Path(settings["root"]), configured_classes)
    matched_classes = match_classes(
        folder_settings,
        configured_classes,
        settings.get("ignore", ()),
    )
    folder_settings.update(matched_classes)
    logger.warning(
        "No file of %s matches `splits` of the configuration. Used instead: the splits %s with the classes %s.",
        settings["root"],
        ", ".join(folder_settings["splits"]),
        ", ".join(item["name"] for item in folder_settings["classes"]),
    )
    for key in ("images", "input_spec", "allow_shared_images"):
        if key in settings:
            folder_settings[key] = settings[key]
    return folder_settings


def match_classes(
    folder_settings: Mapping[str, Any],
    classes: Sequence[Mapping],
    ignored_values: Sequence,
) -> dict[str, Any]:
    """Return the settings of classes that replace those of a folder, as far as a configuration describes its masks.

    Args:
        folder_settings: settings of the folder from [`DenseData.infer`].
        classes: classes of the configuration.
        ignored_values: values that the configuration ignores.

    Returns:
        - For masks with colors: the classes of the configuration if each has a color.
        - For masks with values that fit the classes of the configuration: these classes and the ignored values.
        - For other masks with as many values as the configuration has classes: its classes with these values, in order.
        - Otherwise an empty dictionary.
    """
    folder_classes = folder_settings["classes"]
    has_colors = folder_settings.get("mask_encoding") == "color"
    if has_colors:
        are_colors_configured = all("color" in item for item in classes)
        return {"classes": classes} if are_colors_configured else {}
    if values_fit(folder_settings, classes, ignored_values):
        return {"classes": classes, "ignore": ignored_values}
    if len(folder_classes) != len(classes):
        return {}
    renumbered_classes = []
    for configured_class, folder_class in zip(classes, folder_classes):
        renumbered_classes.append({**configured_class, "value": folder_class["value"]})
    return {"classes": renumbered_classes}


def values_fit(
    folder_settings: Mapping[str, Any],
    classes: Sequence[Mapping],
    ignored_values: Sequence,
) -> bool:
    """Return whether every value in the masks of a folder belongs to a class, and every class has such a value.

    A class may have a range of values, for example for masks that were saved as JPEG.

    Args:
        folder_settings: settings of the folder from [`DenseData.infer`], with `classes` by value and `ignore`.
        classes: classes of the configuration.
        ignored_values: values that the configuration ignores.
    """
    mask_values = [item["value"] for item in folder_settings["classes"]] + folder_settings["ignore"]
    unplaced_values = {value for value in mask_values if value not in ignored_values}
    labeled_values = sorted(unplaced_values)
    for item in LabelEncoding(classes).classes:
        first, last = span(item.value)
        values_of_class = [value for value in labeled_values if first <= value <= last]
        if not values_of_class:
            return False
        unplaced_values.difference_update(values_of_class)
    return not unplaced_values


def divide_splits(splits: dict[str, dict], root: Path) -> dict[str, dict]:
    """Return the splits of the lists `list/train.txt` and so on, or else of a part held out, if there is only one."""
    if splits.keys() not in ({"train"}, {UNSPLIT}):
        return splits
    (settings,) = splits.values()
    if UNSPLIT in splits:
        lists = {}
        for path in sorted(root.glob("list/*.txt")):
            if path.stem in SPLITS:
                lists[path.stem] = f"list/{path.name}"
        if "train" in lists:
            return {split: {**settings, "list": path} for split, path in lists.items()}
    cases = [sample.case for sample in find_samples(root, settings, "train")]
    return hold_out(settings, cases)


def pattern_of(
    files: Mapping[str, tuple[Path]],
    root: Path,
    folders: Sequence[str],
) -> str:
    """Return the pattern of [`find_samples`] that matches files, from their ids in [`images_in`].

    Args:
        files: files by id.
        root: folder of the data set.
        folders: possible names of the folder that is left out in the ids.

    Raises:
        ValueError: if the files are in folders of different depths.
    """
    paths = [path.relative_to(root) for (path,) in files.values()]
    depths = {len(path.parts) for path in paths}
    levels_and_names = set()
    for path in paths:
        level = level_of(path.parts, folders)
        levels_and_names.add((level, path.parts[level]))
    if len(depths) > 1 or len(levels_and_names) > 1:
        raise ValueError(f"expected all images in folders of the same depth, got {paths[0]} and {paths[-1]}.")
    folders_of_ids = [image_id.split("/")[:-1] for image_id in files]
    pattern_parts = []
    for index, names_at_depth in enumerate(zip(*folders_of_ids)):
        is_constant = len(set(names_at_depth)) == 1
        pattern_parts.append(names_at_depth[0] if is_constant else f"{{folder{index}}}")
    level, folder_name = levels_and_names.pop()
    pattern_parts.insert(level, folder_name)
    suffixes = {path.suffix for path in paths}
    pattern_parts.append(f"{{name}}{suffixes.pop()}" if len(suffixes) == 1 else "{name:[^/]+}.*")
    return "/".join(pattern_parts)


def infer_classes(paths: Sequence[Path]) -> dict[str, Any]:
    """Return `classes`, `mask_encoding` and `ignore` of [`DenseData`] for the values or colors that occur in masks.

    Negative values are ignored, and so is 255 if two other values occur.
    """
    values = set()
    colors = set()
    for path in tqdm(paths, desc="values of the masks", disable=None):
        picture = read_image(path, None, as_stored=True)
        mask = mask_array(picture, str(path), "value")
        if mask.ndim == 3:
            color_codes = mask @ [1 << 16, 1 << 8, 1]
            colors.update(np.unique(color_codes).tolist())
        else:
            values.update(np.unique(mask).tolist())
    if colors:
        for value in values:
            colors.add(pack((value, value, value)))
        classes = []
        for code in sorted(colors):
            classes.append({"name": f"color {code:06x}", "color": list(code.to_bytes(3, "big"))})
        return {"classes": classes, "mask_encoding": "color"}
    ignored_values = {value for value in values if value < 0}
    if IGNORE_INDEX in values and len(values - ignored_values) > 2:
        ignored_values.add(IGNORE_INDEX)
    classes = [{"name": f"class {value}", "value": value} for value in sorted(values - ignored_values)]
    return {"classes": classes, "ignore": sorted(ignored_values)}


class ClassPixels(Dataset):
    """Data set of pixel counts per class for the mask of each sample, int64 of shape `(num_classes,)`."""

    def __init__(self, samples: Dataset, num_classes: int):
        self.masks = []  # Data set and index of each mask.
        for split_samples in parts_of(samples):
            for index in range(len(split_samples)):
                self.masks.append((split_samples, index))
        self.num_classes = num_classes

    def __len__(self) -> int:
        return len(self.masks)

    def __getitem__(self, index: int) -> torch.Tensor:
        split_samples, split_index = self.masks[index]
        mask = split_samples.mask(split_index)
        if mask is None:
            raise ValueError("A split that is trained on or scored has no masks. Set `mask` in its settings.")
        return mask.flatten().bincount(minlength=IGNORE_INDEX + 1)[: self.num_classes]


def count_pixels(
    samples: Dataset,
    names: Sequence[str],
    num_workers: int = 0,
    kind: str = "training",
) -> dict[str, int]:
    """Return the number of pixels of each class over a data set, by class name.

    All masks are read and checked; processes share the work. Classes that never occur are logged as a warning, in which
    `kind` says which masks were read.

    Raises:
        ValueError: if a mask is missing, cannot be read or has values outside the classes, or if no pixel is labeled.
    """
    state = PartialState()
    masks = ClassPixels(samples, len(names))
    indices_of_process = share(range(len(masks)), state.num_processes, state.process_index)
    loader = DataLoader(Subset(masks, indices_of_process), batch_size=None, num_workers=num_workers)
    counts = torch.zeros(len(names), dtype=torch.int64)
    for pixels in tqdm(loader, desc="Reading masks", disable=not state.is_main_process):
        counts += pixels
    if state.num_processes > 1:
        counts = sum(gather_object([counts]))
    if not counts.any():
        raise ValueError(f"The {kind} masks have no labeled pixels: all values are in `ignore`.")
    pixels_by_class = dict(zip(names, counts.tolist()))
    absent_classes = classes_without_pixels(pixels_by_class)
    if absent_classes:
        logger.warning("Classes without pixels in the %s masks: %s.", kind, ", ".join(absent_classes))
    return pixels_by_class


def classes_without_pixels(pixels: Mapping[str, int]) -> list[str]:
    return [name for name, count in pixels.items() if not count]


def balanced_weights(pixels: Mapping[str, int]) -> list[float]:
    """Return class weights that are inverse to the pixel counts, with a mean of 1 over all pixels.

    Raises:
        ValueError: if a class has no pixels.
    """
    absent_classes = classes_without_pixels(pixels)
    if absent_classes:
        raise ValueError(f"class_weights: 'balanced' needs pixels of every class, {absent_classes} have none.")
    total = sum(pixels.values())
    return [total / (len(pixels) * count) for count in pixels.values()]


def class_weights(weights: Sequence[str] | None, pixels: Mapping[str, int]) -> list[float] | None:
    """Return the class weights of the loss, `None` for equal ones.

    Args:
        weights: one number per class, or `["balanced"]`, see [`balanced_weights`].
        pixels: number of pixels of each class, see [`count_pixels`].
    """
    if weights is None:
        return None
    if weights == ["balanced"]:
        return balanced_weights(pixels)
    return [float(weight) for weight in weights]
