"""The card of what was converted, and the license of its source."""

import logging
import shutil
from pathlib import Path

from huggingface_hub import ModelCard, ModelCardData

from ..cards.examples import pipeline_tag
from ..cards.license import card_metadata, license_files, license_of, license_of_file
from .reading import Checkpoint

logger = logging.getLogger(__name__)


def read_license(checkpoint: Checkpoint, given: str | None) -> dict[str, str]:
    """The licence fields of the source's card; the given licence if the source states none."""
    fields = license_of(checkpoint.folder)
    if not fields and given is None:
        fields = license_of_file(checkpoint.folder)
    if given is not None and fields.get("license", given) != given:
        raise ValueError(
            f"{checkpoint.name} is licensed {fields['license']}: a conversion keeps that and cannot make it {given}."
        )
    if not fields and given is None:
        logger.warning(
            "%s states no licence (neither a card nor a licence file): give it as --license. Of a model that you "
            "trained from scratch it is yours to choose; of any other, find out what it is.",
            checkpoint.name,
        )
        return {"license": "unknown"}
    return fields or {"license": given}


def write_card(checkpoint: Checkpoint, to: str, license_fields: dict[str, str], folder: Path, name: str) -> None:
    """A card with the licence of the source, and the licence files themselves."""
    for file in license_files(checkpoint.folder):
        shutil.copyfile(file, folder / file.name)
    kind = None if to in ("backbone", "adapter") else checkpoint.config.model_type
    base_model = card_metadata(checkpoint.folder).get("base_model")
    data = ModelCardData(
        **license_fields,
        base_model=base_model if Path(checkpoint.name).exists() else checkpoint.name,
        library_name="transformers",
        pipeline_tag=pipeline_tag("model", {"model_type": kind}),
        tags=["vitp"],
    )
    source = Path(checkpoint.name).name if Path(checkpoint.name).exists() else checkpoint.name
    license = license_fields.get("license_name", license_fields["license"])
    if license == "unknown":
        terms = "The source states no licence. Find out what it is before you use or pass on these weights."
    else:
        terms = f"Licence of the source, and so of these weights: {license}."
    card = ModelCard(
        f"---\n{data}\n---\n\n# {name}\n\nThe weights of `{source}` (layout: {checkpoint.kind}), the same to the bit, "
        f"in the layout `{to}`, converted with `vitp convert`.\n\n{terms}\n"
    )
    card.save(folder / "README.md")
