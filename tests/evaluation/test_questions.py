"""Questions of rows: their kinds, their references, and other images."""

import pytest
from datasets import Dataset, Features, Image, List, Value
from pictures import picture

from modeling_vitp.evaluation.vlm import answer_kind, conversation_of, other_images, read_questions
from modeling_vitp.instructions.collator import ViTPDataCollator
from modeling_vitp.instructions.from_annotations.questions import MAP, explained, listing, signs_of
from modeling_vitp.instructions.rows import prepare_rows

CHOICES = "Which organ?\nA. left lung\nB. heart"


@pytest.mark.parametrize(
    ("question", "answer", "kind"),
    [
        ("Where is the ship?", "<ref>the ship</ref><box>[[1, 2, 3, 4]]</box>", "grounding"),
        ("Where is the ship?", "At [1, 2, 3, 4].", "grounding"),
        ("Where are ships?", "<box>[[1, 2, 3, 4], [5, 6, 7, 8]]</box>", None),
        ("Describe it.", "A ship at [1, 2, 3, 4] lies beside a long pier in the sun", None),
        (CHOICES, "B", "choice"),
        (CHOICES, "B. heart", "choice"),
        (CHOICES, "left lung", "choice"),
        (CHOICES, "Left lung.", "choice"),
        (CHOICES, "The answer is B because of its shape in the middle", "choice"),
        (CHOICES, "neither", "vqa"),
        (CHOICES, "Both A and B", "vqa"),
        (CHOICES, "All of the above are seen here, one beside another", "caption"),
        (f"{CHOICES}\nC. Both A and B", "A and B", "choice"),
        ("How many?", "between 0 and 10", "vqa"),
        ("[caption] What is it?", "a road", "caption"),
        ("Describe the image in detail.", "a road", "caption"),
        ("Describe the object at [1, 2, 3, 4].", "tree", "vqa"),
        ("Map the image in 3 x 3 cells.", "tree tree road tree road road tree tree tree", "map"),
        ("Map the trees.", "aaBbcdaaAaaBbcdaaAaaBbcdaaA", "map"),
        ("What covers each cell? Write A for dry land, B for sea or none.", "A B A none A B none A B", "map"),
        ("Map the image in 3 x 3 cells. Write a, b, c, d, e, f, g, h or i.", "c a b d e h i g f", "map"),
        ("What does the map show?", "residential", "vqa"),
        ("Which cells are visible?", "Lymphocytes and plasma cells are visible in the stroma", "caption"),
        ("Which cells are these?", "polymorphonuclearneutrophils", "vqa"),
        ("Describe the cells.", "Some cells, the cells of the stroma, the cells of the gland, the cells.", "caption"),
        ("What has changed?", "two houses were built beside the road", "caption"),
    ],
)
def test_the_answer_kind_answer_is_told_from_question_and_answer(question, answer, kind):
    assert answer_kind(question, answer) == kind


@pytest.mark.parametrize("phrasing", MAP)
@pytest.mark.parametrize("phrases", [["tree", "road"], ["dry land", "sea"]])
def test_maps_of_the_instruction_maker_are_maps_however_they_are_asked_for(phrasing, phrases):
    signs = signs_of(phrases)
    question = phrasing.format(side=7, key=f"Write {listing(explained(signs), 'or')}.")
    for answer in (list(signs.values()) * 3, [signs[None]] * 9):
        assert answer_kind(question, " ".join(answer)) == "map"


def turns(*texts: str) -> list[dict]:
    return [{"role": role, "content": text} for role, text in zip(("user", "assistant") * 4, texts)]


def rows_of(*rows) -> Dataset:
    text = {"role": Value("string"), "content": Value("string")}
    features = Features({"id": Value("string"), "images": List(Image()), "messages": List(text)})
    stored = [
        {"id": str(place), "images": images, "messages": messages} for place, (images, messages) in enumerate(rows)
    ]
    return prepare_rows(Dataset.from_list(stored, features=features))


def test_every_answer_is_asked_for_and_answers_to_the_same_question_are_references_of_one():
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
        ("0", 0, 3, "How many trees?", ("2",), "vqa"),
        ("2", 2, 1, "Describe it.", ("a house",), "caption"),
    ]
    assert {one.kind for one in read_questions(rows, "vqa")[0]} == {"vqa"}
    with pytest.raises(ValueError, match="Sample '0': its answer 'a road' has no box: give kind"):
        read_questions(rows, "grounding")
    with pytest.raises(ValueError, match="Sample '0': its question lists no choices"):
        read_questions(rows, "choice")


def test_other_images_are_half_of_all_away_and_as_many():
    images = [("a",), ("a",), ("b",), ("c", "d"), ("e",), ("d", "c"), ("f",)]
    partners = other_images(images)
    assert [images[place] for place in partners] == [("e",), ("e",), ("f",), ("d", "c"), ("a",), ("c", "d"), ("b",)]
    assert other_images([("a",), ("b",), ("c", "d"), ("c", "d")]) == [1, 0, None, None]


def test_a_conversation_goes_up_to_its_question_and_has_its_own_or_another_image(processor):
    rows = rows_of(
        ([picture(56, 56, 0)], turns("How?", "so", "Why?", "since")), ([picture(60, 40, 1)], turns("How?", "no"))
    )
    (_, question, other), _ = read_questions(rows)
    collator = ViTPDataCollator(processor)
    for partner, size in ((None, (56, 56)), (other, (60, 40))):
        messages = conversation_of(collator, rows, question, partner)
        assert [message["role"] for message in messages] == ["user", "assistant", "user"]
        assert messages[0]["content"][0]["image"].size == size
    broken = [{**rows[0], "images": [{"bytes": b"no", "path": None}]}]
    with pytest.raises(ValueError, match="Sample '0': image 0 cannot be read"):
        conversation_of(collator, broken, question)
    broken = [rows[0], {**rows[1], "images": [{"bytes": b"no", "path": None}]}]
    with pytest.raises(ValueError, match="Sample '0' with the images of '1': image 0 cannot be read"):
        conversation_of(collator, broken, question, other)
