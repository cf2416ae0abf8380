"""The local Hub of the tests refuses the same requests as the Hub."""

import os

import pytest
from datasets import Dataset, load_dataset
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfFileSystem, ModelCard
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

WEIGHTS = bytes(range(256)) * 40


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
    upload = {"path_or_fileobj": content.encode(), "path_in_repo": "README.md", "repo_id": "tester/m"}
    if complaint is None:
        ModelCard(content).validate()
        hub.api().upload_file(**upload)
        return
    with pytest.raises(ValueError, match=complaint):
        hub.api().upload_file(**upload)
    assert "README.md" not in hub.files("tester/m")


def test_tokens_private_and_gated_repos(hub):
    hub.create("org/open", {"a.txt": "a"})
    hub.create("org/private", {"a.txt": "a"}, private=True)
    hub.create("org/gated", {"a.txt": "a", "w.bin": WEIGHTS}, gated="manual")
    nobody, reader, writer, stranger = hub.api(None), hub.api("read"), hub.api("write"), hub.api("write", "stranger")
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
        with pytest.raises(GatedRepoError):
            api.hf_hub_download("org/gated", "a.txt")
    for api in (reader, writer):
        assert api.hf_hub_download("org/private", "a.txt") and api.hf_hub_download("org/gated", "w.bin")


def test_commit_is_all_or_nothing(hub):
    hub.create("tester/m", {"a.txt": "a"})
    api, files = hub.api(), hub.files("tester/m")
    add = CommitOperationAdd("new.txt", b"new")
    for operations, options, error in (
        ([add, CommitOperationDelete("none.txt")], {}, EntryNotFoundError),
        ([add], {"parent_commit": "0" * 40}, HfHubHTTPError),
        ([add], {"revision": "none"}, RevisionNotFoundError),
    ):
        with pytest.raises(error):
            api.create_commit("tester/m", operations, commit_message="m", **options)
    assert hub.files("tester/m") == files


@pytest.mark.parametrize("streaming", [False, True])
def test_data_sets_are_loaded_and_read_in_ranges(hub, tmp_path, streaming):
    rows = {"text": [f"row {number}" for number in range(5)]}
    Dataset.from_dict(rows).to_parquet(tmp_path / "train.parquet")
    files = {"data/train-00000-of-00001.parquet": tmp_path / "train.parquet"}
    hub.create("org/rows", files, "dataset", private=True)
    found = load_dataset("org/rows", split="train", streaming=streaming, token=hub.token("read"))
    assert [row["text"] for row in found] == rows["text"]
    system = HfFileSystem(endpoint=hub.url, token=hub.token("read"), skip_instance_cache=True)
    with system.open(f"datasets/org/rows/{[*files][0]}", block_size=100) as file:
        file.seek(-4, os.SEEK_END)
        assert file.read() == b"PAR1"
