"""Settings of `vitp adapt` that are checked before anything is trained."""

import json
import os
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow.parquet as pq
import pytest
import rasterio
import yaml
from classification_data import write_folders
from detection_data import write_coco, write_dota, write_voc
from paths import ROOT
from pictures import write_bands
from PIL import Image
from prepared_folders import write_rsar
from tiny_models import TEXT
from vision_families import MEAN, save_vit

from modeling_vitp import adapt
from modeling_vitp.adaptation import adapt as adapting
from modeling_vitp.adaptation import comparison, labels
from modeling_vitp.adaptation.adapt import Adaptation
from modeling_vitp.adaptation.arguments import AdaptArguments
from modeling_vitp.adaptation.comparison import Comparison
from modeling_vitp.adaptation.labels import labels_of, num_windows, read_labels
from modeling_vitp.adaptation.plan import Costs
from modeling_vitp.command.errors import TrainingDiverged
from modeling_vitp.evaluation import vlm
from modeling_vitp.evaluation.comparison import Progress
from modeling_vitp.images.reading import has_8_bits
from modeling_vitp.pretraining.plan import config_of_start
from modeling_vitp.tasks.detection.data import DetectionData

FROM_SCRATCH = {
    "vocab_size": 300,
    "vision_config": {"image_size": [32, 32], "patch_size": [8, 8]},
    "text_config": {"hidden_size": 48},
}
QUICKSTART = str(ROOT / "space" / "quickstart")


def adaptation(folder: Path, **settings) -> Adaptation:
    defaults = {"data": str(folder / "data"), "output_dir": str(folder / "out")}
    return Adaptation(AdaptArguments(**defaults | {"pretraining": {"from_scratch": FROM_SCRATCH}} | settings))


@pytest.fixture
def no_labels(monkeypatch):
    """Give the pretraining the instructions as its data, for tests without labels."""
    monkeypatch.setattr(Adaptation, "pretraining_data", lambda found: {"dataset_name": found.instructions})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"baselines": ["randm"]}, "baselines: 'randm' not found"),
        ({"start": "dinov2"}, "start: 'dinov2' not found"),
        ({"output_dir": "data/out"}, "must not contain each other"),
        ({"output_dir": "."}, "must not contain each other"),
        ({"fine_tuning": {"learning_rate": 1e-3}}, "fine_tuning must not set learning_rate: set learning_rates"),
        ({"fine_tuning": {"num_train_epochs": 3}}, "fine_tuning must not set num_train_epochs: set fine_tuning_steps"),
        ({"pretraining": {"num_train_epochs": 3}}, "pretraining must not set num_train_epochs: set steps"),
        ({"language_model": "a/b"}, "language_model .*'a/b'"),
        ({"start": QUICKSTART, "language_model": "a/b"}, "language_model .*'a/b'"),
        ({"pretraining": {"from_scratch": {"vision_config": {}}}}, "from_scratch: text_config and vocab_size missing"),
        ({"fine_tuning": {"test_split": "val"}}, "fine_tuning must not set test_split: set data"),
        ({"fine_tuning": {"eval_split": "test"}}, "fine_tuning must not set eval_split: set data"),
        ({"fine_tuning": {"report_to": "wandb"}}, "fine_tuning must not set report_to: remove"),
        ({"pretraining": {"max_steps": 10}}, "pretraining must not set max_steps: set steps"),
        ({"pretraining": {"mixture": {"a": {}}}}, "pretraining must not set mixture: set instructions"),
        ({"start": QUICKSTART, "pretraining": {"language_model": "a"}}, "must not set language_model: set language_m"),
        ({"pretraining": {"probe_data": "loveda"}}, "pretraining must not set probe_data: remove"),
    ],
)
def test_wrong_setting_is_reported_before_the_labels(tmp_path, monkeypatch, settings, message):
    (tmp_path / "data").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=message):
        adapt("data", **{"output_dir": "out", "pretraining": {"from_scratch": FROM_SCRATCH}} | settings)
    assert os.listdir() == ["data"]


@pytest.mark.parametrize("is_frozen", [False, True])
def test_frozen_projector_has_no_learning_rate(tmp_path, is_frozen, no_labels):
    save_vit(tmp_path / "vit", "dinov2")
    found = adaptation(tmp_path, start=str(tmp_path / "vit"), pretraining={"freeze_projector": is_frozen})
    assert ("projector_learning_rate" in found.pretraining_settings()) != is_frozen


@pytest.mark.parametrize(
    ("settings", "batch"),
    [({}, 2), ({"gradient_accumulation_steps": 2}, 4), ({"global_batch_size": 8}, 8)],
)
def test_fine_tuning_has_at_most_50_epochs(tmp_path, settings, batch):
    found = adaptation(tmp_path, fine_tuning={"per_device_train_batch_size": 2} | settings)
    write_folders(tmp_path / "data", {"": 20}, ("field", "forest"))
    found.labels = read_labels(tmp_path / "data", tmp_path / "out" / "splits")
    plan = found.choose_plan({"rows": 100, "settings": {"global_batch_size": 10}}, Costs(1e-3, 1e-3, 0.0))
    images = len(found.labels.images["train"])
    assert images > 8 and (plan["steps"], plan["fine_tuning_steps"]) == (20 * 10, 50 * (images // batch))


def test_settings_of_the_trainings_are_checked_before_questions_are_made(tmp_path, monkeypatch):
    monkeypatch.setattr(adapting, "run_command", None)
    write_folders(tmp_path / "data", {"": 6}, ("field", "forest"))
    with pytest.raises(ValueError, match="fine_tuning: unknown option 'foo'.*finetune_classification --help_all"):
        adaptation(tmp_path, fine_tuning={"foo": 1}).run()
    with pytest.raises(ValueError, match="pretraining: unknown option 'foo'.*pretrain --help_all"):
        adaptation(tmp_path, pretraining={"from_scratch": FROM_SCRATCH, "foo": 1}).run()
    save_vit(tmp_path / "vit", "dinov2")
    with pytest.raises(ValueError, match="language_model='lm'"):
        adaptation(tmp_path, start=str(tmp_path / "vit"), language_model="lm", pretraining=None).run()


def test_missing_package_of_the_controls_is_reported_before_the_checks(tmp_path, monkeypatch):
    """Answers of more than six words are scored as captions."""
    write_folders(tmp_path / "data", {"": 6}, ("field", "forest"))
    monkeypatch.setattr(vlm, "answer_kind", lambda question, answer: "caption")
    monkeypatch.setitem(sys.modules, "pycocoevalcap", None)
    found = adaptation(tmp_path, pretraining={"from_scratch": FROM_SCRATCH, "bf16": False})
    monkeypatch.setattr(found, "check_instructions", None)
    with pytest.raises(ModuleNotFoundError, match="pycocoevalcap"):
        found.run()


def test_controls_of_boxes_ask_for_no_captions(tmp_path):
    """In training, a box is described as `a cargo ship, the largest of 2`."""
    write_dota(tmp_path / "data", [f"s{scene}_{tile:03}" for scene in range(10) for tile in range(3)])
    for path in (tmp_path / "data" / "annfiles").iterdir():
        path.write_text("4 4 24 4 24 24 4 24 ship 0\n50 10 58 10 58 18 50 18 ship 0\n60 50 90 50 90 75 60 75 plane 0\n")
    found = adaptation(tmp_path, class_names={"ship": "cargo ship"})
    found.labels = read_labels(tmp_path / "data", tmp_path / "out" / "splits")
    scored = {}
    for split in ("train", "test"):
        found.make_instructions(split)
        arguments = found.control_settings() | {"dataset_name": str(tmp_path / "out" / "instructions" / split)}
        scored[split] = {question.kind for question in vlm.choose_questions(vlm.VLMArguments(**arguments))[1]}
    kinds = {"vqa", "count", "grounding", "map", "fine_map"}
    assert scored == {"train": {"caption", *kinds}, "test": kinds}


def test_phrase_of_an_unknown_class_is_an_error(tmp_path):
    found = adaptation(tmp_path, class_names={"class 9": "a tree"})
    found.labels = SimpleNamespace(task="segmentation", data={"classes": [{"name": "class 1", "value": 1}]})
    with pytest.raises(ValueError, match="class_names: class 'class 9' not found. Classes: class 1."):
        found.phrases()


@pytest.mark.parametrize("is_deep", [False, True])  # collages need 8 bits
def test_ignored_value_of_masks_is_in_no_question(tmp_path, is_deep):
    for index in range(8):
        mask = np.full((64, 64), 255 * (index % 2), np.uint8)
        mask[: 8 * index + 8, :32] = 1
        mask[:8, 40:] = 0
        for name, pixels in (("images", 20 * index + mask % 13), ("masks", mask)):
            (tmp_path / "data" / name).mkdir(parents=True, exist_ok=True)
            dtype = np.uint16 if name == "images" and is_deep else np.uint8
            Image.fromarray(pixels.astype(dtype)).save(tmp_path / "data" / name / f"{index}.png")
    found = adaptation(tmp_path)
    found.labels = read_labels(tmp_path / "data", tmp_path / "out" / "splits")
    assert found.phrases() == {"255": None, "0": None, "1": "class 1"}
    found.make_instructions("train")


def test_black_of_color_masks_is_background(tmp_path):
    found = adaptation(tmp_path)
    colors = [{"name": "rest", "color": [0, 0, 0]}, {"name": "roof", "color": [255, 255, 255]}]
    found.labels = SimpleNamespace(task="segmentation", data={"classes": colors, "mask_encoding": "color"})
    assert found.phrases() == {"0,0,0": None, "255,255,255": "roof"}


def test_deep_and_four_band_images_have_no_collages(tmp_path):
    write_bands(tmp_path / "deep.png", np.zeros((3, 8, 8), np.uint16))
    write_bands(tmp_path / "four.tif", np.zeros((4, 8, 8), np.uint8))
    Image.new("RGB", (8, 8)).save(tmp_path / "colors.png")
    assert [has_8_bits(tmp_path / name) for name in ("deep.png", "four.tif", "colors.png")] == [False, False, True]


def test_names_of_backbones_are_unique(tmp_path):
    baselines = ["start", "mae", "a/backbone", "b/backbone", "c/a", "c/mae", "c/adapted", QUICKSTART]
    found = adaptation(tmp_path, start=QUICKSTART, baselines=baselines)
    found.progress.parts["start"] = {"seconds": 0.0, "result": ""}
    assert list(found.models) == ["adapted", "quickstart", "mae", "a", "b", "a-2", "mae-2", "adapted-2"]
    assert found.models["a-2"] == found.backbone("a-2", 0) == "c/a"


def test_start_on_the_hub_has_its_own_shape(tmp_path, hub, no_labels):
    save_vit(tmp_path / "vit", "dinov2")
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "config.json").write_text(json.dumps(TEXT | {"vocab_size": 300}))
    for name in ("vit", "text"):
        hub.api().create_repo(f"tester/{name}")
        hub.api().upload_folder(repo_id=f"tester/{name}", folder_path=tmp_path / name)
    found = adaptation(tmp_path, start="tester/vit", language_model="tester/text", pretraining={"bf16": False})
    Path(found.instructions).mkdir(parents=True)
    args, _, model_args = found.parse_pretraining({}, 1)
    config, assumed = config_of_start(args, model_args)
    image_processor, tokens = found.tiling(args, model_args)
    assert (config.vision_config.hidden_size, config.text_config.vocab_size, assumed) == (32, 300, "")
    assert (image_processor.size["height"], list(image_processor.image_mean), tokens) == (56, MEAN, 4)
    assert not [*(tmp_path / "home").rglob("*.safetensors")]


def test_probes_see_some_images_at_one_size(tmp_path, monkeypatch):
    """Published image processors of DINOv2 crop to 224 pixels, others do not."""
    write_rsar(tmp_path / "data")
    monkeypatch.setattr(adapting, "PROBED", 5)
    save_vit(tmp_path / "vit", "dinov2")
    found, probed = adaptation(tmp_path, start=str(tmp_path / "vit")), []
    file = tmp_path / "data" / "RSAR" / "train" / "annfiles" / "0000001.txt"
    file.write_text(file.read_text().partition("20 20")[0])
    found.labels = read_labels(tmp_path / "data", tmp_path / "out" / "splits")
    monkeypatch.setattr(adapting, "run_recipe", lambda *args: probed.append(args) or {"results": []})
    found.probe(["a", "b"], "test", tmp_path / "out" / "frozen")
    ((_, settings, _),) = probed
    assert settings["image_size"] == 56
    data = DetectionData.from_dict(settings["data"])
    images = {split: {place.image for place in data.open([split], "oriented").places} for split in ("train", "test")}
    assert [len(part) for part in images.values()] == [5, 4]
    assert images["train"] < {*found.labels.images["train"]} and images["test"] == {*found.labels.images["test"]}


def test_large_images_with_boxes_are_cut_in_all_stages(tmp_path, monkeypatch):
    monkeypatch.setattr(labels, "LARGE", 90)  # the images have 80 x 96 pixels
    monkeypatch.setattr(labels, "WINDOW", 64)
    monkeypatch.setattr(labels, "OVERLAP", 16)
    monkeypatch.setattr(adapting, "PROBED", 8)
    write_dota(tmp_path / "data", [f"site{index:03}" for index in range(12)])
    found, words = adaptation(tmp_path), []
    found.labels = read_labels(tmp_path / "data", tmp_path / "out" / "splits")
    assert [split["tile"] for split in found.labels.data["splits"].values()] == [{"size": 64, "overlap": 16}] * 3
    assert found.fine_tuning_settings()["image_size"] == 64
    data = DetectionData.from_dict(found.labels.data)
    whole = data.without_tiles().open(["train"], "oriented").places
    assert labels_of("detection", found.labels.data, "train", {"task": "oriented"}) == {
        place.image: {*place.objects.labels.tolist()} for place in whole
    }
    assert len(data.open(["train"], "oriented")) == num_windows(found.labels, "train") * len(whole)
    probed = DetectionData.from_dict(found.probed_data("test")).open(["train"], "oriented")
    assert len(probed) == 8 < len(data.open(["train"], "oriented"))
    monkeypatch.setattr(adapting, "run_command", lambda name, options, log: words.extend(options))
    found.make_instructions("train")
    assert words[words.index("--window") :][:4] == ["--window", "64", "--overlap", "16"]


def test_model_as_start_replaces_from_scratch(tmp_path, no_labels):
    settings = adaptation(tmp_path, start=QUICKSTART).pretraining_settings()
    assert settings["model_name_or_path"] == QUICKSTART and "from_scratch" not in settings


def test_settings_may_change_until_the_plan_is_kept(tmp_path, monkeypatch):
    (tmp_path / "data").mkdir()
    first = adaptation(tmp_path)
    first.check_settings()
    first.progress.result("instructions/train", int)
    (tmp_path / "out" / "splits").mkdir()
    other = adaptation(tmp_path, learning_rates=[1e-3])
    other.check_settings()
    assert not other.progress.parts and not (tmp_path / "out" / "splits").exists()
    other.progress.result("plan", int)
    with pytest.raises(ValueError, match="different learning_rates"):
        adaptation(tmp_path).check_settings()
    monkeypatch.chdir(tmp_path)
    adaptation(tmp_path, data="data/", learning_rates=[1e-3]).check_settings()  # the same folder


def test_labels_may_change_until_the_plan_is_kept(tmp_path):
    write_coco(tmp_path / "data", [f"site{index:03}" for index in range(12)])
    file = next((tmp_path / "data").rglob("*.json"))
    first = adaptation(tmp_path)
    read_labels(first.args.data, tmp_path / "out" / "splits")
    first.check_settings()
    first.progress.result("instructions/train", int)
    file.write_text(file.read_text().replace("plane", "tower"))
    second = adaptation(tmp_path)
    second.check_settings()
    assert not second.progress.parts and not (tmp_path / "out" / "splits").exists()
    second.progress.result("plan", int)
    adaptation(tmp_path).check_settings()
    next((tmp_path / "data").rglob("*.png")).unlink()
    with pytest.raises(ValueError, match="different labels"):
        adaptation(tmp_path).check_settings()
    shutil.rmtree(tmp_path / "data")
    with pytest.raises(ValueError, match="data of the labels not found"):
        adaptation(tmp_path).check_settings()


def test_instructions_may_change_until_the_plan_is_kept(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "images").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "images" / "0.png")
    turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "a tree"}]
    (tmp_path / "rows.jsonl").write_text(json.dumps({"image": "0.png", "conversations": turns}) + "\n")
    source = {"name": "own", "annotation": "rows.jsonl", "image_root": "images"}
    (tmp_path / "mixture.yaml").write_text(yaml.safe_dump({"root": str(tmp_path), "sources": [source]}))
    settings = {"instructions": str(tmp_path / "mixture.yaml")}
    first = adaptation(tmp_path, **settings)
    first.check_settings()
    first.progress.result("checks", int)
    adaptation(tmp_path, **settings).check_settings()
    assert Progress(first.progress.path).parts
    Image.new("RGB", (9, 9)).save(tmp_path / "images" / "0.png")
    second = adaptation(tmp_path, **settings)
    second.check_settings()
    assert not second.progress.parts
    second.progress.result("plan", int)
    with (tmp_path / "rows.jsonl").open("a") as file:
        file.write(json.dumps({"image": "0.png", "conversations": turns}) + "\n")
    with pytest.raises(ValueError, match="different files of instructions"):
        adaptation(tmp_path, **settings).check_settings()


def test_instructions_use_the_annotations_of_the_configuration(tmp_path):
    """DIOR has two folders of annotations, of which only the oriented ones have capitalized classes."""
    names = [f"site_{index:03}" for index in range(12)]
    for is_oriented in (False, True):
        write_voc(tmp_path / "data", names, is_oriented)
    for split, part in (("train", names[:8]), ("test", names[8:])):
        (tmp_path / "data" / f"{split}.txt").write_text("\n".join(part))
    files = {"images": "images", "annotations": "Annotations/Oriented Bounding Boxes"}
    splits = {split: files | {"list": f"{split}.txt"} for split in ("train", "test")}
    data = {"root": str(tmp_path / "data"), "format": "voc", "splits": splits}
    data |= {"classes": ["ship"], "leave_out": ["plane", "tower"]}
    config = tmp_path / "boxes.yaml"
    config.write_text(yaml.safe_dump({"task": "oriented", "data": data}))
    found = adaptation(tmp_path, data=str(config))
    found.labels = read_labels(config, tmp_path / "out" / "splits")
    for split in ("train", "test"):
        found.make_instructions(split)
        (file,) = (tmp_path / "out" / "instructions" / split).glob("*.parquet")
        text = str(pq.read_table(file, columns=["messages"]).to_pylist()).lower()
        assert "ship" in text and "plane" not in text


def test_checks_read_images_as_the_pretraining(tmp_path, monkeypatch, no_labels):
    spec = {"bands": [4, 1, 0]}
    for index in range(2):
        bands = np.random.default_rng(index).integers(0, 256, (5, 40, 40), dtype=np.uint8)
        with rasterio.open(tmp_path / f"{index}.tif", "w", "GTiff", 40, 40, 5, dtype="uint8") as file:
            file.write(bands)
    found = adaptation(tmp_path, pretraining={"from_scratch": FROM_SCRATCH, "input_spec": spec, "bf16": False})
    found.labels = SimpleNamespace(images={"test": [tmp_path / "0.tif", tmp_path / "1.tif"]})
    monkeypatch.setattr(adapting, "load_sources", lambda name: None)
    monkeypatch.setattr(os, "cpu_count", lambda: 0)
    Path(found.instructions).mkdir(parents=True)
    seen = {}

    def validate(mixture, workers, **options):
        seen.update(options)
        raise KeyboardInterrupt

    monkeypatch.setattr(adapting, "validate", validate)
    with pytest.raises(KeyboardInterrupt):
        found.check_instructions()
    assert seen["input_spec"] == spec and seen["test_images"].spec.bands == (4, 1, 0)


@pytest.mark.parametrize("scenes", [1, 2])
def test_test_images_of_one_scene_are_a_problem(tmp_path, monkeypatch, scenes, no_labels):
    found = adaptation(tmp_path, pretraining={"from_scratch": FROM_SCRATCH, "bf16": False})
    found.labels = SimpleNamespace(images={"test": [tmp_path / "0.png", tmp_path / "1.png"]}, test_scenes=scenes)
    Path(found.instructions).mkdir(parents=True)
    monkeypatch.setattr(adapting, "load_sources", lambda name: SimpleNamespace(sources=[]))
    monkeypatch.setattr(adapting, "TestImages", lambda *args: None)
    monkeypatch.setattr(adapting, "validate", lambda *args, **options: [])
    monkeypatch.setattr(adapting, "check_answer_priors", lambda *args: "")
    problems = found.check_instructions()["problems"]
    assert any("one scene" in problem for problem in problems) == (scenes == 1)


def test_small_label_fractions_have_a_folder_each():
    runs = Comparison(None, {}, 1, [1e-3], Path("runs"), None)
    assert len({runs.run_folder("a", 1e-3, 0, fraction) for fraction in (0.001, 0.002, 0.1, 0.101, 1.0)}) == 5


def test_batch_is_not_larger_than_the_fraction_of_the_labels(tmp_path, monkeypatch):
    write_folders(tmp_path / "data", {"": 12}, ("field", "forest"))
    labels, settings = read_labels(tmp_path / "data", tmp_path / "out" / "splits"), {"per_device_train_batch_size": 8}
    runs = Comparison(labels, settings, 1, [1e-3], tmp_path / "runs", Progress(tmp_path / "progress.json"))
    batches = []

    def run_recipe(name, settings, folder):
        batches.append(settings["per_device_train_batch_size"])
        return {"main_score": "accuracy", "greater_is_better": True, "eval": {"eval_accuracy": 1.0}}

    monkeypatch.setattr(comparison, "run_recipe", run_recipe)
    for fraction in (1.0, 0.5, 0.2, 0.01):
        runs.fine_tune("a", "backbone", 1e-3, 0, fraction)
    assert batches == [8, 8, 3, 1]


def test_learning_rate_that_diverges_is_left_out(tmp_path, monkeypatch):
    write_folders(tmp_path / "data", {"": 6}, ("field", "forest"))
    labels, settings = read_labels(tmp_path / "data", tmp_path / "splits"), {"per_device_train_batch_size": 4}
    runs = Comparison(labels, settings, 1, [1e-4, 3e-4, 9.0], tmp_path / "runs", Progress(tmp_path / "progress.json"))

    tried = []

    def run_recipe(name, settings, folder):
        tried.append(settings["learning_rate"])
        if settings["learning_rate"] > 1 or "all" in settings["model_name_or_path"]:
            raise TrainingDiverged("Step 1 is not finite.")
        scores = {"eval_accuracy": settings["learning_rate"]}
        return {"main_score": "accuracy", "greater_is_better": True, "eval": scores}

    monkeypatch.setattr(comparison, "run_recipe", run_recipe)
    assert runs.choose_rate("a", "backbone", 0) == 3e-4
    runs.progress = Progress(tmp_path / "progress.json")  # of a resumed run
    assert runs.choose_rate("a", "backbone", 0) == 3e-4 and tried == runs.learning_rates
    with pytest.raises(TrainingDiverged, match="fine-tuning of b diverges with each of `learning_rates`: Step 1"):
        runs.choose_rate("b", "all", 0)
    assert len(tried) == 6
    with pytest.raises(TrainingDiverged, match="Step 1"):
        runs.score("b", "all", 9.0, 0)  # recorded, not run again
    assert len(tried) == 6


def test_learning_rate_has_lowest_error_rate(tmp_path, monkeypatch):
    write_folders(tmp_path / "data", {"": 6}, ("field", "forest"))
    labels, settings = read_labels(tmp_path / "data", tmp_path / "splits"), {"per_device_train_batch_size": 4}
    runs = Comparison(labels, settings, 1, [1e-4, 3e-4, 1e-3], tmp_path / "runs", Progress(tmp_path / "progress.json"))
    errors = {1e-4: 0.3, 3e-4: 0.2, 1e-3: 0.4}

    def run_recipe(name, settings, folder):
        metrics = {"main_score": "error_rate", "greater_is_better": False}
        if not settings.get("do_train", True):
            return metrics | {"test": {"test_error_rate": 0.25}, "test_resampled": [0.2, 0.3], "test_cases": 2}
        return metrics | {"eval": {"eval_error_rate": errors[settings["learning_rate"]]}}

    monkeypatch.setattr(comparison, "run_recipe", run_recipe)
    assert runs.choose_rate("a", "backbone", 0) == 3e-4
    runs.progress = Progress(tmp_path / "progress.json")  # of a resumed run
    assert runs.choose_rate("a", "backbone", 0) == 3e-4
    scored = runs.score("a", "backbone", 3e-4, 0)
    assert scored["metric"] == "error_rate" and not scored["greater_is_better"]


def test_seed_that_diverges_is_left_out(tmp_path, monkeypatch):
    adaptation = Adaptation(AdaptArguments(data="data", start="vit", output_dir=str(tmp_path), label_fractions=[0.1]))
    adaptation.plan = {"seeds": [0, 1]}

    def score(model, backbone, rate, seed, fraction, is_kept):
        if (model, seed, fraction) in bad:
            raise TrainingDiverged("Step 1 is not finite.")
        return {"model": model, "seed": seed, "labels": fraction}

    monkeypatch.setattr(Adaptation, "models", {"a": "", "b": ""})
    monkeypatch.setattr(Adaptation, "backbone", lambda self, model, seed: model)
    monkeypatch.setattr(Adaptation, "comparison", SimpleNamespace(choose_rate=lambda *args: 1e-4, score=score))
    bad = [("a", 1, 0.1), ("b", 1, 1.0)]
    scored = [(run["model"], run["seed"], run["labels"]) for run in adaptation.fine_tune_backbones()]
    assert scored == [("a", 0, 1.0), ("a", 1, 1.0), ("a", 0, 0.1), ("b", 0, 1.0), ("b", 0, 0.1), ("b", 1, 0.1)]
    assert [text.split(" is left out")[0] for text in adaptation.diverged] == [
        "a with seed 1 and 10% of the labels",
        "b with seed 1",
    ]
    bad = [("a", 0, 1.0)]
    with pytest.raises(TrainingDiverged):
        adaptation.fine_tune_backbones()


def test_forgotten_part_runs_again(tmp_path):
    progress = Progress(tmp_path / "progress.json")
    progress.result("checks", lambda: 1)
    progress.forget("checks")
    assert Progress(tmp_path / "progress.json").result("checks", lambda: 2) == 2


def test_several_processes_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(adapting, "PartialState", lambda: SimpleNamespace(num_processes=2))
    with pytest.raises(ValueError, match="one process, got 2.*accelerate launch"):
        adapt(tmp_path / "data", start="vit", output_dir=tmp_path / "out")
    assert not (tmp_path / "out").exists()
