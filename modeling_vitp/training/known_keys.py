"""Settings of a model in a mapping: a key that its configuration does not have is an error, and not left aside."""

import difflib
from collections.abc import Collection
from dataclasses import fields
from inspect import getmembers_static
from typing import Any

from transformers import CONFIG_MAPPING, PreTrainedConfig


def check_config(place: str, settings: Any, config_class: type[PreTrainedConfig], taken: Collection[str] = ()) -> None:
    """Looks whether a configuration has all of these settings, those of its parts too; their values are not looked at.

    Args:
        place: of the settings in the recipe's configuration, such as `from_scratch.vision_config`.
        settings: a mapping, or `None` for none.
        config_class: what is made of them.
        taken: names of its fields that are not set here.

    Raises:
        ValueError: names the place, the key and the nearest that there is.
    """
    check_keys(place, settings, known_keys(config_class) - {*taken}, config_class.__name__)
    for name, spec in config_class.sub_configs_defaults.items():
        part = (settings or {}).get(name)
        if isinstance(part, dict):
            is_one = issubclass(spec.config_class, PreTrainedConfig)
            check_config(
                f"{place}.{name}",
                part,
                spec.config_class if is_one else class_of(f"{place}.{name}", part, spec.model_type),
            )


def check_keys(place: str, settings: Any, known: Collection[str], owner: str) -> None:
    """Raises a `ValueError` if `settings` is no mapping, or one of its keys is not known.

    Args:
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


def class_of(place: str, settings: Any, model_type: str) -> type[PreTrainedConfig]:
    """The class of a part's configuration, by its `model_type` where it names one."""
    model_type = settings.get("model_type", model_type) if isinstance(settings, dict) else model_type
    if model_type not in CONFIG_MAPPING:
        nearest = difflib.get_close_matches(str(model_type), [*CONFIG_MAPPING], 1, 0.6)
        hint = f"; did you mean {nearest[0]!r}?" if nearest else " in transformers."
        raise ValueError(f"{place}: there is no model_type {model_type!r}{hint}")
    return CONFIG_MAPPING[model_type]
