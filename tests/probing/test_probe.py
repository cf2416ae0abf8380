"""Probes against scikit-learn and loops, and the recipe from the command line on, over backbones of several kinds."""

import json

import dense_data
import numpy as np
import pytest
import rasterio
import torch
from datasets import ClassLabel, Dataset, Features, Value
from datasets import Image as ImageFeature
from other_backbones import SQUARE, save_backbone
from pictures import write_bands
from PIL import Image
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import accuracy_score, balanced_accuracy_score, jaccard_score, roc_auc_score
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from transformers import AutoImageProcessor, AutoModel

from modeling_vitp import ViTPImageProcessor, ViTPVisionModel, export_backbone, spread_bands
from modeling_vitp.probing.backbones import load_backbone
from modeling_vitp.probing.classification import open_splits
from modeling_vitp.recipes.probe import main


def make_classes(root, numbers: dict[str, dict[str, int]], size=(40, 36)) -> None:
    """`split/class/name.png`: each class has a colour, with noise."""
    rng = np.random.default_rng(0)
    for split, classes in numbers.items():
        for label, (name, number) in enumerate(sorted(classes.items())):
            for index in range(number):
                labels = np.full(size[::-1], label, dtype=np.uint8)
                dense_data.save(dense_data.picture_of(labels, rng), root / split / name / f"{index:02d}.png")


def read_metrics(folder) -> dict:
    return json.loads((folder / "metrics.json").read_text())


def images_and_labels(root, split: str) -> tuple[list[Image.Image], list[str]]:
    files = sorted((root / split).glob("*/*.png"))
    return [Image.open(path) for path in files], [path.parent.name for path in files]


def voting_neighbours(number: int, temperature: float) -> KNeighborsClassifier:
    def weights(distances: np.ndarray) -> np.ndarray:
        return np.exp((1 - distances) / temperature)

    return KNeighborsClassifier(number, metric="cosine", algorithm="brute", weights=weights)


# The recipe, on classes


def test_two_backbones_on_a_folder(tmp_path, capsys):
    """Every score by plain transformers and scikit-learn."""
    make_classes(
        tmp_path / "data", {"train": {"barn": 6, "car": 5, "lake": 4}, "test": {"barn": 3, "car": 4, "lake": 1}}
    )
    names = [str(save_backbone(tmp_path / kind, kind)) for kind in ("vitp", "dinov2")]
    arguments = ["--backbones", *names, "--dataset_name", str(tmp_path / "data"), "--num_neighbours", "3"]
    arguments += ["--shots", "2", "--shares", "1.0", "--output_dir", str(tmp_path / "out"), "--batch_size", "4"]
    assert main(arguments) == 0
    metrics = read_metrics(tmp_path / "out")
    (train, labels), (test, truth) = (images_and_labels(tmp_path / "data", split) for split in ("train", "test"))
    assert metrics["classes"] == ["barn", "car", "lake"]
    assert metrics["control"] == {"accuracy": 3 / 8, "mean_class_accuracy": pytest.approx(1 / 3)}
    results = {(item["backbone"], item["probe"], item["labels"]): item for item in metrics["results"]}
    assert len(results) == len(metrics["results"]) == 8
    for name, prefix in zip(names, (1, 4)):
        model, processor = AutoModel.from_pretrained(name).eval(), AutoImageProcessor.from_pretrained(name)
        with torch.no_grad():
            known, queries = (
                model(**processor(images, return_tensors="pt")).last_hidden_state[:, prefix:].mean(1).double().numpy()
                for images in (train, test)
            )
        oracles = {
            "3-NN": voting_neighbours(3, temperature=0.07),
            "linear": make_pipeline(StandardScaler(), LogisticRegression(C=1 / (len(train) * 0.01), max_iter=10000)),
        }
        for probe, oracle in oracles.items():
            predicted = oracle.fit(known, labels).predict(queries)
            item = results[name, probe, "all labels"]
            assert item["training_images"] == [15]
            assert item["scores"]["accuracy"]["values"] == [pytest.approx(accuracy_score(truth, predicted))]
            balanced = balanced_accuracy_score(truth, predicted)
            assert item["scores"]["mean_class_accuracy"]["mean"] == pytest.approx(balanced)
            assert item["scores"]["accuracy"]["spread"] is None
            item = results[name, probe, "2 shots"]
            assert item["training_images"] == [6, 6, 6]
            scores = item["scores"]["accuracy"]
            assert scores["mean"] == pytest.approx(np.mean(scores["values"]))
            assert scores["spread"] == pytest.approx(np.std(scores["values"], ddof=1))
    shown = capsys.readouterr().out.splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in shown if line.startswith("|")]
    assert rows[0] == ["accuracy", "3-NN, 2 shots", "linear, 2 shots", "3-NN, all labels", "linear, all labels"]
    assert [row[0] for row in rows[2:]] == [*names, "largest class, whatever the image"]
    scores = results[names[1], "linear", "2 shots"]["scores"]["accuracy"]
    assert rows[3][2] == f"{scores['mean']:.3f} ± {scores['spread']:.3f}"
    assert rows[4][1:] == ["0.375"] * 4


def test_features_are_extracted_once(tmp_path, monkeypatch):
    """And again when the weights, the images or the settings are others."""
    make_classes(tmp_path / "data", {"train": {"a": 2, "b": 2}, "test": {"a": 1, "b": 1}})
    folder = save_backbone(tmp_path / "b", "vitp")
    arguments = ["--backbones", str(folder), "--dataset_name", str(tmp_path / "data"), "--output_dir", str(tmp_path)]
    seen = []
    pool = load_backbone(str(folder)).pool.__func__
    monkeypatch.setattr(
        "modeling_vitp.probing.backbones.Backbone.pool", lambda *args: seen.append(len(args[1])) or pool(*args)
    )

    def extracted(*more: str) -> list[int]:
        seen.clear()
        main([*arguments, *more])
        return list(seen)

    assert extracted() == [4, 2]
    first = read_metrics(tmp_path)["results"]
    assert extracted() == [] and read_metrics(tmp_path)["results"] == first
    assert extracted("--shots", "1", "--num_neighbours", "1", "--l2", "1") == []
    assert extracted("--pooling", "cls") == [4, 2]
    assert extracted("--image_size", "32") == [4, 2]
    assert extracted("--random_control", "true") == [4, 2]
    dense_data.save(Image.new("RGB", (40, 36)), tmp_path / "data" / "test" / "b" / "01.png")
    assert extracted()[-1] == 3
    ViTPVisionModel(dense_data.tiny_backbone().config).save_pretrained(folder)
    assert extracted() == [4, 3]


def test_a_data_set_in_parquet_held_out(tmp_path):
    """Without a test split, and with classes that are named otherwise."""
    rng = np.random.default_rng(0)
    labels = [0, 1] * 6
    pictures = [dense_data.picture_of(np.full((20, 20), label, dtype=np.uint8), rng) for label in labels]
    features = Features({"picture": ImageFeature(), "kind": ClassLabel(names=["no", "yes"]), "group": Value("string")})
    columns = {"picture": pictures, "kind": labels, "group": ["x"] * 12}
    (tmp_path / "data").mkdir()
    Dataset.from_dict(columns, features=features).to_parquet(tmp_path / "data" / "train.parquet")
    split = ["train", "test", 0.5, "picture", "kind"]
    rows, classes, names = open_splits(str(tmp_path / "data"), None, *split)
    assert names == ["no", "yes"]
    assert {role: np.bincount(values).tolist() for role, values in classes.items()} == {"train": [3, 3], "test": [3, 3]}
    ids = [{bytes(row["picture"]["bytes"]) for row in rows[role]} for role in ("train", "test")]
    assert len(ids[0] | ids[1]) == 12
    arguments = ["--backbones", str(save_backbone(tmp_path / "b", "vitp")), "--dataset_name", str(tmp_path / "data")]
    arguments += ["--image_column", "picture", "--label_column", "kind", "--test_share", "0.5"]
    assert main([*arguments, "--output_dir", str(tmp_path / "out")]) == 0
    assert read_metrics(tmp_path / "out")["results"][1]["scores"]["accuracy"]["mean"] == 1.0


def test_backbones_and_data_of_the_hub(hub, tmp_path):
    """A backbone as it is, and at an older commit; what was downloaded is probed as the folder is."""
    make_classes(tmp_path / "data", {"train": {"a": 3, "b": 3}, "test": {"a": 2, "b": 2}})
    folder, api = save_backbone(tmp_path / "b", "vitp"), hub.api()
    api.create_repo("tester/data", repo_type="dataset")
    api.upload_folder(repo_id="tester/data", repo_type="dataset", folder_path=tmp_path / "data")
    api.create_repo("tester/b")
    older = api.upload_folder(repo_id="tester/b", folder_path=folder).oid
    ViTPVisionModel(dense_data.tiny_backbone().config).save_pretrained(folder)
    api.upload_file(repo_id="tester/b", path_in_repo="model.safetensors", path_or_fileobj=folder / "model.safetensors")
    names = ["tester/b", f"tester/b@{older}", str(folder)]
    arguments = ["--dataset_name", "tester/data", "--output_dir", str(tmp_path / "out")]
    assert main(["--backbones", *names, *arguments]) == 0
    results = read_metrics(tmp_path / "out")["results"][::2]
    assert [item["backbone"] for item in results] == names
    assert results[1]["revision"] == older and results[0]["revision"] not in (older, None)
    features = [np.load(path) for path in (tmp_path / "out" / "features").glob("*.npy")]
    assert len(features) == 6
    first, other, again = (load_backbone(name).model.state_dict() for name in names)
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert not all(torch.equal(first[key], other[key]) for key in first)
    with pytest.raises(ValueError, match="The data set tester/none cannot be opened"):
        main(["--backbones", *names, "--dataset_name", "tester/none"])
    with pytest.raises(ValueError, match="The backbone tester/none cannot be loaded"):
        main(["--backbones", "tester/none", *arguments])


@pytest.mark.parametrize("whose", ["data", "backbone"])
def test_images_of_many_bands_are_read_by_an_input_spec(tmp_path, whose):
    """That of the data for all backbones, else the one that a backbone was exported with."""
    rng = np.random.default_rng(0)
    for split, number in (("train", 3), ("test", 2)):
        for label, name in enumerate("ab"):
            for index in range(number):
                path = tmp_path / "data" / split / name / f"{index}.tif"
                path.parent.mkdir(parents=True, exist_ok=True)
                bands = rng.integers(0, 200, (5, 24, 24), dtype=np.uint16)
                bands[3] += 2000 * label
                with rasterio.open(path, "w", "GTiff", count=5, height=24, width=24, dtype="uint16") as file:
                    file.write(bands)
    spec = {"bands": [3, 2, 1], "window": [0, 3000]}
    folder = save_backbone(tmp_path / "b", "vitp", spec if whose == "backbone" else {"bands": [0]})
    arguments = ["--backbones", str(folder), "--dataset_name", str(tmp_path / "data"), "--output_dir", str(tmp_path)]
    if whose == "data":
        arguments += ["--input_spec", json.dumps(spec)]
    assert main(arguments) == 0
    (test,) = (np.load(path) for path in (tmp_path / "features").glob("*.npy") if len(np.load(path)) == 4)
    with rasterio.open(tmp_path / "data/test/b/1.tif") as file:
        bands = file.read()
    processor = ViTPImageProcessor(**SQUARE, input_spec=spec, crop_to_patches=False)
    with torch.no_grad():
        states = AutoModel.from_pretrained(folder).eval()(processor(bands, return_tensors="pt").pixel_values)
    np.testing.assert_allclose(test[3], states.last_hidden_state[0, 1:].mean(0), atol=5e-3)
    assert read_metrics(tmp_path)["results"][1]["scores"]["accuracy"]["mean"] == 1.0
    if whose == "data":
        with pytest.raises(ValueError, match=r"train, row 0 \(.*tif\): the image has 5 bands"):
            main([*arguments[:-2], "--backbones", str(save_backbone(tmp_path / "vit", "vit"))])


def test_a_backbone_of_other_bands_is_given_them(tmp_path):
    """Its features of a test image are those of the model on what the image processor makes of its file."""
    rng, names = np.random.default_rng(0), ["B02", "B03", "B04", "B08"]
    for split, number in (("train", 3), ("test", 2)):
        for label, name in enumerate("ab"):
            for index in range(number):
                bands = rng.integers(0, 200, (4, 24, 30), dtype=np.uint16)
                bands[3] += 2000 * label
                write_bands(tmp_path / "data" / split / name / f"{index}.tif", bands)
    vit = spread_bands(dense_data.tiny_backbone(), names)
    processor = ViTPImageProcessor(**SQUARE, input_spec={"band_names": names, "window": [0, 3000]})
    folder = export_backbone(vit, tmp_path / "b", processor)
    arguments = ["--dataset_name", str(tmp_path / "data"), "--output_dir", str(tmp_path)]
    assert main(["--backbones", str(folder), *arguments]) == 0
    stored = [np.load(path) for path in (tmp_path / "features").glob("*.npy")]
    inputs = AutoImageProcessor.from_pretrained(folder)(str(tmp_path / "data/test/b/1.tif"), return_tensors="pt")
    with torch.no_grad():
        mean = vit.eval()(**inputs).last_hidden_state[0, 1:].mean(0)
    assert any(len(test) == 4 and np.allclose(test[3], mean, atol=5e-3) for test in stored if test.shape[1] == 32)
    assert read_metrics(tmp_path)["results"][1]["scores"]["accuracy"]["mean"] == 1.0
    with pytest.raises(ValueError, match=r"b takes 4 bands \(B02, .*\), but the input spec has 2 bands \(VV, VH\)"):
        main(["--backbones", str(folder), *arguments, "--input_spec", json.dumps({"band_names": ["VV", "VH"]})])
    for path in (tmp_path / "data").rglob("1.tif"):
        write_bands(path, np.zeros((3, 24, 30), np.uint16))
    with pytest.raises(ValueError, match=r"1\.tif\): the model takes 4 bands \(B02, .*B08\), but the image has 3"):
        main(["--backbones", str(folder), *arguments, "--output_dir", str(tmp_path / "other")])


@pytest.mark.parametrize(
    ("what", "arguments", "message"),
    [
        ("missing", [], "there is no such file or folder"),
        ("split", ["--test_split", "val"], r"no split 'val', only \['test', 'train'\]"),
        ("column", ["--label_column", "kind"], "no column 'kind'.*give label_column"),
        ("image column", ["--image_column", "label"], "no column of images"),
        ("same split", ["--test_split", "train"], "trained and tested on"),
        ("broken", [], r"train, row 1 \(.*01.png\): image 0 .*cannot be read"),
        ("unknown class", [], r"classes \['c'\] of split 'test' have no image in 'train'"),
        ("shots", ["--shots", "3"], r"3 shots.*'b' \(2\)"),
        ("share", ["--shares", "0"], r"shares=\[0.0\] is not in \(0, 1\]"),
        ("test share", ["--test_share", "1"], r"test_share=1.0 is not in \(0, 1\)"),
        ("all held out", ["--test_share", "0.8"], r"no image of the classes \['b'\] to train on"),
        ("none held out", ["--test_share", "0.1"], "less than an image of any class"),
        ("pooling", ["--pooling", "max"], "'max' is none of mean, cls, cls_mean"),
        ("both", ["--data", "{}"], "either `dataset_name`"),
    ],
)
def test_what_is_wrong_with_classes_is_named(tmp_path, what, arguments, message):
    train, test = {"a": 3, "b": 2}, {"a": 1, "b": 1}
    if what == "unknown class":
        test["c"] = 1
    make_classes(tmp_path / "data", {"train": train, "test": test})
    if what == "broken":
        (tmp_path / "data/train/a/01.png").write_bytes(b"no image")
    name = tmp_path / ("nothing" if what == "missing" else "data")
    arguments = ["--backbones", str(save_backbone(tmp_path / "b", "vitp")), "--dataset_name", str(name), *arguments]
    with pytest.raises(ValueError, match=message):
        main([*arguments, "--output_dir", str(tmp_path / "out")])


def test_features_that_are_not_finite(tmp_path):
    make_classes(tmp_path / "data", {"train": {"a": 2, "b": 2}, "test": {"a": 1, "b": 1}})
    model = dense_data.tiny_backbone()
    with torch.no_grad():
        model.encoder.layer[0].lambda_1.fill_(torch.inf)
    export_backbone(model, tmp_path / "b", allow_nan=True)
    arguments = ["--backbones", str(tmp_path / "b"), "--dataset_name", str(tmp_path / "data")]
    with pytest.raises(ValueError, match="b gives features that are not finite"):
        main([*arguments, "--output_dir", str(tmp_path / "out")])


# The recipe, on masks


def test_masks_in_the_layout_of_a_benchmark(tmp_path):
    """LoveDA's, with the file of its configuration; scored again by scikit-learn, from plain transformers' features."""
    dense_data.make_loveda(tmp_path / "data", size=48)
    names = [str(save_backbone(tmp_path / kind, kind)) for kind in ("vitp", "dinov2")]
    arguments = ["--backbones", *names, "--data", str(dense_data.CONFIGS / "loveda.yaml"), "--test_split", "val"]
    arguments += ["--data_root", str(tmp_path / "data"), "--output_dir", str(tmp_path / "out"), "--shares", "1", "0.5"]
    assert main(arguments) == 0
    metrics = read_metrics(tmp_path / "out")
    assert [(item["probe"], item["training_images"]) for item in metrics["results"]] == [
        (probe, images) for images in ([6], [3, 3, 3]) for probe in ("linear", "nonlinear")
    ] * 2
    files = {split: sorted((tmp_path / "data" / split).glob("*/images_png/*.png")) for split in ("Train", "Val")}
    masks = {
        split: [np.array(Image.open(str(path).replace("images_png", "masks_png"))).astype(int) - 1 for path in paths]
        for split, paths in files.items()
    }
    truth = np.concatenate([mask.ravel() for mask in masks["Val"]])
    counted = truth >= 0
    for name, prefix, result in zip(names, (1, 4), metrics["results"][::4]):
        model, processor = AutoModel.from_pretrained(name).eval(), AutoImageProcessor.from_pretrained(name)
        maps = {}
        for split, paths in files.items():
            images = [Image.open(path).resize((64, 64), Image.Resampling.BICUBIC) for path in paths]
            options = {"do_resize": False} | ({"do_center_crop": False} if prefix > 1 else {})
            with torch.no_grad():
                states = model(**processor(images, return_tensors="pt", **options)).last_hidden_state
            maps[split] = states[:, prefix:].unflatten(1, (4, 4))
        inputs, labels = [], []
        for features, mask in zip(maps["Train"], masks["Train"]):
            for (y, x), label in np.ndenumerate(mask):
                if label >= 0:
                    inputs.append(features[y // 12, x // 12].numpy())
                    labels.append(label)
        patches = maps["Train"].reshape(-1, 32).double().numpy()
        scaler = StandardScaler().fit(patches)
        regression = LogisticRegression(C=1 / (len(labels) * 0.01), max_iter=10000)
        regression.fit(scaler.transform(inputs), labels)
        predicted, scores, majority = [], [], []
        for features, mask in zip(maps["Val"], masks["Val"]):
            logits = regression.decision_function(scaler.transform(features.reshape(16, 32))).reshape(1, 4, 4, -1)
            for y, x in np.ndindex(4, 4):
                pixels = mask[y * 12 : y * 12 + 12, x * 12 : x * 12 + 12]
                if (pixels >= 0).any():
                    majority.append(np.bincount(pixels[pixels >= 0]).argmax())
                    scores.append(logits[0, y, x])
            upsampled = torch.nn.functional.interpolate(
                torch.tensor(logits).permute(0, 3, 1, 2), (48, 48), mode="bilinear", align_corners=False
            )
            predicted.append(regression.classes_[upsampled.argmax(1)[0].numpy()].ravel())
        predicted = np.concatenate(predicted)
        classes = sorted({*truth[counted]} | {*predicted[counted]})
        expected = jaccard_score(truth[counted], predicted[counted], labels=classes, average="macro")
        assert result["scores"]["mean_iou"]["mean"] == pytest.approx(expected, abs=0.01)
        odds = np.array(scores)
        odds = odds - np.log([np.exp(np.delete(odds, k, 1)).sum(1) for k in range(odds.shape[1])]).T
        known = {label: column for column, label in enumerate(regression.classes_)}
        areas = [roc_auc_score(np.array(majority) == k, odds[:, known[k]]) for k in np.unique(majority)]
        assert result["scores"]["patch_auc"]["mean"] == pytest.approx(np.mean(areas), abs=0.01)
        assert result["scores"]["mean_iou"]["mean"] > metrics["control"]["mean_iou"]
    largest = np.bincount(np.concatenate([mask[mask >= 0] for mask in masks["Train"]])).argmax()
    present = np.unique(truth[counted])
    assert metrics["control"]["mean_iou"] == pytest.approx((truth[counted] == largest).mean() / len(present))


def test_depths_beside_random_weights_and_bare_pixels(tmp_path):
    """What is read of each, by plain transformers."""
    dense_data.make_loveda(tmp_path / "data", size=64)
    folder = save_backbone(tmp_path / "vitp", "vitp")
    arguments = ["--backbones", str(folder), "--data", str(dense_data.CONFIGS / "loveda.yaml"), "--test_split", "val"]
    arguments += ["--data_root", str(tmp_path / "data"), "--output_dir", str(tmp_path / "out"), "--depths", "2"]
    assert main([*arguments, "--random_control", "true", "--pixel_control", "true"]) == 0
    results = read_metrics(tmp_path / "out")["results"]
    shown = [str(folder), f"{folder}, random weights", f"{folder}, pixels of its patches"]
    assert [item["backbone"] for item in results] == [name for name in shown for _ in range(2)]
    processor, model = AutoImageProcessor.from_pretrained(folder), AutoModel.from_pretrained(folder).eval()
    paths = sorted((tmp_path / "data/Val").glob("*/images_png/*.png"))
    images = [Image.open(path) for path in paths]
    pixels = processor(images, do_resize=False, return_tensors="pt").pixel_values
    with torch.no_grad():
        states = model(pixels, output_hidden_states=True).hidden_states
    layers = len(states) - 1
    tokens = torch.cat([states[depth][:, 1:] for depth in (round(layers / 2), layers)], -1).unflatten(1, (4, 4))
    patches = [
        [pixel[:, y : y + 16, x : x + 16].reshape(-1) for x in range(0, 64, 16)]
        for pixel in pixels
        for y in range(0, 64, 16)
    ]
    patches = torch.stack([torch.stack(row) for row in patches]).unflatten(0, (-1, 4))
    files = [np.load(path) for path in (tmp_path / "out/features").glob("*.npy")]
    files = [array for array in files if len(array) == len(paths)]
    assert len(files) == 3
    for expected in (tokens, patches):
        expected = expected.numpy()
        assert any(array.shape == expected.shape and np.allclose(array, expected, atol=1e-4) for array in files)
    with pytest.raises(ValueError, match=f"depths=9: {folder} has {layers} layers"):
        main([*arguments[:-1], "9"])
    with pytest.raises(ValueError, match="about patches: they need `data`"):
        main(["--backbones", str(folder), "--dataset_name", "x", "--pixel_control", "true"])


def test_shots_of_masks_and_volumes(tmp_path):
    """Volumes are read as the data say, whatever the input spec of a backbone."""
    dense_data.make_amos(tmp_path / "data")
    folder = save_backbone(tmp_path / "b", "vitp", {"window": [500, 600]})
    arguments = ["--backbones", str(folder), "--data", str(dense_data.CONFIGS / "amos2022.yaml"), "--shots", "1"]
    arguments += ["--data_root", str(tmp_path / "data"), "--output_dir", str(tmp_path / "out"), "--seeds", "3"]
    assert main(arguments) == 0
    result, _ = read_metrics(tmp_path / "out")["results"]
    assert result["labels"] == "1 shot" and result["scores"]["mean_iou"]["spread"] is None
    assert 1 <= result["training_images"][0] <= 12
    features = [np.load(path) for path in (tmp_path / "out/features").glob("*.npy")]
    assert features[0].std(axis=(0, 1, 2)).max() > 0


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("pair", "train_1 is a pair of images"),
        ("no masks", "Split 'test' has no masks"),
        ("same split", "'train' is trained and tested on"),
        ("other split", "no split 'validation'"),
        ("same file", "Rural/images_png/0.png is in both splits 'train' and 'val'"),
        ("value", r"masks_png/0.png has .* outside the classes: 99"),
        ("size", r"masks_png/0.png is 48 x 48 pixels, but its image"),
    ],
)
def test_what_is_wrong_with_masks_is_named(tmp_path, what, message):
    test_split = {"no masks": "test", "same split": "train", "other split": "validation"}.get(what, "val")
    data = dense_data.read_config("loveda")["data"]
    if what == "pair":
        data, test_split = dense_data.read_config("levir_cd")["data"], "test"
        dense_data.make_levir_cd(tmp_path / "data")
    else:
        dense_data.make_loveda(tmp_path / "data", size=48)
    if what == "same file":
        data["splits"]["val"] = data["splits"]["train"]
    if what == "value":
        dense_data.save(Image.new("L", (48, 48), 99), tmp_path / "data/Train/Rural/masks_png/0.png")
    if what == "size":
        dense_data.save(Image.new("RGB", (48, 40)), tmp_path / "data/Train/Rural/images_png/0.png")
    arguments = ["--backbones", str(save_backbone(tmp_path / "b", "vitp")), "--test_split", test_split]
    arguments += ["--data", json.dumps(data), "--data_root", str(tmp_path / "data")]
    with pytest.raises(ValueError, match=message):
        main([*arguments, "--output_dir", str(tmp_path / "out")])
