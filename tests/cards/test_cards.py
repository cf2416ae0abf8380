"""Cards of pushed models: valid metadata, only recorded values, inherited licenses, and examples that run."""

import copy
import json
import os
import re
import subprocess
import sys

import pytest
from datasets import Dataset
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from huggingface_hub.utils import disable_progress_bars
from paths import ROOT
from peft import LoraConfig, get_peft_model
from pictures import picture
from pushed_runs import card_of, push, train
from tiny_models import VISION

from modeling_vitp import (
    ViTPDetectionImageProcessor,
    ViTPFeaturePyramid,
    ViTPForChangeDetection,
    ViTPForConditionalGeneration,
    ViTPForImageClassification,
    ViTPForInstanceSegmentation,
    ViTPForObjectDetection,
    ViTPForOrientedObjectDetection,
    ViTPForSemanticSegmentation,
    ViTPImageProcessor,
    ViTPProcessor,
    ViTPSegmentationImageProcessor,
    ViTPVisionConfig,
    ViTPVisionModel,
    export_backbone,
    export_timm,
    spread_bands,
)
from modeling_vitp.auto.registry import find_model
from modeling_vitp.cards.model_card import describe_training, headlines
from modeling_vitp.cards.record import (
    copy_record,
    forget_sources,
    provenance,
    read_record,
    stated_licenses,
    write_record,
)
from modeling_vitp.cards.sections import portable_command
from modeling_vitp.convert.checkpoint import convert_checkpoint
from modeling_vitp.hub.files import model_files
from modeling_vitp.hub.upload import write_model_card

disable_progress_bars()
RECORD = {
    "command": "vitp pretrain --config my_recipe.yaml",
    "settings": {"seed": 3, "vrl_drop_ratio": 0.75, "learning_rate": 2e-5, "input_spec": None, "warmup_steps": 0.2},
    "base_model": ["org/start"],
    "licenses": {"org/start": {"license": "cc-by-nc-4.0"}},
    "data": [
        {"name": "ships", "dataset": "org/ships", "rows": 64000, "rate": 2, "tasks": ["grounding", "vqa"]},
        {"name": "mine", "dataset": None, "rows": None, "rate": 0.1, "tasks": []},
    ],
    "evaluated_on": {"name": "ships", "dataset": "org/ships", "eval": "validation", "test": "test"},
    "versions": {"torch": "2.13.0", "transformers": "5.24.0"},
}
METRICS = {
    "seed": 3,
    "train": {"train_loss": 1.5, "train_runtime": 3600.0},
    "eval": {"eval_loss": 0.25, "eval_runtime": 12.0, "epoch": 1.0},
    "test": {"test_loss": 0.5, "test_mean_iou": 0.625, "test_iou/ship": None, "test_iou/tree": 0.25},
    "answers": {"count": {"mean_error": {"own": 3.5, "constant": 4.5, "ratio_to_constant": 0.75}}},
    "summary": "The count beside its controls.",
    "requirements": [
        {"score": "answers.count", "relation": "<=", "bound": 0.8, "reached": 0.75, "passed": True},
    ],
}


@pytest.fixture
def folder(model_and_processor, tmp_path):
    """Folder of a trained model with its record and metrics."""
    model, processor = model_and_processor
    folder = tmp_path / "run"
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    (folder / "run.json").write_text(json.dumps(RECORD))
    (folder / "metrics.json").write_text(json.dumps(METRICS))
    return folder


def code_of(card: ModelCard) -> str:
    (code,) = re.findall(r"```python\n(.*?)```", card.text, re.DOTALL)
    return code


def rows_of(card: ModelCard) -> list[list[str]]:
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in card.text.splitlines() if line[:1] == "|"]


def test_card_has_recorded_values(hub, logged_in, folder):
    assert push(folder, "tester/vitp", "--what", "model") == 0
    card = card_of(hub, "tester/vitp")
    card.validate()
    data = card.data.to_dict()
    index = data.pop("model-index")
    assert data == {
        "library_name": "transformers",
        "pipeline_tag": "image-text-to-text",
        "base_model": ["org/start"],
        "datasets": ["org/ships"],
        "tags": ["vitp"],
        "license": "cc-by-nc-4.0",
    }
    assert index[0]["name"] == "vitp"
    results = {}
    for result in index[0]["results"]:
        for metric in result["metrics"]:
            results[result["dataset"]["split"], metric["name"]] = metric["value"]
    validation = {("validation", "Loss"): 0.25, ("validation", "Mean error of numbers"): 3.5}
    assert results == validation | {("test", "Loss"): 0.5}
    assert {one["dataset"]["type"] for one in index[0]["results"]} == {"org/ships"}

    rows = rows_of(card)
    assert ["learning_rate", "2e-05"] in rows and ["r, the share of visual tokens dropped (VRL)", "0.75"] in rows
    assert ["ships", "org/ships", "64000", "2", "grounding, vqa"] in rows and ["mine", "", "", "0.1", ""] in rows
    assert ["tile, in pixels", "56 × 56"] in rows and ["test", "mean_iou", "0.625"] in rows
    assert ["class", "iou"] in rows and ["tree", "0.25"] in rows and ["answers.count", "<= 0.8", "0.75"] in rows
    assert METRICS["summary"] in card.text and "ratio_to_constant" not in card.text
    assert f"```bash\n{RECORD['command']}\n```" in card.text and "torch 2.13.0, transformers 5.24.0" in card.text
    assert "input spec" not in card.text and "ship |" not in card.text and "None" not in card.text

    assert push(folder, "tester/b", "--what", "backbone") == 0
    card = card_of(hub, "tester/b")
    card.validate()
    assert card.data.license == "cc-by-nc-4.0" and card.data.pipeline_tag == "image-feature-extraction"
    assert card.data.eval_results is None and "Of the whole model that this is a part of" in card.text


@pytest.mark.parametrize(
    ("model_type", "names", "expected"),
    [
        ("vitp_segmentation", ["mean_iou", "iou/a", "own"], ["Mean IoU"]),
        ("vitp_segmentation", ["own", "own/a", "runtime"], ["own"]),
        ("vitp_object_detection", ["mar_10", "map_50", "map", "swapped_map"], ["mAP@50", "mAP"]),
        ("vitp_vision", [f"score_{number}" for number in range(20)], [f"score_{number}" for number in range(10)]),
    ],
)
def test_headlines_are_declared_with_the_model_type(model_type, names, expected):
    metrics = {"test": {f"test_{name}": 0.5 for name in names}}
    assert [title for _, _, title, _ in headlines(find_model(model_type), metrics, {})] == expected


def test_card_without_a_record_has_no_training(hub, logged_in, folder):
    for name in ("run.json", "metrics.json"):
        (folder / name).unlink()
    assert push(folder, "tester/m", "--what", "model") == 0
    card = card_of(hub, "tester/m")
    card.validate()
    assert re.findall("^## (.*)", card.text, re.MULTILINE) == ["How to load", "Input", "Citation"]
    assert set(card.data.to_dict()) == {"library_name", "pipeline_tag", "tags"}


def test_user_text_is_kept(hub, logged_in, folder):
    mine = "---\ntags: [ships]\nlanguage: de\n---\n\n# My ships\n\nOf the harbour.\n\n## Limits\n\nNone known.\n"
    (folder / "README.md").write_text(mine)
    for name in ("tester/one", "tester/two"):
        assert push(folder, name, "--what", "model") == 0
        (folder / "README.md").write_text(str(card_of(hub, name)))
    card = card_of(hub, "tester/two")
    assert card.text.startswith("\n# My ships\n\nOf the harbour.\n\n## Limits\n\nNone known.\n\n## How to load\n")
    assert card.data.tags == ["ships", "vitp"] and card.data.language == "de" and card.data.license == "cc-by-nc-4.0"
    assert "tester/one" not in card.content and card.text.count("## How to load") == 1


def test_user_metadata_is_kept_without_a_record(hub, logged_in, folder):
    for name in ("run.json", "metrics.json"):
        (folder / name).unlink()
    result = EvalResult("object-detection", "org/mine", "Mine", "map", 0.5)
    own = ModelCardData(model_name="Ships", eval_results=[result], datasets=["org/mine"], base_model="org/base")
    (folder / "README.md").write_text(f"---\n{own.to_yaml()}\n---\n# My ships\n")
    assert push(folder, "tester/m", "--what", "model") == 0
    found = card_of(hub, "tester/m").data
    assert found.datasets == ["org/mine"] and found.base_model == "org/base"
    assert found.model_name == "Ships" and found.eval_results[0].metric_value == 0.5


def test_results_of_an_earlier_run_are_removed(folder):
    (folder / "README.md").write_text("# Ships\n\n## Limits\n\nNone known.\n")
    write_model_card("model", folder)
    assert "0.625" in (folder / "README.md").read_text()
    (folder / "metrics.json").write_text(json.dumps({"seed": 4, "train": METRICS["train"]}))
    write_model_card("model", folder)
    card = ModelCard.load(folder / "README.md")
    assert "Evaluation" not in card.text and "0.625" not in card.text and card.data.eval_results is None
    assert "None known." in card.text and "## Training" in card.text and "## Citation" in card.text

    (folder / "README.md").write_text("# Ships\n\n## Evaluation\n\nMine.\n")
    write_model_card("model", folder)
    assert "Mine." in (folder / "README.md").read_text()


def test_license_of_an_earlier_run_is_removed(folder):
    for mine in ("", "---\nlicense: mit\n---\n"):
        (folder / "run.json").write_text(json.dumps({**RECORD, "licenses": {} if mine else RECORD["licenses"]}))
        (folder / "README.md").write_text(f"{mine}# Ships\n")
        write_model_card("model", folder)
        assert "## License" in (folder / "README.md").read_text()
        forget_sources(folder)
        (folder / "run.json").write_text(json.dumps({"licenses": {"org/other": {}}}))
        write_model_card("model", folder)
        card = ModelCard.load(folder / "README.md")
        assert card.data.license == ("mit" if mine else None) and ("## License" in card.text) == bool(mine)


def test_card_that_is_not_yaml_does_not_stop_a_run(folder):
    (folder / "README.md").write_text("---\ntitle: Ships: a model\n---\n")
    forget_sources(folder)
    with pytest.raises(ValueError, match="README.md.*mapping values"):
        write_model_card("model", folder)
    assert (folder / "README.md").read_text() == "---\ntitle: Ships: a model\n---\n"


def test_start_of_a_distilled_model_is_no_teacher():
    record = {"settings": {"teacher": "org/large"}, "base_model": ["org/large", "org/small"]}
    assert "Initialized" not in describe_training(record)
    record["settings"]["student"] = "org/small"
    assert describe_training(record).startswith("Distilled from `org/large`. Initialized from `org/small`.")


def test_conversion_keeps_license(hub, logged_in, folder, tmp_path):
    write_model_card("model", folder)
    convert_checkpoint(folder, tmp_path / "internvl", "internvl")
    assert push(tmp_path / "internvl", "tester/i", "--what", "model", "--license", "apache-2.0") == 1
    assert push(tmp_path / "internvl", "tester/i", "--what", "model") == 0
    card = card_of(hub, "tester/i")
    card.validate()
    assert card.data.license == "cc-by-nc-4.0" and card.data.base_model == ["org/start"]
    assert push(tmp_path / "internvl", "tester/b", "--what", "backbone") == 0
    assert card_of(hub, "tester/b").data.license == "cc-by-nc-4.0"
    assert "the same to the bit" in card.text and "trust_remote_code" not in code_of(card)


def test_license_of_a_push_replaces_statement_of_conversion(hub, logged_in, folder, tmp_path):
    (folder / "run.json").unlink()
    convert_checkpoint(folder, tmp_path / "internvl", "internvl")
    assert "states no license" in (tmp_path / "internvl" / "README.md").read_text()
    assert push(tmp_path / "internvl", "tester/i", "--what", "model", "--license", "mit") == 0
    card = card_of(hub, "tester/i")
    assert "states no license" not in card.text and card.text.count("## License") == 1 and card.data.license == "mit"


def test_unread_license_is_read_again(hub, logged_in, folder):
    (folder / "run.json").write_text(json.dumps(RECORD | {"licenses": {"org/start": {}, "run": {}}}))
    hub.create("org/start", {"README.md": "---\nlicense: cc-by-nc-4.0\n---\n"})
    assert push(folder, "tester/m", "--what", "model", "--license", "mit") == 1
    assert push(folder, "tester/m", "--what", "model") == 0
    assert card_of(hub, "tester/m").data.license == "cc-by-nc-4.0"


def test_license_file_without_a_card_binds(hub, logged_in, folder):
    (folder / "run.json").unlink()
    (folder / "LICENSE.txt").write_text("terms")
    assert push(folder, "tester/m", "--what", "model", "--license", "mit") == 1
    assert push(folder, "tester/m", "--what", "model") == 0
    data = card_of(hub, "tester/m").data
    assert (data.license, data.license_name, data.license_link) == ("other", "license-of-the-source", "LICENSE.txt")
    assert hub.files("tester/m")["LICENSE.txt"] == b"terms"


def test_license_files_and_links(hub, logged_in, folder, tmp_path):
    metadata = "license: other\nlicense_name: vitp-terms\nlicense_link: LICENSE"
    hub.create("org/start", {"README.md": f"---\n{metadata}\n---\n", "LICENSE": "terms"})
    (folder / "LICENSE").write_text("terms")
    write_model_card("model", folder)
    found = provenance(["org/start", str(folder)])
    assert found["base_model"] == ["org/start"]
    stated = {
        "license": "other",
        "license_name": "vitp-terms",
        "license_link": f"{hub.url}/org/start/blob/main/LICENSE",
    }
    noted = RECORD["licenses"]["org/start"]  # at the start of the run; the repo has another license now
    assert found["licenses"] == {"org/start": stated, "run": noted, "org/start (another)": noted}
    assert push(folder, "tester/m", "--what", "model") == 0
    assert hub.files("tester/m")["LICENSE"] == b"terms"
    (tmp_path / "other" / "run").mkdir(parents=True)
    (tmp_path / "other" / "run" / "README.md").write_text("---\nlicense: gpl-3.0\n---\n")
    both = provenance([str(folder), str(tmp_path / "other" / "run")])["licenses"]
    assert both["run (another)"] == {"license": "gpl-3.0"} and both["run"] == {"license": "cc-by-nc-4.0"}


def test_checkpoint_has_the_license_file_of_its_run(hub, logged_in, folder):
    record = RECORD | {"licenses": {"run": {"license": "other", "license_name": "terms", "license_link": "LICENSE"}}}
    (folder / "run.json").write_text(json.dumps(record))
    (folder / "LICENSE").write_text("terms")
    checkpoint = folder / "checkpoint-2"
    checkpoint.mkdir()
    for path in model_files(folder).values():
        if path.name not in ("LICENSE", "metrics.json"):
            path.rename(checkpoint / path.name)
    assert push(checkpoint, "tester/m", "--what", "model") == 0
    assert card_of(hub, "tester/m").data.license_link == "LICENSE"
    assert hub.files("tester/m")["LICENSE"] == b"terms"


def test_license_files_of_two_sources_are_kept(tmp_path):
    """A run has a ViT and a language model; a folder `LICENSES` (of REUSE) is not a license file."""
    for name in ("vit", "llm"):
        (tmp_path / name / "LICENSES").mkdir(parents=True)
        (tmp_path / name / "LICENSE.md").write_text(f"terms of the {name}")
        (tmp_path / name / "NOTICE").write_text("made by all")
    sources = [str(tmp_path / "vit"), str(tmp_path / "llm")]
    write_record(tmp_path / "run", "vitp pretrain", {"fixed": {}, "free": {}}, sources, [], None)
    found = {path.name: path.read_text() for path in (tmp_path / "run").iterdir() if path.name != "run.json"}
    licenses = {"LICENSE.md": "terms of the vit", "LICENSE-llm.md": "terms of the llm"}
    assert found == licenses | {"NOTICE": "made by all"}


@pytest.mark.slow
def test_training_from_hub_and_back(hub, logged_in, folder, data_folder, tmp_path, capsys):
    """Model and data come from the Hub, each checkpoint is pushed, and every card has the license."""
    hub.create(
        "org/start", {path.name: path for path in folder.iterdir() if path.name not in ("run.json", "metrics.json")}
    )
    hub.commit("org/start", {"README.md": "---\nlicense: cc-by-nc-4.0\n---\n# Start\n"})
    parquet = Dataset.from_parquet(str(data_folder / "train.parquet"))
    parquet.to_parquet(tmp_path / "rows.parquet")
    hub.create("org/rows", {f"{split}.parquet": tmp_path / "rows.parquet" for split in ("train", "test")}, "dataset")
    token = hub.token()
    settings = {"model_name_or_path": "org/start", "dataset_name": "org/rows", "hub_always_push": True}
    settings |= {"push_to_hub": True, "hub_model_id": "tester/trained", "hub_private_repo": True, "hub_token": token}
    assert train(tmp_path, **settings) == 0

    history = [commit["summary"] for _, commit in hub.repo("tester/trained").history("main")]
    assert history[0] == "End of training" and "Training in progress, step 1" in history
    assert hub.repo("tester/trained").state["private"] and token not in capsys.readouterr().out
    files = hub.files("tester/trained")
    assert set(files) == {".gitattributes", *model_files(tmp_path / "out")}
    assert files["model.safetensors"] == (tmp_path / "out" / "model.safetensors").read_bytes()
    for commit_id, _ in hub.repo("tester/trained").history("main")[:-1]:
        assert b"license: cc-by-nc-4.0" in hub.files("tester/trained", commit_id)["README.md"]
    card = card_of(hub, "tester/trained")
    card.validate()
    assert card.data.base_model == ["org/start"] and card.data.datasets == ["org/rows"]
    metrics = json.loads(files["metrics.json"])
    (loss,) = [one.metric_value for one in card.data.eval_results if one.metric_name == "Loss"]
    assert loss == metrics["eval"]["eval_loss"]
    assert 'from_pretrained("tester/trained"' in code_of(card)
    left = [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert any(path.name == "training_args.bin" for path in left)
    assert not any(token.encode() in path.read_bytes() for path in left)
    assert not any(str(tmp_path).encode() in content for content in files.values())
    for part in ("", "backbone"):
        assert ModelCard.load(tmp_path / "out" / part / "README.md").data.license == "cc-by-nc-4.0"

    # A model trained from it has the same license.
    again = {"output_dir": str(tmp_path / "next"), "model_name_or_path": str(tmp_path / "out"), "max_steps": 1}
    assert train(tmp_path, **again, dataset_name=str(data_folder)) == 0
    assert push(tmp_path / "next", "tester/next", "--what", "backbone", "--license", "mit") == 1
    assert push(tmp_path / "next" / "backbone", "tester/next", "--what", "backbone", "--license", "mit") == 1
    assert push(tmp_path / "next" / "backbone", "tester/next", "--what", "backbone") == 0
    card = card_of(hub, "tester/next")
    assert card.data.license == "cc-by-nc-4.0" and card.data.base_model == ["org/start"]


# Examples

DETECTORS = {
    "boxes": ViTPForObjectDetection,
    "oriented": ViTPForOrientedObjectDetection,
    "instances": ViTPForInstanceSegmentation,
}
PROGRAM = """
import json, sys

sys.modules["modeling_vitp"] = None  # the pushed code has to work without it

shapes = {}
for name, code in json.loads(sys.stdin.read()).items():
    names = {}
    exec(code, names)
    result = next(names[key] for key in ("features", "answer", "classes", "changes", "found", "maps") if key in names)
    result = result["boxes"] if isinstance(result, dict) else result
    shapes[name] = [list(one.shape) for one in result] if isinstance(result, list | tuple) else (
        result if isinstance(result, str) else list(result.shape))
print(json.dumps(shapes))
"""


@pytest.fixture
def everything(hub, logged_in, folder, tmp_path):
    """Repos of every kind, in `tester/`."""
    model, processor = ViTPForConditionalGeneration.from_pretrained(folder), ViTPProcessor.from_pretrained(folder)
    folders = {"model": folder, "internvl": convert_checkpoint(folder, tmp_path / "internvl", "internvl")}
    folders["backbone"] = export_backbone(folder, tmp_path / "backbone")
    processor.image_processor.input_spec = {"gamma": 0.5}
    folders["spec"] = export_backbone(model, tmp_path / "spec", processor.image_processor)
    bands = {"band_names": ["VV", "VH"], "window": [-25, 0]}
    radar = spread_bands(copy.deepcopy(model), bands["band_names"])
    folders["bands"] = export_backbone(radar, tmp_path / "bands", ViTPImageProcessor(input_spec=bands))
    folders["timm"], folders["timm_bands"] = (
        export_timm(folders[name], tmp_path / f"timm_{name}") for name in ("backbone", "bands")
    )
    for name, model_class in (("segmentation", ViTPForSemanticSegmentation), ("change", ViTPForChangeDetection)):
        folders[name] = tmp_path / name
        dense = model_class.from_backbone(folders["backbone"], neck="pyramid", num_labels=2)
        dense.save_pretrained(folders[name])
        ViTPSegmentationImageProcessor.from_backbone(folders["backbone"]).save_pretrained(folders[name])
    for name, model_class in DETECTORS.items():
        folders[name] = tmp_path / name
        detector = model_class.from_backbone(folders["backbone"], neck="pyramid", num_labels=2, neck_channels=8)
        detector.save_pretrained(folders[name])
        ViTPDetectionImageProcessor.from_backbone(folders["backbone"]).save_pretrained(folders[name])
    folders["maps"] = tmp_path / "maps"
    ViTPFeaturePyramid.from_backbone(folders["backbone"]).save_pretrained(folders["maps"])
    backbones = ("backbone", "spec", "bands", "timm", "timm_bands")
    for name, path in folders.items():
        assert push(path, f"tester/{name}", "--what", "backbone" if name in backbones else "model") == 0

    lora = get_peft_model(model, LoraConfig(target_modules=r"model\.language_model\..*q_proj"))
    lora.save_pretrained(tmp_path / "lora" / "adapter")
    processor.save_pretrained(tmp_path / "lora" / "adapter")
    assert push(tmp_path / "lora", "tester/adapter", "--what", "adapter") == 1
    assert push(tmp_path / "lora", "tester/adapter", "--what", "adapter", "--base_model", "tester/model") == 0
    return [*folders, "adapter"]


@pytest.mark.slow
def test_card_examples_run(hub, everything, tmp_path):
    cards = {name: card_of(hub, f"tester/{name}") for name in everything}
    for card in cards.values():
        card.validate()
    assert cards["adapter"].data.base_model == "tester/model" and cards["adapter"].data.library_name == "peft"
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "PYTHON", "PYTEST"))}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        input=json.dumps({name: code_of(card) for name, card in cards.items()}),
        cwd=tmp_path,
        env=inherited | hub.environment(tmp_path / "fresh", hub.token("read")),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert {name for name in found if isinstance(found[name], str)} == {"model", "internvl", "adapter"}
    assert found["backbone"] == found["spec"] == found["bands"] == [1, 17, 32]
    assert "| bands | VV, VH |" in cards["bands"].text and "np.zeros((2, 480, 640)" in code_of(cards["bands"])
    assert found["timm"] == found["timm_bands"] == [1, 32]
    assert "create_transform" in code_of(cards["timm"]) and "np.zeros((2, 480, 640)" in code_of(cards["timm_bands"])
    assert found["segmentation"] == found["change"] == [480, 640]
    assert [found[name][1] for name in DETECTORS] == [4, 5, 4]
    assert {cards[name].data.pipeline_tag for name in DETECTORS} == {"object-detection"}
    assert found["maps"] == [[1, 256, size, size] for size in (56, 28, 14, 7)]


def test_card_of_the_project(hub, logged_in, folder, tmp_path, monkeypatch):
    card = ModelCard.load(ROOT / "MODEL_CARD.md")
    card.validate()
    hub.organizations["my-org"] = {"tester"}
    assert push(folder, "my-org/my-backbone", "--what", "backbone") == 0
    picture(64, 48).save(tmp_path / "scene.png")
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(code_of(card), names)
    assert names["features"].shape == (1, 17, 32)


def test_example_of_a_backbone_runs(hub, logged_in, folder, tmp_path):
    processor = ViTPProcessor.from_pretrained(folder)
    processor.image_processor.input_spec = {"bands": [3, 2, 1], "window": [0, 3000]}
    processor.save_pretrained(folder)
    export_timm(folder, tmp_path / "timm")
    copy_record(folder, tmp_path / "timm")
    shapes = {"transformers": (1, 17, 32), "timm": (1, 32)}
    for library, checkpoint in (("transformers", folder), ("timm", tmp_path / "timm")):
        assert push(checkpoint, f"tester/{library}", "--what", "backbone") == 0
        card = card_of(hub, f"tester/{library}")
        card.validate()
        assert card.data.library_name == library and card.data.license == "cc-by-nc-4.0"
        names = {}
        exec(code_of(card), names)
        assert names["features"].shape == shapes[library]


@pytest.mark.parametrize("spec", [None, {"band_names": ["VV", "VH"]}])
def test_example_of_a_classifier_runs(hub, logged_in, tmp_path, spec):
    bands = (spec or {}).get("band_names")
    vit = ViTPVisionModel(ViTPVisionConfig(**VISION, band_names=bands))
    ViTPForImageClassification.from_backbone(vit, num_labels=2).save_pretrained(tmp_path / "c")
    ViTPImageProcessor(size={"height": 56, "width": 56}, input_spec=spec).save_pretrained(tmp_path / "c")
    assert push(tmp_path / "c", "tester/c", "--what", "model") == 0
    code, names = code_of(card_of(hub, "tester/c")), {}
    exec(code, names)
    assert {one["label"] for one in names["found"]} == {"LABEL_0", "LABEL_1"}
    assert ("as an array" in code) == (spec is not None)  # the pipeline converts files to 8-bit RGB


def test_exported_part_keeps_record_and_license(folder, tmp_path):
    (folder / "LICENSE").write_text("terms")
    checkpoint = folder / "checkpoint-8"
    checkpoint.mkdir()
    (tmp_path / "backbone").mkdir()
    copy_record(checkpoint, tmp_path / "backbone")
    assert read_record(tmp_path / "backbone") == read_record(folder) != {}
    assert (tmp_path / "backbone" / "LICENSE").read_text() == "terms"
    assert stated_licenses(tmp_path / "backbone")["org/start"] == {"license": "cc-by-nc-4.0"}
    assert not (tmp_path / "backbone" / "metrics.json").exists()  # metrics of the whole model


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--config", "/home/me/my.yaml"], "--config my.yaml"),
        (["--hub_token=hf_x", "--hub_token", "hf_y"], ""),
        (["--eos_token", "</s>", "--hub-token", "hf_x", "--pad_token=<pad>"], "--eos_token '</s>' '--pad_token=<pad>'"),
        (["--output_dir=~/out/a", "--mixture", '{"root": "/data/b"}'], '--output_dir=a --mixture \'{"root": "b"}\''),
        (["--data_root", "/home/jane doe/patient study/x/", "--a=C:\\my data\\b"], "--data_root x --a=b"),
        (["--endpoint", "https://hf.co/a/b/c", "--dir", "a/b"], "--endpoint https://hf.co/a/b/c --dir a/b"),
    ],
)
def test_recorded_command_has_no_token_or_path(words, expected):
    assert portable_command("pretrain", words) == f"vitp pretrain {expected}".strip()


def test_license_of_the_card_alone_reaches_a_part(tmp_path):
    for name in ("model", "part"):
        (tmp_path / name).mkdir()
    (tmp_path / "model" / "README.md").write_text("---\nlicense: apache-2.0\n---\n")
    copy_record(tmp_path / "model", tmp_path / "part")
    assert {"license": "apache-2.0"} in stated_licenses(tmp_path / "part").values()
