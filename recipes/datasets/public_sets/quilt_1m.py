"""Quilt-1M: views of slides out of videos that teach pathology, with what is said; the part of Quilt-LLaVA."""

from modeling_vitp.recipes.datasets.public_set import PublicSet


class Set(PublicSet):
    title = "Quilt-1M, the part that Quilt-LLaVA was pretrained on (Ikezogwo et al. 2023, Seyfioglu et al. 2024)"
    license = "CC BY-NC-ND 3.0, for research; the page asks for consent"
    obtain = "https://huggingface.co/datasets/wisdomik/Quilt-LLaVA-Pretrain"
    paper_rows, released_rows = 723_000, 723_328
    modality, tasks = ("pathology",), ("caption",)
    annotations = ("quilt_pretrain.json",)
    image_root = "quilt_1m"
    seen = "its page, and the instructions for training Quilt-LLaVA"
    layout = """
        quilt_pretrain.json    LLaVA conversations, `image` a name in quilt_1m
        quilt_1m/NAME.jpg      from images_part_1.zip to images_part_10.zip of https://zenodo.org/record/8239942
    """
