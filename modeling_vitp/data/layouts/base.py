"""Base classes and registry of the layouts of labeled images on disk."""

from abc import ABC, abstractmethod
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

from ...command.settings import check_value
from ...images.reading import image_files, patient_of
from ..annotation_files import add_file, files_by_key, is_number
from ..annotations import AnnotatedImage, AnnotatedObject, Region, plain_words, upright_size
from ..boxes import box_area, clip
from ..folders import check_folder, images_in, split_of_path

LAYOUTS: dict[str, type["Layout"]] = {}


def register_layout(name: str) -> Callable[[type["Layout"]], type["Layout"]]:
    """Return a decorator that registers a layout under a name, for all commands that read labeled images."""

    def register(layout: type["Layout"]) -> type["Layout"]:
        layout.name = name
        LAYOUTS[name] = layout
        return layout

    return register


def layouts_about(*subjects: str) -> list[str]:
    """Return the names of the layouts with one of these subjects."""
    return sorted(name for name, layout in LAYOUTS.items() if layout.subject in subjects)


def layouts_of(*bases: type["Layout"]) -> list[str]:
    """Return the names of the layouts that are subclasses of one of these, also those of plugins."""
    return sorted(name for name, layout in LAYOUTS.items() if issubclass(layout, bases))


def recognize_layout(folder: str | Path, layouts: Collection[str] | None = None) -> str | None:
    """Return the name of the layout of a folder, or `None`. No image is read.

    Layouts that were registered last are tried first, so that those of plugins precede.

    Args:
        folder: folder of labeled images.
        layouts: names of the layouts to try. Default: all.
    """
    folder = Path(folder)
    if not folder.is_dir():
        return None
    for name in reversed(LAYOUTS):
        is_tried = layouts is None or name in layouts
        if is_tried and LAYOUTS[name].matches(folder):
            return name
    return None


class Layout(ABC):
    """Base class of the layouts of labeled images on disk.

    Annotations are assumed to be complete: an object that is not annotated does not occur in the image.

    Args:
        root: folder of the data set.
        names: mapping from annotated classes to phrases for questions and answers; `None` excludes a class. The phrase
            of a class without an entry is its name in plain words. Masks without `names` have those of
            [`default_names`].
        annotations: file or folder of the annotations, if it is not found under `root`.

    Attributes:
        name: name in the registry.
        subject: what the labels are about: `"objects"`, `"regions"` (masks), `"scene"` (classes of images) or
            `"change"`.
        options: names of further arguments of the layout.
        has_class_folders: whether the folder of an image is named after its class.
        case_source: by what [`case`] finds the case of an image, in messages.
    """

    name: ClassVar[str]
    subject: ClassVar[str]
    options: ClassVar[tuple[str, ...]] = ()
    has_class_folders: ClassVar[bool] = False
    case_source: ClassVar[str] = "tags of DICOM"

    def __init__(self, root: Path, names: dict[str, str | None] | None = None, annotations: Path | None = None):
        check_folder(root)
        names = {} if names is None else names
        check_value("names", names, Mapping[str, str | None])
        self.root = root
        self.annotations = annotations
        self._given_names = names
        self.found: set[str] = set()  # Classes of which `phrase` was asked.

    @cached_property
    def names(self) -> dict[str, str | None]:
        """Phrases of the annotated classes; `None` excludes a class."""
        return self._given_names or self.default_names()

    @property
    def has_default_names(self) -> bool:
        """Return whether the names are those of [`default_names`]."""
        return not self._given_names and bool(self.names)

    def default_names(self) -> dict[str, str | None]:
        """Return the names of a layout that is opened without names."""
        return {}

    @classmethod
    def matches(cls, root: Path) -> bool:
        """Return whether a folder has this layout, by the names of its files and the content of few annotations."""
        return False

    @abstractmethod
    def splits(self) -> dict[str, dict[str, tuple[Path, ...]]]:
        """Return the file, or the two files, of each image by split and image id; `UNSPLIT` if there are no splits."""

    @cached_property
    def split_images(self) -> dict[str, dict[str, tuple[Path, ...]]]:
        """Files of the images of each split, see [`splits`], for which the folder is searched once."""
        return self.splits()

    def annotate(self, image_id: str, paths: tuple[Path, ...]) -> list[AnnotatedImage]:
        """Read the annotation of an image, or those of the slices of a volume, for questions about it.

        Raises:
            ValueError: If a file is invalid; the message names it.
        """
        raise NotImplementedError

    def case(self, path: Path) -> str | None:
        """Return the case, which must be in one split only, or `None`: the patient in the tags of DICOM."""
        return patient_of(path)

    def phrase(self, label: str) -> str | None:
        """Return the phrase of a class in questions, or `None` if the class is excluded."""
        self.found.add(label)
        return self.names[label] if label in self.names else plain_words(label)


class ClassLayout(Layout):
    """Base class of layouts of images with classes."""

    subject = "scene"

    def phrases(self, labels: Collection[str]) -> tuple[str, ...]:
        """Return the sorted phrases of the classes of an image, without those of excluded classes."""
        phrases = {self.phrase(label) for label in labels}
        return tuple(sorted(phrases - {None}))

    @abstractmethod
    def data_settings(self) -> dict[str, Any]:
        """Return the settings of the classification's `data`: `splits`, and `table` and `multi_label` of a table.

        Raises:
            ValueError: If the labels are invalid; the message names the file.
        """


class PairedLayout(Layout):
    """Base class of layouts whose images have annotation files of the same name.

    Attributes:
        annotation: name of an annotation file in error messages.
        image_folders: names of the folders of images.
    """

    annotation: ClassVar[str]
    image_folders: ClassVar[tuple[str, ...]]
    _files: dict[str, Path]  # Annotation files by image id.

    def splits(self):
        return images_in(self.root, self.image_folders)

    @cached_property
    def _ids(self) -> set[str]:
        ids = set()
        for images in self.split_images.values():
            ids.update(images)
        return ids

    @cached_property
    def _named(self) -> dict[str, list[Path]]:
        """Annotation files by name, without those that are found by an image id."""
        files_by_name = defaultdict(list)
        for image_id, path in self._files.items():
            if image_id not in self._ids:
                files_by_name[path.stem].append(path)
        return files_by_name

    @cached_property
    def _num_images(self) -> Counter[str]:
        """Number of images of each name."""
        return Counter(image_id.rpartition("/")[2] for image_id in self._ids)

    def _file(self, image_id: str, path: Path) -> Path:
        """Return the annotation file of an image, by its id or else by its name if the name is unique."""
        if image_id in self._files:
            return self._files[image_id]
        candidates = self._named.get(path.stem, [])
        if len(candidates) == 1 and self._num_images[path.stem] <= 1:
            return candidates[0]
        if candidates:
            problem = f"is ambiguous, because several images or files have this name, such as {candidates[-1]}"
        else:
            problem = f"was not found under {self.annotations or self.root}"
        raise ValueError(
            f"The {self.annotation} of {path} {problem}. Expected a file of the same name as the image, in the same "
            "subfolders if names repeat."
        )


class ObjectLayout(PairedLayout):
    """Base class of layouts of objects with boxes.

    By default each image has an annotation file of the same name with the suffix `suffix`, beside the image or in a
    folder of labels beside the folder `images`. Such a layout implements [`read_objects`], and [`matches`] to be
    recognized:

    ```python
    @register_layout("labelme")
    class LabelMe(ObjectLayout):
        suffix = ".json"

        @classmethod
        def matches(cls, root): ...

        @classmethod
        def read_objects(cls, annotation, image, size): ...
    ```

    Attributes:
        suffix: suffix of the annotation files.
        is_sparse: whether an image without an annotation file has no objects. [`read_objects`] is then called with a
            path that does not exist.
        is_oriented: whether the boxes are oriented.
        has_shared_files: whether an annotation file may annotate several images.
        lists_images: whether the annotation files list the images; other images in the folder are ignored.
    """

    subject = "objects"
    annotation = "annotation"
    image_folders = ("images",)
    suffix: ClassVar[str]
    is_sparse: ClassVar[bool] = False
    is_oriented: ClassVar[bool] = False
    has_shared_files: ClassVar[bool] = False
    lists_images: ClassVar[bool] = False

    @classmethod
    @abstractmethod
    def read_objects(
        cls,
        annotation: Any,
        image: Path,
        size: tuple[int, int],
    ) -> list[AnnotatedObject]:
        """Read the objects of an image from its annotation.

        Args:
            annotation: path of the annotation file of the image. A layout that overrides [`match`] gets the annotation
                that its `match` returns, such as a part of a file with the annotations of all images.
            image: path of the image.
            size: height and width of the image in pixels.

        Returns:
            The objects with boxes in pixels of the image, or an empty list for an image without objects.

        Raises:
            ValueError: If the annotation is invalid. The message names its file and the invalid object.
        """

    @classmethod
    def match(
        cls,
        root: Path,
        images: Path,
        annotations: Path | None,
        class_property: str | None = None,
    ) -> tuple[dict[str, Path], dict[str, Any]]:
        """Return the images of a folder, and their annotations as [`read_objects`] takes them, by name without suffix.

        Args:
            root: folder of the data set.
            images: folder of the images, also in subfolders.
            annotations: file or folder of the annotations. Without annotations, each image has `None`.
            class_property: property with the class of a feature in GeoJSON and GeoPackage.

        Raises:
            ValueError: If two files have the same name, or no file is found.
        """
        image_paths = images_by_name(images)
        if annotations is None:
            return image_paths, dict.fromkeys(image_paths)
        files = files_by_key(annotations, cls.suffix)
        if cls.is_sparse:
            files_of_images = {}
            for name in image_paths:
                files_of_images[name] = files.get(name, annotations / f"{name}{cls.suffix}")
            files = files_of_images
        return image_paths, files

    def splits(self):
        splits = images_in(self.root, self.image_folders)
        if splits:
            return splits
        for path in image_files(self.root):
            name = path.relative_to(self.root)
            images_of_split = splits.setdefault(split_of_path(name), {})
            images_of_split[name.with_suffix("").as_posix()] = (path,)
        return splits

    @cached_property
    def _files(self) -> dict[str, Path]:
        annotations = self.annotations or self.root
        base = self.root if annotations.is_relative_to(self.root) else annotations

        def image_id(path: Path) -> str:
            parts = []
            for folder in path.relative_to(base).parent.parts:
                name = folder.lower()
                is_of_annotations = name == "annfiles" or "label" in name
                if name not in self.image_folders and not is_of_annotations:
                    parts.append(folder)
            parts.append(path.stem)
            return "/".join(parts)

        return files_by_key(annotations, self.suffix, image_id, within="label")

    def annotation_file(self, image_id: str, path: Path) -> Path | None:
        """Return the annotation file of an image, or `None` if the image is not annotated."""
        if image_id in self._files:
            return self._files[image_id]
        files_of_same_name = self._named.get(path.stem)
        return files_of_same_name[0] if files_of_same_name else None

    def _file(self, image_id: str, path: Path) -> Path:
        if self.is_sparse and self.annotation_file(image_id, path) is None:
            return path.with_suffix(self.suffix)
        return super()._file(image_id, path)

    def split_list(self, split: str) -> Path | None:
        """Return the file that lists the images of a split, or `None`."""
        return None

    def class_names(self) -> list[str]:
        """Return the names of the annotated classes."""
        names = set()
        for images in self.split_images.values():
            for image_id, (path,) in images.items():
                annotation = self.annotation_file(image_id, path)
                if annotation is None:
                    continue
                for item in self.read_objects(annotation, path, upright_size(path)):
                    names.add(item.label)
        return sorted(names)

    def annotate(self, image_id, paths):
        (path,) = paths
        size = upright_size(path)
        objects = self.read_objects(self._file(image_id, path), path, size)
        return [AnnotatedImage(image_id, paths, size, self.regions(objects, size))]

    def regions(self, objects: list[AnnotatedObject], size: tuple[int, int]) -> tuple[Region, ...]:
        """Return the regions of all objects whose class is not excluded, with boxes clipped to the image."""
        regions = []
        for item in objects:
            region = self._region(item, size)
            if region is not None:
                regions.append(region)
        return tuple(regions)

    def _region(self, item: AnnotatedObject, size: tuple[int, int]) -> Region | None:
        # The box and the area may be infinite, and the label or the caption in a JSON file may be a number.
        has_label = isinstance(item.label, str) and item.label != ""
        has_finite_box = all(is_number(side) for side in item.box)
        has_valid_area = item.area is None or is_number(item.area)
        has_valid_caption = item.caption is None or isinstance(item.caption, str)
        if not (has_label and has_finite_box and has_valid_area and has_valid_caption):
            raise ValueError(
                f"{item.where}: expected a class name, a box and an area of finite numbers and a caption of text, got "
                f"{item.label!r}, {list(item.box)}, {item.area} and {item.caption!r}."
            )
        phrase = self.phrase(item.label)
        if phrase is None:
            return None
        height, width = size
        box = clip(item.box, (0, 0, width, height))
        if box_area(box) <= 0:
            raise ValueError(
                f"{item.where}: the box {list(item.box)} of {item.label!r} has no area inside the image of {width} x "
                f"{height} pixels."
            )
        area = box_area(box)
        if item.area is not None:
            area = min(item.area, area)
        is_clear = not (item.is_crowd or item.is_difficult)
        return Region(phrase, box, area, item.caption, is_clear)


def images_by_name(folder: Path) -> dict[str, Path]:
    """Return the images of a folder and its subfolders, by name without suffix."""
    images = {}
    for path in image_files(folder):
        add_file(images, path.stem, path)
    if not images:
        raise ValueError(f"No images found in {folder}.")
    return images
