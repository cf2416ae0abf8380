"""GAIA: images from the web pages of space agencies, each with several captions, of which one is drawn."""

import json
from collections.abc import Iterator

from modeling_vitp.recipes.datasets.public_set import Entry, PublicSet, Row, Stored, one_of


class Set(PublicSet):
    title = "GAIA (Zavras et al. 2025)"
    license = "MIT; the images have their own"
    obtain = "https://huggingface.co/datasets/azavras/GAIA"
    paper_rows, released_rows = 33_000, 32_832
    splits = ("train", "validation")
    modality, tasks = ("optical",), ("caption",)
    seen = "its repository's page, which gives the command for img2dataset"
    layout = """
        train/00000.tar    as img2dataset writes from train_data.json: KEY.png and KEY.json with `id` and `captions`
        val/00000.tar
    """

    def entries(self) -> Iterator[Entry]:
        return self.samples("*/*.tar")

    def rows(self, entry: dict) -> Iterator[Row]:
        fields = json.loads(entry["json"])
        captions = fields["captions"]
        captions = json.loads(captions) if isinstance(captions, str) else captions
        row_id, name = str(fields["id"]), f"{entry['key']}.png"
        yield self.row(row_id, Stored(name, entry["png"]), [self.describe(name, one_of(captions, row_id))])
