"""DIOR-RSVG: objects of DIOR's images, each with an expression that only it fits."""

from collections.abc import Iterator

from modeling_vitp.instructions.from_annotations.formats import parse_xml, voc_objects
from modeling_vitp.recipes.datasets.public_set import Entry, PublicSet, Row


class Set(PublicSet):
    title = "DIOR-RSVG (Zhan et al. 2023)"
    license = "not stated; the images are DIOR's, for research"
    obtain = "https://github.com/ZhanYang-nwpu/RSVG-pytorch"
    paper_rows, released_rows = 27_000, 27_133
    modality, tasks = ("optical",), ("grounding",)
    image_root = "JPEGImages"
    seen = "one XML and the lists of its repository, and its loader; 26,991 objects in train.txt, others report"
    layout = """
        Annotations/00001.xml    Pascal VOC, with a `description` in each `object`
        JPEGImages/00001.jpg
        train.txt                numbers of objects, counted from 0 over all XML in the order of their names
        test.txt                 read to leave out the images of its objects
    """

    def objects(self) -> Iterator[tuple[str, Entry]]:
        """All objects with their numbers. A broken XML stops, since the numbers of all later ones hang on it."""
        number = 0
        for path in self.files("Annotations/*.xml"):
            root = parse_xml(path)
            image = root.findtext("filename", "").strip()
            for node, found in zip(root.iterfind("object"), voc_objects(root, path)):
                yield str(number), Entry(found.where, (number, image, found.box, node.findtext("description")))
                number += 1

    def held_out_images(self) -> set[str]:
        numbers = set(self.lines("test.txt", held_out=True))
        if not all(map(str.isdecimal, numbers)):
            raise ValueError(f"{self.folder / 'test.txt'} has other lines than numbers of objects")
        return {entry.content[1] for number, entry in self.objects() if number in numbers}

    def entries(self) -> Iterator[Entry]:
        numbers = set(self.lines("train.txt"))
        return (entry for number, entry in self.objects() if number in numbers)

    def rows(self, entry: tuple) -> Iterator[Row]:
        number, image, box, expression = entry
        yield self.row(number, image, [self.locate(image, box, expression)])
