"""Bundle of an adaptation: one folder with the adapted backbone, its exports, embeddings, and the report."""

import os
import re
import shlex
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow.parquet as pq
import yaml

from ..cards.record import copy_record
from ..cards.sections import table, with_section, without_folders
from ..command.errors import one_line
from ..convert.onnx import export_onnx
from ..convert.timm_folder import MODEL_TYPE, export_timm
from ..hub.files import model_files
from ..hub.upload import BUNDLE_CONFIG, FINE_TUNED, read_model_type, write_model_card
from ..image_processing_vitp import ViTPImageProcessor
from ..modeling_vitp_backbone import open_vit
from ..probing.backbones import load_backbone
from ..probing.embedding import embed_images
from ..training.checkpointing import write_whole
from ..training.config import default_device
from .arguments import AdaptArguments
from .labels import TaskData

if TYPE_CHECKING:
    from .report import AdaptationReport

TIMM = "timm"
ONNX = "backbone.onnx"
EMBEDDINGS = "embeddings.parquet"
OMITTED = ("dry_run", "force", "allow_overlap", "seconds")  # arguments that the configuration of a bundle lacks
CONTENTS = {  # descriptions in the card
    "config.json": "The adapted backbone is in this folder, for transformers.",
    TIMM: 'The backbone for timm: `timm.create_model("local-dir:timm")`.',
    ONNX: "The backbone for ONNX Runtime, for images of any size.",
    FINE_TUNED: "The model that was fine-tuned from the backbone.",
    EMBEDDINGS: "An embedding of each image, the mean of its patch tokens.",
    "report.html": "This report as one page.",
    "report.json": "This report as data.",
    BUNDLE_CONFIG: "The configuration, whose paths are relative to the folder that the adaptation was started in.",
}


def write_bundle(
    report: "AdaptationReport",
    backbone: str | Path,
    fine_tuned: str | Path,
    images: Sequence[str | os.PathLike],
    folder: str | Path,
    config: Mapping[str, Any],
) -> list[str]:
    """Write the bundle of an adaptation, which `vitp push_to_hub --what adaptation` sends.

    The adapted backbone is at the root, for `AutoModel.from_pretrained(folder)`. Paths in the bundle are relative. If a
    call is interrupted, the next one exports again and resumes the embeddings.

    Args:
        report: report, whose pictures are relative to the parent of `folder`.
        backbone: folder of the adapted backbone with its record, see
            [`~modeling_vitp.convert.export.export_backbone`].
        fine_tuned: folder of the model that was fine-tuned from the backbone.
        images: image files to embed.
        folder: folder of the bundle.
        config: arguments of `vitp adapt` that run the adaptation again.

    Returns:
        Sentences on what could not be exported.
    """
    folder = Path(folder)
    remove_exports(folder)
    files_of_model = model_files(fine_tuned)
    files_of_model.pop("README.md", None)  # for a repo of its own
    # With `subfolder`, transformers reads the code from the root.
    code_files = {name: path for name, path in files_of_model.items() if name.endswith(".py")}
    copy_files(code_files, folder)
    copy_files(model_files(backbone), folder)
    copy_record(backbone, folder)
    copy_files(files_of_model, folder / FINE_TUNED)
    copy_files({name: folder.parent / name for name in report.pictures}, folder)
    notes = export_others(folder)
    notes += embed(images, folder)
    # The working folder of the command is that of the configuration's paths.
    relative_config = change_texts(config, relative_path)
    write_whole(folder / BUNDLE_CONFIG, yaml.safe_dump(relative_config, sort_keys=False, allow_unicode=True))
    fields = change_texts(asdict(report), without_folders)
    fields["data"]["how"] = report.data["how"]  # A pattern of scenes may look like a path.
    config_file = relative_path(str(Path(folder, BUNDLE_CONFIG).resolve()))
    fields["command"] = shlex.join(["vitp", "adapt", "--config", config_file])
    type(report)(**fields).save(folder)
    write_card(folder, notes)
    return notes


def remove_exports(folder: Path) -> None:
    """Remove the exports of an earlier or interrupted call from a bundle."""
    unfinished_exports = [path.name for path in folder.glob(f".{ONNX}.*")]
    for name in (TIMM, FINE_TUNED, *unfinished_exports):
        shutil.rmtree(folder / name, ignore_errors=True)
    (folder / ONNX).unlink(missing_ok=True)


def write_card(folder: Path, notes: Sequence[str]) -> None:
    """Write the card of a bundle: the page of the report, with a table of the files.

    Args:
        folder: folder of the bundle with its files.
        notes: sentences on what could not be exported.
    """
    rows = []
    for name, description in CONTENTS.items():
        if (folder / name).exists():
            rows.append([f"`{name}`", description])
    list_of_notes = "\n".join(f"- {note}" for note in notes)
    section = table(["file", "content"], rows) + "\n\n" + list_of_notes
    card = folder / "README.md"
    page = with_section(card.read_text(), "Files", section)
    write_whole(card, f"---\n{{}}\n---\n\n{page}")
    write_model_card("backbone", folder)


def make_bundle(
    args: AdaptArguments, labels: TaskData, report: "AdaptationReport", fine_tuned: Path, folder: Path
) -> list[str]:
    """Write the bundle into the output folder of an adaptation, see [`write_bundle`].

    Args:
        args: arguments of the command.
        labels: labeled images.
        report: report with its pictures in `folder`.
        fine_tuned: folder of the model that was fine-tuned from the adapted backbone.
        folder: output folder of the adaptation.
    """
    images = []
    for split_images in labels.images.values():
        images += split_images
    config = {}
    for name, value in vars(args).items():
        if value and name not in OMITTED:
            config[name] = value
    backbone = folder / "pretraining" / "backbone"
    return write_bundle(report, backbone, fine_tuned, images, bundle_folder(folder), config)


def bundle_folder(folder: str | Path) -> Path:
    """Return the folder of the bundle in the output folder of an adaptation."""
    return Path(folder) / "bundle"


def copy_files(files: Mapping[str, Path], folder: Path) -> None:
    for name, path in files.items():
        copy = folder / name
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, copy)


def export_others(folder: Path) -> list[str]:
    """Export the backbone of a bundle for timm and ONNX, and return a sentence for each format that lacks it."""

    def export_for_onnx() -> None:
        export_onnx(folder, folder / ONNX)

    def export_for_timm() -> None:
        vit = open_vit(folder, dtype="auto")
        export_timm(vit, folder / TIMM, ViTPImageProcessor.from_pretrained(folder))

    exports = {"ONNX": export_for_onnx}
    if read_model_type(folder) != MODEL_TYPE:  # timm opens its own ViTs as they are
        exports["timm"] = export_for_timm
    notes = []
    for name, export in exports.items():
        try:
            export()
        except (ValueError, ModuleNotFoundError, RuntimeError) as error:  # the last by torch's exporter
            message = without_folders(one_line(str(error)))
            first_sentence = re.split(r"(?<=\.)\s", message)[0]
            notes.append(f"The backbone was not exported for {name}: {first_sentence.rstrip('.')}.")
    return notes


def embed(images: Sequence[str | os.PathLike], folder: Path) -> list[str]:
    """Embed images by the backbone of a bundle, and return a sentence if some of them cannot be read."""
    output = folder / EMBEDDINGS
    if not output.exists():
        backbone = load_backbone(str(folder), default_device())
        backbone.name = "the adapted backbone"  # stored in the file, instead of a path
        image_folders = [os.path.dirname(os.path.abspath(path)) for path in images]
        root = os.path.commonpath(image_folders)
        embed_images(backbone, images, output, root=root, bad_images="skip")
    num_missing = len(images) - pq.read_metadata(output).num_rows
    if num_missing == 0:
        return []
    return [f"{num_missing} of {len(images)} images have no embedding, because they cannot be read."]


def change_texts(value: Any, change: Callable[[str], str]) -> Any:
    """Return plain data with each text changed, except the keys."""
    if isinstance(value, Mapping):
        return {key: change_texts(item, change) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [change_texts(item, change) for item in value]
    if isinstance(value, str):
        return change(value)
    return value


def relative_path(text: str) -> str:
    """Return an absolute path of an existing file relative to the working folder, and other texts as they are."""
    path = Path(text)
    if path.is_absolute() and path.exists() and path.drive == Path.cwd().drive:
        return Path(os.path.relpath(path)).as_posix()
    return text
