"""The licence that weights are under: that of the weights they were trained from."""

from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, hf_hub_url
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError, OfflineModeIsEnabled

FIELDS = ("license", "license_name", "license_link")
PERMISSIVE = {"apache-2.0", "bsd-2-clause", "bsd-3-clause", "cc-by-4.0", "cc0-1.0", "mit", "unlicense"}
LICENSE_FILES = ("LICENSE*", "LICENCE*", "NOTICE*")


def card_metadata(name: str | Path) -> dict[str, Any]:
    """The metadata of the card in a folder, or of a Hub repo; empty if it has none that can be had."""
    folder = Path(name)
    try:
        if not folder.is_dir():
            return ModelCard.load(str(name), ignore_metadata_errors=True).data.to_dict()
        card = folder / "README.md"
        return ModelCard.load(card, ignore_metadata_errors=True).data.to_dict() if card.is_file() else {}
    except (EntryNotFoundError, HfHubHTTPError, HFValidationError, OfflineModeIsEnabled):
        return {}


def license_of(name: str | Path) -> dict[str, str]:
    """The licence fields of the card of a folder or Hub repo; empty if it states none.

    A link to a file beside the card of a Hub repo becomes the address of that file.
    """
    card = card_metadata(name)
    fields = {key: card[key] for key in FIELDS if isinstance(card.get(key), str)}
    link = fields.get("license_link")
    if link and not link.startswith("http") and not Path(name).is_dir():
        fields["license_link"] = hf_hub_url(str(name), link).replace("/resolve/", "/blob/")
    return {} if fields.get("license") == "unknown" else fields


def license_files(folder: Path) -> list[Path]:
    """The licence files of a folder and, after them, its notices."""
    return [path for pattern in LICENSE_FILES for path in sorted(folder.glob(pattern)) if path.is_file()]


def license_of_file(folder: Path) -> dict[str, str]:
    """Licence fields that name the licence file in a folder; empty if it has none."""
    names = [path.name for path in license_files(folder) if not path.name.startswith("NOTICE")]
    named = {"license": "other", "license_name": "license-of-the-source"}
    return named | {"license_link": names[0]} if names else {}


def agreed(stated: dict[str, dict[str, str]], given: str | None = None) -> dict[str, str]:
    """The licence fields that weights have by those of their sources.

    Args:
        stated: licence fields by source; a source that states none does not count, nor does one under a permissive
            licence beside one that is not.
        given: the licence to push under.

    Raises:
        ValueError: if sources contradict each other, or the given licence contradicts them.
    """
    stated = {source: fields for source, fields in stated.items() if fields.get("license")}
    binding = {source: fields for source, fields in stated.items() if fields["license"] not in PERMISSIVE} or stated
    names = {source: fields.get("license_name", fields["license"]) for source, fields in binding.items()}
    listed = ", ".join(f"{name} ({source})" for source, name in names.items())
    if given is not None and names and given not in names.values():
        raise ValueError(
            f"nothing was sent: these weights are under {listed}, and weights keep the licence of the weights they "
            f"were trained from. They cannot be pushed under {given}."
        )
    chosen = [fields for source, fields in binding.items() if given in (None, names[source])]
    if len({names[source] for source, fields in binding.items() if fields in chosen}) > 1:
        raise ValueError(f"nothing was sent: the sources are under different licences, {listed}. Give one: --license.")
    return chosen[0] if chosen else {"license": given} if given else {}
