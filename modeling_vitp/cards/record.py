"""Record of a run (`run.json`, beside the model and its `metrics.json`), and license of weights.

Weights have the license of the weights that they were trained from.
"""

import json
import logging
import platform
import shutil
from collections.abc import Iterable, Sequence
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCard, RepoCard, hf_hub_url
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError, OfflineModeIsEnabled
from packaging.version import Version
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from .sections import section_pattern

Fields = dict[str, Any]  # content of a JSON file, or of a part of it
License = dict[str, str]  # fields of a license in the metadata of a card

RECORD = "run.json"
METRICS = "metrics.json"
ITS_CARD = "its card"
ITS_FILE = "its license file"
ROWS = "training data"  # shown in the table of data
PACKAGES = ("modeling-vitp", "torch", "torchvision", "transformers", "trl", "peft", "accelerate", "datasets")
NEWEST_TESTED = {"transformers": "5.25", "trl": "1.16"}  # also read by .ci/versions
FIELDS = ("license", "license_name", "license_link")
PERMISSIVE = {"apache-2.0", "bsd-2-clause", "bsd-3-clause", "cc-by-4.0", "cc0-1.0", "mit", "unlicense"}
LICENSE_FILES = ("LICENSE*", "LICENCE*", "NOTICE*")

logger = logging.getLogger(__name__)


def write_record(
    output_dir: str | Path,
    command: str | None,
    settings: dict[str, Fields],
    sources: Iterable[str | None],
    data: list[Fields],
    evaluated_on: Fields | None = None,
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
        if not Path(source).is_dir():
            continue
        run = run_folder(source)
        for path in license_files(run):
            copy_license(path, output_dir)
    write_json(output_dir / RECORD, record)


def copy_license(path: Path, folder: Path) -> None:
    """Copy a license file. Add the name of its source if another text has its name."""
    target = folder / path.name
    if target.is_file() and target.read_bytes() != path.read_bytes():
        source_name = path.resolve().parent.name
        target = folder / f"{path.stem}-{source_name}{path.suffix}"
    shutil.copyfile(path, target)


def read_json(path: Path) -> Fields:
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


def write_json(path: Path, fields: Fields, ensure_ascii: bool = True) -> None:
    text = json.dumps(fields, indent=2, ensure_ascii=ensure_ascii)
    path.write_text(f"{text}\n", encoding="utf-8")


def read_record(folder: str | Path) -> Fields:
    """Return the record of a folder's run."""
    return read_json(run_folder(folder) / RECORD)


def run_folder(folder: str | Path) -> Path:
    """Return the folder with a model's record: its own folder, or for a checkpoint that of the run."""
    folder = Path(folder)
    is_checkpoint = folder.name.startswith(f"{PREFIX_CHECKPOINT_DIR}-")
    has_record = (folder / RECORD).is_file()
    if is_checkpoint and not has_record:
        return folder.parent
    return folder


def copy_record(source: str | Path, target: str | Path) -> None:
    """Copy record, metrics and license of a model to a part of it, such as its backbone."""
    source = Path(source)
    target = Path(target)
    forget_sources(target)
    sources = provenance([str(source)])
    if not source.is_dir():
        write_json(target / RECORD, sources)
        return
    run = run_folder(source)
    for path in (run / RECORD, source / METRICS, *license_files(run), *license_files(source)):
        if path.is_file():
            shutil.copyfile(path, target / path.name)
    record = read_json(target / RECORD)
    licenses = sources["licenses"]
    is_stated = any(licenses.values())
    if is_stated and not record.get("licenses"):  # stated in the card alone
        record["licenses"] = licenses
        write_json(target / RECORD, record)


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


def filled_fields(metadata: Fields) -> License:
    """Return the license fields of a card that have a value."""
    license = {}
    for key in FIELDS:
        value = metadata.get(key)
        if value:
            license[key] = value
    return license


def datasets_of(record: Fields) -> list[str]:
    """Return the Hub ids of a run's data sets."""
    names = []
    for entry in record.get("data") or ():
        name = entry.get("dataset")
        if name:
            names.append(name)
    return names


def provenance(sources: Sequence[str]) -> Fields:
    """Return the Hub ids and licenses of the weights' sources."""
    licenses = {}
    for source in sources:
        source_licenses = licenses_of(source)
        for name, fields in source_licenses.items():
            while licenses.get(name, fields) != fields:
                name += " (another)"
            licenses[name] = fields
    bases = []
    for source in sources:
        bases += bases_of(source)
    return {"base_model": list(dict.fromkeys(bases)), "licenses": licenses}


def stated_licenses(folder: Path) -> dict[str, License]:
    """Return license fields by their origin: the card of a folder, and the weights that its model was trained from.

    If the Hub did not answer when the run began, it is asked again.
    """
    record = read_record(folder)
    recorded_licenses = record.get("licenses", {})
    hub_ids = record.get("base_model", ())
    stated = {ITS_CARD: license_of(folder)}
    for name, fields in recorded_licenses.items():
        if not fields and name in hub_ids:
            fields = license_of(name)
        stated[name] = fields
    if any(stated.values()):
        return stated
    return {ITS_FILE: license_of_file(folder)}


def licenses_of(source: str) -> dict[str, License]:
    """Return the license fields of a Hub repo, or of a folder and the weights that it was trained from."""
    folder = Path(source)
    if not folder.is_dir():
        return {source: license_of(source)}
    licenses = {}
    for name, fields in stated_licenses(folder).items():
        if name in (ITS_CARD, ITS_FILE):
            name = public_name(source)
        licenses[name] = fields
    return licenses


def bases_of(source: str) -> list[str]:
    """Return the Hub ids of the weights' sources: their own, or those recorded in a folder."""
    if not Path(source).is_dir():
        return [source]
    metadata = card_metadata(source)
    record = read_record(source)
    bases = metadata.get("base_model") or record.get("base_model") or []
    if isinstance(bases, str):
        return [bases]
    return bases


def public_name(source: str) -> str:
    """Return a Hub id, or the name of a folder without its path."""
    path = Path(source)
    if path.exists():
        return path.resolve().name
    return source


def versions() -> dict[str, str]:
    """Return the versions of Python and of the installed libraries."""
    installed = {"python": platform.python_version()}
    for name in PACKAGES:
        with suppress(PackageNotFoundError):
            installed[name] = version(name)
    return installed


def warn_about_newer_releases() -> None:
    """Log one line if a library is newer than its newest release that this package is tested with."""
    installed = versions()
    newer_releases = []
    for name, newest in NEWEST_TESTED.items():
        if name in installed and Version(installed[name]).release[:2] > Version(newest).release:
            newer_releases.append(f"{name} {installed[name]} (tested up to {newest})")
    if newer_releases:
        logger.warning("Newer than the releases that modeling-vitp is tested with: %s.", ", ".join(newer_releases))


def card_metadata(name: str | Path) -> Fields:
    """Return the metadata of the card in a folder or Hub repo, or `{}` if the card is missing or not available.

    Raises:
        ValueError: if the metadata of the card in a folder are not YAML.
    """
    folder = Path(name)
    path = folder / "README.md"
    if folder.is_dir():
        if not path.is_file():
            return {}
        card = load_card(path, ignore_metadata_errors=True)
        return card.data.to_dict()
    try:
        card = ModelCard.load(str(name), ignore_metadata_errors=True)
    except (EntryNotFoundError, HfHubHTTPError, HFValidationError, OfflineModeIsEnabled):
        return {}
    return card.data.to_dict()


def load_card(path: Path, card_class: type[RepoCard] = ModelCard, **kwargs) -> RepoCard:
    """Load a card from a file. Raise a `ValueError` that names the file and the place if its metadata are not YAML."""
    try:
        return card_class.load(path, **kwargs)
    except yaml.YAMLError as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"Expected YAML between the lines --- of {path}, found: {reason}. Correct it.") from error


def license_of(name: str | Path) -> License:
    """Return the license fields of the card of a folder or Hub repo, or `{}` if it states none.

    A relative link in the card of a Hub repo is replaced by the file's address.
    """
    metadata = card_metadata(name)
    fields = {}
    for key in FIELDS:
        value = metadata.get(key)
        if isinstance(value, str):
            fields[key] = value
    if fields.get("license") == "unknown":
        return {}
    link = fields.get("license_link")
    is_relative = link and not link.startswith("http")
    if is_relative and not Path(name).is_dir():
        address = hf_hub_url(str(name), link)
        fields["license_link"] = address.replace("/resolve/", "/blob/")
    return fields


def license_files(folder: Path) -> list[Path]:
    """Return the license files of a folder, followed by its notices."""
    paths = []
    for pattern in LICENSE_FILES:
        for path in sorted(folder.glob(pattern)):
            if path.is_file():
                paths.append(path)
    return paths


def license_of_file(folder: Path) -> License:
    """Return license fields that name the license file in a folder, or `{}` without one."""
    for path in license_files(folder):
        if not path.name.startswith("NOTICE"):
            return {"license": "other", "license_name": "license-of-the-source", "license_link": path.name}
    return {}


def agreed_license(stated: dict[str, License], given: str | None = None) -> License:
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
        license = fields.get("license")
        if license in PERMISSIVE:
            permissive[source] = fields
        elif license:
            restrictive[source] = fields
    binding = restrictive or permissive
    if not binding:
        return {} if given is None else {"license": given}
    licenses_by_name = {}
    listed_names = []
    for source, fields in binding.items():
        name = fields.get("license_name", fields["license"])
        licenses_by_name.setdefault(name, fields)
        listed_names.append(f"{name} ({source})")
    listed = ", ".join(listed_names)
    if given is None and len(licenses_by_name) > 1:
        raise ValueError(f"The sources of the weights have different licenses, {listed}. Set one with --license.")
    if given is not None and given not in licenses_by_name:
        raise ValueError(
            f"These weights have the license {listed}, because weights have the license of the weights that they were "
            f"trained from. Expected it, got {given}."
        )
    name = given or next(iter(licenses_by_name))
    return licenses_by_name[name]
