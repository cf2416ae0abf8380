"""VHM: its instructions for remote sensing, without those that locate."""

import re
from collections.abc import Iterator

from modeling_vitp.recipes.datasets.public_set import PublicSet, Row

TASK = re.compile(r"\{(VQA|CLS|IT|IDK)\}\s*")


class Set(PublicSet):
    title = "VHM (Pang et al. 2025), its data for supervised fine-tuning"
    license = "not stated"
    obtain = "https://huggingface.co/datasets/FitzPC/VHM_dataset_sft"
    paper_rows = 223_000
    modality, tasks = ("optical",), ("caption", "vqa", "classification")
    annotations = ("list_sft.json",)
    seen = "the list of its files, its page, and others' converters"
    layout = """
        list_sft.json           LLaVA conversations, of which those with {VG} are left out: they are DIOR-RSVG's
        fmow/…, crowdAI/…, …    one folder for each data set that it is made of, its archive unpacked in it
    """

    def rows(self, entry: dict) -> Iterator[Row]:
        if "{VG}" not in entry["conversations"][0]["value"]:
            yield from super().rows(entry)

    def text(self, text: str) -> str:
        return TASK.sub("", text)
