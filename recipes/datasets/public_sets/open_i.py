"""Open-i: chest X-rays of Indiana University, each with the report of its examination."""

from collections.abc import Iterator

from modeling_vitp.recipes.datasets.public_set import Entry, PublicSet, Row, one_of

WAYS = (
    "Write the report of this {view}chest X-ray.",
    "What are the findings and the impression of this {view}chest X-ray?",
    "Describe this {view}chest X-ray as a radiologist would.",
)


class Set(PublicSet):
    title = "Open-i, chest X-rays of Indiana University (Demner-Fushman et al. 2016)"
    license = "CC BY-NC-ND 4.0"
    obtain = "https://www.kaggle.com/datasets/raddar/chest-xrays-indiana-university"
    paper_rows, released_rows = 7_000, 7_466
    caution = "It has no test split of its own: those that papers on reports use are among its rows."
    modality, tasks = ("x-ray",), ("caption",)
    image_root = "images/images_normalized"
    seen = "code that reads its files, with their columns and numbers of rows"
    layout = """
        indiana_reports.csv        uid, MeSH, Problems, image, indication, comparison, findings, impression
        indiana_projections.csv    uid, filename, projection (Frontal or Lateral)
        images/images_normalized/1_IM-0001-4001.dcm.png
    """

    def entries(self) -> Iterator[Entry]:
        reports = {}
        for place, report in self.table(self.files("indiana_reports.csv")[0]):
            if isinstance(report, ValueError):
                yield Entry(place, report)
            else:
                reports[report["uid"]] = report
        for place, image in self.table(self.files("indiana_projections.csv")[0]):
            yield Entry(place, image if isinstance(image, ValueError) else (image, reports))

    def rows(self, entry: tuple[dict, dict]) -> Iterator[Row]:
        image, reports = entry
        report = reports[image["uid"]]
        parts = {part.capitalize(): report[part].strip() for part in ("findings", "impression")}
        answer = "\n".join(f"{part}: {text}" for part, text in parts.items() if text)
        view = f"{image['projection'].strip().lower()} ".lstrip()
        question = one_of(WAYS, image["filename"]).format(view=view)
        yield self.row(image["filename"], image["filename"], [(question, answer)])
