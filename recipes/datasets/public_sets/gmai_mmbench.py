"""GMAI-MMBench: questions with choices about images of 38 modalities; its validation split is what has answers."""

import base64
from collections.abc import Iterator

from modeling_vitp.recipes.datasets.public_set import PublicSet, Row, Stored


class Set(PublicSet):
    title = "GMAI-MMBench, validation split (Chen et al. 2024)"
    license = "Apache-2.0 on its page; the images have those of 284 data sets"
    obtain = "https://huggingface.co/datasets/OpenGVLab/GMAI-MMBench"
    paper_rows, released_rows = 5_000, 4_550
    caution = "A benchmark: after training on its validation split, that split measures nothing."
    splits = ("validation",)
    modality, tasks = ("ct", "mri", "x-ray", "ultrasound", "pathology"), ("vqa",)
    annotations = ("GMAI_mm_bench_VAL.tsv",)
    seen = "its page, and code that reads the file"
    layout = """
        GMAI_mm_bench_VAL.tsv    index, image (base64), question, A to E, answer (a letter), category, modality …
    """

    def rows(self, entry: dict) -> Iterator[Row]:
        content = base64.b64decode(entry["image"], validate=True)
        suffix = "png" if content.startswith(b"\x89PNG") else "jpg"
        choices = {letter: entry.get(letter) or "" for letter in "ABCDE"}
        choices = {letter: text for letter, text in choices.items() if text.strip() and text != "None"}
        turn = self.choose(entry["question"], choices.values(), choices[entry["answer"].strip()])
        yield self.row(entry["index"], Stored(f"images/{entry['index']}.{suffix}", content), [turn])
