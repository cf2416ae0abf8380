"""The configurations of the benchmarks and mixtures have the settings that the paper or its release states.

`published_settings.tsv` has these settings with their sources. Keys begin with an option of the recipe; `head` and
`backbone` are the configurations of the model, with defaults, `data.classes` are names, and `mixture.sources` are the
sources by name. A configuration marks a setting as `paper`, `release` or `ours` by a comment at the end of its line or
of the line of a key above it, or else by the comment above its paragraph.
"""

import csv
import json
import re
from functools import reduce
from operator import getitem

import pytest
import yaml
from paths import CONFIGS, FIXTURES

from modeling_vitp import (
    ViTPAdapterConfig,
    ViTPInstanceSegmentationConfig,
    ViTPObjectDetectionConfig,
    ViTPOrientedObjectDetectionConfig,
    ViTPSegmentationConfig,
)
from modeling_vitp.pretraining import options as pretraining_options
from modeling_vitp.tasks import TASKS
from modeling_vitp.tasks import options as task_options
from modeling_vitp.training import command_line

MARK = re.compile(r"# (paper|release|ours)\b")
MODELS = {
    None: ViTPSegmentationConfig,
    "horizontal": ViTPObjectDetectionConfig,
    "oriented": ViTPOrientedObjectDetectionConfig,
    "instances": ViTPInstanceSegmentationConfig,
}


def published() -> dict[str, dict[str, dict[str, object]]]:
    """Return the stated values by configuration, key and source."""
    settings = {}
    with open(FIXTURES / "published_settings.tsv", newline="") as file:
        for row in csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE):
            assert row["source"] in ("paper", "release") and row["where"]
            for name in row["configurations"].split(","):
                values = settings.setdefault(name, {}).setdefault(row["key"], {})
                assert row["source"] not in values, f"{name}: {row['key']} is stated twice"
                values[row["source"]] = json.loads(row["value"])
    return settings


PUBLISHED = published()


def resolve(name: str, patch: pytest.MonkeyPatch) -> dict[str, object]:
    """Return the arguments of a configuration as its command parses them, with the defaults of the model."""
    path = CONFIGS / f"{name}.yaml"
    config = yaml.safe_load(path.read_text())
    patch.setattr(command_line, "check_paths", lambda arguments: None)
    words = ["--config", str(path)]
    is_pretraining = "mixture" in config
    if is_pretraining:
        options = pretraining_options.parse_options(words, "")
    else:
        task = TASKS["detection" if "task" in config else "segmentation"]
        options = task_options.parse_options(task, words, "")
    parsed = vars(options).values()
    settings = {key: value for item in parsed for key, value in vars(item).items()}
    if is_pretraining:
        sources = {source["name"]: source for source in settings["mixture"]["sources"]}
        return settings | {"mixture": {"sources": sources}}
    classes = [item["name"] if isinstance(item, dict) else item for item in settings["data"]["classes"]]
    return settings | {
        "head": MODELS[settings.get("task")](**settings["head"] or {}).to_dict(),
        "backbone": ViTPAdapterConfig(num_hidden_layers=24, **settings["backbone"] or {}).to_dict(),
        "data": settings["data"] | {"classes": classes},
    }


def marks(name: str) -> dict[tuple[str, ...], str | None]:
    """Return the mark of each key of a configuration, by its path."""
    text = (CONFIGS / f"{name}.yaml").read_text()
    lines, found, paragraph = text.splitlines(), {}, []
    for line in lines:
        mark = MARK.match(line)
        paragraph.append(mark.group(1) if mark else paragraph[-1] if line and paragraph else None)

    def visit(node: yaml.Node, path: tuple[str, ...]) -> None:
        for key, value in node.value if isinstance(node, yaml.MappingNode) else ():
            line, own = key.start_mark.line, (*path, key.value)
            mark = MARK.search(lines[line])
            found[own] = mark.group(1) if mark else found.get(path) or paragraph[line]
            visit(value, own)

    visit(yaml.compose(text), ())
    return found


def is_stated(expected: object, value: object) -> bool:
    """Return whether a value is the stated one; of a source, the stated keys are compared."""
    if isinstance(expected, dict):
        return all(value.get(key) == item for key, item in expected.items())
    return json.loads(json.dumps(value)) == expected


@pytest.mark.parametrize("name", PUBLISHED)
def test_configuration_has_published_settings(name, monkeypatch):
    """Check that each stated setting has a stated value and its source, or another value and the mark `ours`."""
    settings, marked, wrong = resolve(name, monkeypatch), marks(name), []
    for key, stated in PUBLISHED[name].items():
        path = tuple(key.split("."))
        value = reduce(getitem, path, settings)
        sources = [source for source, expected in stated.items() if is_stated(expected, value)]
        mark = next((marked[path[:depth]] for depth in range(len(path), 0, -1) if path[:depth] in marked), "default")
        if mark not in (sources and [*sources, "default"] or ["ours"]):
            wrong.append(f"{key}: {value!r} is marked {mark}, stated is {stated}")
    assert not wrong, "\n".join(wrong)
