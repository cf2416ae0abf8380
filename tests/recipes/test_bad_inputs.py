"""Mistakes of users: one line that names the mistake, the right exit status, and no written files."""

import json
import re
import shlex
import sys
import time

import pytest
import yaml
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
    ("train_model", "'train_model'"),
    ("pretrain --config quickstrt", "'quickstrt'.*quickstart"),
    ("pretrain --config quickstrat", "'quickstrat'.*'quickstart'"),
    ("pretrain --config zzzz.yaml", "zzzz.yaml"),
    ("pretrain --config brokn", "'broken.yaml'"),
    ("pretrain --config broken.yaml", "expected|mapping|scanning"),
    ("pretrain --config binary.yaml", "binary.yaml.*UTF-8"),
    ("pretrain --config names.yaml", "dataset_name to be text"),
    ("pretrain --config signal.yaml", "save_on_signal to be a list"),
    ("pretrain --config dash.yaml", "'learning-rate'.*'learning_rate'"),
    ("probe --backbones b --data empty", "got the folder 'empty'"),
    ("pretrain --config key.yaml --config key.yaml", "give --config once"),
    ("pretrain --config", "--config needs a name"),
    ("pretrain quickstart", "'quickstart'.*--config quickstart"),
    (f"{PRETRAIN} quickstart", "'quickstart'.*--config quickstart"),
    ("pretrain --cofig quickstart", "'cofig'.*'config'"),
    ("pretrain --learning_rat 1", "'learning_rat'.*'learning_rate'"),
    ("export_backbone --outputs x", "'--outputs'"),
    ("make_instructions --outputdir x", "'--outputdir'.*'--output_dir'"),
    ("convert --licence x", "'--licence'.*'--license'"),
    ("space --prot 3", "'--prot'.*'--port'"),
    ("help pretran", "'pretran'.*'pretrain'"),
    ("finetune_segmentation --config lovda", "'lovda'.*loveda"),
    ("probe --backbones b --data lovda", "'lovda'.*loveda"),
    ("probe --backbones b --data '[1]'", r"data to be a mapping.*'\[1\]'"),
    # options and their values
    (f"{SEGMENT} --batch_size 4", "'batch_size'.*per_device_eval_batch_size or per_device_train_batch_size"),
    (f"{SEGMENT} --detector d_fine", "'detector'.*vitp finetune_detection.*vitp finetune_segmentation --help_all"),
    (f"{SEGMENT} --crop 3", "'crop'.*'crop_"),
    (f"{SEGMENT} --dataset_name data", "'dataset_name'.*--data_root"),
    (f"{PRETRAIN} --learning_rat 1", "'learning_rat'.*'learning_rate'"),
    ("pretrain --config key.yaml", "'max_step'.*'max_st"),
    ("pretrain --config quickstart word", "'word'"),
    (f"{PRETRAIN} --max_patches many", "max_patches.*invalid int"),
    (f"{PRETRAIN} --output_dir data {scratch()}", "output_dir='data' is dataset_name"),
    (
        f"{CLASSIFY} --output_dir vit --model_name_or_path vit --data_root data",
        "output_dir='vit' is model_name_or_path",
    ),
    ("validate_data data --output_dir scene.png", "output_dir='scene.png'.*is a file"),
    ("export_onnx vit a.onnx --tolerance -1", "--tolerance.*'-1'"),
    ("space --port 99999", "--port.*'99999'"),
    ("make_instructions voc data --split_list empty.txt --output_dir out", "empty.txt"),
    (f"{PRETRAIN} --max_patches -2", "max_patches.*-2"),
    (f"{PRETRAIN} --vrl_drop_ratio 75", "vrl_drop_ratio.*75.0"),
    ("evaluate_robustness --models m --severities 6", "severities.*got 6"),
    (f"{CLASSIFY} --crop_size 3 --data_root empty", "'crop_size'.*vitp finetune_segmentation"),
    ("export_backbone model", "required: output_dir"),
    ("finetune_detection --config dota_v2 --submission '{\"nmss\": 0.5}'", "submission.*nmss"),
    ("probe --dataset_name data", "backbones"),
    *(
        (f"{words} --output_dir trained", "trained has a model.*metrics.json.*--output_dir")
        for words in (
            "probe --backbones vit --dataset_name data",
            "evaluate_vlm --models model --dataset_name data",
            "evaluate_robustness --models boxes",
        )
    ),
    ("convert", "required: source, target .*vitp convert --help"),
    ("convert empty out --to vit", "--to: invalid choice: 'vit'"),
    ("make_instructions kitti empty --output_dir out", "'kitti'.*coco"),
    ("push_to_hub model org/name", "required: --what"),
    # adapt
    ("adapt --data data --start vit --output_dir out --budget soon", "budget .*24h.*'soon'"),
    ("adapt --data data --output_dir out", "start is missing.*--start facebook/dinov2-base"),
    ("adapt --data data --start modle --output_dir out", "'modle'.*'model'"),
    ("adapt --data data --start vit --output_dir out --baselines start boxes", "boxes.*'vitp_object_detection'"),
    # the start of a training
    ("pretrain --dataset_name data " + scratch(), "output_dir is missing"),
    ("pretrain --dataset_name data --output_dir out --probe_data quickstart", "mapping `data`.*'quickstart'"),
    ("probe --backbones bert --data quickstart", "mapping `data`.*'quickstart'"),
    ("probe --backbones bert --data empty.yaml", "mapping `data`.*'empty.yaml'"),
    (PRETRAIN, "either model_name_or_path or from_scratch"),
    (f"{START} --model_name_or_path model", "either model_name_or_path or from_scratch.*--from_scratch '{}'"),
    (f"{PRETRAIN} --from_scratch '{{}}' --model_name_or_path bert", "bert is a 'bert'"),
    (f"{PRETRAIN} --from_scratch '{{]'", "from_scratch .*'{]'"),
    (f"{PRETRAIN} {WITHOUT_VOCABULARY}", "vocab_size"),
    (f"{PRETRAIN} {scratch(vocab_size='many')}", "vocab_size.*'many'"),
    (f"{PRETRAIN} --vision_model vit --language_model vit", "language_model vit.*ViT"),
    (f"{CLASSIFY} --data_root empty --model_name_or_path outputs/x/backbone", "outputs/x/backbone.*vitp convert REPO"),
    (f"{PRETRAIN} {scratch(vocab=3)}", "'vocab'.*'vocab_size'"),
    (f"{PRETRAIN} {scratch(vision_config={'num_hiden_layers': 2})}", "'num_hiden_layers'.*'num_hidden_layers'"),
    (f"{PRETRAIN} --model_name_or_path model --vision_model model", "belong together|Give eit"),
    (f"{PRETRAIN} --vision_model model", "vision_model and language_model belong together"),
    (f"{START} --lora_r 8", "lora_r.*--use_peft"),
    (f"{START} --activation_checkpointing_kwargs '{{\"evry_n_layers\": 2}}'", "'evry_n_layers'.*'every_n_layers'"),
    (f"{PRETRAIN} {scratch(**ROPE)}", "'rope_thet'.*'rope_theta'"),
    (f"{PRETRAIN} --model_name_or_path ./modle", "modle.*'model'"),
    (f"{PRETRAIN} --model_name_or_path modle", "modle.*'model'"),
    (f"{PRETRAIN} --model_name_or_path 'my own model'", "'my own model'"),
    (f"{PRETRAIN} --model_name_or_path org/model", "'org/model'.*HF_HUB_OFFLINE"),
    (f"{PRETRAIN} --model_name_or_path scene.png", "'scene.png' is a file"),
    (f"{PRETRAIN} --model_name_or_path /no/model", "'/no/model'"),
    (f"{PRETRAIN} --model_name_or_path vit", "vit is a backbone.*--vision_model"),
    (f"{PRETRAIN} --model_name_or_path empty", "empty"),
    (f"{PRETRAIN} --model_name_or_path bert", "bert is a 'bert' model"),
    (f"{DETECT} --head '{{\"neck_chanels\": 32}}'", "'neck_chanels'.*'neck_channels'"),
    (f"{DETECT} --head '{{\"neck_channels\": 0}}'", "head.neck_channels.*got 0"),
    (
        "finetune_segmentation --config loveda --model_name_or_path '' --from_scratch '{\"hidden_size\": 8}' "
        "--do_train false --output_dir out",
        "do_train.*from_scratch.*model_name_or_path",
    ),
    # data
    ("pretrain --output_dir out", "--config, dataset_name, annotations or mixture"),
    (f"{PRETRAIN} --mixture empty.yaml", "dataset_name='data'.*mixture"),
    ("pretrain --output_dir out --dataset_name ./dta", "dta.*'data'"),
    ("pretrain --output_dir out --dataset_name empty", "empty"),
    (
        "pretrain --output_dir out --dataset_name texts --model_name_or_path bert",
        "texts.*'train'.*'note', 'label'",
    ),
    (f"{PRETRAIN} --dataset_train_split trian", "'trian'.*'?train"),
    (f"{PRETRAIN} --dataset_test_split tset", "'tset'.*test, train"),
    ("pretrain --output_dir out --mixture mix.yml", "mix.yml"),
    ("validate_data empty.yaml", "empty.yaml|sources"),
    ("validate_data mixtures.yaml", "mixtures.yaml"),
    (f'{START} --probe_data \'{{"root": "data"}}\'', "missing 'splits', 'classes'"),
    ("finetune_segmentation --output_dir out --model_name_or_path vit --data '{\"root\": 3}'", "data: root to be text"),
    (f"{START} --probe_data lovda --probe_root empty", "'lovda'.*loveda"),
    (f"{START} --probe_data loveda --probe_root empty --probe_splits train", "give two"),
    (f"{START} --probe_data loveda --probe_root empty", "'train'.*empty/Train"),
    (f"{SEGMENT} --model_name_or_path vit --output_dir out", "loveda|LoveDA|data"),
    (f"{CLASSIFY} --model_name_or_path vit", "data_root.*dataset_name"),
    (f"{CLASSIFY} --model_name_or_path vit --data_root imags", "imags"),
    (f"{CLASSIFY} --model_name_or_path vit --data_root empty", "'train'.*empty/train/{class}/{name}"),
    ("finetune_detection --output_dir out --model_name_or_path vit --data_root imags", "imags"),
    (
        "finetune_detection --output_dir out --model_name_or_path vit --data_root empty",
        "coco, .*voc.*--config: data: {",
    ),
    ("finetune_segmentation --output_dir out --model_name_or_path vit --data_root empty", "empty.*--config: data: {"),
    (segment("trian"), "'trian'.*'train'"),
    (segment(splits={"train": {"image": "{name}.csv", "tile": {"size": 8, "ovrlap": 2}}}), "'ovrlap'.*'overlap'"),
    (segment(splits={"train": {"image": "{name}.csv", "tile": {"size": 8}}}), "tile.*overlap"),
    (segment(splits={"train": FILES}), "scan.nii.gz.*`volumes`"),
    (segment(splits={"train": {"image": "{name}.csv", "part": [0.5, 2]}}), r"part.* 2\."),
    (segment(splits={"train": {"image": "{name:[}.csv"}}), "Pattern .*regular expression"),
    (segment(columns={"img": "a"}), "columns.*'img'.*'image'"),
    (segment(volumes={"plan": "axial"}), "'plan'.*'plane'"),
    (segment(classes=[{"name": "a"}, {"name": "b", "val": 1}]), "'val'.*'value'"),
    (segment(classes="a b"), "classes.*list.*'a b'"),
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
    ("export_backbone new bert", "checkpoint=.new.: file or folder not found"),
    ("convert new bert", "source=.new.: file or folder not found"),
    ("export_backbone org/model bert", "'org/model'.*HF_HUB_OFFLINE"),
    ("predict_large scene.png bert --output o.tif", "model=.scene.png. is a file"),
    ("predict_large bert scen.png --output o.tif", "'scen.png'.*'scene.png'"),
    ("make_instructions voc emty --output_dir out", "'emty'.*'empty'"),
    ("convert ./modle out", "modle.*'model'"),
    ("convert empty out", "empty.*safetensors"),
    ("convert bert data", "data .*exist"),
    ("export_backbone empty out", "empty.*processor"),
    ("export_backbone vit out", "vit.*backbone"),
    ("export_backbone boxes out", "boxes.*'vitp_object_detection'"),
    ("export_backbone model data", "data .*exist"),
    ("export_backbone bert out --format timm", "bert.*'bert'"),
    ("export_backbone model data --format timm", "data .*exist"),
    ("export_onnx empty a.onnx", "empty.*config.json"),
    ("export_onnx bert a.onnx", "bert.*'bert'"),
    ("export_onnx bert data", "data.*folder"),
    ("export_onnx bert no/a.onnx", "no.*folder"),
    ("predict_large bert scene.png --output o.tif", "bert.*'bert'"),
    ("embed bert scen.png --output o.parquet", "'scen.png'.*'scene.png'"),
    ("embed bert scene.png --output o.parquet", "backbone bert"),
    (f"{MAP} --classes quickstart", "mapping `data`.*'quickstart'"),
    (f"{MAP} --classes classes.yaml", "`classes`.*got 0"),
    (f"{MAP} --classes loveda", "--classes with 2 classes, got 7"),
    (f"{MAP} --classes dior", "classes.*a mapping.*airplane"),
    ("push_to_hub ./modle org/name --what model", "modle.*'model'"),
]


@pytest.fixture
def desk(tmp_path, monkeypatch, data_folder):
    """Change to a folder with data, an empty folder, configurations of models, and invalid files."""
    for name in ("model", "empty", "texts", "trained"):
        (tmp_path / name).mkdir()
    types = {"bert": "bert", "vit": "internvl_vision", "boxes": "vitp_object_detection"}
    for name, model_type in (types | {"masks": "vitp_segmentation"}).items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps({"model_type": model_type}))
    key = {"dataset_name": "data", "max_step": 3, "from_scratch": FROM_SCRATCH}
    files = {"broken.yaml": "a: [1, 2\nb: }", "empty.yaml": "{}", "texts/train.csv": "note,label\na ship,1\n"}
    files |= {"trained/model.safetensors": "", "scene.png": "", "texts/scan.nii.gz": "", "binary.yaml": "\x89PNG"}
    files |= {"dash.yaml": "dataset_name: data\nlearning-rate: 1", "empty.txt": ""}
    files |= {"names.yaml": "dataset_name: [data]", "signal.yaml": "dataset_name: data\nsave_on_signal: 3"}
    files |= {"classes.yaml": "data: {root: data}"}
    files |= {"key.yaml": yaml.safe_dump(key)}
    for name, text in files.items():
        (tmp_path / name).write_text(text, encoding="latin-1")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path.parent / f"{tmp_path.name}-cache"))
    monkeypatch.setattr(sys, "argv", ["vitp"])
    return tmp_path


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
