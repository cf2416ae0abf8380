"""What the trainers of fine-tunings share: arguments, what is shown, the frame of an evaluation, the end."""

import dense_data
import numpy as np
import pytest
import torch
from torchvision.transforms.v2 import functional as F
from transformers import TrainerCallback

from modeling_vitp import ViTPForSemanticSegmentation, ViTPSegmentationImageProcessor
from modeling_vitp.classification.arguments import ClassificationArguments
from modeling_vitp.dense.arguments import FinetuneArguments
from modeling_vitp.dense.data import DenseData
from modeling_vitp.dense.trainer import DenseTrainer, DenseTrainingArguments
from modeling_vitp.detection.arguments import DetectionArguments
from modeling_vitp.detection.trainer import DetectionTrainingArguments
from modeling_vitp.training import results
from modeling_vitp.training.checkpointing import check_settings, publish_checkpoint


def make_trainer(folder, neck, kwargs):
    model = ViTPForSemanticSegmentation.from_backbone(
        dense_data.tiny_backbone(), neck, num_labels=2, backbone_kwargs=kwargs, **dense_data.HEAD
    )
    args = DenseTrainingArguments(output_dir=str(folder), use_cpu=True, bf16=False)
    encoding = DenseData(classes=dense_data.TWO, splits={"train": {"image": "{name}.png"}}, root=str(folder)).encoding
    return DenseTrainer(model, args, encoding, "mean_iou")


@pytest.mark.parametrize(("neck", "first"), [("adapter", 0), ("pyramid", 1)])
@pytest.mark.parametrize(("size", "rows"), [((20, 100), 1), ((40, 100), 2), ((64, 64), 4)])
def test_features_are_those_of_the_patches_in_the_image(tmp_path, neck, first, size, rows):
    kwargs = dense_data.BACKBONE if neck == "adapter" else {"pyramid_channels": 16}
    trainer = make_trainer(tmp_path, neck, kwargs)
    model = trainer.model.eval()
    image = torch.randint(0, 256, (3, *size), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))

    scale = 64 / max(size)
    resized = F.resize(image, [round(size[0] * scale), 64], antialias=True).double().numpy() / 255
    processor = ViTPSegmentationImageProcessor()
    mean, std = (np.array(values)[:, None, None] for values in (processor.image_mean, processor.image_std))
    pixels = torch.from_numpy((resized - mean) / std).float()[None]
    with torch.no_grad():
        features = trainer.patch_features(image)
        states = model.backbone(pixels, output_hidden_states=True).hidden_states[-1][0, first:]
        pair = trainer.component_maps([[image, image]], tmp_path)[0]
    assert features.shape == (32, rows, 4)
    for row in range(rows):
        for column in range(4):
            torch.testing.assert_close(features[:, row, column], states[4 * row + column], atol=1e-5, rtol=1e-4)
    assert pair.shape == (rows, 8, 3) and np.array_equal(pair[:, :4], pair[:, 4:])


@pytest.mark.parametrize(("prefix", "is_test"), [("eval", False), ("test", True)])
def test_scores_that_nothing_counts_in_are_named_and_every_batch_is_told(
    tmp_path, monkeypatch, caplog, prefix, is_test
):
    class Told(TrainerCallback):
        batches = 0

        def on_prediction_step(self, args, state, control, eval_dataloader, **kwargs):
            assert len(eval_dataloader) == 3
            self.batches += 1

    def score(self, batches, is_test):
        asked.append((list(batches), is_test))
        return {"iou/road": 0.5, "iou/river": float("nan")}

    asked, told, trainer = [], Told(), make_trainer(tmp_path, "pyramid", {"pyramid_channels": 16})
    trainer.add_callback(told)
    monkeypatch.setattr(DenseTrainer, "score", score)
    metrics = trainer.evaluate([0, 1, 2], metric_key_prefix=prefix)
    assert asked == [([0, 1, 2], is_test)] and told.batches == 3
    assert metrics[f"{prefix}_iou/road"] == 0.5 and np.isnan(metrics[f"{prefix}_iou/river"])
    assert "not counted, for want of pixels: iou/river." in caplog.text and "road" not in caplog.text


@pytest.mark.parametrize(("number", "shown"), [(0, []), (2, [0, 2]), (9, [0, 1, 2, 3])])
def test_a_picture_of_results_has_samples_spread_over_all_and_none_twice(tmp_path, monkeypatch, number, shown):
    drawn, trainer = [], make_trainer(tmp_path, "pyramid", {"pyramid_channels": 16})
    monkeypatch.setattr(DenseTrainer, "draw_results", lambda self, samples, path: drawn.extend(samples))
    assert results.finish(trainer, [0, 1, 2, 3], number) == 0
    assert drawn == shown


def test_what_goes_to_a_server_is_written_if_asked_for_and_its_failure_is_the_status(tmp_path):
    trainer = make_trainer(tmp_path, "pyramid", {"pyramid_channels": 16})
    assert results.finish(trainer, None, 4, lambda: (tmp_path / "masks.zip").touch()) == 0
    assert (tmp_path / "masks.zip").is_file()
    assert results.finish(trainer, None, 4, lambda: 1 / 0) == 1


@pytest.mark.parametrize("arguments", [FinetuneArguments, DetectionArguments, ClassificationArguments])
def test_splits_of_all_fine_tunings_are_read_alike(arguments):
    args = arguments(data={"a": 1}, data_root="there", eval_split="", test_split="")
    assert (args.eval_split, args.test_split, args.data) == (None, None, {"a": 1, "root": "there"})
    with pytest.raises(ValueError, match="'val' is the test's"):
        arguments(data={"a": 1}, eval_split="val", test_split="val")
    with pytest.raises(ValueError, match="data"):
        arguments()


def test_another_schedule_is_told_where_a_run_goes_on_and_one_that_is_not_in_use_is_none(tmp_path, caplog):
    trainer = make_trainer(tmp_path, "pyramid", {"pyramid_channels": 16})
    trainer.train_dataset = []
    settings = trainer.run_settings()
    names = {"lr_scheduler_kwargs", "optim_args", "label_smoothing_factor", "neftune_noise_alpha"}
    assert {name for name in names if settings["free"][name] is None} == names
    older = settings | {"free": {name: value for name, value in settings["free"].items() if name not in names}}
    (tmp_path / "_saving" / "checkpoint-1").mkdir(parents=True)
    publish_checkpoint(tmp_path / "_saving" / "checkpoint-1", tmp_path / "checkpoint-1", older)
    check_settings(tmp_path / "checkpoint-1", settings)
    assert not caplog.records
    trainer.args.lr_scheduler_kwargs, trainer.args.neftune_noise_alpha = {"min_lr": 0.5}, 5.0
    check_settings(tmp_path / "checkpoint-1", trainer.run_settings())
    assert "lr_scheduler_kwargs was None and is {'min_lr': 0.5}; neftune_noise_alpha was None and is 5.0" in caplog.text


@pytest.mark.parametrize("arguments", [DenseTrainingArguments, DetectionTrainingArguments])
def test_smoothed_labels_are_refused_where_classes_are_not_of_images(arguments, tmp_path):
    with pytest.raises(ValueError, match="label_smoothing_factor is for classes of images"):
        arguments(output_dir=str(tmp_path), label_smoothing_factor=0.1)
