"""Mistakes of users: one line that names the mistake, the right exit status, and no written files."""

import json
import re
import shlex
import sys
import time

import pytest
import yaml
from datasets import Dataset
from sample_rows import sized_row
from tiny_models import FROM_SCRATCH, TEXT, VISION

from modeling_vitp.__main__ import main


def scratch(**more) -> str:
    return "--from_scratch " + shlex.quote(json.dumps(FROM_SCRATCH | more))


PRETRAIN = "pretrain --output_dir out --dataset_name data"
DETECT = "finetune_detection --config dior_r --output_dir out --model_name_or_path model"
SEGMENT, CLASSIFY = "finetune_segmentation --config loveda", "finetune_classification --output_dir out"
START = f"{PRETRAIN} {scratch()}"
WITHOUT_VOCABULARY = "--from_scratch " + shlex.quote(json.dumps({"vision_config": VISION, "text_config": TEXT}))
ROPE = {"text_config": TEXT | {"rope_parameters": {"rope_thet": 1e4}}}
FILES = {"image": "{name}.nii.gz"}
MAP = "predict_large masks scene.png --output o.tif"


def segment(split: str = "train", **data) -> str:
    two = {"root": "texts", "classes": [{"name": "a"}, {"name": "b"}], "splits": {"train": {"image": "{name}.csv"}}}
    options = f"--output_dir out --model_name_or_path vit --train_splits {split}"
    return f"finetune_segmentation {options} --data {shlex.quote(json.dumps(two | data))}"


MISTAKES = [  # words, and a pattern of the error line
    # recipes and configurations
    ("pretran", "'pretran'.*'pretrain'"),
    ("help pretran", "'pretran'.*'pretrain'"),
    ("pretrain --config quickstrat", "'quickstrat'.*'quickstart'"),
    ("pretrain --config broken.yaml", "expected|mapping|scanning"),
    ("pretrain --config binary.yaml", 'invalid start byte in "binary.yaml"'),
    ("pretrain --config names.yaml", "dataset_name to be text"),
    ("pretrain --config dash.yaml", "'learning-rate'.*'learning_rate'"),
    ("pretrain --config key.yaml", "'max_step'.*'max_st"),
    ("pretrain --config key.yaml --config key.yaml", "--config once"),
    ("pretrain --config", "--config"),
    ("pretrain quickstart", "'quickstart'.*--config quickstart"),
    ("probe --backbones b --data lovda", "'lovda'.*loveda"),
    ("probe --backbones b --data '[1]'", r"data.*'\[1\]'"),
    ("probe --backbones b --data empty", "'empty'"),
    # options and their values
    (f"{PRETRAIN} --learning_rat 1", "'learning_rat'.*'learning_rate'"),
    ("export_backbone --outputs x", "'--outputs'"),
    ("export_backbone model", "output_dir"),
    ("convert --licence x", "'--licence'.*'--license'"),
    ("convert empty out --to vit", "--to.*'vit'"),
    (f"{SEGMENT} --batch_size 4", "'batch_size'.*per_device_eval_batch_size"),
    (f"{SEGMENT} --detector d_fine", "'detector'.*vitp finetune_detection"),
    (f"{SEGMENT} --dataset_name data", "'dataset_name'.*--data_root"),
    ("pretrain --config quickstart word", "'word'"),
    (f"{PRETRAIN} --max_patches many", "max_patches"),
    (f"{PRETRAIN} --max_patches -2", "max_patches.*-2"),
    ("space --port 99999", "--port.*'99999'"),
    ("finetune_detection --config dota_v2 --submission '{\"nmss\": 0.5}'", "submission.*nmss"),
    ("push_to_hub model org/name", "--what"),
    # outputs that would replace something
    (f"{PRETRAIN} --output_dir data {scratch()}", "output_dir='data' is dataset_name"),
    (f"{CLASSIFY} --output_dir vit --model_name_or_path vit --data_root data", "'vit' is model_name_or_path"),
    ("validate_data data --output_dir scene.png", "scene.png.*is a file"),
    *(
        (f"{words} --output_dir trained", "trained has a model.*metrics.json.*--output_dir")
        for words in (
            "probe --backbones vit --dataset_name data",
            "evaluate_vlm --models model --dataset_name data",
            "evaluate_robustness --models boxes",
        )
    ),
    ("convert bert data", "data .*exist"),
    ("export_backbone model data", "data .*exist"),
    ("export_backbone model data --format timm", "data .*exist"),
    ("export_onnx bert data", "data.*folder"),
    ("export_backbone new bert", "checkpoint=.new."),
    # the start of a training
    ("adapt --data data --output_dir out", "start is missing"),
    ("adapt --data data --start vit --output_dir out --baselines start boxes", "boxes.*'vitp_object_detection'"),
    ("pretrain --dataset_name data " + scratch(), "output_dir is missing"),
    (PRETRAIN, "either model_name_or_path or from_scratch"),
    (f"{START} --model_name_or_path model", "either model_name_or_path or from_scratch"),
    (f"{PRETRAIN} --from_scratch '{{]'", "from_scratch .*'{]'"),
    (f"{PRETRAIN} {WITHOUT_VOCABULARY}", "vocab_size"),
    (f"{PRETRAIN} {scratch(vocab=3)}", "'vocab'.*'vocab_size'"),
    (f"{PRETRAIN} {scratch(vision_config={'num_hiden_layers': 2})}", "'num_hiden_layers'.*'num_hidden_layers'"),
    (f"{PRETRAIN} {scratch(**ROPE)}", "'rope_thet'.*'rope_theta'"),
    (f"{PRETRAIN} --vision_model vit --language_model vit", "language_model vit.*ViT"),
    (f"{PRETRAIN} --vision_model model", "vision_model and language_model"),
    (f"{START} --lora_r 8", "lora_r.*--use_peft"),
    (f"{START} --freeze vison", "freeze.*vision.*'vison'"),
    (f"{START} --freeze_projector true", "unknown option 'freeze_projector'.*'freeze'"),
    (f"{START} --activation_checkpointing_kwargs '{{\"evry_n_layers\": 2}}'", "'evry_n_layers'.*'every_n_layers'"),
    (f"{PRETRAIN} --model_name_or_path modle", "modle.*'model'"),
    (f"{PRETRAIN} --model_name_or_path org/model", "'org/model'.*HF_HUB_OFFLINE"),
    (f"{PRETRAIN} --model_name_or_path scene.png", "'scene.png' is a file"),
    (f"{PRETRAIN} --model_name_or_path vit", "vit is a backbone.*--vision_model"),
    (f"{PRETRAIN} --model_name_or_path empty", "empty"),
    (f"{PRETRAIN} --model_name_or_path bert", "bert is a 'bert' model"),
    (f"{DETECT} --head '{{\"neck_chanels\": 32}}'", "'neck_chanels'.*'neck_channels'"),
    (f"{DETECT} --head '{{\"neck_channels\": 0}}'", "head.neck_channels.*got 0"),
    # data
    ("pretrain --output_dir out", "dataset_name"),
    (f"{PRETRAIN} --mixture empty.yaml", "dataset_name='data'.*mixture"),
    ("pretrain --output_dir out --dataset_name texts --model_name_or_path bert", "texts.*'note', 'label'"),
    (f"{PRETRAIN} --dataset_train_split trian", "'trian'.*'?train"),
    (f"{PRETRAIN} --dataset_test_split tset", "'tset'.*test, train"),
    ("pretrain --output_dir out --mixture mix.yml", "mix.yml"),
    ("validate_data empty.yaml", "empty.yaml|sources"),
    (f'{START} --probe_data \'{{"config": "masks.yaml"}}\'', "'splits', 'classes'"),
    (f'{START} --probe_data \'{{"root": "empty"}}\'', "probe_data: missing 'config'"),
    (f'{START} --probe_data \'{{"config": "lovda"}}\'', "'lovda'.*'loveda'"),
    (f'{START} --probe_data \'{{"config": "loveda", "split": "val"}}\'', "probe_data.*'split'"),
    (f'{START} --probe_data \'{{"config": "loveda", "root": "empty"}}\'', "'train'.*empty/Train"),
    (f"{CLASSIFY} --model_name_or_path vit", "data_root.*dataset_name"),
    (f"{CLASSIFY} --model_name_or_path vit --data_root empty", "'train'.*empty/train/{class}/{name}"),
    ("finetune_detection --output_dir out --model_name_or_path vit --data_root empty", "coco, .*voc"),
    (segment("trian"), "'trian'.*'train'"),
    (segment(splits={"train": {"image": "{name}.csv", "tile": {"size": 8, "ovrlap": 2}}}), "'ovrlap'.*'overlap'"),
    (segment(splits={"train": {"image": "{name}.csv", "tile": {"size": 8}}}), "tile.*overlap"),
    (segment(splits={"train": FILES}), "scan.nii.gz.*`volumes`"),
    (segment(splits={"train": {"image": "{name:[}.csv"}}), "Pattern"),
    (segment(columns={"img": "a"}), "columns.*'img'.*'image'"),
    (segment(volumes={"plan": "axial"}), "'plan'.*'plane'"),
    (segment(classes=[{"name": "a"}, {"name": "b", "val": 1}]), "'val'.*'value'"),
    ("make_instructions kitti empty --output_dir out", "'kitti'.*coco"),
    ("make_instructions voc data --split_list empty.txt --output_dir out", "empty.txt"),
    # conversion, export, prediction, push
    *(
        (words.format("modle"), "'modle'.*'model'")
        for words in (
            "convert {} out",
            "export_backbone {} out",
            "export_onnx {} a.onnx",
            "predict_large {} scene.png --output o.tif",
            "embed {} scene.png --output o.parquet",
            "space {}",
            "probe --backbones {} --dataset_name data",
            "evaluate_vlm --models {} --dataset_name data",
            "evaluate_robustness --models {}",
            "push_to_hub {} org/name --what model",
        )
    ),
    ("convert empty out", "empty.*safetensors"),
    ("export_backbone empty out", "empty.*processor"),
    ("export_backbone boxes out", "boxes.*'vitp_object_detection'"),
    ("export_backbone bert out --format timm", "bert.*'bert'"),
    ("export_onnx bert a.onnx", "bert.*'bert'"),
    ("predict_large bert scene.png --output o.tif", "bert.*'bert'"),
    ("predict_large bert scen.png --output o.tif", "'scen.png'.*'scene.png'"),
    ("embed bert scene.png --output o.parquet", "backbone bert"),
    (f"{MAP} --classes classes.yaml", "`classes`.*got 0"),
    (f"{MAP} --classes loveda", "2 classes, got 7"),
    (f"{MAP} --classes dior", "classes.*a mapping.*airplane"),
]
FILE_TEXTS = {
    "broken.yaml": "a: [1, 2\nb: }",
    "empty.yaml": "{}",
    "masks.yaml": "data: {root: data}",
    "texts/train.csv": "note,label\na ship,1\n",
    "texts/scan.nii.gz": "",
    "trained/model.safetensors": "",
    "scene.png": "",
    "binary.yaml": "\x89PNG",
    "dash.yaml": "dataset_name: data\nlearning-rate: 1",
    "empty.txt": "",
    "names.yaml": "dataset_name: [data]",
    "classes.yaml": "data: {root: data}",
    "key.yaml": yaml.safe_dump({"dataset_name": "data", "max_step": 3, "from_scratch": FROM_SCRATCH}),
}
MODEL_TYPES = {
    "bert": "bert",
    "vit": "internvl_vision",
    "boxes": "vitp_object_detection",
    "masks": "vitp_segmentation",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Return a folder with data, an empty folder, configurations of models, and invalid files, for all mistakes."""
    folder = tmp_path_factory.mktemp("mistakes") / "desk"
    for name in ("model", "empty", "texts", "trained", "data", *MODEL_TYPES):
        (folder / name).mkdir(parents=True)
    for name, model_type in MODEL_TYPES.items():
        (folder / name / "config.json").write_text(json.dumps({"model_type": model_type}))
    for name, text in FILE_TEXTS.items():
        (folder / name).write_text(text, encoding="latin-1")
    for split in ("train", "test"):
        Dataset.from_list([sized_row(0, [(60, 56)])]).to_parquet(folder / "data" / f"{split}.parquet")
    return folder


@pytest.fixture
def desk(folder, monkeypatch):
    monkeypatch.chdir(folder)
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder.parent / "cache"))
    monkeypatch.setattr(sys, "argv", ["vitp"])
    return folder


@pytest.mark.parametrize(
    ("words", "named", "status"),
    [*((*mistake, 2) for mistake in MISTAKES), ("push_to_hub bert org/na/me --what model", "'org/na/me'", 1)],
)
def test_mistake_is_one_line_and_leaves_nothing(words, named, status, desk, capsys):
    before = sorted(desk.rglob("*"))
    start = time.process_time()
    with pytest.raises(SystemExit) as end:
        main(shlex.split(words))
    seconds = time.process_time() - start
    line = capsys.readouterr().err.splitlines()[-1]
    assert re.search(f"^error: .*({named})", line), line
    assert end.value.code == status, line
    assert "(traceback: " not in line
    assert sorted(desk.rglob("*")) == before and seconds < 10


def test_debug_option_prints_traceback(desk, capsys):
    with pytest.raises(SystemExit):
        main(["pretran"])
    assert "Traceback" not in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["export_backbone", "empty", "out", "--debug"])
    assert "Traceback" in capsys.readouterr().err
