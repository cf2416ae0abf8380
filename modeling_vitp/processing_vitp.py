"""Processor that converts images and chat text to token sequences already shortened by VRL."""

import dataclasses
import re
from bisect import bisect_right
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from jinja2 import TemplateError, TemplateSyntaxError
from transformers.feature_extraction_utils import BatchFeature
from transformers.image_utils import ImageInput
from transformers.processing_utils import MultiModalData, ProcessingKwargs, ProcessorMixin
from transformers.utils.chat_template_utils import render_jinja_template

from .image_processing_vitp import ViTPImageProcessor
from .opening import naming
from .vrl import check_apply_prob, check_drop_ratio, draw_visual_tokens, keyed_generator

IMAGE_TOKEN, IMAGE_START_TOKEN, IMAGE_END_TOKEN = "<IMG_CONTEXT>", "<img>", "</img>"
ROLES = ("system", "user", "assistant", "tool")
GIVEN = "given"  # type of a part of an answer that is not learned, such as text of the prompt

# ChatML, as in InternVL2.5 and Qwen2.5. The loss is computed on the text between the generation markers: the answers
# and their end-of-turn tokens.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['role'] == 'assistant' %}{% generation %}"
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for part in message['content'] %}{{ part['text'] }}{% endfor %}{% endif %}"
    "{{ '<|im_end|>' }}{% endgeneration %}{{ '\n' }}"
    "{% else %}"
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}{{ '<IMG_CONTEXT>\n' }}{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}"
    "{{ '<|im_end|>\n' }}"
    "{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


class ViTPProcessorKwargs(ProcessingKwargs, total=False):
    _defaults = {
        "images_kwargs": {"crop_to_patches": True},
        "text_kwargs": {"padding_side": "left"},  # generation continues at the right end of every row
    }


class ViTPProcessor(ProcessorMixin):
    r"""Processor that combines an image processor and a tokenizer, with Visual Robustness Learning (VRL).

    Args:
        image_processor ([`ViTPImageProcessor`]):
            Image processor that cuts images into tiles. Its `max_patches` is the tile budget of one *sample*, which its
            images share evenly. A thumbnail is added to every image that is cut.
        tokenizer ([`~transformers.PreTrainedTokenizerFast`]):
            Tokenizer with the tokens `<img>`, `</img>` and `<IMG_CONTEXT>`. Its padding side is set to the left,
            because pipelines read it from the tokenizer.
        image_seq_length (`int`, defaults to 256):
            Visual tokens of one tile, [`ViTPConfig`]'s `image_seq_length`.
        chat_template (`str`, *optional*):
            Chat template. Defaults to ChatML with `{% generation %}` markers around the answers.
    """

    valid_processor_kwargs = ViTPProcessorKwargs
    images_kwargs, text_kwargs = ViTPProcessorKwargs._defaults.values()

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, **kwargs):
        """Load a processor, as in transformers. Raise a `ValueError` that names a damaged or missing file."""
        with naming(pretrained_model_name_or_path, cls):
            processor = super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
            if processor.tokenizer.pad_token_id is None:
                raise ValueError("tokenizer_config.json has no pad_token")
            return processor

    def __init__(
        self,
        image_processor: ViTPImageProcessor | None = None,
        tokenizer=None,
        image_seq_length: int = 256,
        chat_template: str | None = None,
    ):
        super().__init__(image_processor, tokenizer, chat_template=chat_template or CHAT_TEMPLATE)
        self.image_seq_length = image_seq_length
        self.image_token = IMAGE_TOKEN
        vocabulary = tokenizer.get_vocab()
        missing = [token for token in (IMAGE_TOKEN, IMAGE_START_TOKEN, IMAGE_END_TOKEN) if token not in vocabulary]
        if missing:
            raise ValueError(
                f"The tokenizer lacks the tokens {', '.join(missing)}. Add them with "
                f"tokenizer.add_special_tokens({{'additional_special_tokens': {missing}}}) and resize the model's "
                "token embeddings."
            )
        try:
            render_jinja_template([[]], chat_template=self.template())
        except TemplateSyntaxError as error:
            raise ValueError(f"chat_template, line {error.lineno}: {error.message}.") from error
        except Exception:  # The template expects messages.
            pass
        tokenizer.padding_side = self.text_kwargs["padding_side"]
        self.image_token_id = vocabulary[IMAGE_TOKEN]
        self.start_image_token_id = vocabulary[IMAGE_START_TOKEN]
        self.end_image_token_id = vocabulary[IMAGE_END_TOKEN]

    @property
    def image_token_ids(self) -> list[int]:
        return [self.image_token_id, self.start_image_token_id, self.end_image_token_id]

    @property
    def model_input_names(self) -> list[str]:
        return [*super().model_input_names, "position_ids", "visual_token_indices"]

    def __call__(
        self,
        images: ImageInput | None = None,
        text: str | list[str] | None = None,
        vrl_drop_ratio: float | None = None,
        vrl_apply_prob: float | None = None,
        vrl_keys: list | None = None,
        **kwargs,
    ) -> BatchFeature:
        r"""Prepare images and texts for the model.

        Args:
            images: one image, a list, or a list of images for each text. PIL images, arrays or tensors of any depth
                and number of bands (see [`InputSpec`]), paths or URLs.
            text: one text or a batch; `<IMG_CONTEXT>` marks the position of an image.
            vrl_drop_ratio (`float`, *optional*, defaults to 0):
                r in [0, 1). Each sample keeps a uniformly random subset X of all its visual tokens S, over tiles and
                images together, in order, with |X| = ceil((1 - r) * |S|).
            vrl_apply_prob (`float`, *optional*, defaults to 1):
                Probability, for each sample, that VRL is applied to it.
            vrl_keys (`list`, *optional*):
                Random seed of each text, for example `(seed, sample_id, epoch)`: the kept tokens of a sample depend on
                its key alone. Defaults to torch's global generator.
            kwargs: options of the tokenizer (`padding`, `return_tensors` …) and of the image processor (`max_patches`,
                `input_spec` …). `padding_side` defaults to `"left"`, regardless of the tokenizer's own, because
                `generate` would otherwise continue after the padding of the shorter rows.

        Returns:
            [`~transformers.BatchFeature`]: `input_ids` and `attention_mask`, `(batch_size, sequence_length)`, with one
            image token for each kept visual token; `pixel_values`, float32
            `(num_tiles, channels, height, width)`, all tiles of the batch. With r > 0 also `position_ids`, int64 like
            `input_ids`, with the positions in the full sequence (gaps at dropped tokens, 0 at padding), and, if there
            are images, `visual_token_indices`, int64 `(num_kept,)`: ascending flat indices over the batch's tiles times
            tokens per tile.

        Raises:
            ValueError: if the numbers of images and of their positions differ, a text has a literal image token,
                truncation would cut image tokens, an option is out of range, or videos or audio are passed.
        """
        vrl_drop_ratio = check_drop_ratio(vrl_drop_ratio or 0.0)
        vrl_apply_prob = check_apply_prob(1.0 if vrl_apply_prob is None else vrl_apply_prob)
        if images is None and text is None:
            raise ValueError("Expected `images`, `text` or both, got neither.")
        other = next((name for name in ("videos", "audio") if kwargs.get(name) is not None), None)
        if other is not None:  # transformers ignores it without a warning
            raise ValueError(f"Expected `images` and `text`, got {other}. Pass frames of a video as `images`.")
        merged = self._merge_with_defaults(kwargs)
        text_kwargs, images_kwargs = merged["text_kwargs"], merged["images_kwargs"]
        return_tensors = text_kwargs.pop("return_tensors", None)
        images_kwargs["return_tensors"] = None  # tiles are stacked once, below
        if text is None:
            return self.image_processor(images, **{**images_kwargs, "return_tensors": return_tensors or "pt"})

        text = [text] if isinstance(text, str) else list(text)
        images = self._images_by_sample(images, text)
        if vrl_keys is not None and len(vrl_keys) != len(text):
            raise ValueError(f"Expected {len(text)} vrl_keys, one for each text, got {len(vrl_keys)}.")

        pixel_values, kept_tokens, kept_by_image = [], [], []
        for row, sample_images in enumerate(images):
            try:
                tiles, num_tiles = self._tile(sample_images, images_kwargs)
            except (ValueError, TypeError, OSError) as error:
                raise ValueError(f"Images of sample {row} of the batch: {error}") from error
            key = None if vrl_keys is None else vrl_keys[row]
            kept, by_image = self._draw(num_tiles, vrl_drop_ratio, vrl_apply_prob, key)
            kept_tokens.append(kept + len(pixel_values) * self.image_seq_length)
            kept_by_image.append(by_image)
            pixel_values += tiles

        wants_mask = text_kwargs.pop("return_attention_mask", None)
        return_offsets = text_kwargs.pop(
            "return_text_replacement_offsets", merged.get("return_text_replacement_offsets", False)
        )
        text_kwargs.pop("return_mm_token_type_ids", None)
        image_texts = [self._tokens_of_image(len(local)) for kept in kept_by_image for local, _ in kept]
        text, replacement_offsets = self.get_text_with_replacements(text, image_texts)
        data = dict(self.tokenizer(text, return_attention_mask=True, **text_kwargs))
        positions = [
            self._positions(ids, mask, kept, row).tolist()
            for row, (ids, mask, kept) in enumerate(zip(data["input_ids"], data["attention_mask"], kept_by_image))
        ]
        if wants_mask is False or (wants_mask is None and "attention_mask" not in self.tokenizer.model_input_names):
            del data["attention_mask"]
        if return_offsets:
            data["text_replacement_offsets"] = replacement_offsets
        if merged.get("return_mm_token_type_ids"):
            data["mm_token_type_ids"] = self.create_mm_token_type_ids(data["input_ids"])
        if pixel_values:
            data["pixel_values"] = torch.stack(pixel_values)
        if vrl_drop_ratio > 0:
            data["position_ids"] = positions
            if pixel_values:
                data["visual_token_indices"] = torch.cat(kept_tokens)
        return BatchFeature(data, tensor_type=return_tensors, skip_tensor_conversion=self.skip_tensor_conversion)

    def _merge_with_defaults(self, kwargs: dict) -> dict[str, dict]:
        """Merge the settings of a call with those of the tokenizer (except its padding side) and the defaults."""
        settings = {name: value for name, value in self.tokenizer.init_kwargs.items() if name != "padding_side"}
        return self._merge_kwargs(ViTPProcessorKwargs, tokenizer_init_kwargs=settings, **kwargs)

    def replace_image_token(self, image_inputs: dict, image_idx: int, **kwargs) -> str:
        """Return the text of a tiled image without VRL, for serving engines."""
        return self._tokens_of_image(image_inputs["num_patches"][image_idx] * self.image_seq_length)

    @staticmethod
    def _tokens_of_image(number: int) -> str:
        return IMAGE_START_TOKEN + IMAGE_TOKEN * number + IMAGE_END_TOKEN

    def _images_by_sample(self, images: ImageInput | None, text: list[str]) -> list[list]:
        """Assign images to texts by the number of image tokens in each text."""
        marks = [self.image_token] * sum(sample.count(self.image_token) for sample in text)
        _, found = self.get_text_with_replacements(list(text), marks)
        expected = [len(offsets) for offsets in found] if marks else [0] * len(text)
        if images is None:
            images = []
        if isinstance(images, (list, tuple)) and images and all(isinstance(item, (list, tuple)) for item in images):
            counts = [len(item) for item in images]
            if len(counts) != len(text):
                raise ValueError(
                    f"Expected a list of images for each of {len(text)} texts, got {len(counts)}: row by row, the "
                    f"{IMAGE_TOKEN} tokens in the prompts should be the same as the number of images."
                )
            for row, (count, number) in enumerate(zip(counts, expected)):
                if count != number:
                    raise ValueError(
                        f"Sample {row} of the batch has {count} image(s), but {number} image token(s) "
                        f"({IMAGE_TOKEN}) in its text."
                    )
            return [list(item) for item in images]
        if not isinstance(images, (list, tuple)):
            images = list(images) if getattr(images, "ndim", 0) == 4 else [images]
        if len(images) != sum(expected):
            raise ValueError(
                f"Expected {sum(expected)} image(s) for the {IMAGE_TOKEN} tokens in the text ({expected} by sample of "
                f"the batch), got {len(images)}. Write {IMAGE_TOKEN} in the text once for each image, or use "
                "`apply_chat_template`."
            )
        flat = iter(images)
        return [[next(flat) for _ in range(number)] for number in expected]

    def _tile(self, images: list, images_kwargs: Mapping[str, Any]) -> tuple[list[torch.Tensor], list[int]]:
        """Return the tiles of the images of one sample, within its tile budget, and their number for each image."""
        if not images:
            return [], []
        tiles = self.image_processor([images], **images_kwargs)
        return tiles["pixel_values"], tiles["num_patches"]

    def _draw(
        self, num_tiles: list[int], drop_ratio: float, apply_prob: float, key: object | None
    ) -> tuple[torch.LongTensor, list[tuple[np.ndarray, int]]]:
        """Return the kept visual tokens of a sample, and those of each image, see [`_split_by_image`]."""
        num_tokens = [tiles * self.image_seq_length for tiles in num_tiles]
        if drop_ratio > 0:
            parts = key if isinstance(key, (list, tuple)) else (key,)
            generator = None if key is None else keyed_generator(*parts)
            kept = draw_visual_tokens(sum(num_tokens), drop_ratio, apply_prob, generator)
        else:
            kept = torch.arange(sum(num_tokens), device="cpu")
        return kept, _split_by_image(kept.numpy(), num_tokens)

    def _get_num_multimodal_tokens(self, image_sizes: list[list[int]] | None = None, **kwargs) -> MultiModalData:
        """Return the numbers of tiles and tokens of each image of one sample without VRL, for serving engines.

        Args:
            image_sizes: height and width of each image in pixels. The images share the sample's tile budget.
            kwargs: options of the image processor (`max_patches` …).

        Returns:
            `num_image_patches`, tiles including the thumbnail; `num_image_tokens`, including the start and end tokens.
        """
        if image_sizes is None:
            return MultiModalData()
        images_kwargs = self._merge_with_defaults(kwargs)["images_kwargs"]
        num_tiles = self.image_processor.num_tiles([tuple(size) for size in image_sizes], images_kwargs)
        num_tokens = [2 + tiles * self.image_seq_length for tiles in num_tiles]
        return MultiModalData(num_image_tokens=num_tokens, num_image_patches=num_tiles)

    def _positions(self, input_ids: list[int], attention_mask: list[int], kept_by_image: list, row: int) -> np.ndarray:
        """Return the positions of the kept tokens of one row in its full sequence; 0 at padding."""
        ids, real = np.array(input_ids, np.int64), np.array(attention_mask, bool)
        image_tokens = np.flatnonzero(ids == self.image_token_id)
        image_ends = np.flatnonzero(ids == self.end_image_token_id)
        image_starts = np.flatnonzero(ids == self.start_image_token_id)
        num_kept = sum(len(local) for local, _ in kept_by_image)
        if len(image_starts) > len(kept_by_image):
            raise ValueError(
                f"Sample {row} of the batch has {len(image_starts)} '{IMAGE_START_TOKEN}' tokens for "
                f"{len(kept_by_image)} image(s): its text has a literal image token. Remove it. Mark the position of "
                f"an image with '{IMAGE_TOKEN}' or, in chat messages, {{'type': 'image'}}."
            )
        if len(image_tokens) != num_kept or len(image_ends) != len(kept_by_image):
            raise ValueError(
                f"Sample {row} of the batch needs {num_kept} image tokens and {len(kept_by_image)} image ends, but "
                f"{len(image_tokens)} and {len(image_ends)} are left: truncation cut them, or its text has a literal "
                "image token. Raise max_length, lower max_patches or raise vrl_drop_ratio."
            )
        gaps = np.zeros_like(ids)  # number of dropped tokens just before each token
        for end, (local, full) in zip(image_ends, kept_by_image):
            steps = np.diff(local, prepend=-1, append=full) - 1
            gaps[image_tokens[: len(local)]] = steps[:-1]
            gaps[end] = steps[-1]
            image_tokens = image_tokens[len(local) :]
        return np.where(real, ((1 + gaps) * real).cumsum() - 1, 0)

    def encode_conversation(
        self,
        messages: list[dict[str, Any]],
        images_kwargs: Mapping[str, Any] | None = None,
        vrl_drop_ratio: float = 0.0,
        vrl_apply_prob: float = 1.0,
        vrl_key: tuple | None = None,
    ) -> dict[str, Any]:
        """Encode one conversation for training, and number its answers.

        The result equals that of [`apply_chat_template`] for a batch of one, but the options are neither merged nor
        validated, which would take as long as resizing a small image.

        Args:
            messages: messages that pass [`check_messages`], with the `image` in each image part.
            images_kwargs: options of the image processor.
            vrl_drop_ratio, vrl_apply_prob, vrl_key: see [`ViTPProcessor.__call__`].

        Returns:
            Arrays `(sequence_length,)` of int64: `input_ids`; `answers`, the number of each token's answer, from 1, or
            0 outside of answers; and with r > 0 `position_ids`. If there are images, their tiles as a list,
            `pixel_values`, and with r > 0 `visual_token_indices`, an int64 tensor `(num_kept,)`.
        """
        template = self.template()
        check_tool_calls(messages, template)
        try:
            (text,), (spans,) = render_jinja_template(
                conversations=[messages],
                chat_template=template,
                return_assistant_tokens_mask=True,
                **self.tokenizer.special_tokens_map,
            )
        except TemplateError as error:
            raise self.not_rendered(error) from error
        parts = [part for message in messages for part in message.get("content") or () if isinstance(part, dict)]
        (images,) = self._images_by_sample([part["image"] for part in parts if part["type"] == "image"], [text])
        options = {**self.images_kwargs, "return_tensors": None, **(images_kwargs or {})}
        tiles, num_tiles = self._tile(images, options)
        kept, by_image = self._draw(num_tiles, vrl_drop_ratio, vrl_apply_prob, vrl_key)

        # Each image is tokenized as one token, which is then repeated.
        mark = self._tokens_of_image(1)
        data = self.tokenizer(text.replace(IMAGE_TOKEN, mark), add_special_tokens=False, return_offsets_mapping=True)
        ids = np.array(data["input_ids"], np.int64)
        starts, ends = np.array(data["offset_mapping"], np.int64).reshape(-1, 2).T
        # The spans of the answers refer to the text without image start and end tokens.
        image_ends, longer = [match.end() for match in re.finditer(IMAGE_TOKEN, text)], len(mark) - len(IMAGE_TOKEN)
        answers = np.zeros_like(ids)
        # The tokens of an answer are searched between these, because a conversation may have thousands of answers.
        firsts, lasts = np.maximum.accumulate(ends), np.minimum.accumulate(starts[::-1])[::-1]
        for number, span in enumerate(spans, start=1):
            start, end = (position + longer * bisect_right(image_ends, position) for position in span)
            near = slice(firsts.searchsorted(start, "right"), lasts.searchsorted(end))
            answers[near][(starts[near] < end) & (ends[near] > start)] = number
        counts = np.ones_like(ids)
        counts[ids == self.image_token_id] = [len(local) for local, _ in by_image]
        ids, answers = ids.repeat(counts), answers.repeat(counts)
        positions = self._positions(ids, np.ones_like(ids), by_image, 0)
        encoded = {"input_ids": ids, "answers": answers}
        if vrl_drop_ratio > 0:
            encoded["position_ids"] = positions
        if tiles:
            encoded["pixel_values"] = tiles
            if vrl_drop_ratio > 0:
                encoded["visual_token_indices"] = kept
        return encoded

    def template(self, name: str | None = None) -> str:
        """Return the chat template of a name, the argument itself if it is a template, or the default template."""
        named = self.chat_template if isinstance(self.chat_template, dict) else {"default": self.chat_template}
        return named.get(name or "default", name)

    def apply_chat_template(self, conversation, chat_template: str | None = None, **kwargs):
        """Render chat messages and, with `tokenize=True`, encode them.

        See [`~transformers.ProcessorMixin.apply_chat_template`]. VRL options go into `processor_kwargs`, in which
        `add_special_tokens` defaults to `False`, as in training: the template has all special tokens. Messages are
        dictionaries, or dataclasses or pydantic models with the same fields.

        Raises:
            ValueError: if a conversation is empty, a role is unknown, a text has a literal image token, or a message
                has tool calls that the chat template does not render (the default template does not).
        """
        if not conversation:
            raise ValueError("Conversation 0: expected messages, got an empty list.")
        batched = isinstance(conversation[0], (list, tuple)) or hasattr(conversation[0], "messages")
        conversations = [plain_messages(messages) for messages in (conversation if batched else [conversation])]
        template = self.template(chat_template)
        if kwargs.get("tokenize"):
            options = kwargs.get("processor_kwargs") or {}
            if "add_special_tokens" not in options.get("text_kwargs", {}):
                options = {"add_special_tokens": False, **options}
            kwargs["processor_kwargs"] = options
        for row, messages in enumerate(conversations):
            try:
                check_messages(messages, allow_image_tokens=bool(kwargs.get("sanitize_control_tokens")))
                check_tool_calls(messages, template)
            except ValueError as error:
                raise ValueError(f"Conversation {row}: {error}") from error
        try:
            return super().apply_chat_template(conversations if batched else conversations[0], chat_template, **kwargs)
        except TemplateError as error:
            raise self.not_rendered(error) from error

    def not_rendered(self, error: TemplateError) -> ValueError:
        name = self.tokenizer.name_or_path
        return ValueError(f"The chat_template of {name} cannot render the messages: {error}")


def plain_messages(conversation: Any) -> Any:
    """Convert messages to dictionaries without empty fields, as newer transformers does."""
    messages = getattr(conversation, "messages", conversation)
    if not isinstance(messages, (list, tuple)):
        return messages
    return [plain_message(message) for message in messages]


def plain_message(message: Any) -> Any:
    """Convert a message or a part of one to a dictionary without empty fields."""
    if hasattr(message, "model_dump"):  # pydantic
        message = message.model_dump()
    elif dataclasses.is_dataclass(message):
        message = dataclasses.asdict(message)
    if not isinstance(message, Mapping):
        return message
    return {name: value for name, value in message.items() if value is not None}


def check_messages(messages: list[dict], allow_image_tokens: bool = False) -> None:
    """Raise a `ValueError` that names the message if a role is unknown or a text has a literal image token."""
    if not messages:
        raise ValueError("expected messages, got an empty list.")
    for index, message in enumerate(messages):
        if not isinstance(message, dict):
            raise ValueError(f"message {index} is {message!r}. Expected {{'role', 'content'}}.")
        if message.get("role") not in ROLES:
            raise ValueError(f"message {index} has the role {message.get('role')!r}. Expected {', '.join(ROLES)}.")
        check_content(message, index)
        for text in message_texts(message):
            token = next((t for t in (IMAGE_TOKEN, IMAGE_START_TOKEN, IMAGE_END_TOKEN) if t in text), None)
            if token is not None and not allow_image_tokens:
                raise ValueError(
                    f"message {index} has the literal image token {token!r}. Remove it, and mark the position of an "
                    "image with {'type': 'image'}."
                )


def check_content(message: dict, index: int) -> None:
    """Raise a `ValueError` unless the content is a string or a list of text and image parts."""
    content = message.get("content")
    if isinstance(content, str) or (content is None and message["role"] == "assistant"):
        return
    if not isinstance(content, (list, tuple)):
        raise ValueError(f"message {index} has the content {content!r}. Expected a string or a list of parts.")
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind not in ("image", "text", "image_url", GIVEN) or (
            kind in ("text", GIVEN) and not isinstance(part.get("text"), str)
        ):
            raise ValueError(
                f"message {index} has the part {part!r}. Expected {{'type': 'text', 'text': …}} or {{'type': 'image'}}."
            )


def message_texts(message: dict) -> list[str]:
    """Return the texts of a message whose content is a string or a list of parts."""
    content = message.get("content") or ""
    if isinstance(content, str):
        return [content]
    return [part["text"] for part in content if part.get("text") is not None]


def check_tool_calls(messages: list[dict], template: str) -> None:
    """Raise a `ValueError` if a message has tool calls that the chat template does not render."""
    index = next((index for index, message in enumerate(messages) if message.get("tool_calls")), None)
    if index is not None and "tool_calls" not in template:
        raise ValueError(
            f"message {index} has tool_calls, which the chat template does not render. Write them into its content, "
            "or set a chat_template that renders them."
        )


def _split_by_image(kept: np.ndarray, num_tokens: list[int]) -> list[tuple[np.ndarray, int]]:
    """Return for each image its kept tokens, as indices into its own tokens, and its number of tokens.

    Args:
        kept: int64, ascending, `(num_kept,)`.
        num_tokens: number of tokens of each image.
    """
    ends = np.cumsum(num_tokens, dtype=np.int64)
    splits = np.searchsorted(kept, ends).tolist()
    bounds = zip([0, *splits], splits, ends.tolist(), num_tokens)
    return [(kept[first:last] - (end - full), full) for first, last, end, full in bounds]


__all__ = ["ViTPProcessor"]
