"""Tests of distillation with tiny teachers and students on generated images."""

import json
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from launching import finish, launch, start_program
from pictures import picture, write_bands
from PIL import Image
from safetensors.torch import load_file
from torch.nn import functional as F
from transformers import AutoImageProcessor, AutoModel, BertConfig, Dinov2Model
from vision_families import FAMILIES, MEAN, NAMES, SHAPE, SIZE, STD, save_vit

from modeling_vitp import ViTPImageProcessor, ViTPVisionConfig, ViTPVisionModel, export_backbone
from modeling_vitp.pretraining.distillation import (
    DistillationArguments,
    ImageFiles,
    ViTPDistillationConfig,
    ViTPDistillationTrainer,
    load_student,
    load_teacher,
)
from modeling_vitp.recipes.distill import main

TINY = SHAPE | SIZE | {"num_hidden_layers": 2, "intermediate_size": 48}
OPTIONS = {
    "per_device_train_batch_size": 4,
    "max_steps": 4,
    "logging_steps": 1,
    "report_to": "none",
    "bf16": False,
    "use_cpu": True,
    "watch_samples": 0,
    "disable_tqdm": True,
    "save_strategy": "no",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Return a folder with a teacher of patches of 14 pixels, seven images, and three that are held out."""
    folder = tmp_path_factory.mktemp("distillation")
    save_vit(folder / "teacher", "dinov2")
    for index in range(7):
        path = folder / "images" / f"{index % 2}" / f"{index}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        picture(60 + index, 70, index).save(path)
    (folder / "held_out").mkdir()
    for index in range(3):
        picture(60, 70, 10 + index).save(folder / "held_out" / f"{index}.png")
    return folder


def make_trainer(folder: Path, output_dir: Path, images="images", teacher="teacher", **options):
    args = ViTPDistillationConfig(str(output_dir), **OPTIONS | options)
    vit, processor = load_teacher(str(folder / teacher))
    torch.manual_seed(args.seed)
    wanted = DistillationArguments(teacher=str(folder / teacher), student_config=TINY, data=[str(folder / images)])
    data = ImageFiles(wanted.data, processor.input_spec)
    student = load_student(wanted, vit, processor)
    return ViTPDistillationTrainer(student, vit, args, data, data, processing_class=processor)


def command(folder: Path, output_dir: Path, **options) -> list[str]:
    options = OPTIONS | {"teacher": folder / "teacher", "data": folder / "images", "output_dir": output_dir} | options
    options = {"student_config": json.dumps(TINY)} | options
    return [word for name, value in options.items() if value is not None for word in (f"--{name}", str(value))]


def by_hand(trainer, teacher_folder: Path, pixels: torch.Tensor) -> tuple[float, float]:
    """Return loss and cosine similarity of a batch of 70 x 70 pixels, patch by patch."""
    teacher = Dinov2Model.from_pretrained(teacher_folder).eval()
    student, projection = trainer.distiller.student, trainer.distiller.projection
    mean, variance = trainer.distiller.mean.double(), trainer.distiller.variance.double()
    small = F.interpolate(pixels, (64, 64), mode="bicubic", antialias=True)
    losses, cosines = [], []
    with torch.no_grad():
        states = student(small).last_hidden_state[:, 1:]
        features = teacher(pixels).last_hidden_state[:, 1:]
        maps = features.transpose(1, 2).reshape(len(pixels), -1, 5, 5)
        maps = F.interpolate(maps, (4, 4), mode="bilinear", antialias=True)
        for image in range(len(pixels)):
            for row in range(4):
                for column in range(4):
                    p = (projection.weight @ states[image, 4 * row + column] + projection.bias).double()
                    t = (maps[image, :, row, column].double() - mean) / (variance + 1e-6).sqrt()
                    cosines.append((p @ t / (p.norm() * t.norm())).item())
                    gap = (p - t).abs()
                    losses.append(1 - cosines[-1] + torch.where(gap < 1, gap**2 / 2, gap - 0.5).mean().item())
    return float(np.mean(losses)), float(np.mean(cosines))


def test_loss_equals_loops_and_teacher_is_frozen(folder, tmp_path):
    trainer = make_trainer(folder, tmp_path / "run", max_steps=2)
    before = {name: weight.clone() for name, weight in trainer.teacher.state_dict().items()}
    start = {name: weight.clone() for name, weight in trainer.distiller.named_parameters()}
    trainer.train()
    assert all(torch.equal(weight, before[name]) for name, weight in trainer.teacher.state_dict().items())
    for name, weight in trainer.distiller.named_parameters():
        assert not name.endswith("weight") or not torch.equal(weight, start[name]), name
    assert all(weight.grad is None and not weight.requires_grad for weight in trainer.teacher.parameters())
    assert not trainer.teacher.training

    trainer.model.eval()
    batch = next(iter(trainer.get_train_dataloader()))
    pixels = batch["pixel_values"]
    assert pixels.shape == (4, 3, 70, 70)  # whole patches of the teacher for images of 64 pixels
    loss = trainer.compute_loss(trainer.model, {"pixel_values": pixels})
    assert loss.item() == pytest.approx(by_hand(trainer, folder / "teacher", pixels)[0], rel=1e-5)

    metrics = trainer.evaluate()
    processor = AutoImageProcessor.from_pretrained(folder / "teacher", do_center_crop=False)
    images = [Image.open(path) for path in sorted((folder / "images").rglob("*.png"))]
    whole = processor(images, size={"height": 70, "width": 70}, return_tensors="pt")["pixel_values"]
    loss, cosine = by_hand(trainer, folder / "teacher", whole)
    assert metrics["eval_loss"] == pytest.approx(loss, rel=1e-3)
    assert metrics["eval_cosine"] == pytest.approx(cosine, abs=1e-3)


def test_statistics_are_those_of_all_patches(folder, tmp_path):
    trainer = make_trainer(folder, tmp_path / "run")
    trainer.measure_teacher()
    pixels = torch.stack([trainer.train_dataset[(0, index)]["pixel_values"] for index in range(7)])
    with torch.no_grad():
        tokens = Dinov2Model.from_pretrained(folder / "teacher").eval()(pixels).last_hidden_state[:, 1:].flatten(0, 1)
    torch.testing.assert_close(trainer.distiller.mean, tokens.mean(0), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(trainer.distiller.variance, tokens.var(0, correction=0), rtol=1e-4, atol=1e-5)


def test_recipe_exports_the_trained_student(folder, tmp_path):
    options = {"max_steps": 2, "save_strategy": "steps", "save_steps": 2, "watch_samples": 2}
    options |= {"eval_data": folder / "held_out", "eval_strategy": "steps", "eval_steps": 2}
    assert main(command(folder, tmp_path / "out", **options)) == 0
    backbone, checkpoint = tmp_path / "out" / "backbone", tmp_path / "out" / "checkpoint-2"
    trained = {
        name.removeprefix("student."): weight
        for name, weight in load_file(checkpoint / "model.safetensors").items()
        if name.startswith("student.")
    }
    student = ViTPVisionModel(ViTPVisionConfig(**TINY)).eval()
    student.load_state_dict(trained)
    opened, processor = AutoModel.from_pretrained(backbone).eval(), AutoImageProcessor.from_pretrained(backbone)
    assert opened.state_dict().keys() == trained.keys()
    assert [*processor.image_mean, *processor.image_std] == [*MEAN, *STD] and processor.size["height"] == 64
    pixels = processor(picture(90, 64), return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        assert torch.equal(opened(pixels).last_hidden_state, student(pixels).last_hidden_state)
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert -1 <= metrics["eval"]["eval_cosine"] <= 1 and metrics["train"]["train_loss"] > 0
    assert Image.open(tmp_path / "out" / "watch" / "step-000002.png").size[0] > 300
    card = (backbone / "README.md").read_text()
    assert "istilled from" in card and "pretrained with" not in card and "Initialized" not in card


def test_resumed_run_equals_undisturbed_run(folder, tmp_path):
    options = {"save_strategy": "steps", "save_steps": 3, "gradient_accumulation_steps": 2}
    options["per_device_train_batch_size"] = 2
    options["student_config"] = json.dumps(TINY | {"drop_path_rate": 0.3})
    assert main(command(folder, tmp_path / "whole", **options)) == 0
    shutil.copytree(tmp_path / "whole" / "checkpoint-3", tmp_path / "stopped" / "checkpoint-3")
    assert main(command(folder, tmp_path / "stopped", **options, watch_samples=1)) == 0
    assert_same_weights(tmp_path / "whole", tmp_path / "stopped")
    with pytest.raises(ValueError, match="crop_area"):
        main(command(folder, tmp_path / "stopped", **options, vertical_flip=0.5) + ["--crop_area", "0.9", "1.0"])
    save_vit(tmp_path / "teacher", "dinov2_with_registers")
    with pytest.raises(ValueError, match="teacher"):
        main(command(folder, tmp_path / "stopped", **options | {"teacher": tmp_path / "teacher"}))


def test_removal_of_an_image_is_refused(folder, tmp_path):
    shutil.copytree(folder / "images", tmp_path / "images")
    options = {"images": tmp_path / "images", "save_strategy": "steps", "save_steps": 1}
    make_trainer(folder, tmp_path / "run", **options, max_steps=1).train()
    (tmp_path / "images" / "0" / "0.png").unlink()
    with pytest.raises(ValueError, match="--allow_changed_data"):
        make_trainer(folder, tmp_path / "run", **options, max_steps=2).train_or_resume()


def assert_same_weights(first: Path, second: Path) -> None:
    first, second = (load_file(folder / "backbone" / "model.safetensors") for folder in (first, second))
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.slow
def test_killed_run_equals_undisturbed_run(folder, tmp_path):
    options = {"save_strategy": "steps", "save_steps": 2, "max_steps": 60, "dataloader_num_workers": 1}
    program = ["-m", "modeling_vitp.recipes.distill"]
    killed = start_program([*program, *command(folder, tmp_path / "killed", **options)], tmp_path / "log")
    while not list((tmp_path / "killed").glob("checkpoint-*/checkpoint.json")):
        assert killed.is_alive(), (tmp_path / "log").read_text()
        time.sleep(0.02)
    killed.kill()
    killed.join()
    assert not (tmp_path / "killed" / "backbone").exists()
    for name in ("killed", "whole"):
        started = start_program([*program, *command(folder, tmp_path / name, **options)], tmp_path / "log")
        assert finish([started]) == [0], (tmp_path / "log").read_text()
    assert_same_weights(tmp_path / "whole", tmp_path / "killed")


@pytest.mark.slow
def test_two_processes_train_as_one(folder, tmp_path):
    options = {"global_batch_size": 4, "per_device_train_batch_size": 2, "eval_data": folder / "held_out"}
    options |= {"dataloader_drop_last": True, "optim": "sgd", "learning_rate": 0.1}  # Adam amplifies rounding
    assert main(command(folder, tmp_path / "one", **options)) == 0
    script = tmp_path / "run.py"
    script.write_text("import sys\nfrom modeling_vitp.recipes.distill import main\nsys.exit(main())\n")
    codes = launch(2, tmp_path / "log", str(script), *command(folder, tmp_path / "two", **options))
    assert codes == [0, 0], (tmp_path / "log").read_text()
    one, two = (load_file(tmp_path / name / "backbone" / "model.safetensors") for name in ("one", "two"))
    for name, weight in one.items():
        torch.testing.assert_close(two[name], weight, rtol=1e-3, atol=1e-5)
    one, two = (json.loads((tmp_path / name / "metrics.json").read_text())["eval"] for name in ("one", "two"))
    assert one["eval_cosine"] == pytest.approx(two["eval_cosine"], abs=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("family", NAMES)
def test_every_family_can_teach_and_learn(folder, tmp_path, family):
    save_vit(tmp_path / "vit", family)
    sizes = {"teacher": tmp_path / "vit", "student_config": tmp_path / "vit", "bf16": True}
    assert main(command(folder, tmp_path / "out", **sizes, activation_checkpointing=True)) == 0
    student = AutoModel.from_pretrained(tmp_path / "out" / "backbone")
    assert student.config.model_type == FAMILIES[family][1].model_type
    assert main(command(folder, tmp_path / "again", student=tmp_path / "out" / "backbone", student_config=None)) == 0


def test_student_is_float32_and_recorded_only_with_its_weights(folder, tmp_path):
    start, (teacher, processor) = str(tmp_path / "start"), load_teacher(str(folder / "teacher"))
    Dinov2Model.from_pretrained(folder / "teacher").bfloat16().save_pretrained(start)
    for options, name in (({"student": start}, "start"), ({"student_config": start}, None)):
        student = load_student(DistillationArguments(teacher=start, data=["images"], **options), teacher, processor)
        assert {weight.dtype for weight in student.parameters()} == {torch.float32}
        args, data = ViTPDistillationConfig(str(tmp_path), **OPTIONS), ImageFiles([str(folder / "images")], None)
        trainer = ViTPDistillationTrainer(student, teacher, args, data, processing_class=processor)
        assert trainer.run_settings()["free"]["student"] == name
    trainer.is_fsdp_enabled = True
    with pytest.raises(ValueError, match="FSDP"):
        trainer.train()
    assert trainer.state.global_step == 0


def test_default_student_has_the_sizes_of_the_teacher(folder):
    teacher, processor = load_teacher(str(folder / "teacher"))
    student = load_student(DistillationArguments(teacher="teacher", data=["images"]), teacher, processor)
    assert list(student.config.image_size) == [56, 56] and list(student.config.patch_size) == [14, 14]
    assert student.config.hidden_size == 384


def test_bands_of_the_teacher_are_those_of_the_student(folder, tmp_path):
    spec = {"band_names": ["red", "green", "blue", "nir"], "window": [0, 1000]}
    vit = ViTPVisionModel(ViTPVisionConfig(**TINY, band_names=spec["band_names"]))
    mean, std = [0.1, 0.2, 0.3, 0.4], [0.5, 0.6, 0.7, 0.8]
    processor = ViTPImageProcessor(input_spec=spec, image_mean=mean, image_std=std)
    export_backbone(vit, tmp_path / "teacher", processor)
    values = np.random.default_rng(0).integers(0, 1000, (4, 64, 64), dtype=np.uint16)
    write_bands(tmp_path / "images" / "0.tif", values)
    trainer = make_trainer(tmp_path, tmp_path / "run")
    unit = torch.from_numpy(values.astype(np.float32))[None] / 1000
    expected = (unit - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]
    pixels = next(iter(trainer.get_eval_dataloader()))["pixel_values"]
    torch.testing.assert_close(pixels, expected, atol=1e-4, rtol=1e-4)
    trainer.train()
    trainer.save_model()
    student = AutoImageProcessor.from_pretrained(tmp_path / "run" / "backbone")
    assert trainer.distiller.student.config.band_names == student.band_names == spec["band_names"]
    assert student.input_spec == processor.input_spec and list(student.image_mean) == mean
    arguments = command(tmp_path, tmp_path / "out", student=folder / "teacher", student_config=None)
    with pytest.raises(ValueError, match="the student takes red, green and blue"):
        main(arguments)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"teacher": "bert"}, "bert.*dinov2"),
        ({"teacher": "techer"}, "techer.*teacher"),
        ({"data": "empty"}, "empty"),
        ({"data": "broken"}, "broken/0.png"),
        ({"student_config": '{"model_type": "vit", "image_size": 32, "patch_size": 64}'}, "image_size.*patch_size"),
        ({"student_config": '{"hiden_size": 32}'}, "hiden_size.*hidden_size"),
        ({"student_config": '{"model_type": "bert"}'}, "bert.*dinov2"),
        ({"student": "teacher"}, "student_config"),
        ({"teacher_image_size": 64}, "teacher_image_size"),
        ({"eval_strategy": "steps"}, "eval_data"),
        ({"eval_data": "images"}, "images.* in both data and eval_data"),
    ],
)
def test_bad_input_is_refused(folder, tmp_path, monkeypatch, options, named):
    BertConfig().save_pretrained(tmp_path / "bert")
    for name in ("teacher", "images"):
        (tmp_path / name).symlink_to(folder / name)
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "0.png").write_bytes(b"no picture")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=named):
        main(command(Path(), tmp_path / "out", **options))


def write_scenes(folder: Path, number: int, seed: int) -> None:
    """Write images of colored ellipses and stripes."""
    rng = np.random.default_rng(seed)
    rows, columns = np.mgrid[:80, :80]
    folder.mkdir(parents=True)
    for index in range(number):
        pixels = np.ones((80, 80, 3)) * rng.uniform(0, 255, 3)
        for _ in range(5):
            center, radii = rng.uniform(0, 80, 2), rng.uniform(6, 30, 2)
            inside = ((rows - center[0]) / radii[0]) ** 2 + ((columns - center[1]) / radii[1]) ** 2 < 1
            stripes = np.sin((rows * rng.normal() + columns * rng.normal()) / 2)[..., None]
            pixels = np.where(inside[..., None], rng.uniform(0, 255, 3) + 60 * stripes, pixels)
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / f"{index}.png")


@torch.no_grad()
def similarity(trainer, is_constant: bool = False) -> float:
    """Return the mean cosine similarity to the teacher's features, not standardized, of held-out images."""
    model = trainer.distiller.eval()
    values = []
    for batch in trainer.get_eval_dataloader():
        maps = trainer.teacher_maps(batch["pixel_values"])
        mean = model.mean[:, None, None]
        scale = model.variance.sqrt()[:, None, None]
        target = F.interpolate(maps, (4, 4), mode="bilinear", antialias=True)
        small = F.interpolate(batch["pixel_values"], (64, 64), mode="bicubic", antialias=True)
        predicted = mean.expand_as(target) if is_constant else model.predict(small) * scale + mean
        values += F.cosine_similarity(predicted, target, dim=1).flatten(1).mean(1).tolist()
    return float(np.mean(values))


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1])
def test_student_learns_more_than_controls(folder, tmp_path, seed):
    """Compare with a projection of the frozen random student, and with the mean feature of the teacher."""
    write_scenes(tmp_path / "train", 96, seed)
    write_scenes(tmp_path / "held_out", 32, 100 + seed)
    similarities = {}
    for name in ("student", "frozen"):
        options = {"max_steps": 150, "per_device_train_batch_size": 16, "learning_rate": 3e-3, "seed": seed}
        trainer = make_trainer(folder, tmp_path / name, tmp_path / "train", **options)
        trainer.eval_dataset.samples = ImageFiles([tmp_path / "held_out"])
        trainer.distiller.student.requires_grad_(name == "student")
        trainer.train()
        similarities[name] = similarity(trainer)
        similarities[f"{name}, standardized"] = trainer.evaluate()["eval_cosine"]
    similarities["constant"] = similarity(trainer, is_constant=True)
    assert similarities["student"] > max(similarities["frozen"], similarities["constant"]) + 0.02
    assert similarities["student, standardized"] > similarities["frozen, standardized"] + 0.05
