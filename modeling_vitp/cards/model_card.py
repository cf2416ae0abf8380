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
    record, metrics = read_record(source), read_json(source / METRICS)
    is_adapter = entry.push_as == "adapter"
    config = read_pushed(files, "adapter_config.json" if is_adapter else "config.json")
    path = folder / "README.md"
    own = load_card(path) if path.is_file() and PLACEHOLDER not in path.read_text() else None

    text = own.text if own is not None else f"\n# {repo_id.split('/')[-1]}\n"
    description = (entry.description or "").format(paper=PAPER)
    if teacher_of(record):
        description = f"An image backbone, distilled from the patch features of `{teacher_of(record)}`."
    if (record.get("settings") or {}).get("objective") == "MaskedAutoencoder":
        description = "An image backbone, trained as a masked autoencoder (arXiv 2111.06377) on images without labels."
    if own is None and description:
        text += f"\n{description}\n"
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

    metadata = own.data.to_dict() if own is not None else {}
    bases = record.get("base_model") or card_metadata(source).get("base_model")
    base = config.get("base_model_name_or_path")  # missing if the model was combined or built from scratch
    if is_adapter and base and not Path(base).exists():
        bases = base
    of_run = {
        "library_name": entry.library_name,
        "pipeline_tag": entry.pipeline_tag,
        "base_model": bases,
        "datasets": datasets_of(record),
        "tags": list(dict.fromkeys([*metadata.get("tags", []), "vitp"])),
    }
    metadata |= {key: value for key, value in of_run.items() if value}  # others stay as the user wrote them
    metadata |= {key: license.get(key) for key in FIELDS}
    card = ModelCard(f"---\n{{}}\n---\n\n{text.strip()}\n", ignore_metadata_errors=True)
    for key, value in metadata.items():
        if value not in (None, []) and key != "model-index":
            card.data[key] = value
    results = eval_results(entry, metrics, record)
    if results:
        card.data["model_name"], card.data["eval_results"] = repo_id.split("/")[-1], results
    elif own is not None and own.data.eval_results and not is_outdated:
        card.data["model_name"], card.data["eval_results"] = own.data.model_name, own.data.eval_results
    return card


def describe_input(files: dict[str, Path | bytes]) -> str | None:
    """Return a table of the image processor's settings."""
    processor = read_image_processor(files)
    size = processor.get("size") or {}
    spec = processor.get("input_spec") or {}
    rows = {
        "bands": spec.get("band_names"),
        "tile, in pixels": f"{size['height']} × {size['width']}" if {"height", "width"} <= size.keys() else None,
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
        start = f" Initialized from `{settings['student']}`." if settings.get("student") else ""
        parts.append(f"Distilled from `{teacher_of(record)}`.{start}")
    elif record.get("base_model"):
        parts.append(f"Initialized from {', '.join(f'`{base}`' for base in record['base_model'])}.")
    parts.append(settings_table({SETTINGS.get(name, name): value for name, value in settings.items()}))
    data = record.get("data") or []
    columns = list(dict.fromkeys(key for entry in data for key, value in entry.items() if value not in (None, [])))
    if columns:
        parts.append("Data:")
        parts.append(table(columns, [[cell_text(entry.get(column)) for column in columns] for entry in data]))
    if record.get("versions"):
        listed = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
        parts.append(f"Versions: {listed}.")
    return "\n\n".join(filter(None, parts)) or None


def describe_results(entry: Any, metrics: dict[str, Any], record: dict[str, Any]) -> str | None:
    """Return the headline metrics, the others of the whole split, those by class, and the scores of a pretraining."""
    results, shown = list(results_of(metrics, record)), headlines(entry, metrics, record)
    if not results:
        return None
    keys = {(split, name) for split, name, _, _ in shown}
    rows = [(split, title, value) for split, _, title, value in shown]
    rows += [row for row in results if "/" not in row[1] and row[:2] not in keys]
    is_whole = entry.push_as == "model" or teacher_of(record)
    of = "" if is_whole else "Of the whole model that this is a part of. "
    parts = [f"{of}{FROM_METRICS}"]
    parts.append(table(["split", "metric", "value"], [[*names, cell_text(value)] for *names, value in rows]))
    by_class: dict[str, dict[str, dict[str, float]]] = {}
    for split, name, value in results_of({**metrics, "probe": {}, "answers": {}}, record):
        metric, _, label = name.partition("/")
        if label:
            by_class.setdefault(split, {}).setdefault(label, {})[metric] = value
    for split, scores in by_class.items():
        columns = list(dict.fromkeys(metric for of_class in scores.values() for metric in of_class))
        lines = [[label, *(cell_text(of_class.get(key)) for key in columns)] for label, of_class in scores.items()]
        parts += [f"By class, {split}:", table(["class", *columns], lines)]
    if metrics.get("summary"):
        parts.append(metrics["summary"])
    if metrics.get("requirements"):
        lines = []
        for found in metrics["requirements"]:
            lines.append([found["score"], f"{found['relation']} {found['bound']:g}", cell_text(found["reached"])])
        parts.append(table(["score", "required", "reached"], lines))
    return "\n\n".join(parts)


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
    rows = [[name, cell_text(value)] for name, value in settings.items() if value not in (None, "", [], {})]
    return table(["setting", "value"], rows) if rows else None


def cell_text(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list | tuple):
        return ", ".join(map(cell_text, value))
    return "" if value is None else str(value)


def results_of(metrics: dict[str, Any], record: dict[str, Any]) -> Iterator[tuple[str, str, float]]:
    """Yield split, name and value of each result in the metrics of a run."""
    for section in ("eval", "test"):
        split = (record.get("evaluated_on") or {}).get(section, section)
        for name, value in numbers_of(metrics.get(section) or {}):
            yield split, name.removeprefix(f"{section}_"), value
    split = (record.get("evaluated_on") or {}).get("eval", "test")
    backbone = ((metrics.get("probe") or {}).get("scores") or {}).get("backbone") or {}
    for name, value in numbers_of(backbone, "probe/"):
        yield split, name, value
    for kind, scores in (metrics.get("answers") or {}).items():
        for name, found in scores.items():
            yield split, f"answers/{kind}/{name}", found["own"]


def headlines(entry: Any, metrics: dict[str, Any], record: dict[str, Any]) -> list[tuple[str, str, str, float]]:
    """Return split, name, title and value of at most ten results that a reader looks at first.

    The declaration of the model type names them.
    """
    titles = entry.headline_metrics
    results = list(results_of(metrics, record))
    found = [(split, name, titles[name], value) for split, name, value in results if name in titles]
    return (found or [(split, name, name, value) for split, name, value in results if "/" not in name])[:10]


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
    return [
        EvalResult(
            task_type=entry.pipeline_tag,
            dataset_type=data.get("dataset") or data["name"],
            dataset_name=data["name"],
            dataset_split=split,
            metric_type=name.split("/")[-1],
            metric_name=title,
            metric_value=value,
        )
        for split, name, title, value in headlines(entry, metrics, record)
    ]


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
    trust_processor = trust if read_pushed(files, "preprocessor_config.json").get("auto_map") else ""
    is_ours = entry.model_class is not None
    code = entry.example.format(
        repo=repo_id,
        source="hf-hub" if "/" in repo_id else "local-dir",
        base=base,
        trust=trust if is_ours else "",
        trust_processor=trust_processor,
    )
    if entry.library_name == "timm" and trust_processor:  # timm's transform ignores an input spec
        file = 'image_processor_filename="preprocessor_config.json"'  # by default, transformers makes timm's transform
        processor = f'AutoImageProcessor.from_pretrained(\n    "{repo_id}", {file}{trust}\n)'
        code = re.sub(r"timm\.data\.create_transform\(.*\)", processor, code)
        code = code.replace("transform(image)[None]", 'transform(image, return_tensors="pt").pixel_values')
        code = code.replace("import Image\n", "import Image\nfrom transformers import AutoImageProcessor\n")
    parts = (config, config.get("vision_config") or {}, config.get("backbone_config") or {})
    channels = next((len(part["band_names"]) for part in parts if part.get("band_names")), None)
    if channels is not None:
        code = code.replace("zeros(1, 3,", f"zeros(1, {channels},")
    spec = read_image_processor(files).get("input_spec") or {}
    bands = 1 + max(spec["bands"]) if spec.get("bands") else channels  # of the user's image
    if spec and "pipeline(" in code:
        bands = bands or 1
        code = code.replace("# yours", "# yours, as an array: the pipeline reads files as 8-bit RGB")
    if bands is not None:
        code = code.replace("from PIL import Image", "import numpy as np")
        code = code.replace('Image.new("RGB", (640, 480))', f"np.zeros(({bands}, 480, 640), np.uint16)")
    return f"```python\n{code.strip()}\n```"


def read_image_processor(files: dict[str, Path | bytes]) -> dict[str, Any]:
    """Return the settings of the image processor among the pushed files, or `{}` if it is missing."""
    settings = read_pushed(files, "processor_config.json").get("image_processor")
    return settings or read_pushed(files, "preprocessor_config.json")


def read_pushed(files: dict[str, Path | bytes], name: str) -> dict[str, Any]:
    """Return a configuration among the pushed files, or `{}` if it is missing."""
    content = files.get(name, b"{}")
    return json.loads(content if isinstance(content, bytes) else content.read_bytes())
