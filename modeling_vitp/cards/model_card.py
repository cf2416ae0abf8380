"""Model cards filled with the recorded settings and results of a run. Values without a record are omitted."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard

from .record import FIELDS, METRICS, Fields, License, card_metadata, datasets_of, load_card, read_json, read_record
from .sections import section_pattern, table, with_section

Files = dict[str, Path | bytes]  # local file, or the content itself, by path in the repo
PAPER = "[ViTP (Visual insTruction Pretraining, arXiv 2509.17562)](https://arxiv.org/abs/2509.17562)"

CITATION = """
```bibtex
@article{li2025vitp,
  title   = {Visual Instruction Pretraining for Domain-Specific Foundation Models},
  author  = {Li, Yuxuan and Zhang, Yicheng and Tang, Wenhao and Dai, Yimian and Cheng, Ming-Ming and Li, Xiang
             and Yang, Jian},
  journal = {arXiv preprint arXiv:2509.17562},
  year    = {2025}
}
```
"""

PLACEHOLDER = "[More Information Needed]"  # in PEFT's empty template
SETTINGS = {  # descriptions in the table of settings
    "vrl_drop_ratio": "r, the share of visual tokens dropped (VRL)",
    "vrl_apply_prob": "share of samples with VRL",
    "vrl_warmup_steps": "first optimizer steps, without VRL",
    "patch_drop_ratio": "share of patches dropped before the ViT",
    "patch_drop_end": "share of the optimizer steps, at the end, without dropped patches",
    "answer_mask_ratio": "share of answer tokens masked in the input",
}
FROM_METRICS = "From the `metrics.json` of the run, which has further values."
TRUST = ", trust_remote_code=True"
NOT_RESULTS = ("runtime", "per_second", "epoch", "num_tokens", "entropy", "_time")


def fill_card(
    entry: Any,
    source: Path,
    folder: Path,
    files: Files,
    repo_id: str,
    license: License,
) -> ModelCard:
    """Return the existing card of a folder, or a new one, with sections and metadata from the run.

    Args:
        entry: declaration of the model type, a `ModelEntry` of `auto/registry.py`.
        source: folder of the run, with its record and metrics.
        folder: folder that is pushed.
        files: pushed files by path in the repo.
        repo_id: target of the push, from which the example loads the model.
        license: license fields.
    """
    record = read_record(source)
    metrics = read_json(source / METRICS)
    config_file = "adapter_config.json" if entry.push_as == "adapter" else "config.json"
    config = read_pushed(files, config_file)
    name = repo_id.split("/")[-1]
    template = read_existing_card(folder / "README.md") or new_card(name, describe_model(entry, record))
    sections = {
        "How to load": code_example(entry, config, files, repo_id),
        "Input": describe_input(files),
        "Training": describe_training(record),
        "Evaluation": describe_results(entry, metrics, record),
        "License": describe_license(license),
        "Citation": CITATION,
    }
    text = template.text
    # Results of an earlier run in the folder; those that the user wrote stay.
    is_outdated = not sections["Evaluation"] and FROM_METRICS in text
    if is_outdated:
        text = section_pattern("Evaluation").sub("", text)
    for title, section in sections.items():
        if section:
            text = with_section(text, title, section)

    card = ModelCard(f"---\n{{}}\n---\n\n{text.strip()}\n", ignore_metadata_errors=True)
    metadata = template.data.to_dict()
    metadata |= run_metadata(entry, config, record, source)
    metadata["tags"] = list(dict.fromkeys([*metadata.get("tags", []), "vitp"]))
    for key in FIELDS:
        metadata[key] = license.get(key)
    for key, value in metadata.items():
        if value not in (None, []) and key != "model-index":
            card.data[key] = value
    results = eval_results(entry, metrics, record)
    if results:
        card.data["model_name"] = name
        card.data["eval_results"] = results
    elif template.data.eval_results and not is_outdated:
        card.data["model_name"] = template.data.model_name
        card.data["eval_results"] = template.data.eval_results
    return card


def new_card(name: str, description: str) -> ModelCard:
    """Return a card of a title and a description."""
    text = f"# {name}\n"
    if description:
        text += f"\n{description}\n"
    return ModelCard(f"---\n{{}}\n---\n\n{text}", ignore_metadata_errors=True)


def run_metadata(entry: Any, config: Fields, record: Fields, source: Path) -> Fields:
    """Return the metadata of a card that the run states; others stay as the user wrote them."""
    metadata = {
        "library_name": entry.library_name,
        "pipeline_tag": entry.pipeline_tag,
        "base_model": base_models(entry, config, record, source),
        "datasets": datasets_of(record),
    }
    return {key: value for key, value in metadata.items() if value}


def read_existing_card(path: Path) -> ModelCard | None:
    """Return the card of a folder, or `None` if it has none, or only PEFT's empty template."""
    if not path.is_file() or PLACEHOLDER in path.read_text():
        return None
    return load_card(path)


def describe_model(entry: Any, record: Fields) -> str:
    """Return the first sentence of a new card."""
    teacher = teacher_of(record)
    settings = record.get("settings") or {}
    if settings.get("objective") == "MaskedAutoencoder":
        return "An image backbone, trained as a masked autoencoder (arXiv 2111.06377) on images without labels."
    if teacher:
        return f"An image backbone, distilled from the patch features of `{teacher}`."
    description = entry.description or ""
    return description.format(paper=PAPER)


def base_models(entry: Any, config: Fields, record: Fields, source: Path) -> str | list[str] | None:
    """Return the Hub ids of the weights that a model was trained from."""
    base = config.get("base_model_name_or_path")  # missing if the model was combined or built from scratch
    is_on_hub = base and not Path(base).exists()
    if entry.push_as == "adapter" and is_on_hub:
        return base
    metadata = card_metadata(source)
    return record.get("base_model") or metadata.get("base_model")


def describe_input(files: Files) -> str | None:
    """Return a table of the image processor's settings."""
    processor = read_image_processor(files)
    size = processor.get("size") or {}
    spec = processor.get("input_spec") or {}
    tile = None
    if {"height", "width"} <= size.keys():
        tile = f"{size['height']} × {size['width']}"
    most_tiles = None
    if processor.get("crop_to_patches"):
        most_tiles = processor.get("max_patches")
    band_names = spec.get("band_names")
    other_settings = {name: value for name, value in spec.items() if name != "band_names"}
    rows = {
        "bands": band_names,
        "tile, in pixels": tile,
        "maximum number of tiles": most_tiles,
        "mean": processor.get("image_mean"),
        "standard deviation": processor.get("image_std"),
        "input spec": other_settings,
    }
    return settings_table(rows)


def describe_training(record: Fields) -> str | None:
    parts = []
    if record.get("command"):
        parts.append(f"```bash\n{record['command']}\n```")
    settings = record.get("settings") or {}
    teacher = teacher_of(record)
    student = settings.get("student")
    if teacher:
        text = f"Distilled from `{teacher}`."
        if student:
            text += f" Initialized from `{student}`."
        parts.append(text)
    elif record.get("base_model"):
        bases = [f"`{base}`" for base in record["base_model"]]
        parts.append(f"Initialized from {', '.join(bases)}.")
    titled_settings = {SETTINGS.get(name, name): value for name, value in settings.items()}
    described_settings = settings_table(titled_settings)
    if described_settings:
        parts.append(described_settings)
    sources = record.get("data") or []
    data_table = table_of_columns(sources)
    if data_table is not None:
        parts += ["Data:", data_table]
    if record.get("versions"):
        versions = [f"{name} {version}" for name, version in record["versions"].items()]
        parts.append(f"Versions: {', '.join(versions)}.")
    return "\n\n".join(parts) or None


def table_of_columns(entries: list[Fields]) -> str | None:
    """Return a table with a row for each entry, and a column for each key that has a value in one of them."""
    columns = []
    for entry in entries:
        for key, value in entry.items():
            if value not in (None, []) and key not in columns:
                columns.append(key)
    if not columns:
        return None
    rows = []
    for entry in entries:
        row = [cell_text(entry.get(column)) for column in columns]
        rows.append(row)
    return table(columns, rows)


def describe_results(entry: Any, metrics: Fields, record: Fields) -> str | None:
    """Return the headline metrics, the others of the whole split, those by class, and the scores of a pretraining."""
    results = list(results_of(metrics, record))
    if not results:
        return None
    rows = []
    headline_keys = set()
    for split, name, title, value in headlines(entry, metrics, record):
        headline_keys.add((split, name))
        rows.append([split, title, cell_text(value)])
    for split, name, value in results:
        is_of_class = "/" in name
        is_headline = (split, name) in headline_keys
        if not is_of_class and not is_headline:
            rows.append([split, name, cell_text(value)])
    source = FROM_METRICS
    if entry.push_as != "model" and not teacher_of(record):
        source = f"Of the whole model that this is a part of. {FROM_METRICS}"
    parts = [source, table(["split", "metric", "value"], rows)]
    parts += describe_class_results(metrics, record)
    if metrics.get("summary"):
        parts.append(metrics["summary"])
    if metrics.get("requirements"):
        rows = []
        for requirement in metrics["requirements"]:
            bound = f"{requirement['relation']} {requirement['bound']:g}"
            rows.append([requirement["score"], bound, cell_text(requirement["reached"])])
        parts.append(table(["score", "required", "reached"], rows))
    return "\n\n".join(parts)


def describe_class_results(metrics: Fields, record: Fields) -> list[str]:
    """Return a title and a table for each split with results by class."""
    scores_by_split: dict[str, dict[str, Fields]] = {}
    for split, name, value in split_results_of(metrics, record):
        metric, _, class_name = name.partition("/")
        if class_name:
            scores_by_class = scores_by_split.setdefault(split, {})
            class_scores = scores_by_class.setdefault(class_name, {"class": class_name})
            class_scores[metric] = value
    parts = []
    for split, scores_by_class in scores_by_split.items():
        rows = list(scores_by_class.values())
        parts.append(f"By class, {split}:")
        parts.append(table_of_columns(rows))
    return parts


def describe_license(license: License) -> str | None:
    if not license:
        return None
    name = license.get("license_name", license["license"])
    link = license.get("license_link", "")
    if link:
        link = f" ([text]({link}))"
    return f"{name}{link}. Weights have the license of the weights that they were trained from."


def teacher_of(record: Fields) -> str | None:
    """Return the name of the teacher of a distilled model."""
    settings = record.get("settings") or {}
    return settings.get("teacher")


def settings_table(settings: Fields) -> str | None:
    rows = []
    for name, value in settings.items():
        if value not in (None, "", [], {}):
            rows.append([name, cell_text(value)])
    if not rows:
        return None
    return table(["setting", "value"], rows)


def cell_text(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list | tuple):
        return ", ".join(map(cell_text, value))
    if value is None:
        return ""
    return str(value)


def results_of(metrics: Fields, record: Fields) -> Iterator[tuple[str, str, float]]:
    """Yield split, name and value of each result in the metrics of a run."""
    yield from split_results_of(metrics, record)
    split_names = record.get("evaluated_on") or {}
    split = split_names.get("eval", "test")
    probe = metrics.get("probe") or {}
    probe_scores = probe.get("scores") or {}
    backbone_scores = probe_scores.get("backbone") or {}
    for name, value in numbers_of(backbone_scores, "probe/"):
        yield split, name, value
    answers = metrics.get("answers") or {}
    for kind, scores in answers.items():
        for name, score in scores.items():
            yield split, f"answers/{kind}/{name}", score["own"]


def split_results_of(metrics: Fields, record: Fields) -> Iterator[tuple[str, str, float]]:
    """Yield split, name and value of each result on a whole split, without those of a probe and of answers."""
    split_names = record.get("evaluated_on") or {}
    for section in ("eval", "test"):
        split = split_names.get(section, section)
        scores = metrics.get(section) or {}
        for name, value in numbers_of(scores):
            yield split, name.removeprefix(f"{section}_"), value


def headlines(entry: Any, metrics: Fields, record: Fields) -> list[tuple[str, str, str, float]]:
    """Return split, name, title and value of at most ten results that a reader looks at first.

    The declaration of the model type names them.
    """
    declared = []
    undeclared = []
    for split, name, value in results_of(metrics, record):
        title = entry.headline_metrics.get(name)
        if title is not None:
            declared.append((split, name, title, value))
        elif "/" not in name:
            undeclared.append((split, name, name, value))
    results = declared or undeclared
    return results[:10]


def numbers_of(scores: Fields, prefix: str = "") -> Iterator[tuple[str, float]]:
    for name, value in scores.items():
        if isinstance(value, dict):
            yield from numbers_of(value, f"{prefix}{name}/")
            continue
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        is_result = not any(word in name for word in NOT_RESULTS)
        if is_number and is_result:
            yield prefix + name, value


def eval_results(entry: Any, metrics: Fields, record: Fields) -> list[EvalResult] | None:
    """Return the headline metrics for the `model-index`, or `None` if the run did not record the evaluated data."""
    data = record.get("evaluated_on")
    if entry.push_as != "model" or not data:
        return None
    dataset_name = data["name"]
    dataset_id = data.get("dataset") or dataset_name
    results = []
    for split, name, title, value in headlines(entry, metrics, record):
        metric_type = name.split("/")[-1]
        result = EvalResult(
            task_type=entry.pipeline_tag,
            dataset_type=dataset_id,
            dataset_name=dataset_name,
            dataset_split=split,
            metric_type=metric_type,
            metric_name=title,
            metric_value=value,
        )
        results.append(result)
    return results


def code_example(entry: Any, config: Fields, files: Files, repo_id: str) -> str:
    """Return Markdown with code that loads the model from the Hub and runs it.

    Args:
        entry: declaration of the model type.
        config: configuration of the model or of the LoRA adapter.
    """
    base = config.get("base_model_name_or_path")
    if entry.push_as == "adapter" and base is None:
        return (
            "The base model of this adapter was combined or built from scratch and is not saved: load the run's merged "
            "model instead."
        )
    processor_config = read_pushed(files, "preprocessor_config.json")
    has_own_model = entry.model_class is not None
    has_own_processor = bool(processor_config.get("auto_map"))
    code = entry.example.format(
        repo=repo_id,
        source="hf-hub" if "/" in repo_id else "local-dir",
        base=base,
        trust=TRUST if has_own_model else "",
        trust_processor=TRUST if has_own_processor else "",
    )
    if entry.library_name == "timm" and has_own_processor:
        code = with_image_processor(code, repo_id)
    processor_settings = read_image_processor(files)
    code = for_bands(code, config, processor_settings.get("input_spec") or {})
    return f"```python\n{code.strip()}\n```"


def with_image_processor(code: str, repo_id: str) -> str:
    """Return an example of timm with the image processor in place of timm's transform, which ignores an input spec."""
    file = 'image_processor_filename="preprocessor_config.json"'  # by default, transformers makes timm's transform
    processor = f'AutoImageProcessor.from_pretrained(\n    "{repo_id}", {file}{TRUST}\n)'
    code = re.sub(r"timm\.data\.create_transform\(.*\)", processor, code)
    code = code.replace("transform(image)[None]", 'transform(image, return_tensors="pt").pixel_values')
    return code.replace("import Image\n", "import Image\nfrom transformers import AutoImageProcessor\n")


def for_bands(code: str, config: Fields, spec: Fields) -> str:
    """Return an example with arrays of the model's channels and of the bands of the user's image.

    Args:
        config: configuration of the model or of the LoRA adapter.
        spec: input spec of the image processor, may be empty.
    """
    num_channels = None
    vision_config = config.get("vision_config") or {}
    backbone_config = config.get("backbone_config") or {}
    for section in (config, vision_config, backbone_config):
        band_names = section.get("band_names")
        if band_names and num_channels is None:
            num_channels = len(band_names)
    if num_channels is not None:
        code = code.replace("zeros(1, 3,", f"zeros(1, {num_channels},")
    num_bands = num_channels
    if spec.get("bands"):
        num_bands = 1 + max(spec["bands"])
    if spec and "pipeline(" in code:
        num_bands = num_bands or 1
        code = code.replace("# yours", "# yours, as an array: the pipeline reads files as 8-bit RGB")
    if num_bands is not None:
        code = code.replace("from PIL import Image", "import numpy as np")
        code = code.replace('Image.new("RGB", (640, 480))', f"np.zeros(({num_bands}, 480, 640), np.uint16)")
    return code


def read_image_processor(files: Files) -> Fields:
    """Return the settings of the image processor among the pushed files, or `{}` if it is missing."""
    processor_config = read_pushed(files, "processor_config.json")
    settings = processor_config.get("image_processor")
    return settings or read_pushed(files, "preprocessor_config.json")


def read_pushed(files: Files, name: str) -> Fields:
    """Return a configuration among the pushed files, or `{}` if it is missing."""
    content = files.get(name, b"{}")
    if isinstance(content, Path):
        content = content.read_bytes()
    return json.loads(content)
