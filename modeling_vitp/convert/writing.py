"""A checkpoint in the layout of each target."""

import shutil
from pathlib import Path
from typing import Any

from transformers import GotOcr2ImageProcessor, InternVLConfig, InternVLProcessor, InternVLVideoProcessor
from transformers.dynamic_module_utils import custom_object_save

from ..cards.record import read_json, write_json
from ..configuration_vitp_dense import ViTPAdapterConfig, ViTPSegmentationConfig
from ..configuration_vitp_detection import ViTPObjectDetectionConfig
from ..messages import IMAGE_END_TOKEN, IMAGE_START_TOKEN, IMAGE_TOKEN
from ..modeling_vitp import ViTPForConditionalGeneration
from ..opening import naming
from ..processing_vitp import ViTPProcessor
from .export import AUTO_MAP, image_settings, native_vision_config, save_code_and_image_processor
from .keys import CONTENTS, place
from .original_config import chat_to_original, vision_to_original
from .original_dense_config import adapter_to_original, segmentation_to_original
from .original_detection_config import detection_to_original
from .reading import Checkpoint, meta_model, plain_tokenizer
from .tensor_files import TensorBytes
from .version_4 import say_rope_in_version_4, say_tokenizer_in_version_4
from .video_token import VIDEO_TOKEN, drop_video_token

NAMED_TOKENS = {
    "start_image_token": IMAGE_START_TOKEN,
    "end_image_token": IMAGE_END_TOKEN,
    "context_image_token": IMAGE_TOKEN,
    "video_token": VIDEO_TOKEN,
}


def arrange(checkpoint: Checkpoint, to: str) -> dict[str, list[TensorBytes]]:
    """The tensors under the names of the target, each as the blocks of rows that make it up."""
    layout = CONTENTS[checkpoint.contents][1] if to == "original" else to
    arranged = {}
    for name, tensor in checkpoint.tensors.items():
        found = place(name, layout)
        if found is not None:
            arranged.setdefault(found.key, {})[found.part] = tensor
    for key, blocks in arranged.items():
        if len({tensor.dtype for tensor in blocks.values()}) > 1:
            raise ValueError(f"{checkpoint.name}: {key} would be made of tensors of several dtypes.")
    return {key: [blocks[part] for part in sorted(blocks)] for key, blocks in arranged.items()}


def write_vitp(checkpoint: Checkpoint, folder: Path) -> None:
    config = checkpoint.config
    config.architectures = [ViTPForConditionalGeneration.__name__]
    custom_object_save(meta_model(config), folder, config=config)
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
    # Of which transformers 4 and vLLM read this one, and version 5 that of the whole.
    fields["text_config"]["tie_word_embeddings"] = fields["tie_word_embeddings"]
    config = InternVLConfig(vision_config=native_vision_config(checkpoint.config.vision_config), **fields)
    config.architectures = ["InternVLForConditionalGeneration"]
    config.save_pretrained(folder)
    say_rope_in_version_4(folder)
    settings = image_settings(checkpoint.image_processor)
    settings.pop("input_spec", None)
    image_processor = GotOcr2ImageProcessor(**settings)
    if checkpoint.processor is None:
        image_processor.save_pretrained(folder)
    else:
        processor = internvl_processor(checkpoint.folder, image_processor, checkpoint.processor)
        processor.save_pretrained(folder)
        say_tokenizer_in_version_4(folder)
    copy_generation_config(checkpoint, folder)


def internvl_processor(
    folder: Path, image_processor: GotOcr2ImageProcessor, processor: ViTPProcessor
) -> InternVLProcessor:
    """transformers' own processor with an image processor, and otherwise as ours, whose tokenizer is in a folder."""
    # What it asks the tokenizer for by name. The video token is replaced before encoding, so it needs no embedding.
    tokenizer = plain_tokenizer(folder, model_specific_special_tokens=NAMED_TOKENS, padding_side="left")
    same = {name: getattr(image_processor, name) for name in ("size", "image_mean", "image_std")}
    with naming(folder, InternVLProcessor):
        return InternVLProcessor(
            image_processor,
            tokenizer,
            InternVLVideoProcessor(**same),
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
    save_code_and_image_processor(folder, vision_config, checkpoint.image_processor)


def write_dense(
    checkpoint: Checkpoint,
    folder: Path,
    config: ViTPAdapterConfig | ViTPSegmentationConfig | ViTPObjectDetectionConfig,
) -> None:
    model = meta_model(config)
    config.architectures = [type(model).__name__]
    config.dtype = checkpoint.config.dtype
    custom_object_save(model, folder, config=config)
    config.save_pretrained(folder)
    checkpoint.image_processor.save_pretrained(folder)


def write_dense_model(checkpoint: Checkpoint, folder: Path) -> None:
    write_dense(checkpoint, folder, checkpoint.config)


def write_adapter(checkpoint: Checkpoint, folder: Path) -> None:
    write_dense(checkpoint, folder, getattr(checkpoint.config, "backbone_config", checkpoint.config))


def write_original(checkpoint: Checkpoint, folder: Path) -> None:
    refuse_input_spec(checkpoint, "original")
    config, image_processor = checkpoint.config, checkpoint.image_processor
    if isinstance(config, (ViTPAdapterConfig, ViTPSegmentationConfig, ViTPObjectDetectionConfig)):
        write_json(folder / "config.json", dense_to_original(config))
        image_processor.to_json_file(folder / "preprocessor_config.json")  # which their code does not read
        return
    if checkpoint.contents == "ViT":
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


def dense_to_original(config: ViTPAdapterConfig | ViTPSegmentationConfig | ViTPObjectDetectionConfig) -> dict[str, Any]:
    if isinstance(config, ViTPObjectDetectionConfig):
        return detection_to_original(config)
    if isinstance(config, ViTPSegmentationConfig):
        return segmentation_to_original(config)
    return adapter_to_original(config)


WRITERS = {
    "vitp": write_vitp,
    "backbone": write_backbone,
    "internvl": write_internvl,
    "segmentation": write_dense_model,
    "detection": write_dense_model,
    "adapter": write_adapter,
    "original": write_original,
}


def refuse_input_spec(checkpoint: Checkpoint, to: str) -> None:
    if checkpoint.image_processor.input_spec:
        raise ValueError(
            f"{checkpoint.name} reads images with input_spec={checkpoint.image_processor.input_spec}, which {to!r} "
            "cannot say: its users would misread the images. Save the processor with input_spec=None first, and "
            "convert images yourself."
        )


def copy_generation_config(checkpoint: Checkpoint, folder: Path) -> None:
    file = checkpoint.folder / "generation_config.json"
    if file.is_file():
        shutil.copyfile(file, folder / file.name)


def write_tokenizer_of_version_4(checkpoint: Checkpoint, folder: Path) -> None:
    """The tokenizer for transformers 4, which the original code runs on; its slow classes need files of their own."""
    tokenizer = plain_tokenizer(checkpoint.folder)
    tokenizer.save_pretrained(folder)
    drop_video_token(folder, checkpoint.config.text_config.vocab_size)
    tokenizer.backend_tokenizer.model.save(str(folder))
    added = {token["content"]: token["id"] for token in read_json(folder / "tokenizer.json")["added_tokens"]}
    write_json(folder / "added_tokens.json", added, ensure_ascii=False)
    say_tokenizer_in_version_4(folder)
