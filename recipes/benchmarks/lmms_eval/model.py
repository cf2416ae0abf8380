"""The model `vitp` of lmms-eval."""

import hashlib
import itertools
from typing import Any

import torch
from accelerate import Accelerator
from lmms_eval.api.instance import Instance
from lmms_eval.api.model import lmms
from tqdm.auto import tqdm

from modeling_vitp.evaluation.questions import others
from modeling_vitp.modeling_vitp import ViTPForConditionalGeneration
from modeling_vitp.processing_vitp import ViTPProcessor
from modeling_vitp.training.asking import generate_answers

MAX_NEW_TOKENS = 1024  # of tasks that do not say how many
NOT_FOR_GENERATE = {"until", "image_aspect_ratio", "max_gen_toks"}  # what tasks say that `generate` does not take


class ViTP(lmms):
    """A vision-language model as `vitp pretrain` leaves it.

    Args:
        pretrained: folder or Hub id.
        batch_size: questions that are answered together.
        device: such as `cuda:0`; that of the process if `None`.
        dtype: such as `bfloat16`; that of the weights if `None`.
        max_patches: most tiles of a question's images; the processor's own if `None`.
        swap_images: whether each question is about the images of another one of its task, the blind control.
    """

    is_simple = False

    def __init__(
        self,
        pretrained: str,
        batch_size: int | str = 1,
        device: str | None = None,
        dtype: str | None = None,
        max_patches: int | None = None,
        swap_images: bool = False,
        max_batch_size: int | None = None,
    ):
        super().__init__()
        self.accelerator = Accelerator()
        self._rank, self._world_size = self.accelerator.process_index, self.accelerator.num_processes
        options = {} if dtype is None else {"dtype": getattr(torch, dtype)}
        model = ViTPForConditionalGeneration.from_pretrained(pretrained, **options)
        self.model = model.to(device if device and self._world_size == 1 else self.accelerator.device).eval()
        self.processor = ViTPProcessor.from_pretrained(pretrained)
        self.batch_size = int(batch_size)
        self.images_kwargs = {} if max_patches is None else {"max_patches": int(max_patches)}
        self.swap_images = swap_images

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """The answers, in the order of the requests."""
        documents = [Document(self, request) for request in requests]
        shown = self._other_documents(documents) if self.swap_images else documents
        pairs, answers = list(zip(documents, shown)), []
        with tqdm(total=len(pairs), desc="Answering", disable=self.rank != 0) as progress:
            for _, group in itertools.groupby(pairs, key=lambda pair: pair[0].generation):
                for batch in batched(list(group), self.batch_size):
                    answers += self._answer(batch)
                    progress.update(len(batch))
        return answers

    def _answer(self, batch: list[tuple["Document", "Document"]]) -> list[str]:
        generation = dict(batch[0][0].generation)
        stops = generation.get("until") or []
        stops = [stops] if isinstance(stops, str) else stops
        generation = {name: value for name, value in generation.items() if name not in NOT_FOR_GENERATE}
        generation = {"max_new_tokens": MAX_NEW_TOKENS, **generation}
        conversations = [document.messages(other) for document, other in batch]
        answers = generate_answers(self.model, self.processor, conversations, self.images_kwargs, **generation)
        return [min((answer.partition(stop)[0] for stop in stops), key=len, default=answer) for answer in answers]

    @staticmethod
    def _other_documents(documents: list["Document"]) -> list["Document"]:
        """For each the one whose images it is shown, of the same task."""
        shown = []
        for task, group in itertools.groupby(documents, key=lambda document: document.task):
            group = list(group)
            places = others([document.image_keys() for document in group])
            if None in places:
                raise ValueError(
                    f"{task}: of some questions all with as many images are about the same, so that these cannot be "
                    "swapped: ask more of the task, or leave swap_images out."
                )
            shown += [group[place] for place in places]
        return shown

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        raise NotImplementedError("vitp generates answers; choose tasks with output_type: generate_until.")

    def generate_until_multi_round(self, requests: list[Instance]) -> list[str]:
        raise NotImplementedError("vitp answers in one round; choose tasks with output_type: generate_until.")


class Document:
    """A request of lmms-eval: its settings of generating, and its messages, made when they are asked for."""

    def __init__(self, model: ViTP, request: Instance):
        _, self.to_messages, generation, place, self.task, split = request.args
        # Of a temperature of 0 `generate` says that it is none.
        is_greedy = not generation.get("do_sample") or not generation.get("temperature", 1)
        sampling = ("temperature", "top_p", "top_k", "do_sample") if is_greedy else ()
        self.generation = {name: value for name, value in generation.items() if name not in sampling}
        self.row = model.task_dict[self.task][split], place

    def messages(self, other: "Document | None" = None) -> list[dict[str, Any]]:
        """Messages as the processor takes them, with the document's own images or those of another one."""
        rows, place = self.row
        images = iter(self.images() if other is None or other is self else other.images())
        return [
            {"role": message["role"], "content": [self._part(part, images) for part in message["content"]]}
            for message in self.to_messages(rows[place])
        ]

    @staticmethod
    def _part(part: dict[str, Any], images: Any) -> dict[str, Any]:
        if part["type"] == "text":
            return {"type": "text", "text": part["text"]}
        if part["type"] != "image":
            raise ValueError(f"vitp takes images, and the task shows it {part['type']}.")
        return {"type": "image", "image": next(images)}

    def images(self) -> list[Any]:
        rows, place = self.row
        messages = self.to_messages(rows[place])
        return [part["url"] for message in messages for part in message["content"] if part["type"] == "image"]

    def image_keys(self) -> tuple[str, ...]:
        """What tells the images from others."""
        return tuple(hashlib.sha256(image.convert("RGB").tobytes()).hexdigest() for image in self.images())


def batched(items: list, size: int) -> list[list]:
    return [items[start : start + size] for start in range(0, len(items), size)]
