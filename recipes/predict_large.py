"""Predict classes, changes or objects in an image or a volume of any size with a fine-tuned model.

    vitp predict_large my_model scene.tif --output classes.tif
    vitp predict_large my_change_model before.tif after.tif --output changes.tif --probabilities p.tif
    vitp predict_large my_detector scene.tif --output objects.geojson
    vitp predict_large my_organs ct.nii.gz --output organs.nii.gz

If an interrupted command is started again, the prediction resumes.
"""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

import vitp_command
from modeling_vitp.command.paths import read_section
from modeling_vitp.command.settings import (
    Percentile,
    PositiveFloat,
    PositiveInt,
    Probability,
    option_type,
    read_mapping,
)
from modeling_vitp.training.arguments import shard
from modeling_vitp.training.command_line import load_plugins, parse_words

if TYPE_CHECKING:
    from modeling_vitp.auto.registry import ModelEntry

# Options by the type of the model and its input.
FOR = {
    "images": {"input_spec", "probabilities", "classes", "scales", "flip"},
    "volumes": {"probabilities", "plane", "intensities", "percentiles", "scales", "flip"},
    "objects": {"input_spec", "threshold", "nms_threshold"},
}
PREDICT = {"images": "predict_large", "volumes": "predict_volume", "objects": "detect_large"}


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, argument_default=argparse.SUPPRESS
    )
    add = parser.add_argument
    add("model", help="Folder or Hub id of the model with its image processor.")
    add(
        "images", nargs="+", help="GeoTIFF or PNG, two for changes (before, after); NIfTI, or folder of a DICOM series."
    )
    add("--output", required=True, help="Output file: GeoTIFF, NIfTI of volumes; objects: .geojson or .json (COCO).")
    add(
        "--window",
        type=option_type(PositiveInt),
        help="Side of the sliding window in pixels: 512; for detectors, the image size of training.",
    )
    add("--stride", type=option_type(PositiveInt), help="Stride of the sliding window in pixels: 3/4 of the window.")
    add("--batch_size", type=option_type(PositiveInt), help="Number of windows per batch: 4.")
    add("--device", default=None, help="Device of the model: by default the accelerator, or cpu without one.")
    add("--dtype", choices=("float32", "bfloat16", "float16"), default="float32", help="Dtype of the model: float32.")
    add("--shard", type=shard, default=None, metavar="I/N", help="Predict only part I of N parts of the image.")
    add("--plugins", nargs="+", default=[], help="Python files that register the model's decode head.")
    add("--input_spec", help="Input spec of the images as JSON: by default that of the training.")
    add = parser.add_argument_group("segmentation and change detection").add_argument
    add("--probabilities", help="Second output file, with the probabilities of the classes.")
    add("--classes", help="Configuration of the fine-tuning (YAML) with the colors of the classes, for images.")
    add("--scales", type=option_type(PositiveFloat), nargs="+", help="Scales of test-time augmentation: 1.")
    add("--flip", action="store_true", help="Test-time augmentation with horizontal flips.")
    add = parser.add_argument_group("volumes").add_argument
    add("--plane", choices=("axial", "coronal", "sagittal"), help="Plane of the slices: by default as in training.")
    add("--intensities", type=float, nargs=2, help="Intensities shown as black and white: by default as in training.")
    add(
        "--percentiles",
        type=option_type(Percentile),
        nargs=2,
        help="Percentiles of the volume shown as black and white.",
    )
    add = parser.add_argument_group("detection").add_argument
    add("--threshold", type=option_type(Probability), help="Score that objects must exceed: 0.3.")
    add(
        "--nms_threshold",
        type=option_type(Probability),
        help="Maximum IoU of two objects of a class: the model's, or 0.5.",
    )
    return parse_words(parser, argv)


def main(argv: list[str] | None = None) -> int:
    args = vars(parse_arguments(argv))

    import transformers
    from transformers import AutoImageProcessor

    load_plugins(args.pop("plugins"))
    import modeling_vitp
    from modeling_vitp.opening import open_config, without_remote_code
    from modeling_vitp.training.config import default_device

    name = args.pop("model")
    images = args.pop("images")
    output = args.pop("output")
    device = args.pop("device")
    config = open_config(name)
    entry = registered_model(name, config.model_type)
    is_detector = entry.pipeline_tag == "object-detection"
    kind = kind_of_input(images, is_detector)
    check_options(args, kind, name, config.model_type)
    if "classes" in args:
        args["colors"] = read_colors(args.pop("classes"), config.num_labels)
    if is_detector and len(images) != 1:
        raise ValueError(f"{name} takes 1 image, got {len(images)}.")

    model_class = getattr(transformers, entry.auto_class)
    model = without_remote_code(model_class.from_pretrained, name, dtype=args.pop("dtype"))
    model = model.to(device or default_device())
    image_processor = without_remote_code(AutoImageProcessor.from_pretrained, name)
    if "input_spec" in args:
        if not hasattr(image_processor, "with_input_spec"):
            raise ValueError(f"--input_spec is not an option for {name}, which reads only 8-bit RGB.")
        input_spec = read_mapping("input_spec", args.pop("input_spec"))
        image_processor = image_processor.with_input_spec(input_spec)

    predict = getattr(modeling_vitp, PREDICT[kind])
    predict(model, image_processor, images[0] if is_detector else images, output, **args)
    result = f"The {'objects' if is_detector else 'classes'} are in {output}"
    print(result if args["shard"] is None else args["shard"].hint(f"part of {output}"))
    return 0


def registered_model(name: str, model_type: str) -> "ModelEntry":
    """Return the registry's entry of a model for segmentation or detection; other models are an error."""
    from modeling_vitp.auto.registry import MODELS

    dense_models = {}
    for registered_type, entry in MODELS.items():
        if entry.pipeline_tag in ("image-segmentation", "object-detection"):
            dense_models[registered_type] = entry
    if model_type not in dense_models:
        if model_type == "vitp_image_classification":
            advice = "Use transformers' image-classification pipeline"
        else:
            advice = "Fine-tune it first"
        raise ValueError(f"{name} is a {model_type!r}. Expected {', '.join(sorted(dense_models))}. {advice}.")
    return dense_models[model_type]


def kind_of_input(images: list[str], is_detector: bool) -> str:
    """Return the key of the options and of the function for a model and its images."""
    from modeling_vitp.images.volumes import is_volume

    if is_detector:
        return "objects"
    has_volume = any(is_volume(Path(image)) for image in images)
    return "volumes" if has_volume else "images"


def check_options(args: dict[str, Any], kind: str, name: str, model_type: str) -> None:
    """Raise a `ValueError` for the first option of another kind of input."""
    all_options = set().union(*FOR.values())
    foreign_options = all_options - FOR[kind]
    for option in sorted(foreign_options):
        if option in args:
            reason = f"which is a {model_type!r}" if kind == "objects" else f"which predicts {kind}"
            raise ValueError(f"--{option} is not an option for {name}, {reason}.")


def read_colors(config_file: str, num_labels: int) -> list[list[int]]:
    """Return the colors of the classes in the configuration of a fine-tuning."""
    from modeling_vitp.data.classes import LabelEncoding

    data = read_section(config_file, "data")
    colors = LabelEncoding(data.get("classes", ())).palette.tolist()
    if len(colors) != num_labels:
        raise ValueError(f"Expected --classes with {num_labels} classes, got {len(colors)}.")
    return colors


if __name__ == "__main__":
    vitp_command.run(main)
