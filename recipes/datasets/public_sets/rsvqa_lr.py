"""RSVQA, low resolution: the same over Sentinel-2 images. Not in the paper's table, but in the released mixture."""

from modeling_vitp.recipes.datasets.public_sets.rsvqa import Set as HighResolution


class Set(HighResolution):
    title = "RSVQA, low resolution (Lobry et al. 2020)"
    paper_rows, released_rows = None, 57_223
    drawn = False
    files_of_split, image_root = "LR_split_train", "Images_LR"
    seen = "others' loaders, of which one reports 57,223 questions"
    layout = """
        LR_split_train_questions.json    {"questions": [{"id", "img_id", "question", "answers_ids", "active"}]}
        LR_split_train_answers.json      {"answers": [{"id", "answer", "active"}]}
        Images_LR/IMG_ID.tif
    """
