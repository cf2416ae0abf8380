"""Probes of frozen features on corrupted images."""

import dense_data
import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score

from lab.trees.downstream import CorruptedProbe, probe_robustness
from modeling_vitp.images.corruptions import SEVERITIES, CorruptedImages
from modeling_vitp.probing.few_labels import FewLabels
from modeling_vitp.tasks.segmentation.probe import SegmentationProbe, pixels_by_patch

ALL = FewLabels(share=1.0)


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    return dense_data.loveda_probe(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def backbone(tmp_path_factory):
    return dense_data.probed_backbone(tmp_path_factory.mktemp("backbone"))


@pytest.mark.parametrize("corruption", ["gaussian_noise", "rotation"])
def test_clean_probe_scores_corrupted_images(task, backbone, corruption, tmp_path):
    everything = {ALL: [np.arange(len(task.samples["train"]))]}
    heads = task.fit(backbone, everything, None, tmp_path)
    corrupted = CorruptedProbe(task, corruption, 4, seed=5)
    found = corrupted.score(heads, backbone, None, tmp_path)["linear", ALL][0]["patch_auc"]
    clean = task.score(heads, backbone, None, tmp_path)["linear", ALL][0]["patch_auc"]
    assert found != clean
    probe, logits, labels = heads["linear", ALL][0], [], []
    for sample in CorruptedImages(task.data.open(["val"]), corruption, 4, 5):
        pixels = backbone.image_processor(sample["images"][0], return_tensors="pt")["pixel_values"]
        scores = probe(backbone.maps(pixels)[0])
        counts = pixels_by_patch(sample["mask"].numpy(), scores.shape[:2], len(task.names))
        logits.append(scores[counts.any(-1)].log_softmax(-1))
        labels.append(counts.argmax(-1)[counts.any(-1)])
    odds, labels = torch.cat(logits).exp(), np.concatenate(labels)
    areas = [roc_auc_score(labels == label, torch.logit(odds[:, label].double())) for label in np.unique(labels)]
    assert found == pytest.approx(np.mean(areas), abs=1e-3)


def test_corruptions_are_summarized(task, backbone, tmp_path, monkeypatch):
    def score(self, heads, *args):
        value = 0.9
        if isinstance(self, CorruptedProbe):
            name, severity, seed = self.corruption
            assert seed == 7
            value = 0.1 * severity if name == "haze" else 0.8
        return {key: [{"patch_auc": value, "mean_iou": value / 2}] for key in heads}

    monkeypatch.setattr(SegmentationProbe, "score", score)
    found = probe_robustness(task, backbone, [1, 3], 7, tmp_path)
    assert set(found) == {"linear", "nonlinear"}
    area, iou = found["linear"]["patch_auc"], found["linear"]["mean_iou"]
    assert list(area["corruptions"]) == list(SEVERITIES)
    assert area["corruptions"]["haze"] == pytest.approx(0.2)
    assert area["average"] == pytest.approx((0.2 + 11 * 0.8) / 12)
    assert area["relative"] == pytest.approx(area["average"] / 0.9)
    assert iou["clean"] == 0.45 and iou["relative"] == pytest.approx(area["relative"])
    assert not list(tmp_path.iterdir())
