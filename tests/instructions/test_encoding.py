"""Conversations that are encoded without the processor's general way, against that way."""

import copy

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pictures import picture
from tiny_models import TOKENS_PER_TILE
from tokenizers.processors import TemplateProcessing

from modeling_vitp import ViTPImageProcessor, ViTPProcessor
from modeling_vitp.instructions.collator import ViTPDataCollator
from modeling_vitp.instructions.encoding import ConversationEncoder
from modeling_vitp.instructions.settings import SourceSettings
from modeling_vitp.processing_vitp import CHAT_TEMPLATE

SIZE = {"height": 28, "width": 28}
SOURCES = {
    "few tiles": SourceSettings(max_patches=2),
    "square": SourceSettings(image_size=60, system_prompt="You see trees"),
    "windowed": SourceSettings(input_spec={"window": [0, 100]}),
}
TEXTS = st.text("ab é猫\n<|im_end|>", min_size=1, max_size=12).filter(str.strip)


@pytest.fixture(scope="module")
def processor(tokenizer):
    return ViTPProcessor(ViTPImageProcessor(size=SIZE, max_patches=6), tokenizer, image_seq_length=TOKENS_PER_TILE)


@st.composite
def rows(draw):
    """Rows of one to four turns with up to three images, their places anywhere in the questions, as texts or parts."""
    sizes = draw(st.lists(st.tuples(st.integers(1, 120), st.integers(1, 120)), max_size=3))
    images = [
        picture(*size, seed).convert(draw(st.sampled_from(["RGB"] * 5 + ["L"]))) for seed, size in enumerate(sizes)
    ]
    questions = [[{"type": "text", "text": draw(TEXTS)}] for _ in range(draw(st.integers(1, 4)))]
    for _ in images:
        question = draw(st.sampled_from(questions))
        question.insert(draw(st.integers(0, len(question))), {"type": "image", "text": None})
    messages = []
    for question in questions:
        answer = draw(TEXTS)
        if draw(st.booleans()):
            question = "".join(part["text"] or "<image>\n" for part in question)
            answer = [{"type": draw(st.sampled_from(["text", "given"])), "text": answer}]
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    messages[-1]["content"] = "yes"
    source = draw(st.sampled_from([None, *SOURCES]))
    return {"id": draw(st.integers(0, 9)), "images": images, "messages": messages, "source": source}


def both_ways(collator, row):
    """What a collator makes of a row without and with the general way, or the errors."""
    results = []
    for encoder in (collator._encoder, None):
        one = copy.copy(collator)
        one._encoder = encoder
        try:
            results.append(one.encode(row))
        except ValueError as error:
            results.append(str(error))
    return results


def assert_same(fast, general):
    assert type(fast) is type(general) and (isinstance(fast, dict) or fast == general)
    if isinstance(fast, dict):
        assert fast.keys() == general.keys()
        for name, values in general.items():
            if name == "pixel_values":
                assert len(values) == len(fast[name]) and all(map(torch.equal, fast[name], values))
            else:
                assert fast[name].dtype == values.dtype and torch.equal(fast[name], values), name


@given(row=rows(), ratio=st.sampled_from([0, 0.3, 0.75, 0.99]), mask=st.sampled_from([0, 0.5]))
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_sample_is_the_one_of_the_chat_template(processor, row, ratio, mask):
    collator = ViTPDataCollator(
        processor, vrl_drop_ratio=ratio, vrl_apply_prob=0.8, answer_mask_ratio=mask, source_settings=SOURCES
    )
    assert_same(*both_ways(collator.with_raw_tiles(), row))


QUESTION = {"role": "user", "content": "How many?"}
ANSWER = {"role": "assistant", "content": "4 trees"}


@pytest.mark.parametrize(
    ("messages", "is_fast"),
    [
        ([QUESTION, ANSWER], True),
        ([QUESTION, ANSWER | {"tool_calls": [{"name": "count"}]}], False),
        ([QUESTION, {"role": "tool", "content": "<img>"}, ANSWER], False),
        ([{"role": "user", "content": [{"type": "image"}, {"type": "image"}]}, ANSWER], False),
        ([QUESTION | {"content": "<IMG_CONTEXT>"}, ANSWER], False),
        ([QUESTION, ANSWER | {"content": ""}], False),
    ],
)
def test_errors_are_those_of_the_general_way(processor, messages, is_fast):
    collator = ViTPDataCollator(processor, vrl_drop_ratio=0.5).with_raw_tiles()
    fast, general = both_ways(collator, {"images": [picture(60, 40, 0)], "messages": messages})
    assert_same(fast, general)
    assert isinstance(fast, dict) is is_fast


@pytest.mark.parametrize(
    "template",
    [
        CHAT_TEMPLATE.replace("{% generation %}", "").replace("{% endgeneration %}", ""),
        "{{ bos_token }}" + CHAT_TEMPLATE,
        CHAT_TEMPLATE.replace("<IMG_CONTEXT>\\n", "Image: <IMG_CONTEXT>."),
        CHAT_TEMPLATE + "</img>",
        CHAT_TEMPLATE + "<IMG_CONTEXT>",
    ],
)
def test_other_chat_templates(processor, template):
    tokenizer = copy.deepcopy(processor.tokenizer)
    tokenizer.bos_token = "<|im_start|>"
    other = ViTPProcessor(processor.image_processor, tokenizer, TOKENS_PER_TILE, chat_template=template)
    collator = ViTPDataCollator(other, vrl_drop_ratio=0.5).with_raw_tiles()
    for images in ([picture(60, 40, 0)], []):
        assert_same(*both_ways(collator, {"images": images, "messages": [QUESTION, ANSWER]}))


def test_what_a_tokenizer_adds_or_cuts_by_itself_goes_the_general_way_where_it_must(processor):
    tokenizer = copy.deepcopy(processor.tokenizer)
    end = ("<|im_end|>", tokenizer.convert_tokens_to_ids("<|im_end|>"))
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(f"{end[0]} $A {end[0]}", None, [end])
    adds = ViTPProcessor(processor.image_processor, tokenizer, image_seq_length=TOKENS_PER_TILE)
    row = {"images": [picture(60, 40, 0)], "messages": [QUESTION, ANSWER]}
    assert_same(*both_ways(ViTPDataCollator(adds, vrl_drop_ratio=0.5).with_raw_tiles(), row))
    # Somebody else's call has set the tokenizer to cut and to pad.
    adds.tokenizer("a", truncation=True, max_length=3, padding="max_length")
    assert_same(*both_ways(ViTPDataCollator(adds, vrl_drop_ratio=0.5).with_raw_tiles(), row))
    cuts = copy.deepcopy(processor)
    cuts.tokenizer.init_kwargs |= {"truncation": True, "max_length": 12}
    raw = ViTPDataCollator(cuts).with_raw_tiles()
    assert raw._encoder is None and "truncation cut them" in both_ways(raw, row)[0]


def test_processors_of_other_classes_go_the_general_way(processor):
    class Other(ViTPProcessor):
        pass

    other = Other(processor.image_processor, processor.tokenizer, image_seq_length=TOKENS_PER_TILE)
    assert ViTPDataCollator(processor).with_raw_tiles()._encoder is not None
    assert ViTPDataCollator(other).with_raw_tiles()._encoder is None
    assert not ConversationEncoder.can_encode(processor)  # whose tiles are normalized
