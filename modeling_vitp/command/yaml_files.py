"""YAML as configurations and mixtures are written in: a key that a mapping has twice is an error."""

from pathlib import Path
from typing import Any

import yaml


class KeysOnce(yaml.SafeLoader):
    """Of which the parent takes the last of two."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        seen = {}
        for key, _ in node.value:
            name = getattr(key, "value", None)
            if key.tag != "tag:yaml.org,2002:merge" and isinstance(name, str):
                if name in seen:
                    raise yaml.MarkedYAMLError(
                        f"the key {name!r} is there already, in line {seen[name] + 1}", problem_mark=key.start_mark
                    )
                seen[name] = key.start_mark.line
        return super().construct_mapping(node, deep)


def read_yaml(path: str | Path) -> Any:
    """What a file holds.

    Raises:
        YAMLError: if it is no YAML, or a mapping in it has a key twice; names the line.
        OSError: if it cannot be read.
    """
    with open(path, encoding="utf-8") as file:  # by whose name errors call it
        return yaml.load(file, KeysOnce)
