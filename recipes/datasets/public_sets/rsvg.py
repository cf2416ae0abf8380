"""RSVG, the first data set of grounding in remote sensing, as refGeo has it."""

from modeling_vitp.recipes.datasets.public_sets.refgeo import Set as RefGeo


class Set(RefGeo):
    title = "RSVG (Sun et al. 2022), as it is in refGeo"
    paper_rows, released_rows = 5_500, 5_505
    parts = ("rsvg",)
    layout = """
        metainfo/rsvg_train.jsonl    image_id, dataset, question_id, question, bbox in pixels
        metainfo/rsvg_test.jsonl     read to leave out its images
        images/rsvg/…                folders by the rows' `dataset`
    """
