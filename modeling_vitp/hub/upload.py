"""What was gathered into its repo: in one commit, so that a branch has all of it or is as it was."""

import copy
import logging
import os
import shutil
import tempfile
from concurrent.futures import Future
from fnmatch import fnmatch
from functools import partial
from pathlib import Path

from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

from .contents import Contents, gather, write_card
from .failures import FAILURES, explain, limit_waits, tried

logger = logging.getLogger(__name__)

# What a model's repo has of an earlier push and would be opened beside or instead of what is pushed.
STALE = "*.safetensors *.safetensors.index.json pytorch_model*.bin pytorch_model*.index.json adapter_*.json".split()
STALE += ["processor_config.json", "preprocessor_config.json"]  # of which the first is opened where there are both


def push(
    api: HfApi,
    contents: Contents,
    repo_id: str,
    private: bool | None = None,
    revision: str | None = None,
    commit_message: str = "Upload with modeling-vitp",
    create_pr: bool = False,
) -> CommitInfo:
    """Sends what was gathered in one commit. Files whose content the Hub has already, from a push that was cut off, are
    not sent again; what an earlier push left to be opened beside or instead of the contents is deleted.

    Args:
        api: the client.
        contents: what goes there.
        repo_id: created if it is not there.
        private: whether a new repo is; by default what the Hub does.
        revision: branch to push to, created if it is not there; or `refs/pr/NUMBER`.
        commit_message: of the commit, and title of a pull request.
        create_pr: whether the commit opens a pull request instead.

    Raises:
        ValueError: if the Hub does not take the card.
        HfHubHTTPError, httpx2.TransportError, OfflineModeIsEnabled, RuntimeError: of the client, after several tries
            where these can help. The branch is as it was.
    """
    repo = {"repo_id": repo_id, "repo_type": contents.repo_type}
    tried(lambda: contents.card.validate(contents.repo_type))
    if not create_pr:
        sdk = {"space_sdk": contents.card.data.get("sdk")} if contents.repo_type == "space" else {}
        if visibility(api, contents, repo_id) is None:
            tried(lambda: api.create_repo(**repo, private=private, exist_ok=True, **sdk))
        if revision is not None and not revision.startswith("refs/"):
            tried(lambda: api.create_branch(**repo, branch=revision, exist_ok=True))

    additions = [CommitOperationAdd(name, content) for name, content in contents.files.items()]
    fresh = [copy.copy(addition) for addition in additions]
    # The client tries each file several times by itself.
    limit_waits()
    api.preupload_lfs_files(
        repo_id, additions, repo_type=contents.repo_type, revision=revision, create_pr=create_pr, free_memory=False
    )

    tries = iter([additions])  # of which is known what the Hub had before; later tries ask again

    def commit() -> CommitInfo:
        operations = next(tries, None) or [copy.copy(addition) for addition in fresh]
        stale = [CommitOperationDelete(name) for name in stale_files(api, contents, repo_id, revision)]
        return api.create_commit(
            **repo,
            operations=[*operations, *stale],
            commit_message=commit_message,
            revision=revision,
            create_pr=create_pr,
        )

    # An answer that was lost may have been that of a pull request opened; to try again would open another.
    done = tried(commit, after_lost_answer=not create_pr)
    if not create_pr:
        for key, value in contents.variables.items():
            tried(partial(api.add_space_variable, repo_id, key, value))
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
    """Gathers what belongs to the model in a folder and sends it, see [`gather`] and [`push`]; writes its card, too."""
    write_card(what, folder, repo_id=repo_id)
    with tempfile.TemporaryDirectory() as work:
        return push(api, gather(what, folder, repo_id, Path(work)), repo_id, private, revision, commit_message)


def look(
    api: HfApi, contents: Contents, repo_id: str, private: bool, revision: str | None, must_answer: bool = True
) -> tuple[str, list[str]]:
    """Whether the repo is private or public, or will be, and what a push would delete there.

    Args:
        must_answer: whether a Hub that does not answer is an error.
    """
    try:
        found = visibility(api, contents, repo_id)
        if found is None:
            return "private, new" if private else "public unless the namespace is set to private, new", []
        return found, stale_files(api, contents, repo_id, revision)
    except FAILURES as error:
        if must_answer:
            raise
        return f"not known ({explain(error, repo_id)})", []


def visibility(api: HfApi, contents: Contents, repo_id: str) -> str | None:
    """`private` or `public`, `None` if there is no such repo that this user may see."""
    try:
        info = tried(lambda: api.repo_info(repo_id, repo_type=contents.repo_type))
    except RepositoryNotFoundError as error:
        if isinstance(error, GatedRepoError):
            raise
        return None
    return "private" if info.private else "public"


def stale_files(api: HfApi, contents: Contents, repo_id: str, revision: str | None) -> list[str]:
    """Files of an earlier push that would be opened beside or instead of those of the contents."""
    if contents.repo_type != "model":
        return []
    try:
        present = api.list_repo_files(repo_id, revision=revision)
    except (RepositoryNotFoundError, RevisionNotFoundError):
        return []
    return sorted(
        name
        for name in present
        if "/" not in name and name not in contents.files and any(fnmatch(name, pattern) for pattern in STALE)
    )


def collect(files: dict[str, Path], folder: Path) -> None:
    """Gives files a second name in another folder; copies them where the file system has no links."""
    for name, path in files.items():
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.unlink(missing_ok=True)
        try:
            os.link(path, target)
        except OSError:
            shutil.copyfile(path, target)


def report_failure(job: Future) -> None:
    error = None if job.cancelled() else job.exception()
    if error is not None:
        cause = " ".join(f"{type(error).__name__}: {error}".split())
        logger.warning("A push failed, and training goes on; the next one sends what is missing. %s", cause)
