"""Public remote sensing data sets, read from their downloaded files."""

import json
import math
import re
from collections.abc import Iterator
from pathlib import PurePath

from modeling_vitp.data.annotation_files import parse_xml
from modeling_vitp.data.boxes import Box, clip
from modeling_vitp.data.layouts.voc import voc_objects
from modeling_vitp.instructions.boxes import write_boxes
from modeling_vitp.recipes.datasets.public_set import (
    Entry,
    HeldOut,
    PublicSet,
    Row,
    Stored,
    one_of,
    register_public_set,
)

TERRAINS = {"agri": "agriculture", "barrenland": "barren land"}
VHM_TASK = re.compile(r"\{(VQA|CLS|IT|IDK)\}\s*")
CHANGE_QUESTIONS = (
    "<image>\n<image>\nWhat has changed from the first image to the second?",
    "Before: <image>\nAfter: <image>\nDescribe the change.",
    "The second image was taken later than the first.\n<image>\n<image>\nWhat is different in it?",
)
PERCENT_TASK = re.compile(r"<image>|\[(?:refer|identify|grounding|caption|vqa)\]", re.IGNORECASE)
PERCENT_BOX = re.compile(r"\{<(\d+)><(\d+)><(\d+)><(\d+)>(?:\|<(-?\d+)>)?\}")
LIKE_BOX = r"\{<[^{}]*>\}"
PHRASE = r"<p>\s*(?P<{}>(?:(?!</p>).)*?)\s*</p>"
PERCENT_MARKED = re.compile(
    rf"(?:{PHRASE.format('phrase')}\s*)?(?P<boxes>{LIKE_BOX}(?:\s*{LIKE_BOX})*)|{PHRASE.format('alone')}"
)


def from_percent(text: str, size: tuple[int, int]) -> str:
    """Convert a text to one line without its task tag, with phrases and boxes in InternVL's format.

    MiniGPT-v2, GeoChat and VRSBench write boxes in percent of the image, `{<x1><y1><x2><y2>}`, upright or rotated. A
    rotated box is given by its sides before the rotation about its center, and an angle in degrees. It is replaced by
    its bounding box.

    Args:
        size: height and width of the image, in pixels.

    Raises:
        ValueError: if a box is malformed.
    """

    def rewrite(match: re.Match) -> str:
        if match["alone"] is not None:
            return f"<ref>{match['alone']}</ref>"
        boxes = [upright_box(written_box, size) for written_box in re.findall(LIKE_BOX, match["boxes"])]
        return write_boxes(boxes, size, match["phrase"] or "")

    text_without_task = PERCENT_TASK.sub("", text)
    line = " ".join(text_without_task.split())
    return PERCENT_MARKED.sub(rewrite, line)


def upright_box(written_box: str, size: tuple[int, int]) -> Box:
    """Return the upright bounding box of a written box, in pixels, cut to the image."""
    match = PERCENT_BOX.fullmatch(written_box)
    x0, y0, x1, y1 = map(int, match.groups()[:4]) if match else (0, 0, 0, 0)
    if not (x0 < x1 <= 100 and y0 < y1 <= 100):
        raise ValueError(f"{written_box} is not a box in percent of an image")
    height, width = size
    x = (x0 + x1) * width / 200
    y = (y0 + y1) * height / 200
    half_side_x = (x1 - x0) * width / 200
    half_side_y = (y1 - y0) * height / 200

    # The sides are rotated about the center, and the extent of the rotated box is the sum of their projections.
    angle = math.radians(int(match[5] or 0))
    sine = abs(math.sin(angle))
    cosine = abs(math.cos(angle))
    half_width = half_side_x * cosine + half_side_y * sine
    half_height = half_side_x * sine + half_side_y * cosine
    bounding_box = (x - half_width, y - half_height, x + half_width, y + half_height)
    return clip(bounding_box, (0, 0, width, height))


class SceneFolders(PublicSet):
    """Scene classification set with a folder for each class."""

    pattern: str  # pattern of the image files

    def entries(self) -> Iterator[Entry]:
        return self.pictures(self.pattern)

    def rows(self, entry: str) -> Iterator[Row]:
        label = self.label(PurePath(entry))
        yield self.row(entry, entry, [self.classify(entry, label)])

    def label(self, path: PurePath) -> str:
        """Return the class of an image, by default its innermost folder."""
        return path.parent.name


class PercentBoxes(PublicSet):
    """Set of LLaVA conversations with boxes in percent. Only conversations with a box are used."""

    def rows(self, entry: dict) -> Iterator[Row]:
        turns = entry["conversations"]
        if self.locates(turns):
            size = self.size(entry["image"])
            converted_turns = []
            for turn in turns:
                text = from_percent(turn["value"], size)
                converted_turns.append({**turn, "value": text})
            yield from super().rows({**entry, "conversations": converted_turns})

    def locates(self, turns: list[dict]) -> bool:
        return any("{<" in turn["value"] for turn in turns)


@register_public_set("rsvqa")
class RSVQA(PublicSet):
    """RSVQA, high resolution: questions about aerial images, with answers from OpenStreetMap."""

    title = "RSVQA, high resolution (Lobry et al. 2020)"
    license = "CC BY 4.0; the answers come from OpenStreetMap, ODbL"
    obtain = "https://rsvqa.sylvainlobry.com"
    paper_rows = 100_000
    is_subsampled = True
    modality = ("optical",)
    tasks = ("vqa",)
    files_of_split = "USGS_split_train"
    image_root = "Data"
    layout_source = "others' loaders"
    layout = """
        USGS_split_train_questions.json    {"questions": [{"id", "img_id", "question", "answers_ids", "active"}]}
        USGS_split_train_answers.json      {"answers": [{"id", "answer", "active"}]}
        Data/IMG_ID.tif
    """

    def entries(self) -> Iterator[Entry]:
        """Yield the active questions. The files also list inactive questions of other splits, without texts."""
        answer_list = self.json(f"{self.files_of_split}_answers.json")["answers"]
        answers = {answer["id"]: answer for answer in answer_list}
        name = f"{self.files_of_split}_questions.json"
        for question in self.json(name)["questions"]:
            if question.get("active"):
                place = f"{self.folder / name}, question {question.get('id')}"
                yield Entry(place, (question, answers))

    def rows(self, entry: tuple) -> Iterator[Row]:
        question, answers = entry
        answer_id = question["answers_ids"][0]
        answer = str(answers[answer_id]["answer"])
        text = f"{question['question'].strip()} Answer with a word or a number."
        yield self.row(question["id"], f"{question['img_id']}.tif", [(text, answer)])


@register_public_set("rsvqa_lr")
class RSVQALowResolution(RSVQA):
    """RSVQA, low resolution: questions about Sentinel-2 images, only in the released mixture."""

    title = "RSVQA, low resolution (Lobry et al. 2020)"
    paper_rows = None
    is_subsampled = False
    files_of_split = "LR_split_train"
    image_root = "Images_LR"
    layout_source = "others' loaders, of which one reports 57,223 questions"
    layout = """
        LR_split_train_questions.json    {"questions": [{"id", "img_id", "question", "answers_ids", "active"}]}
        LR_split_train_answers.json      {"answers": [{"id", "answer", "active"}]}
        Images_LR/IMG_ID.tif
    """


@register_public_set("fit_rs")
class FitRS(PublicSet):
    """FIT-RS, task VQA: questions and answers, of which the paper's number is drawn."""

    title = "FIT-RS (Luo et al. 2024), its task VQA"
    license = "CC BY-NC 4.0"
    obtain = "https://huggingface.co/datasets/ll-13/FIT-RS"
    paper_rows = 100_000
    is_subsampled = True
    modality = ("optical",)
    tasks = ("vqa",)
    annotations = ("FIT-RS_Instruction/**/train_instruction_vqa_400k.json",)
    image_root = "FIT-RS_Image/imgv2_split_512_100_vaild"
    layout_source = "the list of its files, and others' loaders"
    layout = """
        FIT-RS_Instruction/train_data_of_each_individual_task/train_instruction_vqa_400k.json    LLaVA conversations
        FIT-RS_Image/imgv2_split_512_100_vaild/0000__512__0___0.png
    """


@register_public_set("geochat")
class GeoChat(PercentBoxes):
    """GeoChat-Instruct: conversations with boxes."""

    title = "GeoChat-Instruct (Kuckreja et al. 2024), its conversations with boxes"
    license = "Apache-2.0"
    obtain = "https://huggingface.co/datasets/MBZUAI/GeoChat_Instruct"
    paper_rows = 64_000
    modality = ("optical",)
    tasks = ("grounding",)
    annotations = ("GeoChat_Instruct.json",)
    image_root = "share/softwares/kartik/GeoChat_finetuning/final_images_llava"
    layout_source = "others' converters and their test data; the card"
    layout = """
        GeoChat_Instruct.json    LLaVA conversations; boxes {<x1><y1><x2><y2>|<angle>} in percent, of which those
                                 without boxes are left out, and turned boxes become the upright ones around them
        share/softwares/kartik/GeoChat_finetuning/final_images_llava/…    as images_part* unpack
    """


@register_public_set("vrsbench")
class VRSBench(PercentBoxes):
    """VRSBench, training split: objects with referring expressions."""

    title = "VRSBench (Li et al. 2024), its referring expressions"
    license = "CC BY 4.0; the images are DOTA's and DIOR's, for research"
    obtain = "https://huggingface.co/datasets/xiang709/VRSBench"
    paper_rows = 38_000
    modality = ("optical",)
    tasks = ("grounding",)
    annotations = ("VRSBench_train.json",)
    image_root = "Images_train"
    layout_source = (
        "the list of its files, and others' notes and loaders: 142,390 conversations, 36,313 of them [refer]"
    )
    layout = """
        VRSBench_train.json    LLaVA conversations, of which those with [refer] are read: boxes {<x1><y1><x2><y2>}
                               in percent
        Images_train/P0003_0002.png
    """

    def locates(self, turns: list[dict]) -> bool:
        return "[refer]" in turns[0]["value"]


@register_public_set("refgeo")
class RefGeo(PublicSet):
    """refGeo: the four grounding sources of the paper's remote sensing mixture, with the rows of the release."""

    title = "refGeo (Zhou et al. 2024), its parts of RSVG, DIOR-RSVG, VRSBench and GeoChat"
    license = "not stated"
    obtain = "https://huggingface.co/datasets/erenzhou/refGeo"
    modality = ("optical",)
    tasks = ("grounding",)
    sources = ("rsvg", "dior_rsvg", "vrsbench", "geochat")
    image_root = "images"
    layout_source = "others' loaders and converters"
    layout = """
        metainfo/rsvg_train.jsonl    image_id, dataset, question_id, question, bbox in pixels; and so of dior_rsvg,
                                     vrsbench and geochat
        metainfo/rsvg_test.jsonl …   read to leave out their images
        images/DATASET/IMAGE_ID      in GeoChat with another suffix than the rows say
    """

    @property
    def annotations(self) -> list[str]:
        return [f"metainfo/{source}_train.jsonl" for source in self.sources]

    def held_out_images(self) -> Iterator[str]:
        for source in self.sources:
            for path in sorted(self.folder.glob(f"metainfo/{source}_test.jsonl")):
                for _, row in self.table(path, held_out=True):
                    yield self.image(row)

    def image(self, entry: dict) -> str:
        """Return the file name of an entry's image, with the suffix that the file has."""
        name = PurePath(entry["dataset"], entry["image_id"])
        for candidate in (name, name.with_suffix(".jpg"), name.with_suffix(".png")):
            if (self.folder / self.image_root / candidate).is_file():
                return str(candidate)
        return str(name)

    def rows(self, entry: dict) -> Iterator[Row]:
        image = self.image(entry)
        box = tuple(map(float, entry["bbox"]))
        turn = self.locate(image, box, entry["question"])
        yield self.row(entry.get("question_id"), image, [turn])


@register_public_set("rsvg")
class RSVG(RefGeo):
    """RSVG, the first grounding data set of remote sensing, in the version of refGeo."""

    title = "RSVG (Sun et al. 2022), as it is in refGeo"
    paper_rows = 5_500
    sources = ("rsvg",)
    layout = """
        metainfo/rsvg_train.jsonl    image_id, dataset, question_id, question, bbox in pixels
        metainfo/rsvg_test.jsonl     read to leave out its images
        images/rsvg/…                folders by the rows' `dataset`
    """


@register_public_set("dior_rsvg")
class DiorRSVG(PublicSet):
    """DIOR-RSVG: objects in DIOR's images, each with a unique referring expression."""

    title = "DIOR-RSVG (Zhan et al. 2023)"
    license = "not stated; the images are DIOR's, for research"
    obtain = "https://github.com/ZhanYang-nwpu/RSVG-pytorch"
    paper_rows = 27_000
    modality = ("optical",)
    tasks = ("grounding",)
    image_root = "JPEGImages"
    layout_source = (
        "one XML and the lists of its repository, and its loader; 26,991 objects in train.txt, others report"
    )
    layout = """
        Annotations/00001.xml    Pascal VOC, with a `description` in each `object`
        JPEGImages/00001.jpg
        train.txt                numbers of objects, counted from 0 over all XML in the order of their names
        test.txt                 read to leave out the images of its objects
    """

    def objects(self) -> Iterator[tuple[str, Entry]]:
        """Yield all objects with their numbers. A broken XML file raises, because all later numbers depend on it."""
        number = 0
        for path in self.files("Annotations/*.xml"):
            root = parse_xml(path)
            image = root.findtext("filename", "").strip()
            for node, voc_object in zip(root.iterfind("object"), voc_objects(root, path)):
                expression = node.findtext("description")
                entry = Entry(voc_object.where, (number, image, voc_object.box, expression))
                yield str(number), entry
                number += 1

    def held_out_images(self) -> set[str]:
        numbers = set(self.lines("test.txt", held_out=True))
        if not all(map(str.isdecimal, numbers)):
            raise ValueError(f"expected one object number a line in {self.folder / 'test.txt'}")
        images = set()
        for number, entry in self.objects():
            if number in numbers:
                _, image, _, _ = entry.content
                images.add(image)
        return images

    def entries(self) -> Iterator[Entry]:
        numbers = set(self.lines("train.txt"))
        for number, entry in self.objects():
            if number in numbers:
                yield entry

    def rows(self, entry: tuple) -> Iterator[Row]:
        number, image, box, expression = entry
        turn = self.locate(image, box, expression)
        yield self.row(number, image, [turn])


@register_public_set("isprs_sar")
class IsprsSAR(SceneFolders):
    """SAR scenes of ocean phenomena, with a folder for each class."""

    title = "ISPRS SAR classification"
    caution = (
        "No download page and no description of its files was found, so that folders by class are assumed. The set is "
        "0.15% of the paper's mixture. The released annotations have its 1,500 rows: see recipes/datasets/README.md."
    )
    license = "not stated"
    obtain = "https://github.com/zcablii/ViTP"
    paper_rows = 1_500
    modality = ("sar",)
    tasks = ("classification",)
    pattern = "*/**/*"
    layout_source = "nothing: folders by class are assumed, since no public description was found"
    layout = """
        internal_wave/0001.png    the class is the innermost folder
    """


@register_public_set("sar_sentinel_1_2")
class Sentinel12(SceneFolders):
    """Sentinel-1 scenes of four terrains. The Sentinel-2 images of the same places are not used."""

    title = "Sentinel-1&2 image pairs, segregated by terrain"
    license = "CC BY 4.0, as SEN1-2, of which it is a part"
    obtain = "https://www.kaggle.com/datasets/requiemonk/sentinel12-image-pairs-segregated-by-terrain"
    paper_rows = 16_000
    modality = ("sar",)
    tasks = ("classification",)
    pattern = "v_2/*/s1/*.png"
    layout_source = "others' loaders, which report 4,000 pairs of each class"
    layout = """
        v_2/agri/s1/ROIs1868_summer_s1_59_p100.png    and so of barrenland, grassland and urban
    """

    def label(self, path: PurePath) -> str:
        return TERRAINS.get(path.parts[1], path.parts[1])


@register_public_set("vhm")
class VHM(PublicSet):
    """VHM: instructions for remote sensing, without grounding."""

    title = "VHM (Pang et al. 2025), its data for supervised fine-tuning"
    license = "not stated"
    obtain = "https://huggingface.co/datasets/FitzPC/VHM_dataset_sft"
    paper_rows = 223_000
    modality = ("optical",)
    tasks = ("caption", "vqa", "classification")
    annotations = ("list_sft.json",)
    layout_source = "the list of its files, its page, and others' converters"
    layout = """
        list_sft.json           LLaVA conversations, of which those with {VG} are left out: they are DIOR-RSVG's
        fmow/…, crowdAI/…, …    one folder for each data set that it is made of, its archive unpacked in it
    """

    def rows(self, entry: dict) -> Iterator[Row]:
        if "{VG}" not in entry["conversations"][0]["value"]:
            yield from super().rows(entry)

    def text(self, text: str) -> str:
        return VHM_TASK.sub("", text)


@register_public_set("levir_cc")
class LevirCC(PublicSet):
    """LEVIR-CC: changes between two images, with five sentences a pair and a row for each sentence."""

    title = "LEVIR-CC (Liu et al. 2022)"
    license = "not stated"
    obtain = "https://huggingface.co/datasets/lcybuaa/LEVIR-CC"
    paper_rows = 50_000  # over all splits
    modality = ("optical",)
    tasks = ("change caption",)
    image_root = "images"
    layout_source = "its repository's page, and others' loaders; 6,815 of 10,077 pairs are of training"
    layout = """
        LevirCCcaptions.json    {"images": [{"filename", "filepath": split, "sentences": [{"raw"}]}]}
        images/train/A/train_000001.png    before
        images/train/B/train_000001.png    after
    """

    def entries(self) -> Iterator[Entry]:
        name = "LevirCCcaptions.json"
        for number, pair in enumerate(self.json(name)["images"]):
            yield Entry(f"{self.folder / name}, pair {number}", pair)

    def rows(self, entry: dict) -> Iterator[Row]:
        split = entry["filepath"]
        name = entry["filename"]
        if split not in self.splits:
            raise HeldOut(name)
        images = [f"{split}/A/{name}", f"{split}/B/{name}"]
        sentences = [" ".join(sentence["raw"].split()) for sentence in entry["sentences"]]
        for number, sentence in enumerate(dict.fromkeys(sentences)):
            row_id = f"{name}-{number}"
            question = one_of(CHANGE_QUESTIONS, row_id)
            yield self.row(row_id, images, [(question, sentence)])


@register_public_set("gaia")
class GAIA(PublicSet):
    """GAIA: images from the web pages of space agencies. One of several captions of each image is drawn."""

    title = "GAIA (Zavras et al. 2025)"
    license = "MIT; the images have their own"
    obtain = "https://huggingface.co/datasets/azavras/GAIA"
    paper_rows = 33_000
    splits = ("train", "validation")
    modality = ("optical",)
    tasks = ("caption",)
    layout_source = "its repository's page, which gives the command for img2dataset"
    layout = """
        train/00000.tar    as img2dataset writes from train_data.json: KEY.png and KEY.json with `id` and `captions`
        val/00000.tar
    """

    def entries(self) -> Iterator[Entry]:
        return self.samples("*/*.tar")

    def rows(self, entry: dict) -> Iterator[Row]:
        fields = json.loads(entry["json"])
        captions = fields["captions"]
        if isinstance(captions, str):
            captions = json.loads(captions)
        row_id = str(fields["id"])
        name = f"{entry['key']}.png"
        turn = self.describe(name, one_of(captions, row_id))
        yield self.row(row_id, Stored(name, entry["png"]), [turn])


@register_public_set("million_aid")
class MillionAID(SceneFolders):
    """Million-AID: scenes with a folder for each class. The test set has no labels and is not used."""

    title = "Million-AID (Long et al. 2021), its labeled scenes"
    license = "CC BY-NC-ND 4.0"
    obtain = "https://captain-whu.github.io/DiRS/"
    paper_rows = 920_000
    caution = (
        "Only the 10,000 scenes with a published label are used. At the paper's rate of 0.05 they are 0.05% of its "
        "mixture; with 920,000 rows the set is 4.6%. The released annotations also have rows about the unlabeled "
        "images: see recipes/datasets/README.md."
    )
    modality = ("optical",)
    tasks = ("caption", "classification")
    pattern = "train/**/*"
    layout_source = "others' descriptions, which report 10,000 labeled scenes"
    layout = """
        train/agriculture_land/arable_land/dry_field/P0115678.jpg    the class is the innermost folder
    """
