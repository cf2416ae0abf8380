"""FIT-RS: its questions and answers, of which as many are drawn as the paper has."""

from modeling_vitp.recipes.datasets.public_set import PublicSet


class Set(PublicSet):
    title = "FIT-RS (Luo et al. 2024), its task VQA"
    license = "CC BY-NC 4.0"
    obtain = "https://huggingface.co/datasets/ll-13/FIT-RS"
    paper_rows, released_rows = 100_000, 99_999
    drawn = True
    modality, tasks = ("optical",), ("vqa",)
    annotations = ("FIT-RS_Instruction/**/train_instruction_vqa_400k.json",)
    image_root = "FIT-RS_Image/imgv2_split_512_100_vaild"
    seen = "the list of its files, and others' loaders"
    layout = """
        FIT-RS_Instruction/train_data_of_each_individual_task/train_instruction_vqa_400k.json    LLaVA conversations
        FIT-RS_Image/imgv2_split_512_100_vaild/0000__512__0___0.png
    """
