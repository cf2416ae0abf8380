"""Who may do what: tokens of read and write scope, members of a namespace, private and gated repos."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .messages import Request
from .storage import HubError, Repo

if TYPE_CHECKING:
    from .server import LocalHub


def find(hub: LocalHub, request: Request, kind: str | None, repo_id: str, need: str = "read") -> Repo:
    """The repo, if this request may `read` its content, see its `info` only, or `write`."""
    repo = hub.storage.get(kind or "models", repo_id)
    belongs = repo is not None and is_member(hub, request.user, repo.namespace)
    if repo is None or (repo.state["private"] and not belongs):
        raise HubError(401 if request.user is None else 404, "Repository not found", "RepoNotFound")
    if need == "write":
        require_write(hub, request, repo.namespace)
    elif need == "read" and repo.state["gated"] and not belongs and request.user not in repo.state["granted"]:
        status, what = (401, "log in") if request.user is None else (403, "ask for access")
        raise HubError(status, f"Access to {kind or 'model'} {repo_id} is restricted: {what}.", "GatedRepo")
    return repo


def is_member(hub: LocalHub, user: str | None, namespace: str) -> bool:
    return user is not None and (user == namespace or user in hub.organizations.get(namespace, ()))


def require_write(hub: LocalHub, request: Request, namespace: str) -> None:
    if request.user is None:
        raise HubError(401, "Invalid username or password.")
    if request.scope != "write":
        raise HubError(403, "Forbidden: this needs a token with the write scope")
    if not is_member(hub, request.user, namespace):
        raise HubError(403, f"Forbidden: {request.user} has no right to write to {namespace}")


def may_commit(hub: LocalHub, request: Request, kind: str, repo_id: str, revision: str) -> Repo:
    """The same for a commit: who may read may also open a pull request and go on with it."""
    if "create_pr" not in request.query and not revision.startswith("refs/pr/"):
        return find(hub, request, kind, repo_id, "write")
    repo = find(hub, request, kind, repo_id)
    require_write(hub, request, request.user)
    return repo
