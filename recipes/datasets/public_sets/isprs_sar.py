"""SAR scenes of ocean phenomena, in folders by class."""

from collections.abc import Iterator
from pathlib import PurePath

from modeling_vitp.recipes.datasets.public_set import Entry, PublicSet, Row


class Set(PublicSet):
    title = "ISPRS SAR classification"
    license = "not stated"
    obtain = "https://github.com/zcablii/ViTP"
    paper_rows = released_rows = 1_500
    modality, tasks = ("sar",), ("classification",)
    seen = "nothing: folders by class are assumed, since no public description was found"
    layout = """
        internal_wave/0001.png    the class is the innermost folder
    """

    def entries(self) -> Iterator[Entry]:
        return self.pictures("*/**/*")

    def rows(self, entry: str) -> Iterator[Row]:
        yield self.row(entry, entry, [self.classify(entry, PurePath(entry).parent.name)])
