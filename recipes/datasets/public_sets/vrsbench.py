"""VRSBench: objects with expressions that refer to them, of its training split."""

from collections.abc import Iterator

from modeling_vitp.recipes.datasets.percent_boxes import from_percent
from modeling_vitp.recipes.datasets.public_set import PublicSet, Row


class Set(PublicSet):
    title = "VRSBench (Li et al. 2024), its referring expressions"
    license = "CC BY 4.0; the images are DOTA's and DIOR's, for research"
    obtain = "https://huggingface.co/datasets/xiang709/VRSBench"
    paper_rows, released_rows = 38_000, 38_689
    modality, tasks = ("optical",), ("grounding",)
    annotations = ("VRSBench_train.json",)
    image_root = "Images_train"
    seen = "the list of its files, and others' notes and loaders: 142,390 conversations, 36,313 of them [refer]"
    layout = """
        VRSBench_train.json    LLaVA conversations, of which those with [refer] are read: boxes {<x1><y1><x2><y2>}
                               in percent
        Images_train/P0003_0002.png
    """

    def rows(self, entry: dict) -> Iterator[Row]:
        turns = entry["conversations"]
        if "[refer]" in turns[0]["value"]:
            size = self.size(entry["image"])
            turns = [{**turn, "value": from_percent(turn["value"], size)} for turn in turns]
            yield from super().rows({**entry, "conversations": turns})
