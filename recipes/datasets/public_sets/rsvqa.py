"""RSVQA, high resolution: questions about aerial images, answered from OpenStreetMap."""

from collections.abc import Iterator

from modeling_vitp.recipes.datasets.public_set import Entry, PublicSet, Row


class Set(PublicSet):
    title = "RSVQA, high resolution (Lobry et al. 2020)"
    license = "CC BY 4.0; the answers come from OpenStreetMap, ODbL"
    obtain = "https://rsvqa.sylvainlobry.com"
    paper_rows = released_rows = 100_000
    drawn = True
    modality, tasks = ("optical",), ("vqa",)
    files_of_split, image_root = "USGS_split_train", "Data"
    seen = "others' loaders"
    layout = """
        USGS_split_train_questions.json    {"questions": [{"id", "img_id", "question", "answers_ids", "active"}]}
        USGS_split_train_answers.json      {"answers": [{"id", "answer", "active"}]}
        Data/IMG_ID.tif
    """

    def entries(self) -> Iterator[Entry]:
        """The questions that are active: those of other splits are in the files, too, without their texts."""
        answers = {one["id"]: one for one in self.json(f"{self.files_of_split}_answers.json")["answers"]}
        name = f"{self.files_of_split}_questions.json"
        for question in self.json(name)["questions"]:
            if question.get("active"):
                yield Entry(f"{self.folder / name}, question {question.get('id')}", (question, answers))

    def rows(self, entry: tuple) -> Iterator[Row]:
        question, answers = entry
        answer = answers[question["answers_ids"][0]]["answer"]
        asked = f"{question['question'].strip()} Answer with a word or a number."
        yield self.row(question["id"], f"{question['img_id']}.tif", [(asked, str(answer))])
