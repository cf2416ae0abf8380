"""Pairs of images before and after a change, with masks or captions."""

from collections import defaultdict
from functools import cached_property
from pathlib import Path

from ...images.reading import read_errors, visible_paths
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
    before_folders = ("A", "Image1", "time1", "before")
    after_folders = ("B", "Image2", "time2", "after")
    mask_folders = ("label", "OUT", "labels", "masks", "mask")

    @classmethod
    def matches(cls, root):
        folders = [cls.before_folders, cls.after_folders]
        has_captions = any(root.rglob("*captions*.json"))
        if not has_captions:
            folders.append(cls.mask_folders)
        return have_common_names(root, *folders)

    def splits(self):
        images_before = images_in(self.root, self.before_folders)
        images_after = images_in(self.root, self.after_folders)
        pairs = {}
        for split, images in images_before.items():
            later_images = images_after.get(split, {})
            unpaired_ids = sorted(images.keys() - later_images.keys())
            if unpaired_ids:
                (path,) = images[unpaired_ids[0]]
                raise ValueError(f"No image of the same name as {path} found in {', '.join(self.after_folders)}.")
            pairs[split] = {}
            for image_id, paths in images.items():
                pairs[split][image_id] = (*paths, *later_images[image_id])
        return pairs

    @cached_property
    def _masks(self) -> dict[str, Path]:
        return masks_in(self.root, self.mask_folders)

    @cached_property
    def _captions(self) -> dict[str, dict[str, tuple[str, ...]]]:
        """Captions by file name and split; the split is `UNSPLIT` if the file does not state it."""
        location = self.annotations or self.root
        files = [location] if location.is_file() else visible_paths(location, "*captions*.json")
        captions = defaultdict(dict)
        for path in files:
            with read_errors(path, "captions in the format of LEVIR-CC"):
                for image in read_annotation(path)["images"]:
                    name = image["filename"]
                    sentences = sentences_of(image)
                    split = split_in(str(image.get("split") or image.get("filepath") or "")) or UNSPLIT
                    first_sentences = captions[name].setdefault(split, sentences)
                    if first_sentences != sentences:
                        raise ValueError(f"{path} has different captions for two images {name!r}.")
        return captions

    def _captions_of(self, path: Path) -> tuple[str, ...]:
        """Return the captions of an image in its split, or its only captions if its path has no split."""
        captions_of_splits = self._captions.get(path.name, {})
        split = split_of_path(path.relative_to(self.root))
        if split == UNSPLIT and len(captions_of_splits) == 1:
            (captions,) = captions_of_splits.values()
            return captions
        unsplit_captions = captions_of_splits.get(UNSPLIT, ())
        return captions_of_splits.get(split, unsplit_captions)

    def annotate(self, image_id, paths):
        before, after = paths
        size = upright_size(before)
        if upright_size(after) != size:
            raise ValueError(f"{before} and {after} differ in size.")
        mask = self._masks.get(image_id)
        captions = self._captions_of(before)
        if mask is None and not captions:
            raise ValueError(f"No mask or captions found for {before}.")
        label = self.names.get("changed region") or "changed region"
        if mask is not None:
            values, _ = read_mask_values(mask, size)
            regions = connected_regions(values != 0, label)
        else:  # Without a mask, the position of a change is unknown, and so is whether anything has changed.
            height, width = size
            regions = [Region(label, (0, 0, width, height), height * width, is_clear=False)]
        return [AnnotatedImage(image_id, paths, size, tuple(regions), captions=captions)]


def sentences_of(image: dict) -> tuple[str, ...]:
    """Return the nonempty captions of an image in the format of LEVIR-CC."""
    sentences = []
    for sentence in image["sentences"]:
        text = sentence["raw"].strip()
        if text:
            sentences.append(text)
    return tuple(sentences)
