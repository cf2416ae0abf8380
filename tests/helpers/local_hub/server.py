"""The server that a test starts, tells what to fail at, and looks into."""

import hashlib
import json
import re
import secrets
import threading
from collections.abc import Iterator
from fnmatch import fnmatchcase
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote

from huggingface_hub import HfApi

from .failures import Failure, Failures
from .messages import Answer, Request
from .routes import ROUTES
from .storage import HubError, Repo, Storage

CHUNK = 1 << 16


class Cut(Exception):
    """The connection is to be closed at once."""


class LocalHub:
    """A running Hub.

    Args:
        root: folder of its repos.
        user: the name of the user that tokens are for, unless said otherwise.
        organizations: members of each organization.

    Attributes:
        url: the endpoint.
        storage_url: where LFS content is sent to and comes from, an origin of its own as on the Hub.
        requests: what was received, in order.
        errors: mistakes of this server, which it answers with 500.
        page_size: entries on one page of a tree.
        part_size: bytes; larger LFS files are sent in parts of this size.
    """

    def __init__(self, root: Path, user: str = "tester", organizations: dict[str, set[str]] | None = None):
        self.storage, self.failures = Storage(root), Failures()
        self.root, self.user = root, user
        self.organizations = organizations if organizations is not None else {"org": {user}}
        self.tokens: dict[str, tuple[str, str]] = {}
        self.requests: list[Request] = []
        self.errors: list[Exception] = []
        self.page_size, self.part_size = 1000, 8 << 20
        self.secret = secrets.token_hex()
        self.servers = []
        for _ in range(2):
            server = ThreadingHTTPServer(("127.0.0.1", 0), type("Connection", (Handler,), {"hub": self}))
            server.daemon_threads = True
            threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
            self.servers.append(server)
        self.url, self.storage_url = (f"http://127.0.0.1:{server.server_address[1]}" for server in self.servers)

    def close(self) -> None:
        for server in self.servers:
            server.shutdown()
            server.server_close()

    # What a test does with it.

    def token(self, scope: str = "write", user: str | None = None) -> str:
        """A new token of scope `read` or `write`."""
        token = "hf_" + secrets.token_hex(17)
        self.tokens[token] = (user or self.user, scope)
        return token

    def api(self, scope: str | None = "write", user: str | None = None) -> HfApi:
        """A client with such a token, or with none for the scope `None`."""
        return HfApi(endpoint=self.url, token=self.token(scope, user) if scope else False)

    def environment(self, home: Path, token: str | None = None) -> dict[str, str]:
        """Environment variables that connect the clients of a process, with their caches in the folder `home`."""
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
        """Makes a repo with these files (content, or a file to take it from), without a request."""
        repo = self.storage.create(f"{repo_type}s", repo_id, self.user, private, sdk)
        repo.state["gated"] = gated
        repo.save()
        self.commit(repo_id, files or {}, repo_type)
        return repo

    def commit(self, repo_id: str, files: dict[str, bytes | str | Path], repo_type: str = "model") -> str:
        """Commits to `main` without a request; returns the id of the commit."""
        repo = self.repo(repo_id, repo_type)
        tree = dict(repo.files("main"))
        for path, content in files.items():
            content = content.read_bytes() if isinstance(content, Path) else content
            content = content.encode() if isinstance(content, str) else content
            if repo.upload_mode(path, len(content), content[:512], "main") == "lfs":
                sha256 = hashlib.sha256(content).hexdigest()
                repo.receive([content], sha256)
                tree[path] = repo.lfs_file(sha256)
            else:
                tree[path] = repo.store(content)
        return repo.write_commit("refs/heads/main", tree, "files", "", self.user)

    def repo(self, repo_id: str, repo_type: str = "model") -> Repo:
        return self.storage.get(f"{repo_type}s", repo_id)

    def files(self, repo_id: str, revision: str = "main", repo_type: str = "model") -> dict[str, bytes]:
        """Paths and contents of a revision."""
        repo = self.repo(repo_id, repo_type)
        return {path: repo.content(path, revision) for path in repo.files(revision)}

    def fail(self, method: str, path: str, status: int | None = None, **options) -> Failure:
        """The next requests of this kind fail; see [`Failure`]."""
        return self.failures.add(Failure(method, path, status, **options))

    def received(self, method: str, path: str) -> list[Request]:
        """The requests with this method, and a path that matches the pattern."""
        return [one for one in self.requests if one.method == method and fnmatchcase(one.path, path)]


class Handler(BaseHTTPRequestHandler):
    """One connection; requests on it are answered one after the other."""

    hub: LocalHub
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def answer(self) -> None:
        path, _, query = self.path.partition("?")
        values = {name: found[-1] for name, found in parse_qs(query, keep_blank_values=True).items()}
        headers = {name.lower(): value for name, value in self.headers.items()}
        request = Request(self.command, unquote(path), values, headers, path)
        self.hub.requests.append(request)
        failure = self.hub.failures.take(request.method, request.path) or Failure("*", "*")
        request.body = self.body(request, failure.cut)
        try:
            threading.Event().wait(failure.delay)  # not `time.sleep`, which tests replace
            try:
                if failure.status is not None:
                    retry = {} if failure.retry_after is None else {"Retry-After": str(failure.retry_after)}
                    raise HubError(failure.status, failure.message, failure.code, **retry)
                self.authenticate(request)
                answer = self.dispatch(request)
            except HubError as error:
                named = {"X-Error-Message": str(error)} | ({"X-Error-Code": error.code} if error.code else {})
                answer = Answer({"error": str(error)}, error.status, {**error.headers, **named})
            request.read()  # what was left of the body, so that the next request begins where it ends
            if failure.lost:
                raise Cut
            request.status = answer.status
            self.send(request, answer, None if request.received else failure.cut)
        except (Cut, ConnectionError):
            request.status, self.close_connection = None, True

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = answer

    def body(self, request: Request, cut: int | None) -> Iterator[bytes]:
        for chunk in self.chunks():
            request.received += len(chunk)
            if cut is not None and request.received >= cut:
                raise Cut
            yield chunk

    def chunks(self) -> Iterator[bytes]:
        if self.headers.get("Transfer-Encoding") == "chunked":
            while size := int(self.rfile.readline(), 16):
                yield self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return
        left = int(self.headers.get("Content-Length") or 0)
        while left > 0:
            chunk = self.rfile.read(min(left, CHUNK))
            if not chunk:
                raise Cut
            left -= len(chunk)
            yield chunk

    def authenticate(self, request: Request) -> None:
        token = request.headers.get("authorization", "").removeprefix("Bearer ")
        if token and not request.path.startswith("/lfs/"):
            if token not in self.hub.tokens:
                raise HubError(401, "Invalid credentials in Authorization header")
            request.user, request.scope = self.hub.tokens[token]

    def dispatch(self, request: Request) -> Answer:
        method = "GET" if request.method == "HEAD" else request.method
        for wanted, regex, function in ROUTES:
            found = regex.fullmatch(request.address) if wanted == method else None
            if found:
                arguments = {name: value and unquote(value) for name, value in found.groupdict().items()}
                try:
                    return function(self.hub, request, **arguments)
                except (HubError, Cut, ConnectionError):
                    raise
                except Exception as error:
                    self.hub.errors.append(error)
                    raise HubError(500, f"{type(error).__name__}: {error}") from error
        raise HubError(404, f"this server does not have {request.method} {request.path}")

    def send(self, request: Request, answer: Answer, cut: int | None) -> None:
        content, headers = answer.content, dict(answer.headers)
        if isinstance(content, Path):
            size = content.stat().st_size
            start, stop = 0, size
            if found := re.fullmatch(r"bytes=(\d*)-(\d*)", request.headers.get("range", "")):
                first, last = found.groups()
                start = int(first) if first else max(size - int(last), 0)
                stop = min(int(last) + 1, size) if first and last else size
                answer.status, headers["Content-Range"] = 206, f"bytes {start}-{stop - 1}/{size}"
                if start >= stop:
                    answer.status, start, stop, headers["Content-Range"] = 416, 0, 0, f"bytes */{size}"
            with content.open("rb") as file:
                file.seek(start)
                content = file.read(stop - start)
        elif not isinstance(content, bytes):
            content = json.dumps(content).encode()
            headers["Content-Type"] = "application/json"
        request.status = answer.status
        self.send_response(answer.status)
        for name, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        if request.method != "HEAD":
            self.wfile.write(content if cut is None else content[:cut])
            if cut is not None and cut < len(content):
                raise Cut

    def log_message(self, *_) -> None:
        pass
