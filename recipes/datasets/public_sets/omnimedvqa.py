"""OmniMedVQA: questions with choices about images of 42 data sets, those of its images that are given."""

from collections.abc import Iterator

from modeling_vitp.recipes.datasets.public_set import PublicSet, Row


class Set(PublicSet):
    title = "OmniMedVQA, open access (Hu et al. 2024)"
    license = "that of each data set it is made of, which its page lists"
    obtain = "https://huggingface.co/datasets/foreverbeliever/OmniMedVQA"
    paper_rows, released_rows = 89_000, 88_996
    caution = (
        "A benchmark: after training on it, it measures nothing. Images in folders `test` and `val` of its data sets "
        "are left out; the paper has them (--keep_shared)."
    )
    modality, tasks = ("ct", "mri", "x-ray", "ultrasound", "pathology"), ("vqa",)
    annotations = ("OmniMedVQA/QA_information/Open-access/*.json",)
    image_root = "OmniMedVQA"
    seen = "its page, and code that reads its files, with names of images"
    layout = """
        OmniMedVQA/QA_information/Open-access/ACRIMA.json
            question_id, question, gt_answer, image_path, option_A to option_D (not all) …
        OmniMedVQA/Images/ACRIMA/Im002_ACRIMA.png    as `image_path` has it
    """

    def rows(self, entry: dict) -> Iterator[Row]:
        choices = [entry.get(f"option_{letter}") for letter in "ABCD"]
        turn = self.choose(entry["question"], [choice for choice in choices if choice], entry["gt_answer"])
        yield self.row(entry["question_id"], entry["image_path"], [turn])
