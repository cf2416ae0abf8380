"""Pairs of images before and after a change, with masks or captions."""

from collections import defaultdict
from functools import cached_property
from pathlib import Path

from ...images.reading import visible_paths
from ..annotation_files import read_annotation
from ..annotations import AnnotatedImage, Region, connected_regions, read_mask_values, upright_size
from ..folders import UNSPLIT, have_common_names, images_in, masks_in, split_in, split_of_path
from .base import Layout, register_layout


@register_layout("changes")
class ChangePairs(Layout):
    """Image pairs `SPLIT/A` and `SPLIT/B` with masks in `SPLIT/label`, captions in `*captions*.json`, or both.

    Nonzero pixels of a mask have changed. The JSON of the captions has the format of LEVIR-CC: `images`, each with
    `filename` and `sentences` (each with `raw`). `names` may contain a phrase for `"changed region"`.
    """

    subject = "change"
    before_folders, after_folders = ("A", "Image1", "time1", "before"), ("B", "Image2", "time2", "after")
    mask_folders = ("label", "OUT", "labels", "masks", "mask")

    @classmethod
    def matches(cls, root):
        has_captions = any(root.rglob("*captions*.json"))
        others = () if has_captions else (cls.mask_folders,)
        return have_common_names(root, cls.before_folders, cls.after_folders, *others)

    def splits(self):
        before, after = (images_in(self.root, names) for names in (self.before_folders, self.after_folders))
        pairs = {}
        for split, files in before.items():
            missing = sorted(files.keys() - after.get(split, {}).keys())
            if missing:
                raise ValueError(
                    f"No image of the same name as {files[missing[0]][0]} found in {', '.join(self.after_folders)}."
                )
            pairs[split] = {name: (*paths, *after[split][name]) for name, paths in files.items()}
        return pairs

    @cached_property
    def _masks(self) -> dict[str, Path]:
        return masks_in(self.root, self.mask_folders)

    @cached_property
    def _captions(self) -> dict[str, dict[str, tuple[str, ...]]]:
        """Captions by file name and split; the split is `UNSPLIT` if the file does not state it."""
        where = self.annotations or self.root
        files = [where] if where.is_file() else visible_paths(where, "*captions*.json")
        captions = defaultdict(dict)
        for path in files:
            try:
                for image in read_annotation(path)["images"]:
                    sentences = tuple(filter(None, (sentence["raw"].strip() for sentence in image["sentences"])))
                    split = split_in(str(image.get("split") or image.get("filepath") or "")) or UNSPLIT
                    if captions[image["filename"]].setdefault(split, sentences) != sentences:
                        raise ValueError(f"{path} has different captions for two images {image['filename']!r}.")
            except (KeyError, TypeError, AttributeError) as error:
                raise ValueError(f"Expected captions in the format of LEVIR-CC in {path}: {error!r}.") from error
        return captions

    def _captions_of(self, path: Path) -> tuple[str, ...]:
        """Return the captions of an image in its split, or its only captions if its path has no split."""
        found, split = self._captions.get(path.name, {}), split_of_path(path.relative_to(self.root))
        if split == UNSPLIT and len(found) == 1:
            return next(iter(found.values()))
        return found.get(split, found.get(UNSPLIT, ()))

    def annotate(self, image_id, paths):
        size = upright_size(paths[0])
        if upright_size(paths[1]) != size:
            raise ValueError(f"{paths[0]} and {paths[1]} differ in size.")
        mask, captions = self._masks.get(image_id), self._captions_of(paths[0])
        if mask is None and not captions:
            raise ValueError(f"No mask or captions found for {paths[0]}.")
        label = self.names.get("changed region") or "changed region"
        if mask is not None:
            regions = connected_regions(read_mask_values(mask, size)[0] != 0, label)
        else:  # Without a mask, the position of a change is unknown, and so is whether anything has changed.
            regions = [Region(label, (0, 0, *size[::-1]), size[0] * size[1], is_clear=False)]
        return [AnnotatedImage(image_id, paths, size, tuple(regions), captions=captions)]
