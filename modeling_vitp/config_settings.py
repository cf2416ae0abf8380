"""Settings of a model's configuration by name: one that it does not have is an error, and not left aside."""

import difflib
from collections.abc import Collection
from dataclasses import fields
from inspect import getmembers_static
from typing import Any

from transformers import PreTrainedConfig


def check_keys(place: str, settings: Any, known: Collection[str], owner: str) -> None:
    """Raises a `ValueError` if `settings` is no mapping, or one of its keys is not known.

    Args:
        place: of the settings, such as `from_scratch.vision_config`.
        owner: what lists the known keys, which is named where none of them is near.
    """
    if settings is None:
        return
    if not isinstance(settings, dict):
        raise ValueError(f"{place}={str(settings)[:80]!r} is no mapping.")
    for key in settings:
        if key not in known:
            nearest = difflib.get_close_matches(str(key), known, 1, 0.6)
            hint = f"did you mean {nearest[0]!r}?" if nearest else f"its keys are those of {owner}."
            raise ValueError(f"{place}: there is no {key!r}; {hint}")


def known_keys(config_class: type[PreTrainedConfig]) -> set[str]:
    """The keys that a configuration can be made of: its fields and their other names, what it derives fields of, and
    what is saved beside them."""
    own = {field.name for field in fields(config_class)}
    derived = {name for name, value in getmembers_static(config_class) if getattr(value, "fset", None)}
    names = own | derived | {*config_class.attribute_map}
    if "rope_parameters" in own:
        names |= {"rope_theta", "partial_rotary_factor"}
    return {name for name in names if not name.startswith("_")} | {"model_type", "auto_map", "_name_or_path"}


def settings_of_head(
    config_class: type[PreTrainedConfig], settings: dict[str, Any], id2label: Any = None
) -> dict[str, Any]:
    """The settings of a model with classes, whichever way these are named.

    Args:
        settings: of the configuration; with `label2id` the classes are named too.
        id2label: names of the classes by index, or in a list.

    Raises:
        ValueError: if the configuration has no such setting.
    """
    check_keys("from_backbone", settings, known_keys(config_class), config_class.__name__)
    if id2label is None and settings.get("label2id") is not None:
        id2label = {index: label for label, index in settings["label2id"].items()}
    if id2label is None:
        return settings
    names = dict(enumerate(id2label)) if isinstance(id2label, (list, tuple)) else id2label
    names = {int(index): label for index, label in names.items()}  # strings in JSON
    return settings | {"id2label": names, "label2id": {label: index for index, label in names.items()}}
