"""Public medical data sets, read from their downloaded files."""

import base64
from collections.abc import Iterator

from modeling_vitp.recipes.datasets.public_set import Entry, PublicSet, Row, Stored, one_of, register_public_set

REPORT_QUESTIONS = (
    "Write the report of this {view}chest X-ray.",
    "What are the findings and the impression of this {view}chest X-ray?",
    "Describe this {view}chest X-ray as a radiologist would.",
)


@register_public_set("gmai_mmbench")
class GMAIMMBench(PublicSet):
    """GMAI-MMBench, validation split (the one with answers): multiple-choice questions on images of 38 modalities."""

    title = "GMAI-MMBench, validation split (Chen et al. 2024)"
    license = "Apache-2.0 on its page; the images have the licenses of 284 data sets"
    obtain = "https://huggingface.co/datasets/OpenGVLab/GMAI-MMBench"
    paper_rows = 5_000
    caution = "This is a benchmark. Do not evaluate on its validation split after training on it."
    splits = ("validation",)
    modality = ("ct", "mri", "x-ray", "ultrasound", "pathology")
    tasks = ("vqa",)
    annotations = ("GMAI_mm_bench_VAL.tsv",)
    layout_source = "its page, and code that reads the file"
    layout = """
        GMAI_mm_bench_VAL.tsv    index, image (base64), question, A to E, answer (a letter), category, modality …
    """

    def rows(self, entry: dict) -> Iterator[Row]:
        content = base64.b64decode(entry["image"], validate=True)
        suffix = "png" if content.startswith(b"\x89PNG") else "jpg"
        image = Stored(f"images/{entry['index']}.{suffix}", content)
        choices = {}
        for letter in "ABCDE":
            text = entry.get(letter) or ""
            if text.strip() and text != "None":
                choices[letter] = text
        right = choices[entry["answer"].strip()]
        turn = self.choose(entry["question"], choices.values(), right)
        yield self.row(entry["index"], image, [turn])


@register_public_set("open_i")
class OpenI(PublicSet):
    """Open-i: chest X-rays of Indiana University, each with a report."""

    title = "Open-i, chest X-rays of Indiana University (Demner-Fushman et al. 2016)"
    license = "CC BY-NC-ND 4.0"
    obtain = "https://www.kaggle.com/datasets/raddar/chest-xrays-indiana-university"
    paper_rows = 7_000
    caution = "It has no official test split. The rows include the test images of papers on report generation."
    modality = ("x-ray",)
    tasks = ("caption",)
    image_root = "images/images_normalized"
    layout_source = "public loaders, with columns and numbers of rows"
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
            if isinstance(image, ValueError):
                yield Entry(place, image)
            else:
                yield Entry(place, (image, reports))

    def rows(self, entry: tuple[dict, dict]) -> Iterator[Row]:
        image, reports = entry
        report = reports[image["uid"]]
        sections = []
        for column in ("findings", "impression"):
            text = report[column].strip()
            if text:
                sections.append(f"{column.capitalize()}: {text}")
        answer = "\n".join(sections)
        view = image["projection"].strip().lower()
        template = one_of(REPORT_QUESTIONS, image["filename"])
        question = template.format(view=f"{view} " if view else "")
        yield self.row(image["filename"], image["filename"], [(question, answer)])


@register_public_set("huatuo_oa")
class HuatuoOA(PublicSet):
    """PubMedVision, alignment part of HuatuoGPT-Vision: descriptions of figures in PubMed."""

    title = "PubMedVision, alignment (Chen et al. 2024, HuatuoGPT-Vision)"
    license = "Apache-2.0 on its page; the figures have the licenses of their articles"
    obtain = "https://huggingface.co/datasets/FreedomIntelligence/PubMedVision"
    paper_rows = 647_000
    modality = ("ct", "mri", "x-ray", "ultrasound", "pathology")
    tasks = ("caption",)
    annotations = ("PubMedVision_Alignment_VQA.json",)
    layout_source = "its page and public loaders"
    layout = """
        PubMedVision_Alignment_VQA.json    LLaVA conversations, `image` a list of 1 to 29 names like images/pmc_1_0.jpg
        images/pmc_1_0.jpg                 from images_0.zip to images_19.zip, `unzip -j images_0.zip -d images`
    """


@register_public_set("huatuo_vqa")
class HuatuoVQA(HuatuoOA):
    """PubMedVision, instruction tuning part of HuatuoGPT-Vision: questions about figures."""

    title = "PubMedVision, instruction tuning (Chen et al. 2024, HuatuoGPT-Vision)"
    tasks = ("vqa",)
    annotations = ("PubMedVision_InstructionTuning_VQA.json",)
    layout = """
        PubMedVision_InstructionTuning_VQA.json    LLaVA conversations, `image` a list of names like images/pmc_1_0.jpg
        images/pmc_1_0.jpg                         from images_0.zip to images_19.zip, `unzip -j images_0.zip -d images`
    """


@register_public_set("pmc_oa")
class PMCOA(PublicSet):
    """PMC-OA: subfigures of open-access articles in PubMed Central, each with its part of the caption."""

    title = "PMC-OA (Lin et al. 2023, PMC-CLIP)"
    license = "the license of each article in PubMed Central's open access subset"
    obtain = "https://huggingface.co/datasets/axiong/pmc_oa"
    paper_rows = 1_647_000
    caution = "The file with all rows has no splits. Without test.jsonl and valid.jsonl, no image is held out."
    modality = ("ct", "mri", "x-ray", "ultrasound", "pathology")
    tasks = ("caption",)
    annotations = ("pmc_oa.jsonl",)
    image_root = "images/caption_T060_filtered_top4_sep_v0_subfigures"
    layout_source = "its page with an example row, and public loaders"
    layout = """
        pmc_oa.jsonl                image, caption, and how well they are aligned
        test.jsonl, valid.jsonl     of its first version (with whole captions); if there, their images are left out
        images/caption_T060_filtered_top4_sep_v0_subfigures/PMC212319_Fig3_4.jpg
            from images.zip, `unzip images.zip -d images`
    """

    def held_out_images(self) -> Iterator[str]:
        for path in (self.folder / "test.jsonl", self.folder / "valid.jsonl"):
            if path.is_file():
                for _, row in self.table(path, held_out=True):
                    yield row["image"]

    def rows(self, entry: dict) -> Iterator[Row]:
        image = entry["image"]
        turn = self.describe(image, entry["caption"])
        yield self.row(image, image, [turn])


@register_public_set("pmc_vqa")
class PMCVQA(PublicSet):
    """PMC-VQA, training split of the first version: questions with four choices about figures of PubMed Central."""

    title = "PMC-VQA, first version (Zhang et al. 2023)"
    license = "the license of each article in PubMed Central's open access subset"
    obtain = "https://huggingface.co/datasets/xmcmic/PMC-VQA"
    paper_rows = 227_000
    caution = "The paper's 227 thousand rows roughly equal the training and test rows. Test rows are not used here."
    modality = ("ct", "mri", "x-ray", "ultrasound", "pathology")
    tasks = ("vqa",)
    annotations = ("train.csv",)
    image_root = "images"
    layout_source = "its page with an example row, and public loaders"
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
        choices = {}
        for letter in "ABCD":
            lettered_choice = entry[f"Choice {letter}"].strip()
            choices[letter] = lettered_choice.removeprefix(f"{letter}:").strip()
        image = entry["Figure_path"].strip()
        right_choice = choices[entry["Answer_label"].strip()]
        turn = self.choose(entry["Question"], list(choices.values()), right_choice)
        yield self.row(image, image, [turn])


@register_public_set("omnimedvqa")
class OmniMedVQA(PublicSet):
    """OmniMedVQA, open-access images: multiple-choice questions about images of 42 data sets."""

    title = "OmniMedVQA, open access (Hu et al. 2024)"
    license = "the license of each data set that it contains, listed on its page"
    obtain = "https://huggingface.co/datasets/foreverbeliever/OmniMedVQA"
    paper_rows = 89_000
    caution = (
        "This is a benchmark. Do not evaluate on it after training on it. Images in folders `test` and `val` of its "
        "data sets are held out; the paper includes them (--keep_shared)."
    )
    modality = ("ct", "mri", "x-ray", "ultrasound", "pathology")
    tasks = ("vqa",)
    annotations = ("OmniMedVQA/QA_information/Open-access/*.json",)
    image_root = "OmniMedVQA"
    layout_source = "its page and public loaders, with image names"
    layout = """
        OmniMedVQA/QA_information/Open-access/ACRIMA.json
            question_id, question, gt_answer, image_path, option_A to option_D (not all) …
        OmniMedVQA/Images/ACRIMA/Im002_ACRIMA.png    as `image_path` has it
    """

    def rows(self, entry: dict) -> Iterator[Row]:
        options = [entry.get(f"option_{letter}") for letter in "ABCD"]
        choices = list(filter(None, options))
        turn = self.choose(entry["question"], choices, entry["gt_answer"])
        yield self.row(entry["question_id"], entry["image_path"], [turn])


@register_public_set("quilt_1m")
class Quilt1M(PublicSet):
    """Quilt-1M, pretraining part of Quilt-LLaVA: slide views from pathology videos, with transcribed speech."""

    title = "Quilt-1M, pretraining part of Quilt-LLaVA (Ikezogwo et al. 2023, Seyfioglu et al. 2024)"
    license = "CC BY-NC-ND 3.0, for research; the page asks for consent"
    obtain = "https://huggingface.co/datasets/wisdomik/Quilt-LLaVA-Pretrain"
    paper_rows = 723_000
    modality = ("pathology",)
    tasks = ("caption",)
    annotations = ("quilt_pretrain.json",)
    image_root = "quilt_1m"
    layout_source = "its page and the training instructions of Quilt-LLaVA"
    layout = """
        quilt_pretrain.json    LLaVA conversations, `image` a name in quilt_1m
        quilt_1m/NAME.jpg      from images_part_1.zip to images_part_10.zip of https://zenodo.org/record/8239942
    """


@register_public_set("quilt_instruct")
class QuiltInstruct(PublicSet):
    """Quilt-Instruct: conversations about slide views, generated from the speech in pathology teaching videos."""

    title = "Quilt-Instruct (Seyfioglu et al. 2024, Quilt-LLaVA)"
    license = "CC BY-NC-ND 3.0, for research; the page asks for consent"
    obtain = "https://huggingface.co/datasets/wisdomik/QUILT-LLaVA-Instruct-107K"
    paper_rows = 147_000
    caution = "As in the released mixture, two smaller files are added to the file of 107 thousand. Rows may repeat."
    modality = ("pathology",)
    tasks = ("vqa",)
    annotations = (
        "quilt_instruct_107k.json",
        "quilt_instruct_conv_desc.json",
        "quilt_instruct_complex_abductive.json",
    )
    image_root = "quilt_instruct"
    layout_source = "its page with the file names, and the training instructions of Quilt-LLaVA"
    layout = """
        quilt_instruct_107k.json                 LLaVA conversations, `image` a name in quilt_instruct
        quilt_instruct_conv_desc.json            the same, 20 thousand
        quilt_instruct_complex_abductive.json    the same, 20 thousand
        quilt_instruct/NAME.jpg                  from quilt_instruct.zip
    """
