"""Generation modes that transformers tests on its models, without their mixin, which is not distributed.

The results equal those of transformers' InternVL with the same weights to the bit; with VRL, those of greedy search.
"""

import copy

import pytest
import torch
from internvl_oracle import build_native, shake
from pictures import picture
from transformers import (
    Cache,
    DynamicCache,
    pipeline,
)
from transformers.cache_utils import StaticCache

from modeling_vitp import convert_checkpoint

NEW_TOKENS, DROP_RATIO = 6, 0.75
EVERYTHING = dict.fromkeys(
    ("output_scores", "output_logits", "output_hidden_states", "output_attentions", "return_dict_in_generate"), True
)
PICTURES = {"one row": [[(56, 56)]], "a padded batch": [[(56, 56)], [], [(112, 56), (56, 56)]]}
SAMPLED = {"do_sample": True, "temperature": 1.3, "top_k": 20, "top_p": 0.9}


def static(model, inputs):
    length = inputs["input_ids"].shape[1] + NEW_TOKENS
    return {"past_key_values": StaticCache(model.config.get_text_config(), max_cache_len=length)}


def embeddings_of(model, inputs):
    return model.get_input_embeddings()(inputs["input_ids"]).detach()


# Inputs and options of each mode; options may be a function of the model and the inputs.
WAYS = {
    "greedy": ("a padded batch", {}),
    "without a cache": ("a padded batch", {"use_cache": False}),
    "several samples": ("a padded batch", SAMPLED | {"num_return_sequences": 3}),
    "beams": ("a padded batch", {"num_beams": 3, "num_return_sequences": 2, "length_penalty": 0.5}),
    "sampled beams": ("a padded batch", SAMPLED | {"num_beams": 3, "early_stopping": True}),
    "penalties": ("a padded batch", {"repetition_penalty": 1.5, "no_repeat_ngram_size": 2, "bad_words_ids": [[5]]}),
    "a static cache": ("a padded batch", {"cache_implementation": "static", "disable_compile": True}),
    "a static cache that is given": ("a padded batch", static),
    "the prompt in chunks": ("a text", {"prefill_chunk_size": 4}),
    "candidates from the prompt": ("one row", {"prompt_lookup_num_tokens": 2}),
    "candidates from a model": ("one row", lambda model, inputs: {"assistant_model": copy.deepcopy(model)}),
    "embeddings": ("a padded batch", lambda model, inputs: {"inputs_embeds": embeddings_of(model, inputs)}),
    "embeddings alone": (
        "a text",
        lambda model, inputs: {"inputs_embeds": embeddings_of(model, inputs), "input_ids": None},
    ),
}
SAME_AS_GREEDY = [
    "without a cache",
    "a static cache",
    "a static cache that is given",
    "candidates from the prompt",
    "candidates from a model",
    "embeddings",
]


@pytest.fixture
def model(model):
    model = shake(model).eval()
    model.set_attn_implementation("eager")  # returns attentions
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = model.config.pad_token_id
    return model


@pytest.fixture
def native(model):
    native = build_native(model)
    native.set_attn_implementation("eager")
    native.generation_config = copy.deepcopy(model.generation_config)
    return native


def encode(processor, name, drop_ratio=0.0):
    rows = PICTURES.get(name, [[]])
    images = [[picture(*size, seed=row) for size in sizes] for row, sizes in enumerate(rows)]
    texts = ["<IMG_CONTEXT>\n" * len(sizes) + "How many trees are there?"[: 9 + 5 * len(sizes)] for sizes in rows]
    options = {"vrl_drop_ratio": drop_ratio, "vrl_keys": list(range(len(rows)))} if drop_ratio else {}
    images = images if any(images) else None
    return processor(images=images, text=texts, padding=True, padding_side="left", return_tensors="pt", **options)


def generate(model, inputs, options, **more):
    options = options(model, inputs) if callable(options) else options
    torch.manual_seed(0)
    options = {"do_sample": False, "max_new_tokens": NEW_TOKENS, **options, **more}
    return model.generate(**{**copy.deepcopy(dict(inputs)), **options})


def leaves(value):
    """Return the tensors in an output, in order; for a cache its keys and values."""
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, Cache):
        value = [(layer.keys, layer.values) for layer in value.layers]
    return [leaf for part in (value.values() if isinstance(value, dict) else value or ()) for leaf in leaves(part)]


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_every_generation_mode_equals_internvl(model, native, processor, way):
    name, options = WAYS[way]
    inputs = encode(processor, name)
    ours, theirs = (generate(each, inputs, options, **EVERYTHING) for each in (model, native))
    assert list(ours) == list(theirs)
    # transformers' assistant model does not receive the images, so that fewer of its tokens are accepted.
    for key in ["sequences"] if way == "candidates from a model" else ours:
        first, second = leaves(ours[key]), leaves(theirs[key])
        assert len(first) == len(second) and (first or ours[key] is None), key
        assert all(torch.equal(one, other) for one, other in zip(first, second)), key


@pytest.mark.slow
@pytest.mark.parametrize("way", SAME_AS_GREEDY)
def test_deterministic_modes_equal_greedy_search(model, processor, way):
    name, options = WAYS[way]
    inputs = encode(processor, name, DROP_RATIO)
    wanted = generate(model, inputs, {})[:, inputs["input_ids"].shape[1] :]
    found = generate(model, inputs, options)
    assert torch.equal(found[:, -NEW_TOKENS:], wanted)


def test_draft_model_sees_images(model, processor):
    """A draft of the same weights is accepted completely, so that one pass is enough."""
    inputs, passes = encode(processor, "one row", DROP_RATIO), []
    draft = copy.deepcopy(model)
    draft.generation_config.update(num_assistant_tokens=NEW_TOKENS, assistant_confidence_threshold=0.0)
    model.register_forward_pre_hook(lambda *args: passes.append(args))
    found = generate(model, inputs, {"assistant_model": draft})
    assert len(passes) <= 2
    assert torch.equal(found, generate(model, inputs, {}))


def test_embeddings_work_as_prompt(model, processor):
    inputs = encode(processor, "a text")
    wanted = generate(model, inputs, {})[:, inputs["input_ids"].shape[1] :]
    assert torch.equal(generate(model, inputs, WAYS["embeddings alone"][1]), wanted)


@pytest.mark.parametrize("to", ["vitp", "internvl"])
def test_pipeline_batch_equals_single_answers(model, processor, tmp_path, to):
    """The pipeline pads by the tokenizer's side, not by the processor's."""
    for part in (model, processor):
        part.save_pretrained(tmp_path / "vitp")
    if to == "internvl":
        convert_checkpoint(tmp_path / "vitp", tmp_path / "internvl", to)
    answer = pipeline("image-text-to-text", model=str(tmp_path / to), dtype=torch.float32)
    questions = ["How many?", "How many trees are there in the top left quarter?", "Trees"]
    parts = [
        [{"type": "image", "image": picture(56, 56, seed=row)}, {"type": "text", "text": text}]
        for row, text in enumerate(questions)
    ]
    chats = [[{"role": "user", "content": content}] for content in parts]

    def generate(chats, **options):
        options |= {"generate_kwargs": {"max_new_tokens": NEW_TOKENS, "do_sample": False}, "return_full_text": False}
        return [found[0]["generated_text"] for found in answer(text=chats, **options)]

    one_by_one = [generate([chat])[0] for chat in chats]
    batch = generate(chats, batch_size=3)
    assert batch == one_by_one and len({*batch}) == 3


@torch.no_grad()
@pytest.mark.parametrize("kind", [StaticCache, DynamicCache])
def test_emptied_cache_equals_new_cache(model, processor, kind):
    shortened, inputs = encode(processor, "one row", DROP_RATIO), encode(processor, "one row")
    size = {"max_cache_len": 64} if kind is StaticCache else {}
    cache = kind(config=model.config.get_text_config(), **size)
    model(**shortened, cache=cache)
    with pytest.raises(ValueError, match="position_ids"):
        model(inputs["input_ids"][:, -1:], cache=cache)
    cache.reset() if kind is StaticCache else cache.crop(-cache.get_seq_length())
    found = model(**inputs, cache=cache).logits
    assert torch.equal(found, model(**inputs, cache=kind(config=model.config.get_text_config(), **size)).logits)
    following = inputs["input_ids"][:, -1:]  # can follow without position_ids, because nothing was dropped
    model(following, cache=cache)
