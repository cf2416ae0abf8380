"""The evaluation of vision-language models on rows, beside other images."""

import json

import numpy as np
import pytest
from pictures import picture
from PIL import Image
from tiny_models import vivid_model

from modeling_vitp.evaluation import vlm
from modeling_vitp.evaluation.arguments import VLMArguments
from modeling_vitp.recipes.evaluate_vlm import main

BOXES = ["<ref>tree</ref><box>[[100, 100, 500, 500]]</box>", "[[0, 0, 1000, 1000]]", "<box>[[10, 20, 300, 400]]</box>"]


@pytest.fixture(scope="module")
def place(tokenizer, tmp_path_factory):
    """A folder with a model and with rows of every kind about three images."""
    folder = tmp_path_factory.mktemp("vlm")
    for part in vivid_model(tokenizer):
        part.save_pretrained(folder / "model")
    (folder / "rows").mkdir()
    # No other is about two images, so that these cannot be swapped.
    lines = [{"images": ["0.png", "1.png"], "question": "How many have the two?", "answer": "0"}]
    for place, box in enumerate(BOXES):
        picture(60, 56, place).save(folder / "rows" / f"{place}.png")
        asked = {
            "Where is it?": box,
            "How many trees are there?": str(place),
            "Which?\nA. tree\nB. house": "AB"[place % 2],
            "Describe the image.": f"there are {place} trees in the top left quarter",
        }
        lines += [{"images": [f"{place}.png"], "question": one, "answer": other} for one, other in asked.items()]
    (folder / "rows" / "test.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def arguments(place, **options):
    settings = {"models": [str(place / "model")], "dataset_name": str(place / "rows"), "max_new_tokens": 4}
    return VLMArguments(**settings | options)


def test_a_model_that_looks_is_better_with_its_own_images_than_with_others(place, tmp_path, monkeypatch):
    """It answers what the rows say of the image that it is shown."""
    shown = {np.asarray(Image.open(place / "rows" / f"{number}.png")).tobytes(): number for number in range(3)}
    right = {"Where": BOXES, "How": ["0", "1", "2"], "Which": ["A", "B", "A."]}
    right["Describe"] = [f"There are {number} trees in the top-left quarter." for number in range(3)]

    def looking(model, processor, conversations, **options):
        answers = []
        for (message,) in conversations:
            image, text = message["content"]
            number = shown[np.asarray(image["image"]).tobytes()]
            answers.append(next(said[number] for word, said in right.items() if text["text"].startswith(word)))
        return answers

    monkeypatch.setattr(vlm, "generate_answers", looking)
    metrics = vlm.evaluate_vlm(arguments(place, output_dir=str(tmp_path), batch_size=5, pictures=0))
    (model,) = metrics["models"]
    assert metrics["questions"] == {"grounding": 3, "vqa": 3, "choice": 3, "caption": 3} and metrics["images"] == 3
    assert metrics["not_scored"] == 1
    for kind, name in (("vqa", "accuracy"), ("grounding", "accuracy_at_0.5"), ("choice", "accuracy")):
        assert model["scores"][kind][name]["own"] == 1, kind
    assert model["scores"]["vqa"]["accuracy"] == {"own": 1, "other_images": 0, "gain": [1, 1]}
    # Each is shown the next one of three images.
    assert model["scores"]["choice"]["accuracy"]["other_images"] == pytest.approx(1 / 3)
    iou = model["scores"]["grounding"]["mean_iou"]
    assert iou["own"] == 1 and iou["other_images"] < 0.3 and 0.7 < iou["gain"][0] <= iou["gain"][1] <= 1
    captions = model["scores"]["caption"]
    assert captions["cider"]["own"] > captions["cider"]["other_images"] and "gain" not in captions["bleu_4"]


def test_the_command_prints_a_table_and_leaves_metrics_answers_and_a_picture(place, tmp_path, capsys):
    words = ["--models", str(place / "model"), "--dataset_name", str(place / "rows"), "--output_dir", str(tmp_path)]
    assert main([*words, "--limit", "5", "--max_new_tokens", "4", "--pictures", "1", "--batch_size", "2"]) == 0
    printed = capsys.readouterr().out
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    answers = [json.loads(line) for line in (tmp_path / "answers_model.jsonl").read_text().splitlines()]
    assert len(answers) == 5 == sum(metrics["questions"].values()) and {one["kind"] for one in answers} <= set(
        metrics["models"][0]["scores"]
    )
    assert "| score | questions | model | with other images | gain, 95 % |" in printed
    assert Image.open(tmp_path / "answers_model.png").size == (1000, 280)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"split": "val"}, r"has no split 'val', only \['test'\]: give split\."),
        ({"models": ["no_model"]}, "no_model is no model"),
        ({"split": "test[:3]"}, "about the same image, so that none can be swapped"),
        ({"split": "test[:0]"}, r"test\[:0\] has no row, since test has 13"),
    ],
)
def test_what_cannot_be_asked_is_told(place, options, said):
    with pytest.raises(ValueError, match=said):
        vlm.evaluate_vlm(arguments(place, **options))


def test_rows_without_images_ask_nothing(place, tmp_path):
    (tmp_path / "test.jsonl").write_text(json.dumps({"question": "How many?", "answer": "3"}) + "\n")
    with pytest.raises(ValueError, match="has no questions about images that are scored, in 1 rows"):
        vlm.evaluate_vlm(arguments(place, dataset_name=str(tmp_path)))


def test_a_model_that_does_not_answer_is_told(place, tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "vitp_vision"}')
    with pytest.raises(ValueError, match="is a 'vitp_vision' model; one that answers is needed"):
        vlm.evaluate_vlm(arguments(place, models=[str(tmp_path)]))
    for wrong, said in (({"models": []}, "Give `models`"), ({"dataset_name": None}, "Give `dataset_name`")):
        with pytest.raises(ValueError, match=said):
            arguments(place, **wrong)


def test_an_interval_is_of_means_over_images_drawn_with_repeats():
    rng = np.random.default_rng(0)
    values, images = rng.normal(0.3, 1, 400), np.arange(400)
    low, high = vlm.interval(values, images, 0)
    assert low == pytest.approx(values.mean() - 1.96 * values.std() / 20, abs=0.02)
    assert high == pytest.approx(values.mean() + 1.96 * values.std() / 20, abs=0.02)
    # Questions of one image say the same: as many draws as there are images.
    repeated = vlm.interval(np.repeat(values, 3), np.repeat(images, 3), 0)
    assert repeated == pytest.approx([low, high])
