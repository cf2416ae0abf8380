import copy
import itertools
from types import SimpleNamespace

import original_checkpoint
import pytest
import torch
from internvl_oracle import blocked_mask, build_native, shake
from pictures import picture
from tiny_models import TEXT, TOKENS_PER_TILE, VISION
from torch import nn
from torch.distributed.fsdp import FSDPModule
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForImageTextToText,
    DynamicCache,
    InternVLVisionConfig,
    InternVLVisionModel,
)
from transformers.models.internvl.modeling_internvl import InternVLVisionAttention, InternVLVisionLayer

from modeling_vitp import ViTPConfig, ViTPForConditionalGeneration, ViTPModel, ViTPVisionConfig, ViTPVisionModel
from modeling_vitp.modeling_vitp import CACHE, cache_in
from modeling_vitp.pretraining.model_patches import checkpoint_activations
from modeling_vitp.training.config import HAS_ACTIVATION_CHECKPOINTING

ATTENTION = pytest.mark.parametrize("attention", ["eager", "sdpa"])
DROP_RATIO = 0.75

# The images of each row of a batch as (width, height), and their numbers of tiles (thumbnail included).
BATCHES = {
    "one_tile": [[(56, 56)]],
    "seven_tiles": [[(168, 112)]],
    "different_tiles": [[(56, 56)], [(168, 56)], [(112, 112)]],
    "several_images": [[(112, 56), (56, 112)], [(56, 56), (56, 56), (56, 56)]],
    "text_only_row": [[(112, 56)], [], [(56, 56), (168, 56)]],
    "first_row_text_only": [[], [(168, 56)]],
}
TILES = {
    "one_tile": [1],
    "seven_tiles": [7],
    "different_tiles": [1, 4, 5],
    "several_images": [6, 3],
    "text_only_row": [3, 0, 5],
    "first_row_text_only": [0, 4],
}
TEXTS = ["How many trees are there?", "Are there 12?", "There are 12 trees in the top left quarter, are there not?"]


@pytest.fixture
def vivid(model):
    return shake(model).eval()


@pytest.fixture
def native(vivid):
    return build_native(vivid)


def encode(processor, batch: str, drop_ratio: float = 0.0, padding_side: str = "right", epoch: int = 0):
    images, texts, seed = [], [], 0
    for row, sizes in enumerate(BATCHES[batch]):
        images.append([picture(*size, seed=(seed := seed + 1)) for size in sizes])
        places = "".join(f"Quarter {index}: <IMG_CONTEXT>\n" for index in range(len(sizes)))
        texts.append(places + TEXTS[row])
    return processor(
        images=images,
        text=texts,
        vrl_drop_ratio=drop_ratio,
        vrl_keys=[(0, row, epoch) for row in range(len(texts))],
        padding=True,
        padding_side=padding_side,
        return_tensors="pt",
    )


def answer_labels(inputs, processor) -> torch.Tensor:
    """Return labels of the text tokens whose predecessor is the same for any r: no image token and no padding."""
    ids, mask = inputs["input_ids"], inputs["attention_mask"].bool()
    first = mask & (mask.cumsum(-1) == 1)
    ignored = ~mask | first | torch.isin(ids, torch.tensor(processor.image_token_ids))
    return ids.masked_fill(ignored, -100)


def positions_of(mask: torch.Tensor) -> torch.Tensor:
    return (mask.cumsum(-1) - 1).masked_fill(mask == 0, 0)


def full_length(processor, batch: str, drop_ratio: float, padding_side: str) -> SimpleNamespace:
    """Return the batch shortened by VRL, the full-length batch, and the columns of the latter that each row keeps."""
    short = encode(processor, batch, drop_ratio, padding_side)
    full = encode(processor, batch, 0.0, padding_side)
    mask = full["attention_mask"].bool()
    survives = torch.zeros_like(mask)
    for row in range(len(mask)):
        start = mask[row].int().argmax()
        survives[row, start + short["position_ids"][row, short["attention_mask"][row].bool()]] = True
    return SimpleNamespace(short=short, full=full, survives=survives, real=short["attention_mask"].bool())


def set_attention(attention: str, *models) -> None:
    for model in models:
        model.set_attn_implementation(attention)
        for config in (model.config, model.config.vision_config, model.config.text_config):
            assert config._attn_implementation == attention


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}


def assert_same_gradients(actual: dict, wanted: dict, tolerance: float = 1e-5) -> None:
    """Compare the norm of the difference with the norm, for each parameter."""
    assert actual.keys() == wanted.keys()
    for name, gradient in wanted.items():
        # The bias of the ViT's keys shifts all scores of a query equally, so its gradient is zero up to rounding.
        is_zero = "attention.k_proj.bias" in name and "vision_tower" in name
        scale = wanted[name.replace("k_proj", "q_proj")].norm() if is_zero else gradient.norm()
        assert scale > 1e-4, name
        assert (actual[name] - gradient).norm() <= tolerance * scale, name


# ----------------------------------------------------------------------------------------------------------------------
# r = 0: equal to transformers' InternVL to the bit


@ATTENTION
@pytest.mark.parametrize("batch", ["several_images", "text_only_row"])
def test_logits_and_loss_without_drop_equal_internvl(vivid, native, processor, attention, batch):
    set_attention(attention, vivid, native)
    for padding_side, training in itertools.product(["left", "right"], [False, True]):
        vivid.train(training), native.train(training)
        inputs = encode(processor, batch, padding_side=padding_side)
        assert len(inputs["pixel_values"]) == sum(TILES[batch])
        labels = answer_labels(inputs, processor)
        actual, wanted = vivid(**inputs, labels=labels), native(**inputs, labels=labels)
        assert torch.equal(actual.logits, wanted.logits)
        assert torch.equal(actual.loss, wanted.loss)
        assert wanted.logits.std() > 0.5


def test_gradients_without_drop_equal_internvl(vivid, native, processor):
    inputs = encode(processor, "text_only_row")
    labels = answer_labels(inputs, processor)
    for model in (vivid, native):
        model.train()(**inputs, labels=labels, use_cache=False).loss.backward()
    actual, wanted = gradients(vivid), gradients(native)
    assert actual.keys() == wanted.keys()
    assert all(torch.equal(actual[name], wanted[name]) for name in wanted)


def test_text_batch_gives_vit_zero_gradients(vivid, native, processor):
    inputs = processor(text=TEXTS[:2], padding=True, return_tensors="pt")
    labels = answer_labels(inputs, processor)
    losses = [model.train()(**inputs, labels=labels, use_cache=False).loss for model in (vivid, native)]
    assert torch.equal(*losses)
    for loss in losses:
        loss.backward()
    actual, wanted = gradients(vivid), gradients(native)
    assert wanted and all(torch.equal(actual.pop(name), wanted[name]) for name in wanted)
    # The gradient of a frozen or unused parameter would be `None`.
    assert actual.keys() == {
        name for name, _ in vivid.named_parameters() if "vision_tower" in name or "multi_modal_projector" in name
    }
    assert not any(gradient.any() for gradient in actual.values())


@pytest.mark.parametrize("drop_ratio", [0.0, DROP_RATIO])
def test_modules_run_in_same_order_without_images(vivid, processor, drop_ratio):
    """Sharded weights are gathered in this order, which must be the same in all processes."""
    seen = []
    for name, module in vivid.named_modules():
        module.register_forward_pre_hook(lambda *_, name=name: seen.append(name))
    with_images = encode(processor, "several_images", drop_ratio)
    orders = []
    for inputs in (with_images, processor(text=TEXTS[:2], padding=True, return_tensors="pt")):
        seen.clear()
        vivid.train()(**inputs, use_cache=False)
        orders.append([*seen])
    assert orders[0] == orders[1]


@pytest.mark.parametrize("layer", [-2, 1])
def test_vision_feature_layer_equals_internvl(vivid, native, processor, layer):
    inputs = encode(processor, "different_tiles")
    wanted = native(**inputs, vision_feature_layer=layer).logits
    assert torch.equal(vivid(**inputs, vision_feature_layer=layer).logits, wanted)
    assert not torch.equal(vivid(**inputs).logits, wanted)


# ----------------------------------------------------------------------------------------------------------------------
# VRL: the short forward pass equals InternVL's full-length one with dropped tokens masked in attention


VRL_BATCHES = [
    ("one_tile", "right", DROP_RATIO),
    ("seven_tiles", "right", 0.37),
    ("different_tiles", "left", 0.37),
    ("several_images", "left", DROP_RATIO),
    ("text_only_row", "right", DROP_RATIO),
    ("first_row_text_only", "left", 0.9),
]


@ATTENTION
@pytest.mark.parametrize(("batch", "padding_side", "drop_ratio"), VRL_BATCHES)
def test_vrl_equals_full_sequence_with_blocked_tokens(
    vivid, native, processor, attention, batch, padding_side, drop_ratio
):
    set_attention(attention, vivid, native)
    pair = full_length(processor, batch, drop_ratio, padding_side)
    short, full = pair.short, pair.full
    assert short["input_ids"].shape[1] < full["input_ids"].shape[1]
    labels = answer_labels(short, processor)
    full_labels = answer_labels(full, processor).masked_fill(~pair.survives, -100)
    assert torch.equal(labels[pair.real], full_labels[pair.survives])

    actual = vivid.train()(**short, labels=labels, use_cache=False)
    wanted = native.train()(
        input_ids=full["input_ids"],
        pixel_values=full["pixel_values"],
        position_ids=positions_of(full["attention_mask"]),
        attention_mask=blocked_mask(full["attention_mask"], pair.survives),
        labels=full_labels,
        use_cache=False,
    )
    logits, wanted_logits = actual.logits[pair.real], wanted.logits[pair.survives]
    torch.testing.assert_close(logits, wanted_logits, atol=1e-5, rtol=0)
    torch.testing.assert_close(actual.loss, wanted.loss, atol=1e-5, rtol=0)

    actual.loss.backward()
    wanted.loss.backward()
    assert_same_gradients(gradients(vivid), gradients(native))


@ATTENTION
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_gaps_block_nothing_without_mask(vivid, native, processor, attention, training):
    set_attention(attention, vivid, native)
    vivid.train(training)
    pair = full_length(processor, "seven_tiles", DROP_RATIO, "right")
    short = dict(pair.short)
    assert short.pop("attention_mask").all()
    assert (short["position_ids"].diff() > 1).any()
    wanted = native(
        input_ids=pair.full["input_ids"],
        pixel_values=pair.full["pixel_values"],
        attention_mask=blocked_mask(pair.full["attention_mask"], pair.survives),
    ).logits[pair.survives]
    for use_cache in (False, True):
        actual = vivid(**short, use_cache=use_cache).logits[0]
        torch.testing.assert_close(actual, wanted, atol=1e-5, rtol=0)


def test_base_model_gives_hidden_states_of_logits(vivid, processor):
    """TRL's trainer calls the base model and the head separately."""
    inputs = encode(processor, "text_only_row", DROP_RATIO)
    hidden = vivid.model(**inputs, use_cache=False).last_hidden_state
    assert hidden.shape[:2] == inputs["input_ids"].shape
    torch.testing.assert_close(vivid.lm_head(hidden), vivid(**inputs).logits, atol=1e-5, rtol=0)


def test_embeddings_replace_ids_under_vrl(vivid, processor):
    inputs = dict(encode(processor, "seven_tiles", DROP_RATIO))
    wanted = vivid(**inputs).logits
    del inputs["attention_mask"]
    inputs["inputs_embeds"] = vivid.get_input_embeddings()(inputs.pop("input_ids"))
    torch.testing.assert_close(vivid(**inputs).logits, wanted, atol=1e-5, rtol=0)


@pytest.mark.parametrize("with_indices", [True, False])
def test_precomputed_features_give_same_logits_without_mask(vivid, processor, with_indices):
    inputs = dict(encode(processor, "seven_tiles", DROP_RATIO))
    wanted = vivid(**inputs, use_cache=False).logits
    assert inputs.pop("attention_mask").all()
    indices = inputs["visual_token_indices"] if with_indices else inputs.pop("visual_token_indices")
    features = vivid.get_image_features(inputs.pop("pixel_values"), visual_token_indices=indices, return_dict=True)
    found = vivid(**inputs, mm_encoder_outputs={"image": features}, use_cache=False).logits
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=0)


def test_wrong_number_of_visual_tokens_is_an_error(vivid, processor):
    inputs = encode(processor, "seven_tiles", DROP_RATIO)
    inputs["visual_token_indices"] = inputs["visual_token_indices"][:-1]
    with pytest.raises(ValueError, match="do not match"):
        vivid(**inputs)


def test_language_model_and_projector_see_quarter(vivid, processor):
    seen = {}

    def count_tokens(module, args, kwargs):
        hidden_states = kwargs["inputs_embeds"] if "inputs_embeds" in kwargs else args[0]
        seen[type(module).__name__] = hidden_states.numel() // hidden_states.shape[-1]

    for module in (vivid.model.multi_modal_projector, vivid.model.language_model):
        module.register_forward_pre_hook(count_tokens, with_kwargs=True)
    full = encode(processor, "seven_tiles")
    length = full["input_ids"].shape[1]
    vivid(**full)
    assert [*seen.values()] == [28, length]
    vivid(**encode(processor, "seven_tiles", DROP_RATIO))
    assert [*seen.values()] == [7, length - 21]


# ----------------------------------------------------------------------------------------------------------------------
# Equality with the original code


@pytest.fixture(scope="module")
def original():
    return SimpleNamespace(model=original_checkpoint.original_model(), **original_checkpoint.expected())


def close(actual: torch.Tensor, wanted: torch.Tensor) -> None:
    torch.testing.assert_close(actual, wanted.reshape(actual.shape), atol=1e-5, rtol=0)


@torch.no_grad()
def test_vision_states_equal_original_code(original):
    """Compare the vision tower of the whole model, and a checkpoint of the vision model alone."""
    for tower in (original.model.model.vision_tower, original_checkpoint.original_vision_model()):
        close(tower(original.pixel_values).last_hidden_state, original.vision_last_hidden_state)
        close(tower(original.other_pixel_values).last_hidden_state, original.other_vision_last_hidden_state)
    close(original.model.get_image_features(original.pixel_values).pooler_output, original.projected_image_tokens)


@ATTENTION
@torch.no_grad()
def test_logits_and_loss_equal_original_code(original, attention):
    set_attention(attention, original.model)
    outputs = original.model(original.input_ids, original.pixel_values, labels=original.labels)
    close(outputs.logits, original.logits_full)
    close(outputs.loss, original.loss_full)


@ATTENTION
@pytest.mark.parametrize("with_mask", [True, False], ids=["mask", "no_mask"])
@torch.no_grad()
def test_logits_of_kept_set_equal_original_code(original, attention, with_mask):
    set_attention(attention, original.model)
    outputs = original.model(
        original.vrl_input_ids,
        original.pixel_values,
        attention_mask=torch.ones_like(original.vrl_input_ids) if with_mask else None,
        position_ids=original.vrl_position_ids,
        visual_token_indices=original.vrl_keep,
        labels=original.labels[:, original.vrl_position_ids[0]],
        use_cache=False,
    )
    close(outputs.logits, original.vrl_logits)
    close(outputs.loss, original.vrl_loss)


# ----------------------------------------------------------------------------------------------------------------------
# Generation


NEW_TOKENS = 8


def row_of(processor, batch: str, row: int, drop_ratio: float) -> dict:
    """Return one row of a batch as a batch of its own without padding, from the batch's encoding."""
    inputs = encode(processor, batch, drop_ratio, "left")
    real = inputs["attention_mask"][row].bool()
    single = {name: inputs[name][row, real][None] for name in ("input_ids", "attention_mask")}
    tiles = TILES[batch]
    first = sum(tiles[:row])
    if tiles[row]:
        single["pixel_values"] = inputs["pixel_values"][first : first + tiles[row]]
    if drop_ratio:
        single["position_ids"] = inputs["position_ids"][row, real][None]
        indices = inputs["visual_token_indices"] - first * TOKENS_PER_TILE
        if tiles[row]:
            inside = (indices >= 0) & (indices < tiles[row] * TOKENS_PER_TILE)
            single["visual_token_indices"] = indices[inside]
    return single


@torch.no_grad()
def greedy_without_cache(model, inputs: dict, steps: int) -> tuple[list[int], torch.Tensor]:
    """Generate tokens of one row with a whole forward pass each; `position_ids` continue from the last one."""
    tokens, logits = [], []
    for _ in range(steps):
        logits.append(model(**inputs, use_cache=False).logits[0, -1])
        tokens.append(logits[-1].argmax().item())
        inputs = continued(inputs, torch.tensor([[tokens[-1]]]))
    return tokens, torch.stack(logits)


def continued(prompt: dict, tokens: torch.Tensor) -> dict:
    """Return the sequence of a prompt without padding and the tokens that follow it."""
    ids = torch.cat([prompt["input_ids"], tokens], dim=1)
    positions = prompt.get("position_ids", positions_of(prompt["attention_mask"]))
    following = positions[:, -1:] + 1 + torch.arange(tokens.shape[1])
    positions = torch.cat([positions, following], dim=1)
    return {**prompt, "input_ids": ids, "attention_mask": torch.ones_like(ids), "position_ids": positions}


@pytest.fixture
def generator_model(vivid):
    vivid.generation_config.eos_token_id = None
    vivid.generation_config.pad_token_id = vivid.config.pad_token_id
    return vivid


@pytest.mark.parametrize("drop_ratio", [0.0, DROP_RATIO])
@pytest.mark.parametrize("batch", ["text_only_row", "first_row_text_only"])
def test_greedy_generation_equals_whole_forwards(generator_model, processor, batch, drop_ratio):
    inputs = encode(processor, batch, drop_ratio, "left")
    outputs = generator_model.generate(
        **inputs, max_new_tokens=NEW_TOKENS, do_sample=False, output_logits=True, return_dict_in_generate=True
    )
    for row in range(len(inputs["input_ids"])):
        single = row_of(processor, batch, row, drop_ratio)
        tokens, logits = greedy_without_cache(generator_model, single, NEW_TOKENS)
        assert outputs.sequences[row, inputs["input_ids"].shape[1] :].tolist() == tokens
        torch.testing.assert_close(torch.stack(outputs.logits)[:, row], logits, atol=1e-4, rtol=0)


@pytest.mark.parametrize("drop_ratio", [0.0, DROP_RATIO])
def test_repeated_samples_equal_whole_forwards(generator_model, processor, drop_ratio):
    inputs = encode(processor, "first_row_text_only", drop_ratio, "left")
    options = {"num_return_sequences": 3, "do_sample": True, "top_k": 1}
    found = generator_model.generate(**inputs, max_new_tokens=NEW_TOKENS, **options)[:, inputs["input_ids"].shape[1] :]
    for row in range(2):
        single = row_of(processor, "first_row_text_only", row, drop_ratio)
        tokens, _ = greedy_without_cache(generator_model, single, NEW_TOKENS)
        assert found[3 * row : 3 * row + 3].tolist() == [tokens] * 3


def beam_search_of_width(model, inputs: dict, width: int, steps: int) -> list[list[int]]:
    """Search one row by beams with whole forward passes; return the best first."""
    beams = [(0.0, [])]
    for _ in range(steps):
        candidates = []
        for score, tokens in beams:
            grown = continued(inputs, torch.tensor([tokens], dtype=torch.long))
            with torch.no_grad():
                scores = model(**grown, use_cache=False).logits[0, -1].log_softmax(-1)
            best = scores.topk(width)
            candidates += [(score + s, [*tokens, t]) for s, t in zip(best.values.tolist(), best.indices.tolist())]
        beams = sorted(candidates, key=lambda beam: -beam[0])[:width]
    return [tokens for _, tokens in beams]


@pytest.mark.parametrize("drop_ratio", [0.0, DROP_RATIO])
def test_beam_search_equals_whole_forwards(generator_model, processor, drop_ratio):
    inputs = encode(processor, "text_only_row", drop_ratio, "left")
    options = {"num_beams": 3, "num_return_sequences": 3, "max_new_tokens": 5, "do_sample": False}
    found = generator_model.generate(**inputs, **options)[:, inputs["input_ids"].shape[1] :]
    for row in range(len(inputs["input_ids"])):
        wanted = beam_search_of_width(generator_model, row_of(processor, "text_only_row", row, drop_ratio), 3, 5)
        assert found[3 * row : 3 * row + 3].tolist() == wanted


@pytest.mark.parametrize("options", [{}, {"num_beams": 3, "num_return_sequences": 2}], ids=["greedy", "beams"])
def test_generation_without_drop_equals_internvl(generator_model, native, processor, options):
    native.generation_config = copy.deepcopy(generator_model.generation_config)
    inputs = encode(processor, "text_only_row", padding_side="left")
    options = {"max_new_tokens": NEW_TOKENS, "do_sample": False, **options}
    assert torch.equal(generator_model.generate(**inputs, **options), native.generate(**inputs, **options))


@pytest.mark.parametrize("name", ["cache", "past_key_values"])
@pytest.mark.parametrize("drop_ratio", [0.0, DROP_RATIO])
@torch.no_grad()
def test_cache_is_used_under_both_names(vivid, native, processor, name, drop_ratio):
    """`past_key_values` is the older name, which transformers' InternVL still accepts."""
    prompt = encode(processor, "seven_tiles", drop_ratio)
    whole = continued(prompt, torch.tensor([[11]]))
    step = {"input_ids": torch.tensor([[11]]), "position_ids": whole["position_ids"][:, -1:]}
    wanted = vivid(**whole, use_cache=False).logits[:, -1]

    for model in (vivid, native) if drop_ratio == 0 and name in (CACHE, "past_key_values") else (vivid,):
        cache = DynamicCache(config=model.config)
        model(**prompt, **{name: cache})
        assert cache.get_seq_length() == prompt["input_ids"].shape[1]
        found = model(**step, **{name: cache}).logits[:, -1]
        torch.testing.assert_close(found, wanted, atol=1e-5, rtol=0)


@torch.no_grad()
def test_continuing_vrl_prompt_needs_positions(vivid, processor):
    """Without positions, the token was placed right after the kept tokens, and logits differed by 2 here."""
    prompt, following = encode(processor, "seven_tiles", DROP_RATIO), torch.tensor([[11]])
    cache = cache_in(vivid(**prompt, use_cache=True))
    for model in (vivid, vivid.model):
        with pytest.raises(ValueError, match="position_ids"):
            model(following, cache=copy.deepcopy(cache))
    whole = continued(prompt, following)
    found = vivid(following, cache=cache, position_ids=whole["position_ids"][:, -1:]).logits[:, -1]
    torch.testing.assert_close(found, vivid(**whole, use_cache=False).logits[:, -1], atol=1e-5, rtol=0)

    # A prompt without gaps is continued as in transformers, with or without given positions.
    prompt = encode(processor, "seven_tiles")
    alone = vivid(following, cache=cache_in(vivid(**prompt))).logits
    positions = positions_of(prompt["attention_mask"])
    assert torch.equal(alone, vivid(following, cache=cache_in(vivid(**prompt, position_ids=positions))).logits)


@pytest.mark.parametrize("drop_ratio", [0.0, DROP_RATIO])
def test_continued_conversation_equals_whole_conversation(generator_model, processor, drop_ratio):
    prompt = encode(processor, "seven_tiles", drop_ratio)
    options = {"max_new_tokens": 4, "do_sample": False}
    first = generator_model.generate(**prompt, **options, return_dict_in_generate=True)
    length, question = first.sequences.shape[1], torch.tensor([[9, 10, 11]])
    answer = first.sequences[:, prompt["input_ids"].shape[1] :]
    whole = continued(prompt, torch.cat([answer, question], dim=1))
    following = {name: whole[name] for name in ("input_ids", "attention_mask")}
    following["past_key_values"] = first.past_key_values
    if drop_ratio:
        with pytest.raises(ValueError, match="position_ids"):
            generator_model.generate(**following, **options)
        following["position_ids"] = whole["position_ids"]
    found = generator_model.generate(**following, **options)
    assert torch.equal(found, generator_model.generate(**whole, **options))
    assert found.shape[1] == length + 3 + 4


def test_gaps_and_restarts_need_mask(vivid, processor):
    """Gaps and restarts may be padding or packed sequences, which cannot be distinguished."""
    inputs = encode(processor, "different_tiles", DROP_RATIO)
    del inputs["attention_mask"]
    with pytest.raises(ValueError, match="attention_mask"):
        vivid(**inputs, use_cache=False)


@torch.no_grad()
def test_packed_sequences_without_gaps_equal_transformers(vivid, native):
    ids, positions = torch.tensor([[9, 10, 11, 9, 10]]), torch.tensor([[0, 1, 2, 0, 1]])
    found = vivid(ids, position_ids=positions, use_cache=False).logits
    assert torch.equal(found, native(ids, position_ids=positions, use_cache=False).logits)
    torch.testing.assert_close(found[:, 3:], vivid(ids[:, :2]).logits, atol=1e-5, rtol=0)


def test_image_tokens_without_images_are_an_error(vivid, processor):
    inputs = encode(processor, "one_tile")
    text_inputs = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    for call in (vivid, vivid.model, vivid.train(), vivid.eval().generate):
        with pytest.raises(ValueError, match="pixel_values"):
            call(**text_inputs)


@torch.no_grad()
def test_generated_image_token_is_plain_token(vivid, processor):
    prompt = encode(processor, "one_tile")
    written = torch.tensor([[processor.image_token_id]])
    assert vivid(written, cache=cache_in(vivid(**prompt))).logits.isfinite().all()


# ----------------------------------------------------------------------------------------------------------------------
# Stochastic depth


def vision_model(seed: int = 0, **settings) -> ViTPVisionModel:
    return shake(ViTPVisionModel(ViTPVisionConfig(**{**VISION, **settings})), seed)


def tiles(number: int, seed: int = 0, size: tuple[int, int] = (56, 56)) -> torch.Tensor:
    return torch.randn(number, 3, *size, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    ("depth", "rate", "wanted"),
    [
        (5, 0.4, [0.0, 0.1, 0.2, 0.3, 0.4]),
        (1, 0.4, [0.0]),
    ],
)
def test_drop_path_grows_linearly_with_depth(depth, rate, wanted):
    model = ViTPVisionModel(ViTPVisionConfig(**{**VISION, "num_hidden_layers": depth, "drop_path_rate": rate}))
    assert [layer.drop_path.drop_prob for layer in model.encoder.layer] == pytest.approx(wanted)


def test_vision_tower_of_whole_model_drops_paths(tokenizer, model):
    config = copy.deepcopy(model.config)
    config.vision_config.drop_path_rate = 0.2
    layers = ViTPForConditionalGeneration(config).model.vision_tower.encoder.layer
    assert [layer.drop_path.drop_prob for layer in layers] == pytest.approx([0.0, 0.1, 0.2])


@torch.no_grad()
def test_drop_path_changes_training_only():
    without, with_drop = vision_model(), vision_model(drop_path_rate=0.5)
    pixels = tiles(16)
    wanted = without.eval()(pixels).last_hidden_state
    assert torch.equal(without.train()(pixels).last_hidden_state, wanted)
    assert torch.equal(with_drop.eval()(pixels).last_hidden_state, wanted)
    assert not torch.equal(with_drop.train()(pixels).last_hidden_state, wanted)


@torch.no_grad()
def test_drop_path_skips_or_scales_branches():
    rate, number = 0.4, 1500
    config = ViTPVisionConfig(**{**VISION, "num_hidden_layers": 2, "drop_path_rate": rate})
    layer = shake(ViTPVisionModel(config)).encoder.layer[1].train()
    reference = InternVLVisionLayer(InternVLVisionConfig(**VISION)).eval()
    reference.load_state_dict(layer.state_dict())
    reference.attention.config._attn_implementation = layer.attention.config._attn_implementation

    states = torch.randn(number, 5, 32, generator=torch.Generator().manual_seed(1))
    torch.manual_seed(2)
    actual = layer(states)

    def attend(x):
        return reference.lambda_1 * reference.attention(reference.layernorm_before(x))[0]

    def mix(x):
        return reference.lambda_2 * reference.mlp(reference.layernorm_after(x))

    outcomes = []
    for keep_attention in (0, 1):
        after = states + keep_attention * attend(states) / (1 - rate)
        outcomes += [after + keep_mlp * mix(after) / (1 - rate) for keep_mlp in (0, 1)]
    distance = torch.stack([(actual - outcome).flatten(1).abs().amax(1) for outcome in outcomes])
    matches = distance < 1e-4
    assert (matches.sum(0) == 1).all()
    counts = matches.sum(1).double()
    probabilities = torch.tensor([0.16, 0.24, 0.24, 0.36], dtype=torch.float64)
    assert ((counts - number * probabilities) ** 2 / (number * probabilities)).sum() < 16.27  # 0.999 of chi-square(3)


# ----------------------------------------------------------------------------------------------------------------------
# The vision model's outputs


@pytest.fixture
def vision_pair():
    """Vision models of ours and of transformers with the same weights."""
    ours = vision_model().eval()
    theirs = InternVLVisionModel(InternVLVisionConfig(**VISION)).eval()
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs


@pytest.mark.parametrize("size", [(56, 56), (28, 112)])
@torch.no_grad()
def test_vision_states_equal_internvl(vision_pair, size):
    ours, theirs = vision_pair
    pixels = tiles(3, size=size)
    outputs, states = ours(pixels), theirs(pixels).last_hidden_state
    assert states.shape == (3, 1 + size[0] * size[1] // 196, 32)
    assert torch.equal(outputs.last_hidden_state, states)
    assert outputs.hidden_states is None and outputs.attentions is None
    wanted = (states.sum(1) - states[:, 0]) / (states.shape[1] - 1)
    torch.testing.assert_close(outputs.pooler_output, wanted, atol=1e-5, rtol=0)


@torch.no_grad()
def test_masked_patches_equal_internvl():
    ours = vision_model(use_mask_token=True).eval()
    theirs = InternVLVisionModel(InternVLVisionConfig(**VISION, use_mask_token=True)).eval()
    theirs.load_state_dict(ours.state_dict())
    masked = torch.rand(2, 16, generator=torch.Generator().manual_seed(0)) < 0.5
    wanted = theirs(tiles(2), bool_masked_pos=masked).last_hidden_state
    assert torch.equal(ours(tiles(2), bool_masked_pos=masked).last_hidden_state, wanted)
    assert not torch.equal(ours(tiles(2)).last_hidden_state, wanted)


@torch.no_grad()
def test_hidden_states_and_attentions_equal_internvl(vision_pair):
    ours, theirs = vision_pair
    for model in vision_pair:
        model.set_attn_implementation("eager")
    options = {"output_hidden_states": True, "output_attentions": True}
    actual, wanted = ours(tiles(2), **options), theirs(tiles(2), **options)
    assert len(actual.hidden_states) == len(actual.attentions) + 1 == VISION["num_hidden_layers"] + 1
    for name in ("hidden_states", "attentions"):
        assert all(map(torch.equal, actual[name], wanted[name]))
    # A tuple has the order of the fields.
    states, pooled, hidden_states, attentions = ours(tiles(2), **options, return_dict=False)
    assert torch.equal(states, actual.last_hidden_state)
    assert torch.equal(pooled, states[:, 1:].mean(1))
    assert all(map(torch.equal, hidden_states, actual.hidden_states))
    assert all(map(torch.equal, attentions, actual.attentions))


# ----------------------------------------------------------------------------------------------------------------------
# Training machinery


def train_step(model, inputs, labels) -> dict[str, torch.Tensor]:
    model.train()
    model.zero_grad()
    torch.manual_seed(7)
    model(**inputs, labels=labels, use_cache=False).loss.backward()
    return {name: gradient.clone() for name, gradient in gradients(model).items()}


@pytest.mark.parametrize("every", [1, 2])
def test_gradient_checkpointing_gives_same_gradients(vivid, processor, every):
    config = copy.deepcopy(vivid.config)
    config.vision_config.drop_path_rate = 0.5
    model = ViTPForConditionalGeneration(config)
    model.load_state_dict(vivid.state_dict())
    inputs = encode(processor, "different_tiles", DROP_RATIO)
    labels = answer_labels(inputs, processor)
    calls = []
    for module in model.modules():
        if isinstance(module, InternVLVisionAttention):
            module.register_forward_hook(lambda *_: calls.append(1))

    wanted = train_step(model, inputs, labels)
    assert len(calls) == VISION["num_hidden_layers"]
    if every > 1 and not HAS_ACTIVATION_CHECKPOINTING:
        pytest.skip("every_n_layers needs transformers 5.23")
    checkpoint_activations(model, every)
    actual = train_step(model, inputs, labels)
    assert len(calls) == 2 * VISION["num_hidden_layers"] + len(range(0, VISION["num_hidden_layers"], every))
    assert_same_gradients(actual, wanted)


def test_bfloat16_is_close_to_float32(vivid, processor):
    inputs = encode(processor, "text_only_row", DROP_RATIO)
    labels = answer_labels(inputs, processor)
    half = copy.deepcopy(vivid).to(torch.bfloat16)
    real = inputs["attention_mask"].bool()
    wanted = vivid(**inputs, labels=labels)
    actual = half(**inputs, labels=labels)
    assert actual.logits.dtype == torch.bfloat16
    error = (actual.logits.float() - wanted.logits)[real].norm() / wanted.logits[real].norm()
    assert error < 0.03
    assert actual.loss.item() == pytest.approx(wanted.loss.item(), rel=0.03)
    wanted_gradients, actual_gradients = (train_step(model, inputs, labels) for model in (vivid, half))
    assert actual_gradients.keys() == wanted_gradients.keys()
    assert all(gradient.dtype == torch.bfloat16 for gradient in actual_gradients.values())
    actual, wanted = (
        torch.cat([g.float().flatten() for name, g in found.items() if "vision_tower" in name])
        for found in (actual_gradients, wanted_gradients)
    )
    assert torch.cosine_similarity(actual, wanted, dim=0) > 0.99


@pytest.mark.slow
def test_compiled_vrl_step_is_one_graph(vivid, processor):
    torch._dynamo.reset()
    inputs = encode(processor, "different_tiles", DROP_RATIO)
    labels = answer_labels(inputs, processor)
    wanted_loss = vivid.train()(**inputs, labels=labels, use_cache=False).loss
    wanted = train_step(vivid, inputs, labels)
    vivid.zero_grad()
    loss = torch.compile(vivid, backend="inductor", fullgraph=True)(**inputs, labels=labels, use_cache=False).loss
    torch.testing.assert_close(loss, wanted_loss, atol=1e-5, rtol=0)
    loss.backward()
    assert_same_gradients(gradients(vivid), wanted)


# ----------------------------------------------------------------------------------------------------------------------
# Configuration, initialization, saving


def config_of(**settings) -> ViTPConfig:
    text = {**TEXT, "vocab_size": 64, **settings.pop("text_config", {})}
    vision = {**VISION, **settings.pop("vision_config", {})}
    return ViTPConfig(vision_config=vision, text_config=text, image_token_id=7, **settings)


def assert_same_weights(actual: nn.Module, wanted: nn.Module) -> None:
    actual, wanted = actual.state_dict(), wanted.state_dict()
    assert actual.keys() == wanted.keys()
    assert all(torch.equal(actual[name], wanted[name]) for name in wanted)


def test_auto_classes_open_saved_model(vivid, processor, tmp_path):
    vivid.save_pretrained(tmp_path)
    inputs = encode(processor, "text_only_row", DROP_RATIO)
    again, loading = AutoModelForImageTextToText.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(loading.values())
    assert type(again) is ViTPForConditionalGeneration
    assert_same_weights(again, vivid)
    assert torch.equal(again(**inputs).logits, vivid(**inputs).logits)

    base = AutoModel.from_pretrained(tmp_path)
    assert type(base) is ViTPModel
    assert type(base.vision_tower) is ViTPVisionModel
    assert_same_weights(base, vivid.model)


def test_auto_class_opens_saved_vision_model(tmp_path):
    model = vision_model(drop_path_rate=0.3).eval()
    model.save_pretrained(tmp_path)
    again, loading = AutoModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(loading.values())
    assert type(again) is ViTPVisionModel
    assert again.config.drop_path_rate == 0.3
    assert again.encoder.layer[-1].drop_path.drop_prob == pytest.approx(0.3)
    assert_same_weights(again, model)


def test_sharded_model_saves_own_code(vivid, tmp_path):
    """FSDP2 replaces the class of the model by a subclass that is created in a module of torch."""
    where = {"__module__": "torch.distributed.fsdp._fully_shard._fsdp_init"}
    vivid.__class__ = type("FSDPViTPForConditionalGeneration", (FSDPModule, type(vivid)), where)
    vivid.save_pretrained(tmp_path)
    auto_map = ViTPConfig.from_pretrained(tmp_path).auto_map
    assert auto_map["AutoModelForImageTextToText"] == "modeling_vitp.ViTPForConditionalGeneration"
    assert (tmp_path / "modeling_vitp.py").is_file() and not [*tmp_path.glob("_fsdp*")]


def test_configuration_survives_saving(tmp_path):
    config = config_of(
        vrl_drop_ratio=0.75,
        vrl_apply_prob=0.25,
        vision_config={"drop_path_rate": 0.1, "image_size": [112, 112]},
    )
    config.save_pretrained(tmp_path)
    for again in (AutoConfig.from_pretrained(tmp_path), ViTPConfig.from_pretrained(tmp_path)):
        assert type(again) is ViTPConfig
        assert type(again.vision_config) is ViTPVisionConfig
        assert (again.model_type, again.vision_config.model_type) == ("vitp", "vitp_vision")
        assert (again.vrl_drop_ratio, again.vrl_apply_prob) == (0.75, 0.25)
        assert again.vision_config.drop_path_rate == 0.1
        assert (again.image_seq_length, again.image_token_id) == (16, 7)
        assert again.text_config.vocab_size == 64
        assert again.to_diff_dict() == config.to_diff_dict()


def test_settings_of_call_complete_configuration(tmp_path):
    ViTPVisionConfig(**VISION).save_pretrained(tmp_path)
    config = ViTPVisionConfig.from_pretrained(tmp_path, image_size=112, band_names=["VV", "VH"])
    assert ([*config.image_size], config.num_channels) == ([112, 112], 2)
    with pytest.raises(ValueError, match="112 x 56|square"):
        ViTPVisionConfig.from_pretrained(tmp_path, image_size=[112, 56])


@pytest.mark.parametrize(
    ("vision_config", "downsample_ratio", "wanted"),
    [
        ({"image_size": 448}, 0.5, 256),
        ({"image_size": [56, 28], "patch_size": [14, 7]}, 0.5, 4),
        ({"image_size": [112, 112]}, 0.25, 4),
    ],
)
def test_image_seq_length_is_computed_from_sizes(vision_config, downsample_ratio, wanted):
    config = config_of(vision_config=vision_config, downsample_ratio=downsample_ratio, image_seq_length=999)
    assert config.image_seq_length == wanted


def test_vit_alone_may_have_odd_grid():
    assert vision_model(image_size=[70, 70])(tiles(1, size=(70, 70))).last_hidden_state.shape[1] == 1 + 25


@pytest.mark.parametrize("size", [(112, 28), (56, 84)])
@torch.no_grad()
def test_visual_tokens_merge_neighboring_patches(vivid, size):
    pixels = tiles(2, size=size)
    states = vivid.model.vision_tower(pixels).last_hidden_state[:, 1:]
    height, width = (side // 14 for side in size)
    wanted = []
    for tile in states:
        for row in range(0, height, 2):
            for column in range(0, width, 2):
                block = [tile[(row + down) * width + column + right] for down in (0, 1) for right in (0, 1)]
                wanted.append(torch.cat([block[0], block[1], block[2], block[3]]))
    found = vivid.model.get_image_features(pixels).pooler_output.flatten(0, 1)
    expected = vivid.model.multi_modal_projector(torch.stack(wanted))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


def shares_embeddings(model: ViTPForConditionalGeneration) -> bool:
    return model.lm_head.weight.data_ptr() == model.model.language_model.embed_tokens.weight.data_ptr()


@pytest.mark.parametrize("tied", [True, False])
def test_head_tying_follows_language_model(tied, tmp_path):
    config = config_of(text_config={"tie_word_embeddings": tied})
    assert config.tie_word_embeddings is tied
    model = shake(ViTPForConditionalGeneration(config))
    model.tie_weights()
    model.save_pretrained(tmp_path)
    again = ViTPForConditionalGeneration.from_pretrained(tmp_path)
    assert shares_embeddings(model) is shares_embeddings(again) is tied
    assert_same_weights(again, model)
    explicit = config_of(text_config={"tie_word_embeddings": not tied}, tie_word_embeddings=tied)
    assert shares_embeddings(ViTPForConditionalGeneration(explicit)) is tied


def test_positions_and_cls_token_are_initialized_randomly():
    torch.manual_seed(0)
    vision = {**VISION, "hidden_size": 128, "image_size": [112, 112], "num_hidden_layers": 1}
    whole = ViTPForConditionalGeneration(config_of(vision_config=vision)).model.vision_tower
    for model in (
        ViTPVisionModel(ViTPVisionConfig(**vision)),
        whole,
        AutoModel.from_config(ViTPVisionConfig(**vision)),
    ):
        for weight in (model.embeddings.position_embeddings, model.embeddings.cls_token):
            assert weight.std().item() == pytest.approx(0.02, rel=0.2)
            assert weight.mean().abs() < 0.01
        layer = model.encoder.layer[0]
        assert torch.equal(layer.lambda_1, torch.full((128,), 0.1))
        assert torch.equal(layer.lambda_2, torch.full((128,), 0.1))
        assert layer.mlp.fc1.weight.std().item() == pytest.approx(0.02, rel=0.1)
