"""The comparison of pretrainings, with steps that teach nothing: who is trained on what, and what becomes of scores."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import yaml
from datasets import load_dataset
from paths import AERIAL_TREES, ROOT
from PIL import Image

from modeling_vitp.evaluation.arguments import CompareArguments
from modeling_vitp.evaluation.experiments import arms_table, summarise_arms
from modeling_vitp.recipes.compare_pretraining import main
from modeling_vitp.recipes.data.build_tree_masks import (
    REACH,
    TREE,
    UNKNOWN,
    places,
    side_by_side,
    tree_mask,
    write_test,
)
from modeling_vitp.recipes.tasks.trees import comparison as trees_comparison
from modeling_vitp.recipes.tasks.trees.comparison import RANDOM, Comparison, label_subset, split_held_out

CONFIG = ROOT / "recipes" / "configs" / "compare_aerial_trees.yaml"
TINY_VIT = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
TINY_LM = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2}


@pytest.fixture(scope="module")
def aerial_trees():
    return load_dataset(str(AERIAL_TREES))


def tiny_config(folder: Path) -> Path:
    """Both configurations of the repository, with small models and two steps."""
    config = yaml.safe_load(CONFIG.read_text())
    finetuning = yaml.safe_load((ROOT / config["finetuning"]).read_text())
    finetuning |= {"max_steps": 2, "per_device_train_batch_size": 2, "crop_size": 64, "bf16": False, "num_pictures": 0}
    finetuning["watch_samples"] = config["pretraining"]["watch_samples"] = 0
    finetuning["backbone"]["pyramid_channels"] = finetuning["head"]["hidden_size"] = 4
    config["finetuning"] = str(folder / "finetuning.yaml")
    config["from_scratch"]["vision_config"] |= TINY_VIT
    config["from_scratch"]["text_config"] |= {**TINY_LM, "intermediate_size": 32}
    config["pretraining"] |= {"max_steps": 2, "per_device_train_batch_size": 2, "bf16": False, "logging_steps": 1}
    config |= {"output_dir": str(folder / "out"), "dataset_name": str(AERIAL_TREES), "drop_ratios": [0.75]}
    config |= {"seeds": [0, 1], "label_shares": [0.1], "learning_rates": [1e-3]}
    (folder / "finetuning.yaml").write_text(yaml.safe_dump(finetuning))
    (folder / "compare.yaml").write_text(yaml.safe_dump(config))
    return folder / "compare.yaml"


@pytest.fixture(scope="module")
def comparison(tmp_path_factory):
    """The output folder of a tiny comparison, its configuration, and the ids of the rows that each pretraining had."""
    folder = tmp_path_factory.mktemp("comparison")
    config, pretrained_on, texts_of = tiny_config(folder), {}, []
    with pytest.MonkeyPatch.context() as patch:

        class Trainer(trees_comparison.ViTPTrainer):
            def __init__(self, model, args, train_dataset, **kwargs):
                pretrained_on[Path(args.output_dir)] = train_dataset["id"]
                super().__init__(model, args, train_dataset=train_dataset, **kwargs)

        def sample_texts(dataset, *args):
            texts_of.append(list(dataset["id"]))
            return original(dataset, *args)

        original = trees_comparison.sample_texts
        patch.setattr(trees_comparison, "ViTPTrainer", Trainer)
        patch.setattr(trees_comparison, "sample_texts", sample_texts)
        assert main(["--config", str(config)]) == 0
    assert texts_of == [list(ids) for ids in pretrained_on.values()]  # the tokenizer is trained on no other labels
    return folder / "out", config, pretrained_on


def ground(rows) -> dict[str, set[tuple[int, int]]]:
    """Pixels that rows show, thinned to every fourth, by scene."""
    shown = {}
    for row in rows:
        width, height = row["image"].size
        pixels = shown.setdefault(row["scene"], set())
        for x in range(row["left"], row["left"] + width):
            if x % 4 == 0:
                pixels.update((x, y) for y in range(row["top"], row["top"] + height) if y % 4 == 0)
    return shown


def test_instructions_and_masks_are_of_the_same_windows(comparison, aerial_trees):
    folder, _, pretrained_on = comparison
    rows = {row["id"]: row for row in aerial_trees["train"]}
    runs = json.loads((folder / "metrics.json").read_text())["runs"]
    assert {run["arm"] for run in runs} == {RANDOM, "ViTP, r = 0.75"}
    for seed in (0, 1):
        part = folder / f"seed_{seed}" / "labels_0.1"
        labelled = {name.split("#")[0] for name in pretrained_on[part / "pretraining_r_0.75"]}
        assert len(labelled) == 2
        assert all(set(run["windows"]) == labelled for run in runs if run["seed"] == seed)
        masks = {path.stem: np.array(Image.open(path)) for path in (part / "data/train/masks").iterdir()}
        assert masks.keys() == {name.replace("/", "_") for name in labelled}
        assert {path.stem for path in (part / "data/train/images").iterdir()} == masks.keys()
        for name in labelled:
            expected = np.zeros(rows[name]["image"].size[::-1], dtype=bool)
            for left, top, right, bottom in rows[name]["boxes"]:
                expected[max(top, 0) : max(bottom, 0), max(left, 0) : max(right, 0)] = True
            assert ((masks[name.replace("/", "_")] == TREE) == expected).all()
    assert len({tuple(run["windows"]) for run in runs}) == 2  # each seed draws its own


def test_the_test_ground_is_absent_from_all_training(comparison, aerial_trees):
    test, second_scene = ground(aerial_trees["test"]), ground(aerial_trees["second_scene"])
    rows = {row["id"]: row for row in aerial_trees["train"]}
    folder, _, pretrained_on = comparison
    for part, ids in pretrained_on.items():
        trained = ground([rows[name] for name in {name.split("#")[0] for name in ids}])
        assert not trained.keys() & second_scene.keys()
        assert not trained.get("yellowstone", set()) & test["yellowstone"]
        if part.parent.name == "tuning":
            scored = [row for row in rows.values() if row["scene"] == "yellowstone" and row["top"] >= 1960]
            assert len(scored) == 3 and not trained["yellowstone"] & ground(scored)["yellowstone"]
            stems = {path.stem for path in (folder / "tuning/data/test/images").iterdir()}
            assert stems < {row["id"].replace("/", "_") for row in scored}
    assert len(pretrained_on) == 3
    with pytest.raises(ValueError, match=r"yellowstone/1609_0 is trained on and shows ground of yellowstone/1609_0"):
        trees_comparison.check_apart(aerial_trees["test"], aerial_trees["test"])
    with pytest.raises(ValueError, match="leaves 0 windows"):
        split_held_out(aerial_trees["second_scene"], "yellowstone_2", 0)


def test_what_is_finished_is_not_run_again(comparison, monkeypatch, capsys):
    folder, config, _ = comparison
    metrics = json.loads((folder / "metrics.json").read_text())
    with monkeypatch.context() as patch:
        patch.setattr(Comparison, "pretrain", None)
        patch.setattr(trees_comparison.finetune_segmentation, "main", None)
        assert main(["--config", str(config)]) == 0
        assert json.loads((folder / "metrics.json").read_text()) == metrics
        assert arms_table(metrics["summary"], RANDOM) in capsys.readouterr().out

    shutil.copytree(folder, folder.parent / "again")
    part = folder.parent / "again/seed_1/labels_0.1/finetuning_random_0.001"
    (part / "metrics.json").unlink()
    (part / "left_over").touch()
    monkeypatch.setattr(Comparison, "pretrain", None)
    assert main(["--config", str(config), "--output_dir", str(folder.parent / "again")]) == 0
    again = json.loads((folder.parent / "again/metrics.json").read_text())
    assert not (part / "left_over").exists()
    assert again["summary"] == metrics["summary"]
    with pytest.raises(ValueError, match="another label_shares: give another output_dir"):
        main(["--config", str(config), "--label_shares", "0.2"])


def test_learning_rates_are_those_that_are_best_on_the_held_out_ground(tmp_path, monkeypatch, aerial_trees):
    args = CompareArguments(
        **yaml.safe_load(tiny_config(tmp_path).read_text()) | {"learning_rates": [1e-4, 1e-3, 1e-2]}
    )
    scored = {RANDOM: [0.2, 0.1, 0.3], "ViTP, r = 0.75": [0.2, 0.4, 0.3]}
    seen = []

    def run_arm(self, arm, rows, scored_rows, seed, learning_rate, folder):
        seen.append(ground(scored_rows))
        return {"iou": scored[arm][args.learning_rates.index(learning_rate)], "learning_rate": learning_rate}

    monkeypatch.setattr(Comparison, "run_arm", run_arm)
    rates, runs = Comparison(args, aerial_trees["train"], aerial_trees["test"]).tune()
    assert rates == {RANDOM: 1e-2, "ViTP, r = 0.75": 1e-3}
    assert len(runs) == len(seen) == 6
    assert not any(shown["yellowstone"] & ground(aerial_trees["test"])["yellowstone"] for shown in seen)


def test_mean_and_spread_are_those_of_a_hand_computation():
    scores = {(1.0, RANDOM): [0.30, 0.40, 0.35], (1.0, "ViTP, r = 0"): [0.42, 0.44, 0.43]}
    scores |= {(0.1, RANDOM): [0.10, 0.20, 0.30], (0.1, "ViTP, r = 0"): [0.10, 0.10, 0.40]}
    runs = [
        {"seed": seed, "label_share": share, "arm": arm, "iou": values[seed]}
        for seed in range(3)
        for (share, arm), values in scores.items()
    ]
    rows = {(row["label_share"], row["arm"]): row for row in summarise_arms(runs, RANDOM)}
    assert rows[1.0, RANDOM]["iou_mean"] == pytest.approx(0.35)
    assert rows[1.0, RANDOM]["iou_std"] == pytest.approx(0.05)  # sqrt((0.05² + 0.05² + 0) / 2)
    assert rows[1.0, "ViTP, r = 0"]["gain_mean"] == pytest.approx((0.12 + 0.04 + 0.08) / 3)
    assert rows[1.0, "ViTP, r = 0"]["gain_std"] == pytest.approx(0.04)  # sqrt((0.04² + 0.04² + 0) / 2)
    assert rows[0.1, "ViTP, r = 0"]["gain_mean"] == pytest.approx(0.0)
    assert rows[0.1, "ViTP, r = 0"]["gain_std"] == pytest.approx(0.1)  # gains 0, -0.1 and 0.1
    assert arms_table(summarise_arms(runs, RANDOM), RANDOM).splitlines() == [
        "| start | 100% of labels | gain on random | 10% of labels | gain on random |",
        "| --- | --- | --- | --- | --- |",
        "| random | 0.350 ± 0.050 |  | 0.200 ± 0.100 |  |",
        "| ViTP, r = 0 | 0.430 ± 0.010 | +0.080 ± 0.040 | 0.200 ± 0.173 | +0.000 ± 0.100 |",
    ]


def test_a_part_of_the_labels_has_its_share_of_windows_and_trees(aerial_trees):
    trees = [len(boxes) for boxes in aerial_trees["train"]["boxes"]]
    draws = [label_subset(trees, 0.1, seed) for seed in range(20)]
    assert draws == [label_subset(trees, 0.1, seed) for seed in range(20)]
    assert len(set(map(tuple, draws))) > 10
    for chosen in draws:
        assert len(set(chosen)) == 2 == len(trees) * 0.1
        assert 0.08 <= sum(trees[index] for index in chosen) / sum(trees) <= 0.12
    assert label_subset(trees, 1.0, 3) == list(range(20))
    for share, message in ((0.0, "not above 0"), (0.05, "no 5% of the windows")):
        with pytest.raises(ValueError, match=message):
            label_subset([0, 100] * 10, share, 0)


def test_masks_equal_a_loop_over_pixels():
    where, known = (100, 40, 220, 130), (90, 0, 400, 120)
    boxes = [(80, 30, 110, 60), (150, 90, 161, 99), (210, 100, 260, 140), (0, 0, 20, 20)]
    mask = tree_mask(where, boxes, known)
    assert mask.shape == (90, 120) and mask.dtype == np.uint8
    for y in range(90):
        for x in range(120):
            column, row = x + 100, y + 40
            is_tree = any(x0 <= column < x1 and y0 <= row < y1 for x0, y0, x1, y1 in boxes)
            distance = min(column - 90, row - 0, 399 - column, 119 - row)
            assert mask[y, x] == (TREE if is_tree else UNKNOWN if distance < REACH else 0)


def test_each_pixel_of_the_test_ground_is_scored_once(aerial_trees, tmp_path):
    kept = aerial_trees["test"].select(side_by_side(places(aerial_trees["test"])))
    assert sum(len(pixels) for pixels in ground(kept).values()) == pytest.approx(
        sum(len(ground([row])["yellowstone"]) for row in kept)
    )
    assert len(kept) == 33
    write_test(aerial_trees["test"], tmp_path)
    assert len(list((tmp_path / "masks").iterdir())) == 33
    # A crown whose centre lies in the neighbour is a tree here too.
    row = next(row for row in kept if row["left"] == 1833 and row["top"] == 448)
    mask = np.array(Image.open(tmp_path / "masks/yellowstone_1833_448.png"))
    inside = {(x0 + 1833, y0 + 448, x1 + 1833, y1 + 448) for x0, y0, x1, y1 in row["boxes"]}
    reaching_in = {
        (x0 + other["left"] - 1833, y0 + other["top"] - 448, x1 + other["left"] - 1833, y1 + other["top"] - 448)
        for other in aerial_trees["test"]
        for x0, y0, x1, y1 in other["boxes"]
        if (x0 + other["left"], y0 + other["top"], x1 + other["left"], y1 + other["top"]) not in inside
    }
    expected = np.zeros((224, 224), dtype=bool)
    for left, top, right, bottom in {*map(tuple, row["boxes"]), *reaching_in}:
        expected[max(top, 0) : max(bottom, 0), max(left, 0) : max(right, 0)] = True
    assert ((mask == TREE) == expected).all() and not (mask == UNKNOWN).any()
    with pytest.raises(ValueError, match="several scenes"):
        write_test(aerial_trees["train"], tmp_path)


def test_wrong_settings_are_named(tmp_path, aerial_trees):
    settings = yaml.safe_load(tiny_config(tmp_path).read_text())
    with pytest.raises(ValueError, match=r"seeds=\[3, 3\]: a spread needs at least two"):
        CompareArguments(**settings | {"seeds": [3, 3]})
    with pytest.raises(ValueError, match=r"\['steps', 'vrl_drop_ratio'\] are no settings"):
        CompareArguments(**settings | {"pretraining": {"steps": 3, "vrl_drop_ratio": 0.5}})
    rows = aerial_trees["train"].remove_columns("boxes")
    with pytest.raises(ValueError, match=r"split train: no columns \['boxes'\]"):
        Comparison(CompareArguments(**settings), rows, aerial_trees["test"])
