"""The card of a pushed model, filled with what its run recorded. A value that was not recorded is left out."""

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard

from .examples import example, pipeline_tag, read_config
from .license import FIELDS, card_metadata
from .record import METRICS, read_json, read_record
from .sections import table, with_section

logger = logging.getLogger(__name__)
PAPER = "[ViTP (Visual insTruction Pretraining, arXiv 2509.17562)](https://arxiv.org/abs/2509.17562)"

INTRODUCTIONS = {
    "backbone": "A vision transformer as an image backbone: the part that is kept of {paper}.",
    "adapter": "A LoRA adapter, with vision transformer and projector trained in full, made with {paper}.",
    "vitp": "A vision-language model trained end to end for its vision transformer, with {paper}.",
    "internvl": "A vision-language model for its vision transformer, of {paper}, in transformers' own layout.",
    "vitp_image_classification": "An image classifier on a backbone of {paper}.",
    "vitp_segmentation": "A semantic segmentation model on a backbone of {paper}.",
    "vitp_change_detection": "A change detection model, for pairs of images, on a backbone of {paper}.",
    "vitp_object_detection": "An object detector on a backbone of {paper}.",
    "vitp_oriented_object_detection": "A detector of objects with oriented boxes on a backbone of {paper}.",
    "vitp_instance_segmentation": "An instance segmentation model on a backbone of {paper}.",
    **dict.fromkeys(
        ("rt_detr_v2", "d_fine", "deformable_detr"), "transformers' own object detector on a backbone of {paper}."
    ),
}

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

PLACEHOLDER = "[More Information Needed]"  # PEFT's template, which says nothing
SETTINGS = {  # whose names say little
    "vrl_drop_ratio": "r, the share of visual tokens dropped (VRL)",
    "vrl_apply_prob": "share of samples with VRL",
    "vrl_warmup_steps": "first steps, without VRL",
    "answer_mask_ratio": "share of answer tokens hidden from the input",
}
NOT_RESULTS = ("runtime", "per_second", "epoch", "num_tokens", "entropy", "_time")


def fill_card(
    what: str, source: Path, folder: Path, files: dict[str, Path | bytes], repo_id: str, license: dict[str, str]
) -> ModelCard:
    """The card that a folder has, if any, with the sections and metadata that follow from the run.

    Args:
        what: `model`, `backbone` or `adapter`.
        source: the folder of the run, with its record and metrics.
        folder: the folder that is pushed.
        files: what is pushed, see [`Package`].
        repo_id: where it goes to; the example loads it from there.
        licence: licence fields.
    """
    record, metrics = read_record(source), read_json(source / METRICS)
    config = read_config(files, "adapter_config.json" if what == "adapter" else "config.json")
    model_type = config.get("model_type") if what == "model" else what
    path = folder / "README.md"
    own = ModelCard.load(path) if path.is_file() and PLACEHOLDER not in path.read_text() else None

    text = own.text if own is not None else f"\n# {repo_id.split('/')[-1]}\n"
    if own is None and model_type in INTRODUCTIONS:
        text += f"\n{INTRODUCTIONS[model_type].format(paper=PAPER)}\n"
    sections = {
        "How to load": example(what, config, files, repo_id),
        "Input": describe_input(files),
        "Training": describe_training(record),
        "Evaluation": describe_results(what, metrics, record),
        "Licence": describe_license(license),
        "Citation": CITATION,
    }
    for title, section in sections.items():
        if section:
            text = with_section(text, title, section)

    metadata = own.data.to_dict() if own is not None else {}
    bases = record.get("base_model") or card_metadata(source).get("base_model")
    base = config.get("base_model_name_or_path")  # none of a model that was composed or built from scratch
    if what == "adapter" and base and not Path(base).exists():
        bases = base
    metadata |= {
        "library_name": "peft" if what == "adapter" else "transformers",
        "pipeline_tag": pipeline_tag(what, config),
        "base_model": bases,
        "datasets": [entry["dataset"] for entry in record.get("data") or () if entry.get("dataset")],
        "tags": list(dict.fromkeys([*metadata.get("tags", []), "vitp"])),
        **{key: license.get(key) for key in FIELDS},
    }
    card = ModelCard(f"---\n{{}}\n---\n\n{text.strip()}\n", ignore_metadata_errors=True)
    for key, value in metadata.items():
        if value not in (None, []) and key != "model-index":
            card.data[key] = value
    results = eval_results(what, config, metrics, record)
    if results:
        card.data["model_name"], card.data["eval_results"] = repo_id.split("/")[-1], results
    return card


def describe_input(files: dict[str, Path | bytes]) -> str | None:
    """What images become before the model sees them."""
    processor = read_config(files, "processor_config.json").get("image_processor") or {}
    processor = processor or read_config(files, "preprocessor_config.json")
    size = processor.get("size") or {}
    spec = processor.get("input_spec") or {}
    rows = {
        "bands": spec.get("band_names"),
        "tile, in pixels": f"{size['height']} × {size['width']}" if {"height", "width"} <= size.keys() else None,
        "most tiles": processor.get("max_patches") if processor.get("crop_to_patches") else None,
        "mean": processor.get("image_mean"),
        "standard deviation": processor.get("image_std"),
        "input spec": {name: value for name, value in spec.items() if name != "band_names"},
    }
    return settings_table(rows)


def describe_training(record: dict[str, Any]) -> str | None:
    parts = []
    if record.get("command"):
        parts.append(f"```bash\n{record['command']}\n```")
    if record.get("base_model"):
        parts.append(f"Started from {', '.join(f'`{base}`' for base in record['base_model'])}.")
    settings = record.get("settings") or {}
    parts.append(settings_table({SETTINGS.get(name, name): value for name, value in settings.items()}))
    data = record.get("data") or []
    columns = list(dict.fromkeys(key for entry in data for key, value in entry.items() if value not in (None, [])))
    if columns:
        parts.append("Data:")
        parts.append(table(columns, [[plain(entry.get(column)) for column in columns] for entry in data]))
    if record.get("versions"):
        listed = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
        parts.append(f"Versions: {listed}.")
    return "\n\n".join(filter(None, parts)) or None


def describe_results(what: str, metrics: dict[str, Any], record: dict[str, Any]) -> str | None:
    rows = [[split, name, plain(value)] for split, name, value in results_of(metrics, record)]
    if not rows:
        return None
    of = "" if what == "model" else "Of the whole model that this is a part of. "
    return f"{of}From the `metrics.json` of the run.\n\n{table(['split', 'metric', 'value'], rows)}"


def describe_license(license: dict[str, str]) -> str | None:
    if not license:
        return None
    name = license.get("license_name", license["license"])
    link = f" ([text]({license['license_link']}))" if license.get("license_link") else ""
    return f"{name}{link}. Weights keep the licence of the weights they were trained from."


def settings_table(settings: dict[str, Any]) -> str | None:
    rows = [[name, plain(value)] for name, value in settings.items() if value not in (None, "", [], {})]
    return table(["setting", "value"], rows) if rows else None


def plain(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list | tuple):
        return ", ".join(map(plain, value))
    return "" if value is None else str(value)


def results_of(metrics: dict[str, Any], record: dict[str, Any]) -> Iterator[tuple[str, str, float]]:
    """Split, name and value of each result in the metrics of a run."""
    for section in ("eval", "test"):
        split = (record.get("evaluated_on") or {}).get(section, section)
        for name, value in numbers_of(metrics.get(section) or {}):
            yield split, name.removeprefix(f"{section}_"), value
    for split, scores in (metrics.get("task") or {}).items():
        if isinstance(scores, dict) and split != "gate":
            yield from ((split, name, value) for name, value in numbers_of(scores))


def numbers_of(scores: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    for name, value in scores.items():
        if isinstance(value, dict):
            yield from numbers_of(value, f"{prefix}{name}/")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            if not any(part in name for part in NOT_RESULTS):
                yield prefix + name, value


def eval_results(
    what: str, config: dict[str, Any], metrics: dict[str, Any], record: dict[str, Any]
) -> list[EvalResult] | None:
    """The results for the `model-index`, if the run recorded what it was evaluated on."""
    data = record.get("evaluated_on")
    if what != "model" or not data:
        return None
    return [
        EvalResult(
            task_type=pipeline_tag(what, config),
            dataset_type=data.get("dataset") or data["name"],
            dataset_name=data["name"],
            dataset_split=split,
            metric_type=name,
            metric_name=name,
            metric_value=value,
        )
        for split, name, value in results_of(metrics, record)
    ]
