"""Base class of the probes of frozen features."""

from pathlib import Path
from typing import ClassVar, Self

import numpy as np

from ..metrics.resampling import Scores
from .arguments import ProbeArguments
from .backbones import Backbone
from .few_labels import FewLabels


class Probe:
    """Labeled images, and simple layers that predict their labels from the features of a frozen backbone.

    Each task has a subclass in its folder, see [`~modeling_vitp.tasks.Task`].

    Attributes:
        main_score: name of the score that tables show. It is better when higher.
        title: name of this score in reports.
        control_name: name of the constant prediction of [`control`].
        options: names of the fields of [`ProbeArguments`] that only some probes use, and this one does.
        reads_patches: whether the features are the patch tokens of an image, instead of one vector.
        names: names of the classes.
        presence: classes in each training image, bool `(images, classes)`.
    """

    main_score: str
    title: str
    control_name: str
    options: ClassVar[tuple[str, ...]] = ()
    reads_patches: ClassVar[bool] = False
    names: list[str]
    presence: np.ndarray

    @classmethod
    def open(cls, args: ProbeArguments) -> Self:
        """Open the labeled images of the training and the test split.

        Raises:
            ValueError: if the data are wrong, or the splits share images.
        """
        raise NotImplementedError

    def control(self) -> dict[str, float]:
        """Return the scores of a constant prediction."""
        raise NotImplementedError

    def features(
        self,
        backbone: Backbone,
        role: str,
        image_size: int | None,
        folder: Path,
        **loading,
    ) -> np.ndarray:
        """Extract the features of a split, and store them.

        Args:
            backbone: frozen backbone.
            role: `train` or `test`.
            image_size: side of the images in pixels. Default: that of the image processor.
            folder: folder that stores the features.
            loading: further arguments of [`~modeling_vitp.probing.backbones.extract`].

        Returns:
            float32 `(images, width)`, or `(images, rows, columns, width)` of patch tokens.
        """
        raise NotImplementedError

    def probe(
        self,
        backbone: Backbone,
        draws: dict[FewLabels, list[np.ndarray]],
        image_size: int | None,
        folder: Path,
        **loading,
    ) -> dict[tuple[str, FewLabels], list[Scores]]:
        """Return the scores of each draw of training images, by the name of the probe and the number of labels.

        Args:
            draws: indices of training images, see [`~modeling_vitp.probing.few_labels.draw_labels`].
            backbone, image_size, folder, loading: see [`features`].
        """
        raise NotImplementedError
