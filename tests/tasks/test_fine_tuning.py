"""Base trainer of fine-tuning: arguments, pictures, evaluation, and learning rates."""

from functools import partial
from unittest.mock import MagicMock

import dense_data
import numpy as np
import pytest
import torch
from tiny_models import VISION
from torchvision.transforms.v2 import functional as F
from transformers import TrainerCallback

from modeling_vitp import (
    ViTPAdapterConfig,
    ViTPDetectionImageProcessor,
    ViTPForChangeDetection,
    ViTPForObjectDetection,
    ViTPForSemanticSegmentation,
    ViTPSegmentationImageProcessor,
)
from modeling_vitp.cards.record import read_json
from modeling_vitp.metrics.resampling import resample
from modeling_vitp.tasks import fine_tuning
from modeling_vitp.tasks.arguments import BackboneArguments
from modeling_vitp.tasks.base import FineTuningOptions
from modeling_vitp.tasks.classification.arguments import ClassificationArguments
from modeling_vitp.tasks.detection.arguments import DetectionArguments
from modeling_vitp.tasks.detection.trainer import ViTPDetectionTrainingConfig
from modeling_vitp.tasks.loading import check_start, load_image_processor, load_on_backbone
from modeling_vitp.tasks.segmentation.arguments import DenseArguments
from modeling_vitp.tasks.segmentation.data import DenseData
from modeling_vitp.tasks.segmentation.trainer import ViTPSegmentationTrainer, ViTPSegmentationTrainingConfig
from modeling_vitp.training import results
from modeling_vitp.training.freezing import layer_decay_groups
from modeling_vitp.training.resuming import check_resume_settings

NECKS = {"adapter": dense_data.BACKBONE, "pyramid": {"pyramid_channels": 16}}


def make_trainer(folder, neck="pyramid", **options):
    model = ViTPForSemanticSegmentation.from_backbone(
        dense_data.tiny_backbone(), neck, num_labels=2, backbone_kwargs=NECKS[neck], **dense_data.HEAD
    )
    args = ViTPSegmentationTrainingConfig(output_dir=str(folder), use_cpu=True, bf16=False)
    encoding = DenseData(classes=dense_data.TWO, splits={"train": {"image": "{name}.png"}}, root=str(folder)).encoding
    return ViTPSegmentationTrainer(model, args, encoding, "mean_iou", **options)


@pytest.mark.parametrize(("neck", "size", "rows"), [("adapter", (20, 100), 1), ("pyramid", (40, 100), 2)])
def test_patch_features_cover_the_image(tmp_path, neck, size, rows):
    trainer = make_trainer(tmp_path, neck)
    model = trainer.model.eval()
    image = torch.randint(0, 256, (3, *size), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))

    scale = 64 / max(size)
    resized = F.resize(image, [round(size[0] * scale), 64], antialias=True).double().numpy() / 255
    processor = ViTPSegmentationImageProcessor()
    mean, std = (np.array(values)[:, None, None] for values in (processor.image_mean, processor.image_std))
    pixels = torch.from_numpy((resized - mean) / std).float()[None]
    first_patch = 1 if neck == "pyramid" else 0
    with torch.no_grad():
        features = trainer.patch_features(image)
        states = model.backbone(pixels, output_hidden_states=True).hidden_states[-1][0, first_patch:]
        pair = trainer.component_maps([[image, image]], tmp_path)[0]
    expected = states[: 4 * rows].T.reshape(32, rows, 4)
    torch.testing.assert_close(features, expected, atol=1e-5, rtol=1e-4)
    assert pair.shape == (rows, 8, 3) and np.array_equal(pair[:, :4], pair[:, 4:])


@pytest.mark.parametrize(("prefix", "is_test"), [("eval", False), ("test", True)])
def test_uncounted_scores_are_named(tmp_path, monkeypatch, caplog, prefix, is_test):
    class CountBatches(TrainerCallback):
        batches = 0

        def on_prediction_step(self, args, state, control, eval_dataloader, **kwargs):
            assert len(eval_dataloader) == 3
            self.batches += 1

    def score(self, batches, is_test):
        calls.append((list(batches), is_test))
        return {"iou/road": 0.5, "iou/river": float("nan")}

    calls, callback = [], CountBatches()
    trainer = make_trainer(tmp_path, callbacks=[callback])
    monkeypatch.setattr(ViTPSegmentationTrainer, "score", score)
    metrics = trainer.evaluate([0, 1, 2], metric_key_prefix=prefix)
    assert calls == [([0, 1, 2], is_test)] and callback.batches == 3
    assert metrics[f"{prefix}_iou/road"] == 0.5 and np.isnan(metrics[f"{prefix}_iou/river"])
    assert "iou/river" in caplog.text and "road" not in caplog.text


@pytest.mark.parametrize(("number", "shown"), [(0, []), (2, [0, 2]), (9, [0, 1, 2, 3])])
def test_pictures_spread_over_samples(tmp_path, monkeypatch, number, shown):
    drawn = []
    monkeypatch.setattr(ViTPSegmentationTrainer, "draw", lambda self, samples, path, is_test: drawn.extend(samples))
    assert results.finish(make_trainer(tmp_path), [0, 1, 2, 3], number) == 0
    assert drawn == shown


def test_failing_submission_sets_exit_status(tmp_path):
    trainer = make_trainer(tmp_path)
    assert results.finish(trainer, None, 4, lambda: (tmp_path / "masks.zip").touch()) == 0
    assert (tmp_path / "masks.zip").is_file()
    assert results.finish(trainer, None, 4, lambda: 1 / 0) == 1


@pytest.mark.parametrize("arguments", [DenseArguments, DetectionArguments, ClassificationArguments])
def test_split_arguments_are_alike(arguments):
    args = arguments(data={"a": 1}, data_root="there", eval_split="", test_split="")
    assert (args.eval_split, args.test_split, args.data) == (None, None, {"a": 1, "root": "there"})
    with pytest.raises(ValueError, match="data"):
        arguments()


@pytest.mark.parametrize(
    ("splits", "options", "expected"),
    [
        ({"eval_split": "val", "test_split": "val"}, {}, "'val'.*test_split"),
        ({"test_split": "train"}, {}, "'train'.*test_split"),
        ({}, {"eval_strategy": "steps"}, "eval_split"),
        ({"eval_split": "val", "resample_test": True}, {}, "resample_test"),
        ({"test_split": "train", "eval_split": "val"}, {"do_train": False, "eval_strategy": "steps"}, ["train"]),
        ({"eval_split": "val"}, {"do_train": False}, ["val"]),
        ({"test_split": "test"}, {}, ["train", "test"]),
    ],
)
def test_splits_are_checked(splits, options, expected, tmp_path):
    args = DenseArguments(data={"a": 1}, **splits)
    settings = ViTPSegmentationTrainingConfig(str(tmp_path), bf16=False, **options)
    if isinstance(expected, list):
        assert fine_tuning.check_splits(settings, args) == expected
    else:
        with pytest.raises(ValueError, match=expected):
            fine_tuning.check_splits(settings, args)


def test_scoring_does_not_replace_the_metrics_of_a_model(tmp_path):
    (tmp_path / "model.safetensors").touch()
    settings = ViTPSegmentationTrainingConfig(str(tmp_path), bf16=False, do_train=False)
    with pytest.raises(ValueError, match=f"{tmp_path}.*metrics.json.*output_dir"):
        fine_tuning.check_splits(settings, DenseArguments(data={"a": 1}, test_split="test"))


def test_card_is_written_from_all_metrics(tmp_path, monkeypatch):
    trainer = make_trainer(tmp_path)
    trainer.train_dataset = []
    found = {}
    monkeypatch.setattr(trainer, "evaluate", lambda *_, metric_key_prefix: {f"{metric_key_prefix}_mean_iou": 0.5})
    monkeypatch.setattr(trainer, "share", lambda: found.update(read_json(tmp_path / "metrics.json")) or 0)
    monkeypatch.setattr(trainer, "record", lambda *_: None)
    monkeypatch.setattr(fine_tuning, "train", lambda trainer: {"seed": 0})
    monkeypatch.setattr(fine_tuning, "check_free", lambda folder: None)
    task = MagicMock()
    task.load_model.return_value = trainer.model
    task.create_trainer.return_value = trainer
    task.check_samples.return_value = {}
    task.open_split.return_value = []
    task.score_controls.return_value = {"test_swapped": 0.25}
    task.open_data.return_value.describe.return_value = ([], None)
    args = DenseArguments(data={"a": 1}, test_split="test", num_pictures=0)
    fine_tuning.fine_tune(task, FineTuningOptions(args, trainer.args, BackboneArguments()))
    assert found["test"] == {"test_mean_iou": 0.5, "test_swapped": 0.25}
    assert found["main_score"] == "mean_iou" and found["greater_is_better"]


def test_changed_layer_decay_is_refused(tmp_path):
    trainer = make_trainer(tmp_path)
    trainer.train_dataset = []
    settings = trainer.run_settings()
    trainer.args.layer_decay, trainer.args.learning_rate = 0.25, 0.5
    with pytest.raises(ValueError, match="learning_rate .*0.5; .*layer_decay .*0.25"):
        check_resume_settings("checkpoint-1", settings, trainer.run_settings())


@pytest.mark.parametrize("arguments", [ViTPSegmentationTrainingConfig, ViTPDetectionTrainingConfig])
def test_label_smoothing_is_for_classification(arguments, tmp_path):
    with pytest.raises(ValueError, match="label_smoothing_factor"):
        arguments(output_dir=str(tmp_path), label_smoothing_factor=0.1)


LAYERS = 4
NECK = {"deformable_heads": 4, "spatial_prior_channels": 8}
VIT = {**VISION, "image_size": [64, 64], "patch_size": [16, 16]}
SETTINGS = {
    ViTPForSemanticSegmentation: {"hidden_size": 16, "auxiliary_channels": 16},
    ViTPForChangeDetection: {"hidden_size": 16, "auxiliary_channels": 16},
    ViTPForObjectDetection: {"neck_channels": 16, "head_hidden_size": 16},
}


@pytest.fixture(params=SETTINGS, ids=["segmentation", "change", "detection"])
def model(request):
    backbone = ViTPAdapterConfig(**{**VIT, "num_hidden_layers": LAYERS}, **NECK)
    return request.param(request.param.config_class(backbone_config=backbone, num_labels=2, **SETTINGS[request.param]))


def test_layer_decay_equals_manual_rates(model):
    groups = layer_decay_groups(model, learning_rate=2.0, weight_decay=0.3, layer_decay=0.5, num_layers=LAYERS)
    group_of_weight = {id(weight): group for group in groups for weight in group["params"]}
    trained = [(name, weight) for name, weight in model.named_parameters() if weight.requires_grad]
    assert group_of_weight.keys() == {id(weight) for _, weight in trained}
    assert sum(len(group["params"]) for group in groups) == len(trained)
    # 2 * 0.5 ** (4 - i) for layer i, 2 * 0.5 ** 5 for the embeddings, and 2 for the adapter and the heads.
    rates = {
        "backbone.embeddings.": 0.0625,
        "backbone.encoder.layer.0.": 0.125,
        "backbone.encoder.layer.1.": 0.25,
        "backbone.encoder.layer.2.": 0.5,
        "backbone.encoder.layer.3.": 1.0,
    }
    for name, weight in trained:
        group = group_of_weight[id(weight)]
        assert group["lr"] == next((rate for prefix, rate in rates.items() if name.startswith(prefix)), 2.0), name
        without = name.endswith((".bias", "position_embeddings", "gate", "lambda_1", "lambda_2")) or "norm" in name
        without = without or weight.ndim == 1
        assert group["weight_decay"] == (0.0 if without else 0.3), name
    assert {group["lr"] for group in groups} == {*rates.values(), 2.0}


@pytest.mark.parametrize(("at_input", "positions"), [(False, True), (True, False), (True, True)])
def test_layer_decay_options_of_the_release(model, at_input, positions):
    def settings_of(*options):
        groups = layer_decay_groups(model, 2.0, 0.3, 0.5, LAYERS, *options)
        return {id(weight): (group["lr"], group["weight_decay"]) for group in groups for weight in group["params"]}

    found, before = settings_of(at_input, positions), settings_of()
    names = {id(weight): name for name, weight in model.named_parameters()}
    changed = {names[key]: value for key, value in found.items() if before[key] != value}
    expected = {"backbone.level_embeddings": (0.0625, 0.3)} if at_input else {}
    expected |= {"backbone.embeddings.position_embeddings": (0.0625, 0.3)} if positions else {}
    assert found.keys() == before.keys() and changed == expected


def test_layer_decay_of_one_has_one_rate(model):
    groups = layer_decay_groups(model, learning_rate=1.0, weight_decay=0.1, layer_decay=1.0, num_layers=LAYERS)
    assert {group["lr"] for group in groups} == {1.0}


def test_split_is_scored_over_resamples(tmp_path):
    """Check scores over resamples against evaluations of the repeated samples."""
    trainer, random = make_trainer(tmp_path), torch.Generator().manual_seed(0)
    samples = []
    for number, case in enumerate("baacdb"):
        image = torch.randint(0, 256, (3, 32, 32), dtype=torch.uint8, generator=random)
        mask = torch.randint(0, 2, (32, 32), dtype=torch.uint8, generator=random)
        samples.append({"id": f"{case}{number}", "case": case, "images": [image], "mask": mask})
    metrics, score = trainer.evaluate(samples, metric_key_prefix="test"), trainer.metric.score_images()
    assert metrics["test_mean_iou"] == score.value
    for draw, resampled in list(zip(resample(4), score.resampled))[:3]:
        repeated = [sample for index in draw for sample in samples if sample["case"] == "abcd"[index]]
        assert trainer.evaluate([{**sample, "case": "a"} for sample in repeated])["eval_mean_iou"] == resampled
    metrics = trainer.evaluate(samples)
    assert metrics["eval_overall_accuracy"] == trainer.metric.score_images("overall_accuracy").value
    with pytest.raises(ValueError, match="f1"):
        trainer.metric.score_images("f1")


@pytest.fixture(scope="module")
def fine_tuned(tmp_path_factory):
    """Return the folder of a detector with its image processor, which resizes to 96 x 128 pixels."""
    folder = tmp_path_factory.mktemp("fine_tuned")
    backbone = ViTPAdapterConfig(**{**VIT, "num_hidden_layers": 1}, **NECK)
    settings = {"backbone_config": backbone, "id2label": {0: "ship"}, **SETTINGS[ViTPForObjectDetection]}
    ViTPForObjectDetection(ViTPForObjectDetection.config_class(**settings)).save_pretrained(folder)
    ViTPDetectionImageProcessor(do_resize=True, size={"height": 96, "width": 128}).save_pretrained(folder)
    return str(folder)


def test_settings_of_the_head_are_applied_to_a_fine_tuned_model(fine_tuned):
    def load(**settings):
        args = BackboneArguments(model_name_or_path=fine_tuned, **settings)
        return load_on_backbone(ViTPForObjectDetection, args, ["ship"]).config

    assert (load().score_threshold, load().flip_test) == (0.05, False)
    changed = load(head={"score_threshold": 0.01, "flip_test": True}, backbone={"deformable_heads": 4})
    assert (changed.score_threshold, changed.flip_test) == (0.01, True)
    for wrong, named in (
        ({"backbone": {"deformable_heads": 2}}, "deformable_heads"),
        ({"head": {"neck_channels": 8}}, "shapes"),
        ({"neck": "pyramid"}, "neck: pyramid"),
    ):
        with pytest.raises(ValueError, match=named):
            load(**wrong)


def test_default_neck_that_is_set_is_not_ignored(tmp_path):
    """Check a start with the other neck, which keeps its neck only if none is set."""
    head = {**dense_data.HEAD, "id2label": dict(enumerate("ab")), "backbone_kwargs": {"pyramid_channels": 16}}
    ViTPForSemanticSegmentation.from_backbone(dense_data.tiny_backbone(), "pyramid", **head).save_pretrained(tmp_path)
    start = partial(BackboneArguments, model_name_or_path=str(tmp_path))
    assert load_on_backbone(ViTPForSemanticSegmentation, start(), ["a", "b"]).backbone.config.pyramid_channels == 16
    with pytest.raises(ValueError, match="neck: adapter"):
        load_on_backbone(ViTPForSemanticSegmentation, start(neck="adapter"), ["a", "b"])


def test_fine_tuned_start_is_loaded_in_float32(tmp_path, fine_tuned):
    ViTPForObjectDetection.from_pretrained(fine_tuned, dtype=torch.bfloat16).save_pretrained(tmp_path)
    model = load_on_backbone(ViTPForObjectDetection, BackboneArguments(model_name_or_path=str(tmp_path)), ["ship"])
    assert {model.config.dtype, *(weight.dtype for weight in model.parameters())} == {torch.float32}


def test_trained_model_is_scored_at_its_own_size(fine_tuned, caplog):
    args, size = BackboneArguments(model_name_or_path=fine_tuned), {"max_height": 64, "max_width": 64}
    load = partial(load_image_processor, ViTPDetectionImageProcessor, args, do_resize=True, size=size)
    assert dict(load().size) == size and not caplog.messages
    assert dict(load(do_train=False).size) == {"height": 96, "width": 128} and "size" in caplog.text


def test_backbone_is_not_scored(tmp_path, fine_tuned):
    dense_data.tiny_backbone().save_pretrained(tmp_path)
    check_start(ViTPForObjectDetection, BackboneArguments(model_name_or_path=fine_tuned), do_train=False)
    with pytest.raises(ValueError, match="vitp_vision.*vitp_object_detection|do_train"):
        check_start(ViTPForObjectDetection, BackboneArguments(model_name_or_path=str(tmp_path)), do_train=False)
