"""Views of labeled images as files with masks of their classes, as a segmentation data set to probe a backbone with."""

import shutil
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torchvision.transforms.v2.functional import to_pil_image

from ...data.annotations import AnnotatedImage
from ...data.splits import spread
from ...image_processing_vitp_dense import IGNORE_INDEX
from ...images.pixels import IMAGE_PROCESSOR, ColorJitter, to_pixels
from ...vrl import keyed_generator
from .collages import Collage
from .drawing import DrawnInstructions, encode_picture
from .questions import covered_by_class, pixels_in

MOST_VIEWS = 200  # Of the training images, and of the test images.
MOST_CLASSES = IGNORE_INDEX - 1  # Of a mask with 8 bits, beside the background.


def write_views(
    drawn: DrawnInstructions,
    test_images: Sequence[AnnotatedImage],
    folder: Path,
    seed: int,
    color_jitter: dict[str, Any] | None = None,
) -> list[str]:
    """Write drawn views of the training images and windows of the test images, with masks of their classes.

    The files are `train/images`, `train/masks`, `test/images` and `test/masks`. The value of a class in the masks is
    its place in the returned names.

    The training views have the random colors of the pretraining, if it has any and they have 8 bits. Background is a
    class. The other classes are those of the training images, at most the `MOST_CLASSES` most frequent.

    Returns:
        Names of the classes, "background" first.
    """
    shutil.rmtree(folder, ignore_errors=True)
    frequencies = Counter(drawn.asker.vocabulary)
    names = [name for name, _ in frequencies.most_common(MOST_CLASSES)]
    jitter = None if color_jitter is None else ColorJitter(**color_jitter)

    train_folder = create_folders(folder / "train")
    for index, view in enumerate(training_views(drawn, seed)):
        picture = drawn.scenes.render(view)[0]
        if jitter is not None and isinstance(picture, Image.Image):
            generator = keyed_generator(seed, index, "probe colors")
            (pixels,) = jitter([to_pixels(picture, None)], IMAGE_PROCESSOR, generator)
            picture = to_pil_image(pixels)
        write_view(train_folder, index, picture, class_mask(view, names))

    test_folder = create_folders(folder / "test")
    windows = []
    for image in test_images:
        windows += drawn.fixed_views(image, overlap=0)
    for index, view in enumerate(spread(windows, MOST_VIEWS)):
        picture = drawn.scenes.render(view)[0]
        write_view(test_folder, index, picture, class_mask(view, names))
    return ["background", *names]


def training_views(drawn: DrawnInstructions, seed: int) -> list[Collage]:
    """Draw about `MOST_VIEWS` views, the same number of each of the images that are spread over the training images."""
    repeats = max(MOST_VIEWS // len(drawn.images), 1)
    views = []
    for image in spread(drawn.images, MOST_VIEWS):
        for repeat in range(repeats):
            generator = keyed_generator(seed, image.id, repeat, "probe")
            views.append(drawn.draw_view(image, generator, is_mosaic_allowed=False))
    return views


def create_folders(folder: Path) -> Path:
    """Create the folders of the images and masks of a split, and return the folder of the split."""
    for kind in ("images", "masks"):
        (folder / kind).mkdir(parents=True)
    return folder


def write_view(folder: Path, index: int, picture: Image.Image | np.ndarray, mask: np.ndarray) -> None:
    """Write the picture and the mask of a view to the folder of its split."""
    content = encode_picture(picture)["bytes"]
    suffix = "png" if content.startswith(b"\x89PNG") else "tif"
    (folder / "images" / f"{index:06}.{suffix}").write_bytes(content)
    Image.fromarray(mask).save(folder / "masks" / f"{index:06}.png")


def class_mask(view: Collage, names: Sequence[str]) -> np.ndarray:
    """Return the class of each pixel of a view, uint8 `(height, width)`: 0 for none, or from 1 the index in `names`.

    Pixels of unclear objects, of several classes, and of classes without a name are `IGNORE_INDEX`.
    """
    mask = np.zeros(view.size, dtype=np.uint8)
    num_classes = np.zeros(view.size, dtype=np.uint8)
    for label, covered in covered_by_class(view):
        if label in names:
            mask[covered] = 1 + names.index(label)
            num_classes += covered
        else:
            num_classes[covered] = 2
    if view.mask is None:
        for region in view.visible:
            if not region.is_clear:
                rows, columns = pixels_in(region.box)
                num_classes[rows, columns] = 2
    mask[num_classes > 1] = IGNORE_INDEX
    return mask
