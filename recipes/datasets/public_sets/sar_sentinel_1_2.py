"""Sentinel-1 scenes of four terrains; the Sentinel-2 images of the same places are left aside."""

from collections.abc import Iterator
from pathlib import PurePath

from modeling_vitp.recipes.datasets.public_set import Entry, PublicSet, Row

NAMES = {"agri": "agriculture", "barrenland": "barren land"}


class Set(PublicSet):
    title = "Sentinel-1&2 image pairs, segregated by terrain"
    license = "CC BY 4.0, as SEN1-2, of which it is a part"
    obtain = "https://www.kaggle.com/datasets/requiemonk/sentinel12-image-pairs-segregated-by-terrain"
    paper_rows = released_rows = 16_000
    modality, tasks = ("sar",), ("classification",)
    seen = "others' loaders, which report 4,000 pairs of each class"
    layout = """
        v_2/agri/s1/ROIs1868_summer_s1_59_p100.png    and so of barrenland, grassland and urban
    """

    def entries(self) -> Iterator[Entry]:
        return self.pictures("v_2/*/s1/*.png")

    def rows(self, entry: str) -> Iterator[Row]:
        name = PurePath(entry).parts[1]
        yield self.row(entry, entry, [self.classify(entry, NAMES.get(name, name))])
