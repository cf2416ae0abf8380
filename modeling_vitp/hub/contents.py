"""What goes to a repo: its files, its card and its licence, put together without sending anything."""

import json
import logging
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub import DatasetCard, RepoCard, SpaceCard, snapshot_download
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError
from huggingface_hub.utils import validate_repo_id

from ..cards.license import FIELDS, agreed, card_metadata, license_files
from ..cards.model_card import fill_card
from ..cards.record import stated_licenses
from ..command.errors import one_line
from ..command.paths import SPACE
from ..convert.checkpoint import convert_checkpoint
from ..convert.export import export_backbone
from .failures import FAILURES, explain
from .files import PACKAGE, all_files, check_no_secrets, find_secret, model_files

logger = logging.getLogger(__name__)

TYPES_OF_KIND = {
    "backbone": ("internvl_vision",),
    "model": (
        "vitp",
        "internvl",
        "vitp_adapter",
        "vitp_backbone",
        "vitp_feature_pyramid",
        "vitp_segmentation",
        "vitp_change_detection",
        "vitp_object_detection",
        "vitp_oriented_object_detection",
        "vitp_instance_segmentation",
        "vitp_image_classification",
        "rt_detr_v2",
        "d_fine",
        "deformable_detr",
    ),
}

DATA_SUFFIXES = set(".parquet .arrow .json .jsonl .csv .tar .zip .png .jpg .jpeg .tif .tiff .webp".split())
MODEL_VARIABLE = "VITP_MODEL"  # by which the demo knows its model

# Where a file came from on this machine; nothing reads it.
LOCAL_KEYS = ("_name_or_path", "name_or_path")
NOT_CONFIGS = ("tokenizer.json", "vocab.json", "model.safetensors.index.json")
ABSOLUTE = re.compile(r"(?:file://)?(?:~|/[^/\s][^/\n]*|[A-Za-z]:)[/\\][^\n]+")
ABSOLUTE_IN_TEXT = re.compile(r"(?<![\w./:~<>)-])(?:~/[\w.-]|/[\w.-]+/[\w.-]|[A-Za-z]:\\\w)[\w./\\+-]*")


@dataclass
class Contents:
    """What goes to a repo.

    Args:
        repo_type: `model`, `dataset` or `space`.
        files: where each file's content is, or the content itself, by its path in the repo.
        card: of which the content is in `files` too.
        variables: environment variables of a Space.
    """

    repo_type: str
    files: dict[str, Path | bytes]
    card: RepoCard
    variables: dict[str, str] = field(default_factory=dict)

    @property
    def license(self) -> str | None:
        return self.card.data.get("license_name") or self.card.data.get("license")

    def sizes(self) -> dict[str, int]:
        """Bytes of each file."""
        return {
            name: len(content) if isinstance(content, bytes) else content.stat().st_size
            for name, content in self.files.items()
        }

    def listing(self, deleted: Sequence[str]) -> str:
        """The licence and the files with their sizes, in lines; `deleted` are those that the repo will lose."""
        sizes = self.sizes()
        lines = [f"licence: {self.license or 'none stated; give one with --license'}"]
        lines += [f"{size:>15,} {name}" for name, size in sorted(sizes.items())]
        lines += [f"{sum(sizes.values()):>15,} bytes in {len(sizes)} files"]
        return "\n".join([*lines, *(f"{'deleted':>15} {name}" for name in deleted)])


def gather(
    what: str,
    checkpoint: str | Path,
    repo_id: str,
    work: Path,
    license: str | None = None,
    base_model: str | None = None,
    run: str | Path | None = None,
) -> Contents:
    """Puts together what goes to a repo.

    Args:
        what: `backbone`, `model`, `adapter`, `dataset` or `space`.
        checkpoint: folder or Hub id of a model; the folder of a data set; for a Space the Hub id of its model.
        repo_id: where it goes to, for the card.
        work: a folder for what is written on the way.
        license: the licence, where the sources state none.
        base_model: Hub id of the model that an adapter belongs to, where it was trained from a folder.
        run: the folder of a model's run, with its record and metrics, if that is not the checkpoint's.

    Raises:
        ValueError: if the checkpoint is of another kind, has a secret or an absolute path in it, or contradicts the
            licence of the weights that it was trained from.
    """
    validate_repo_id(repo_id)
    if what == "space":
        contents = gather_space(str(checkpoint))
    elif what == "dataset":
        contents = gather_dataset(checkpoint, license)
    else:
        contents = gather_model(what, checkpoint, repo_id, work, license, base_model, run)
    contents.files["README.md"] = str(contents.card).encode()
    check_paths(contents)
    for name, content in contents.files.items():
        kind = find_secret(name, content) if isinstance(content, bytes) else None
        if kind is not None:
            raise ValueError(f"nothing was sent, because there is {kind} in {name}. Take it out.")
    return contents


def gather_model(
    what: str,
    checkpoint: str | Path,
    repo_id: str,
    work: Path,
    license: str | None,
    base_model: str | None,
    run: str | Path | None,
) -> Contents:
    source = folder = local_folder(checkpoint)
    check_no_secrets(source)
    if what == "adapter":
        if not (folder / "adapter_config.json").is_file():
            folder = source / "adapter"
        if not (folder / "adapter_config.json").is_file():
            raise ValueError(f"{checkpoint} has no adapter: a run with use_peft leaves one in its folder `adapter`.")
    else:
        model_type = read_config(source / "config.json").get("model_type")
        if what == "backbone" and model_type == "vitp":
            folder = export_backbone(source, work / "backbone")
        elif what == "backbone" and model_type == "internvl":
            folder = convert_checkpoint(source, work / "backbone", "backbone")
        elif model_type not in TYPES_OF_KIND[what]:
            kinds = {name: kind for kind, names in TYPES_OF_KIND.items() for name in names}
            hint = f" Push it with --what {kinds[model_type]}." if model_type in kinds else ""
            raise ValueError(f"{checkpoint} is a {model_type!r} model, which is not pushed as {what!r}.{hint}")
    run = Path(run or source)
    files: dict[str, Path | bytes] = dict(model_files(folder))
    for name in ("metrics.json", "loss.png", *(path.name for path in license_files(run))):
        if (run / name).is_file():
            files.setdefault(name, run / name)
    if not any(name.endswith(".safetensors") for name in files):
        raise ValueError(f"{checkpoint} has no weights in safetensors.")
    for name, path in files.items():
        if name.endswith(".json") and name not in NOT_CONFIGS:
            files[name] = portable_config(path, base_model)
    fields = agreed(stated_licenses(run), license)
    card = fill_card(what, run, folder, files, repo_id, fields)
    return Contents("model", files, card)


def gather_dataset(checkpoint: str | Path, license: str | None) -> Contents:
    folder = Path(checkpoint)
    if not folder.is_dir():
        raise ValueError(f"{checkpoint} is not a folder: give that of the data set.")
    check_no_secrets(folder)
    files: dict[str, Path | bytes] = visible_files(folder)
    if not any(path.suffix.lower() in DATA_SUFFIXES for path in files.values()):
        raise ValueError(f"{checkpoint} has no data in it: a data set is Parquet, JSON Lines, images …")
    card = DatasetCard.load(folder / "README.md") if "README.md" in files else DatasetCard("---\n{}\n---\n")
    metadata = card_metadata(folder)
    stated = {"its card": {key: metadata[key] for key in FIELDS if isinstance(metadata.get(key), str)}}
    for key, value in agreed(stated, license).items():
        card.data[key] = value
    return Contents("dataset", files, card)


def gather_space(model: str) -> Contents:
    """The demo, with this package beside it, for a model on the Hub, which its card names."""
    if Path(model).is_dir():
        raise ValueError(
            f"{model} is a folder, and a Space loads its model from the Hub: push that first with --what model (or "
            "backbone), and give its Hub id here."
        )
    try:
        validate_repo_id(model)
    except HFValidationError as error:
        raise ValueError(f"{model} is neither a folder nor a Hub id.") from error
    check_no_secrets(SPACE)
    files: dict[str, Path | bytes] = visible_files(SPACE)
    files |= {f"{PACKAGE.name}/{name}": path for name, path in all_files(PACKAGE).items() if name.endswith(".py")}
    missing = {"README.md", "app.py", "requirements.txt"} - files.keys()
    if missing:
        raise ValueError(f"{SPACE.name}/ has no {', '.join(sorted(missing))}, which a Space needs.")
    card = SpaceCard.load(SPACE / "README.md")
    card.data["models"] = [model]
    return Contents("space", files, card, {MODEL_VARIABLE: model})


def local_folder(checkpoint: str | Path) -> Path:
    """The folder of a checkpoint, which is downloaded if it is on the Hub."""
    if Path(checkpoint).is_dir():
        return Path(checkpoint)
    try:
        validate_repo_id(checkpoint)
    except HFValidationError as error:
        raise ValueError(f"{checkpoint} is neither a folder nor a Hub id.") from error
    try:
        return Path(snapshot_download(checkpoint))
    except LocalEntryNotFoundError as error:
        raise ValueError(
            f"{checkpoint} is no folder here, and cannot be had from the Hub: {one_line(str(error))}"
        ) from error
    except FAILURES as error:
        raise ValueError(f"{checkpoint} cannot be downloaded: {explain(error, checkpoint)}.") from error


def visible_files(folder: Path) -> dict[str, Path]:
    """What is not hidden, by path; the card is made afresh."""
    return {name: path for name, path in all_files(folder).items() if not re.search(r"(^|/)[._]", name)}


def read_config(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ValueError(f"{path.parent} has no {path.name}: it is not the folder of a model.")
    return json.loads(path.read_text())


def portable_config(path: Path, base_model: str | None) -> Path | bytes:
    """The file, or its content without what has a meaning on this machine only.

    Raises:
        ValueError: names the file and the key of an absolute path.
    """
    try:
        config = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}.") from error
    before = json.dumps(config)
    if path.name == "adapter_config.json":
        config["base_model_name_or_path"] = base_on_hub(config.get("base_model_name_or_path"), base_model)
    drop_keys(config)
    for key, value in strings_of(config):
        if ABSOLUTE.fullmatch(value):
            raise ValueError(f"nothing was sent: {path.name} has an absolute path under {key!r}. Make it relative.")
    return path if json.dumps(config) == before else (json.dumps(config, indent=2) + "\n").encode()


def base_on_hub(recorded: str | None, given: str | None) -> str:
    """The Hub id of the model that an adapter belongs to."""
    if given is None and (recorded is None or Path(recorded).exists() or ABSOLUTE.fullmatch(recorded)):
        raise ValueError(
            "the adapter was trained from a folder, and is of no use without its base: push that too, and give its "
            "Hub id as --base_model; or push the merged model with --what model."
        )
    return given or recorded


def drop_keys(value: Any) -> None:
    for item in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        drop_keys(item)
    if isinstance(value, dict):
        for key in LOCAL_KEYS:
            value.pop(key, None)


def strings_of(value: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """Every string in a configuration, with the key that it is under."""
    if isinstance(value, str):
        yield key, value
    elif isinstance(value, dict):
        for name, item in value.items():
            yield from strings_of(item, f"{key}.{name}".lstrip("."))
    elif isinstance(value, list):
        for item in value:
            yield from strings_of(item, key)


def check_paths(contents: Contents) -> None:
    """Raises a `ValueError` if the card shows where something lies on this machine."""
    found = ABSOLUTE_IN_TEXT.search(str(contents.card))
    if found:
        path = found[0].rstrip(".")
        raise ValueError(f"nothing was sent: the card, README.md, has an absolute path, {path}. Make it relative.")


def write_card(what: str, folder: str | Path, source: str | Path | None = None, repo_id: str | None = None) -> None:
    """Writes the card of a model into its folder.

    Args:
        source: the folder of its run, if that is another.
        repo_id: where it will be pushed to; by default the example has the name of the folder.
    """
    folder = Path(folder)
    source = Path(source or folder)
    try:
        license = agreed(stated_licenses(source))
    except ValueError as error:
        logger.warning("The card of %s states no licence: %s", folder, error)
        license = {}
    card = fill_card(what, source, folder, dict(model_files(folder)), repo_id or folder.resolve().name, license)
    card.save(folder / "README.md")
