"""Questions of rows, and the evaluation of vision-language models with own and other images."""

import json

import numpy as np
import pytest
from datasets import Dataset, Features, List, Value
from datasets import Image as ImageFeature
from pictures import picture
from PIL import Image
from tiny_models import vivid_model

from modeling_vitp.evaluation import vlm
from modeling_vitp.evaluation.arguments import VLMArguments
from modeling_vitp.evaluation.vlm import answer_kind, conversation_of, other_images, read_questions
from modeling_vitp.instructions.collator import ViTPDataCollator
from modeling_vitp.instructions.from_annotations.questions import MAP, explained, listing, signs_of
from modeling_vitp.instructions.rows import prepare_rows
from modeling_vitp.recipes.evaluate_vlm import main

BOXES = ["<ref>tree</ref><box>[[100, 100, 500, 500]]</box>", "[[0, 0, 1000, 1000]]", "<box>[[10, 20, 300, 400]]</box>"]


@pytest.fixture(scope="module")
def place(tokenizer, tmp_path_factory):
    """Return a folder with a model, and with rows of each kind about three images."""
    folder = tmp_path_factory.mktemp("vlm")
    for part in vivid_model(tokenizer):
        part.save_pretrained(folder / "model")
    (folder / "rows").mkdir()
    # Only one question is about two images, so that its images cannot be swapped.
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


def test_visual_model_gains_from_own_images(place, tmp_path, monkeypatch):
    """Evaluate a model that answers correctly for the image in its input."""
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
    assert metrics["questions"] == {"grounding": 3, "count": 3, "choice": 3, "caption": 3} and metrics["images"] == 3
    assert metrics["not_scored"] == 1
    for kind, name in (("count", "accuracy"), ("grounding", "accuracy_at_0.5"), ("choice", "accuracy")):
        assert model["scores"][kind][name]["own"] == 1, kind
    assert model["scores"]["count"]["accuracy"] == {"own": 1, "other_images": 0, "gain": [1, 1]}
    # The other image is the next one of three.
    assert model["scores"]["choice"]["accuracy"]["other_images"] == pytest.approx(1 / 3)
    iou = model["scores"]["grounding"]["mean_iou"]
    assert iou["own"] == 1 and iou["other_images"] < 0.3 and 0.7 < iou["gain"][0] <= iou["gain"][1] <= 1
    captions = model["scores"]["caption"]
    assert captions["cider"]["own"] > captions["cider"]["other_images"] and "gain" not in captions["bleu_4"]


def test_interrupted_evaluation_goes_on(place, tmp_path, monkeypatch):
    asked, options = [], {"output_dir": str(tmp_path / "out"), "batch_size": 5, "pictures": 0}

    def answering(model, processor, conversations, **_):
        if len(asked) == stop:
            raise KeyboardInterrupt
        asked.append([message[0]["content"] for message in conversations])
        return [str(len(asked)) for _ in conversations]

    monkeypatch.setattr(vlm, "generate_answers", answering)
    stop = 4  # of 3 batches with own images and 3 with others
    with pytest.raises(KeyboardInterrupt):
        vlm.evaluate_vlm(arguments(place, **options))
    with next((tmp_path / "out").glob("unfinished_*")).open("a") as file:
        file.write('["cut')
    stop = None
    vlm.evaluate_vlm(arguments(place, **options))
    assert len(asked) == 6
    lines = [json.loads(line) for line in (tmp_path / "out" / "answers_model.jsonl").read_text().splitlines()]
    assert [line["answer"] for line in lines] == [*"111112222233"]
    assert [line["answer_with_other_image"] for line in lines] == [*"444445555566"]
    assert not list((tmp_path / "out").glob("unfinished_*"))
    stop = 8
    with pytest.raises(KeyboardInterrupt):
        vlm.evaluate_vlm(arguments(place, **options))
    stop = None
    vlm.evaluate_vlm(arguments(place, **options, max_new_tokens=5))  # other answers, which are not mixed
    assert len(asked) == 14


def test_command_writes_table_metrics_and_picture(place, tmp_path, capsys):
    words = ["--models", str(place / "model"), "--dataset_name", str(place / "rows"), "--output_dir", str(tmp_path)]
    assert main([*words, "--limit", "5", "--max_new_tokens", "4", "--pictures", "1", "--batch_size", "2"]) == 0
    printed = capsys.readouterr().out
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    answers = [json.loads(line) for line in (tmp_path / "answers_model.jsonl").read_text().splitlines()]
    assert len(answers) == 5 == sum(metrics["questions"].values())
    assert {one["kind"] for one in answers} <= metrics["models"][0]["scores"].keys()
    assert "| score | questions | model | with other images | gain, 95 % |" in printed
    assert Image.open(tmp_path / "answers_model.png").size == (1000, 310)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"split": "val"}, "'val'"),
        ({"split": "test[:3]"}, "about the same image"),
    ],
)
def test_invalid_options_are_named(place, options, said):
    with pytest.raises(ValueError, match=said):
        vlm.evaluate_vlm(arguments(place, **options))


CHOICES = "Which organ?\nA. left lung\nB. heart"


@pytest.mark.parametrize(
    ("question", "answer", "kind"),
    [
        ("Where is the ship?", "<ref>the ship</ref><box>[[1, 2, 3, 4]]</box>", "grounding"),
        ("Where is the ship?", "At [1, 2, 3, 4].", "grounding"),
        ("Where are ships?", "<box>[[1, 2, 3, 4], [5, 6, 7, 8]]</box>", None),
        ("Describe it.", "A ship at [1, 2, 3, 4] lies beside a long pier in the sun", None),
        (CHOICES, "B", "choice"),
        (CHOICES, "left lung", "choice"),
        (CHOICES, "The answer is B because of its shape in the middle", "choice"),
        (CHOICES, "neither", "vqa"),
        (CHOICES, "Both A and B", "vqa"),
        (CHOICES, "All of the above are seen here, one beside another", "caption"),
        (f"{CHOICES}\nC. Both A and B", "A and B", "choice"),
        ("What is the number of ships?", "12", "count"),
        ("How many ships are in each quarter of the image?", "top left 2, top right 0, bottom left 1", "vqa"),
        ("Map the trees in 2 x 2 cells, with a letter for the covered quarters of each.", "a P c a", "fine_map"),
        ("[caption] What is it?", "a road", "caption"),
        ("Describe the object at [1, 2, 3, 4].", "tree", "vqa"),
        ("Map the image in 3 x 3 cells.", "tree tree road tree road road tree tree tree", "map"),
        ("Map the trees.", "aaBbcdaaAaaBbcdaaAaaBbcdaaA", "map"),
        ("What covers each cell? Write A for dry land, B for sea or none.", "A B A none A B none A B", "map"),
        ("Map the image in 3 x 3 cells. Write a, b, c, d, e, f, g, h or i.", "c a b d e h i g f", "map"),
        ("Which cells are visible?", "Lymphocytes and plasma cells are visible in the stroma", "caption"),
        ("Which cells are these?", "polymorphonuclearneutrophils", "vqa"),
        ("Describe the cells.", "Some cells, the cells of the stroma, the cells of the gland, the cells.", "caption"),
        ("What has changed?", "two houses were built beside the road", "caption"),
    ],
)
def test_answer_kind_is_recognized(question, answer, kind):
    assert answer_kind(question, answer) == kind


@pytest.mark.parametrize("phrasing", MAP)
@pytest.mark.parametrize("phrases", [["tree", "road"], ["dry land", "sea"]])
def test_instruction_maps_are_recognized(phrasing, phrases):
    signs = signs_of(phrases)
    question = phrasing.format(side=7, key=f"Write {listing(explained(signs), 'or')}.")
    for answer in (list(signs.values()) * 3, [signs[None]] * 9):
        assert answer_kind(question, " ".join(answer)) == "map"


def turns(*texts: str) -> list[dict]:
    return [{"role": role, "content": text} for role, text in zip(("user", "assistant") * 4, texts)]


def rows_of(*rows) -> Dataset:
    text = {"role": Value("string"), "content": Value("string")}
    features = Features({"id": Value("string"), "images": List(ImageFeature()), "messages": List(text)})
    stored = []
    for place, (images, messages) in enumerate(rows):
        stored.append({"id": str(place), "images": images, "messages": messages})
    return prepare_rows(Dataset.from_list(stored, features=features))


def test_questions_are_read_from_rows():
    one, two = picture(56, 56, 0), picture(56, 56, 1)
    rows = rows_of(
        ([one], turns("Describe it.", "a road", "How many trees?", "2")),
        ([one], turns("Describe it.", "one long road")),
        ([two], turns("Describe it.", "a house")),
        ([], turns("Who?", "me")),
    )
    questions, left_out = read_questions(rows)
    assert left_out == 1
    assert [(one.id, one.row, one.turn, one.text, one.references, one.kind) for one in questions] == [
        ("0", 0, 1, "Describe it.", ("a road", "one long road"), "caption"),
        ("0", 0, 3, "How many trees?", ("2",), "count"),
        ("2", 2, 1, "Describe it.", ("a house",), "caption"),
    ]
    assert {one.kind for one in read_questions(rows, "vqa")[0]} == {"vqa"}
    with pytest.raises(ValueError, match="Sample '0': .*'a road'"):
        read_questions(rows, "grounding")
    with pytest.raises(ValueError, match="Sample '0': .*choices"):
        read_questions(rows, "choice")


def test_other_images_differ():
    images = [("a",), ("a",), ("b",), ("c", "d"), ("e",), ("d", "c"), ("f",)]
    partners = other_images(images)
    assert [images[place] for place in partners] == [("e",), ("e",), ("f",), ("d", "c"), ("a",), ("c", "d"), ("b",)]
    assert other_images([("a",), ("b",), ("c", "d"), ("c", "d")]) == [1, 0, None, None]


def test_conversation_ends_at_question(processor):
    rows = rows_of(
        ([picture(56, 56, 0)], turns("How?", "so", "Why?", "since")), ([picture(60, 40, 1)], turns("How?", "no"))
    )
    (_, question, other), _ = read_questions(rows)
    collator = ViTPDataCollator(processor)
    for partner, size in ((None, (56, 56)), (other, (60, 40))):
        messages = conversation_of(collator, rows, question, partner)
        assert [message["role"] for message in messages] == ["user", "assistant", "user"]
        assert messages[0]["content"][0]["image"].size == size
    broken = [rows[0], {**rows[1], "images": [{"bytes": b"no", "path": None}]}]
    with pytest.raises(ValueError, match="Sample '0' with the images of '1': image 0 cannot be read"):
        conversation_of(collator, broken, question, other)
