"""Probes of several sites: the scored backbones, and choices by validation images alone."""

import json

import pytest
import torch
from classification_data import write_folders
from transformers import BitImageProcessor, Dinov2Config, Dinov2Model

from lab.experiments.arguments import SitePlan
from lab.experiments.site_probes import Candidate, score_sites, with_first_layers, write_backbone
from modeling_vitp.probing.arguments import ProbeArguments
from modeling_vitp.tasks.probing import probe

CLASSES = ("field", "forest", "river")


def write_vit(folder, seed: int, image_size: int) -> Dinov2Model:
    torch.manual_seed(seed)
    config = Dinov2Config(
        hidden_size=32,
        num_hidden_layers=3,
        num_attention_heads=2,
        image_size=image_size,
        patch_size=14,
    )
    vit = Dinov2Model(config)
    vit.save_pretrained(folder)
    size = {"height": 28, "width": 28}
    BitImageProcessor(size=size, crop_size=size, do_center_crop=False).save_pretrained(folder)
    return vit.eval()


@pytest.fixture
def plan(tmp_path):
    counts = {"own/train": 8, "own/val": 6, "own/test": 8, "other/test": 8}
    write_folders(tmp_path / "sites", counts, CLASSES)
    return SitePlan(
        data={"root": str(tmp_path / "sites")},
        task="classification",
        train_split="own/train",
        validation_split="own/val",
        sites=["own/test", "other/test"],
        layers=[1, 3],
        shares=[0.5],
        score="accuracy",
        image_size=28,
    )


def test_candidates_are_chosen_on_validation_images(plan, tmp_path, monkeypatch):
    write_vit(tmp_path / "start", seed=0, image_size=56)
    write_vit(tmp_path / "trained", seed=1, image_size=28)
    splits = []

    def record(arguments: ProbeArguments) -> dict:
        splits.append(arguments.test_split)
        return probe(arguments)

    monkeypatch.setattr("lab.experiments.site_probes.probe", record)
    scores = score_sites(plan, str(tmp_path / "start"), tmp_path / "trained", tmp_path / "out")
    validation = json.loads((tmp_path / "out" / "sites.json").read_text())["validation"]
    assert list(validation) == ["share_50_layer_1", "share_50_layer_3", "share_100_layer_1", "share_100_layer_3"]
    chosen = scores["chosen"]
    is_same = (chosen["share"], chosen["layers"]) == (1, scores["trained"]["layers"])
    assert splits == ["own/val"] * 4 + ["own/test", "other/test"] * (1 if is_same else 2)
    name = f"share_{round(100 * chosen['share'])}_layer_{chosen['layers']}"
    assert chosen["validation"] == validation[name] == max(validation.values())
    assert scores["trained"]["share"] == 1

    write_backbone(
        Candidate(1.0, scores["trained"]["layers"]), str(tmp_path / "start"), tmp_path / "trained", tmp_path / "whole"
    )
    arguments = ProbeArguments(
        backbones=[str(tmp_path / "whole")],
        data=plan.data,
        task=plan.task,
        train_split="own/train",
        test_split="other/test",
        image_size=28,
        seeds=[0],
        output_dir=str(tmp_path / "probe"),
    )
    for result in probe(arguments)["results"]:
        assert scores["trained"]["other/test"][result["probe"]] == result["scores"]["accuracy"]["mean"]


def test_equal_weights_are_probed_once(plan, tmp_path, monkeypatch):
    write_vit(tmp_path / "start", seed=0, image_size=28)
    calls = []

    def count(arguments: ProbeArguments) -> dict:
        calls.append(arguments.test_split)
        return probe(arguments)

    monkeypatch.setattr("lab.experiments.site_probes.probe", count)
    start = str(tmp_path / "start")
    scores = score_sites(plan, start, tmp_path / "start", tmp_path / "runs" / "seed_0" / "start_sites")
    assert scores["chosen"]["share"] == 0.5 and scores["chosen"]["own/test"] == scores["trained"]["own/test"]
    assert len(calls) == len(plan.layers) + len(plan.sites)  # Each share gives the same weights.
    assert score_sites(plan, start, tmp_path / "start", tmp_path / "runs" / "seed_1" / "start_sites") == scores
    assert len(calls) == len(plan.layers) + len(plan.sites)


def test_first_layers_give_the_same_states(tmp_path):
    vit = write_vit(tmp_path, seed=0, image_size=28)
    pixels = torch.rand(2, 3, 28, 28)
    with torch.no_grad():
        states = vit(pixels, output_hidden_states=True).hidden_states
        cut = with_first_layers(vit, 2).eval()(pixels).last_hidden_state
    torch.testing.assert_close(cut, vit.layernorm(states[2]))


def test_a_split_for_choices_is_no_site(plan):
    with pytest.raises(ValueError, match="sites"):
        SitePlan(**{**vars(plan), "sites": ["own/val"]})
