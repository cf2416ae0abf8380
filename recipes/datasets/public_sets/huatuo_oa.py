"""PubMedVision's alignment part, on which HuatuoGPT-Vision was aligned: descriptions of figures of PubMed."""

from modeling_vitp.recipes.datasets.public_set import PublicSet


class Set(PublicSet):
    title = "PubMedVision, alignment (Chen et al. 2024, HuatuoGPT-Vision)"
    license = "Apache-2.0 on its page; the figures have those of their articles"
    obtain = "https://huggingface.co/datasets/FreedomIntelligence/PubMedVision"
    paper_rows, released_rows = 647_000, 646_759
    modality, tasks = ("ct", "mri", "x-ray", "ultrasound", "pathology"), ("caption",)
    annotations = ("PubMedVision_Alignment_VQA.json",)
    seen = "its page, and code that reads its files"
    layout = """
        PubMedVision_Alignment_VQA.json    LLaVA conversations, `image` a list of 1 to 29 names like images/pmc_1_0.jpg
        images/pmc_1_0.jpg                 from images_0.zip to images_19.zip, `unzip -j images_0.zip -d images`
    """
