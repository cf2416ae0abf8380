"""Record of a run (`run.json`, beside the model and its `metrics.json`), and license of weights.

Weights have the license of the weights that they were trained from.
"""

import importlib.metadata
import json
import shutil
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCard, RepoCard, hf_hub_url
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError, OfflineModeIsEnabled
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from .sections import section_pattern

RECORD = "run.json"
METRICS = "metrics.json"
ITS_CARD = "its card"
ITS_FILE = "its license file"
ROWS = "training data"  # shown in the table of data
PACKAGES = ("modeling-vitp", "torch", "torchvision", "transformers", "trl", "peft", "accelerate", "datasets")
FIELDS = ("license", "license_name", "license_link")
PERMISSIVE = {"apache-2.0", "bsd-2-clause", "bsd-3-clause", "cc-by-4.0", "cc0-1.0", "mit", "unlicense"}
LICENSE_FILES = ("LICENSE*", "LICENCE*", "NOTICE*")


def write_record(
    output_dir: str | Path,
    command: str | None,
    settings: dict[str, dict[str, Any]],
    sources: Iterable[str | None],
    data: list[dict[str, Any]],
    evaluated_on: dict[str, Any] | None = None,
) -> None:
    """Write the record of a run, before it starts.

    Args:
        command: training command, `None` for a user's program.
        settings: `fixed` and `free` settings, see [`~modeling_vitp.training.base_trainer.BaseTrainer.run_settings`].
        sources: folders or Hub ids of the initial weights.
        data: one mapping for each source of the training data; its `dataset` is a Hub id.
        evaluated_on: `name` and `split` of the data of `metrics.json`, and `dataset` if it is on the Hub; for
            downstream tasks also `data`, its description, and `scored_with`, the settings.
    """
    sources = [source for source in sources if source]
    all_settings = {**settings["fixed"], **settings["free"]}
    all_settings.pop(ROWS, None)
    record = {
        **provenance(sources),
        "command": command,
        "settings": all_settings,
        "data": data,
        "evaluated_on": evaluated_on,
        "versions": versions(),
    }
    output_dir = Path(output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    for source in sources:
        if Path(source).is_dir():
            for path in license_files(run_folder(source)):
                copy_license(path, output_dir)
    write_json(output_dir / RECORD, record)


def copy_license(path: Path, folder: Path) -> None:
    """Copy a license file. Add the name of its source if another text has its name."""
    target = folder / path.name
    if target.is_file() and target.read_bytes() != path.read_bytes():
        target = folder / f"{path.stem}-{path.resolve().parent.name}{path.suffix}"
    shutil.copyfile(path, target)


def read_json(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file, or `{}` if the file is missing. Raise a `ValueError` for other content."""
    if not path.is_file():
        return {}
    try:
        fields = json.loads(path.read_text())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(fields, dict):
        raise ValueError(f"Expected a JSON object in {path}, got a {type(fields).__name__}.")
    return fields


def write_json(path: Path, fields: dict[str, Any], ensure_ascii: bool = True) -> None:
    path.write_text(json.dumps(fields, indent=2, ensure_ascii=ensure_ascii) + "\n", encoding="utf-8")


def read_record(folder: str | Path) -> dict[str, Any]:
    """Return the record of a folder's run."""
    return read_json(run_folder(folder) / RECORD)


def run_folder(folder: str | Path) -> Path:
    """Return the folder with a model's record: its own folder, or for a checkpoint that of the run."""
    folder = Path(folder)
    is_checkpoint = folder.name.startswith(f"{PREFIX_CHECKPOINT_DIR}-") and not (folder / RECORD).is_file()
    return folder.parent if is_checkpoint else folder


def copy_record(source: str | Path, target: str | Path) -> None:
    """Copy record, metrics and license of a model to a part of it, such as its backbone."""
    source = Path(source)
    target = Path(target)
    forget_sources(target)
    if not source.is_dir():
        write_json(target / RECORD, provenance([str(source)]))
        return
    run = run_folder(source)
    for path in (run / RECORD, source / METRICS, *license_files(run), *license_files(source)):
        if path.is_file():
            shutil.copyfile(path, target / path.name)
    record = read_json(target / RECORD)
    licenses = provenance([str(source)])["licenses"]
    if any(licenses.values()) and not record.get("licenses"):  # stated in the card alone
        write_json(target / RECORD, record | {"licenses": licenses})


def forget_sources(folder: Path) -> None:
    """Remove base model, data sets and license of a folder's record from its card, before a new record replaces it."""
    path = folder / "README.md"
    record = read_record(folder)
    if not path.is_file():
        return
    try:
        card = load_card(path, ignore_metadata_errors=True)
    except ValueError:  # reported when the card is written; the run goes on
        return
    sources = {"base_model": record.get("base_model"), "datasets": datasets_of(record)}
    outdated_fields = []
    for key, value in sources.items():
        if value and card.data.get(key) == value:
            outdated_fields.append(key)
    license = filled_fields(card.data.to_dict())
    if license and license in record.get("licenses", {}).values():
        outdated_fields += license
        card.text = section_pattern("License").sub("", card.text)
    for key in outdated_fields:
        card.data.pop(key)
    if outdated_fields:
        card.save(path)


def filled_fields(metadata: dict[str, Any]) -> dict[str, str]:
    """Return the license fields of a card that have a value."""
    license = {}
    for key in FIELDS:
        if metadata.get(key):
            license[key] = metadata[key]
    return license


def datasets_of(record: dict[str, Any]) -> list[str]:
    """Return the Hub ids of a run's data sets."""
    return [entry["dataset"] for entry in record.get("data") or () if entry.get("dataset")]


def provenance(sources: Sequence[str]) -> dict[str, Any]:
    """Return the Hub ids and licenses of the weights' sources."""
    licenses = {}
    for source in sources:
        for name, fields in licenses_of(source).items():
            while licenses.get(name, fields) != fields:
                name += " (another)"
            licenses[name] = fields
    bases = []
    for source in sources:
        bases += bases_of(source)
    return {"base_model": list(dict.fromkeys(bases)), "licenses": licenses}


def stated_licenses(folder: Path) -> dict[str, dict[str, str]]:
    """Return license fields by their origin: the card of a folder, and the weights that its model was trained from.

    If the Hub did not answer when the run began, it is asked again.
    """
    record = read_record(folder)
    stated = {ITS_CARD: license_of(folder)}
    for name, fields in record.get("licenses", {}).items():
        is_on_hub = name in record.get("base_model", ())
        stated[name] = license_of(name) if is_on_hub and not fields else fields
    return stated if any(stated.values()) else {ITS_FILE: license_of_file(folder)}


def licenses_of(source: str) -> dict[str, dict[str, str]]:
    """Return the license fields of a Hub repo, or of a folder and the weights that it was trained from."""
    if not Path(source).is_dir():
        return {source: license_of(source)}
    licenses = {}
    for name, fields in stated_licenses(Path(source)).items():
        is_own = name in (ITS_CARD, ITS_FILE)
        licenses[public_name(source) if is_own else name] = fields
    return licenses


def bases_of(source: str) -> list[str]:
    """Return the Hub ids of the weights' sources: their own, or those recorded in a folder."""
    if not Path(source).is_dir():
        return [source]
    bases = card_metadata(source).get("base_model") or read_record(source).get("base_model") or []
    return [bases] if isinstance(bases, str) else bases


def public_name(source: str) -> str:
    """Return a Hub id, or the name of a folder without its path."""
    return Path(source).resolve().name if Path(source).exists() else source


def versions() -> dict[str, str]:
    """Return the versions of Python and of the installed libraries."""
    installed = {"python": ".".join(map(str, sys.version_info[:3]))}
    for name in PACKAGES:
        try:
            installed[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return installed


def card_metadata(name: str | Path) -> dict[str, Any]:
    """Return the metadata of the card in a folder or Hub repo, or `{}` if the card is missing or not available.

    Raises:
        ValueError: if the metadata of the card in a folder are not YAML.
    """
    folder = Path(name)
    try:
        if not folder.is_dir():
            return ModelCard.load(str(name), ignore_metadata_errors=True).data.to_dict()
        card = folder / "README.md"
        return load_card(card, ignore_metadata_errors=True).data.to_dict() if card.is_file() else {}
    except (EntryNotFoundError, HfHubHTTPError, HFValidationError, OfflineModeIsEnabled):
        return {}


def load_card(path: Path, card_class: type[RepoCard] = ModelCard, **kwargs) -> RepoCard:
    """Load a card from a file. Raise a `ValueError` that names the file and the place if its metadata are not YAML."""
    try:
        return card_class.load(path, **kwargs)
    except yaml.YAMLError as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"Expected YAML between the lines --- of {path}, found: {reason}. Correct it.") from error


def license_of(name: str | Path) -> dict[str, str]:
    """Return the license fields of the card of a folder or Hub repo, or `{}` if it states none.

    A relative link in the card of a Hub repo is replaced by the file's address.
    """
    metadata = card_metadata(name)
    fields = {key: metadata[key] for key in FIELDS if isinstance(metadata.get(key), str)}
    link = fields.get("license_link")
    if link and not link.startswith("http") and not Path(name).is_dir():
        fields["license_link"] = hf_hub_url(str(name), link).replace("/resolve/", "/blob/")
    return {} if fields.get("license") == "unknown" else fields


def license_files(folder: Path) -> list[Path]:
    """Return the license files of a folder, followed by its notices."""
    paths = []
    for pattern in LICENSE_FILES:
        paths += sorted(folder.glob(pattern))
    return [path for path in paths if path.is_file()]


def license_of_file(folder: Path) -> dict[str, str]:
    """Return license fields that name the license file in a folder, or `{}` without one."""
    for path in license_files(folder):
        if not path.name.startswith("NOTICE"):
            return {"license": "other", "license_name": "license-of-the-source", "license_link": path.name}
    return {}


def agreed_license(stated: dict[str, dict[str, str]], given: str | None = None) -> dict[str, str]:
    """Return the license fields of weights, from those of their sources.

    Args:
        stated: license fields by source. Sources without a license are ignored, and so are sources under a permissive
            license if others are not.
        given: license to push or convert under.

    Raises:
        ValueError: if sources contradict each other, or `given` contradicts them.
    """
    permissive = {}
    restrictive = {}
    for source, fields in stated.items():
        if fields.get("license") in PERMISSIVE:
            permissive[source] = fields
        elif fields.get("license"):
            restrictive[source] = fields
    binding = restrictive or permissive
    names = {source: fields.get("license_name", fields["license"]) for source, fields in binding.items()}
    listed = ", ".join(f"{name} ({source})" for source, name in names.items())
    if given is not None and names and given not in names.values():
        raise ValueError(
            f"These weights have the license {listed}, because weights have the license of the weights that they were "
            f"trained from. Expected it, got {given}."
        )
    if given is None and len(set(names.values())) > 1:
        raise ValueError(f"The sources of the weights have different licenses, {listed}. Set one with --license.")
    for source, fields in binding.items():
        if given in (None, names[source]):
            return fields
    return {} if given is None else {"license": given}
