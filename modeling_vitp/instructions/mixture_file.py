"""The file of a mixture: its sources with their rates, or a released meta JSON."""

import dataclasses
import json
import logging
import math
from pathlib import Path

from ..command.paths import expanded_home, read_yaml
from .folders import TABLES
from .settings import SourceSettings

logger = logging.getLogger(__name__)
LARGEST = {"rate": 1_000_000, "max_patches": 100_000, "image_size": 100_000}
COLUMNS = ("id", "images", "messages", "prompt", "completion", "conversations", "system", "question", "answer")


@dataclasses.dataclass(frozen=True)
class Source:
    """One source of a mixture. It lives in exactly one of `dataset`, `folder` and `annotation`.

    Args:
        name: unique in the mixture; the ids of its rows start with it.
        rate: passes over the source in one epoch: above 1 repeats, below 1 takes a part.
        dataset: Hub id, with `config`, `split` and `revision`.
        folder: local folder of Parquet files, of WebDataset's tar archives, of JSON (Lines) beside images, or of images
            with a `metadata.jsonl` or a folder per class.
        annotation: InternVL's JSON Lines file (or a JSON list of the same rows), with its `image_root`.
        image_root: folder that the paths of images are relative to, and do not leave: neither by `..`, nor as absolute
            paths or over symbolic links. Without it they are taken as they are, but for JSON in a `folder`: there it is
            that of the JSON, or of `images` beside it.
        streaming: rows are read as they are needed; nothing is stored on disk.
        columns: which columns of the data set are the `id`, `images`, and `messages`, `conversations` (with `system`),
            `prompt` and `completion`, or `question` and `answer`.
        prompt: the question of every row of a source that has an answer column alone.
        rows: number of rows, where it is known before the source is read: the dry run goes by it (but counts those of
            JSON Lines that are there), and so does the share of a streaming source, which needs it (an estimate is
            enough).
        obtain: page where the data can be had.
        make: command that makes the annotation; the dry run prints it with the name of the annotation and `image_root`.
        modality: what the images were taken with: optical, sar, ct …, one or several.
        tasks: what is asked: caption, vqa, grounding …
        general: whether it is general data, against forgetting.
        max_patches, image_size, system_prompt, input_spec, jpeg_degradation: see [`SourceSettings`].
        first_rows: a rate below 1 takes the first rows instead of random ones, as the released code does.
    """

    name: str
    rate: float = 1.0
    dataset: str | None = None
    config: str | None = None
    split: str = "train"
    revision: str | None = None
    folder: str | None = None
    annotation: str | None = None
    image_root: str | None = None
    streaming: bool = False
    columns: dict[str, str] = dataclasses.field(default_factory=dict)
    prompt: str | None = None
    rows: int | None = None
    obtain: str | None = None
    make: str | None = None
    modality: tuple[str, ...] = ()
    tasks: tuple[str, ...] = ()
    general: bool = False
    max_patches: int | None = None
    image_size: int | None = None
    system_prompt: str | None = None
    input_spec: dict | None = None
    jpeg_degradation: bool = False
    first_rows: bool = False

    @property
    def settings(self) -> SourceSettings:
        return SourceSettings(**{field.name: getattr(self, field.name) for field in dataclasses.fields(SourceSettings)})

    @property
    def location(self) -> str:
        return self.dataset or self.folder or self.annotation

    @property
    def is_on_hub(self) -> bool:
        return self.dataset is not None and not Path(self.dataset).exists()

    def missing(self) -> str | None:
        """What has to be there before the source can be read and is not, with the page where it can be had."""
        for path in (self.folder, self.annotation, self.image_root):
            if path is not None and not Path(path).exists():
                return f"{path} is not there" + (f"; obtain it from {self.obtain}" if self.obtain else "")
        return None


@dataclasses.dataclass(frozen=True)
class Mixture:
    """A mixture file.

    Args:
        sources: what is mixed.
        resample: "epoch" draws the part of a source with a fractional rate afresh in every epoch, "once" keeps it.
        modalities: the imaging modalities of the downstream tasks; each needs a source.
        shuffle_buffer: rows that a stream is shuffled in.
        split_streams: every worker of every process that trains reads its own part, see [`MixtureStream`].
    """

    sources: tuple[Source, ...]
    resample: str = "epoch"
    modalities: tuple[str, ...] = ()
    shuffle_buffer: int = 1000
    split_streams: bool = False


MIXTURE_KEYS = {"sources": list, "resample": str, "modalities": list, "shuffle_buffer": int} | {
    "split_streams": bool,
    "root": str,
    "defaults": dict,
    "released_compatible": bool,
}

SOURCE_KEYS = {
    "name": str,
    "rate": (int, float),
    "dataset": str,
    "config": str,
    "split": str,
    "revision": str,
    "folder": str,
    "annotation": str,
    "image_root": str,
    "streaming": bool,
    "columns": dict,
    "prompt": str,
    "rows": int,
    "obtain": str,
    "make": str,
    "modality": (str, list),
    "tasks": list,
    "general": bool,
    "max_patches": int,
    "image_size": int,
    "system_prompt": str,
    "input_spec": dict,
}

# The keys of the released meta JSON, and what they are called here.
META_KEYS = {
    "root": "image_root",
    "annotation": "annotation",
    "repeat_time": "rate",
    "length": "rows",
    "max_dynamic_patch": "max_patches",
    "force_image_size": "image_size",
    "data_augment": "data_augment",
}


def load_mixture(mixture: str | Path | dict) -> Mixture:
    """Reads a mixture file and checks every key of it, without touching any data.

    Args:
        mixture: a YAML file with `sources`, a recipe with such a mapping (or the path of such a file) under `mixture`,
            a released meta JSON, or the mapping itself.

    Raises:
        ValueError: names the file, the source and the key that is wrong.
    """
    origin = "mixture"
    if not isinstance(mixture, dict):
        origin, path = str(mixture), Path(mixture)
        if not path.is_file():
            raise ValueError(f"There is no mixture file {path}.")
        if path.suffix == ".json":
            mixture = {"sources": [{"meta": origin}]}
        else:
            try:
                mixture = expanded_home(read_yaml(path))
            except Exception as error:  # of many kinds: no text, a date that is none, a key that is a list
                raise ValueError(f"{path} is no YAML: {error}") from error
            if isinstance(mixture, dict) and "mixture" in mixture:
                mixture = mixture["mixture"]
                if isinstance(mixture, str):
                    return load_nested(mixture, path)
    if not isinstance(mixture, dict) or not mixture.get("sources"):
        raise ValueError(f"{origin}: a mixture has a list of `sources`.")
    check_keys(mixture, MIXTURE_KEYS, origin)
    if mixture.get("resample", "epoch") not in ("epoch", "once"):
        raise ValueError(f"{origin}: resample is {mixture['resample']!r}, not 'epoch' or 'once'.")
    released_compatible, root = mixture.get("released_compatible", False), Path(mixture.get("root", ""))
    defaults = mixture.get("defaults", {})
    check_keys(defaults, SOURCE_KEYS, f"{origin}, defaults")

    entries = []
    for index, entry in enumerate(mixture["sources"]):
        if not isinstance(entry, dict):
            raise ValueError(f"{origin}: source {index} is {entry!r}, not a mapping with a name and a location.")
        if "meta" in entry:
            entries += meta_entries(entry, root, f"{origin}, source {index}")
        else:
            entries.append(entry)
    sources = [
        make_source({**defaults, **entry}, root, released_compatible, f"{origin}, source {entry.get('name', index)!r}")
        for index, entry in enumerate(entries)
    ]
    if released_compatible or any("data_augment" in entry for entry in entries):
        warn_of_differences(entries, released_compatible)
    names = [source.name for source in sources]
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        raise ValueError(f"{origin}: the source names {repeated} are used more than once.")
    options = {key: mixture[key] for key in ("resample", "shuffle_buffer", "split_streams") if key in mixture}
    check_texts(mixture, ("modalities",), origin)
    if options.get("shuffle_buffer", 1) < 1:
        raise ValueError(f"{origin}: shuffle_buffer is {options['shuffle_buffer']}; it must be above 0.")
    if options.get("split_streams"):
        first = [source.name for source in sources if source.streaming and source.first_rows and source.rate < 1]
        if first:
            raise ValueError(f"{origin}: split_streams has no first rows of {first[0]!r}: leave one or the other out.")
    return Mixture(tuple(sources), modalities=tuple(mixture.get("modalities", ())), **options)


def load_nested(mixture: str, path: Path) -> Mixture:
    """The mixture that a file names in place of having one."""
    if Path(mixture).exists() and Path(mixture).samefile(path):
        raise ValueError(f"{path} names itself as its mixture.")
    try:
        return load_mixture(mixture)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: {error}") from error


def check_texts(fields: dict, keys: tuple[str, ...], origin: str) -> None:
    """Raises a `ValueError` if one of these keys has a list or mapping of other things than texts."""
    for key in keys:
        values = fields.get(key) or ()
        texts = values.values() if isinstance(values, dict) else values
        if not all(isinstance(text, str) and text for text in texts):
            raise ValueError(f"{origin}: {key} is {values!r}, but texts are needed.")


def check_keys(fields: dict, known: dict, origin: str) -> None:
    """Raises a `ValueError` that names an unknown key or a value of the wrong type."""
    for key, value in fields.items():
        if key not in known:
            raise ValueError(f"{origin}: unknown key {key!r}; known are {', '.join(known)}.")
        kinds = known[key] if isinstance(known[key], tuple) else (known[key],)
        if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
            wanted = " or ".join(kind.__name__ for kind in kinds)
            raise ValueError(f"{origin}: {key} is {value!r}, but needs a value of type {wanted}.")


def make_source(entry: dict, root: Path, released_compatible: bool, origin: str) -> Source:
    """Checks one entry of a mixture."""
    entry = dict(entry)
    data_augment = entry.pop("data_augment", False)
    check_keys(entry, SOURCE_KEYS, origin)
    if not entry.get("name"):
        raise ValueError(f"{origin}: a source needs a name.")
    locations = [key for key in ("dataset", "folder", "annotation") if entry.get(key)]
    if len(locations) != 1:
        raise ValueError(
            f"{origin}: give exactly one of dataset (a Hub id), folder, annotation (InternVL JSON Lines) and meta "
            f"(a released meta JSON); it has {locations or 'none'}."
        )
    allowed = {"config": {"dataset"}, "revision": {"dataset"}, "split": {"dataset", "folder"}}
    allowed |= {"columns": {"dataset", "folder"}, "prompt": {"dataset", "folder"}}
    for key, kinds in allowed.items():
        if key in entry and locations[0] not in kinds:
            raise ValueError(f"{origin}: {key} has no meaning for a source with {locations[0]}.")
    if entry.get("streaming") and "rows" not in entry:
        raise ValueError(f"{origin}: a streaming source needs `rows`, about how many it has, to be mixed in its share.")
    for key in ("rate", "rows", "max_patches", "image_size"):
        if key in entry and not 0 < entry[key] <= LARGEST.get(key, math.inf):
            most = f" and at most {LARGEST[key]:,}" if key in LARGEST else ""
            raise ValueError(f"{origin}: {key} is {entry[key]!r}; it must be above 0{most}.")
    unknown = set(entry.get("columns", {})) - set(COLUMNS)
    if unknown:
        raise ValueError(f"{origin}: columns are mapped for {', '.join(COLUMNS)}, not for {sorted(map(str, unknown))}.")
    check_texts(entry, ("columns", "tasks", "modality"), origin)
    if released_compatible and entry.get("rate", 1) > 1 and entry["rate"] != int(entry["rate"]):
        raise ValueError(f"{origin}: rate is {entry['rate']}, but the released code repeats whole sources only.")
    for key in ("folder", "annotation", "image_root"):
        if entry.get(key):
            entry[key] = str(root / entry[key])
    if Path(entry.get("annotation") or "").suffix.lower() in TABLES:
        raise ValueError(f"{origin}: the annotation {entry['annotation']} is no JSON: give it as `dataset`.")
    modality = entry.get("modality", ())
    entry["modality"] = (modality,) if isinstance(modality, str) else tuple(modality)
    entry["tasks"] = tuple(entry.get("tasks", ()))
    if released_compatible:
        entry |= {"image_size": None, "jpeg_degradation": data_augment, "first_rows": True}
    source = Source(**entry)
    try:
        source.settings.check()
    except (ValueError, TypeError) as error:
        raise ValueError(f"{origin}: {error}") from error
    return source


def meta_entries(entry: dict, root: Path, origin: str) -> list[dict]:
    """The entries of a released meta JSON, in this module's keys; the other keys of `entry` go to each of them."""
    if not isinstance(entry["meta"], str):
        raise ValueError(f"{origin}: meta is {entry['meta']!r}, but the path of a file is needed.")
    path = root / entry["meta"]
    common = {key: value for key, value in entry.items() if key != "meta"}
    try:
        meta = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{origin}: the meta JSON {path} cannot be read: {error}") from error
    if not isinstance(meta, dict):
        raise ValueError(f"{origin}: {path} is no meta JSON: it must map names to sources.")
    entries = []
    for name, fields in meta.items():
        if not isinstance(fields, dict):
            raise ValueError(f"{origin}: {name!r} in {path} is {str(fields)[:80]!r}, and no source.")
        unknown = set(fields) - set(META_KEYS)
        missing = {"root", "annotation"} - set(fields)
        if unknown or missing:
            raise ValueError(
                f"{origin}: {name!r} in {path} has unknown keys {sorted(unknown)} and lacks {sorted(missing)}."
            )
        renamed = {META_KEYS[key]: value for key, value in fields.items() if value is not None}
        entries.append({**common, "data_augment": False, **renamed, "name": name})
    return entries


def warn_of_differences(entries: list[dict], released_compatible: bool) -> None:
    """One warning for each thing that the released code does otherwise than the mixture reads."""
    differences = {
        "a rate below 1 takes {} rows": ("random", "the first", lambda entry: entry.get("rate", 1) < 1),
        "image_size is {}": ("applied", "not read", lambda entry: entry.get("image_size")),
        "data_augment {}": (
            "is not applied, because the file does not say how",
            "degrades images by JPEG compression of random quality",
            lambda entry: entry.get("data_augment"),
        ),
    }
    for text, (ours, theirs, concerns) in differences.items():
        names = [str(entry.get("name")) for entry in entries if concerns(entry)]
        if names and released_compatible:
            logger.warning("released_compatible: %s, not %s, in %s.", text.format(theirs), ours, ", ".join(names))
        elif names:
            logger.warning(
                "The released code differs: here %s, there %s, in %s. released_compatible: true does as it does.",
                text.format(ours),
                theirs,
                ", ".join(names),
            )
