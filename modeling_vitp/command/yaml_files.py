"""YAML as configurations and mixtures are written in: a key that a mapping has twice is an error."""

from pathlib import Path
from typing import Any

import yaml


class KeysOnce(yaml.SafeLoader):
    """Of which the parent takes the last of two."""

    def compose_mapping_node(self, anchor: str | None) -> yaml.MappingNode:
        node, seen = super().compose_mapping_node(anchor), {}
        for key, _ in node.value:
            if key.tag == "tag:yaml.org,2002:merge" or not isinstance(key.value, str):
                continue
            if key.value in seen:
                raise yaml.MarkedYAMLError(
                    f"the key {key.value!r} is there already, in line {seen[key.value] + 1}",
                    problem_mark=key.start_mark,
                )
            seen[key.value] = key.start_mark.line
        return node


def read_yaml(path: str | Path) -> Any:
    """What a file holds.

    Raises:
        YAMLError: if it is no YAML, or a mapping in it has a key twice; names the line.
        OSError: if it cannot be read.
    """
    with open(path, encoding="utf-8") as file:  # by whose name errors call it
        return yaml.load(file, KeysOnce)
