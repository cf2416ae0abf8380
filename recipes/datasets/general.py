"""Public general-domain data sets, used against forgetting, read from their downloaded files."""

from collections.abc import Iterator

from modeling_vitp.recipes.datasets.public_set import Entry, PublicSet, Row, register_public_set

ROOTS = {  # image folders below `data` by annotation file; other files use `data`
    "ai2d_train_12k": "ai2d",
    "chartqa_train_18k": "chartqa",
    "docvqa_train_10k": "docvqa",
    "dvqa_train_200k": "dvqa",
    "geoqa+": "geoqa+",
    "llava_instruct_150k_zh": "coco",
    "synthdog_en": "synthdog-en",
}


@register_public_set("mini_internvl_general")
class MiniInternVLGeneral(PublicSet):
    """General data of Mini-InternVL, on which InternVL 1.2 was tuned: captions, questions, charts and documents."""

    title = "General data of Mini-InternVL (Gao et al. 2024)"
    license = "Apache-2.0 on its page; the images have the licenses of their data sets"
    obtain = "https://huggingface.co/datasets/OpenGVLab/InternVL-Chat-V1-2-SFT-Data"
    paper_rows = 1_394_000
    caution = (
        "The released mixtures do not include the Chinese file and the rows on Visual Genome. Some rows have no image."
    )
    general = True
    tasks = ("caption", "vqa", "ocr")
    annotations = ("opensource/*.jsonl",)
    image_root = "data"
    layout_source = "its page with the file names, a meta file that lists them, and InternVL's training instructions"
    layout = """
        opensource/ai2d_train_12k.jsonl    InternVL conversations, and the same:
            chartqa_train_18k, docvqa_train_10k, dvqa_train_200k, geoqa+, llava_instruct_150k_zh,
            sharegpt4v_instruct_gpt4-vision_cap100k, sharegpt4v_mix665k_…, synthdog_en
        data/ai2d/abc_images, data/ai2d/images, data/chartqa/train, data/coco/train2017, data/docvqa/train,
            data/dvqa/images, data/geoqa+/images, data/gqa/images, data/llava/llava_pretrain/images,
            data/ocr_vqa/images, data/sam/images, data/share_textvqa/images, data/synthdog-en/images,
            data/textvqa/train_images, data/vg/VG_100K, data/vg/VG_100K_2, data/web-celebrity/images,
            data/web-landmark/images, data/wikiart/images
    """

    def entries(self) -> Iterator[Entry]:
        for path in self.files(self.annotations[0]):
            for place, row in self.table(path):
                if isinstance(row, ValueError):
                    yield Entry(place, row)
                else:
                    yield Entry(place, (path.stem, row))

    def rows(self, entry: tuple[str, dict]) -> Iterator[Row]:
        file, row = entry
        images = row.get("image") or []
        if not isinstance(images, list):
            images = [images]
        folder = ROOTS.get(file, ".")
        paths = [f"{folder}/{image}" for image in images]
        yield from super().rows({**row, "image": paths})
