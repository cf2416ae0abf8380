"""PMC-VQA: questions with four choices about figures of PubMed Central; the training part of its first version."""

from collections.abc import Iterator

from modeling_vitp.recipes.datasets.public_set import PublicSet, Row

LETTERS = "ABCD"


class Set(PublicSet):
    title = "PMC-VQA, first version (Zhang et al. 2023)"
    license = "that of each article in PubMed Central's open access subset"
    obtain = "https://huggingface.co/datasets/xmcmic/PMC-VQA"
    paper_rows, released_rows = 227_000, 226_924
    caution = "The paper's 227 thousand are about its training and its test rows together; test rows are left out here."
    modality, tasks = ("ct", "mri", "x-ray", "ultrasound", "pathology"), ("vqa",)
    annotations = ("train.csv",)
    image_root = "images"
    seen = "its page with a row, and code that reads its files"
    layout = """
        train.csv                  Figure_path, Question, Answer, Choice A to Choice D (" A:…"), Answer_label
        test.csv                   read to leave out its images
        images/PMC1064097_F1.jpg   from images.zip
    """

    def held_out_images(self) -> Iterator[str]:
        path = self.folder / "test.csv"
        if not path.is_file():
            raise self.missing(path.name)
        return (row["Figure_path"].strip() for _, row in self.table(path, held_out=True))

    def rows(self, entry: dict) -> Iterator[Row]:
        choices = [entry[f"Choice {letter}"].strip().removeprefix(f"{letter}:").strip() for letter in LETTERS]
        image, right = entry["Figure_path"].strip(), choices[LETTERS.index(entry["Answer_label"].strip())]
        yield self.row(image, image, [self.choose(entry["Question"], choices, right)])
