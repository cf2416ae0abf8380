"""Settings of a model in a mapping, and of its parts: a key that its configuration does not have is an error."""

import difflib
from collections.abc import Collection
from typing import Any

from transformers import CONFIG_MAPPING, PreTrainedConfig

from ..config_settings import check_keys, known_keys


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


def class_of(place: str, settings: Any, model_type: str) -> type[PreTrainedConfig]:
    """The class of a part's configuration, by its `model_type` where it names one."""
    model_type = settings.get("model_type", model_type) if isinstance(settings, dict) else model_type
    if model_type not in CONFIG_MAPPING:
        nearest = difflib.get_close_matches(str(model_type), [*CONFIG_MAPPING], 1, 0.6)
        hint = f"; did you mean {nearest[0]!r}?" if nearest else " in transformers."
        raise ValueError(f"{place}: there is no model_type {model_type!r}{hint}")
    return CONFIG_MAPPING[model_type]
