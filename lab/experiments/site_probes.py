"""Probes of the frozen backbone of a run on several sites, with every choice made on validation ground."""

import contextlib
import hashlib
import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from lab.experiments.arguments import SitePlan
from modeling_vitp.convert.interpolation import interpolate_vit
from modeling_vitp.probing.arguments import ProbeArguments
from modeling_vitp.tasks.probing import probe
from modeling_vitp.training.checkpointing import write_whole


@dataclass(frozen=True)
class Candidate:
    """Backbone that may be chosen.

    Attributes:
        share: share of the way of the weights from the start to the trained ViT.
        layers: number of layers whose output is probed.
    """

    share: float
    layers: int

    @property
    def name(self) -> str:
        return f"share_{round(100 * self.share)}_layer_{self.layers}"


def score_sites(plan: SitePlan, start: str, trained: Path, output: Path) -> dict[str, dict[str, Any]]:
    """Score the backbone of a run on all sites, and write all scores to `sites.json`.

    Args:
        plan: data, sites and candidates.
        start: ViT before the pretraining.
        trained: folder of the ViT after it.
        output: folder for the features and scores.

    Returns:
        The scores by site and probe, and the score on validation ground, of two candidates: `trained` is the trained
        ViT, `chosen` the best share of the way to it. The layer of each is the best on validation ground, and so is the
        share; of equal ones, the smaller share is taken.
    """
    validation_scores = {}
    for candidate in candidates_of(plan):
        scores = score_candidate(plan, candidate, start, trained, [plan.validation_split], output)
        validation_scores[candidate] = scores[plan.validation_split][plan.probe]
    whole_way = [candidate for candidate in validation_scores if candidate.share == 1]
    chosen = {
        "trained": max(whole_way, key=validation_scores.get),
        "chosen": max(validation_scores, key=validation_scores.get),
    }
    scores_of_sites = {}
    for name, candidate in chosen.items():
        scores = score_candidate(plan, candidate, start, trained, plan.sites, output)
        scores_of_sites[name] = {
            "share": candidate.share,
            "layers": candidate.layers,
            "validation": validation_scores[candidate],
            **scores,
        }
    validation = {candidate.name: score for candidate, score in validation_scores.items()}
    record = {"validation": validation, **scores_of_sites}
    write_whole(output / "sites.json", json.dumps(record, indent=2) + "\n")
    return scores_of_sites


def candidates_of(plan: SitePlan) -> Iterator[Candidate]:
    """Yield the candidates, those with a smaller share first."""
    for share in sorted({*plan.shares, 1.0}):
        for layers in plan.layers:
            yield Candidate(share, layers)


def score_candidate(
    plan: SitePlan,
    candidate: Candidate,
    start: str,
    trained: Path,
    splits: list[str],
    output: Path,
) -> dict[str, dict[str, float]]:
    """Return the score of each probe of a candidate, by split.

    Scores are kept beside the runs by the hash of the weights and the plan, so that the start, which is a candidate of
    every run, is probed once.
    """
    folder = output / candidate.name
    write_backbone(candidate, start, trained, folder / "backbone")
    key = hashlib.sha256((folder / "backbone" / "model.safetensors").read_bytes())
    key.update(json.dumps(vars(plan)).encode())
    known_scores = output.parents[1] / "probe_scores" / key.hexdigest()
    known_scores.mkdir(parents=True, exist_ok=True)
    scores = {}
    for split in splits:
        file = known_scores / f"{split.replace('/', '_')}.json"
        if not file.exists():
            write_whole(file, json.dumps(run_probe(plan, split, folder, output / "probes.log")))
        scores[split] = json.loads(file.read_text())
    shutil.rmtree(folder)  # The features are large.
    return scores


def run_probe(plan: SitePlan, split: str, folder: Path, log_file: Path) -> dict[str, float]:
    """Return the score of each probe of the backbone in a folder on a split."""
    arguments = ProbeArguments(
        backbones=[str(folder / "backbone")],
        data=plan.data,
        task=plan.task,
        train_split=plan.train_split,
        test_split=split,
        image_size=plan.image_size,
        seeds=[0],
        output_dir=str(folder / "probe"),
    )
    with log_file.open("a") as log, contextlib.redirect_stdout(log):
        metrics = probe(arguments)
    scores = {}
    for result in metrics["results"]:
        scores[result["probe"]] = result["scores"][plan.score]["mean"]
    return scores


def write_backbone(candidate: Candidate, start: str, trained: Path, folder: Path) -> None:
    """Write the backbone of a candidate, with its first layers only."""
    vit = interpolate_vit(start, trained, candidate.share)
    cut_vit = with_first_layers(vit, candidate.layers)
    cut_vit.save_pretrained(folder)
    for file in trained.glob("*processor*.json"):
        shutil.copy(file, folder)


def with_first_layers(vit: PreTrainedModel, layers: int) -> PreTrainedModel:
    """Return a ViT of transformers with the first layers of another and its final norm."""
    settings = vit.config.to_dict()
    for name in ("stage_names", "out_features", "out_indices"):  # They name the last layer.
        settings.pop(name, None)
    settings["num_hidden_layers"] = layers
    cut_vit = type(vit)(type(vit.config)(**settings))
    report = cut_vit.load_state_dict(vit.state_dict(), strict=False)
    if report.missing_keys:
        raise ValueError(f"Expected all weights of {layers} layers, but {report.missing_keys} are missing.")
    return cut_vit
