"""Quilt-Instruct: conversations about views of slides, made from what is said in videos that teach pathology."""

from modeling_vitp.recipes.datasets.public_set import PublicSet


class Set(PublicSet):
    title = "Quilt-Instruct (Seyfioglu et al. 2024, Quilt-LLaVA)"
    license = "CC BY-NC-ND 3.0, for research; the page asks for consent"
    obtain = "https://huggingface.co/datasets/wisdomik/QUILT-LLaVA-Instruct-107K"
    paper_rows, released_rows = 147_000, 147_131
    caution = "As in the released mixture, two smaller files go beside that of 107 thousand, which may have rows of it."
    modality, tasks = ("pathology",), ("vqa",)
    annotations = (
        "quilt_instruct_107k.json",
        "quilt_instruct_conv_desc.json",
        "quilt_instruct_complex_abductive.json",
    )
    image_root = "quilt_instruct"
    seen = "its page with the names of its files, and the instructions for training Quilt-LLaVA"
    layout = """
        quilt_instruct_107k.json                 LLaVA conversations, `image` a name in quilt_instruct
        quilt_instruct_conv_desc.json            the same, 20 thousand
        quilt_instruct_complex_abductive.json    the same, 20 thousand
        quilt_instruct/NAME.jpg                  from quilt_instruct.zip
    """
