"""Model cards filled with the recorded settings and results of a run. Values without a record are omitted."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard

from .record import FIELDS, METRICS, card_metadata, datasets_of, load_card, read_json, read_record
from .sections import section_pattern, table, with_section

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
    "answer_mask_ratio": "share of answer tokens masked in the input",
}
FROM_METRICS = "From the `metrics.json` of the run, which has further values."
NOT_RESULTS = ("runtime", "per_second", "epoch", "num_tokens", "entropy", "_time")


def fill_card(
    entry: Any,
    source: Path,
    folder: Path,
    files: dict[str, Path | bytes],
    repo_id: str,
    license: dict[str, str],
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
    config = read_pushed(files, "adapter_config.json" if entry.push_as == "adapter" else "config.json")
    existing_card = read_existing_card(folder / "README.md")
    if existing_card is None:
        text = f"\n# {repo_id.split('/')[-1]}\n"
        description = describe_model(entry, record)
        if description:
            text += f"\n{description}\n"
    else:
        text = existing_card.text
    sections = {
        "How to load": code_example(entry, config, files, repo_id),
        "Input": describe_input(files),
        "Training": describe_training(record),
        "Evaluation": describe_results(entry, metrics, record),
        "License": describe_license(license),
        "Citation": CITATION,
    }
    # Results of an earlier run in the folder; those that the user wrote stay.
    is_outdated = not sections["Evaluation"] and FROM_METRICS in text
    if is_outdated:
        text = section_pattern("Evaluation").sub("", text)
    for title, section in sections.items():
        if section:
            text = with_section(text, title, section)

    metadata = {} if existing_card is None else existing_card.data.to_dict()
    run_metadata = {
        "library_name": entry.library_name,
        "pipeline_tag": entry.pipeline_tag,
        "base_model": base_models(entry, config, record, source),
        "datasets": datasets_of(record),
        "tags": list(dict.fromkeys([*metadata.get("tags", []), "vitp"])),
    }
    for key, value in run_metadata.items():
        if value:  # others stay as the user wrote them
            metadata[key] = value
    for key in FIELDS:
        metadata[key] = license.get(key)
    card = ModelCard(f"---\n{{}}\n---\n\n{text.strip()}\n", ignore_metadata_errors=True)
    for key, value in metadata.items():
        if value not in (None, []) and key != "model-index":
            card.data[key] = value
    results = eval_results(entry, metrics, record)
    if results:
        card.data["model_name"] = repo_id.split("/")[-1]
        card.data["eval_results"] = results
    elif existing_card is not None and existing_card.data.eval_results and not is_outdated:
        card.data["model_name"] = existing_card.data.model_name
        card.data["eval_results"] = existing_card.data.eval_results
    return card


def read_existing_card(path: Path) -> ModelCard | None:
    """Return the card of a folder, or `None` if it has none, or only PEFT's empty template."""
    if not path.is_file() or PLACEHOLDER in path.read_text():
        return None
    return load_card(path)


def describe_model(entry: Any, record: dict[str, Any]) -> str:
    """Return the first sentence of a new card."""
    teacher = teacher_of(record)
    settings = record.get("settings") or {}
    if settings.get("objective") == "MaskedAutoencoder":
        return "An image backbone, trained as a masked autoencoder (arXiv 2111.06377) on images without labels."
    if teacher:
        return f"An image backbone, distilled from the patch features of `{teacher}`."
    return (entry.description or "").format(paper=PAPER)


def base_models(entry: Any, config: dict[str, Any], record: dict[str, Any], source: Path) -> str | list[str] | None:
    """Return the Hub ids of the weights that a model was trained from."""
    base = config.get("base_model_name_or_path")  # missing if the model was combined or built from scratch
    if entry.push_as == "adapter" and base and not Path(base).exists():
        return base
    return record.get("base_model") or card_metadata(source).get("base_model")


def describe_input(files: dict[str, Path | bytes]) -> str | None:
    """Return a table of the image processor's settings."""
    processor = read_image_processor(files)
    size = processor.get("size") or {}
    spec = processor.get("input_spec") or {}
    tile = None
    if {"height", "width"} <= size.keys():
        tile = f"{size['height']} × {size['width']}"
    rows = {
        "bands": spec.get("band_names"),
        "tile, in pixels": tile,
        "maximum number of tiles": processor.get("max_patches") if processor.get("crop_to_patches") else None,
        "mean": processor.get("image_mean"),
        "standard deviation": processor.get("image_std"),
        "input spec": {name: value for name, value in spec.items() if name != "band_names"},
    }
    return settings_table(rows)


def describe_training(record: dict[str, Any]) -> str | None:
    parts = []
    if record.get("command"):
        parts.append(f"```bash\n{record['command']}\n```")
    settings = record.get("settings") or {}
    if teacher_of(record):
        text = f"Distilled from `{teacher_of(record)}`."
        if settings.get("student"):
            text += f" Initialized from `{settings['student']}`."
        parts.append(text)
    elif record.get("base_model"):
        bases = [f"`{base}`" for base in record["base_model"]]
        parts.append(f"Initialized from {', '.join(bases)}.")
    described_settings = settings_table({SETTINGS.get(name, name): value for name, value in settings.items()})
    if described_settings:
        parts.append(described_settings)
    data_table = table_of_columns(record.get("data") or [])
    if data_table is not None:
        parts += ["Data:", data_table]
    if record.get("versions"):
        versions = [f"{name} {version}" for name, version in record["versions"].items()]
        parts.append(f"Versions: {', '.join(versions)}.")
    return "\n\n".join(parts) or None


def table_of_columns(entries: list[dict[str, Any]]) -> str | None:
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
        rows.append([cell_text(entry.get(column)) for column in columns])
    return table(columns, rows)


def describe_results(entry: Any, metrics: dict[str, Any], record: dict[str, Any]) -> str | None:
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
        if not is_of_class and (split, name) not in headline_keys:
            rows.append([split, name, cell_text(value)])
    is_whole = entry.push_as == "model" or teacher_of(record)
    source = FROM_METRICS if is_whole else f"Of the whole model that this is a part of. {FROM_METRICS}"
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


def describe_class_results(metrics: dict[str, Any], record: dict[str, Any]) -> list[str]:
    """Return a title and a table for each split with results by class."""
    scores_by_split: dict[str, dict[str, dict[str, Any]]] = {}
    for split, name, value in results_of({**metrics, "probe": {}, "answers": {}}, record):
        metric, _, class_name = name.partition("/")
        if class_name:
            class_scores = scores_by_split.setdefault(split, {}).setdefault(class_name, {"class": class_name})
            class_scores[metric] = value
    parts = []
    for split, scores_by_class in scores_by_split.items():
        parts += [f"By class, {split}:", table_of_columns(list(scores_by_class.values()))]
    return parts


def describe_license(license: dict[str, str]) -> str | None:
    if not license:
        return None
    name = license.get("license_name", license["license"])
    link = f" ([text]({license['license_link']}))" if license.get("license_link") else ""
    return f"{name}{link}. Weights have the license of the weights that they were trained from."


def teacher_of(record: dict[str, Any]) -> str | None:
    """Return the name of the teacher of a distilled model."""
    return (record.get("settings") or {}).get("teacher")


def settings_table(settings: dict[str, Any]) -> str | None:
    rows = []
    for name, value in settings.items():
        if value not in (None, "", [], {}):
            rows.append([name, cell_text(value)])
    return table(["setting", "value"], rows) if rows else None


def cell_text(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list | tuple):
        return ", ".join(map(cell_text, value))
    return "" if value is None else str(value)


def results_of(metrics: dict[str, Any], record: dict[str, Any]) -> Iterator[tuple[str, str, float]]:
    """Yield split, name and value of each result in the metrics of a run."""
    split_names = record.get("evaluated_on") or {}
    for section in ("eval", "test"):
        split = split_names.get(section, section)
        for name, value in numbers_of(metrics.get(section) or {}):
            yield split, name.removeprefix(f"{section}_"), value
    split = split_names.get("eval", "test")
    probe = metrics.get("probe") or {}
    probe_scores = probe.get("scores") or {}
    for name, value in numbers_of(probe_scores.get("backbone") or {}, "probe/"):
        yield split, name, value
    for kind, scores in (metrics.get("answers") or {}).items():
        for name, score in scores.items():
            yield split, f"answers/{kind}/{name}", score["own"]


def headlines(entry: Any, metrics: dict[str, Any], record: dict[str, Any]) -> list[tuple[str, str, str, float]]:
    """Return split, name, title and value of at most ten results that a reader looks at first.

    The declaration of the model type names them.
    """
    declared = []
    undeclared = []
    for split, name, value in results_of(metrics, record):
        if name in entry.headline_metrics:
            declared.append((split, name, entry.headline_metrics[name], value))
        elif "/" not in name:
            undeclared.append((split, name, name, value))
    return (declared or undeclared)[:10]


def numbers_of(scores: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    for name, value in scores.items():
        if isinstance(value, dict):
            yield from numbers_of(value, f"{prefix}{name}/")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            if not any(part in name for part in NOT_RESULTS):
                yield prefix + name, value


def eval_results(entry: Any, metrics: dict[str, Any], record: dict[str, Any]) -> list[EvalResult] | None:
    """Return the headline metrics for the `model-index`, or `None` if the run did not record the evaluated data."""
    data = record.get("evaluated_on")
    if entry.push_as != "model" or not data:
        return None
    results = []
    for split, name, title, value in headlines(entry, metrics, record):
        result = EvalResult(
            task_type=entry.pipeline_tag,
            dataset_type=data.get("dataset") or data["name"],
            dataset_name=data["name"],
            dataset_split=split,
            metric_type=name.split("/")[-1],
            metric_name=title,
            metric_value=value,
        )
        results.append(result)
    return results


def code_example(entry: Any, config: dict[str, Any], files: dict[str, Path | bytes], repo_id: str) -> str:
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
    trust = ", trust_remote_code=True"
    has_own_model = entry.model_class is not None
    has_own_processor = bool(read_pushed(files, "preprocessor_config.json").get("auto_map"))
    code = entry.example.format(
        repo=repo_id,
        source="hf-hub" if "/" in repo_id else "local-dir",
        base=base,
        trust=trust if has_own_model else "",
        trust_processor=trust if has_own_processor else "",
    )
    if entry.library_name == "timm" and has_own_processor:  # timm's transform ignores an input spec
        file = 'image_processor_filename="preprocessor_config.json"'  # by default, transformers makes timm's transform
        processor = f'AutoImageProcessor.from_pretrained(\n    "{repo_id}", {file}{trust}\n)'
        code = re.sub(r"timm\.data\.create_transform\(.*\)", processor, code)
        code = code.replace("transform(image)[None]", 'transform(image, return_tensors="pt").pixel_values')
        code = code.replace("import Image\n", "import Image\nfrom transformers import AutoImageProcessor\n")
    num_channels = None
    for section in (config, config.get("vision_config") or {}, config.get("backbone_config") or {}):
        if section.get("band_names") and num_channels is None:
            num_channels = len(section["band_names"])
    if num_channels is not None:
        code = code.replace("zeros(1, 3,", f"zeros(1, {num_channels},")
    spec = read_image_processor(files).get("input_spec") or {}
    num_bands = num_channels  # of the user's image
    if spec.get("bands"):
        num_bands = 1 + max(spec["bands"])
    if spec and "pipeline(" in code:
        num_bands = num_bands or 1
        code = code.replace("# yours", "# yours, as an array: the pipeline reads files as 8-bit RGB")
    if num_bands is not None:
        code = code.replace("from PIL import Image", "import numpy as np")
        code = code.replace('Image.new("RGB", (640, 480))', f"np.zeros(({num_bands}, 480, 640), np.uint16)")
    return f"```python\n{code.strip()}\n```"


def read_image_processor(files: dict[str, Path | bytes]) -> dict[str, Any]:
    """Return the settings of the image processor among the pushed files, or `{}` if it is missing."""
    settings = read_pushed(files, "processor_config.json").get("image_processor")
    return settings or read_pushed(files, "preprocessor_config.json")


def read_pushed(files: dict[str, Path | bytes], name: str) -> dict[str, Any]:
    """Return a configuration among the pushed files, or `{}` if it is missing."""
    content = files.get(name, b"{}")
    return json.loads(content if isinstance(content, bytes) else content.read_bytes())
