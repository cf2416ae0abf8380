"""The Hub of the tests, driven by the unmodified clients, and what these do when it fails."""

import hashlib
from pathlib import Path

import pytest
from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationCopy,
    CommitOperationDelete,
    ModelCard,
    SpaceCard,
)
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import disable_progress_bars

pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=<...>':DeprecationWarning")
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
    url = api.create_repo(**repo, space_sdk="gradio" if repo_type == "space" else None)
    assert (url.repo_id, url.repo_type) == ("org/thing", repo_type) and url.startswith(hub.url)
    assert api.create_repo(**repo, exist_ok=True, space_sdk="gradio" if repo_type == "space" else None) == url
    with pytest.raises(HfHubHTTPError, match="409"):
        api.create_repo(**repo, space_sdk="gradio")

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
    assert commit(CommitOperationAdd("a.txt", b"a")).oid == head
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
