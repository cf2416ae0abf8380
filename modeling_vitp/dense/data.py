"""A data set as a configuration describes it: classes, splits, and how the files are read."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import datasets
import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from torch.utils.data import ConcatDataset, DataLoader, Dataset, Subset
from tqdm import tqdm

from ..training.batching import share
from ..training.data_settings import DataSettings, check_cases
from ..training.files import check_disjoint, check_patients, find_samples
from ..training.shared_images import check_no_shared_images, images_of_files, images_of_rows
from .classes import IGNORE_INDEX, LabelEncoding
from .samples import ImageFiles, MaskedImages, Rows
from .volumes import slice_volumes

logger = logging.getLogger(__name__)


@dataclass
class DenseData(DataSettings):
    """The `data` of a configuration.

    Args:
        classes: see [`LabelEncoding`].
        splits: by name. Of files, what [`find_samples`] takes, with `tile` (see [`ImageFiles`]) for windows, and for
            volumes `foreground_only`; of `dataset_name`, what `datasets` calls the split.
        root: the folder of files.
        dataset_name: instead of `root`, a data set of the Hub, or a folder, that `datasets.load_dataset` opens.
        dataset_config: its configuration.
        columns: see [`Rows`].
        mask_encoding, ignore: see [`LabelEncoding`].
        input_spec: how images that are not 8-bit RGB are read, see [`~modeling_vitp.InputSpec`].
        allow_shared_images: whether splits may hold the same image under different names, or, by the tags of DICOM, the
            same patient, with a warning.
        volumes: `plane`, and `window` or `percentiles`, where files are volumes, NIfTI or folders of DICOM series; see
            [`slice_volumes`].
    """

    classes: Sequence[Mapping]
    splits: Mapping[str, Mapping | str]
    root: str | None = None
    dataset_name: str | None = None
    dataset_config: str | None = None
    columns: Mapping[str, str] | None = None
    mask_encoding: str = "value"
    ignore: Sequence = ()
    input_spec: dict | None = None
    volumes: Mapping | None = None
    allow_shared_images: bool = False
    encoding: LabelEncoding = field(init=False)

    def __post_init__(self):
        if (self.root is None) == (self.dataset_name is None):
            raise ValueError("data: give either `root`, a folder of files, or `dataset_name`.")
        self.encoding = LabelEncoding(self.classes, self.mask_encoding, self.ignore)

    @property
    def image_spec(self) -> dict | None:
        """What a model's image processor has to read images by, where they are as in this data set."""
        names = [name for name in ("window", "percentiles") if (self.volumes or {}).get(name) is not None]
        return {name: self.volumes[name] for name in names} or self.input_spec

    def open(self, names: Sequence[str]) -> Dataset:
        """The samples of one or several splits, see [`MaskedImages`].

        Raises:
            ValueError: if none is named, there is no such split, or its files are not complete.
        """
        if not names:
            raise ValueError(f"No split is named, of {sorted(self.splits)}.")
        parts = []
        for name in names:
            try:
                parts.append(self._open(name))
            except OSError as error:
                raise ValueError(f"Split {name!r} cannot be opened: {error}.") from error
        return parts[0] if len(parts) == 1 else ConcatDataset(parts)

    def _open(self, name: str) -> MaskedImages:
        if name not in self.splits:
            raise ValueError(f"There is no split {name!r} in the configuration, only {sorted(self.splits)}.")
        settings = self.splits[name]
        if self.dataset_name is not None:
            rows = datasets.load_dataset(self.dataset_name, self.dataset_config, split=settings)
            return Rows(rows, self.encoding, self.input_spec, self.columns, name)
        samples = find_samples(self.root, settings, name)
        if self.volumes is None:
            files = ImageFiles(samples, self.encoding, self.input_spec, settings.get("tile"))
            files.check_files(name)
            return files
        with PartialState().main_process_first():
            rows = slice_volumes(
                samples, self.encoding, foreground_only=settings.get("foreground_only", False), **self.volumes
            )
        return Rows(rows, self.encoding, name=name)

    def check_disjoint(self, names: Sequence[str]) -> None:
        """Raises a `ValueError` if two of the splits share an image, under whatever name, a patient or a case."""
        if self.root is not None:
            samples = {name: find_samples(self.root, self.splits[name], name) for name in names}
            check_disjoint(samples)
            self.check_shared(check_patients, samples)
            self.check_shared(check_no_shared_images, images_of_files(samples))
        elif len({self.splits[name] for name in names}) < len(names):
            raise ValueError(f"Two of the splits {list(names)} are the same.")
        elif len(names) > 1:
            opened = {name: self._open(name) for name in names}
            check_cases({name: rows.cases or () for name, rows in opened.items()})
            stored = images_of_rows({name: (part.rows, part.image_columns) for name, part in opened.items()})
            self.check_shared(check_no_shared_images, stored)


class ClassPixels(Dataset):
    """Pixels of each class in the mask of each sample, int64 of shape `(num_classes,)`."""

    def __init__(self, samples: Dataset, num_classes: int):
        parts = samples.datasets if isinstance(samples, ConcatDataset) else [samples]
        self.places = [(part, index) for part in parts for index in range(len(part))]
        self.num_classes = num_classes

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: int) -> torch.Tensor:
        part, place = self.places[index]
        mask = part.mask(place)
        if mask is None:
            raise ValueError("A split to train on has no masks: give `mask` in its settings.")
        return mask.flatten().bincount(minlength=IGNORE_INDEX + 1)[: self.num_classes]


def count_pixels(samples: Dataset, names: Sequence[str], num_workers: int = 0) -> dict[str, int]:
    """Pixels of each class over a data set, by name. Every mask is read, and so checked; processes share the work.

    A warning names the classes that never occur.

    Raises:
        ValueError: if a mask is missing, cannot be read or holds values outside the classes, or if there is no pixel
            of a class at all.
    """
    state, masks = PartialState(), ClassPixels(samples, len(names))
    mine = Subset(masks, share(range(len(masks)), state.num_processes, state.process_index))
    loader = DataLoader(mine, batch_size=None, num_workers=num_workers)
    counts = torch.zeros(len(names), dtype=torch.int64)
    for pixels in tqdm(loader, desc="Reading masks", disable=not state.is_main_process):
        counts += pixels
    if state.num_processes > 1:
        counts = sum(gather_object([counts]))
    if not counts.any():
        raise ValueError("No mask to train on has a pixel of a class: all are to be ignored.")
    absent = [name for name, count in zip(names, counts.tolist()) if not count]
    if absent:
        logger.warning("The classes %s never occur in what is trained on.", absent)
    return dict(zip(names, counts.tolist()))


def balanced_weights(pixels: Mapping[str, int]) -> list[float]:
    """Weights of the classes by the inverse of their number of pixels; over all pixels their mean is 1.

    Raises:
        ValueError: if a class never occurs.
    """
    absent = [name for name, count in pixels.items() if not count]
    if absent:
        raise ValueError(f"class_weights: 'balanced' needs pixels of every class, but {absent} never occur.")
    return [sum(pixels.values()) / (len(pixels) * count) for count in pixels.values()]


def weigh_classes(
    samples: Dataset, names: Sequence[str], weights: Sequence[str] | None, num_workers: int = 0
) -> tuple[dict[str, int], list[float] | None]:
    """Pixels of each class, see [`count_pixels`], and the weights of the classes in the loss.

    Args:
        weights: a number for each class, or `["balanced"]`, see [`balanced_weights`].
    """
    pixels = count_pixels(samples, names, num_workers)
    return pixels, balanced_weights(pixels) if weights == ["balanced"] else weights and [float(w) for w in weights]
