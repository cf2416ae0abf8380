"""Data sets in any schema as conversations; for what TRL reads itself, with its own token ids and labels."""

import json
import pickle

import pytest
from datasets import Dataset, Features, IterableDataset, List, Value, load_dataset
from datasets import Image as ImageFeature
from datasets import Video as VideoFeature
from pictures import picture
from row_formats import MESSAGES, write_archives
from sample_rows import assert_same
from trl.trainer.sft_trainer import DataCollatorForVisionLanguageModeling

from modeling_vitp import ViTPDataCollator
from modeling_vitp.instructions.rows import prepare_rows
from modeling_vitp.instructions.schemas import schema_name, to_conversations

QUESTION, ANSWER = {"role": "user", "content": "How many?"}, {"role": "assistant", "content": "12 trees."}
SURE, YES = {"role": "user", "content": "Sure?"}, {"role": "assistant", "content": "Yes"}
IMAGES = List(ImageFeature())


def completions(prompt, completion, num_images=1):
    rows = [
        {"images": [picture(56, 56, n + 7 * i) for i in range(num_images)], "prompt": prompt, "completion": completion}
        for n in range(2)
    ]
    return Dataset.from_list(rows, features=Features({"images": IMAGES, "prompt": MESSAGES, "completion": MESSAGES}))


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    ("prompt", "completion"),
    [
        ([QUESTION], [ANSWER]),
        ([QUESTION, ANSWER, SURE], [YES]),
        ([{"role": "system", "content": "Count."}, QUESTION, ANSWER, SURE, YES, SURE], [YES, SURE, YES]),
    ],
    ids=["one turn", "turns before", "turns before and after"],
)
def test_a_prompt_and_its_completion_have_the_ids_and_labels_of_trl(processor, prompt, completion, streaming):
    """But for questions within a completion, which TRL learns too, and the end of the last line."""
    stored = completions(prompt, completion)
    theirs = DataCollatorForVisionLanguageModeling(processor, completion_only_loss=True)
    batch = theirs([{**row} for row in stored])
    rows = to_conversations(stored.to_iterable_dataset() if streaming else stored)
    ours = ViTPDataCollator(processor)(list(rows))
    assert ours["input_ids"].tolist() == batch["input_ids"].tolist()
    is_answer = (
        ViTPDataCollator(processor)([{**row, "messages": prompt + completion, "id": "0"} for row in stored])["labels"]
        != -100
    )
    expected = batch["labels"].masked_fill(~is_answer, -100)
    assert ours["labels"].tolist() == expected.tolist() and (ours["labels"] != -100).any()


def test_messages_have_the_ids_and_labels_of_trl(processor):
    rows = Dataset.from_list(
        [{"images": [picture(56, 56, n)], "messages": [QUESTION, ANSWER, SURE, YES]} for n in range(2)],
        features=Features({"images": IMAGES, "messages": MESSAGES}),
    )
    theirs = DataCollatorForVisionLanguageModeling(processor, assistant_only_loss=True)([{**row} for row in rows])
    assert to_conversations(rows) is rows and schema_name(rows) == "messages"
    ours = ViTPDataCollator(processor)(list(prepare_rows(rows)))
    for name in ("input_ids", "labels", "pixel_values"):
        assert ours[name].tolist() == theirs[name].tolist()


def test_a_prompt_alone_is_nothing_to_learn_from(processor):
    rows = to_conversations(completions([QUESTION, ANSWER], [SURE]))
    with pytest.raises(ValueError, match="no assistant message to learn from"):
        ViTPDataCollator(processor)(list(rows))


@pytest.mark.parametrize("streaming", [False, True])
def test_questions_and_answers_keep_their_ids_and_their_images_encoded(processor, streaming):
    rows = [{"id": f"q{n}", "image": picture(56, 56, n), "question": "How many?", "answer": n} for n in range(3)]
    features = {"id": Value("string"), "image": ImageFeature(), "question": Value("string"), "answer": Value("int64")}
    stored = Dataset.from_list(rows, features=Features(features))
    made = to_conversations(stored.to_iterable_dataset(2) if streaming else stored)
    assert schema_name(made) == "questions and answers"
    assert [row["id"] for row in made] == ["q0", "q1", "q2"]
    assert all(image["bytes"].startswith(b"\x89PNG") for row in made for image in row["images"])
    expected = [
        {"id": f"q{n}", "images": [picture(56, 56, n)], "messages": [QUESTION, {**ANSWER, "content": str(n)}]}
        for n in range(3)
    ]
    collator = ViTPDataCollator(processor, vrl_drop_ratio=0.5)
    assert_same(collator(list(prepare_rows(made))), collator(expected))
    if not streaming:
        assert made.select([2])[0]["id"] == "q2" and made.shuffle(seed=0)[0]["messages"]
        assert pickle.loads(pickle.dumps(made))[1]["id"] == "q1"
        assert to_conversations(made) is made


@pytest.mark.parametrize("streaming", [False, True])
def test_messages_with_image_and_images_in_two_columns_keep_both(streaming):
    rows = [{"messages": [QUESTION, ANSWER], "image": picture(56, 56, 0), "images": None}]
    rows += [{"messages": [QUESTION, ANSWER], "image": None, "images": [picture(56, 56, n) for n in range(2)]}]
    features = {"messages": MESSAGES, "image": ImageFeature(), "images": IMAGES}
    stored = Dataset.from_list(rows * 2, features=Features(features))
    made = to_conversations(stored.to_iterable_dataset() if streaming else stored)
    assert [(row["error"], len(row["images"])) for row in made] == [(None, 1), (None, 2)] * 2


@pytest.mark.parametrize("streaming", [False, True])
def test_messages_with_system_and_video_in_columns(streaming):
    rows = [{"messages": [QUESTION, ANSWER], "system": "Count.", "video": None}]
    rows += [{"messages": [QUESTION, ANSWER], "system": None, "video": "a.mp4"}]
    for video in (Value("string"), VideoFeature()):
        features = Features({"messages": MESSAGES, "system": Value("string"), "video": video})
        stored = Dataset.from_list(rows, features=features)
        told, wrong = to_conversations(stored.to_iterable_dataset() if streaming else stored)
        assert [message["role"] for message in told["messages"]] == ["system", "user", "assistant"]
        assert "it is a video" in wrong["error"]


def test_rows_without_ids_have_their_number_or_in_a_stream_one_by_content():
    stored = Dataset.from_list([{"question": "How many?", "answer": str(n)} for n in range(3)])
    assert [row["id"] for row in to_conversations(stored)] == ["0", "1", "2"]
    ids = [row["id"] for row in to_conversations(stored.to_iterable_dataset())]
    assert len(set(ids)) == 3 and all(name.startswith("content:") for name in ids)


def test_a_generator_without_features_is_read_too(processor):
    def rows():
        for number in range(3):
            turns = [{"from": "human", "value": "How many?"}, {"from": "gpt", "value": f"{number} trees"}]
            yield {"conversations": turns}

    made = to_conversations(IterableDataset.from_generator(rows))
    assert [row["messages"][1]["content"][0]["text"] for row in made] == ["0 trees", "1 trees", "2 trees"]


@pytest.mark.parametrize("streaming", [False, True])
def test_a_web_dataset_is_its_json_with_the_images_of_each_sample(tmp_path, streaming):
    write_archives(tmp_path, [picture(30 + n, 20, n) for n in range(5)], shard_rows=3)
    stored = load_dataset(str(tmp_path), split="train", streaming=streaming)
    rows = list(to_conversations(stored))
    assert [row["id"] for row in rows] == [f"{n:06d}" for n in range(5)]
    for number, row in enumerate(rows):
        assert row["error"] is None and row["messages"][1]["content"][0]["text"] == f"There are {number} trees."
        assert [image["path"] for image in row["images"]] == [f"{number:06d}.png"]


def test_a_row_that_makes_no_conversation_has_its_error_and_the_others_none(processor):
    rows = [
        {"conversations": [{"from": who, "value": "x"} for who in ("human", last)]} for last in ("gpt", "bot", "gpt")
    ]
    made = to_conversations(Dataset.from_list(rows))
    assert [row["error"] is None for row in made] == [True, False, True]
    with pytest.raises(ValueError, match="Sample '1': message 1 has the role 'bot'"):
        ViTPDataCollator(processor)(list(made))


def test_what_a_users_transform_makes_is_left_alone():
    stored = Dataset.from_dict({"scene": ["a", "b"]})
    stored.set_transform(lambda batch: {"messages": [json.loads("[]") for _ in batch["scene"]]})
    assert to_conversations(stored) is stored


def test_rows_that_are_no_data_set_are_told():
    with pytest.raises(ValueError, match="rows are of type list, but a data set of `datasets` is needed"):
        to_conversations([{"messages": MESSAGES}])
