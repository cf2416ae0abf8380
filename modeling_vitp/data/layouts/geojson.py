"""GeoJSON and GeoPackage: polygons in coordinates of the earth over GeoTIFFs."""

from functools import cached_property
from pathlib import Path

from ...images.reading import image_files
from ..folders import images_in, split_of_path
from ..geodata import SUFFIXES, FeatureFile, feature_files
from .base import ObjectLayout, images_by_name, register_layout


@register_layout("geojson")
class GeoJson(ObjectLayout):
    """GeoJSON or GeoPackage with polygons over GeoTIFFs: a file of the same name for each image, or one for a folder.

    The files are beside the images, or in `labels` for images in `images`, see [`feature_files`]. Features are clipped
    to the images, see [`FeatureFile`]. Images are those in folders `images`, or all without such a folder. An image in
    which no feature lies has no objects.

    Args:
        root, names, annotations: see [`Layout`].
        class_property: property with the class of a feature, see [`feature_files`].
    """

    suffix = ".geojson"
    has_shared_files = True
    options = ("class_property",)

    @classmethod
    def matches(cls, root):
        suffixes = {path.suffix.lower() for path in root.rglob("*")}
        has_annotations = not suffixes.isdisjoint(SUFFIXES)
        has_images = not suffixes.isdisjoint((".tif", ".tiff"))
        return has_annotations and has_images

    def __init__(
        self,
        root: Path,
        names: dict[str, str | None] | None = None,
        annotations: Path | None = None,
        class_property: str | None = None,
    ):
        super().__init__(root, names, annotations)
        self._class_property = class_property

    @classmethod
    def read_objects(cls, annotation, image, size):
        """Read the objects of an image from its [`FeatureFile`]."""
        return annotation.objects(image, size)

    @classmethod
    def match(
        cls,
        root,
        images,
        annotations,
        class_property=None,
    ):
        image_paths = images_by_name(images)
        if annotations is None:
            return image_paths, dict.fromkeys(image_paths)
        file_of_path = feature_files(root, annotations, image_paths.values(), class_property)
        files = {}
        for name, path in image_paths.items():
            if path in file_of_path:
                files[name] = file_of_path[path]
        return image_paths, files

    def splits(self):
        splits = images_in(self.root, ("images",))
        if splits:
            return splits
        for path in image_files(self.root):
            name = path.relative_to(self.root)
            images_of_split = splits.setdefault(split_of_path(name), {})
            images_of_split[name.as_posix()] = (path,)
        return splits

    @cached_property
    def _files(self) -> dict[Path, FeatureFile]:
        image_paths = []
        for images in self.split_images.values():
            for (path,) in images.values():
                image_paths.append(path)
        return feature_files(self.root, self.annotations or self.root, image_paths, self._class_property)

    @property
    def class_property(self) -> str | None:
        """Property with the class of a feature, or `None` if all features are of one class."""
        for file in self._files.values():
            return file.class_property  # All files have the same one.
        return None

    def annotation_file(self, image_id, path):
        return self._files[path].path if path in self._files else None

    def class_names(self):
        names = set()
        for file in set(self._files.values()):
            names.update(file.labels)
        return sorted(names)

    def _file(self, image_id, path):
        if path not in self._files:
            raise ValueError(
                f"No GeoJSON or GeoPackage for {path} found under {self.annotations or self.root}. Expected "
                f"{path.stem}.geojson or .gpkg, or one file for all images of the folder."
            )
        return self._files[path]
