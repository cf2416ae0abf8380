"""refGeo: the four grounding sources of the paper's remote sensing mixture, with the rows that the release has."""

from collections.abc import Iterator
from pathlib import PurePath

from modeling_vitp.recipes.datasets.public_set import PublicSet, Row


class Set(PublicSet):
    title = "refGeo (Zhou et al. 2024), its parts of RSVG, DIOR-RSVG, VRSBench and GeoChat"
    license = "not stated"
    obtain = "https://huggingface.co/datasets/erenzhou/refGeo"
    released_rows = 5_505 + 27_133 + 38_689 + 63_883
    modality, tasks = ("optical",), ("grounding",)
    parts = ("rsvg", "dior_rsvg", "vrsbench", "geochat")
    image_root = "images"
    seen = "others' loaders and converters"
    layout = """
        metainfo/rsvg_train.jsonl    image_id, dataset, question_id, question, bbox in pixels; and so of dior_rsvg,
                                     vrsbench and geochat
        metainfo/rsvg_test.jsonl …   read to leave out their images
        images/DATASET/IMAGE_ID      in GeoChat with another suffix than the rows say
    """

    @property
    def annotations(self) -> list[str]:
        return [f"metainfo/{part}_train.jsonl" for part in self.parts]

    def held_out_images(self) -> Iterator[str]:
        for part in self.parts:
            for path in sorted(self.folder.glob(f"metainfo/{part}_test.jsonl")):
                yield from (self.image(row) for _, row in self.table(path, held_out=True))

    def image(self, entry: dict) -> str:
        name = PurePath(entry["dataset"], entry["image_id"])
        names = [name, *(name.with_suffix(suffix) for suffix in (".jpg", ".png"))]
        return str(next((one for one in names if (self.folder / self.image_root / one).is_file()), name))

    def rows(self, entry: dict) -> Iterator[Row]:
        image = self.image(entry)
        box = tuple(float(corner) for corner in entry["bbox"])
        yield self.row(entry.get("question_id"), image, [self.locate(image, box, entry["question"])])
