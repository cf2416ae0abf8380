"""The check of a card's metadata, the rules of the Hub that concern cards like ours."""

import re

import yaml
from huggingface_hub.repocard_data import model_index_to_eval_results

LICENSES = (
    "afl-3.0 agpl-3.0 apache-2.0 apple-amlr apple-ascl artistic-2.0 bigcode-openrail-m bigscience-bloom-rail-1.0 "
    "bigscience-openrail-m bsd bsd-2-clause bsd-3-clause bsd-3-clause-clear bsl-1.0 c-uda cc cc-by-2.0 cc-by-2.5 "
    "cc-by-3.0 cc-by-4.0 cc-by-nc-2.0 cc-by-nc-3.0 cc-by-nc-4.0 cc-by-nc-nd-3.0 cc-by-nc-nd-4.0 cc-by-nc-sa-2.0 cc- "
    "by-nc-sa-3.0 cc-by-nc-sa-4.0 cc-by-nd-4.0 cc-by-sa-3.0 cc-by-sa-4.0 cc0-1.0 cdla-permissive-1.0 cdla- "
    "permissive-2.0 cdla-sharing-1.0 creativeml-openrail-m deepfloyd-if-license ecl-2.0 epl-1.0 epl-2.0 etalab-2.0 "
    "eupl-1.1 eupl-1.2 gemma gfdl gpl gpl-2.0 gpl-3.0 intel-research isc lgpl lgpl-2.1 lgpl-3.0 lgpl-lr llama2 "
    "llama3 llama3.1 llama3.2 llama3.3 llama4 lppl-1.3c mit mpl-2.0 ms-pl mulanpsl-2.0 ncsa odbl odc-by ofl-1.1 "
    "open-mdw openrail openrail++ osl-3.0 other pddl postgresql unknown unlicense wtfpl zlib"
).split()
COLORS = ("red", "yellow", "green", "blue", "indigo", "purple", "pink", "gray")
SDKS = ("gradio", "streamlit", "docker", "static")
STRINGS = ("library_name", "pipeline_tag", "license_name", "license_link", "title", "pretty_name", "app_file", "emoji")
LISTS = ("datasets", "metrics", "language", "tags", "base_model", "license", "task_categories", "size_categories")
REPO_ID = re.compile(r"[\w][\w.-]*(/[\w.-]+)?")


def front_matter(content: str) -> dict | None:
    """The metadata of a card, `None` if it has none; raises a `ValueError` if it is no mapping in YAML."""
    found = re.match(r"\s*---[ \t]*\r?\n(.*?)\r?\n?---[ \t]*(\r?\n|$)", content, re.DOTALL)
    if found is None:
        return None
    try:
        metadata = yaml.safe_load(found[1])
    except yaml.YAMLError as error:
        raise ValueError(f"the metadata is no YAML: {error}") from error
    if metadata is not None and not isinstance(metadata, dict):
        raise ValueError("the metadata must be a mapping")
    return metadata


def validate(content: str, repo_type: str) -> tuple[list[str], list[str]]:
    """Errors and warnings about a card."""
    try:
        metadata = front_matter(content)
    except ValueError as error:
        return [str(error)], []
    if not metadata:
        return [], ["empty or missing yaml metadata in repo card"]
    errors = []
    for key in STRINGS:
        if key in metadata and not isinstance(metadata[key], str):
            errors.append(f'"{key}" must be a string')
    values = {}
    for key in LISTS:
        value = metadata.get(key, [])
        values[key] = value if isinstance(value, list) else [value]
        if not all(isinstance(item, str) for item in values[key]):
            errors.append(f'"{key}" must be a string or a list of strings')
            values[key] = []
    errors += [
        f'"license" must be one of {LICENSES}, not {value!r}' for value in values["license"] if value not in LICENSES
    ]
    for key, kind in (("base_model", "model"), ("datasets", "data set")):
        errors += [
            f'"{key}" with value "{value}" is not valid. Use a {kind} id.'
            for value in values[key]
            if not REPO_ID.fullmatch(value)
        ]
    if "model-index" in metadata:
        try:
            model_index_to_eval_results(metadata["model-index"])
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            errors.append(f'"model-index" is not valid: {type(error).__name__}: {error}')
    if repo_type == "space":
        if metadata.get("sdk") not in SDKS:
            errors.append(f'"sdk" must be one of {SDKS}')
        for key in ("colorFrom", "colorTo"):
            if metadata.get(key, COLORS[0]) not in COLORS:
                errors.append(f'"{key}" must be one of {COLORS}')
        if len(metadata.get("short_description", "")) > 60:
            errors.append('"short_description" must have at most 60 characters')
    return errors, []
