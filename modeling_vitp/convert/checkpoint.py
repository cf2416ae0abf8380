"""Conversion of a checkpoint to another layout: [`convert_checkpoint`]."""

import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub import ModelCard, ModelCardData
from transformers import (
    GotOcr2ImageProcessor,
    InternVLConfig,
    InternVLProcessor,
    InternVLVideoProcessor,
    PreTrainedConfig,
)
from transformers.dynamic_module_utils import custom_object_save
from transformers.utils import logging

from ..bands import FIRST_CONVOLUTIONS, describe_bands, spread_config, spread_kernel
from ..cards.record import (
    ITS_FILE,
    agreed_license,
    card_metadata,
    license_files,
    read_json,
    read_record,
    run_folder,
    stated_licenses,
    write_json,
)
from ..command.paths import check_new
from ..conversations import IMAGE_END_TOKEN, IMAGE_START_TOKEN, IMAGE_TOKEN
from ..modeling_vitp_backbone import ViTPExportedBackbone
from ..opening import naming
from ..processing_vitp import ViTPProcessor
from .export import AUTO_MAP, image_settings, native_vision_config, save_image_processor
from .internvl import (
    VIDEO_TOKEN,
    drop_video_token,
    write_rope_for_version_4,
    write_tokenizer_config_for_version_4,
)
from .keys import arrange_tensors
from .original_config import (
    adapter_to_original,
    chat_to_original,
    detection_to_original,
    segmentation_to_original,
    vision_to_original,
)
from .reading import Checkpoint, meta_model, plain_tokenizer, read_checkpoint_source
from .tensor_files import StoredTensor, refuse_not_finite, write_checkpoint

logger = logging.get_logger(__name__)

NAMED_TOKENS = {
    "start_image_token": IMAGE_START_TOKEN,
    "end_image_token": IMAGE_END_TOKEN,
    "context_image_token": IMAGE_TOKEN,
    "video_token": VIDEO_TOKEN,
}


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
    file: str | None = None,
) -> Path:
    """Convert `source` to another layout and write it to the new folder `target`.

    Configuration, tokenizer, image processor and generation configuration are converted too. A model card states the
    license of the source.

    Args:
        source: Hub id, folder or safetensors file.
        target: folder that does not exist yet or is empty.
        to: `"vitp"`; `"backbone"`, the ViT alone, which `AutoModel` loads without remote code; `"internvl"`, which
            `AutoModelForImageTextToText` loads without remote code; `"segmentation"` for
            [`ViTPForSemanticSegmentation`] or [`ViTPForChangeDetection`]; `"detection"`, which
            `AutoModelForObjectDetection` loads; `"adapter"`, the [`ViTPAdapter`] of a model alone; `"original"`, the
            names of InternVL's, ViT-Adapter's or OpenMMLab's own code. Defaults to this package's layout with all parts
            of the source.
        revision: branch, tag or commit of a Hub id.
        license: license, if the source states none. A license that contradicts the source raises an error.
        image_token_id: id of the image token, for a checkpoint of InternVL's own code without tokenizer.
        deformable_attention: deformable attention of an original ViT-Adapter, also in a model: `"native"` for its own,
            or `"mmcv"` if it was trained with mmcv's, which computes other maps. Defaults to the one that the tensors
            and their settings show; if they show none, a warning is logged.
        benchmark: benchmark of a detector published in OpenMMLab's layout (`"dior"`, `"dior_r"`, `"dota_v2"`,
            `"sardet_100k"`, `"rsar"`, `"ssdd"`). It sets the class names, the image size and the use of mirrored
            images, which the tensors do not show.
        input_spec: new input spec of the image processor, see [`~modeling_vitp.InputSpec`]. With `band_names`, a model
            for red, green and blue is converted to one for these bands, see [`~modeling_vitp.spread_bands`].
        allow_nan: whether weights that are NaN or infinite are converted.
        file: safetensors file in a Hub repo or folder that has several checkpoints. No other weights are downloaded.

    Raises:
        ValueError: if the source is damaged or of an unknown layout, has weights that are NaN or infinite, has missing
            or unexpected tensors, has other bands than `input_spec`, or has settings that `to` does not support.
            Nothing is written then.
    """
    target = Path(target)
    check_new(target)
    checkpoint = read_checkpoint_source(str(source), revision, image_token_id, deformable_attention, benchmark, file)
    to = to or checkpoint.entry.layout
    check_target(checkpoint, to, has_input_spec=input_spec is not None)
    license_fields = read_license(checkpoint, license)
    if input_spec is not None:
        set_input_spec(checkpoint, input_spec)
    write_conversion(checkpoint, to, target, license_fields, allow_nan)
    return target


def write_conversion(
    checkpoint: Checkpoint,
    to: str,
    target: Path,
    license_fields: dict[str, str],
    allow_nan: bool,
) -> None:
    """Write a checkpoint in the layout `to` to the folder `target`, which appears when it is complete."""
    target.parent.mkdir(parents=True, exist_ok=True)
    # Also an interrupt leaves nothing behind.
    with tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=target.parent) as temporary:
        folder = Path(temporary, target.name)
        folder.mkdir()
        WRITERS[to](checkpoint, folder)
        layout = checkpoint.original_layout if to == "original" else to
        not_finite_names = write_checkpoint(folder, arrange_tensors(checkpoint.tensors, layout))
        if not allow_nan:
            refuse_not_finite(checkpoint.name, not_finite_names)
        write_conversion_card(checkpoint, to, license_fields, folder)
        folder.rename(target)


def check_target(checkpoint: Checkpoint, to: str, has_input_spec: bool) -> None:
    """Raise a `ValueError` if a checkpoint cannot be converted to a layout, or already has it."""
    source = checkpoint.name
    targets = []
    for target in checkpoint.targets:
        if target != checkpoint.kind or has_input_spec:
            targets.append(target)
    if to in targets:
        return
    advice = ""
    if checkpoint.entry.layout == "backbone":
        advice = " To combine a ViT with a language model, start a pretraining from it (recipes/pretrain.py)."
    elif checkpoint.other_vit_family is not None:
        advice = f" Its ViT keeps its own format: export it with `vitp export_backbone {source} FOLDER`."
    elif checkpoint.entry.layout in ("segmentation", "detection") and "adapter" not in checkpoint.targets:
        advice = " Only models on a ViT-Adapter have other layouts."
    raise ValueError(
        f"{source}, a {checkpoint.config.model_type!r} in the layout {checkpoint.kind!r}, cannot be converted to "
        f"{to!r}. Possible targets: {', '.join(targets) or 'none'}.{advice}"
    )


@dataclass(frozen=True)
class ChangedTensor(StoredTensor):
    """Tensor that replaces one of a file."""

    content: torch.Tensor | None = None

    def load(self, files: dict | None = None) -> torch.Tensor:
        return self.content


def set_input_spec(checkpoint: Checkpoint, input_spec: dict) -> None:
    """Set the input spec of the image processor, and spread the weights over its bands if it names any.

    The weights, mean and standard deviation for red, green and blue are spread, see [`~modeling_vitp.spread_bands`].

    Raises:
        ValueError: if the checkpoint is for other bands.
    """
    checkpoint.image_processor = checkpoint.image_processor.with_input_spec(input_spec)
    if checkpoint.processor is not None:
        checkpoint.processor.image_processor = checkpoint.image_processor
    band_names = checkpoint.image_processor.band_names
    if band_names is None or not spread_config(checkpoint.config, band_names):
        return
    kernel_names = tuple(f"{convolution}.weight" for convolution in FIRST_CONVOLUTIONS)
    for name, tensor in checkpoint.tensors.items():
        if name.endswith(kernel_names):
            kernel = spread_kernel(tensor.load(), band_names).contiguous()
            checkpoint.tensors[name] = ChangedTensor(
                path=tensor.path,
                key=tensor.key,
                dtype=tensor.dtype,
                shape=tuple(kernel.shape),
                content=kernel,
            )


def read_license(checkpoint: Checkpoint, license: str | None) -> dict[str, str]:
    """Return the license fields of the source, of its card or its run, or the argument if the source states none."""
    licenses_of_source = stated_licenses(checkpoint.root)
    if license is not None:
        licenses_of_source.pop(ITS_FILE, None)  # the name of a license is not read from its text
    fields = agreed_license(licenses_of_source, license)
    if not fields:
        logger.warning(
            "%s states no license (neither a card nor a license file). Set --license: to a license of your choice for "
            "a model that you trained from scratch, to the actual license for any other model.",
            checkpoint.name,
        )
        return {"license": "unknown"}
    return fields


def write_conversion_card(
    checkpoint: Checkpoint,
    to: str,
    license_fields: dict[str, str],
    folder: Path,
) -> None:
    """Write a card with the license of the source, and copy its license files."""
    for file in (*license_files(run_folder(checkpoint.root)), *license_files(checkpoint.root)):
        shutil.copyfile(file, folder / file.name)
    source = checkpoint.name
    base_model = checkpoint.name
    if Path(checkpoint.name).exists():  # a folder, which is not on the Hub
        source = Path(checkpoint.name).name
        base_model = card_metadata(checkpoint.root).get("base_model") or read_record(checkpoint.root).get("base_model")
    pipeline_tag = checkpoint.entry.pipeline_tag
    if to in ("backbone", "adapter"):
        pipeline_tag = "image-feature-extraction"
    data = ModelCardData(
        **license_fields,
        base_model=base_model or None,
        library_name="transformers",
        pipeline_tag=pipeline_tag,
        tags=["vitp"],
    )
    license = license_fields.get("license_name", license_fields["license"])
    if license == "unknown":
        terms = "The source states no license. Find out its license before you use or share these weights."
    else:
        terms = f"License of the source, which also applies to these weights: {license}."
    comparison = "They are the same to the bit"
    if any(isinstance(tensor, ChangedTensor) for tensor in checkpoint.tensors.values()):
        bands = describe_bands(checkpoint.image_processor.band_names)
        comparison += f", except those for pixels, spread over {bands}"
    card = ModelCard(
        f"---\n{data}\n---\n\n# {folder.name}\n\nThe weights of `{source}` (layout: {checkpoint.kind}), converted to "
        f"the layout `{to}` with `vitp convert`. {comparison}.\n\n## License\n\n{terms}\n"
    )
    card.save(folder / "README.md")


def write_own(checkpoint: Checkpoint, folder: Path, config: PreTrainedConfig | None = None) -> None:
    """Write the configuration of a model of this package, by default of the whole one, its code and its processor."""
    config = config or checkpoint.config
    model = meta_model(config)
    config.architectures = [type(model).__name__]
    config.dtype = checkpoint.config.dtype
    custom_object_save(model, folder, config=config)
    config.save_pretrained(folder)
    (checkpoint.processor or checkpoint.image_processor).save_pretrained(folder)
    if checkpoint.processor is not None:
        drop_video_token(folder, config.text_config.vocab_size)
    copy_generation_config(checkpoint, folder)


def write_internvl(checkpoint: Checkpoint, folder: Path) -> None:
    refuse_input_spec(checkpoint, "internvl")
    fields = checkpoint.config.to_dict()
    for name in ("model_type", "architectures", "auto_map", "vision_config"):
        fields.pop(name, None)
    # transformers 4 and vLLM read this setting, version 5 reads that of the whole model.
    fields["text_config"]["tie_word_embeddings"] = fields["tie_word_embeddings"]
    config = InternVLConfig(vision_config=native_vision_config(checkpoint.config.vision_config), **fields)
    config.architectures = ["InternVLForConditionalGeneration"]
    config.save_pretrained(folder)
    write_rope_for_version_4(folder)
    settings = image_settings(checkpoint.image_processor)
    settings.pop("input_spec", None)
    image_processor = GotOcr2ImageProcessor(**settings)
    if checkpoint.processor is None:
        image_processor.save_pretrained(folder)
    else:
        processor = native_processor(checkpoint.folder, image_processor, checkpoint.processor)
        processor.save_pretrained(folder)
        write_tokenizer_config_for_version_4(folder)
    copy_generation_config(checkpoint, folder)


def native_processor(
    folder: Path, image_processor: GotOcr2ImageProcessor, processor: ViTPProcessor
) -> InternVLProcessor:
    """Return transformers' processor with an image processor, a folder's tokenizer and the given chat template."""
    # `InternVLProcessor` reads these tokens by name. The video token is replaced before encoding, without embedding.
    tokenizer = plain_tokenizer(folder, model_specific_special_tokens=NAMED_TOKENS, padding_side="left")
    video_processor = InternVLVideoProcessor(
        size=image_processor.size,
        image_mean=image_processor.image_mean,
        image_std=image_processor.image_std,
    )
    with naming(folder, InternVLProcessor):
        return InternVLProcessor(
            image_processor,
            tokenizer,
            video_processor,
            image_seq_length=processor.image_seq_length,
            chat_template=processor.chat_template,
        )


def write_backbone(checkpoint: Checkpoint, folder: Path) -> None:
    vision_config = getattr(checkpoint.config, "vision_config", checkpoint.config)
    config = native_vision_config(vision_config)
    config.architectures = ["InternVLVisionModel"]
    config.dtype = checkpoint.config.dtype
    config.auto_map = AUTO_MAP
    config.save_pretrained(folder)
    custom_object_save(ViTPExportedBackbone, folder)
    save_image_processor(folder, vision_config, checkpoint.image_processor)


def write_adapter(checkpoint: Checkpoint, folder: Path) -> None:
    write_own(checkpoint, folder, getattr(checkpoint.config, "backbone_config", None))


def write_original(checkpoint: Checkpoint, folder: Path) -> None:
    refuse_input_spec(checkpoint, "original")
    config = checkpoint.config
    image_processor = checkpoint.image_processor
    if checkpoint.original_layout in DENSE_TO_ORIGINAL:
        to_original = DENSE_TO_ORIGINAL[checkpoint.original_layout]
        write_json(folder / "config.json", to_original(config))
        image_processor.to_json_file(folder / "preprocessor_config.json")  # only we read it
        return
    if checkpoint.original_layout == "original_vision":
        fields = vision_to_original(config)
    else:
        fields = chat_to_original(config, image_processor.min_patches, image_processor.max_patches)
        copy_generation_config(checkpoint, folder)
    write_json(folder / "config.json", {**fields, "torch_dtype": str(config.dtype).removeprefix("torch.")})
    write_json(
        folder / "preprocessor_config.json",
        {
            "image_processor_type": "CLIPImageProcessor",
            "size": image_processor.size["height"],
            "crop_size": image_processor.size["height"],
            "do_center_crop": True,
            "do_resize": True,
            "do_normalize": True,
            "image_mean": list(image_processor.image_mean),
            "image_std": list(image_processor.image_std),
            "resample": 3,
        },
    )
    if checkpoint.processor is not None:
        write_tokenizer_of_version_4(checkpoint, folder)


DENSE_TO_ORIGINAL = {
    "original_adapter": adapter_to_original,
    "original_segmentation": segmentation_to_original,
    "original_detection": detection_to_original,
    "original_cascade": detection_to_original,
}
WRITERS = {
    "vitp": write_own,
    "backbone": write_backbone,
    "internvl": write_internvl,
    "segmentation": write_own,
    "detection": write_own,
    "adapter": write_adapter,
    "original": write_original,
}


def refuse_input_spec(checkpoint: Checkpoint, to: str) -> None:
    if checkpoint.image_processor.input_spec:
        raise ValueError(
            f"{checkpoint.name} reads images with input_spec={checkpoint.image_processor.input_spec}, which {to!r} "
            "does not support: images would be misread. Save the processor with input_spec=None first, and convert the "
            "images yourself."
        )


def copy_generation_config(checkpoint: Checkpoint, folder: Path) -> None:
    file = checkpoint.folder / "generation_config.json"
    if file.is_file():
        shutil.copyfile(file, folder / file.name)


def write_tokenizer_of_version_4(checkpoint: Checkpoint, folder: Path) -> None:
    """Write the tokenizer for transformers 4, which the original code runs on; its slow classes need extra files."""
    tokenizer = plain_tokenizer(checkpoint.folder)
    tokenizer.save_pretrained(folder)
    drop_video_token(folder, checkpoint.config.text_config.vocab_size)
    tokenizer.backend_tokenizer.model.save(str(folder))
    added_tokens = read_json(folder / "tokenizer.json")["added_tokens"]
    ids_by_token = {token["content"]: token["id"] for token in added_tokens}
    write_json(folder / "added_tokens.json", ids_by_token, ensure_ascii=False)
    write_tokenizer_config_for_version_4(folder)
