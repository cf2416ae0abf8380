"""Classification probes compared with scikit-learn and loops, and the recipe, for backbones of several types."""

import json
import zlib

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
from sklearn.metrics import accuracy_score, balanced_accuracy_score
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from transformers import AutoImageProcessor, AutoModel

from modeling_vitp import ViTPImageProcessor, ViTPVisionModel, export_backbone, spread_bands
from modeling_vitp.metrics.resampling import Score, paired_difference, resample
from modeling_vitp.probing.arguments import ProbeArguments
from modeling_vitp.probing.backbones import load_backbone
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
    assert [row[0] for row in rows[2:]] == [*names, "most frequent class"]
    scores = results[names[1], "linear", "2 shots"]["scores"]["accuracy"]
    assert rows[3][2] == f"{scores['mean']:.3f} ± {scores['spread']:.3f}"
    assert rows[4][1:] == ["0.375"] * 4


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
    features = Features({"picture": ImageFeature(), "kind": ClassLabel(names=["no", "yes"]), "group": Value("string")})
    columns = {"picture": pictures, "kind": labels, "group": ["x"] * 12}
    (tmp_path / "data").mkdir()
    Dataset.from_dict(columns, features=features).to_parquet(tmp_path / "data" / "train.parquet")
    split = ["train", "test", 0.5, "picture", "kind"]
    samples, names = open_samples(str(tmp_path / "data"), None, *split)
    assert names == ["no", "yes"]
    counts = {role: np.bincount(part.labels).tolist() for role, part in samples.items()}
    assert counts == {"train": [3, 3], "test": [3, 3]}
    ids = [{bytes(row["picture"]["bytes"]) for row in samples[role].rows} for role in ("train", "test")]
    assert len(ids[0] | ids[1]) == 12
    arguments = ["--backbones", str(save_backbone(tmp_path / "b", "vitp")), "--dataset_name", str(tmp_path / "data")]
    arguments += ["--image_column", "picture", "--label_column", "kind", "--test_share", "0.5"]
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


@pytest.mark.parametrize("whose", ["data", "backbone"])
def test_multi_band_images_use_input_spec(tmp_path, whose):
    """Use the input spec of the data for all backbones, or by default that of each backbone."""
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
        with pytest.raises(ValueError, match=r"train/a/0.tif: .*5 bands"):
            main([*arguments[:-2], "--backbones", str(save_backbone(tmp_path / "vit", "vit"))])


def test_multi_band_backbone_gets_its_bands(tmp_path):
    """Compare the features of an image with those of the model and its image processor."""
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
    with pytest.raises(ValueError, match=r"4 bands \(B02, .*2 bands \(VV, VH\)"):
        main(["--backbones", str(folder), *arguments, "--input_spec", json.dumps({"band_names": ["VV", "VH"]})])
    for path in (tmp_path / "data").rglob("1.tif"):
        write_bands(path, np.zeros((3, 24, 30), np.uint16))
    with pytest.raises(ValueError, match=r"1\.tif: .*4 bands \(B02, .*B08\).* 3"):
        main(["--backbones", str(folder), *arguments, "--output_dir", str(tmp_path / "other")])


@pytest.mark.parametrize(
    ("what", "arguments", "message"),
    [
        ("missing", [], "nothing"),
        ("split", ["--test_split", "val"], "val"),
        ("same split", ["--test_split", "train"], "train_split and test_split must differ"),
        ("broken", [], "train/a/01.png"),
        ("unknown class", [], "'c'"),
        ("shots", ["--shots", "3"], r"at least 3 .*'b' \(2\)"),
        ("share", ["--shares", "0"], "shares"),
        ("test share", ["--test_share", "1"], "test_share"),
        ("all held out", ["--test_share", "0.8"], r"classes \['b'\]"),
        ("no whole patches", ["--image_size", "50"], "image_size must be a multiple of 16 x 16"),
        ("none held out", ["--test_share", "0.1"], "test_share=0.1"),
        ("pooling", ["--pooling", "max"], "'max'"),
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
        ("classification", {"pixel_control": True}, "pixel_control"),
        ("classification", {"depths": 4}, "depths"),
        ("segmentation", {"pooling": "cls"}, "pooling"),
        ("detection", {"num_neighbours": 5}, "num_neighbours"),
        ("detection", {"input_spec": {"bands": [2, 1, 0]}}, "input_spec .*`input_spec` in `data`"),
        ("classification", {"test_share": 0.5}, "test_share .*`splits` in `data`"),
        ("segmentation", {"image_column": "picture"}, "image_column .*`columns` in `data`"),
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


@pytest.mark.parametrize(
    ("values", "feature", "column", "message"),
    [
        ([0, -1], ClassLabel(names=["a", "b"]), "label", "Row 1 of split 'train'"),
        (["a", None, "b"], Value("string"), "label", "Row 1 of split 'train'"),
        ([0.5, 2.0], Value("float32"), "label", "0.5"),
        (["a", "a"], Value("string"), "label", "'a'"),
        (["a", "b"], Value("string"), "kind", "kind"),
    ],
)
def test_invalid_class_columns_are_named(tmp_path, values, feature, column, message):
    name = write_rows(tmp_path, values, feature)
    with pytest.raises(ValueError, match=message):
        open_samples(name, None, "train", "test", 0.5, label_column=column)


def test_classes_without_images_are_removed(tmp_path):
    """Check that labels and names match after classes without images are removed."""
    for feature, names in ((Value("int64"), ["1", "4"]), (ClassLabel(names=list("abcdef")), ["b", "e"])):
        samples, found = open_samples(write_rows(tmp_path, [4, 1] * 4, feature), None, "train", "test", 0.5)
        assert found == names
        for part in samples.values():
            assert part.labels.tolist() == [int(row["label"] == 4) for row in part.rows] and len(part) == 4


def hash_of(*parts) -> int:
    return zlib.crc32(str(parts).encode())


def test_class_may_have_split_name(tmp_path):
    for split, number in (("train", 3), ("test", 2)):
        for name in ("bridge", "train_station", "test site"):
            (tmp_path / split / name).mkdir(parents=True)
            for index in range(number):
                picture(8, 8, hash_of(split, name, index)).save(tmp_path / split / name / f"{index}.png")
    samples, names = open_samples(str(tmp_path), None, "train", "test")
    assert names == ["bridge", "test site", "train_station"]
    assert {role: part.labels.tolist() for role, part in samples.items()} == {
        "train": [0] * 3 + [1] * 3 + [2] * 3,
        "test": [0] * 2 + [1] * 2 + [2] * 2,
    }
    assert not {*samples["train"].files_or_rows()} & {*samples["test"].files_or_rows()}
    assert len(open_samples(str(tmp_path), None, "train", "test", 0.4)[0]["test"]) == 3


def test_shared_images_are_logged(tmp_path, caplog):
    for split in ("train", "test"):
        for index, name in enumerate("ab"):
            (tmp_path / split / name).mkdir(parents=True)
            picture(8, 8, index if name == "a" else hash_of(split, name, index)).save(tmp_path / split / name / "0.png")
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


@pytest.mark.parametrize(
    ("settings", "test_split", "message"),
    [({"multi_label": True}, "test", "multi_label"), ({}, "train", "must differ, got 'train'")],
)
def test_invalid_described_classes_are_refused(tmp_path, settings, test_split, message):
    make_classes(tmp_path / "data", {"train": {"a": 2, "b": 2}, "test": {"a": 1, "b": 1}})
    data = {"root": str(tmp_path / "data")} | settings
    with pytest.raises(ValueError, match=message):
        ClassificationProbe.open(
            ProbeArguments(backbones=["b"], data=data, task="classification", test_split=test_split)
        )


@pytest.mark.parametrize("place", ["train/overview.png", "test/a/2019/x.png"])
def test_misplaced_image_is_named(tmp_path, place):
    for index, folder in enumerate(("train/a", "train/b", "test/a", "test/b")):
        (tmp_path / folder).mkdir(parents=True)
        picture(8, 8, index).save(tmp_path / folder / "0.png")
    open_samples(str(tmp_path), None, "train", "test")
    (tmp_path / place).parent.mkdir(exist_ok=True)
    picture(8, 8, 9).save(tmp_path / place)
    with pytest.raises(ValueError, match=place):
        open_samples(str(tmp_path), None, "train", "test")


def test_intervals_compare_backbones_with_the_first(tmp_path, capsys):
    make_classes(tmp_path / "data", {"train": {"barn": 6, "car": 5}, "test": {"barn": 7, "car": 8}})
    names = [str(save_backbone(tmp_path / kind, kind)) for kind in ("vitp", "dinov2")]
    arguments = ["--backbones", *names, "--dataset_name", str(tmp_path / "data"), "--num_neighbours", "3"]
    arguments += ["--shots", "2", "--output_dir", str(tmp_path / "out")]
    assert main(arguments) == 0
    assert not any("resampled" in item for item in read_metrics(tmp_path / "out")["results"])
    capsys.readouterr()
    assert main([*arguments, "--intervals", "true"]) == 0
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
    scores = task.scores(predicted)
    truth = np.repeat([0, 1], [7, 8])
    assert scores.main.value == scores["accuracy"] == accuracy_score(truth, predicted)
    expected = [accuracy_score(truth[draw], predicted[draw]) for draw in resample(15)[:50]]
    assert scores.main.resampled[:50] == pytest.approx(expected) and scores.main.cases == 15
    task.cases = list("abcab" * 3)
    scenes = [np.flatnonzero(np.array(task.cases) == name) for name in "abc"]
    draws = (np.concatenate([scenes[index] for index in draw]) for draw in resample(3)[:50])
    scores = task.scores(predicted)
    expected = [accuracy_score(truth[draw], predicted[draw]) for draw in draws]
    assert scores.main.resampled[:50] == pytest.approx(expected) and scores.main.cases == 3
