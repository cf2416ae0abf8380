"""The same conversations about the same images in each supported format."""

import io
import json
import tarfile
from collections.abc import Sequence
from pathlib import Path

from datasets import Dataset, Features, Image, List, Value
from PIL.Image import Image as Picture
from sample_rows import encoded_image

MESSAGES = List({"role": Value("string"), "content": Value("string")})
IMAGES = {"images": List(Image()), "image": Image()}


def question(number: int) -> str:
    return f"How many trees are in scene {number}?"


def answer(number: int) -> str:
    return f"There are {number} trees."


def messages(number: int) -> list[dict]:
    return [{"role": "user", "content": question(number)}, {"role": "assistant", "content": answer(number)}]


def turns(number: int) -> list[dict]:
    return [{"from": "human", "value": f"<image>\n{question(number)}"}, {"from": "gpt", "value": answer(number)}]


def save_images(folder: Path, pictures: Sequence[Picture]) -> list[str]:
    """Return the names of the files in the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    names = [f"{number:03d}.png" for number in range(len(pictures))]
    for name, picture in zip(names, pictures):
        picture.save(folder / name)
    return names


def write_lines(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_parquet(folder: Path, rows: list[dict], **features) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    Dataset.from_list(rows, features=Features(features)).to_parquet(folder / "train.parquet")


def write_messages(folder: Path, pictures: Sequence[Picture]) -> None:
    rows = [{"images": [picture], "messages": messages(number)} for number, picture in enumerate(pictures)]
    write_parquet(folder, rows, images=IMAGES["images"], messages=MESSAGES)


def write_messages_in_lines(folder: Path, pictures: Sequence[Picture]) -> None:
    names = save_images(folder, pictures)
    write_lines(
        folder / "train.jsonl",
        [{"images": [name], "messages": messages(number)} for number, name in enumerate(names)],
    )


def write_completions(folder: Path, pictures: Sequence[Picture]) -> None:
    rows = [
        {"image": picture, "prompt": messages(number)[:1], "completion": messages(number)[1:]}
        for number, picture in enumerate(pictures)
    ]
    write_parquet(folder, rows, image=IMAGES["image"], prompt=MESSAGES, completion=MESSAGES)


def write_texts_to_complete(folder: Path, pictures: Sequence[Picture]) -> None:
    names = save_images(folder / "images", pictures)
    write_lines(
        folder / "data.jsonl",
        [
            {"images": [name], "prompt": question(number), "completion": answer(number)}
            for number, name in enumerate(names)
        ],
    )


def write_llava(folder: Path, pictures: Sequence[Picture]) -> None:
    names = save_images(folder / "images", pictures)
    rows = [{"id": name, "image": name, "conversations": turns(number)} for number, name in enumerate(names)]
    (folder / "llava_instruct.json").write_text(json.dumps(rows, indent=1))


def write_sharegpt(folder: Path, pictures: Sequence[Picture]) -> None:
    names = save_images(folder / "images", pictures)
    rows = [{"images": [f"images/{name}"], "conversations": turns(number)} for number, name in enumerate(names)]
    write_lines(folder / "sharegpt_train.jsonl", rows)


def write_internvl(folder: Path, pictures: Sequence[Picture]) -> None:
    names = save_images(folder / "images", pictures)
    rows = [
        {
            "id": number,
            "image": name,
            "width": pictures[number].width,
            "height": pictures[number].height,
            "conversations": turns(number),
        }
        for number, name in enumerate(names)
    ]
    write_lines(folder / "internvl.jsonl", rows)


def write_questions(folder: Path, pictures: Sequence[Picture]) -> None:
    rows = [
        {"image": picture, "question": question(number), "answer": answer(number)}
        for number, picture in enumerate(pictures)
    ]
    write_parquet(folder, rows, image=IMAGES["image"], question=Value("string"), answer=Value("string"))


def write_metadata(folder: Path, pictures: Sequence[Picture]) -> None:
    names = save_images(folder / "train", pictures)
    rows = [{"file_name": name, "question": question(n), "answer": answer(n)} for n, name in enumerate(names)]
    write_lines(folder / "train" / "metadata.jsonl", rows)


def write_archive(path: Path, files: dict[str, bytes]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))


def write_archives(folder: Path, pictures: Sequence[Picture], shard_rows: int = 30) -> None:
    for start in range(0, len(pictures), shard_rows):
        files = {}
        for number, picture in list(enumerate(pictures))[start : start + shard_rows]:
            fields = {"image": f"{number}.png", "conversations": turns(number)}
            files |= {f"{number:06d}.png": encoded_image(picture), f"{number:06d}.json": json.dumps(fields).encode()}
        write_archive(folder / f"train-{start // shard_rows:04d}.tar", files)


# Writer and name of each format.
FORMATS = {
    "messages": (write_messages, "messages"),
    "messages in JSON Lines": (write_messages_in_lines, "messages"),
    "prompts and completions": (write_completions, "prompts and completions"),
    "texts to complete": (write_texts_to_complete, "prompts and completions"),
    "LLaVA": (write_llava, "LLaVA conversations"),
    "ShareGPT": (write_sharegpt, "ShareGPT conversations"),
    "InternVL": (write_internvl, "InternVL conversations"),
    "questions and answers": (write_questions, "questions and answers"),
    "imagefolder": (write_metadata, "questions and answers"),
    "WebDataset": (write_archives, "ShareGPT conversations in a WebDataset"),
}
