"""Upload to a Hub repo in one commit, so that a branch receives either all files or none."""

import copy
import json
import logging
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from huggingface_hub import (
    CommitInfo,
    CommitOperationAdd,
    CommitOperationDelete,
    DatasetCard,
    HfApi,
    RepoCard,
    SpaceCard,
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

from ..auto.registry import MODELS, ModelEntry, find_model
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
from ..command.paths import SECONDS, SPACE
from ..images.reading import IMAGE_SUFFIXES
from .failures import FAILURES, explain_failure, retry
from .files import PACKAGE, all_files, check_no_secrets, find_secret, matches_any, model_files

logger = logging.getLogger(__name__)

DATA_SUFFIXES = set(".parquet .arrow .json .jsonl .csv .tar .zip .png .jpg .jpeg .tif .tiff .webp".split())
MODEL_VARIABLE = "VITP_MODEL"  # environment variable that names the model of the demo
THUMBNAIL = "thumbnail.jpg"  # of the demo's card
MAX_PACKED = 900_000_000  # bytes of a model in the repo of a demo, which the Hub limits to 1 GB
LOCAL_KEYS = ("_name_or_path", "name_or_path")  # local path of a file's source; not read by anything
# Configuration and folder in a bundle of `vitp adapt`.
BUNDLE_CONFIG = "adapt.yaml"
FINE_TUNED = "fine_tuned"
PICKLES = set(".bin .ckpt .joblib .pickle .pkl .pt .pth".split())  # loading them can run code
NOT_CONFIGS = ("tokenizer.json", "vocab.json", "model.safetensors.index.json")
# An id of Open Images, `/m/01g317`, is not a path.
ABSOLUTE = re.compile(r"\A(?:file://)?(?:~|/[^/\s][^/\n]+|[A-Za-z]:)[/\\][^\n]+\Z")
ABSOLUTE_IN_TEXT = re.compile(r"(?<![\w./:~<>)-])(?:~/[\w.-]|/[\w.-]{2,}/[\w.-]|[A-Za-z]:\\\w)[\w./\\+-]*")
# Files of an earlier push that would be loaded beside or instead of the new ones.
STALE = "*.safetensors *.safetensors.index.json pytorch_model*.bin pytorch_model*.index.json adapter_*.json".split()
STALE += ["processor_config.json", "preprocessor_config.json"]  # the first has priority if both exist
# Parquet file of a data set: split, number and count of its shard, as `make_instructions` and `datasets` name them.
SHARD = re.compile(r"(?P<split>.+?)(?:-(?P<number>\d{5})-of-(?P<count>\d{5}))?(?:-\d{5})?\.parquet")


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
        license = self.card.data.get("license_name") or self.card.data.get("license")
        lines = [f"license: {license or 'none stated; set one with --license'}"]
        total_size = 0
        for name, content in sorted(self.files.items()):
            size = size_of(content)
            lines.append(f"{size:>15,} {name}")
            total_size += size
        lines.append(f"{total_size:>15,} bytes in {len(self.files)} files")
        for name in deleted:
            lines.append(f"{'deleted':>15} {name}")
        return "\n".join(lines)


def size_of(content: Path | bytes) -> int:
    """Return the size of a file, or of its content, in bytes."""
    return len(content) if isinstance(content, bytes) else content.stat().st_size


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
    validate_repo_id(repo_id)
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
        if isinstance(content, bytes):  # the files themselves are checked
            kind = find_secret(name, content)
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
    source = local_folder(checkpoint)
    check_no_secrets(source)
    folder = source
    if what == "adapter":
        folder = adapter_folder(source)
        entry = MODELS["adapter"]
    else:
        entry = entry_to_push(what, source)
    run = source if run is None else Path(run)
    files: dict[str, Path | bytes] = dict(model_files(folder))
    for path in (run / "metrics.json", run / "loss.png", *license_files(run_folder(run))):
        if path.is_file():
            files.setdefault(path.name, path)
    check_has_files(checkpoint, files, {".safetensors"}, "safetensors weights")
    for name, path in files.items():
        if name.endswith(".json") and name not in NOT_CONFIGS:
            files[name] = portable_config(path, base_model)
    fields = agreed_license(stated_licenses(run), license)
    return Contents("model", files, fill_card(entry, run, folder, files, repo_id, fields))


def adapter_folder(source: Path) -> Path:
    """Return the folder of the LoRA adapter of a run, which may be the run's own folder."""
    if (source / "adapter_config.json").is_file():
        return source
    check_exists(source / "adapter", "adapter_config.json", "A run with use_peft saves it.")
    return source / "adapter"


def check_exists(folder: Path, name: str, advice: str) -> None:
    """Raise a `ValueError` if the file by which a folder is recognized is missing."""
    if not (folder / name).is_file():
        raise ValueError(f"{name} is missing in {folder}. {advice}")


def check_has_files(folder: str | Path, names: Iterable[str], suffixes: set[str], expected: str) -> None:
    """Raise a `ValueError` if no file to push has one of the suffixes."""
    found_suffixes = {Path(name).suffix.lower() for name in names}
    if suffixes.isdisjoint(found_suffixes):
        raise ValueError(f"Expected {expected} in {folder}, found none.")


def entry_to_push(what: str, folder: Path) -> ModelEntry:
    """Return the registered model of a folder. Raise a `ValueError` if it is not pushed as `what`."""
    model_type = read_model_type(folder)
    entry = MODELS.get(model_type)
    if entry is None or entry.push_as != what:
        hint = ""
        if entry is not None and entry.push_as:
            hint = f" Push it with --what {entry.push_as}."
        raise ValueError(f"{folder} is a {model_type!r} model, which cannot be pushed as {what!r}.{hint}")
    return entry


def gather_bundle(folder: Path, repo_id: str, license: str | None) -> Contents:
    """Collect the visible files of a bundle of `vitp adapt`, with the checks of a backbone."""
    if (folder / "bundle").is_dir():
        folder = folder / "bundle"
    check_exists(folder, BUNDLE_CONFIG, "`vitp adapt` writes it at its end: finish that command.")
    contents = gather_model("backbone", folder, repo_id, license, base_model=None, run=None)
    for name, path in visible_files(folder).items():
        suffix = path.suffix.lower()
        if suffix in PICKLES:
            raise ValueError(f"Nothing was sent: {name} is a pickle, which can run code. Remove it.")
        if suffix in (".md", ".yaml"):
            check_relative(name, path.read_text())
        if name == RECORD or name in contents.files:  # the card states what the record has
            continue
        contents.files[name] = path
        if suffix == ".json" and path.name not in NOT_CONFIGS:
            contents.files[name] = portable_config(path, None)
    if (folder / FINE_TUNED).is_dir():
        auto_class = find_model(read_model_type(folder / FINE_TUNED)).auto_class
        section = example_of_fine_tuned(auto_class, repo_id)
        contents.card.text = "\n" + with_section(contents.card.text, "Fine-tuned model", section)
    return contents


def example_of_fine_tuned(auto_class: str, repo_id: str) -> str:
    """Return the code, for a card, that loads the fine-tuned model of a bundle."""
    options = f'"{repo_id}", subfolder="{FINE_TUNED}", trust_remote_code=True'
    return f"""```python
from transformers import AutoImageProcessor, {auto_class}

model = {auto_class}.from_pretrained(
    {options}
)
image_processor = AutoImageProcessor.from_pretrained(
    {options}
)
```"""


def gather_dataset(checkpoint: str | Path, license: str | None) -> Contents:
    folder = Path(checkpoint)
    for path in folder.rglob("*"):
        is_linked_folder = path.is_symlink() and path.is_dir()
        if is_linked_folder and not path.name.startswith("."):  # its files would be left out
            raise ValueError(
                f"Nothing was sent: {path} is a link to a folder. Push a copy of the data set, made with cp -rL."
            )
    check_no_secrets(folder)
    files: dict[str, Path | bytes] = visible_files(folder)
    check_has_files(folder, files, DATA_SUFFIXES, "data files (Parquet, JSON Lines, images …)")
    card = DatasetCard("---\n{}\n---\n")
    if "README.md" in files:
        card = load_card(folder / "README.md", DatasetCard)
    metadata = card_metadata(folder)
    license_of_card = {}
    for key in FIELDS:
        if isinstance(metadata.get(key), str):
            license_of_card[key] = metadata[key]
    for key, value in agreed_license({"its card": license_of_card}, license).items():
        card.data[key] = value
    return Contents("dataset", files, card)


def gather_space(model: str | Path, repo_id: str, license: str | None) -> Contents:
    """Collect the files of the demo with this package, and those of its model if it is a folder."""
    check_no_secrets(SPACE)
    files: dict[str, Path | bytes] = visible_files(SPACE)
    for name, path in all_files(PACKAGE).items():
        if name.endswith(".py"):
            files[f"{PACKAGE.name}/{name}"] = path
    card = SpaceCard.load(SPACE / "README.md")
    card.data["thumbnail"] = f"https://huggingface.co/spaces/{repo_id}/resolve/main/{THUMBNAIL}"
    if not Path(model).is_dir():
        validate_repo_id(str(model))
        card.data["models"] = [str(model)]
        card.data["preload_from_hub"] = [str(model)]
        return Contents("space", files, card, {MODEL_VARIABLE: str(model)})
    folder_in_repo = f"models/{Path(model).resolve().name}"
    for name, content in pack_model(Path(model), license).items():
        files[f"{folder_in_repo}/{name}"] = content
    return Contents("space", files, card, {MODEL_VARIABLE: folder_in_repo})


def pack_model(folder: Path, license: str | None) -> dict[str, Path | bytes]:
    """Return the files of a model for the repo of a demo, with its card.

    Raises:
        ValueError: if the demo cannot load the model, or its repo has no room for it.
    """
    push_as = find_model(read_model_type(folder)).push_as
    if "timm_wrapper" in (folder / "config.json").read_text():
        raise ValueError(f"{folder} needs timm, which the demo of the Hub does not install. Choose a model without it.")
    contents = gather_model(push_as, folder, folder.resolve().name, license, base_model=None, run=None)
    size = sum(map(size_of, contents.files.values()))
    if size > MAX_PACKED:
        raise ValueError(
            f"A Space has room for a model of {MAX_PACKED / 1e9:g} GB, {folder} has {size / 1e9:.1f} GB. Push it with "
            f"--what {push_as}, and pass its Hub id."
        )
    return {**contents.files, "README.md": str(contents.card).encode()}


def local_folder(checkpoint: str | Path) -> Path:
    """Return the folder of a checkpoint. Download it if it is on the Hub."""
    if Path(checkpoint).is_dir():
        return Path(checkpoint)
    try:
        return Path(snapshot_download(checkpoint))
    except (HFValidationError, LocalEntryNotFoundError, *FAILURES) as error:
        raise ValueError(f"{checkpoint} cannot be downloaded: {explain_failure(error, checkpoint)}.") from error


def visible_files(folder: Path) -> dict[str, Path]:
    """Return the files that are not hidden, by path. Images and Parquet with a leading `_` are not hidden."""
    paths = {}
    for name, path in all_files(folder).items():
        is_data = path.suffix.lower() in IMAGE_SUFFIXES | {".parquet"}
        hidden_pattern = r"(^|/)\." if is_data else r"(^|/)[._]"
        if not re.search(hidden_pattern, name):
            paths[name] = path
    return paths


def read_model_type(folder: Path) -> str | None:
    """Return the `model_type` of a model's folder."""
    check_exists(folder, "config.json", "Pass the folder of a model.")
    return read_json(folder / "config.json").get("model_type")


def check_relative(name: str, text: str, key: str | None = None) -> None:
    """Raise a `ValueError` if a file has an absolute path: in its text, or as the value of a key."""
    pattern = ABSOLUTE_IN_TEXT if key is None else ABSOLUTE
    match = pattern.search(text)
    if match is not None:
        path = match[0].rstrip(".")
        place = "" if key is None else f" under {key!r}"
        raise ValueError(f"Nothing was sent: {name} has an absolute path{place}, {path}. Make it relative.")


def portable_config(path: Path, base_model: str | None) -> Path | bytes:
    """Return the file, or its content without the fields that are only valid on this machine.

    Raises:
        ValueError: if the file has an absolute path, naming its key.
    """
    config = json.loads(path.read_text())
    original_text = json.dumps(config)
    if path.name == "adapter_config.json":
        config["base_model_name_or_path"] = base_model or published_base(config.get("base_model_name_or_path"))
    drop_local_keys(config)
    for key, value in strings_of(config):
        check_relative(path.name, value, key)
    if json.dumps(config) == original_text:
        return path
    return (json.dumps(config, indent=2) + "\n").encode()


def published_base(base_model: str | None) -> str:
    """Return the base model of an adapter. Raise a `ValueError` unless it is on the Hub."""
    if base_model is None or Path(base_model).exists() or ABSOLUTE.fullmatch(base_model):
        raise ValueError(
            "The adapter was trained from a folder. Push that base model too, and pass its Hub id as --base_model; "
            "or push the merged model with --what model."
        )
    return base_model


def drop_local_keys(value: Any) -> None:
    """Remove the paths of this machine from a configuration, in place."""
    if isinstance(value, dict):
        for key in LOCAL_KEYS:
            value.pop(key, None)
        for item in value.values():
            drop_local_keys(item)
    elif isinstance(value, list):
        for item in value:
            drop_local_keys(item)


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
    retry(lambda: contents.card.validate(contents.repo_type))
    present_visibility = visibility(api, contents, repo_id)
    if private and present_visibility == "public":
        raise ValueError(
            f"Expected a private repo, but {repo_id} exists and is public. Make it private in its settings, or push "
            "without asking for a private one."
        )
    if not create_pr:
        if present_visibility is None:
            create_repo(api, contents, repo_id, private)
        if revision is not None and not revision.startswith("refs/"):
            retry(lambda: api.create_branch(repo_id, repo_type=contents.repo_type, branch=revision, exist_ok=True))
    commit_info = send_files(api, contents, repo_id, revision, commit_message, create_pr)
    if not create_pr:
        for key, value in contents.variables.items():
            retry(partial(api.add_space_variable, repo_id, key, value))
    return commit_info


def send_files(
    api: HfApi,
    contents: Contents,
    repo_id: str,
    revision: str | None,
    commit_message: str,
    create_pr: bool,
) -> CommitInfo:
    """Upload the files that the Hub does not have, and add all in one commit that also deletes outdated files."""
    additions = [CommitOperationAdd(name, content) for name, content in contents.files.items()]
    fresh_additions = [copy.copy(addition) for addition in additions]
    # The client retries each file by itself.
    api.preupload_lfs_files(
        repo_id,
        additions,
        repo_type=contents.repo_type,
        revision=revision,
        create_pr=create_pr,
        free_memory=False,
    )
    first_additions = iter([additions])  # these know the files that the Hub has; retries ask again

    def commit() -> CommitInfo:
        operations = next(first_additions, None) or [copy.copy(addition) for addition in fresh_additions]
        deletions = [CommitOperationDelete(name) for name in stale_files(api, contents, repo_id, revision)]
        return api.create_commit(
            repo_id,
            repo_type=contents.repo_type,
            operations=operations + deletions,
            commit_message=commit_message,
            revision=revision,
            create_pr=create_pr,
        )

    # If the answer was lost, the pull request may exist, and a retry would open a second one.
    return retry(commit, after_lost_answer=not create_pr)


def create_repo(api: HfApi, contents: Contents, repo_id: str, private: bool | None) -> None:
    space_sdk = contents.card.data.get("sdk") if contents.repo_type == "space" else None
    retry(
        lambda: api.create_repo(
            repo_id,
            repo_type=contents.repo_type,
            private=private,
            exist_ok=True,
            space_sdk=space_sdk,
        )
    )


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
    api: HfApi,
    contents: Contents,
    repo_id: str,
    private: bool,
    revision: str | None,
    must_answer: bool = True,
) -> tuple[str, list[str]]:
    """Return the visibility of the repo after the push, and the files that a push would delete.

    Args:
        must_answer: whether to retry, and to raise an error, if the Hub does not answer.
    """
    try:
        present_visibility = visibility(api, contents, repo_id, must_answer)
        if present_visibility is not None:
            return present_visibility, stale_files(api, contents, repo_id, revision)
        if private:
            return "private, new", []
        return "public unless the namespace is set to private, new", []
    except FAILURES as error:
        if must_answer:
            raise
        return f"unknown ({explain_failure(error, repo_id)})", []


def visibility(api: HfApi, contents: Contents, repo_id: str, retries: bool = True) -> str | None:
    """Return `private` or `public`, or `None` if the repo does not exist or is not visible for this user."""
    read_info = partial(api.repo_info, repo_id, repo_type=contents.repo_type)
    try:
        info = retry(read_info) if retries else read_info(timeout=SECONDS)
    except GatedRepoError:  # a subclass of the next one
        raise
    except RepositoryNotFoundError:
        return None
    return "private" if info.private else "public"


def stale_files(api: HfApi, contents: Contents, repo_id: str, revision: str | None) -> list[str]:
    """Return the files of an earlier push that would be loaded beside or instead of the contents."""
    if contents.repo_type == "space":
        return []
    try:
        present_files = api.list_repo_files(repo_id, repo_type=contents.repo_type, revision=revision)
    except RepositoryNotFoundError:
        return []
    except RevisionNotFoundError:  # a new branch begins with the files of main
        return [] if revision is None else stale_files(api, contents, repo_id, None)
    kept_files = set(contents.files)
    if contents.repo_type == "model":
        stale_names = stale_model_files(present_files)
    else:
        stale_names = stale_shards(present_files, kept_files)
    return sorted(set(stale_names) - kept_files)


def stale_model_files(names: Iterable[str]) -> list[str]:
    return [name for name in names if "/" not in name and matches_any(name, STALE)]


def stale_shards(names: Iterable[str], pushed_names: Iterable[str]) -> list[str]:
    """Return the files of a data set with rows of a pushed split that are not other shards of the same division."""
    pushed_shards: dict[str, set[str]] = {}  # numbers by split
    pushed_counts: dict[str, set[str]] = {}
    for name in pushed_names:
        shard = SHARD.fullmatch(name)
        if shard is not None:
            pushed_shards.setdefault(shard["split"], set()).add((shard["number"], shard["count"]))
            pushed_counts.setdefault(shard["split"], set()).add(shard["count"])
    stale_names = []
    for name in names:
        shard = SHARD.fullmatch(name)
        if shard is None or shard["split"] not in pushed_shards:
            continue
        is_replaced = (shard["number"], shard["count"]) in pushed_shards[shard["split"]]
        is_of_other_division = shard["count"] not in pushed_counts[shard["split"]]
        if is_replaced or is_of_other_division:
            stale_names.append(name)
    return stale_names


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
