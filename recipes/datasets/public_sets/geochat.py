"""GeoChat-Instruct: the conversations in which something is located."""

from collections.abc import Iterator

from modeling_vitp.recipes.datasets.percent_boxes import from_percent
from modeling_vitp.recipes.datasets.public_set import PublicSet, Row


class Set(PublicSet):
    title = "GeoChat-Instruct (Kuckreja et al. 2024), its conversations with boxes"
    license = "Apache-2.0"
    obtain = "https://huggingface.co/datasets/MBZUAI/GeoChat_Instruct"
    paper_rows, released_rows = 64_000, 63_883
    modality, tasks = ("optical",), ("grounding",)
    annotations = ("GeoChat_Instruct.json",)
    image_root = "share/softwares/kartik/GeoChat_finetuning/final_images_llava"
    seen = "others' converters and their test data; the card"
    layout = """
        GeoChat_Instruct.json    LLaVA conversations; boxes {<x1><y1><x2><y2>|<angle>} in percent, of which those
                                 without boxes are left out, and turned boxes become the upright ones around them
        share/softwares/kartik/GeoChat_finetuning/final_images_llava/…    as images_part* unpack
    """

    def rows(self, entry: dict) -> Iterator[Row]:
        turns = entry["conversations"]
        if any("{<" in turn["value"] for turn in turns):
            size = self.size(entry["image"])
            turns = [{**turn, "value": from_percent(turn["value"], size)} for turn in turns]
            yield from super().rows({**entry, "conversations": turns})
