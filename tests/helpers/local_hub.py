"""Local server with the Hub's HTTP API, for tests.

The unmodified clients `huggingface_hub`, `transformers` and `datasets` use it. [`LocalHub.environment`] returns the
environment of a process, and the fixture `hub` connects the clients of the test's own process.

The server implements the requests for sharing and loading: `whoami`; repos of models, data sets and Spaces; branches,
pull requests, commits; `tree`, `paths-info`, `resolve` with ranges and ETags; `preupload`, LFS (basic transfer) and
`commit`; the check of a card's metadata. Access depends on tokens of read and write scope and on private and gated
repos. Tests can request failures.

Differences to the Hub: repos are in memory; Xet is not supported, so clients need `HF_HUB_DISABLE_XET=1`; the id of a
commit is a hash of its content and history, so that the same pushes give the same ids; a commit without changes is not
created.
"""

import base64
import hashlib
import json
import re
import secrets
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote

import yaml
from huggingface_hub import HfApi
from huggingface_hub.repocard_data import model_index_to_eval_results

LFS_SUFFIXES = set(".bin .parquet .pt .safetensors .tar .zip .png .jpg .jpeg .tif .tiff .gz .npy .arrow".split())
LFS_THRESHOLD = 10_000_000
LICENSES = set("apache-2.0 cc-by-4.0 cc-by-nc-4.0 cc0-1.0 gpl-3.0 mit other unknown".split())
STRINGS = ("library_name", "pipeline_tag", "license_name", "license_link", "title", "emoji")
LISTS = ("datasets", "metrics", "tags", "base_model", "license")
REPO_ID = re.compile(r"[\w][\w.-]*(/[\w.-]+)?")


class HubError(Exception):
    """Error answer with status, message, and the code that the client converts to an exception."""

    def __init__(self, status: int, message: str, code: str | None = None):
        super().__init__(message)
        self.status, self.code = status, code


class ConnectionCut(Exception):
    """Exception that closes the connection at once."""


@dataclass
class Request:
    """Received request."""

    method: str
    path: str
    query: dict[str, str]
    headers: dict[str, str]
    user: str | None = None
    scope: str | None = None
    status: int | None = None  # None if the connection was cut
    body: bytes = field(default=b"", repr=False)

    def json(self) -> dict:
        return json.loads(self.body or b"{}")


@dataclass
class Failure:
    """Failure requested by a test.

    Args:
        method: HTTP method, or `*`.
        path: pattern of the path without the query, as in `fnmatch`.
        status: status of the answer; the request is not carried out.
        times: number of requests that fail; `None` for all.
        after: number of requests that pass before.
        code, message: `X-Error-Code` and `X-Error-Message` of the answer.
        retry_after: seconds in the header `Retry-After`.
        cut: number of bytes of the body, of the request or else of the answer, before the connection closes.
        lost: whether the request is carried out and the connection closes before the answer.
        delay: seconds until the answer.
    """

    method: str
    path: str
    status: int | None = None
    times: int | None = 1
    after: int = 0
    code: str | None = None
    message: str = "as the test wants it"
    retry_after: int | None = None
    cut: int | None = None
    lost: bool = False
    delay: float = 0.0
    count: int = field(default=0, init=False)  # requests that failed so far


@dataclass
class Repo:
    """Repo with `refs` by full name, commits by id, contents by hash (git's for regular files, SHA-256 for LFS)."""

    kind: str
    id: str
    state: dict[str, Any]
    refs: dict[str, str] = field(default_factory=dict)
    commits: dict[str, dict] = field(default_factory=dict)
    blobs: dict[str, bytes] = field(default_factory=dict)

    def commit_of(self, revision: str) -> str:
        """Return the id of the commit that a branch, full ref or commit id names."""
        for ref in (f"refs/heads/{revision}", revision):
            if ref in self.refs:
                return self.refs[ref]
        if revision in self.commits:
            return revision
        raise HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")

    def files(self, revision: str) -> dict[str, dict]:
        """Return the files by path: `oid` (git's hash), `size` in bytes, and `sha256` if in LFS."""
        return self.commits[self.commit_of(revision)]["files"]

    def content(self, path: str, revision: str = "main") -> bytes:
        file = self.files(revision)[path]
        return self.blobs[file.get("sha256", file["oid"])]

    def history(self, revision: str) -> list[tuple[str, dict]]:
        """Return ids and commits, the newest first."""
        found, commit_id = [], self.commit_of(revision)
        while commit_id is not None:
            found.append((commit_id, self.commits[commit_id]))
            commit_id = self.commits[commit_id]["parent"]
        return found

    def store(self, content: bytes) -> dict:
        """Store a regular file and return its entry."""
        oid = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
        self.blobs[oid] = content
        return {"oid": oid, "size": len(content)}

    def lfs_file(self, sha256: str) -> dict:
        """Return the entry of an LFS file that was received."""
        if sha256 not in self.blobs:
            raise HubError(400, f"LFS pointer pointed to a file that does not exist: {sha256}")
        return {"oid": sha256[:40], "size": len(self.blobs[sha256]), "sha256": sha256}

    def write_commit(self, ref: str, files: dict, summary: str) -> str:
        """Move a ref to a new commit with these files, unless it has them already; return its commit."""
        parent = self.refs.get(ref)
        if parent is not None and self.files(parent) == files:
            return parent
        commit = {"parent": parent, "summary": summary, "files": dict(sorted(files.items()))}
        commit_id = hashlib.sha1(json.dumps(commit).encode()).hexdigest()
        self.commits[commit_id], self.refs[ref] = commit, commit_id
        return commit_id


def is_large(path: str, size: int, sample: bytes) -> bool:
    return size > LFS_THRESHOLD or (size > 0 and (b"\0" in sample or Path(path).suffix in LFS_SUFFIXES))


def front_matter(content: str) -> dict | None:
    """Return the metadata of a card, or `None`; raise a `ValueError` if it is not a YAML mapping."""
    found = re.match(r"\s*---[ \t]*\r?\n(.*?)\r?\n?---[ \t]*(\r?\n|$)", content, re.DOTALL)
    if found is None:
        return None
    try:
        metadata = yaml.safe_load(found[1])
    except yaml.YAMLError as error:
        raise ValueError(f"the metadata must be YAML: {error}") from error
    if not isinstance(metadata, dict | None):
        raise ValueError("the metadata must be a mapping")
    return metadata


def card_errors(content: str, repo_type: str) -> list[str]:
    """Return what the Hub would not accept in a card, by the rules that concern cards like ours."""
    try:
        metadata = front_matter(content) or {}
    except ValueError as error:
        return [str(error)]
    errors = [f'"{key}" must be a string' for key in STRINGS if not isinstance(metadata.get(key, ""), str)]
    values = {}
    for key in LISTS:
        values[key] = metadata.get(key, [])
        values[key] = values[key] if isinstance(values[key], list) else [values[key]]
        if not all(isinstance(item, str) for item in values[key]):
            return [*errors, f'"{key}" must be a string or a list of strings']
    errors += [f'"license" must not be {value!r}' for value in values["license"] if value not in LICENSES]
    for key in ("base_model", "datasets"):
        errors += [f'"{key}" has no id, but {value!r}' for value in values[key] if not REPO_ID.fullmatch(value)]
    if "model-index" in metadata:
        try:
            model_index_to_eval_results(metadata["model-index"])
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            errors.append(f'"model-index" is not valid: {error!r}')
    if repo_type == "space" and metadata.get("sdk") not in ("gradio", "docker", "static"):
        errors.append('"sdk" must be gradio, docker or static')
    return errors


class LocalHub:
    """Running local Hub.

    Attributes:
        url: endpoint of the Hub.
        storage_url: endpoint of LFS content, a separate origin that receives no token.
        user: default user of tokens.
        organizations: members of each organization.
        requests: requests that were received, in order.
        failures: requested failures; a request takes the first one that matches.
        errors: errors of this server, which are answered with 500.
    """

    def __init__(self, user: str = "tester"):
        self.user, self.organizations = user, {"org": {user}}
        self.repos: dict[tuple[str, str], Repo] = {}
        self.tokens: dict[str, tuple[str, str]] = {}
        self.requests: list[Request] = []
        self.failures: list[Failure] = []
        self.errors: list[Exception] = []
        self.lock = threading.RLock()
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), type("Connection", (Handler,), {"hub": self}))
        self.server.daemon_threads = True
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()
        self.url, self.storage_url = (f"http://{host}:{self.server.server_port}" for host in ("127.0.0.1", "localhost"))

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()

    # For tests.

    def token(self, scope: str = "write", user: str | None = None) -> str:
        """Return a new token of scope `read` or `write`."""
        token = "hf_" + secrets.token_hex(17)
        self.tokens[token] = (user or self.user, scope)
        return token

    def api(self, scope: str | None = "write", user: str | None = None) -> HfApi:
        """Return a client with such a token, or with none for the scope `None`."""
        return HfApi(endpoint=self.url, token=self.token(scope, user) if scope else False)

    def environment(self, home: Path, token: str | None = None) -> dict[str, str]:
        """Return environment variables that connect the clients of a process, with caches in the folder `home`."""
        connection = {"HF_ENDPOINT": self.url, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1"}
        connection |= {"HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_UPDATE_CHECK": "1"}
        return connection | ({"HF_TOKEN": token} if token else {})

    def create(
        self,
        repo_id: str,
        files: dict[str, bytes | str | Path] | None = None,
        repo_type: str = "model",
        private: bool = False,
        gated: str | bool = False,
        sdk: str | None = None,
    ) -> Repo:
        """Make a repo with these files (content, or a file to take it from), without a request."""
        kind = f"{repo_type}s"
        if (kind, repo_id) in self.repos:
            raise HubError(409, "You already created this repo")
        state = {"private": private, "gated": gated, "sdk": sdk, "variables": {}, "discussions": []}
        repo = self.repos[kind, repo_id] = Repo(kind, repo_id, state)
        repo.write_commit("refs/heads/main", {".gitattributes": repo.store(b"*.safetensors filter=lfs\n")}, "initial")
        self.commit(repo_id, files or {}, repo_type)
        return repo

    def commit(self, repo_id: str, files: dict[str, bytes | str | Path], repo_type: str = "model") -> str:
        """Commit to `main` without a request; return the id of the commit."""
        repo = self.repo(repo_id, repo_type)
        tree = dict(repo.files("main"))
        for path, content in files.items():
            content = content.read_bytes() if isinstance(content, Path) else content
            content = content.encode() if isinstance(content, str) else content
            if is_large(path, len(content), content[:512]):
                sha256 = hashlib.sha256(content).hexdigest()
                repo.blobs[sha256] = content
                tree[path] = repo.lfs_file(sha256)
            else:
                tree[path] = repo.store(content)
        return repo.write_commit("refs/heads/main", tree, "files")

    def repo(self, repo_id: str, repo_type: str = "model") -> Repo | None:
        return self.repos.get((f"{repo_type}s", repo_id))

    def files(self, repo_id: str, revision: str = "main", repo_type: str = "model") -> dict[str, bytes]:
        """Return paths and contents of a revision."""
        repo = self.repo(repo_id, repo_type)
        return {path: repo.content(path, revision) for path in repo.files(revision)}

    def fail(self, method: str, path: str, status: int | None = None, **options) -> Failure:
        """Let the next requests of this kind fail; see [`Failure`]."""
        self.failures.append(Failure(method, path, status, **options))
        return self.failures[-1]

    def received(self, method: str, path: str) -> list[Request]:
        """Return the requests with this method, and a path that matches the pattern."""
        return [one for one in self.requests if one.method == method and fnmatchcase(one.path, path)]

    # For the server.

    def take_failure(self, method: str, path: str) -> Failure:
        with self.lock:
            for failure in self.failures:
                if failure.method in ("*", method) and fnmatchcase(path, failure.path):
                    if failure.after > 0:
                        failure.after -= 1
                    elif failure.times is None or failure.count < failure.times:
                        failure.count += 1
                        return failure
        return Failure("*", "*")

    def is_member(self, user: str | None, namespace: str) -> bool:
        return user is not None and (user == namespace or user in self.organizations.get(namespace, ()))

    def require_write(self, request: Request, namespace: str) -> None:
        if request.user is None:
            raise HubError(401, "Invalid username or password.")
        if request.scope != "write" or not self.is_member(request.user, namespace):
            raise HubError(403, f"Forbidden: this token may not write to {namespace}")

    def find(self, request: Request, kind: str | None, repo_id: str, need: str = "read") -> Repo:
        """Return the repo, if this request may `read` its content, see its `info` only, or `write`."""
        kind = kind or "models"
        repo = self.repos.get((kind, repo_id))
        belongs = self.is_member(request.user, repo_id.split("/")[0])
        if repo is None or (repo.state["private"] and not belongs):
            raise HubError(401 if request.user is None else 404, "Repository not found", "RepoNotFound")
        if need == "write":
            self.require_write(request, repo_id.split("/")[0])
        elif need == "read" and repo.state["gated"] and not belongs:
            raise HubError(401 if request.user is None else 403, f"Access to {repo_id} is restricted.", "GatedRepo")
        return repo

    def address(self, repo: Repo) -> str:
        return self.url + ("/" if repo.kind == "models" else f"/{repo.kind}/") + repo.id


class Handler(BaseHTTPRequestHandler):
    """Handler of a connection, which answers its requests in order."""

    hub: LocalHub
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def answer(self) -> None:
        path, _, query = self.path.partition("?")
        values = {name: found[-1] for name, found in parse_qs(query, keep_blank_values=True).items()}
        headers = {name.lower(): value for name, value in self.headers.items()}
        request = Request(self.command, unquote(path), values, headers)
        self.hub.requests.append(request)
        failure, answer_headers = self.hub.take_failure(request.method, request.path), {}
        try:
            request.body = self.read_body(failure.cut)
            threading.Event().wait(failure.delay)  # not `time.sleep`, which tests replace
            try:
                if failure.status is not None:
                    if failure.retry_after is not None:
                        answer_headers["Retry-After"] = str(failure.retry_after)
                    raise HubError(failure.status, failure.message, failure.code)
                status, content, answer_headers = self.dispatch(request)
            except HubError as error:
                status, content = error.status, {"error": str(error)}
                answer_headers["X-Error-Message"] = str(error)
                if error.code:
                    answer_headers["X-Error-Code"] = error.code
            if failure.lost:
                raise ConnectionCut
            self.send(request, status, content, answer_headers, None if request.body else failure.cut)
        except (ConnectionCut, ConnectionError):
            request.status, self.close_connection = None, True
        request.body = b""

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = answer

    def read_body(self, cut: int | None) -> bytes:
        chunks = []
        if self.headers.get("Transfer-Encoding") == "chunked":
            while size := int(self.rfile.readline(), 16):
                chunks.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
        elif length := int(self.headers.get("Content-Length") or 0):
            chunks.append(self.rfile.read(length if cut is None else min(cut, length)))
            if len(chunks[0]) < length:
                raise ConnectionCut
        body = b"".join(chunks)
        if body and cut is not None:
            raise ConnectionCut
        return body

    def dispatch(self, request: Request) -> tuple[int, Any, dict[str, str]]:
        token = request.headers.get("authorization", "").removeprefix("Bearer ")
        if token and request.path.startswith("/lfs/"):
            raise HubError(400, "the storage takes no token")
        if token:
            if token not in self.hub.tokens:
                raise HubError(401, "Invalid credentials in Authorization header")
            request.user, request.scope = self.hub.tokens[token]
        method = "GET" if request.method == "HEAD" else request.method
        for wanted, regex, function in ROUTES:
            found = regex.fullmatch(request.path) if wanted == method else None
            if found:
                try:
                    with self.hub.lock:
                        answer = function(self.hub, request, **found.groupdict())
                except HubError:
                    raise
                except Exception as error:
                    self.hub.errors.append(error)
                    raise HubError(500, repr(error)) from error
                return answer if isinstance(answer, tuple) else (200, answer, {})
        raise HubError(404, f"no route for {request.method} {request.path}")

    def send(self, request: Request, status: int, content: Any, headers: dict[str, str], cut: int | None) -> None:
        headers = dict(headers)
        if not isinstance(content, bytes):
            content, headers["Content-Type"] = json.dumps(content).encode(), "application/json"
        elif status == 200 and (found := re.fullmatch(r"bytes=(\d*)-(\d*)", request.headers.get("range", ""))):
            first, last, size = *found.groups(), len(content)
            start = int(first) if first else max(size - int(last), 0)
            stop = min(int(last) + 1, size) if first and last else size
            status, headers["Content-Range"] = 206, f"bytes {start}-{stop - 1}/{size}"
            if start >= stop:
                status, start, stop, headers["Content-Range"] = 416, 0, 0, f"bytes */{size}"
            content = content[start:stop]
        request.status = status
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        if request.method != "HEAD":
            self.wfile.write(content if cut is None else content[:cut])
            if cut is not None and cut < len(content):
                raise ConnectionCut

    def log_message(self, *_) -> None:
        pass


ROUTES: list[tuple[str, re.Pattern, Callable]] = []
GROUPS = {
    "kind": r"(?P<kind>models|datasets|spaces)",
    "kind/": r"(?:(?P<kind>datasets|spaces)/)?",  # models have no prefix in the addresses of files
    "repo": r"(?P<repo>[^/]+(?:/[^/]+)?)",
    "path": r"(?P<path>.+)",
}


def route(method: str, pattern: str) -> Callable:
    """Register a function for a path. `{name}` is a segment that is passed as an argument; GET also serves HEAD.

    The function returns the content (JSON, or bytes), or status, content and headers.
    """
    regex = re.sub(r"\{([\w/]+)\}", lambda group: GROUPS.get(group[1], rf"(?P<{group[1]}>[^/]+)"), pattern)

    def register(function: Callable) -> Callable:
        ROUTES.append((method, re.compile(regex), function))
        return function

    return register


@route("GET", "/api/whoami-v2")
def whoami(hub, request):
    if request.user is None:
        raise HubError(401, "Invalid username or password.")
    orgs = [{"type": "org", "name": name} for name, members in hub.organizations.items() if request.user in members]
    access = {"displayName": "test", "role": request.scope}
    return {"type": "user", "name": request.user, "orgs": orgs, "auth": {"type": "access_token", "accessToken": access}}


@route("POST", "/api/validate-yaml")
def validate_yaml(hub, request):
    errors = card_errors(request.json()["content"], request.json().get("repoType") or "model")
    return 400 if errors else 200, {"errors": [{"message": text} for text in errors], "warnings": []}, {}


@route("POST", "/api/repos/create")
def create_repo(hub, request):
    body = request.json()
    namespace = body.get("organization") or request.user
    hub.require_write(request, namespace)
    repo_type, repo_id = body.get("type") or "model", f"{namespace}/{body['name']}"
    try:
        repo = hub.create(repo_id, None, repo_type, body.get("visibility") == "private", sdk=body.get("sdk"))
    except HubError as error:
        return error.status, {"error": str(error), "url": hub.address(hub.repo(repo_id, repo_type))}, {}
    return {"url": hub.address(repo), "name": repo_id, "id": repo_id}


@route("POST", "/api/(?P<kind>spaces)/{repo}/variables")
def variables(hub, request, kind, repo):
    found, body = hub.find(request, kind, repo, "write").state["variables"], request.json()
    found[body["key"]] = body["value"]
    return {key: {"key": key, "value": value} for key, value in found.items()}


@route("GET", "/api/{kind}/{repo}(?:/revision/{revision})?")
def info(hub, request, kind, repo, revision):
    found = hub.find(request, kind, repo, "info")
    commit_id = found.commit_of(revision or "main")
    try:
        card = front_matter(found.content("README.md", commit_id).decode()) or {}
    except (KeyError, ValueError):
        card = {}
    date, tags = "2026-01-01T00:00:00.000Z", card.get("tags") or []
    details = {"id": repo, "author": repo.split("/")[0], "sha": commit_id, "createdAt": date, "lastModified": date}
    details |= {"private": found.state["private"], "gated": found.state["gated"], "disabled": False}
    details |= {"downloads": 0, "likes": 0, "tags": tags if isinstance(tags, list) else [tags], "cardData": card}
    details["siblings"] = [
        {"rfilename": path, "size": file["size"], "blobId": file["oid"]}
        | ({"lfs": {"sha256": file["sha256"], "size": file["size"], "pointerSize": 130}} if "sha256" in file else {})
        for path, file in found.files(commit_id).items()
    ]
    if kind == "models":
        details |= {"modelId": repo, "spaces": []}
        details |= {key: card[key] for key in ("library_name", "pipeline_tag", "model-index") if key in card}
    return details | ({"sdk": found.state["sdk"]} if kind == "spaces" else {})


def entry(repo: Repo, revision: str, path: str) -> dict | None:
    """Return what a tree says about a file or folder."""
    files = repo.files(revision)
    if path in files:
        file = files[path]
        found = {"type": "file", "path": path, "oid": file["oid"], "size": file["size"]}
        if "sha256" in file:
            found["lfs"] = {"oid": file["sha256"], "size": file["size"], "pointerSize": 130}
        return found
    if any(name.startswith(path + "/") for name in files):
        return {"type": "directory", "path": path, "oid": hashlib.sha1(path.encode()).hexdigest(), "size": 0}
    return None


@route("GET", "/api/{kind}/{repo}/tree/{revision}(?:/{path})?")
def tree(hub, request, kind, repo, revision, path):
    found = hub.find(request, kind, repo, "info")
    prefix = path.strip("/") + "/" if path else ""
    names = set()
    for name in found.files(revision):
        if name.startswith(prefix):
            parts = name.removeprefix(prefix).split("/")
            is_recursive = request.query.get("recursive", "").lower() == "true"
            depths = range(1, len(parts) + 1) if is_recursive else [1]
            names |= {prefix + "/".join(parts[:depth]) for depth in depths}
    if prefix and not names:
        raise HubError(404, f"{path} does not exist on {revision}", "EntryNotFound")
    return [entry(found, revision, name) for name in sorted(names)]


@route("POST", "/api/{kind}/{repo}/paths-info/{revision}")
def paths_info(hub, request, kind, repo, revision):
    found = hub.find(request, kind, repo, "info")
    paths = parse_qs(request.body.decode()).get("paths", [])
    return [item for path in paths if (item := entry(found, revision, path.rstrip("/"))) is not None]


@route("GET", "/{kind/}{repo}/resolve/{revision}/{path}")
def resolve(hub, request, kind, repo, revision, path):
    found = hub.find(request, kind, repo)
    commit_id = found.commit_of(revision)
    file = found.files(commit_id).get(path)
    if file is None:
        raise HubError(404, f"{path} does not exist on {revision}", "EntryNotFound")
    headers = {"X-Repo-Commit": commit_id, "Accept-Ranges": "bytes"}
    if "sha256" not in file:
        return 200, found.blobs[file["oid"]], {**headers, "ETag": f'"{file["oid"]}"'}
    headers |= {"X-Linked-Size": str(file["size"]), "X-Linked-Etag": f'"{file["sha256"]}"'}
    return 302, b"", {**headers, "Location": f"{hub.storage_url}/lfs/{found.kind}/{repo}/{file['sha256']}"}


@route("POST", "/api/{kind}/{repo}/branch/{branch}")
def create_branch(hub, request, kind, repo, branch):
    found, ref = hub.find(request, kind, repo, "write"), f"refs/heads/{branch}"
    if ref in found.refs:
        raise HubError(409, f"Reference already exists: {ref}")
    found.refs[ref] = found.commit_of(request.json().get("startingPoint", "main"))
    return {}


def find_to_commit(hub, request, kind, repo, revision) -> Repo:
    """Return the repo of a commit; who may read may also open a pull request and go on with it."""
    is_pull_request = "create_pr" in request.query or revision.startswith("refs/pr/")
    return hub.find(request, kind, repo, "read" if is_pull_request else "write")


@route("POST", "/api/{kind}/{repo}/preupload/{revision}")
def preupload(hub, request, kind, repo, revision):
    current, answers = find_to_commit(hub, request, kind, repo, revision).files(revision), []
    for file in request.json()["files"]:
        large = is_large(file["path"], file["size"], base64.b64decode(file["sample"]))
        answers.append({"path": file["path"], "uploadMode": "lfs" if large else "regular", "shouldIgnore": False})
        if file["path"] in current:
            answers[-1]["oid"] = current[file["path"]].get("sha256", current[file["path"]]["oid"])
    return {"files": answers}


@route("POST", "/{kind/}{repo}\\.git/info/lfs/objects/batch")
def lfs_batch(hub, request, kind, repo):
    found, objects = hub.find(request, kind, repo), []
    hub.require_write(request, request.user)
    for wanted in request.json()["objects"]:
        objects.append({"oid": wanted["oid"], "size": wanted["size"], "authenticated": True})
        if wanted["oid"] not in found.blobs:
            upload = {"href": f"{hub.storage_url}/lfs/{found.kind}/{repo}/{wanted['oid']}"}
            verify = {"href": f"{hub.address(found)}.git/info/lfs/objects/verify"}
            objects[-1]["actions"] = {"upload": upload, "verify": verify}
    return {"transfer": "basic", "objects": objects}


@route("POST", "/{kind/}{repo}\\.git/info/lfs/objects/verify")
def lfs_verify(hub, request, kind, repo):
    if hub.find(request, kind, repo).lfs_file(request.json()["oid"])["size"] != request.json()["size"]:
        raise HubError(400, "wrong size")
    return {}


@route("GET", "/lfs/{kind}/{repo}/{name}")
def lfs_download(hub, request, kind, repo, name):
    return 200, hub.repos[kind, repo].blobs[name], {"ETag": f'"{name}"'}


@route("PUT", "/lfs/{kind}/{repo}/{name}")
def lfs_upload(hub, request, kind, repo, name):
    if hashlib.sha256(request.body).hexdigest() != name:
        raise HubError(400, f"the content received is not that of {name}")
    hub.repos[kind, repo].blobs[name] = request.body
    return b""


@route("POST", "/api/{kind}/{repo}/commit/{revision}")
def commit_operations(hub, request, kind, repo, revision):
    found = find_to_commit(hub, request, kind, repo, revision)
    header, *operations = [json.loads(line) for line in request.body.splitlines()]
    header, files = header["value"], dict(found.files(revision))
    if header.get("parentCommit") not in (None, found.commit_of(revision)):
        raise HubError(412, "A commit has happened since. Please refresh and try again.")
    for operation in operations:
        value, path = operation["value"], operation["value"]["path"]
        if operation["key"] == "file":
            files[path] = found.store(base64.b64decode(value["content"]))
        elif operation["key"] == "lfsFile":
            files[path] = found.lfs_file(value["oid"])
        elif files.pop(path, None) is None:
            raise HubError(404, f"A file with this name doesn't exist: {path}", "EntryNotFound")
    ref, answer = revision if revision.startswith("refs/pr/") else f"refs/heads/{revision}", {"success": True}
    if "create_pr" in request.query:
        found.state["discussions"].append({"title": header["summary"]})
        number = len(found.state["discussions"])
        ref, answer["pullRequestUrl"] = f"refs/pr/{number}", f"{hub.address(found)}/discussions/{number}"
        found.refs[ref] = found.commit_of(revision)
    commit_id = found.write_commit(ref, files, header["summary"])
    return answer | {"commitOid": commit_id, "commitUrl": f"{hub.address(found)}/commit/{commit_id}"}
