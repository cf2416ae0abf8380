"""A checkpoint to another layout: [`convert_checkpoint`]."""

import shutil
import uuid
from pathlib import Path

from transformers.utils import logging

from ..command.paths import check_new
from .bands import read_by
from .card import read_license, write_card
from .finite import refuse
from .keys import CONTENTS, TARGETS
from .reading import read_source
from .tensor_files import write_checkpoint
from .writing import WRITERS, arrange

logger = logging.get_logger(__name__)


def convert_checkpoint(
    source: str | Path,
    target: str | Path,
    to: str | None = None,
    *,
    revision: str | None = None,
    license: str | None = None,
    image_token_id: int | None = None,
    deformable_attention: str | None = None,
    benchmark: str | None = None,
    input_spec: dict | None = None,
    allow_nan: bool = False,
) -> Path:
    """Writes `source` in another layout to the new folder `target`, with configuration, tokenizer, image processor,
    generation configuration and a card that states the licence of the source.

    Args:
        source: Hub id, folder or safetensors file.
        target: must not exist yet, or be empty.
        to: `"vitp"`; `"backbone"`, the ViT alone, which `AutoModel` opens without remote code; `"internvl"`, which
            `AutoModelForImageTextToText` opens without remote code; `"segmentation"`, which
            [`ViTPForSemanticSegmentation`] or [`ViTPForChangeDetection`] opens; `"detection"`, which
            `AutoModelForObjectDetection` opens; `"adapter"`, its [`ViTPAdapter`] alone;
            `"original"`, the names of InternVL's, ViT-Adapter's or OpenMMLab's own code. By default ours, with all that
            the source holds.
        revision: branch, tag or commit of a Hub id.
        license: the licence, if the source states none; one that contradicts the source is refused.
        image_token_id: the token that stands for an image, for a checkpoint of InternVL's own code without tokenizer.
        deformable_attention: of a ViT-Adapter of the original naming, also in a model: `"native"`, its own, or
            `"mmcv"`, where it was trained with mmcv's, which computes other maps. By default what the tensors and the
            settings beside them say; a warning if they leave it open.
        benchmark: of a detector of OpenMMLab's naming, the benchmark that it was published for (`"dior"`, `"dior_r"`,
            `"dota_v2"`, `"sardet_100k"`, `"rsar"`, `"ssdd"`): the names of its classes, its image size and whether it
            looks at mirrored images too, which the tensors do not say.
        input_spec: how images are read from now on, see [`~modeling_vitp.InputSpec`]. If it has `band_names`, a model
            for red, green and blue becomes one for these bands, see [`~modeling_vitp.spread_bands`].
        allow_nan: whether weights that are NaN or infinite are converted.

    Raises:
        ValueError: if the source is damaged, of an unknown kind, has weights that are NaN or infinite, lacks tensors or
            has others than its configuration asks for, is for other bands than `input_spec` names, or if `to` cannot
            say what it says. Nothing is written then.
    """
    target = Path(target)
    check_new(target)
    checkpoint = read_source(str(source), revision, image_token_id, deformable_attention, benchmark)
    targets, _ = CONTENTS[checkpoint.contents]
    to = to or targets[0]
    if to not in TARGETS:
        raise ValueError(f"There is no target {to!r}, only {', '.join(TARGETS)}.")
    if to == checkpoint.kind and input_spec is None:
        raise ValueError(f"{source} is of the kind {to!r} already.")
    if checkpoint.contents == "ViT" and to in ("vitp", "internvl"):
        raise ValueError(
            f"{source} holds a ViT alone, of which {to!r} cannot be made without a language model: convert it to "
            "'backbone', and compose that with a language model in recipes/pretrain.py."
        )
    if to not in targets:
        raise ValueError(f"{source} holds a {checkpoint.contents}, of which {to!r} cannot be made.")
    license_fields = read_license(checkpoint, license)
    if input_spec is not None:
        read_by(checkpoint, input_spec)

    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex}")
    temporary.mkdir()
    try:
        WRITERS[to](checkpoint, temporary)
        wrong = write_checkpoint(temporary, arrange(checkpoint, to))
        if not allow_nan:
            refuse(source, wrong)
        write_card(checkpoint, to, license_fields, temporary, target.name)
        temporary.rename(target)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    return target
