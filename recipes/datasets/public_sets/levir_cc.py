"""LEVIR-CC: what has changed between two images, in five sentences a pair; one row for each."""

from collections.abc import Iterator

from modeling_vitp.recipes.datasets.public_set import Entry, HeldOut, PublicSet, Row, one_of

WAYS = (
    "<image>\n<image>\nWhat has changed from the first image to the second?",
    "Before: <image>\nAfter: <image>\nDescribe the change.",
    "The second image was taken later than the first.\n<image>\n<image>\nWhat is different in it?",
)


class Set(PublicSet):
    title = "LEVIR-CC (Liu et al. 2022)"
    license = "not stated"
    obtain = "https://huggingface.co/datasets/lcybuaa/LEVIR-CC"
    paper_rows, released_rows = 50_000, 50_385  # of all splits
    modality, tasks = ("optical",), ("change caption",)
    image_root = "images"
    seen = "its repository's page, and others' loaders; 6,815 of 10,077 pairs are of training"
    layout = """
        LevirCCcaptions.json    {"images": [{"filename", "filepath": split, "sentences": [{"raw"}]}]}
        images/train/A/train_000001.png    before
        images/train/B/train_000001.png    after
    """

    def entries(self) -> Iterator[Entry]:
        name = "LevirCCcaptions.json"
        for number, pair in enumerate(self.json(name)["images"]):
            yield Entry(f"{self.folder / name}, pair {number}", pair)

    def rows(self, entry: dict) -> Iterator[Row]:
        split, name = entry["filepath"], entry["filename"]
        if split not in self.splits:
            raise HeldOut(name)
        images = [f"{split}/{folder}/{name}" for folder in "AB"]
        said = dict.fromkeys(" ".join(sentence["raw"].split()) for sentence in entry["sentences"])
        for number, sentence in enumerate(said):
            row_id = f"{name}-{number}"
            yield self.row(row_id, images, [(one_of(WAYS, row_id), sentence)])
