"""The Hub's API: one function for each address."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Callable
from typing import TYPE_CHECKING
from urllib.parse import parse_qs, urlencode

from . import cards
from .access import find, may_commit, require_write
from .messages import Answer, Request
from .storage import HubError, Repo, matches

if TYPE_CHECKING:
    from .server import LocalHub

ROUTES: list[tuple[str, re.Pattern, Callable[..., Answer]]] = []
GROUPS = {
    "kind": r"(?P<kind>models|datasets|spaces)",
    "kind/": r"(?:(?P<kind>datasets|spaces)/)?",  # models have no prefix in the addresses of files
    "repo": r"(?P<repo>[^/]+(?:/[^/]+)?)",
    "path": r"(?P<path>.+)",
}


def route(method: str, pattern: str) -> Callable:
    """Registers a function for a path; `{name}` is a segment of it, given as an argument. HEAD takes what GET has."""
    regex = re.sub(r"\{([\w/]+)\}", lambda group: GROUPS.get(group[1], rf"(?P<{group[1]}>[^/]+)"), pattern)

    def register(function: Callable) -> Callable:
        ROUTES.append((method, re.compile(regex), function))
        return function

    return register


def address(hub: LocalHub, repo: Repo) -> str:
    return hub.url + ("/" if repo.kind == "models" else f"/{repo.kind}/") + repo.id


# Users, and repos as a whole.


@route("GET", "/api/whoami-v2")
def whoami(hub: LocalHub, request: Request) -> Answer:
    if request.user is None:
        raise HubError(401, "Invalid username or password.")
    orgs = [{"type": "org", "name": name} for name, members in hub.organizations.items() if request.user in members]
    access = {"displayName": "test", "role": request.scope}
    return Answer(
        {
            "type": "user",
            "name": request.user,
            "orgs": orgs,
            "auth": {"type": "access_token", "accessToken": access},
        }
    )


@route("POST", "/api/repos/create")
def create_repo(hub: LocalHub, request: Request) -> Answer:
    body = request.json()
    namespace = body.get("organization") or request.user
    require_write(hub, request, namespace)
    kind, repo_id = f"{body.get('type') or 'model'}s", f"{namespace}/{body['name']}"
    try:
        repo = hub.storage.create(kind, repo_id, request.user, body.get("visibility") == "private", body.get("sdk"))
    except HubError as error:
        repo = hub.storage.get(kind, repo_id)
        return Answer({"error": str(error), "url": address(hub, repo)}, error.status)
    return Answer({"url": address(hub, repo), "name": repo_id, "id": repo_id})


def named_repo(hub: LocalHub, request: Request, body: dict, key: str) -> Repo:
    kind = f"{body.get('type') or 'model'}s"
    return find(hub, request, kind, body[key], "write")


@route("DELETE", "/api/repos/delete")
def delete_repo(hub: LocalHub, request: Request) -> Answer:
    body = request.json()
    body["id"] = f"{body.get('organization') or request.user}/{body['name']}"
    hub.storage.delete(named_repo(hub, request, body, "id"))
    return Answer({})


@route("POST", "/api/repos/move")
def move_repo(hub: LocalHub, request: Request) -> Answer:
    body = request.json()
    repo = named_repo(hub, request, body, "fromRepo")
    require_write(hub, request, body["toRepo"].split("/")[0])
    hub.storage.move(repo, body["toRepo"])
    return Answer({})


@route("PUT", "/api/{kind}/{repo}/settings")
def settings(hub: LocalHub, request: Request, kind: str, repo: str) -> Answer:
    found, body = find(hub, request, kind, repo, "write"), request.json()
    if "visibility" in body:
        found.state["private"] = body["visibility"] == "private"
    found.state["gated"] = body.get("gated", found.state["gated"])
    found.save()
    return Answer({})


@route("GET", "/api/{kind}/{repo}/auth-check(?P<write>/write)?")
def auth_check(hub: LocalHub, request: Request, kind: str, repo: str, write: str | None) -> Answer:
    find(hub, request, kind, repo, "write" if write else "read")
    return Answer({})


@route("POST", "/api/{kind}/{repo}/user-access-request/grant")
def grant(hub: LocalHub, request: Request, kind: str, repo: str) -> Answer:
    found = find(hub, request, kind, repo, "write")
    found.state["granted"].append(request.json()["user"])
    found.save()
    return Answer({})


@route("POST", "/api/(?P<kind>spaces)/{repo}/variables")
def variables(hub: LocalHub, request: Request, kind: str, repo: str) -> Answer:
    found, body = find(hub, request, kind, repo, "write"), request.json()
    found.state.setdefault("variables", {})[body["key"]] = body["value"]
    found.save()
    return Answer({key: {"key": key, "value": value} for key, value in found.state["variables"].items()})


@route("POST", "/api/validate-yaml")
def validate_yaml(hub: LocalHub, request: Request) -> Answer:
    body = request.json()
    errors, warnings = cards.validate(body["content"], body.get("repoType") or "model")
    found = {"errors": [{"message": text} for text in errors], "warnings": [{"message": text} for text in warnings]}
    return Answer(found, 400 if errors else 200)


# Reading.


@route("GET", "/api/{kind}/{repo}(?:/revision/{revision})?")
def info(hub: LocalHub, request: Request, kind: str, repo: str, revision: str | None) -> Answer:
    found = find(hub, request, kind, repo, "info")
    revision = revision or "main"
    history = found.history(revision)
    (commit_id, commit), first = history[0], history[-1][1]
    siblings = []
    for path, file in commit["files"].items():
        siblings.append({"rfilename": path})
        if request.query.get("blobs", "").lower() == "true":
            siblings[-1] |= {"size": file["size"], "blobId": file["oid"]}
            if "sha256" in file:
                lfs = {"sha256": file["sha256"], "size": file["size"], "pointerSize": file["pointer_size"]}
                siblings[-1]["lfs"] = lfs
    try:
        card = cards.front_matter(found.content("README.md", revision).decode()) or {}
    except (KeyError, ValueError):
        card = {}
    tags = card.get("tags") or []
    details = {
        "id": repo,
        "author": found.namespace,
        "sha": commit_id,
        "createdAt": first["date"],
        "lastModified": commit["date"],
        "private": found.state["private"],
        "gated": found.state["gated"],
        "disabled": False,
        "downloads": 0,
        "likes": 0,
        "tags": tags if isinstance(tags, list) else [tags],
        "cardData": card,
        "siblings": siblings,
    }
    if kind == "models":
        details |= {"modelId": repo, "spaces": []}
        details |= {key: card[key] for key in ("library_name", "pipeline_tag", "model-index") if key in card}
        if "config.json" in commit["files"]:
            config = json.loads(found.content("config.json", revision))
            details["config"] = {key: config[key] for key in ("architectures", "model_type") if key in config}
    if kind == "spaces":
        details["sdk"] = found.state["sdk"]
    return Answer(details)


@route("GET", "/api/{kind}/{repo}/refs")
def references(hub: LocalHub, request: Request, kind: str, repo: str) -> Answer:
    found = find(hub, request, kind, repo, "info")
    lists = {
        "branches": "refs/heads/",
        "tags": "refs/tags/",
        "converts": "refs/convert/",
        "pullRequests": "refs/pr/",
    }
    return Answer(
        {
            name: [
                {"name": ref.removeprefix(prefix), "ref": ref, "targetCommit": commit_id}
                for ref, commit_id in found.refs.items()
                if ref.startswith(prefix)
            ]
            for name, prefix in lists.items()
        }
    )


@route("GET", "/api/{kind}/{repo}/commits/{revision}")
def commits(hub: LocalHub, request: Request, kind: str, repo: str, revision: str) -> Answer:
    found = find(hub, request, kind, repo, "info")
    keys = {"date": "date", "title": "summary", "message": "description"}
    return Answer(
        [
            {"id": commit_id, "authors": [{"user": commit["author"]}], **{key: commit[keys[key]] for key in keys}}
            for commit_id, commit in found.history(revision)
        ]
    )


def entry(repo: Repo, revision: str, path: str, expand: bool) -> dict | None:
    """What a tree says about a file or folder."""
    files = repo.files(revision)
    if path in files:
        file = files[path]
        found = {"type": "file", "path": path, "oid": file["oid"], "size": file["size"]}
        if "sha256" in file:
            found["lfs"] = {"oid": file["sha256"], "size": file["size"], "pointerSize": file["pointer_size"]}
    else:
        inside = {name: file["oid"] for name, file in files.items() if name.startswith(path + "/")}
        if not inside:
            return None
        found = {"type": "directory", "path": path, "oid": hash_of(inside), "size": 0}
    if expand:
        found["lastCommit"] = last_change(repo, revision, path)
    return found


@route("GET", "/api/{kind}/{repo}/tree/{revision}(?:/{path})?")
def tree(hub: LocalHub, request: Request, kind: str, repo: str, revision: str, path: str | None) -> Answer:
    found = find(hub, request, kind, repo, "info")
    prefix = path.strip("/") + "/" if path else ""
    inside = [name for name in found.files(revision) if name.startswith(prefix)]
    if not inside and prefix:
        raise HubError(404, f"{path} does not exist on {revision}", "EntryNotFound")
    query = request.query
    names = set()
    for name in inside:
        parts = name.removeprefix(prefix).split("/")
        depths = range(1, len(parts) + 1) if query.get("recursive", "").lower() == "true" else [1]
        names |= {prefix + "/".join(parts[:depth]) for depth in depths}
    names = sorted(names)
    start, expand = int(query.get("cursor", 0)), query.get("expand", "").lower() == "true"
    stop = start + hub.page_size
    headers = {}
    if stop < len(names):
        following = f"{hub.url}{request.address}?{urlencode({**query, 'cursor': stop})}"
        headers["Link"] = f'<{following}>; rel="next"'
    return Answer([entry(found, revision, name, expand) for name in names[start:stop]], headers=headers)


@route("POST", "/api/{kind}/{repo}/paths-info/{revision}")
def paths_info(hub: LocalHub, request: Request, kind: str, repo: str, revision: str) -> Answer:
    found = find(hub, request, kind, repo, "info")
    form = parse_qs(request.read().decode())
    expand = form.get("expand", ["false"])[0].lower() == "true"
    entries = [entry(found, revision, path.rstrip("/"), expand) for path in form.get("paths", [])]
    return Answer([entry for entry in entries if entry is not None])


@route("GET", "/{kind/}{repo}/resolve/{revision}/{path}")
def resolve(hub: LocalHub, request: Request, kind: str | None, repo: str, revision: str, path: str) -> Answer:
    found = find(hub, request, kind, repo)
    commit_id = found.commit_of(revision)
    headers = {"X-Repo-Commit": commit_id, "Accept-Ranges": "bytes"}
    file = found.files(commit_id).get(path)
    if file is None:
        raise HubError(404, f"{path} does not exist on {revision}", "EntryNotFound", **headers)
    if "sha256" not in file:
        return Answer(found.blob(file["oid"]), headers={**headers, "ETag": f'"{file["oid"]}"'})
    headers |= {"X-Linked-Size": str(file["size"]), "X-Linked-Etag": f'"{file["sha256"]}"'}
    return Answer(b"", 302, {**headers, "Location": signed(hub, found, file["sha256"])})


# Writing.


@route("POST", "/api/{kind}/{repo}/branch/{branch}")
def create_branch(hub: LocalHub, request: Request, kind: str, repo: str, branch: str) -> Answer:
    start = request.json().get("startingPoint", "main")
    return create_reference(find(hub, request, kind, repo, "write"), f"refs/heads/{branch}", start)


@route("POST", "/api/{kind}/{repo}/tag/{revision}")
def create_tag(hub: LocalHub, request: Request, kind: str, repo: str, revision: str) -> Answer:
    tag = request.json()["tag"]
    return create_reference(find(hub, request, kind, repo, "write"), f"refs/tags/{tag}", revision)


def create_reference(repo: Repo, ref: str, revision: str) -> Answer:
    if ref in repo.refs:
        raise HubError(409, f"Reference already exists: {ref}")
    repo.refs[ref] = repo.commit_of(revision)
    repo.save()
    return Answer({})


@route("DELETE", "/api/{kind}/{repo}/(?P<what>branch|tag)/{name}")
def delete_reference(hub: LocalHub, request: Request, kind: str, repo: str, what: str, name: str) -> Answer:
    found = find(hub, request, kind, repo, "write")
    if found.refs.pop(f"refs/heads/{name}" if what == "branch" else f"refs/tags/{name}", None) is None:
        raise HubError(404, f"Invalid rev id: {name}", "RevisionNotFound")
    found.save()
    return Answer({})


@route("POST", "/api/{kind}/{repo}/preupload/{revision}")
def preupload(hub: LocalHub, request: Request, kind: str, repo: str, revision: str) -> Answer:
    found, body = may_commit(hub, request, kind, repo, revision), request.json()
    current = found.files(revision)
    ignore = body.get("gitIgnore")
    if ignore is None:
        ignore = found.content(".gitignore", revision).decode() if ".gitignore" in current else ""
    ignored = [line.strip() for line in ignore.splitlines() if line.strip() and not line.startswith("#")]
    answers = []
    for file in body["files"]:
        path = file["path"]
        mode = found.upload_mode(path, file["size"], base64.b64decode(file["sample"]), revision)
        answers.append({"path": path, "uploadMode": mode, "shouldIgnore": matches(path, ignored)})
        if path in current:
            answers[-1]["oid"] = current[path].get("sha256", current[path]["oid"])
    return Answer({"files": answers})


@route("POST", "/{kind/}{repo}\\.git/info/lfs/objects/batch")
def lfs_batch(hub: LocalHub, request: Request, kind: str | None, repo: str) -> Answer:
    found, body = find(hub, request, kind, repo), request.json()
    require_write(hub, request, request.user)
    objects, transfer = [], "basic"
    for wanted in body["objects"]:
        sha256, size = wanted["oid"], wanted["size"]
        objects.append({"oid": sha256, "size": size, "authenticated": True})
        if found.blob(sha256).exists():
            continue
        upload = {"href": signed(hub, found, sha256)}
        if size > hub.part_size and "multipart" in body.get("transfers", ()):
            transfer = "multipart"
            numbers = range(1, -(-size // hub.part_size) + 1)
            parts = {f"{number:05}": signed(hub, found, f"{sha256}.part{number}") for number in numbers}
            upload = {"href": signed(hub, found, sha256), "header": {"chunk_size": str(hub.part_size), **parts}}
        verify = {"href": f"{address(hub, found)}.git/info/lfs/objects/verify"}
        objects[-1]["actions"] = {"upload": upload, "verify": verify}
    return Answer({"transfer": transfer, "objects": objects})


@route("POST", "/{kind/}{repo}\\.git/info/lfs/objects/verify")
def lfs_verify(hub: LocalHub, request: Request, kind: str | None, repo: str) -> Answer:
    found, body = find(hub, request, kind, repo), request.json()
    if found.lfs_file(body["oid"])["size"] != body["size"]:
        raise HubError(400, f"size of {body['oid']} is not {body['size']}")
    return Answer({})


@route("POST", "/api/{kind}/{repo}/commit/{revision}")
def commit_operations(hub: LocalHub, request: Request, kind: str, repo: str, revision: str) -> Answer:
    found = may_commit(hub, request, kind, repo, revision)
    header, *operations = [json.loads(line) for line in request.read().splitlines()]
    header = header["value"]
    ref = revision if revision.startswith("refs/pr/") else f"refs/heads/{revision}"
    answer = {"success": True}
    with found.lock:
        files = found.changed(ref, operations, header.get("parentCommit"))
        if "create_pr" in request.query:
            number = found.open_discussion(header["summary"], request.user, revision)["num"]
            ref, answer["pullRequestUrl"] = f"refs/pr/{number}", f"{address(hub, found)}/discussions/{number}"
        commit_id = found.write_commit(ref, files, header["summary"], header["description"], request.user)
    return Answer(answer | {"commitOid": commit_id, "commitUrl": f"{address(hub, found)}/commit/{commit_id}"})


@route("POST", "/api/{kind}/{repo}/discussions")
def open_discussion(hub: LocalHub, request: Request, kind: str, repo: str) -> Answer:
    found, body = find(hub, request, kind, repo), request.json()
    require_write(hub, request, request.user)
    base = "main" if body.get("pullRequest") else None
    return Answer({"num": found.open_discussion(body["title"], request.user, base)["num"]})


@route("GET", "/api/{kind}/{repo}/discussions")
def discussions(hub: LocalHub, request: Request, kind: str, repo: str) -> Answer:
    found = find(hub, request, kind, repo)
    listed = [describe(found, discussion) for discussion in found.state["discussions"]]
    return Answer({"count": len(listed), "start": 0, "discussions": listed})


@route("GET", "/api/{kind}/{repo}/discussions/{number}")
def discussion(hub: LocalHub, request: Request, kind: str, repo: str, number: str) -> Answer:
    found = find(hub, request, kind, repo)
    return Answer(describe(found, found.state["discussions"][int(number) - 1]))


def describe(repo: Repo, discussion: dict) -> dict:
    return {
        "num": discussion["num"],
        "title": discussion["title"],
        "author": {"name": discussion["author"]},
        "status": discussion["status"],
        "createdAt": repo.history("main")[-1][1]["date"],
        "repo": {"name": repo.id, "type": repo.kind.removesuffix("s")},
        "isPullRequest": discussion["base"] is not None,
        "changes": {"base": f"refs/heads/{discussion['base']}"},
        "filesWithConflicts": [],
        "events": [],
    }


@route("POST", "/api/{kind}/{repo}/discussions/{number}/merge")
def merge(hub: LocalHub, request: Request, kind: str, repo: str, number: str) -> Answer:
    find(hub, request, kind, repo, "write").merge(int(number), request.user)
    return Answer({})


# Where LFS content goes to and comes from: signed addresses instead of tokens.


def signed(hub: LocalHub, repo: Repo, name: str) -> str:
    path = f"/lfs/{repo.kind}/{repo.id}/{name}"
    return f"{hub.storage_url}{path}?signature={hash_of([hub.secret, path])}"


def lfs_repo(hub: LocalHub, request: Request, kind: str, repo: str) -> Repo:
    if request.query.get("signature") != hash_of([hub.secret, request.path]):
        raise HubError(403, "the address is not signed")
    if "authorization" in request.headers:
        raise HubError(400, "a signed address takes no token")
    return hub.storage.get(kind, repo)


@route("GET", "/lfs/{kind}/{repo}/{name}")
def lfs_download(hub: LocalHub, request: Request, kind: str, repo: str, name: str) -> Answer:
    return Answer(lfs_repo(hub, request, kind, repo).blob(name), headers={"ETag": f'"{name}"'})


@route("PUT", "/lfs/{kind}/{repo}/{name}")
def lfs_upload(hub: LocalHub, request: Request, kind: str, repo: str, name: str) -> Answer:
    found = lfs_repo(hub, request, kind, repo)
    if ".part" in name:
        content = request.read()
        found.blob(name).write_bytes(content)
        return Answer(b"", headers={"ETag": f'"{hash_of(len(content))}"'})
    found.receive(request.body, name)
    return Answer(b"")


@route("POST", "/lfs/{kind}/{repo}/{name}")
def lfs_complete(hub: LocalHub, request: Request, kind: str, repo: str, name: str) -> Answer:
    found = lfs_repo(hub, request, kind, repo)
    parts = [found.blob(f"{name}.part{part['partNumber']}") for part in request.json()["parts"]]
    found.receive((path.read_bytes() for path in parts), name)
    for path in parts:
        path.unlink()
    return Answer({})


def hash_of(value) -> str:
    return hashlib.sha1(json.dumps(value).encode()).hexdigest()


def last_change(repo: Repo, revision: str, path: str) -> dict:
    """The newest commit that changed a file, or a file in a folder."""

    def state(files: dict) -> dict:
        return {name: file for name, file in files.items() if name == path or name.startswith(path + "/")}

    history = repo.history(revision)
    for (commit_id, commit), (_, before) in zip(history, [*history[1:], (None, {"files": {}})]):
        if state(commit["files"]) != state(before["files"]):
            return {"id": commit_id, "title": commit["summary"], "date": commit["date"]}
    raise KeyError(path)
