"""The Hub of the tests, driven by the unmodified clients, and what these do when it fails."""

import hashlib
import json
import os
import subprocess
import sys
import time
import uuid
from pathlib import Path

import httpx2
import pytest
from datasets import Dataset, load_dataset
from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationCopy,
    CommitOperationDelete,
    HfFileSystem,
    ModelCard,
    SpaceCard,
)
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.hf_api import RepoFolder
from huggingface_hub.utils import disable_progress_bars
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

disable_progress_bars()

WEIGHTS = bytes(range(256)) * 40


@pytest.fixture
def folder(tmp_path):
    """A folder with two LFS files, a regular one and an empty one."""
    path = tmp_path / "upload"
    (path / "deep" / "er").mkdir(parents=True)
    (path / "model.safetensors").write_bytes(WEIGHTS)
    (path / "deep" / "er" / "second.safetensors").write_bytes(WEIGHTS[::-1])
    (path / "config.json").write_text('{"model_type": "bert"}')
    (path / "deep" / "empty.txt").touch()
    return path


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def in_repo(hub, *args, **kwargs) -> dict[str, bytes]:
    files = hub.files(*args, **kwargs)
    del files[".gitattributes"]
    return files


@pytest.mark.parametrize("repo_type", ["model", "dataset", "space"])
def test_a_repo_comes_into_being_is_described_and_goes(hub, folder, repo_type):
    api, repo = hub.api(), {"repo_id": "org/thing", "repo_type": repo_type}
    sdk = {"space_sdk": "gradio"} if repo_type == "space" else {}
    url = api.create_repo(**repo, **sdk)
    assert (url.repo_id, url.repo_type) == ("org/thing", repo_type) and url.startswith(hub.url)
    assert api.create_repo(**repo, **sdk, exist_ok=True) == url
    with pytest.raises(HfHubHTTPError, match="409"):
        api.create_repo(**repo, **sdk)

    (folder / "README.md").write_text("---\nlicense: mit\ntags: [a]\nsdk: gradio\n---\n# Card\n")
    commit = api.upload_folder(**repo, folder_path=folder, commit_message="all")
    assert commit.commit_url.startswith(url) and in_repo(hub, **repo) == contents(folder)
    info = api.repo_info(**repo, files_metadata=True)
    assert (info.sha, info.private, info.tags, info.card_data.license) == (commit.oid, False, ["a"], "mit")
    sizes = {sibling.rfilename: (sibling.size, sibling.lfs and sibling.lfs.sha256) for sibling in info.siblings}
    assert sizes["model.safetensors"] == (len(WEIGHTS), hashlib.sha256(WEIGHTS).hexdigest())
    assert sizes["config.json"] == (22, None)
    if repo_type == "model":
        assert info.config == {"model_type": "bert"}
    assert api.repo_exists(**repo) and api.file_exists(**repo, filename="config.json")
    assert not api.file_exists(**repo, filename="none.json") and not api.revision_exists(**repo, revision="none")
    assert contents(Path(api.snapshot_download(**repo))) == hub.files(**repo)

    api.move_repo("org/thing", "tester/moved", repo_type=repo_type)
    assert not api.repo_exists(**repo)
    assert api.list_repo_commits("tester/moved", repo_type=repo_type)[0].title == "all"
    api.delete_repo("tester/moved", repo_type=repo_type)
    api.delete_repo("tester/moved", repo_type=repo_type, missing_ok=True)
    with pytest.raises(RepositoryNotFoundError):
        api.delete_repo("tester/moved", repo_type=repo_type)


def test_trees(hub, folder):
    hub.page_size = 2
    hub.create("tester/m", contents(folder))
    api = hub.api(None)
    first = api.model_info("tester/m").sha
    second = hub.commit("tester/m", {"deep/er/second.safetensors": WEIGHTS + b"\0"})

    def paths(**options):
        return [item.path for item in api.list_repo_tree("tester/m", **options)]

    assert paths() == [".gitattributes", "config.json", "deep", "model.safetensors"]
    assert paths(path_in_repo="deep") == ["deep/empty.txt", "deep/er"]
    deep = ["deep/empty.txt", "deep/er", "deep/er/second.safetensors"]
    assert paths(recursive=True) == [".gitattributes", "config.json", "deep", *deep, "model.safetensors"]
    with pytest.raises(EntryNotFoundError):
        paths(path_in_repo="none")
    with pytest.raises(RevisionNotFoundError):
        paths(revision="none")
    changed = {item.path: item.last_commit.oid for item in api.list_repo_tree("tester/m", recursive=True, expand=True)}
    assert {path for path, commit in changed.items() if commit == second} == {"deep", *deep[1:]}
    assert changed["config.json"] == first
    asked = ["deep", "deep/empty.txt", "none"]
    assert [item.path for item in api.get_paths_info("tester/m", asked)] == asked[:2]
    # What git itself would call an empty file.
    assert api.get_paths_info("tester/m", "deep/empty.txt")[0].blob_id == "e69de29bb2d1d6434b8b29ae775ad8c2e48c5391"
    assert [commit.commit_id for commit in api.list_repo_commits("tester/m")][:2] == [second, first]


names = st.sampled_from(["a", "b", "a.b", "a b", "ä%"])


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.sets(st.lists(names, min_size=1, max_size=3).map("/".join), max_size=6), st.integers(1, 4), st.booleans())
def test_a_tree_is_that_of_a_file_system(hub, paths, page_size, recursive):
    paths = {path for path in paths if not any(other.startswith(f"{path}/") for other in paths)}
    repo_id, hub.page_size = f"tester/{uuid.uuid4().hex}", page_size
    hub.create(repo_id, {path: path for path in paths})
    folder = hub.root.parent / repo_id
    for path in [".gitattributes", *paths]:
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).touch()
    api = hub.api(None)
    for place in [folder, *(path for path in folder.rglob("*") if path.is_dir())]:
        inside = None if place == folder else place.relative_to(folder).as_posix()
        found = api.list_repo_tree(repo_id, inside, recursive=recursive)
        kinds = {item.path: isinstance(item, RepoFolder) for item in found}
        wanted = place.rglob("*") if recursive else place.iterdir()
        assert kinds == {path.relative_to(folder).as_posix(): path.is_dir() for path in wanted}
    for path in paths:
        assert Path(api.hf_hub_download(repo_id, path)).read_text() == path


def test_revisions(hub):
    hub.create("tester/m", {"a.txt": "one"})
    api, repo = hub.api(), "tester/m"
    first = api.model_info(repo).sha
    api.create_tag(repo, tag="v1.0/final")
    api.create_branch(repo, branch="fixes/a")
    with pytest.raises(HfHubHTTPError, match="409"):
        api.create_branch(repo, branch="fixes/a")
    api.create_branch(repo, branch="fixes/a", exist_ok=True)
    second = api.upload_file(path_or_fileobj=b"two", path_in_repo="a.txt", repo_id=repo, revision="fixes/a").oid
    refs = api.list_repo_refs(repo)
    assert {ref.name: ref.target_commit for ref in refs.branches} == {"main": first, "fixes/a": second}
    assert {ref.name: ref.target_commit for ref in refs.tags} == {"v1.0/final": first}
    for revision, text in {"fixes/a": "two", "v1.0/final": "one", "main": "one", second: "two"}.items():
        assert Path(api.hf_hub_download(repo, "a.txt", revision=revision)).read_text() == text
    api.delete_branch(repo, branch="fixes/a")
    api.delete_tag(repo, tag="v1.0/final")
    with pytest.raises(RevisionNotFoundError):
        api.hf_hub_download(repo, "a.txt", revision="fixes/a")
    with pytest.raises(HfHubHTTPError, match="Invalid rev id"):
        api.upload_file(path_or_fileobj=b"x", path_in_repo="a.txt", repo_id=repo, revision="none")


def test_a_commit_is_all_or_nothing(hub):
    hub.create("tester/m", {"a.txt": "a", "b/c.txt": "c", "b/d.txt": "d", "w.safetensors": WEIGHTS})
    api = hub.api()
    head, files = api.model_info("tester/m").sha, hub.files("tester/m")

    def commit(*operations, **options):
        return api.create_commit("tester/m", operations, commit_message="m", **options)

    with pytest.raises(EntryNotFoundError, match="A file with this name doesn't exist"):
        commit(CommitOperationAdd("new.txt", b"new"), CommitOperationDelete("none.txt"))
    with pytest.raises(HfHubHTTPError, match="412"):
        commit(CommitOperationAdd("new.txt", b"new"), parent_commit="0" * 40)
    with pytest.raises(EntryNotFoundError):
        commit(CommitOperationDelete("none/"), create_pr=True)
    assert commit(CommitOperationAdd("a.txt", b"a")).oid == head and not list(api.get_repo_discussions("tester/m"))
    assert api.model_info("tester/m").sha == head and hub.files("tester/m") == files

    done = commit(
        CommitOperationAdd("new.txt", b"new"),
        CommitOperationDelete("a.txt"),
        CommitOperationDelete("b/"),
        CommitOperationCopy("w.safetensors", "copy.safetensors"),
        parent_commit=head,
    )
    assert done.oid == api.model_info("tester/m").sha != head
    expected = {"new.txt": b"new", "w.safetensors": WEIGHTS, "copy.safetensors": WEIGHTS}
    assert in_repo(hub, "tester/m") == expected


def test_commit_ids_are_functions_of_the_content(hub, folder):
    ids = []
    for name in ("one", "two"):
        hub.create(f"tester/{name}")
        ids.append(hub.api().upload_folder(repo_id=f"tester/{name}", folder_path=folder).oid)
    assert ids[0] == ids[1]
    assert hub.commit("tester/one", {"a": "b"}) != hub.commit("tester/two", {"a": "c"})


def test_what_is_large_and_what_is_ignored(hub, folder):
    hub.create("tester/m", {".gitattributes": "*.big filter=lfs diff=lfs merge=lfs -text\nin/*.txt filter=lfs\n"})
    (folder / "in").mkdir()
    for name in ("a.big", "in/a.txt", "a.txt", "secret.env"):
        (folder / name).write_text("text")
    (folder / "long.txt").write_bytes(b"x" * 10_000_001)
    (folder / ".gitignore").write_text("# no\n*.env\n")
    hub.api().upload_folder(repo_id="tester/m", folder_path=folder)
    files = hub.repo("tester/m").files("main")
    large = {"a.big", "in/a.txt", "long.txt", "model.safetensors", "deep/er/second.safetensors"}
    assert {path for path, file in files.items() if "sha256" in file} == large
    assert "secret.env" not in files and "a.txt" in files


def test_large_files_go_in_parts(hub, folder):
    hub.part_size = 4000
    hub.create("tester/m")
    hub.api().upload_folder(repo_id="tester/m", folder_path=folder)
    assert in_repo(hub, "tester/m") == contents(folder)
    sizes = [one.received for one in hub.received("PUT", "/lfs/*") if hashlib.sha256(WEIGHTS).hexdigest() in one.path]
    assert sizes == [4000, 4000, 2240]


def test_pull_requests(hub):
    hub.create("tester/m", {"a.txt": "a", "b.txt": "b"})
    api = hub.api(user="stranger")
    done = api.create_commit(
        "tester/m",
        [CommitOperationAdd("a.txt", b"better"), CommitOperationDelete("b.txt")],
        commit_message="Better",
        create_pr=True,
    )
    assert done.pr_revision == "refs/pr/1" and in_repo(hub, "tester/m") == {"a.txt": b"a", "b.txt": b"b"}
    api.upload_file(path_or_fileobj=WEIGHTS, path_in_repo="w.bin", repo_id="tester/m", revision="refs/pr/1")
    assert Path(api.hf_hub_download("tester/m", "a.txt", revision="refs/pr/1")).read_text() == "better"
    assert [ref.name for ref in api.list_repo_refs("tester/m", include_pull_requests=True).pull_requests] == ["1"]
    assert [(found.title, found.status) for found in api.get_repo_discussions("tester/m")] == [("Better", "open")]
    with pytest.raises(HfHubHTTPError, match="403"):
        api.merge_pull_request("tester/m", 1)
    hub.commit("tester/m", {"c.txt": "meanwhile"})
    hub.api().merge_pull_request("tester/m", 1)
    assert in_repo(hub, "tester/m") == {"a.txt": b"better", "c.txt": b"meanwhile", "w.bin": WEIGHTS}
    assert api.get_discussion_details("tester/m", 1).status == "merged"
    assert api.create_pull_request("tester/m", title="Another").git_reference == "refs/pr/2"


def test_tokens_private_and_gated_repos(hub):
    hub.create("org/open", {"a.txt": "a"})
    hub.create("org/private", {"a.txt": "a"}, private=True)
    hub.create("org/gated", {"a.txt": "a", "w.bin": WEIGHTS}, gated="manual")
    nobody, reader, writer, stranger = hub.api(None), hub.api("read"), hub.api("write"), hub.api("write", "stranger")
    assert writer.whoami()["name"] == "tester" and writer.whoami()["orgs"][0]["name"] == "org"
    assert (reader.whoami()["auth"]["accessToken"]["role"], writer.whoami()["auth"]["accessToken"]["role"]) == (
        "read",
        "write",
    )
    with pytest.raises(HfHubHTTPError, match="Invalid user token"):
        writer.whoami(token="hf_wrong")

    for api in (nobody, reader, stranger):
        assert api.hf_hub_download("org/open", "a.txt")
        with pytest.raises(HfHubHTTPError, match="401|403"):
            api.upload_file(path_or_fileobj=b"x", path_in_repo="a.txt", repo_id="org/open")
        with pytest.raises(HfHubHTTPError, match="401|403"):
            api.create_repo("org/new")
    for api in (nobody, stranger):
        with pytest.raises(RepositoryNotFoundError):
            api.model_info("org/private")
        assert api.model_info("org/gated").gated == "manual"
        with pytest.raises(GatedRepoError):
            api.hf_hub_download("org/gated", "a.txt")
        with pytest.raises(GatedRepoError):
            api.auth_check("org/gated")
    for api in (reader, writer):
        assert api.hf_hub_download("org/private", "a.txt") and api.hf_hub_download("org/gated", "w.bin")
    writer.grant_access("org/gated", "stranger")
    assert stranger.hf_hub_download("org/gated", "w.bin")
    writer.update_repo_settings("org/private", private=False, gated="auto")
    assert nobody.model_info("org/private").gated == "auto"
    # Storage is another place than the Hub, which never sees a token.
    assert hub.received("GET", "/lfs/*")
    assert not any("authorization" in one.headers for one in hub.requests if one.path.startswith("/lfs/"))


@pytest.mark.parametrize(
    ("metadata", "complaint"),
    [
        ("license: mit\nbase_model: OpenGVLab/InternVL3-1B-hf\ndatasets: [a/b, c]\ntags: [x]", None),
        ("license: mine", "license"),
        ("base_model: /home/me/model", "base_model"),
        ("datasets: [../rows]", "datasets"),
        ("tags: [1, 2]", "tags"),
        ("library_name: [transformers]", "library_name"),
        ("model-index: [{name: x, results: [{task: {type: t}}]}]", "model-index"),
        ("a: [", "YAML"),
        ("- a", "mapping"),
    ],
)
def test_cards_are_checked(hub, metadata, complaint):
    content = f"---\n{metadata}\n---\n# Card\n"
    hub.create("tester/m")
    if complaint is None:
        ModelCard(content).validate()
        hub.api().upload_file(path_or_fileobj=content.encode(), path_in_repo="README.md", repo_id="tester/m")
        return
    with pytest.raises(ValueError, match=complaint):
        hub.api().upload_file(path_or_fileobj=content.encode(), path_in_repo="README.md", repo_id="tester/m")
    assert "README.md" not in hub.files("tester/m")


def test_cards_of_spaces_are_checked(hub):
    SpaceCard("---\nsdk: gradio\ncolorFrom: blue\n---\n").validate()
    for wrong in ("license: mit", "sdk: gradio\ncolorFrom: teal", f"sdk: gradio\nshort_description: {'x' * 61}"):
        with pytest.raises(ValueError):
            SpaceCard(f"---\n{wrong}\n---\n").validate()
    with pytest.warns(UserWarning, match="empty or missing yaml metadata"):
        hub.create("tester/m")
        hub.api().upload_file(path_or_fileobj=b"# Card", path_in_repo="README.md", repo_id="tester/m")


def test_ranges(hub):
    hub.create("org/data", {"a.parquet": WEIGHTS, "b.txt": WEIGHTS.hex()}, repo_type="dataset")
    files = HfFileSystem(endpoint=hub.url, token=hub.token("read"), skip_instance_cache=True)
    for name, content in (("a.parquet", WEIGHTS), ("b.txt", WEIGHTS.hex().encode())):
        with files.open(f"datasets/org/data/{name}", block_size=1000) as file:
            file.seek(5000)
            assert file.read(10) == content[5000:5010]
            file.seek(-3, os.SEEK_END)
            assert file.read() == content[-3:]
    url = f"{hub.url}/datasets/org/data/resolve/main/b.txt"
    for part, expected in {"0-0": b"0", "2-": WEIGHTS.hex().encode()[2:], "-2": b"ff"}.items():
        found = httpx2.get(url, headers={"Range": f"bytes={part}"})
        assert (found.status_code, found.content) == (206, expected)
    assert httpx2.get(url, headers={"Range": "bytes=999999-"}).status_code == 416


# What the client makes of failures.


@pytest.mark.parametrize(
    ("status", "options", "error"),
    [
        (401, {"code": "RepoNotFound"}, RepositoryNotFoundError),
        (403, {"code": "GatedRepo"}, GatedRepoError),
        (404, {"code": "RevisionNotFound"}, RevisionNotFoundError),
        (404, {"code": "EntryNotFound"}, EntryNotFoundError),
        (403, {"message": "quota exceeded"}, HfHubHTTPError),
        (409, {"message": "in the way"}, HfHubHTTPError),
    ],
)
def test_errors_that_stay(hub, pauses, status, options, error):
    hub.create("tester/m")
    failure = hub.fail("GET", "/api/models/*", status, **options)
    with pytest.raises(error, match=options.get("message", f"{status}")):
        hub.api().model_info("tester/m")
    assert failure.count == 1 and pauses == []
    hub.api().model_info("tester/m")


@pytest.mark.parametrize("failure", [{"status": 503}, {"status": 429, "retry_after": 7}, {"cut": 0}])
def test_what_passes_is_tried_again(hub, folder, pauses, failure):
    hub.create("tester/m")
    steps = [("POST", "*/preupload/*"), ("POST", "*/batch"), ("PUT", "/lfs/*"), ("POST", "*/verify")]
    if "cut" not in failure:  # which takes a body
        steps += [("HEAD", "*/config.json"), ("GET", "*/tree/*")]
    failures = [hub.fail(method, path, times=2, **failure) for method, path in steps]
    hub.api().upload_folder(repo_id="tester/m", folder_path=folder)
    assert in_repo(hub, "tester/m") == contents(folder)
    hub.api().hf_hub_download("tester/m", "config.json")
    list(hub.api().list_repo_tree("tester/m"))
    assert [failure.count for failure in failures] == [2] * len(steps)
    assert set(pauses) == ({8} if "retry_after" in failure else {1, 2})


@pytest.mark.parametrize("failure", [{"status": 500}, {"status": 429, "retry_after": 1}, {"cut": 100}, {"lost": True}])
def test_a_commit_that_failed(hub, folder, failure):
    """The client does not try it again: `main` is what it was, or has the commit of which the answer was lost."""
    hub.create("tester/m", {"a.txt": "a"})
    before, api = hub.files("tester/m"), hub.api()
    hub.fail("POST", "*/commit/main", **failure)
    with pytest.raises((HfHubHTTPError, httpx2.TransportError)):
        api.upload_folder(repo_id="tester/m", folder_path=folder)
    if "lost" not in failure:
        assert hub.files("tester/m") == before
    sent = len(hub.received("PUT", "/lfs/*"))
    oid = api.upload_folder(repo_id="tester/m", folder_path=folder).oid
    assert len(hub.received("PUT", "/lfs/*")) == sent == 2
    assert in_repo(hub, "tester/m") == contents(folder) | {"a.txt": b"a"}
    hub.create("tester/uninterrupted", {"a.txt": "a"})
    assert api.upload_folder(repo_id="tester/uninterrupted", folder_path=folder).oid == oid


def test_an_interrupted_upload_goes_on(hub, folder, pauses):
    hub.create("tester/m")
    second = hashlib.sha256(WEIGHTS[::-1]).hexdigest()
    failure = hub.fail("PUT", f"/lfs/*/{second}", cut=5000, times=None)
    with pytest.raises(RuntimeError, match="deep/er/second.safetensors"):
        hub.api().upload_folder(repo_id="tester/m", folder_path=folder)
    assert failure.count == 6 and in_repo(hub, "tester/m") == {}
    hub.failures.clear()
    hub.requests.clear()
    oid = hub.api().upload_folder(repo_id="tester/m", folder_path=folder).oid
    assert [one.path.split("/")[-1] for one in hub.received("PUT", "/lfs/*")] == [second]
    hub.create("tester/uninterrupted")
    assert hub.api().upload_folder(repo_id="tester/uninterrupted", folder_path=folder).oid == oid


UPLOAD = """
import sys
from huggingface_hub import HfApi
HfApi().upload_folder(repo_id="tester/m", folder_path=sys.argv[1])
"""


def test_a_killed_upload_goes_on(hub, folder, tmp_path):
    hub.create("tester/m")
    first, second = (hashlib.sha256(content).hexdigest() for content in (WEIGHTS, WEIGHTS[::-1]))
    stuck = hub.fail("PUT", f"/lfs/*/{second}", delay=600)
    environment = {**os.environ, **hub.environment(tmp_path / "fresh", hub.token())}
    process = subprocess.Popen([sys.executable, "-c", UPLOAD, folder], env=environment, stderr=subprocess.DEVNULL)
    while stuck.count == 0 or not hub.repo("tester/m").blob(first).exists():
        assert process.poll() is None
        time.sleep(0.02)
    process.kill()
    process.wait()
    assert in_repo(hub, "tester/m") == {}
    hub.requests.clear()
    oid = hub.api().upload_folder(repo_id="tester/m", folder_path=folder).oid
    assert [one.path.split("/")[-1] for one in hub.received("PUT", "/lfs/*")] == [second]
    hub.create("tester/uninterrupted")
    assert hub.api().upload_folder(repo_id="tester/uninterrupted", folder_path=folder).oid == oid


def test_an_interrupted_download_goes_on_where_it_was(hub, pauses, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE", 1000)  # what is kept is whole chunks
    hub.create("tester/m", {"model.safetensors": WEIGHTS})
    hub.fail("GET", "/lfs/*", cut=4000)
    hub.fail("GET", "/lfs/*", cut=1000)
    path = hub.api(None).hf_hub_download("tester/m", "model.safetensors")
    assert Path(path).read_bytes() == WEIGHTS
    assert [one.headers.get("range") for one in hub.received("GET", "/lfs/*")] == [None, "bytes=4000-", "bytes=5000-"]


def test_what_has_not_changed_is_not_downloaded_again(hub):
    hub.create("tester/m", {"a.txt": "a", "model.safetensors": WEIGHTS})
    api = hub.api(None)
    api.snapshot_download("tester/m")
    hub.commit("tester/m", {"b.txt": "b"})
    hub.requests.clear()
    assert contents(Path(api.snapshot_download("tester/m"))) == hub.files("tester/m")
    assert not hub.received("GET", "/lfs/*")
    assert [one.path.split("/")[-1] for one in hub.received("GET", "*/resolve/*")] == ["b.txt"]


def test_a_slow_answer(hub):
    """It is waited for, unless the file is in the cache."""
    hub.create("tester/m", {"a.txt": "a"})
    api = hub.api(None)
    hub.fail("HEAD", "*/a.txt", delay=0.5, times=2)
    path = api.hf_hub_download("tester/m", "a.txt", etag_timeout=0.1)
    assert Path(path).read_text() == "a" and len(hub.received("HEAD", "*/a.txt")) == 2
    hub.fail("HEAD", "*/a.txt", delay=0.5)
    assert api.hf_hub_download("tester/m", "a.txt", etag_timeout=0.1) == path
    assert len(hub.received("HEAD", "*/a.txt")) == 3 and len(hub.received("GET", "*/a.txt")) == 1


def test_offline_the_cache_is_enough(hub, monkeypatch):
    hub.create("tester/m", {"a.txt": "a"})
    api = hub.api(None)
    snapshot = api.snapshot_download("tester/m")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    seen = len(hub.requests)
    assert api.snapshot_download("tester/m") == snapshot
    assert api.hf_hub_download("tester/m", "a.txt") == f"{snapshot}/a.txt"
    with pytest.raises(OfflineModeIsEnabled):
        api.model_info("tester/m")
    assert len(hub.requests) == seen


# The other libraries.


@pytest.mark.parametrize("streaming", [False, True])
def test_data_sets_are_loaded(hub, tmp_path, streaming):
    rows = {"text": [f"row {number}" for number in range(5)]}
    Dataset.from_dict(rows).to_parquet(tmp_path / "train.parquet")
    hub.create("org/parquet", {"data/train-00000-of-00001.parquet": tmp_path / "train.parquet"}, "dataset")
    lines = "".join(json.dumps({"text": text}) + "\n" for text in rows["text"])
    card = "---\nconfigs:\n- {config_name: default, data_files: [{split: train, path: lines.jsonl}]}\n---\n"
    hub.create("org/lines", {"lines.jsonl": lines, "README.md": card}, "dataset", private=True)
    for name in ("org/parquet", "org/lines"):
        found = load_dataset(name, split="train", streaming=streaming, token=hub.token("read"))
        assert [row["text"] for row in found] == rows["text"]


CLIENTS = """
import json, sys
from datasets import load_dataset
from huggingface_hub import whoami
from transformers import AutoModel, AutoTokenizer, BertConfig, BertModel

name = whoami()["name"]
config = BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8, vocab_size=9)
model = BertModel(config)
model.push_to_hub("tester/bert", private=True)
model.encoder.layer[0].output.dense.bias.data += 1
model.push_to_hub("tester/bert", revision="more", commit_message="more")
for revision, expected in (("main", 0), ("more", 1)):
    loaded = AutoModel.from_pretrained("tester/bert", revision=revision)
    assert loaded.encoder.layer[0].output.dense.bias.unique().tolist() == [expected], revision
print(json.dumps([name, load_dataset("org/lines", split="train")[0]["text"]]))
"""


def test_the_environment_connects_the_clients_of_a_process(hub, tmp_path):
    hub.create("org/lines", {"lines.jsonl": '{"text": "a"}\n'}, "dataset")
    environment = {**os.environ, **hub.environment(tmp_path / "fresh", hub.token())}
    done = subprocess.run([sys.executable, "-c", CLIENTS], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == ["tester", "a"]
    assert hub.repo("tester/bert").state["private"] and set(hub.repo("tester/bert").refs) == {
        "refs/heads/main",
        "refs/heads/more",
    }
