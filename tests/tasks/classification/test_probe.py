"""Classification probes compared with scikit-learn and loops, and the recipe, for backbones of several types."""

import json

import dense_data
import numpy as np
import pytest
import rasterio
import torch
from datasets import ClassLabel, Dataset, Features, Value
from datasets import Image as ImageFeature
from other_backbones import SQUARE, save_backbone
from pictures import picture, write_bands
from PIL import Image
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import accuracy_score, average_precision_score, balanced_accuracy_score, f1_score
from sklearn.multiclass import OneVsRestClassifier
from sklearn.neighbors import KNeighborsClassifier, KNeighborsRegressor
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from transformers import AutoImageProcessor, AutoModel

from modeling_vitp import ViTPImageProcessor, ViTPVisionModel, export_backbone, spread_bands
from modeling_vitp.metrics.resampling import Score, paired_difference, resample
from modeling_vitp.probing.arguments import ProbeArguments
from modeling_vitp.probing.backbones import PatchPixels, load_backbone
from modeling_vitp.recipes.probe import main
from modeling_vitp.tasks.classification.probe import ClassificationProbe, open_samples
from modeling_vitp.tasks.probing import find_probe_class


def make_classes(root, numbers: dict[str, dict[str, int]], size=(40, 36)) -> None:
    """Write noisy images at `SPLIT/CLASS/NAME.png`, with a color for each class."""
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


def test_folder_is_probed_with_two_backbones(tmp_path, capsys):
    """Compare all scores with transformers and scikit-learn."""
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
    scores = results[names[1], "linear", "2 shots"]["scores"]["accuracy"]
    assert rows[3][2] == f"{scores['mean']:.3f} ± {scores['spread']:.3f}"
    assert rows[4][1:] == ["0.375"] * 4


def test_pixel_control_is_the_mean_color_of_patches(tmp_path):
    make_classes(tmp_path / "data", {"train": {"barn": 6, "car": 6}, "test": {"barn": 9, "car": 9}})
    folder = str(save_backbone(tmp_path / "vitp", "vitp"))
    arguments = ["--backbones", folder, "--dataset_name", str(tmp_path / "data"), "--num_neighbours", "3"]
    assert main([*arguments, "--pixel_control", "true", "--output_dir", str(tmp_path / "out")]) == 0
    scores = {}
    for item in read_metrics(tmp_path / "out")["results"]:
        scores[item["backbone"], item["probe"]] = item["scores"]["accuracy"]["mean"]
    patch = AutoModel.from_pretrained(folder).config.patch_size[0]
    processor = AutoImageProcessor.from_pretrained(folder)
    features = {}
    for split in ("train", "test"):
        images, _ = images_and_labels(tmp_path / "data", split)
        features[split] = []
        for pixels in processor(images, return_tensors="np")["pixel_values"]:
            means = []
            for top in range(0, pixels.shape[1], patch):
                for left in range(0, pixels.shape[2], patch):
                    means.append(pixels[:, top : top + patch, left : left + patch].mean((1, 2)))
            features[split].append(np.concatenate(means))
    labels = np.repeat([0, 1], 6)
    neighbours = voting_neighbours(3, 0.07).fit(features["train"], labels)
    accuracy = neighbours.score(features["test"], np.repeat([0, 1], 9))
    assert scores[f"{folder}, pixels of its patches", "3-NN"] == pytest.approx(accuracy)
    backbone = PatchPixels.of(load_backbone(folder))
    pooled = backbone.pool(torch.tensor(processor(images, return_tensors="np")["pixel_values"]), "mean")
    np.testing.assert_allclose(pooled.numpy(), features["test"], atol=1e-5)


def test_features_are_extracted_once(tmp_path, monkeypatch):
    """Extract features again only if weights, images or settings change."""
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


def test_held_out_share_is_tested(tmp_path):
    """Use data without a test split, with another class column."""
    rng = np.random.default_rng(0)
    labels = [0, 1] * 6
    pictures = [dense_data.picture_of(np.full((20, 20), label, dtype=np.uint8), rng) for label in labels]
    features = Features({"picture": ImageFeature(), "kind": ClassLabel(names=["no", "yes"])})
    rows = Dataset.from_dict({"picture": pictures, "kind": labels}, features=features)
    rows.to_parquet(tmp_path / "data" / "train.parquet")
    data = str(tmp_path / "data")
    columns = {"image": "picture", "label": "kind"}
    samples, names = open_samples(data, None, "train", "test", 0.5, columns)
    assert names == ["no", "yes"]
    counts = {role: np.bincount(part.labels).tolist() for role, part in samples.items()}
    assert counts == {"train": [3, 3], "test": [3, 3]}
    ids = [{bytes(row["picture"]["bytes"]) for row in samples[role].rows} for role in ("train", "test")]
    assert len(ids[0] | ids[1]) == 12
    arguments = ["--backbones", str(save_backbone(tmp_path / "b", "vitp")), "--dataset_name", data]
    arguments += ["--columns", json.dumps(columns), "--test_share", "0.5"]
    assert main([*arguments, "--output_dir", str(tmp_path / "out")]) == 0
    assert read_metrics(tmp_path / "out")["results"][1]["scores"]["accuracy"]["mean"] == 1.0


def test_patients_are_held_out_as_a_whole(tmp_path):
    columns = {"image": [picture(8, 8, index) for index in range(24)], "label": [0, 0, 1, 1] * 6}
    columns["patient"] = [str(index // 2 % 8) for index in range(24)]
    features = Features({"image": ImageFeature(), "label": Value("int64"), "patient": Value("string")})
    Dataset.from_dict(columns, features=features).to_parquet(tmp_path / "train.parquet")
    samples, _ = open_samples(str(tmp_path), None, "train", "test", 0.5)
    patients = {role: {*part.cases} for role, part in samples.items()}
    assert not patients["train"] & patients["test"] and len(patients["test"]) == 4
    assert np.bincount(samples["test"].labels).tolist() == [6, 6]


def test_hub_backbones_and_data_are_probed(hub, tmp_path):
    """Probe a backbone at two commits; downloaded data give the scores of the folder."""
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
    with pytest.raises(ValueError, match="tester/none"):
        main(["--backbones", *names, "--dataset_name", "tester/none"])
    with pytest.raises(ValueError, match="The backbone tester/none cannot be loaded"):
        main(["--backbones", "tester/none", *arguments])


def make_bands(root, number_of_bands: int, size=(24, 24)) -> None:
    """Write two classes that differ in the fourth band."""
    rng = np.random.default_rng(0)
    for split, number in (("train", 3), ("test", 2)):
        for label, name in enumerate("ab"):
            for index in range(number):
                bands = rng.integers(0, 200, (number_of_bands, *size), dtype=np.uint16)
                bands[3] += 2000 * label
                write_bands(root / split / name / f"{index}.tif", bands)


def features_of_test_images(folder) -> np.ndarray:
    (features,) = [array for array in map(np.load, (folder / "features").glob("*.npy")) if len(array) == 4]
    return features


@pytest.mark.parametrize("whose", ["data", "backbone"])
def test_multi_band_images_use_input_spec(tmp_path, whose):
    """Use the input spec of the data for all backbones, or by default that of each backbone."""
    make_bands(tmp_path / "data", 5)
    spec = {"bands": [3, 2, 1], "window": [0, 3000]}
    folder = save_backbone(tmp_path / "b", "vitp", spec if whose == "backbone" else {"bands": [0]})
    arguments = ["--dataset_name", str(tmp_path / "data"), "--output_dir", str(tmp_path)]
    options = ["--input_spec", json.dumps(spec)] if whose == "data" else []
    assert main(["--backbones", str(folder), *arguments, *options]) == 0
    with rasterio.open(tmp_path / "data/test/b/1.tif") as file:
        bands = file.read()
    processor = ViTPImageProcessor(**SQUARE, input_spec=spec, crop_to_patches=False)
    with torch.no_grad():
        states = AutoModel.from_pretrained(folder).eval()(processor(bands, return_tensors="pt").pixel_values)
    expected = states.last_hidden_state[0, 1:].mean(0)
    np.testing.assert_allclose(features_of_test_images(tmp_path)[3], expected, atol=5e-3)
    assert read_metrics(tmp_path)["results"][1]["scores"]["accuracy"]["mean"] == 1.0
    if whose == "data":
        with pytest.raises(ValueError, match=r"train/a/0.tif: .*5 bands"):
            main([*arguments, "--backbones", str(save_backbone(tmp_path / "vit", "vit"))])


def test_multi_band_backbone_gets_its_bands(tmp_path):
    """Compare the features of an image with those of the model and its image processor."""
    make_bands(tmp_path / "data", 4, (24, 30))
    names = ["B02", "B03", "B04", "B08"]
    vit = spread_bands(dense_data.tiny_backbone(), names)
    processor = ViTPImageProcessor(**SQUARE, input_spec={"band_names": names, "window": [0, 3000]})
    folder = export_backbone(vit, tmp_path / "b", processor)
    arguments = ["--backbones", str(folder), "--dataset_name", str(tmp_path / "data")]
    assert main([*arguments, "--output_dir", str(tmp_path)]) == 0
    inputs = AutoImageProcessor.from_pretrained(folder)(str(tmp_path / "data/test/b/1.tif"), return_tensors="pt")
    with torch.no_grad():
        mean = vit.eval()(**inputs).last_hidden_state[0, 1:].mean(0)
    np.testing.assert_allclose(features_of_test_images(tmp_path)[3], mean, atol=5e-3)
    assert read_metrics(tmp_path)["results"][1]["scores"]["accuracy"]["mean"] == 1.0
    other = [*arguments, "--output_dir", str(tmp_path / "other")]
    with pytest.raises(ValueError, match=r"4 bands \(B02, .*2 bands \(VV, VH\)"):
        main([*other, "--input_spec", json.dumps({"band_names": ["VV", "VH"]})])
    write_bands(tmp_path / "data/train/a/1.tif", np.zeros((3, 24, 30), np.uint16))
    with pytest.raises(ValueError, match=r"1\.tif: .*4 bands .* 3"):
        main(other)


@pytest.mark.parametrize(
    ("what", "arguments", "message"),
    [
        ("missing", [], "nothing"),
        ("split", ["--test_split", "val"], "val.*test_share"),
        ("same split", ["--test_split", "train"], "train_split.*test_split"),
        ("broken", [], "train/a/01.png"),
        ("unknown class", [], "'c'"),
        ("shots", ["--shots", "3"], r"at least 3 .*'b' \(2\)"),
        ("all held out", ["--test_share", "0.8"], r"classes \['b'\]"),
        ("none held out", ["--test_share", "0.1"], "test_share=0.1"),
        ("both", ["--data", "{}"], "either `dataset_name`"),
        ("no data", ["--data_root", "images"], "data_root"),
    ],
)
def test_invalid_class_data_are_named(tmp_path, what, arguments, message):
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


@pytest.mark.parametrize(
    ("task", "option", "message"),
    [
        ("classification", {"depths": 4}, "depths"),
        ("detection", {"num_neighbours": 5}, "num_neighbours"),
        ("detection", {"input_spec": {"bands": [2, 1, 0]}}, "input_spec"),
        ("classification", {"test_share": 0.5}, "test_share"),
        ("segmentation", {"columns": {"image": "picture"}}, "columns"),
        ("counting", {}, "counting"),
    ],
)
def test_option_without_effect_is_refused(task, option, message):
    with pytest.raises(ValueError, match=message):
        find_probe_class(ProbeArguments(backbones=["b"], data={"root": "r"}, task=task, **option))


def test_non_finite_features_raise_error(tmp_path):
    make_classes(tmp_path / "data", {"train": {"a": 2, "b": 2}, "test": {"a": 1, "b": 1}})
    model = dense_data.tiny_backbone()
    with torch.no_grad():
        model.encoder.layer[0].lambda_1.fill_(torch.inf)
    export_backbone(model, tmp_path / "b", allow_nan=True)
    arguments = ["--backbones", str(tmp_path / "b"), "--dataset_name", str(tmp_path / "data")]
    with pytest.raises(ValueError, match="b are not finite"):
        main([*arguments, "--output_dir", str(tmp_path / "out")])


def write_rows(folder, values, feature) -> str:
    features = Features({"image": ImageFeature(), "label": feature})
    rows = {"image": [Image.new("RGB", (4, 4), (place, 0, 0)) for place in range(len(values))], "label": values}
    Dataset.from_dict(rows, features=features).to_parquet(folder / "train.parquet")
    return str(folder)


def test_classes_without_images_are_removed(tmp_path):
    """Check that labels and names match after classes without images are removed."""
    for feature, names in ((Value("int64"), ["1", "4"]), (ClassLabel(names=list("abcdef")), ["b", "e"])):
        samples, found = open_samples(write_rows(tmp_path, [4, 1] * 4, feature), None, "train", "test", 0.5)
        assert found == names
        for part in samples.values():
            assert part.labels.tolist() == [int(row["label"] == 4) for row in part.rows] and len(part) == 4


def write_pictures(root, paths) -> None:
    for number, path in enumerate(paths):
        dense_data.save(picture(8, 8, number), root / path)


def test_class_may_have_split_name(tmp_path):
    numbers = {"train": 3, "test": 2}
    classes = ["bridge", "test site", "train_station"]
    paths = [f"{split}/{name}/{i}.png" for split, number in numbers.items() for name in classes for i in range(number)]
    write_pictures(tmp_path, paths)
    samples, names = open_samples(str(tmp_path), None, "train", "test")
    assert names == classes
    for role, number in numbers.items():
        assert samples[role].labels.tolist() == [0] * number + [1] * number + [2] * number
    assert not {*samples["train"].files_or_rows()} & {*samples["test"].files_or_rows()}
    assert len(open_samples(str(tmp_path), None, "train", "test", 0.4)[0]["test"]) == 3


CLASSES_OF_SPLITS = ("train/a/0.png", "train/b/0.png", "test/a/0.png", "test/b/0.png")


def test_shared_images_are_logged(tmp_path, caplog):
    write_pictures(tmp_path, CLASSES_OF_SPLITS)
    (tmp_path / "test/a/0.png").write_bytes((tmp_path / "train/a/0.png").read_bytes())
    open_samples(str(tmp_path), None, "train", "test")
    assert "test/a/0.png" in caplog.text and "test/b/0.png" not in caplog.text


def test_held_out_copies_are_logged(tmp_path, caplog):
    make_classes(tmp_path, {"train": {"a": 4, "b": 4}})
    open_samples(str(tmp_path), None, "train", "test", 0.5)
    assert not caplog.text
    for index in (1, 2, 3):
        (tmp_path / "train" / "a" / f"{index:02d}.png").write_bytes((tmp_path / "train/a/00.png").read_bytes())
    open_samples(str(tmp_path), None, "train", "test", 0.5)
    assert "train/a/0" in caplog.text and "'held out'" in caplog.text and "train/b" not in caplog.text
    caplog.clear()
    samples = {"image": [str(path) for path in sorted(tmp_path.rglob("*.png"))], "label": [0] * 4 + [1] * 4}
    rows = Dataset.from_dict(samples).cast_column("image", ImageFeature())
    rows.cast_column("label", ClassLabel(names=["a", "b"])).to_parquet(tmp_path / "rows" / "train.parquet")
    open_samples(str(tmp_path / "rows"), None, "train", "test", 0.5)
    assert "'held out'" in caplog.text


def write_several_classes(root) -> dict[str, np.ndarray]:
    """Write noisy images with a stripe of each of three classes, in scenes of two, and return the labels by split."""
    rng = np.random.default_rng(1)
    labels = {}
    for split, number in (("train", 30), ("test", 24)):
        labels[split] = rng.random((number, 3)) < [0.6, 0.4, 0.3]
        rows = ["image,patient,a,b,c"]
        for index, presence in enumerate(labels[split]):
            mask = np.zeros((24, 24), dtype=np.uint8)
            for place in np.flatnonzero(presence):
                mask[:, 8 * place : 8 * place + 8] = place + 1
            dense_data.save(dense_data.picture_of(mask, rng), root / split / f"{index:02d}.png")
            a, b, c = presence.astype(int)
            rows.append(f"{split}/{index:02d}.png,{split} {index // 2},{a},{b},{c}")
        (root / f"{split}.csv").write_text("\n".join(rows))
    return labels


def test_several_classes_are_probed(tmp_path, capsys):
    """Compare all scores, and those of resampled patients, with scikit-learn."""
    labels = write_several_classes(tmp_path / "data")
    folder = save_backbone(tmp_path / "vitp", "vitp")
    arguments = ["--backbones", str(folder), "--data_root", str(tmp_path / "data"), "--task", "classification"]
    arguments += ["--num_neighbours", "5", "--intervals", "true", "--output_dir", str(tmp_path / "out")]
    assert main([*arguments, "--shots", "3", "--shares", "1.0"]) == 0
    metrics = read_metrics(tmp_path / "out")
    assert (metrics["main_score"], metrics["title"]) == ("mean_average_precision", "mean average precision")
    assert metrics["control"]["mean_average_precision"] == pytest.approx(labels["test"].mean())
    assert "share of each class" in capsys.readouterr().out

    model, processor = AutoModel.from_pretrained(folder).eval(), AutoImageProcessor.from_pretrained(folder)
    features = {}
    for split in ("train", "test"):
        images = [Image.open(path) for path in sorted((tmp_path / "data" / split).glob("*.png"))]
        with torch.no_grad():
            features[split] = model(**processor(images, return_tensors="pt")).last_hidden_state[:, 1:].mean(1).double()
    neighbors = KNeighborsRegressor(
        5, metric="cosine", algorithm="brute", weights=lambda distances: np.exp((1 - distances) / 0.07)
    )
    regressions = OneVsRestClassifier(LogisticRegression(C=1 / (30 * 0.01), tol=1e-10, max_iter=10000))
    linear = make_pipeline(StandardScaler(), regressions)
    neighbors.fit(features["train"], labels["train"].astype(float))
    linear.fit(features["train"], labels["train"].astype(int))
    predictions = {
        "5-NN": neighbors.predict(features["test"]),
        "linear": linear.predict_proba(features["test"]),
    }
    by_probe = {(item["probe"], item["labels"]): item for item in metrics["results"]}
    assert len(by_probe) == 4 and len(by_probe["linear", "3 shots"]["scores"]["macro_f1"]["values"]) == 3
    for probe, probabilities in predictions.items():
        item = by_probe[probe, "all labels"]
        expected = average_precision_score(labels["test"], probabilities, average="macro")
        assert item["scores"]["mean_average_precision"]["values"] == [pytest.approx(expected, abs=1e-6)]
        f1 = f1_score(labels["test"], probabilities > 0.5, average="macro")
        assert item["scores"]["macro_f1"]["mean"] == pytest.approx(f1)
        assert item["cases"] == 12
        patients = sorted(range(12), key=lambda patient: f"test {patient}")
        for draw, resampled in list(zip(resample(12), item["resampled"][0]))[:20]:
            images = np.concatenate([[2 * patients[case], 2 * patients[case] + 1] for case in draw])
            precisions = []
            for label in range(3):
                truth = labels["test"][images, label]
                if truth.any():
                    precisions.append(average_precision_score(truth, probabilities[images, label]))
            assert resampled == pytest.approx(np.mean(precisions), abs=1e-6)


@pytest.mark.parametrize("place", ["train/overview.png", "test/a/2019/x.png"])
def test_misplaced_image_is_named(tmp_path, place):
    write_pictures(tmp_path, CLASSES_OF_SPLITS)
    open_samples(str(tmp_path), None, "train", "test")
    write_pictures(tmp_path, [*CLASSES_OF_SPLITS, place])
    with pytest.raises(ValueError, match=place):
        open_samples(str(tmp_path), None, "train", "test")


def test_intervals_compare_backbones_with_the_first(tmp_path, capsys):
    make_classes(tmp_path / "data", {"train": {"barn": 6, "car": 5}, "test": {"barn": 7, "car": 8}})
    names = [str(save_backbone(tmp_path / kind, kind)) for kind in ("vitp", "dinov2")]
    arguments = ["--backbones", *names, "--dataset_name", str(tmp_path / "data"), "--num_neighbours", "3"]
    arguments += ["--shots", "2", "--output_dir", str(tmp_path / "out"), "--intervals", "true"]
    assert main(arguments) == 0
    results = read_metrics(tmp_path / "out")["results"]
    scores = {
        (item["backbone"], item["probe"]): [
            Score(value, resampled, item["cases"])
            for value, resampled in zip(item["scores"]["accuracy"]["values"], item["resampled"], strict=True)
        ]
        for item in results
    }
    assert {len(draws) for draws in scores.values()} == {3}
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    row = [cell.strip() for cell in lines[-1].strip("|").split("|")]
    expected = [paired_difference(scores[names[1], probe], scores[names[0], probe]) for probe in ("3-NN", "linear")]
    assert row == [names[1], *(f"{one.mean:+.3f} ({one.low:+.3f} to {one.high:+.3f})" for one in expected)]


def test_accuracy_is_resampled_over_images(tmp_path):
    make_classes(tmp_path / "data", {"train": {"barn": 2, "car": 2}, "test": {"barn": 7, "car": 8}})
    samples, classes = open_samples(str(tmp_path / "data"), None, "train", "test")
    task = ClassificationProbe(samples, classes, None, "mean", 3, 0.07, 1e-2, intervals=True)
    predicted = np.arange(15) % 2
    scores = task.scores(np.eye(2)[predicted])
    truth = np.repeat([0, 1], [7, 8])
    assert scores.main.value == scores["accuracy"] == accuracy_score(truth, predicted)
    expected = [accuracy_score(truth[draw], predicted[draw]) for draw in resample(15)[:50]]
    assert scores.main.resampled[:50] == pytest.approx(expected) and scores.main.cases == 15
    task.cases = list("abcab" * 3)
    scenes = [np.flatnonzero(np.array(task.cases) == name) for name in "abc"]
    draws = (np.concatenate([scenes[index] for index in draw]) for draw in resample(3)[:50])
    scores = task.scores(np.eye(2)[predicted])
    expected = [accuracy_score(truth[draw], predicted[draw]) for draw in draws]
    assert scores.main.resampled[:50] == pytest.approx(expected) and scores.main.cases == 3
