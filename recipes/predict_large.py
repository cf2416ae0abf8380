"""Classes of every pixel of an image of any size, by a model fine-tuned for segmentation or change detection.

    vitp predict_large my_model scene.tif --output classes.tif
    vitp predict_large my_change_model before.tif after.tif --output changes.tif --probabilities p.tif

Started again, a run that was stopped goes on where it was.
"""

import argparse

from modeling_vitp.training.command_line import find_config, parse_words, run
from modeling_vitp.training.values import positive, within


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder or Hub id of the model with its image processor")
    parser.add_argument("images", nargs="+", help="GeoTIFF or PNG; for change detection two, before and after")
    parser.add_argument("--output", required=True, help="GeoTIFF of class indices to write")
    parser.add_argument("--probabilities", help="GeoTIFF of the classes' probabilities to write, too")
    parser.add_argument("--classes", help="configuration of the fine-tuning (YAML), for the colours of the classes")
    parser.add_argument("--window", type=positive, default=512, help="height and width of what the model sees at once")
    parser.add_argument("--stride", type=positive, default=384, help="from one window to the next; at most the window")
    parser.add_argument("--batch_size", type=positive, default=4, help="windows that are predicted together")
    parser.add_argument(
        "--scales", type=within("(0, inf)", float), nargs="+", default=[1.0], help="of test-time augmentation"
    )
    parser.add_argument("--flip", action="store_true", help="predict mirror images, too")
    parser.add_argument("--device", help="the accelerator if there is one")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32", help="of the model")
    args = vars(parse_words(parser, argv))

    import torch
    import yaml
    from transformers import AutoConfig, AutoImageProcessor

    from modeling_vitp import ViTPForChangeDetection, ViTPForSemanticSegmentation, predict_large
    from modeling_vitp.dense.classes import LabelEncoding

    models = {model.config_class.model_type: model for model in (ViTPForSemanticSegmentation, ViTPForChangeDetection)}
    name, device = args.pop("model"), args.pop("device")
    config = AutoConfig.from_pretrained(name)
    if config.model_type not in models:
        raise ValueError(f"{name} is a {config.model_type}; {' or '.join(models)} is needed.")
    model = (
        models[config.model_type]
        .from_pretrained(name, dtype=args.pop("dtype"))
        .to(device or torch.accelerator.current_accelerator() or "cpu")
    )
    classes = args.pop("classes")
    if classes is not None:
        data = yaml.safe_load(find_config(classes).read_text())["data"]
        args["colors"] = LabelEncoding(data["classes"]).palette.tolist()
    predict_large(model, AutoImageProcessor.from_pretrained(name), **args)
    print(f"The classes are in {args['output']}")
    return 0


if __name__ == "__main__":
    run(main)
