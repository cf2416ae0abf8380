"""Repos on disk.

A repo is a folder: `repo.json` (settings, refs and discussions), `commits/ID.json` (a commit and all its files) and
`blobs/` (content by its hash: git's SHA-1 of regular files, SHA-256 of LFS files). Blobs and commits are never changed,
and `repo.json` is replaced whole, so a repo is never seen half-written.
"""

import base64
import hashlib
import json
import os
import shutil
import threading
import uuid
from collections.abc import Iterable
from datetime import datetime, timedelta, timezone
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

# What a new repo says is large, beside all files above `LFS_THRESHOLD` and those that hold a zero byte.
LFS_SUFFIXES = {
    "models": "7z arrow bin bz2 ckpt ftz gz h5 joblib model msgpack npy npz onnx ot parquet pb pickle pkl pt pth rar "
    "safetensors tar tflite tgz wasm xz zip zst",
    "datasets": "7z arrow avi bin bz2 gif gz h5 jpeg jpg mp3 mp4 npy npz parquet pickle pkl png pt rar safetensors "
    "tar tgz tif tiff wav webp xz zip zst",
}
LFS_SUFFIXES["spaces"] = LFS_SUFFIXES["models"]
LFS_THRESHOLD = 10_000_000


class HubError(Exception):
    """An answer other than success: status, message, and the code that the client makes an exception of."""

    def __init__(self, status: int, message: str, code: str | None = None, **headers: str):
        super().__init__(message)
        self.status, self.code, self.headers = status, code, headers


def git_hash(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def matches(path: str, patterns: list[str]) -> bool:
    """Whether one of some patterns, as in `.gitattributes` and `.gitignore`, is for this path."""
    return any(
        fnmatch(path, pattern.strip("/")) or ("/" not in pattern and fnmatch(Path(path).name, pattern))
        for pattern in patterns
    )


class Repo:
    """One repo; `self.state` is what `repo.json` holds."""

    def __init__(self, folder: Path, kind: str, repo_id: str):
        self.folder, self.kind, self.id = folder, kind, repo_id
        self.lock, self.commits = threading.RLock(), {}
        (folder / "commits").mkdir(parents=True, exist_ok=True)
        (folder / "blobs").mkdir(exist_ok=True)
        path = folder / "repo.json"
        self.state: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}

    @property
    def namespace(self) -> str:
        return self.id.split("/")[0]

    @property
    def refs(self) -> dict[str, str]:
        """The commit of each ref: `refs/heads/NAME`, `refs/tags/NAME`, `refs/pr/NUMBER`."""
        return self.state["refs"]

    def save(self) -> None:
        path = self.folder / f"repo.{uuid.uuid4().hex}"
        path.write_text(json.dumps(self.state, indent=1))
        os.replace(path, self.folder / "repo.json")

    def commit_of(self, revision: str) -> str:
        """The id of the commit that a branch, tag, full ref or (shortened) commit id names."""
        for ref in (f"refs/heads/{revision}", f"refs/tags/{revision}", revision):
            if ref in self.refs:
                return self.refs[ref]
        if len(revision) >= 7 and all(letter in "0123456789abcdef" for letter in revision):
            for path in (self.folder / "commits").glob(f"{revision}*.json"):
                return path.stem
        raise HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")

    def commit(self, revision: str) -> dict:
        """`parent`, `summary`, `description`, `author`, `date` and the `files` of a revision."""
        commit_id = self.commit_of(revision)
        if commit_id not in self.commits:
            self.commits[commit_id] = json.loads((self.folder / "commits" / f"{commit_id}.json").read_text())
        return self.commits[commit_id]

    def history(self, revision: str) -> list[tuple[str, dict]]:
        """Ids and commits, the newest first."""
        found, commit_id = [], self.commit_of(revision)
        while commit_id is not None:
            found.append((commit_id, self.commit(commit_id)))
            commit_id = found[-1][1]["parent"]
        return found

    def files(self, revision: str) -> dict[str, dict]:
        """The files of a revision by path: `oid` (git's hash), `size` in bytes, and `sha256` for one in LFS."""
        return self.commit(revision)["files"]

    def blob(self, name: str) -> Path:
        return self.folder / "blobs" / name

    def content(self, path: str, revision: str = "main") -> bytes:
        file = self.files(revision)[path]
        return self.blob(file.get("sha256", file["oid"])).read_bytes()

    def upload_mode(self, path: str, size: int, sample: bytes, revision: str) -> str:
        """`lfs` or `regular`, for a file of which `sample` holds the first bytes."""
        attributes = self.content(".gitattributes", revision) if ".gitattributes" in self.files(revision) else b""
        lines = [line.split() for line in attributes.decode().splitlines() if "filter=lfs" in line]
        is_large = size > LFS_THRESHOLD or b"\0" in sample or matches(path, [line[0] for line in lines])
        return "lfs" if is_large and size else "regular"

    def store(self, content: bytes) -> dict:
        """Stores a regular file."""
        oid = git_hash(content)
        self.blob(oid).write_bytes(content)
        return {"oid": oid, "size": len(content)}

    def receive(self, chunks: Iterable[bytes], sha256: str) -> None:
        """Stores an LFS file, if its content has this hash."""
        digest, part = hashlib.sha256(), self.blob(f"{sha256}.{uuid.uuid4().hex}")
        try:
            with part.open("wb") as file:
                for chunk in chunks:
                    digest.update(chunk)
                    file.write(chunk)
            if digest.hexdigest() != sha256:
                raise HubError(400, f"the content received is not that of {sha256}")
            os.replace(part, self.blob(sha256))
        finally:
            part.unlink(missing_ok=True)

    def lfs_file(self, sha256: str) -> dict:
        """The entry of a file whose content is in LFS; git itself has a pointer to it."""
        if not self.blob(sha256).exists():
            raise HubError(400, f"LFS pointer pointed to a file that does not exist: {sha256}")
        size = self.blob(sha256).stat().st_size
        pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {size}\n".encode()
        return {"oid": git_hash(pointer), "size": size, "sha256": sha256, "pointer_size": len(pointer)}

    def write_commit(self, ref: str, files: dict, summary: str, description: str, author: str) -> str:
        """Moves a ref to a new commit with these files, unless they are what it has already; returns its commit."""
        parent = self.refs.get(ref)
        if parent is not None and self.files(parent) == files:
            return parent
        number = len(self.history(parent)) if parent else 0
        commit = {
            "parent": parent,
            "summary": summary,
            "description": description,
            "author": author,
            "date": f"{datetime(2026, 1, 1, tzinfo=timezone.utc) + timedelta(seconds=number):%Y-%m-%dT%H:%M:%S.000Z}",
            "files": dict(sorted(files.items())),
        }
        text = json.dumps(commit, indent=1)
        commit_id = hashlib.sha1(text.encode()).hexdigest()
        (self.folder / "commits" / f"{commit_id}.json").write_text(text)
        self.refs[ref] = commit_id
        self.save()
        return commit_id

    def changed(self, revision: str, operations: list[dict], parent: str | None) -> dict[str, dict]:
        """The files of a revision after the operations of a commit; `parent` is the commit that it has to be at."""
        head = self.commit_of(revision)
        if parent not in (None, head):
            raise HubError(412, "A commit has happened since. Please refresh and try again.")
        files = dict(self.files(head))
        for operation in operations:
            value, path = operation["value"], operation["value"]["path"]
            if operation["key"] == "file":
                files[path] = self.store(base64.b64decode(value["content"]))
            elif operation["key"] == "lfsFile":
                files[path] = self.lfs_file(value["oid"])
            else:
                is_folder, prefix = operation["key"] == "deletedFolder", f"{path.rstrip('/')}/"
                gone = [name for name in files if (name.startswith(prefix) if is_folder else name == path)]
                if not gone:
                    raise HubError(404, f"A file with this name doesn't exist: {path}", "EntryNotFound")
                for name in gone:
                    del files[name]
        return files

    def open_discussion(self, title: str, author: str, base: str | None) -> dict:
        """Opens a discussion, or, with the revision that it starts from, a pull request."""
        with self.lock:
            number = len(self.state["discussions"]) + 1
            discussion = {"num": number, "title": title, "author": author, "base": base, "status": "open"}
            if base is not None:
                discussion["start"] = self.refs[f"refs/pr/{number}"] = self.commit_of(base)
            self.state["discussions"].append(discussion)
            self.save()
            return discussion

    def merge(self, number: int, author: str) -> None:
        """Puts what a pull request changed onto its branch."""
        with self.lock:
            pull_request = self.state["discussions"][number - 1]
            before, after = self.files(pull_request["start"]), self.files(f"refs/pr/{number}")
            files = {
                path: file
                for path, file in self.files(pull_request["base"]).items()
                if path not in before or path in after
            }
            files |= {path: file for path, file in after.items() if before.get(path) != file}
            pull_request["status"] = "merged"
            ref = f"refs/heads/{pull_request['base']}"
            self.write_commit(ref, files, f"{pull_request['title']} (#{number})", "", author)
            self.save()


class Storage:
    """All repos, in `root/KIND/NAMESPACE/NAME`, where a kind is `models`, `datasets` or `spaces`."""

    def __init__(self, root: Path):
        self.root, self.lock = root, threading.RLock()
        self.repos: dict[tuple[str, str], Repo] = {}

    def get(self, kind: str, repo_id: str) -> Repo | None:
        with self.lock:
            folder = self.root / kind / repo_id
            if (kind, repo_id) not in self.repos and (folder / "repo.json").exists():
                self.repos[kind, repo_id] = Repo(folder, kind, repo_id)
            return self.repos.get((kind, repo_id))

    def create(self, kind: str, repo_id: str, author: str, private: bool = False, sdk: str | None = None) -> Repo:
        """Makes a repo, with a first commit as the Hub does."""
        with self.lock:
            if self.get(kind, repo_id) is not None:
                raise HubError(409, "You already created this repo")
            repo = Repo(self.root / kind / repo_id, kind, repo_id)
            repo.state = {"private": private, "gated": False, "granted": [], "sdk": sdk, "refs": {}, "discussions": []}
            lines = [f"*.{suffix} filter=lfs diff=lfs merge=lfs -text\n" for suffix in LFS_SUFFIXES[kind].split()]
            files = {".gitattributes": repo.store("".join(lines).encode())}
            repo.write_commit("refs/heads/main", files, "initial commit", "", author)
            self.repos[kind, repo_id] = repo
            return repo

    def delete(self, repo: Repo) -> None:
        with self.lock:
            del self.repos[repo.kind, repo.id]
            shutil.rmtree(repo.folder)

    def move(self, repo: Repo, repo_id: str) -> None:
        with self.lock:
            if self.get(repo.kind, repo_id) is not None:
                raise HubError(409, f"{repo_id} already exists")
            target = self.root / repo.kind / repo_id
            target.parent.mkdir(parents=True, exist_ok=True)
            os.rename(repo.folder, target)
            del self.repos[repo.kind, repo.id]
