"""Upload to a Hub repo in one commit, so that a branch receives either all files or none."""

import copy
import json
import logging
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from fnmatch import fnmatch
from functools import partial
from pathlib import Path
from typing import Any

from huggingface_hub import (
    CommitInfo,
    CommitOperationAdd,
    CommitOperationDelete,
    DatasetCard,
    DatasetInfo,
    HfApi,
    ModelInfo,
    RepoCard,
    SpaceCard,
    SpaceInfo,
    snapshot_download,
)
from huggingface_hub.errors import (
    GatedRepoError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import validate_repo_id

from ..auto.registry import MODELS, find_model
from ..cards.model_card import fill_card
from ..cards.record import (
    FIELDS,
    RECORD,
    agreed_license,
    card_metadata,
    license_files,
    load_card,
    read_json,
    run_folder,
    stated_licenses,
)
from ..cards.sections import with_section
from ..command.errors import one_line
from ..command.paths import SECONDS, SPACE
from ..images.reading import IMAGE_SUFFIXES
from .failures import FAILURES, explain_failure, retry
from .files import PACKAGE, all_files, check_no_secrets, find_secret, model_files

logger = logging.getLogger(__name__)

DATA_SUFFIXES = set(".parquet .arrow .json .jsonl .csv .tar .zip .png .jpg .jpeg .tif .tiff .webp".split())
MODEL_VARIABLE = "VITP_MODEL"  # environment variable that names the model of the demo
THUMBNAIL = "thumbnail.jpg"  # of the demo's card
MAX_PACKED = 900_000_000  # bytes of a model in the repo of a demo, which the Hub limits to 1 GB
LOCAL_KEYS = ("_name_or_path", "name_or_path")  # local path of a file's source; not read by anything
# Configuration and folder in a bundle of `vitp adapt`.
BUNDLE_CONFIG, FINE_TUNED = "adapt.yaml", "fine_tuned"
PICKLES = set(".bin .ckpt .joblib .pickle .pkl .pt .pth".split())  # loading them can run code
NOT_CONFIGS = ("tokenizer.json", "vocab.json", "model.safetensors.index.json")
# An id of Open Images, `/m/01g317`, is not a path.
ABSOLUTE = re.compile(r"(?:file://)?(?:~|/[^/\s][^/\n]+|[A-Za-z]:)[/\\][^\n]+")
ABSOLUTE_IN_TEXT = re.compile(r"(?<![\w./:~<>)-])(?:~/[\w.-]|/[\w.-]{2,}/[\w.-]|[A-Za-z]:\\\w)[\w./\\+-]*")
# Files of an earlier push that would be loaded beside or instead of the new ones.
STALE = "*.safetensors *.safetensors.index.json pytorch_model*.bin pytorch_model*.index.json adapter_*.json".split()
STALE += ["processor_config.json", "preprocessor_config.json"]  # the first has priority if both exist
# Parquet file of a data set: split, number and count of its shard, as `make_instructions` and `datasets` name them.
SHARD = re.compile(r"(.+?)(?:-(\d{5})-of-(\d{5}))?(?:-\d{5})?\.parquet")


@dataclass
class Contents:
    """Files and card of a push.

    Args:
        repo_type: `model`, `dataset` or `space`.
        files: local file, or the content itself, by path in the repo.
        card: model, data set or Space card, also in `files`.
        variables: environment variables of a Space.
    """

    repo_type: str
    files: dict[str, Path | bytes]
    card: RepoCard
    variables: dict[str, str] = field(default_factory=dict)

    def listing(self, deleted: Sequence[str]) -> str:
        """Return lines with the license, the files and their sizes, and the files to be `deleted`."""
        sizes = {
            name: len(content) if isinstance(content, bytes) else content.stat().st_size
            for name, content in self.files.items()
        }
        license = self.card.data.get("license_name") or self.card.data.get("license")
        lines = [f"license: {license or 'none stated; set one with --license'}"]
        lines += [f"{size:>15,} {name}" for name, size in sorted(sizes.items())]
        lines += [f"{sum(sizes.values()):>15,} bytes in {len(sizes)} files"]
        return "\n".join([*lines, *(f"{'deleted':>15} {name}" for name in deleted)])


def gather_contents(
    what: str,
    checkpoint: str | Path,
    repo_id: str,
    license: str | None = None,
    base_model: str | None = None,
    run: str | Path | None = None,
) -> Contents:
    """Collect the files and the card for a repo.

    Args:
        what: `backbone`, `model`, `adapter`, `adaptation`, `dataset` or `space`.
        checkpoint: folder or Hub id of a model, folder of a data set, or for an adaptation the output folder of
            `vitp adapt` or its bundle.
        repo_id: target repo, for the card.
        license: license, if the sources state none.
        base_model: Hub id of an adapter's base model, if it was trained from a folder.
        run: folder of the model's run with its record and metrics, if it is not the checkpoint's.

    Raises:
        ValueError: if the checkpoint has another model type, a secret, an absolute path, or a license that contradicts
            that of its sources, or if a bundle has a pickle.
    """
    check_hub_id(repo_id, "the Hub id of the target, NAMESPACE/NAME")
    if what == "space":
        contents = gather_space(checkpoint, repo_id, license)
    elif what == "dataset":
        contents = gather_dataset(checkpoint, license)
    elif what == "adaptation":
        contents = gather_bundle(Path(checkpoint), repo_id, license)
    else:
        contents = gather_model(what, checkpoint, repo_id, license, base_model, run)
    contents.files["README.md"] = str(contents.card).encode()
    check_relative("README.md", str(contents.card))
    for name, content in contents.files.items():
        kind = find_secret(name, content) if isinstance(content, bytes) else None
        if kind is not None:
            raise ValueError(f"Nothing was sent: {name} has {kind}. Remove it.")
    return contents


def gather_model(
    what: str,
    checkpoint: str | Path,
    repo_id: str,
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
            raise ValueError(f"{checkpoint} has no adapter. A run with use_peft saves one in its folder `adapter`.")
        entry = MODELS["adapter"]
    else:
        model_type = read_model_type(source)
        entry = MODELS.get(model_type)
        if entry is None or entry.push_as != what:
            hint = f" Push it with --what {entry.push_as}." if entry is not None and entry.push_as else ""
            raise ValueError(f"{checkpoint} is a {model_type!r} model, which cannot be pushed as {what!r}.{hint}")
    run = Path(run or source)
    files: dict[str, Path | bytes] = dict(model_files(folder))
    for path in (run / "metrics.json", run / "loss.png", *license_files(run_folder(run))):
        if path.is_file():
            files.setdefault(path.name, path)
    if not any(name.endswith(".safetensors") for name in files):
        raise ValueError(f"Expected safetensors weights in {checkpoint}, found none.")
    for name, path in files.items():
        if name.endswith(".json") and name not in NOT_CONFIGS:
            files[name] = portable_config(path, base_model)
    fields = agreed_license(stated_licenses(run), license)
    return Contents("model", files, fill_card(entry, run, folder, files, repo_id, fields))


def gather_bundle(folder: Path, repo_id: str, license: str | None) -> Contents:
    """Collect the visible files of a bundle of `vitp adapt`, with the checks of a backbone."""
    folder = folder / "bundle" if (folder / "bundle").is_dir() else folder
    if not (folder / BUNDLE_CONFIG).is_file():
        raise ValueError(f"{folder} is not a bundle of `vitp adapt`: {BUNDLE_CONFIG} is missing. Finish the command.")
    contents = gather_model("backbone", folder, repo_id, license, None, None)
    for name, path in visible_files(folder).items():
        suffix = path.suffix.lower()
        if suffix in PICKLES:
            raise ValueError(f"Nothing was sent: {name} is a pickle, which can run code. Remove it.")
        if suffix in (".md", ".yaml"):
            check_relative(name, path.read_text())
        if name != RECORD:  # stays here; the card states what it has
            is_config = suffix == ".json" and path.name not in NOT_CONFIGS
            contents.files.setdefault(name, portable_config(path, None) if is_config else path)
    if (folder / FINE_TUNED).is_dir():
        auto_class = find_model(read_model_type(folder / FINE_TUNED)).auto_class
        options = f'"{repo_id}", subfolder="{FINE_TUNED}", trust_remote_code=True'
        code = f"from transformers import AutoImageProcessor, {auto_class}\n\n"
        code += f"model = {auto_class}.from_pretrained(\n    {options}\n)\n"
        code += f"image_processor = AutoImageProcessor.from_pretrained(\n    {options}\n)"
        section = f"```python\n{code}\n```"
        contents.card.text = "\n" + with_section(contents.card.text, "Fine-tuned model", section)
    return contents


def gather_dataset(checkpoint: str | Path, license: str | None) -> Contents:
    folder = Path(checkpoint)
    if not folder.is_dir():
        raise ValueError(f"Expected the folder of a data set, got {checkpoint}.")
    for path in folder.rglob("*"):
        if path.is_symlink() and path.is_dir() and not path.name.startswith("."):
            raise ValueError(
                f"Nothing was sent: {path} is a link to a folder. Push a copy of the data set, made with cp -rL."
            )
    check_no_secrets(folder)
    files: dict[str, Path | bytes] = visible_files(folder)
    if not any(path.suffix.lower() in DATA_SUFFIXES for path in files.values()):
        raise ValueError(f"Expected data files (Parquet, JSON Lines, images …) in {checkpoint}, found none.")
    card = load_card(folder / "README.md", DatasetCard) if "README.md" in files else DatasetCard("---\n{}\n---\n")
    metadata = card_metadata(folder)
    stated = {"its card": {key: metadata[key] for key in FIELDS if isinstance(metadata.get(key), str)}}
    for key, value in agreed_license(stated, license).items():
        card.data[key] = value
    return Contents("dataset", files, card)


def gather_space(model: str | Path, repo_id: str, license: str | None) -> Contents:
    """Collect the files of the demo with this package, and those of its model if it is a folder."""
    check_no_secrets(SPACE)
    files: dict[str, Path | bytes] = visible_files(SPACE)
    files |= {f"{PACKAGE.name}/{name}": path for name, path in all_files(PACKAGE).items() if name.endswith(".py")}
    missing = {"README.md", "app.py", "requirements.txt"} - files.keys()
    if missing:
        raise ValueError(f"{SPACE.name}/ lacks {', '.join(sorted(missing))}, which a Space needs.")
    card = SpaceCard.load(SPACE / "README.md")
    card.data["thumbnail"] = f"https://huggingface.co/spaces/{repo_id}/resolve/main/{THUMBNAIL}"
    if not Path(model).is_dir():
        check_hub_id(str(model))
        card.data["models"] = card.data["preload_from_hub"] = [str(model)]
        return Contents("space", files, card, {MODEL_VARIABLE: str(model)})
    what, name = find_model(read_model_type(Path(model))).push_as, Path(model).resolve().name
    if "timm_wrapper" in Path(model, "config.json").read_text():
        raise ValueError(f"{model} needs timm, which the demo of the Hub does not install. Choose a model without it.")
    packed = gather_model(what, model, name, license, None, None)
    size = sum(path.stat().st_size for path in packed.files.values() if isinstance(path, Path))
    if size > MAX_PACKED:
        raise ValueError(
            f"A Space has room for a model of {MAX_PACKED / 1e9:g} GB, {model} has {size / 1e9:.1f} GB. Push it with "
            f"--what {what}, and pass its Hub id."
        )
    packed.files["README.md"] = str(packed.card).encode()
    files |= {f"models/{name}/{file}": content for file, content in packed.files.items()}
    return Contents("space", files, card, {MODEL_VARIABLE: f"models/{name}"})


def check_hub_id(name: str, expected: str = "a folder or a Hub id") -> None:
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise ValueError(f"Expected {expected}, got {name!r}.") from error


def local_folder(checkpoint: str | Path) -> Path:
    """Return the folder of a checkpoint. Download it if it is on the Hub."""
    if Path(checkpoint).is_dir():
        return Path(checkpoint)
    check_hub_id(checkpoint)
    try:
        return Path(snapshot_download(checkpoint))
    except LocalEntryNotFoundError as error:
        raise ValueError(
            f"{checkpoint} is not a local folder, and cannot be downloaded from the Hub: {one_line(str(error))}"
        ) from error
    except FAILURES as error:
        raise ValueError(f"{checkpoint} cannot be downloaded: {explain_failure(error, checkpoint)}.") from error


def visible_files(folder: Path) -> dict[str, Path]:
    """Return the files that are not hidden, by path. Images and Parquet with a leading `_` are not hidden."""
    found = {}
    for name, path in all_files(folder).items():
        is_data = path.suffix.lower() in IMAGE_SUFFIXES | {".parquet"}
        if not re.search(r"(^|/)\." if is_data else r"(^|/)[._]", name):
            found[name] = path
    return found


def read_model_type(folder: Path) -> str | None:
    """Return the `model_type` of a model's folder."""
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder} is not the folder of a model: config.json is missing.")
    return read_json(folder / "config.json").get("model_type")


def check_relative(name: str, text: str) -> None:
    """Raise a `ValueError` if the text of a file has an absolute path."""
    if found := ABSOLUTE_IN_TEXT.search(text):
        path = found[0].strip('\t ,;"').rstrip(".")
        raise ValueError(f"Nothing was sent: {name} has an absolute path, {path}. Make it relative.")


def portable_config(path: Path, base_model: str | None) -> Path | bytes:
    """Return the file, or its content without the fields that are only valid on this machine.

    Raises:
        ValueError: if the file has an absolute path, naming its key.
    """
    try:
        config = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}.") from error
    before = json.dumps(config)
    if path.name == "adapter_config.json":
        base = config.get("base_model_name_or_path")
        if base_model is None and (base is None or Path(base).exists() or ABSOLUTE.fullmatch(base)):
            raise ValueError(
                "The adapter was trained from a folder. Push that base model too, and pass its Hub id as --base_model; "
                "or push the merged model with --what model."
            )
        config["base_model_name_or_path"] = base_model or base
    drop_local_keys(config)
    for key, value in strings_of(config):
        if ABSOLUTE.fullmatch(value):
            raise ValueError(f"Nothing was sent: {path.name} has an absolute path under {key!r}. Make it relative.")
    return path if json.dumps(config) == before else (json.dumps(config, indent=2) + "\n").encode()


def drop_local_keys(value: Any) -> None:
    for item in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        drop_local_keys(item)
    if isinstance(value, dict):
        for key in LOCAL_KEYS:
            value.pop(key, None)


def strings_of(value: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """Yield the strings in a configuration, each with its key."""
    if isinstance(value, str):
        yield key, value
    elif isinstance(value, dict):
        for name, item in value.items():
            yield from strings_of(item, f"{key}.{name}".lstrip("."))
    elif isinstance(value, list):
        for item in value:
            yield from strings_of(item, key)


def write_model_card(what: str, folder: str | Path, repo_id: str | None = None) -> None:
    """Write the card of a model to its folder.

    Args:
        what: `model`, `backbone` or `adapter`.
        folder: folder of the model, with the record of its run.
        repo_id: target repo of a push. Defaults to the name of the folder.
    """
    folder = Path(folder)
    entry = MODELS["adapter"] if what == "adapter" else find_model(read_model_type(folder))
    try:
        license = agreed_license(stated_licenses(folder))
    except ValueError as error:
        logger.warning("The card of %s states no license: %s", folder, error)
        license = {}
    card = fill_card(entry, folder, folder, dict(model_files(folder)), repo_id or folder.resolve().name, license)
    card.save(folder / "README.md")


def push(
    api: HfApi,
    contents: Contents,
    repo_id: str,
    private: bool | None = None,
    revision: str | None = None,
    commit_message: str = "Upload with modeling-vitp",
    create_pr: bool = False,
) -> CommitInfo:
    """Push the contents in one commit.

    Files that the Hub already has from an interrupted push are not sent again. Files of an earlier push that would be
    loaded beside or instead of the contents are deleted.

    Args:
        repo_id: target repo, created if it does not exist.
        private: whether a new repo is private. Defaults to the Hub's setting. If `True`, a public repo is an error.
        revision: branch to push to, created if it does not exist, or `refs/pr/NUMBER`.
        commit_message: message of the commit and title of a pull request.
        create_pr: whether to open a pull request with the commit.

    Raises:
        ValueError: if the Hub rejects the card, or if `private` is set and the repo is public.
        HfHubHTTPError, httpx2.TransportError, OfflineModeIsEnabled, RuntimeError: if the client fails, after retries if
            these can help. The branch is unchanged.
    """
    repo = {"repo_id": repo_id, "repo_type": contents.repo_type}
    retry(lambda: contents.card.validate(contents.repo_type))
    found = visibility(api, contents, repo_id)
    if private and found == "public":
        raise ValueError(
            f"Expected a private repo, but {repo_id} exists and is public. Make it private in its settings, or push "
            "without asking for a private one."
        )
    if not create_pr:
        sdk = {"space_sdk": contents.card.data.get("sdk")} if contents.repo_type == "space" else {}
        if found is None:
            retry(lambda: api.create_repo(**repo, private=private, exist_ok=True, **sdk))
        if revision is not None and not revision.startswith("refs/"):
            retry(lambda: api.create_branch(**repo, branch=revision, exist_ok=True))

    additions = [CommitOperationAdd(name, content) for name, content in contents.files.items()]
    fresh = [copy.copy(addition) for addition in additions]
    # The client retries each file by itself.
    api.preupload_lfs_files(
        repo_id, additions, repo_type=contents.repo_type, revision=revision, create_pr=create_pr, free_memory=False
    )

    uploaded = iter([additions])  # these know the files that the Hub has; retries ask again

    def commit() -> CommitInfo:
        operations = next(uploaded, None) or [copy.copy(addition) for addition in fresh]
        stale = [CommitOperationDelete(name) for name in stale_files(api, contents, repo_id, revision)]
        return api.create_commit(
            **repo,
            operations=[*operations, *stale],
            commit_message=commit_message,
            revision=revision,
            create_pr=create_pr,
        )

    # If the answer was lost, the pull request may exist, and a retry would open a second one.
    done = retry(commit, after_lost_answer=not create_pr)
    if not create_pr:
        for key, value in contents.variables.items():
            retry(partial(api.add_space_variable, repo_id, key, value))
    return done


def push_folder(
    api: HfApi,
    folder: str | Path,
    repo_id: str,
    private: bool | None = None,
    revision: str | None = None,
    commit_message: str = "Upload with modeling-vitp",
    what: str = "model",
) -> CommitInfo:
    """Write the card of a model's folder, and push the files of the model."""
    write_model_card(what, folder, repo_id)
    return push(api, gather_contents(what, folder, repo_id), repo_id, private, revision, commit_message)


def preview(
    api: HfApi, contents: Contents, repo_id: str, private: bool, revision: str | None, must_answer: bool = True
) -> tuple[str, list[str]]:
    """Return the visibility of the repo after the push, and the files that a push would delete.

    Args:
        must_answer: whether to retry, and to raise an error, if the Hub does not answer.
    """
    try:
        found = visibility(api, contents, repo_id, must_answer)
        if found is None:
            return "private, new" if private else "public unless the namespace is set to private, new", []
        return found, stale_files(api, contents, repo_id, revision)
    except FAILURES as error:
        if must_answer:
            raise
        return f"unknown ({explain_failure(error, repo_id)})", []


def visibility(api: HfApi, contents: Contents, repo_id: str, retries: bool = True) -> str | None:
    """Return `private` or `public`, or `None` if the repo does not exist or is not visible for this user."""

    def read() -> ModelInfo | DatasetInfo | SpaceInfo:
        return api.repo_info(repo_id, repo_type=contents.repo_type, timeout=None if retries else SECONDS)

    try:
        info = retry(read) if retries else read()
    except RepositoryNotFoundError as error:
        if isinstance(error, GatedRepoError):
            raise
        return None
    return "private" if info.private else "public"


def stale_files(api: HfApi, contents: Contents, repo_id: str, revision: str | None) -> list[str]:
    """Return the files of an earlier push that would be loaded beside or instead of the contents."""
    if contents.repo_type == "space":
        return []
    try:
        present = api.list_repo_files(repo_id, repo_type=contents.repo_type, revision=revision)
    except RepositoryNotFoundError:
        return []
    except RevisionNotFoundError:  # a new branch begins with the files of main
        return [] if revision is None else stale_files(api, contents, repo_id, None)
    is_stale = is_stale_model_file if contents.repo_type == "model" else stale_shards(contents.files)
    return sorted(name for name in present if name not in contents.files and is_stale(name))


def is_stale_model_file(name: str) -> bool:
    return "/" not in name and any(fnmatch(name, pattern) for pattern in STALE)


def stale_shards(pushed: Iterable[str]) -> Callable[[str], bool]:
    """Return whether a file of a data set has rows of a pushed split, and is not another shard of the same division."""
    shards = {found.groups() for found in map(SHARD.fullmatch, pushed) if found}

    def is_stale(name: str) -> bool:
        found = SHARD.fullmatch(name)
        of_split = {shard for shard in shards if found and shard[0] == found[1]}
        return bool(of_split) and (found.groups() in of_split or found[3] not in {shard[2] for shard in of_split})

    return is_stale


def link_files(files: dict[str, Path], folder: Path) -> None:
    """Hard-link files into another folder, or copy them if the file system has no links."""
    for name, path in files.items():
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.unlink(missing_ok=True)
        try:
            os.link(path, target)
        except OSError:
            shutil.copyfile(path, target)


def report_failure(job: Future) -> None:
    """Log the error of a failed background push."""
    error = None if job.cancelled() else job.exception()
    if error is not None:
        cause = " ".join(f"{type(error).__name__}: {error}".split())
        logger.warning("A push failed. Training continues, and the next push sends the missing files. %s", cause)
