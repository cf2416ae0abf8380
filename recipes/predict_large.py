"""What a fine-tuned model sees in an image of any size: classes of every pixel, changes, or objects.

    vitp predict_large my_model scene.tif --output classes.tif
    vitp predict_large my_change_model before.tif after.tif --output changes.tif --probabilities p.tif
    vitp predict_large my_detector scene.tif --output objects.geojson

Started again, a run that was stopped goes on where it was.
"""

import argparse

from modeling_vitp.training.command_line import find_config, parse_words, run
from modeling_vitp.training.values import positive, within

MAPS = {"probabilities", "classes", "scales", "flip"}  # options of the models that label every pixel
OBJECTS = {"threshold", "nms_threshold"}  # and of those that find objects


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, argument_default=argparse.SUPPRESS
    )
    parser.add_argument("model", help="folder or Hub id of the model with its image processor")
    parser.add_argument("images", nargs="+", help="GeoTIFF or PNG; for change detection two, before and after")
    parser.add_argument(
        "--output", required=True, help="GeoTIFF of class indices to write; of objects .geojson, or .json (COCO)"
    )
    parser.add_argument(
        "--window",
        type=positive,
        help="side of what the model sees at once: 512; of detectors what they were trained at",
    )
    parser.add_argument(
        "--stride", type=positive, help="from one window to the next: 384; of detectors 3/4 of the window"
    )
    parser.add_argument("--batch_size", type=positive, help="windows that are predicted together: 4")
    parser.add_argument("--device", default=None, help="the accelerator if there is one")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32", help="of the model")
    maps = parser.add_argument_group("segmentation and change detection")
    maps.add_argument("--probabilities", help="GeoTIFF of the classes' probabilities to write, too")
    maps.add_argument("--classes", help="configuration of the fine-tuning (YAML), for the colours of the classes")
    maps.add_argument("--scales", type=within("(0, inf)", float), nargs="+", help="of test-time augmentation: 1")
    maps.add_argument("--flip", action="store_true", help="predict mirror images, too")
    objects = parser.add_argument_group("detection")
    share = within("[0, 1]", float)
    objects.add_argument("--threshold", type=share, help="objects have a higher score: 0.3")
    objects.add_argument(
        "--nms_threshold", type=share, help="up to which objects of a class may overlap: the model's, or 0.5"
    )
    args = vars(parse_words(parser, argv))

    import torch
    import yaml
    from transformers import AutoConfig, AutoImageProcessor

    from modeling_vitp import ViTPForChangeDetection, ViTPForSemanticSegmentation, detect_large, predict_large
    from modeling_vitp.dense.classes import LabelEncoding
    from modeling_vitp.detection.one_stage import DETECTORS
    from modeling_vitp.detection.start import MODELS

    detectors = {*MODELS.values(), *(model for model, _ in DETECTORS.values())}
    known = (ViTPForSemanticSegmentation, ViTPForChangeDetection, *detectors)
    models = {model.config_class.model_type: model for model in known}
    name, device = args.pop("model"), args.pop("device")
    config = AutoConfig.from_pretrained(name)
    if config.model_type not in models:
        raise ValueError(
            f"{name} is a {config.model_type}: fine-tune it first; {', '.join(sorted(models))} can be used."
        )
    model_class = models[config.model_type]
    is_detector = model_class in detectors
    foreign = sorted((MAPS if is_detector else OBJECTS) & args.keys())
    if foreign:
        raise ValueError(f"--{foreign[0]} is no option for {name}, which is a {config.model_type}.")
    if is_detector and len(args["images"]) != 1:
        raise ValueError(f"{model_class.__name__} takes 1 image(s), but {len(args['images'])} given.")
    model = model_class.from_pretrained(name, dtype=args.pop("dtype")).to(
        device or torch.accelerator.current_accelerator() or "cpu"
    )
    image_processor = AutoImageProcessor.from_pretrained(name)
    images, output = args.pop("images"), args.pop("output")
    if is_detector:
        detect_large(model, image_processor, images[0], output, **args)
        print(f"The objects are in {output}")
        return 0
    if "classes" in args:
        data = yaml.safe_load(find_config(args.pop("classes")).read_text())["data"]
        args["colors"] = LabelEncoding(data["classes"]).palette.tolist()
    predict_large(model, image_processor, images, output, **args)
    print(f"The classes are in {output}")
    return 0


if __name__ == "__main__":
    run(main)
