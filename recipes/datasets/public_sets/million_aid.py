"""Million-AID: scenes in folders by class. Those of its test set have no labels, and are not used."""

from collections.abc import Iterator
from pathlib import PurePath

from modeling_vitp.recipes.datasets.public_set import Entry, PublicSet, Row


class Set(PublicSet):
    title = "Million-AID (Long et al. 2021), its labelled scenes"
    license = "CC BY-NC-ND 4.0"
    obtain = "https://captain-whu.github.io/DiRS/"
    paper_rows, released_rows = 920_000, 920_057  # most of them of its test set, with captions that a model wrote
    modality, tasks = ("optical",), ("caption", "classification")
    seen = "others' descriptions, which report 10,000 labelled scenes"
    layout = """
        train/agriculture_land/arable_land/dry_field/P0115678.jpg    the class is the innermost folder
    """

    def entries(self) -> Iterator[Entry]:
        return self.pictures("train/**/*")

    def rows(self, entry: str) -> Iterator[Row]:
        yield self.row(entry, entry, [self.classify(entry, PurePath(entry).parent.name)])
