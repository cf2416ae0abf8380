"""The local Hub of the tests refuses the same requests as the Hub."""

import pytest
from huggingface_hub import ModelCard
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    RepositoryNotFoundError,
)

WEIGHTS = bytes(range(256)) * 40


def test_cards_are_checked(hub):
    hub.create("tester/m")
    upload = {"path_in_repo": "README.md", "repo_id": "tester/m"}
    for metadata, complaint in (
        ("license: mine", "license"),
        ("base_model: /home/me/model", "base_model"),
        ("model-index: [{name: x, results: [{task: {type: t}}]}]", "model-index"),
        ("a: [", "YAML"),
    ):
        with pytest.raises(ValueError, match=complaint):
            hub.api().upload_file(path_or_fileobj=f"---\n{metadata}\n---\n# Card\n".encode(), **upload)
        assert "README.md" not in hub.files("tester/m")
    content = "---\nlicense: mit\nbase_model: OpenGVLab/InternVL3-1B-hf\ndatasets: [a/b, c]\ntags: [x]\n---\n# Card\n"
    ModelCard(content).validate()
    hub.api().upload_file(path_or_fileobj=content.encode(), **upload)


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
