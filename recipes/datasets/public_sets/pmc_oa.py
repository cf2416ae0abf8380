"""PMC-OA: parts of figures of PubMed Central's open articles, each with the part of the caption that is about it."""

from collections.abc import Iterator

from modeling_vitp.recipes.datasets.public_set import PublicSet, Row


class Set(PublicSet):
    title = "PMC-OA (Lin et al. 2023, PMC-CLIP)"
    license = "that of each article in PubMed Central's open access subset"
    obtain = "https://huggingface.co/datasets/axiong/pmc_oa"
    paper_rows, released_rows = 1_647_000, 1_646_527
    caution = "The file with all rows has no splits: without test.jsonl and valid.jsonl nothing is left out."
    modality, tasks = ("ct", "mri", "x-ray", "ultrasound", "pathology"), ("caption",)
    annotations = ("pmc_oa.jsonl",)
    image_root = "images/caption_T060_filtered_top4_sep_v0_subfigures"
    seen = "its page with a row, and code that reads its files"
    layout = """
        pmc_oa.jsonl                image, caption, and how well they are aligned
        test.jsonl, valid.jsonl     of its first version (with whole captions); if there, their images are left out
        images/caption_T060_filtered_top4_sep_v0_subfigures/PMC212319_Fig3_4.jpg
            from images.zip, `unzip images.zip -d images`
    """

    def held_out_images(self) -> Iterator[str]:
        for path in (self.folder / "test.jsonl", self.folder / "valid.jsonl"):
            if path.is_file():
                yield from (row["image"] for _, row in self.table(path, held_out=True))

    def rows(self, entry: dict) -> Iterator[Row]:
        yield self.row(entry["image"], entry["image"], [self.describe(entry["image"], entry["caption"])])
