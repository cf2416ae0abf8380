"""The `data` of a configuration of any fine-tuning: how it is read, checked and recorded."""

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any, Self, get_type_hints

from ..cards.record import public_name
from .values import check_type

logger = logging.getLogger(__name__)


class DataSettings:
    """Base of dataclasses with `root`, a folder of files, or `dataset_name`, of the Hub."""

    @classmethod
    def from_dict(cls, settings: Mapping[str, Any]) -> Self:
        """Of the `data` of a configuration.

        Raises:
            ValueError: if a setting is missing, unknown, or of the wrong type.
        """
        if not isinstance(settings, Mapping):
            raise ValueError(f"data: {str(settings)[:80]!r} is no mapping of classes, splits and files.")
        own = [item for item in fields(cls) if item.init]
        known, types = {item.name for item in own}, get_type_hints(cls)
        needed = {item.name for item in own if item.default is MISSING and item.default_factory is MISSING}
        missing, unknown = sorted(needed - set(settings)), sorted(map(str, set(settings) - known))
        if missing or unknown:
            raise ValueError(f"data: missing {missing}, unknown {unknown}; there are {sorted(known)}.")
        for name, value in settings.items():
            check_type(f"data: {name}", value, types[name])
        return cls(**settings)

    def describe(
        self, train_splits: Sequence[str], eval_split: str | None, test_split: str | None
    ) -> tuple[list[dict[str, str]], dict[str, Any]]:
        """What is trained on, and what `metrics.json` will be about, for the record of the run.

        The second has under `data` what [`from_dict`] takes.
        """
        name = public_name(self.dataset_name or self.root)
        is_on_hub = self.dataset_name is not None and not Path(self.dataset_name).exists()
        on_hub = {"dataset": self.dataset_name} if is_on_hub else {}
        trained_on = [{"name": name, "split": split, **on_hub} for split in train_splits]
        settings = {item.name: getattr(self, item.name) for item in fields(self) if item.init}
        settings = {key: value for key, value in settings.items() if value not in (None, {})}
        return trained_on, {"name": name, "eval": eval_split, "test": test_split, **on_hub, "data": settings}

    def check_shared(self, check: Callable[[Any], None], images: Any) -> None:
        """What a check of images that splits share raises, or a warning where `allow_shared_images` is set."""
        try:
            check(images)
        except ValueError as error:
            if not self.allow_shared_images:
                raise
            logger.warning("%s", error)


def check_cases(cases: Mapping[str, Iterable[str]]) -> None:
    """Raises a `ValueError` that names a case of two splits, given those of each split."""
    owners: dict[str, str] = {}
    for name, of_split in cases.items():
        for case in set(of_split):
            if owners.setdefault(case, name) != name:
                raise ValueError(f"The case {case!r} is in both splits {owners[case]!r} and {name!r}.")
