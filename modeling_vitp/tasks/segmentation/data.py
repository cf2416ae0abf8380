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
from ...data.folders import UNSPLIT, images_in
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

    def files_or_rows(self) -> Any:
        """Return the paths or rows that the samples are read from."""
        return self.rows

    def __getitem__(self, index: int) -> dict:
        name, images, mask = self.read(index)
        tensors = [self.to_pixels(*image) for image in images]
        for (image_name, *_), tensor in zip(images, tensors):
            if tensor.shape != tensors[0].shape:
                raise ValueError(
                    f"Expected images of the same size and bands, {image_name} has {size(tensor)}, {images[0][0]} has "
                    f"{size(tensors[0])}."
                )
        item = {"id": name, "case": self.cases[index], "images": tensors}
        if mask is not None:
            item["mask"] = torch.from_numpy(self.encode(mask))
            if item["mask"].shape != tensors[0].shape[-2:]:
                raise ValueError(
                    f"Expected a mask of the size of its image, the mask {mask[0]} has {size(item['mask'])}, the image "
                    f"{images[0][0]} has {size(tensors[0])}."
                )
        return item

    def mask(self, index: int) -> torch.Tensor | None:
        """Return the mask of a sample without reading its images."""
        mask = self.read_mask(index)
        return None if mask is None else torch.from_numpy(self.encode(mask))

    def encode(self, mask: tuple[str, Picture]) -> np.ndarray:
        name, values = mask
        return self.encoding.encode(mask_array(values, name, self.encoding.by), name)

    def to_pixels(self, name: str, image: Picture, spec: InputSpec | None) -> torch.Tensor:
        try:
            return to_pixels(image, spec)
        except (OSError, ValueError) as error:
            raise ValueError(f"{name}: {error}") from error


def mask_array(mask: Picture, name: str, by: str) -> np.ndarray:
    """Return the values `(height, width)` or colors `(height, width, 3)` of a mask; `by` as in [`LabelEncoding`]."""
    if isinstance(mask, PIL.Image.Image):
        # With `color`, 8-bit gray and palette images are converted to RGB too.
        is_plain = mask.mode in (VALUES if by == "value" else ("I", "I;16", "I;16B", "F"))
        mask = np.asarray(mask if is_plain else mask.convert("RGB"))
    if mask.ndim == 3 and mask.shape[2] in (2, 4):
        mask = mask[..., :-1]  # Without the transparency of a TIFF.
    if mask.ndim == 3 and (mask.shape[2] == 1 or (by == "value" and (mask == mask[..., :1]).all())):
        mask = mask[..., 0]  # A gray mask, which may have been saved with three channels.
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
        for sample in samples:
            tiles = [None] if tile is None else windows(stored_size(sample.images[0]), **tile)
            self.rows += [(sample, window) for window in tiles]
        self.cases = [sample.case for sample, _ in self.rows]

    def files_or_rows(self) -> list[Path]:
        files = {sample.id: sample for sample, _ in self.rows}
        return [path for sample in files.values() for path in (*sample.images, sample.mask) if path is not None]

    def check_files(self, name: str) -> None:
        """Check the header and the end of every image and mask file.

        Args:
            name: name of the split.

        Raises:
            ValueError: if a file is truncated, has an orientation other than upright, or differs in size from the other
                files of its sample.
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
                    raise ValueError(f"{names[0]} is {sizes[0]}, but {names[1]} is {sizes[1]}.")

    def read(self, index: int):
        sample, window = self.rows[index]
        name = sample.id if window is None else f"{sample.id}/{window[0]}_{window[1]}"
        images = [
            (str(path), read_image(path, window, self.spec), ranged(self.spec, path, window is not None))
            for path in sample.images
        ]
        mask = self.read_mask(index)
        if mask is not None and window is not None and stored_size(sample.mask) != stored_size(sample.images[0]):
            raise ValueError(f"The mask {sample.mask} and its image {sample.images[0]} differ in size.")
        return name, images, mask

    def read_mask(self, index: int):
        sample, window = self.rows[index]
        # DICOM masks are read as stored, because a rescale slope would change the class values.
        return None if sample.mask is None else (str(sample.mask), read_image(sample.mask, window, as_stored=True))


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
        self.rows, self.cases = encoded_rows(rows), cases_of_rows(rows) or list(map(str, range(len(rows))))
        self.name = name
        found = find_columns(rows.column_names, USUAL, columns or {}, name)
        roles = ("before", "after") if "before" in found else ("image",)
        for role in set(roles) - found.keys():
            raise missing_column(rows.column_names, role, name)
        self.image_columns = [found[role] for role in roles]
        self.mask_column = found.get("mask")
        check_image_columns(rows, [*self.image_columns, *filter(None, [self.mask_column])], name)

    def read(self, index: int):
        row = self.rows[index]
        name = str(row.get("id", index))
        images = [self._picture(name, row, column) for column in self.image_columns]
        mask = None if self.mask_column is None else self._picture(name, row, self.mask_column)[:2]
        return name, images, mask

    def __getitem__(self, index: int) -> dict:
        """Return a sample, for slices of volumes with `patient`, `place` and `spacing`, see [`slice_volumes`]."""
        item, known = super().__getitem__(index), {*self.rows.column_names}
        if {*CASES} <= known:
            item |= {"patient": item["case"], "case": str(self.rows.select_columns(["case"])[index]["case"])}
        if {"place", "spacing"} <= known:
            item |= self.rows.select_columns(["place", "spacing"])[index]
        return item

    def read_mask(self, index: int):
        if self.mask_column is None:
            return None
        columns = [name for name in (self.mask_column, "id") if name in self.rows.column_names]
        row = self.rows.select_columns(columns)[index]
        return self._picture(str(row.get("id", index)), row, self.mask_column)[:2]

    def _picture(self, name: str, row: dict, column: str) -> tuple[str, Picture, InputSpec | None]:
        stored, where = row[column], f"{name} ({column})"
        if stored is None:
            raise ValueError(f"Row {name} of split {self.name!r}: the column {column!r} is empty.")
        try:
            content = content_of(stored)
            if column == self.mask_column:
                return where, read_picture(content, as_stored=True), None
            return where, read_picture(content, self.spec), ranged(self.spec, content, False)
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
    features = dict.fromkeys(("id", "patient", "case"), datasets.Value("string")) | {"image": datasets.Image()}
    if samples[0].mask is not None:
        features["mask"] = datasets.Image()
    if not foreground_only:
        features |= {"place": datasets.Value("int32"), "spacing": datasets.List(datasets.Value("float64"), length=3)}
    # The modification times are part of the cache key, so that changed files are converted again.
    files = [
        (sample, [file.stat().st_mtime_ns for path in (*sample.images, sample.mask) if path for file in files_of(path)])
        for sample in samples
    ]
    settings = {"plane": plane, "window": window, "percentiles": percentiles, "foreground_only": foreground_only}
    classes, ignore = [(item.value, item.name) for item in encoding.classes], encoding.ignore + encoding.negative
    settings |= {"classes": classes, "ignore": ignore}
    settings["first_column"] = "right or anterior"  # Part of the cache key: slices of older caches are mirrored.
    try:
        return datasets.Dataset.from_generator(
            slices,
            features=datasets.Features(features),
            gen_kwargs={"files": files, "settings": settings},
            num_proc=min(num_proc, len(files)) if num_proc else None,
        )
    except datasets.exceptions.DatasetGenerationError as error:
        raise error.__cause__ from None


def slices(files: list[tuple[FileSample, list[int]]], settings: Mapping) -> Iterator[dict]:
    classes = [{"name": name, "value": value} for value, name in settings["classes"]]
    encoding = LabelEncoding(classes, ignore=settings["ignore"])
    plane = settings["plane"]
    for sample, _ in files:
        cuts = VolumeSlices(sample.images, plane, settings["window"], settings["percentiles"], sample.mask)
        for index in range(len(cuts)):
            row = {"id": f"{sample.id}/{plane}_{index:04d}", "patient": sample.case, "case": sample.id}
            row["image"] = cuts.image(index)
            if sample.mask is not None:
                labels = cuts.mask(index)
                indices = encoding.encode(labels.astype(np.int32), str(sample.mask))
                if settings["foreground_only"] and not ((indices > 0) & (indices < len(classes))).any():
                    continue
                row["mask"] = PIL.Image.fromarray(labels)
            if not settings["foreground_only"]:
                row |= {"place": index, "spacing": cuts.volumes[0].spacing(plane)}
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
        used = {name for name in ("input_spec", "dataset_name") if getattr(self, name) is not None}
        used |= {name for split in self.splits.values() if isinstance(split, Mapping) for name in split}
        foreign = {"foreground_only"} if self.volumes is None else {"input_spec", "dataset_name", "tile"}
        for name in sorted(used & foreign):
            remedy = "without `volumes`. Set it, or remove" if self.volumes is None else "with `volumes`. Remove"
            raise ValueError(f"`{name}` has no effect {remedy} `{name}`.")
        self.encoding = LabelEncoding(self.classes, self.mask_encoding, self.ignore)
        self.volume_settings = None
        if self.volumes is not None:
            self.volume_settings = from_mapping(VolumeSettings, self.volumes, "volumes")

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
            args.data = settings_of_folder(args.data)
            args.eval_split = args.eval_split if args.eval_split in args.data["splits"] else None
            submission = args.submission
            if submission is not None and (
                submission["split"] not in args.data["splits"] or {*fields_of(submission["file"])} > {"name"}
            ):
                args.submission = None
        data = super().from_arguments(args, output_dir)
        if "trainval" in data.splits and "train" not in data.splits and {*args.train_splits} <= {"train", "val"}:
            args.train_splits, args.eval_split = ["trainval"], None
        if args.submission is not None:
            data.check_submission(args.submission)
        is_cut = data.volumes is not None or any("tile" in split for split in data.splits.values())
        if data.images is not None and data.root is not None and Path(data.root).is_dir() and not is_cut:
            number = sum(len(find_samples(data.root, split, name)) for name, split in data.splits.items())
            if number != data.images:
                logger.warning(
                    "%s has %s images, but %s are expected: scores may not be comparable.",
                    *(data.root, f"{number:,}", f"{data.images:,}"),
                )
        return data

    @classmethod
    def infer(cls, root, classes=None):
        name = recognize_layout(root, layouts_of(Masks, ChangePairs))
        if name is None:
            wanted = "images and masks of the same name, such as train/images and train/masks"
            raise cls.unknown_layout(root, f"{wanted} (volumes need a configuration, see recipes/medical.md)")
        folders = {role: getattr(LAYOUTS[name], f"{role}_folders", ()) for role in ("image", "before", "after", "mask")}
        found = {role: images_in(root, names) for role, names in folders.items() if names}
        splits = {}
        for split in next(iter(found.values())):
            files = {role: by_split[split] for role, by_split in found.items() if split in by_split}
            splits[split] = {role: pattern_of(images, root, folders[role]) for role, images in files.items()}
        lists = {path.stem: f"list/{path.name}" for path in sorted(root.glob("list/*.txt")) if path.stem in SPLITS}
        if splits.keys() == {UNSPLIT} and "train" in lists:
            splits = {split: {**splits[UNSPLIT], "list": path} for split, path in lists.items()}
        elif splits.keys() in ({"train"}, {UNSPLIT}):
            (settings,) = splits.values()
            splits = hold_out(settings, (sample.case for sample in find_samples(root, settings, "train")))
        masks = [path for images in found["mask"].values() for (path,) in images.values()]
        inferred = infer_classes(masks)
        lossy = next((path for path in masks if path.suffix.lower() in (".jpg", ".jpeg")), None)
        if lossy and len(inferred["classes"]) > 2 and not classes:
            raise ValueError(
                f"{lossy} is a JPEG, whose compression changes the values of a mask: {len(inferred['classes'])} values "
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
        return None if self.volume_settings is None else self.volume_settings.plane

    def _open(self, name: str) -> MaskedImages:
        settings = self.split_settings(name)
        if self.dataset_name is not None:
            return Rows(self.load_rows(settings), self.encoding, self.input_spec, self.columns, name)
        samples = find_samples(self.root, settings, name)
        if self.volumes is None:
            files = ImageFiles(samples, self.encoding, self.input_spec, settings.get("tile"))
            files.check_files(name)
            return files
        with PartialState().main_process_first():
            foreground_only = settings.get("foreground_only", False)
            rows = slice_volumes(samples, self.encoding, foreground_only=foreground_only, **vars(self.volume_settings))
        return Rows(rows, self.encoding, name=name)

    def check_submission(self, settings: Mapping[str, str]) -> None:
        """Raise a `ValueError` if masks of a split cannot be written as `submission` says."""
        name = settings["split"]
        split = self.split_settings(name)
        if self.volumes is not None or "tile" in split:
            raise ValueError(f"submission: expected whole images in {name!r}, got `tile` or `volumes`. Remove it.")
        known = fields_of(next(iter(read_split(split, name).images.values()))) + ["case"] * ("cases" in split)
        unknown = [field for field in fields_of(settings["file"]) if field not in known]
        if unknown:
            raise ValueError(f"submission: file has the unknown field {unknown[0]!r}. Fields of {name!r}: {known}.")

    def check_disjoint(self, names: Sequence[str]) -> None:
        """Raise a `ValueError` if two of the splits share an image, even under different names, a patient or a case."""
        if self.root is not None:
            self.check_files({name: find_samples(self.root, self.splits[name], name) for name in names})
        elif len(names) > 1:
            opened = {name: self._open(name) for name in names}
            self.check_splits({name: (part.rows, part.image_columns) for name, part in opened.items()})


def has_other_layout(settings: Mapping[str, Any]) -> bool:
    """Return whether a folder has no file of the `splits` of its settings, but a standard layout."""
    root, splits = settings.get("root"), settings.get("splits")
    if not isinstance(root, str) or not isinstance(splits, Mapping):
        return False
    patterns = [pattern for name, split in splits.items() for pattern in read_split(split, name).images.values()]
    has_files = any(match_files(Path(root), pattern, fields_of(pattern)) for pattern in patterns)
    return not has_files and recognize_layout(root, layouts_of(Masks, ChangePairs)) is not None


def settings_of_folder(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings with the splits and mask values of the folder, and class names as far as they are known."""
    known = settings.get("classes", ())
    inferred = DenseData.infer(Path(settings["root"]), known)
    if "mask_encoding" in inferred:
        inferred["classes"] = known if all("color" in item for item in known) else inferred["classes"]
    else:
        values = [item["value"] for item in inferred["classes"]] + inferred["ignore"]
        values = [value for value in values if value not in settings.get("ignore", ())]
        spans = [span(item.value) for item in LabelEncoding(known).classes]
        matches = [[first <= value <= last for value in values] for first, last in spans]
        if all(map(any, matches)) and all(map(any, zip(*matches))):  # for example masks that were saved as JPEG
            inferred |= {"classes": known, "ignore": settings.get("ignore", ())}
        elif len(inferred["classes"]) == len(known):
            inferred["classes"] = [{**name, "value": item["value"]} for name, item in zip(known, inferred["classes"])]
    shown = ", ".join(item["name"] for item in inferred["classes"])
    logger.warning(
        "No file of %s matches `splits` of the configuration. Used instead: the splits %s with the classes %s.",
        *(settings["root"], ", ".join(inferred["splits"]), shown),
    )
    kept = ("images", "input_spec", "allow_shared_images")
    return inferred | {key: settings[key] for key in kept if key in settings}


def pattern_of(files: Mapping[str, tuple[Path]], root: Path, folders: Sequence[str]) -> str:
    """Return the pattern of [`find_samples`] that matches files, from their ids in [`images_in`].

    Args:
        files: files by id.
        root: folder of the data set.
        folders: possible names of the folder that is left out in the ids.

    Raises:
        ValueError: if the files are in folders of different depths.
    """
    paths = [path.relative_to(root) for (path,) in files.values()]
    names, depths = {name.lower() for name in folders}, {len(path.parts) for path in paths}
    kinds = {next((level, part) for level, part in enumerate(path.parts) if part.lower() in names) for path in paths}
    if len(depths) > 1 or len(kinds) > 1:
        raise ValueError(f"expected all images in folders of the same depth, got {paths[0]} and {paths[-1]}.")
    ids = zip(*(image_id.split("/")[:-1] for image_id in files))
    parts = [part[0] if len({*part}) == 1 else f"{{folder{index}}}" for index, part in enumerate(ids)]
    parts.insert(*kinds.pop())
    suffixes = {path.suffix for path in paths}
    return "/".join([*parts, f"{{name}}{suffixes.pop()}" if len(suffixes) == 1 else "{name:[^/]+}.*"])


def infer_classes(paths: Sequence[Path]) -> dict[str, Any]:
    """Return `classes`, `mask_encoding` and `ignore` of [`DenseData`] for the values or colors that occur in masks.

    Negative values are ignored, and so is 255 if two other values occur.
    """
    values, colors = set(), set()
    for path in tqdm(paths, desc="values of the masks", disable=None):
        mask = mask_array(read_image(path, None, as_stored=True), str(path), "value")
        if mask.ndim == 3:
            colors.update(np.unique(mask @ [1 << 16, 1 << 8, 1]).tolist())
        else:
            values.update(np.unique(mask).tolist())
    if colors:
        colors |= {pack((value, value, value)) for value in values}
        entries = [{"name": f"color {code:06x}", "color": [*code.to_bytes(3, "big")]} for code in sorted(colors)]
        return {"classes": entries, "mask_encoding": "color"}
    ignored = {value for value in values if value < 0}
    ignored |= {IGNORE_INDEX} & values if len(values - ignored) > 2 else set()
    entries = [{"name": f"class {value}", "value": value} for value in sorted(values - ignored)]
    return {"classes": entries, "ignore": sorted(ignored)}


class ClassPixels(Dataset):
    """Data set of pixel counts per class for the mask of each sample, int64 of shape `(num_classes,)`."""

    def __init__(self, samples: Dataset, num_classes: int):
        self.masks = [(part, index) for part in parts_of(samples) for index in range(len(part))]
        self.num_classes = num_classes

    def __len__(self) -> int:
        return len(self.masks)

    def __getitem__(self, index: int) -> torch.Tensor:
        part, part_index = self.masks[index]
        mask = part.mask(part_index)
        if mask is None:
            raise ValueError("A split that is trained on or scored has no masks. Set `mask` in its settings.")
        return mask.flatten().bincount(minlength=IGNORE_INDEX + 1)[: self.num_classes]


def count_pixels(
    samples: Dataset, names: Sequence[str], num_workers: int = 0, kind: str = "training"
) -> dict[str, int]:
    """Return the number of pixels of each class over a data set, by class name.

    All masks are read and checked; processes share the work. Classes that never occur are logged as a warning, in which
    `kind` says which masks were read.

    Raises:
        ValueError: if a mask is missing, cannot be read or has values outside the classes, or if no pixel is labeled.
    """
    state, masks = PartialState(), ClassPixels(samples, len(names))
    own_masks = Subset(masks, share(range(len(masks)), state.num_processes, state.process_index))
    loader = DataLoader(own_masks, batch_size=None, num_workers=num_workers)
    counts = torch.zeros(len(names), dtype=torch.int64)
    for pixels in tqdm(loader, desc="Reading masks", disable=not state.is_main_process):
        counts += pixels
    if state.num_processes > 1:
        counts = sum(gather_object([counts]))
    if not counts.any():
        raise ValueError(f"The {kind} masks have no labeled pixels: all values are in `ignore`.")
    absent = [name for name, count in zip(names, counts.tolist()) if not count]
    if absent:
        logger.warning("Classes without pixels in the %s masks: %s.", kind, ", ".join(absent))
    return dict(zip(names, counts.tolist()))


def balanced_weights(pixels: Mapping[str, int]) -> list[float]:
    """Return class weights that are inverse to the pixel counts, with a mean of 1 over all pixels.

    Raises:
        ValueError: if a class has no pixels.
    """
    absent = [name for name, count in pixels.items() if not count]
    if absent:
        raise ValueError(f"class_weights: 'balanced' needs pixels of every class, {absent} have none.")
    return [sum(pixels.values()) / (len(pixels) * count) for count in pixels.values()]


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
