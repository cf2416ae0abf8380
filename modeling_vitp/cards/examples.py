"""Code that loads a pushed model, as its card prints it."""

import json
from pathlib import Path
from typing import Any

BACKBONE = """
from PIL import Image
from transformers import AutoImageProcessor, AutoModel

backbone = AutoModel.from_pretrained("{repo}")
image_processor = AutoImageProcessor.from_pretrained("{repo}"{trust_processor})

image = Image.new("RGB", (640, 480))  # yours
inputs = image_processor(image, return_tensors="pt")
features = backbone(**inputs).last_hidden_state  # (1, 1 + patches, width), the CLS token first
"""
CONVERSATION = """
image = Image.new("RGB", (640, 480))  # yours
content = [{{"type": "image", "image": image}}, {{"type": "text", "text": "How many ships are there?"}}]
inputs = processor.apply_chat_template(
    [{{"role": "user", "content": content}}],
    add_generation_prompt=True,
    tokenize=True,
    return_dict=True,
    return_tensors="pt",
)
tokens = model.generate(**inputs, max_new_tokens=50)
answer = processor.batch_decode(tokens[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)[0]
"""
MODEL = (
    """
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

model = AutoModelForImageTextToText.from_pretrained("{repo}"{trust})
processor = AutoProcessor.from_pretrained("{repo}"{trust})
"""
    + CONVERSATION
)
ADAPTER = (
    """
from peft import PeftModel
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

model = AutoModelForImageTextToText.from_pretrained("{base}", trust_remote_code=True)
model = PeftModel.from_pretrained(model, "{repo}")
processor = AutoProcessor.from_pretrained("{repo}", trust_remote_code=True)
"""
    + CONVERSATION
)
SEGMENTATION = """
from PIL import Image
from transformers import AutoImageProcessor, AutoModelForSemanticSegmentation

model = AutoModelForSemanticSegmentation.from_pretrained("{repo}", trust_remote_code=True)
image_processor = AutoImageProcessor.from_pretrained("{repo}", trust_remote_code=True)

image = Image.new("RGB", (640, 480))  # yours
outputs = model(**image_processor(image, return_tensors="pt"))
classes = image_processor.post_process_semantic_segmentation(outputs, target_sizes=[(480, 640)])[0]
"""
CLASSIFICATION = """
from PIL import Image
from transformers import pipeline

classifier = pipeline("image-classification", model="{repo}", trust_remote_code=True)

image = Image.new("RGB", (640, 480))  # yours
found = classifier(image)  # labels with their scores, the highest first
"""
CHANGE_DETECTION = """
from PIL import Image
from transformers import AutoImageProcessor, AutoModel

model = AutoModel.from_pretrained("{repo}", trust_remote_code=True)
image_processor = AutoImageProcessor.from_pretrained("{repo}", trust_remote_code=True)

before, after = Image.new("RGB", (640, 480)), Image.new("RGB", (640, 480))  # yours
outputs = model(**image_processor(before, images_after=after, return_tensors="pt"))
changes = image_processor.post_process_semantic_segmentation(outputs, target_sizes=[(480, 640)])[0]
"""
DETECTION = """
from PIL import Image
from transformers import AutoImageProcessor, AutoModelForObjectDetection

model = AutoModelForObjectDetection.from_pretrained("{repo}", trust_remote_code=True)
image_processor = AutoImageProcessor.from_pretrained("{repo}", trust_remote_code=True)

image = Image.new("RGB", (640, 480))  # yours
outputs = model(**image_processor(image, return_tensors="pt"))
"""
BOXES = (
    DETECTION
    + """found = image_processor.post_process_object_detection(outputs, threshold=0.5, target_sizes=[(480, 640)])[0]
"""
)
ORIENTED_BOXES = (
    DETECTION
    + """found = image_processor.post_process_oriented_object_detection(outputs, target_sizes=[(480, 640)])[0]
"""
)
INSTANCES = (
    DETECTION
    + """found = image_processor.post_process_instance_segmentation(outputs, target_sizes=[(480, 640)])[0]
"""
)
BOXES_OF_TRANSFORMERS = (
    "\nimport modeling_vitp  # the backbone, which transformers does not load from a repo: pip install modeling-vitp"
    + BOXES.replace(", trust_remote_code=True", "")
)
MAPS = """
import torch
from transformers import AutoBackbone

backbone = AutoBackbone.from_pretrained("{repo}", trust_remote_code=True)
maps = backbone(torch.zeros(1, 3, 224, 224)).feature_maps
"""
EXAMPLES = {
    "internvl_vision": BACKBONE,
    "vitp": MODEL,
    "internvl": MODEL,
    "vitp_image_classification": CLASSIFICATION,
    "vitp_segmentation": SEGMENTATION,
    "vitp_change_detection": CHANGE_DETECTION,
    "vitp_object_detection": BOXES,
    "vitp_oriented_object_detection": ORIENTED_BOXES,
    "vitp_instance_segmentation": INSTANCES,
    "rt_detr_v2": BOXES_OF_TRANSFORMERS,
    "d_fine": BOXES_OF_TRANSFORMERS,
    "deformable_detr": BOXES_OF_TRANSFORMERS,
}
PIPELINE_TAGS = {
    "vitp": "image-text-to-text",
    "internvl": "image-text-to-text",
    "vitp_image_classification": "image-classification",
    "vitp_segmentation": "image-segmentation",
    "vitp_change_detection": "image-segmentation",
    "vitp_object_detection": "object-detection",
    "vitp_oriented_object_detection": "object-detection",
    "vitp_instance_segmentation": "object-detection",
    "rt_detr_v2": "object-detection",
    "d_fine": "object-detection",
    "deformable_detr": "object-detection",
}


def example(what: str, config: dict[str, Any], files: dict[str, Path | bytes], repo_id: str) -> str:
    """Markdown with code that loads the model from the Hub and runs it."""
    if what == "adapter" and config.get("base_model_name_or_path") is None:
        return (
            "The model that this adapter lies on was composed or built from scratch, and saved nowhere: load the run's "
            "merged model in place of it."
        )
    trust = ", trust_remote_code=True"
    model_type = config.get("model_type")
    code = ADAPTER if what == "adapter" else EXAMPLES.get(model_type, MAPS)
    code = code.format(
        repo=repo_id,
        base=config.get("base_model_name_or_path"),
        trust="" if model_type == "internvl" else trust,
        trust_processor=trust if read_config(files, "preprocessor_config.json").get("auto_map") else "",
    )
    bands = num_bands(config)
    if bands is not None:
        code = code.replace("from PIL import Image", "import numpy as np").replace("zeros(1, 3,", f"zeros(1, {bands},")
        code = code.replace('Image.new("RGB", (640, 480))', f"np.zeros(({bands}, 480, 640), np.uint16)")
    return f"```python\n{code.strip()}\n```"


def num_bands(config: dict[str, Any]) -> int | None:
    """How many bands a model takes, if these are others than red, green and blue."""
    parts = (config, config.get("vision_config") or {}, config.get("backbone_config") or {})
    return next((len(part["band_names"]) for part in parts if part.get("band_names")), None)


def pipeline_tag(what: str, config: dict[str, Any]) -> str:
    if what == "adapter":
        return "image-text-to-text"
    return PIPELINE_TAGS.get(config.get("model_type"), "image-feature-extraction")


def read_config(files: dict[str, Path | bytes], name: str) -> dict[str, Any]:
    """A configuration among the files that are pushed; empty if there is none."""
    content = files.get(name, b"{}")
    return json.loads(content if isinstance(content, bytes) else content.read_bytes())
