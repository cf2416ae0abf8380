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
from modeling_vitp.adaptation import comparison, controls, labels, preparation, probing, runs
from modeling_vitp.adaptation.adapt import run_adaptation
from modeling_vitp.adaptation.arguments import AdaptArguments
from modeling_vitp.adaptation.backbones import Backbones, Start, open_start
from modeling_vitp.adaptation.comparison import Comparison, fine_tune_backbones, fine_tuning_settings
from modeling_vitp.adaptation.controls import check_instructions, control_settings
from modeling_vitp.adaptation.instructions import make_questions, question_options
from modeling_vitp.adaptation.labels import labels_of, num_windows, read_labels
from modeling_vitp.adaptation.plan import Costs, choose_plan
from modeling_vitp.adaptation.preparation import open_progress
from modeling_vitp.adaptation.pretraining import Pretraining
from modeling_vitp.adaptation.probing import Prober, probe_size
from modeling_vitp.command.errors import TrainingDiverged
from modeling_vitp.evaluation import vlm
from modeling_vitp.evaluation.comparison import Progress
from modeling_vitp.images.reading import has_8_bits
from modeling_vitp.pretraining.plan import config_of_start
from modeling_vitp.tasks import TASKS
from modeling_vitp.tasks.detection.data import DetectionData
from modeling_vitp.training.checkpointing import FolderLock

FROM_SCRATCH = {
    "vocab_size": 300,
    "vision_config": {"image_size": [32, 32], "patch_size": [8, 8]},
    "text_config": {"hidden_size": 48},
}
QUICKSTART = str(ROOT / "space" / "quickstart")


def arguments(folder: Path, **settings) -> AdaptArguments:
    defaults = {"data": str(folder / "data"), "output_dir": str(folder / "out")}
    return AdaptArguments(**defaults | {"pretraining": {"from_scratch": FROM_SCRATCH}} | settings)


def start_of(args: AdaptArguments) -> Start:
    folder = Path(args.output_dir)
    return open_start(args, folder, Progress(folder / "progress.json"))


def pretraining_of(args: AdaptArguments) -> Pretraining:
    """Return the pretraining on an empty folder of instructions."""
    folder = Path(args.output_dir)
    instructions = folder / "instructions"
    instructions.mkdir(parents=True)
    data = {"dataset_name": str(instructions)}
    return Pretraining(start_of(args), args.pretraining, data, str(instructions), args.seed, folder / "plan")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"baselines": ["randm"]}, "baselines: 'randm' not found"),
        ({"start": "dinov2"}, "start: 'dinov2' not found"),
        ({"output_dir": "data/out"}, "must not contain each other"),
        ({"output_dir": "."}, "must not contain each other"),
        ({"start": QUICKSTART, "language_model": "a/b"}, "language_model .*'a/b'"),
        ({"pretraining": {"from_scratch": {"vision_config": {}}}}, "from_scratch: text_config and vocab_size"),
        ({"fine_tuning": {"eval_split": "test"}}, "fine_tuning must not set eval_split"),
        ({"pretraining": {"max_steps": 10}}, "pretraining must not set max_steps"),
        ({"start": QUICKSTART, "pretraining": {"language_model": "a"}}, "must not set language_model"),
    ],
)
def test_wrong_setting_is_reported_before_the_labels(tmp_path, monkeypatch, settings, message):
    (tmp_path / "data").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=message):
        adapt("data", **{"output_dir": "out", "pretraining": {"from_scratch": FROM_SCRATCH}} | settings)
    assert os.listdir() == ["data"]


@pytest.mark.parametrize("is_frozen", [False, True])
def test_frozen_projector_has_no_learning_rate(tmp_path, is_frozen):
    save_vit(tmp_path / "vit", "dinov2")
    args = arguments(tmp_path, start=str(tmp_path / "vit"), pretraining={"freeze": ["projector"] if is_frozen else []})
    assert ("part_learning_rates" in pretraining_of(args).settings()) != is_frozen


@pytest.mark.parametrize(
    ("rates", "merged"),
    [
        ({"vision": 1e-5}, {"projector": 1e-3, "vision": 1e-5}),
        ({"vision": 1e-5, "projector": 2e-4}, {"projector": 2e-4, "vision": 1e-5}),
        (None, None),
    ],
)
def test_part_learning_rates_keep_that_of_a_new_projector(tmp_path, rates, merged):
    save_vit(tmp_path / "vit", "dinov2")
    args = arguments(tmp_path, start=str(tmp_path / "vit"), pretraining={"part_learning_rates": rates})
    assert pretraining_of(args).settings()["part_learning_rates"] == merged


@pytest.mark.parametrize(
    ("settings", "batch"),
    [({}, 2), ({"gradient_accumulation_steps": 2}, 4), ({"global_batch_size": 8}, 8)],
)
def test_fine_tuning_has_at_most_50_epochs(tmp_path, settings, batch):
    write_folders(tmp_path / "data", {"": 20}, ("field", "forest"))
    args = arguments(tmp_path, fine_tuning={"per_device_train_batch_size": 2} | settings)
    found = read_labels(tmp_path / "data", tmp_path / "splits")
    fine_tuning = fine_tuning_settings(found, start_of(args).config, args.fine_tuning)
    chosen = {"rows": 100, "settings": {"global_batch_size": 10}}
    plan = choose_plan(args, found, fine_tuning, 2, chosen, Costs(1e-3, 1e-3, 0.0))
    images = len(found.images["train"])
    assert images > 8 and (plan["steps"], plan["fine_tuning_steps"]) == (20 * 10, 50 * (images // batch))


def test_settings_of_the_trainings_are_checked_before_questions_are_made(tmp_path, monkeypatch):
    monkeypatch.setattr(runs, "logged", None)
    write_folders(tmp_path / "data", {"": 6}, ("field", "forest"))
    with pytest.raises(ValueError, match="fine_tuning: unknown option 'foo'"):
        run_adaptation(arguments(tmp_path, fine_tuning={"foo": 1}))
    with pytest.raises(ValueError, match="pretraining: unknown option 'foo'"):
        run_adaptation(arguments(tmp_path, pretraining={"from_scratch": FROM_SCRATCH, "foo": 1}))


def test_missing_package_of_the_controls_is_reported_before_the_checks(tmp_path, monkeypatch):
    """Answers of more than six words are scored as captions."""
    write_folders(tmp_path / "data", {"": 6}, ("field", "forest"))
    monkeypatch.setattr(vlm, "answer_kind", lambda question, answer: "caption")
    monkeypatch.setitem(sys.modules, "pycocoevalcap", None)
    monkeypatch.setattr(adapting, "check_instructions", None)
    with pytest.raises(ModuleNotFoundError, match="pycocoevalcap"):
        run_adaptation(arguments(tmp_path, pretraining={"from_scratch": FROM_SCRATCH, "bf16": False}))


def test_controls_of_boxes_ask_for_no_captions(tmp_path):
    """In training, a box is described as `a cargo ship, the largest of 2`."""
    write_dota(tmp_path / "data", [f"s{scene}_{tile:03}" for scene in range(10) for tile in range(2)])
    for path in (tmp_path / "data" / "annfiles").iterdir():
        path.write_text("4 4 24 4 24 24 4 24 ship 0\n50 10 58 10 58 18 50 18 ship 0\n60 50 90 50 90 75 60 75 plane 0\n")
    found = read_labels(tmp_path / "data", tmp_path / "splits")
    scored = {}
    for split in ("train", "test"):
        make_questions(found, split, {"ship": "cargo ship"}, tmp_path / split, 0)
        asked = vlm.VLMArguments(**control_settings(tmp_path, tmp_path / split))
        scored[split] = {question.kind for question in vlm.choose_questions(asked)[1]}
    kinds = {"vqa", "count", "grounding", "map", "fine_map"}
    assert scored == {"train": {"caption", *kinds}, "test": kinds}


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
    found = read_labels(tmp_path / "data", tmp_path / "splits")
    options = question_options(found, "train", {})
    assert options["names"] == {"255": None, "0": None, "1": "class 1"} and ("collages" in options) != is_deep
    make_questions(found, "train", {}, tmp_path / "out", 0)


def test_black_of_color_masks_is_background():
    colors = [{"name": "rest", "color": [0, 0, 0]}, {"name": "roof", "color": [255, 255, 255]}]
    data = {"classes": colors, "mask_encoding": "color"}
    assert TASKS["segmentation"].phrases({}, data) == {"0,0,0": None, "255,255,255": "roof"}
    with pytest.raises(ValueError, match="'wall'"):
        TASKS["segmentation"].phrases({"wall": "a wall"}, data)


def test_deep_and_four_band_images_have_no_collages(tmp_path):
    write_bands(tmp_path / "deep.png", np.zeros((3, 8, 8), np.uint16))
    write_bands(tmp_path / "four.tif", np.zeros((4, 8, 8), np.uint8))
    Image.new("RGB", (8, 8)).save(tmp_path / "colors.png")
    assert [has_8_bits(tmp_path / name) for name in ("deep.png", "four.tif", "colors.png")] == [False, False, True]


def test_model_as_start_replaces_from_scratch(tmp_path):
    settings = pretraining_of(arguments(tmp_path, start=QUICKSTART)).settings()
    assert settings["model_name_or_path"] == QUICKSTART and "from_scratch" not in settings


def test_names_of_backbones_are_unique(tmp_path):
    baselines = ["start", "mae", "a/backbone", "b/backbone", "c/a", "c/mae", "c/adapted", QUICKSTART]
    args = arguments(tmp_path, start=QUICKSTART, baselines=baselines)
    progress = Progress(tmp_path / "progress.json")
    progress.parts["start"] = {"seconds": 0.0, "result": ""}
    found = Backbones(args, open_start(args, tmp_path, progress), tmp_path, progress)
    assert list(found.models) == ["adapted", "quickstart", "mae", "a", "b", "a-2", "mae-2", "adapted-2"]
    assert found.models["a-2"] == found.path("a-2", 0) == "c/a"
    assert found.path("quickstart", 0) == str(tmp_path / "start")


def test_start_on_the_hub_has_its_own_shape(tmp_path, hub):
    save_vit(tmp_path / "vit", "dinov2")
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "config.json").write_text(json.dumps(TEXT | {"vocab_size": 300}))
    for name in ("vit", "text"):
        hub.api().create_repo(f"tester/{name}")
        hub.api().upload_folder(repo_id=f"tester/{name}", folder_path=tmp_path / name)
    args = arguments(tmp_path, start="tester/vit", language_model="tester/text", pretraining={"bf16": False})
    found = pretraining_of(args).arguments
    config, assumed = config_of_start(found.args, found.model_args)
    image_processor, tokens = found.tiling()
    assert (config.vision_config.hidden_size, config.text_config.vocab_size, assumed) == (32, 300, "")
    assert (image_processor.size["height"], list(image_processor.image_mean), tokens) == (56, MEAN, 4)
    assert not [*(tmp_path / "home").rglob("*.safetensors")]


def test_probes_see_some_images_at_one_size(tmp_path, monkeypatch):
    """Published image processors of DINOv2 crop to 224 pixels, others do not."""
    write_rsar(tmp_path / "data")
    monkeypatch.setattr(probing, "PROBED", 5)
    save_vit(tmp_path / "vit", "dinov2")
    file = tmp_path / "data" / "RSAR" / "train" / "annfiles" / "0000001.txt"
    file.write_text(file.read_text().partition("20 20")[0])
    found, probed = read_labels(tmp_path / "data", tmp_path / "splits"), []
    monkeypatch.setattr(runs, "run_probe", lambda *args: probed.append(args) or {"results": []})
    image_size = probe_size(start_of(arguments(tmp_path, start=str(tmp_path / "vit"))), None)
    Prober(found, image_size, 0).score(["a", "b"], "test", tmp_path / "frozen")
    ((settings, _),) = probed
    assert settings["image_size"] == 56
    data = DetectionData.from_dict(settings["data"])
    images = {split: {place.image for place in data.open([split], "oriented").places} for split in ("train", "test")}
    assert [len(part) for part in images.values()] == [5, 4]
    assert images["train"] < {*found.images["train"]} and images["test"] == {*found.images["test"]}


def test_large_images_with_boxes_are_cut_in_all_stages(tmp_path, monkeypatch):
    monkeypatch.setattr(labels, "LARGE", 90)  # the images have 80 x 96 pixels
    monkeypatch.setattr(labels, "WINDOW", 64)
    monkeypatch.setattr(labels, "OVERLAP", 16)
    monkeypatch.setattr(probing, "PROBED", 8)
    write_dota(tmp_path / "data", [f"site{index:03}" for index in range(12)])
    found = read_labels(tmp_path / "data", tmp_path / "splits")
    assert [split["tile"] for split in found.data["splits"].values()] == [{"size": 64, "overlap": 16}] * 3
    assert fine_tuning_settings(found, None)["image_size"] == 64
    data = DetectionData.from_dict(found.data)
    whole = data.without_tiles().open(["train"], "oriented").places
    assert labels_of("detection", found.data, "train", {"task": "oriented"}) == {
        place.image: {*place.objects.labels.tolist()} for place in whole
    }
    assert len(data.open(["train"], "oriented")) == num_windows(found, "train") * len(whole)
    probed = DetectionData.from_dict(Prober(found, 32, 0).limited_data("test")).open(["train"], "oriented")
    assert len(probed) == 8 < len(data.open(["train"], "oriented"))
    options = question_options(found, "train", {})
    assert (options["window"], options["overlap"]) == (64, 16)


def progress_of(args: AdaptArguments) -> Progress:
    return open_progress(args, FolderLock(args.output_dir))


def test_settings_may_change_until_the_plan_is_kept(tmp_path, monkeypatch):
    (tmp_path / "data").mkdir()
    progress_of(arguments(tmp_path)).result("instructions/train", int)
    (tmp_path / "out" / "splits").mkdir()
    other = progress_of(arguments(tmp_path, learning_rates=[1e-3]))
    assert not other.parts and not (tmp_path / "out" / "splits").exists()
    other.result("plan", int)
    with pytest.raises(ValueError, match="different learning_rates"):
        progress_of(arguments(tmp_path))
    monkeypatch.chdir(tmp_path)
    progress_of(arguments(tmp_path, data="data/", learning_rates=[1e-3]))  # the same folder


def test_labels_may_change_until_the_plan_is_kept(tmp_path):
    write_coco(tmp_path / "data", [f"site{index:03}" for index in range(12)])
    file = next((tmp_path / "data").rglob("*.json"))
    args = arguments(tmp_path)
    read_labels(args.data, tmp_path / "out" / "splits")
    progress_of(args).result("instructions/train", int)
    file.write_text(file.read_text().replace("plane", "tower"))
    progress = progress_of(args)
    assert not progress.parts and not (tmp_path / "out" / "splits").exists()
    progress.result("plan", int)
    progress_of(args)
    next((tmp_path / "data").rglob("*.png")).unlink()
    with pytest.raises(ValueError, match="different labels"):
        progress_of(args)
    shutil.rmtree(tmp_path / "data")
    with pytest.raises(ValueError, match="data of the labels not found"):
        progress_of(args)


def test_instructions_may_change_until_the_plan_is_kept(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "images").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "images" / "0.png")
    turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "a tree"}]
    (tmp_path / "rows.jsonl").write_text(json.dumps({"image": "0.png", "conversations": turns}) + "\n")
    source = {"name": "own", "annotation": "rows.jsonl", "image_root": "images"}
    (tmp_path / "mixture.yaml").write_text(yaml.safe_dump({"root": str(tmp_path), "sources": [source]}))
    args = arguments(tmp_path, instructions=str(tmp_path / "mixture.yaml"))
    progress_of(args).result("checks", int)
    assert progress_of(args).parts
    Image.new("RGB", (9, 9)).save(tmp_path / "images" / "0.png")
    progress = progress_of(args)
    assert not progress.parts
    progress.result("plan", int)
    with (tmp_path / "rows.jsonl").open("a") as file:
        file.write(json.dumps({"image": "0.png", "conversations": turns}) + "\n")
    with pytest.raises(ValueError, match="different files of instructions"):
        progress_of(args)


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
    found = read_labels(config, tmp_path / "splits")
    for split in ("train", "test"):
        make_questions(found, split, {}, tmp_path / split, 0)
        (file,) = (tmp_path / split).glob("*.parquet")
        text = str(pq.read_table(file, columns=["messages"]).to_pylist()).lower()
        assert "ship" in text and "plane" not in text


def test_checks_read_images_as_the_pretraining(tmp_path, monkeypatch):
    spec = {"bands": [4, 1, 0]}
    for index in range(2):
        bands = np.random.default_rng(index).integers(0, 256, (5, 40, 40), dtype=np.uint8)
        write_bands(tmp_path / f"{index}.tif", bands)
    settings = {"from_scratch": FROM_SCRATCH, "input_spec": spec, "bf16": False}
    found = SimpleNamespace(images={"test": [tmp_path / "0.tif", tmp_path / "1.tif"]})
    monkeypatch.setattr(controls, "load_sources", lambda name: None)
    monkeypatch.setattr(os, "cpu_count", lambda: 0)
    seen = {}

    def validate(mixture, workers, **options):
        seen.update(options)
        raise KeyboardInterrupt

    monkeypatch.setattr(controls, "validate", validate)
    pretraining = pretraining_of(arguments(tmp_path, pretraining=settings))
    with pytest.raises(KeyboardInterrupt):
        check_instructions(pretraining, found, tmp_path / "report.json")
    assert seen["input_spec"] == spec and seen["test_images"].spec.bands == (4, 1, 0)


@pytest.mark.parametrize("scenes", [1, 2])
def test_test_images_of_one_scene_are_a_problem(tmp_path, monkeypatch, scenes):
    found = SimpleNamespace(images={"test": [tmp_path / "0.png", tmp_path / "1.png"]}, test_scenes=scenes)
    monkeypatch.setattr(controls, "load_sources", lambda name: SimpleNamespace(sources=[]))
    monkeypatch.setattr(controls, "TestImages", lambda *args: None)
    monkeypatch.setattr(controls, "validate", lambda *args, **options: [])
    monkeypatch.setattr(controls, "check_answer_priors", lambda *args: "")
    args = arguments(tmp_path, pretraining={"from_scratch": FROM_SCRATCH, "bf16": False})
    problems = check_instructions(pretraining_of(args), found, tmp_path / "report.json")["problems"]
    assert any("one scene" in problem for problem in problems) == (scenes == 1)


def comparison_of(folder: Path, rates: list[float], images: int = 6, batch: int = 4) -> Comparison:
    """Return the fine-tunings of two classes with a number of images each."""
    write_folders(folder / "data", {"": images}, ("field", "forest"))
    labels = read_labels(folder / "data", folder / "splits")
    progress = Progress(folder / "progress.json")
    return Comparison(labels, {"per_device_train_batch_size": batch}, 1, rates, folder / "runs", progress)


def test_batch_is_not_larger_than_the_fraction_of_the_labels(tmp_path, monkeypatch):
    runs = comparison_of(tmp_path, [1e-3], images=12, batch=8)
    batches = []

    def run_fine_tuning(task, settings, folder):
        batches.append((settings["per_device_train_batch_size"], folder))
        return {"main_score": "accuracy", "greater_is_better": True, "eval": {"eval_accuracy": 1.0}}

    monkeypatch.setattr(comparison, "run_fine_tuning", run_fine_tuning)
    for fraction in (1.0, 0.5, 0.2, 0.01, 0.012):
        runs.fine_tune("a", "backbone", 1e-3, 0, fraction)
    assert [batch for batch, _ in batches] == [8, 8, 3, 1, 1]
    assert len({folder for _, folder in batches}) == 5


def test_learning_rate_that_diverges_is_left_out(tmp_path, monkeypatch):
    runs = comparison_of(tmp_path, [1e-4, 3e-4, 9.0])
    tried = []

    def run_fine_tuning(task, settings, folder):
        tried.append(settings["learning_rate"])
        if settings["learning_rate"] > 1 or "all" in settings["model_name_or_path"]:
            raise TrainingDiverged("Step 1 is not finite.")
        scores = {"eval_accuracy": settings["learning_rate"]}
        return {"main_score": "accuracy", "greater_is_better": True, "eval": scores}

    monkeypatch.setattr(comparison, "run_fine_tuning", run_fine_tuning)
    assert runs.choose_rate("a", "backbone", 0) == 3e-4
    runs.progress = Progress(tmp_path / "progress.json")  # of a resumed run
    assert runs.choose_rate("a", "backbone", 0) == 3e-4 and tried == runs.learning_rates
    with pytest.raises(TrainingDiverged, match="of b "):
        runs.choose_rate("b", "all", 0)
    with pytest.raises(TrainingDiverged, match="Step 1"):
        runs.score("b", "all", 9.0, 0)  # recorded, not run again
    assert len(tried) == 6


def test_learning_rate_has_lowest_error_rate(tmp_path, monkeypatch):
    runs = comparison_of(tmp_path, [1e-4, 3e-4, 1e-3])
    errors = {1e-4: 0.3, 3e-4: 0.2, 1e-3: 0.4}

    def run_fine_tuning(task, settings, folder):
        metrics = {"main_score": "error_rate", "greater_is_better": False, "is_share": True}
        if not settings.get("do_train", True):
            return metrics | {"test": {"test_error_rate": 0.25}, "test_resampled": [0.2, 0.3], "test_cases": 2}
        return metrics | {"eval": {"eval_error_rate": errors[settings["learning_rate"]]}}

    monkeypatch.setattr(comparison, "run_fine_tuning", run_fine_tuning)
    assert runs.choose_rate("a", "backbone", 0) == 3e-4
    scored = runs.score("a", "backbone", 3e-4, 0)
    assert scored["metric"] == "error_rate" and not scored["greater_is_better"]


def test_seed_that_diverges_is_left_out():
    def score(model, backbone, rate, seed, fraction, is_kept):
        if (model, seed, fraction) in bad:
            raise TrainingDiverged("Step 1 is not finite.")
        return {"model": model, "seed": seed, "labels": fraction}

    found = SimpleNamespace(choose_rate=lambda *args: 1e-4, score=score)
    backbones = SimpleNamespace(models={"a": "", "b": ""}, path=lambda model, seed: model)
    bad = [("a", 1, 0.1), ("b", 1, 1.0)]
    scores, diverged = fine_tune_backbones(found, backbones, [0, 1], [1.0, 0.1])
    scored = [(run["model"], run["seed"], run["labels"]) for run in scores]
    assert scored == [("a", 0, 1.0), ("a", 1, 1.0), ("a", 0, 0.1), ("b", 0, 1.0), ("b", 0, 0.1), ("b", 1, 0.1)]
    assert [text[:13] for text in diverged] == ["a with seed 1", "b with seed 1"]
    bad = [("a", 0, 1.0)]
    with pytest.raises(TrainingDiverged):
        fine_tune_backbones(found, backbones, [0, 1], [1.0, 0.1])


def test_several_processes_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(preparation, "PartialState", lambda: SimpleNamespace(num_processes=2))
    with pytest.raises(ValueError, match="one process, got 2.*accelerate launch"):
        adapt(tmp_path / "data", start="vit", output_dir=tmp_path / "out")
    assert not (tmp_path / "out").exists()
