"""The card of what was converted, and the license of its source."""

import logging
import shutil
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData, metadata_load

from ..cards.license import LICENSE_FILES
from .reading import Checkpoint

logger = logging.getLogger(__name__)
LICENSE_FIELDS = ("license", "license_name", "license_link")


def read_license(checkpoint: Checkpoint, given: str | None) -> dict[str, str]:
    """The licence fields of the source's card; the given licence if the source states none."""
    card = card_metadata(checkpoint.folder)
    fields = {name: card[name] for name in LICENSE_FIELDS if card.get(name)}
    if fields.get("license") == "unknown":
        fields = {}
    files = license_files(checkpoint.folder)
    if not fields and files and given is None:
        return {"license": "other", "license_name": "license-of-the-source", "license_link": files[0].name}
    if given is not None and fields.get("license", given) != given:
        raise ValueError(
            f"{checkpoint.name} is licensed {fields['license']}: a conversion keeps that and cannot make it {given}."
        )
    if not fields and given is None:
        logger.warning(
            "%s states no licence (neither a card nor a licence file): find out what it is, and give it as `license`.",
            checkpoint.name,
        )
        return {"license": "unknown"}
    return fields or {"license": given}


def card_metadata(folder: Path) -> dict[str, Any]:
    file = folder / "README.md"
    return (metadata_load(file) or {}) if file.is_file() else {}


def license_files(folder: Path) -> list[Path]:
    return sorted(file for pattern in LICENSE_FILES for file in folder.glob(pattern))


def write_card(checkpoint: Checkpoint, to: str, license_fields: dict[str, str], folder: Path, name: str) -> None:
    """A card with the licence of the source, and the licence files themselves."""
    for file in license_files(checkpoint.folder):
        shutil.copyfile(file, folder / file.name)
    base_model = card_metadata(checkpoint.folder).get("base_model")
    data = ModelCardData(
        **license_fields,
        base_model=base_model if Path(checkpoint.name).exists() else checkpoint.name,
        library_name="transformers",
        pipeline_tag=pipeline_tag(checkpoint, to),
        tags=["vitp"],
    )
    source = Path(checkpoint.name).name if Path(checkpoint.name).exists() else checkpoint.name
    licence = license_fields.get("license_name", license_fields["license"])
    if licence == "unknown":
        terms = "The source states no licence. Find out what it is before you use or pass on these weights."
    else:
        terms = f"Licence of the source, and so of these weights: {licence}."
    card = ModelCard(
        f"---\n{data}\n---\n\n# {name}\n\nThe weights of `{source}` (layout: {checkpoint.kind}), the same to the bit, "
        f"in the layout `{to}`, converted with `python -m modeling_vitp.convert`.\n\n{terms}\n"
    )
    card.save(folder / "README.md")


def pipeline_tag(checkpoint: Checkpoint, to: str) -> str:
    if to in ("backbone", "adapter") or checkpoint.contents in ("ViT", "ViT-Adapter"):
        return "image-feature-extraction"
    return "image-text-to-text" if checkpoint.contents == "vision-language model" else "image-segmentation"
