"""Draw the picture of the README: patch features of the quickstart's ViT beside those of random weights.

    python -m lab.data.draw_components [--output docs/images/components.png]

The image is one of the split `test` of `lab/data/aerial_trees`, enlarged to 448 pixels, which is 56 x 56 patches.
The three colors are the first three principal components of the patch features of each ViT, by themselves. Those of the
random weights are rotated so that their colors are as near to those of the trained weights as possible.
"""

import argparse
import tempfile
from pathlib import Path

import numpy as np
from datasets import load_dataset
from PIL import Image, ImageDraw, ImageFont

from modeling_vitp.convert.export import export_backbone
from modeling_vitp.probing.backbones import load_backbone
from modeling_vitp.training.callbacks import component_colors

ROOT = Path(__file__).parents[2]
SAMPLE = Path(__file__).parent / "aerial_trees"
INDEX = 20  # of the image in the split
SIDE, PANEL, TITLE, GAP = 448, 336, 28, 8  # of the input, a panel, its title and the space between panels, in pixels


def draw(image: Image.Image) -> Image.Image:
    """Return the image, the components of the trained ViT and those of random weights, side by side."""
    with tempfile.TemporaryDirectory() as folder:
        exported = Path(folder) / "backbone"
        export_backbone(ROOT / "space" / "quickstart", exported)
        backbones = load_backbone(str(exported)), load_backbone(str(exported), random_seed=0)
        size = {"height": SIDE, "width": SIDE}
        pixels = backbones[0].image_processor(image, size=size, return_tensors="pt")["pixel_values"]
        # The folder keeps the components of the first backbone, to which those of the second are rotated.
        colors = [component_colors([one.maps(pixels)[0].permute(2, 0, 1)], Path(folder))[0] for one in backbones]
    titles = ("aerial image", "ViT of the quickstart", "the same ViT, random weights")
    panels = [image, *(Image.fromarray(np.ascontiguousarray(one)) for one in colors)]
    picture = Image.new("RGB", (3 * PANEL + 2 * GAP, PANEL + TITLE), "white")
    for number, (panel, title) in enumerate(zip(panels, titles)):
        left = number * (PANEL + GAP)
        picture.paste(panel.resize((PANEL, PANEL), Image.Resampling.NEAREST), (left, TITLE))
        where = left + PANEL // 2, TITLE // 2
        ImageDraw.Draw(picture).text(where, title, "black", ImageFont.load_default(15), anchor="mm")
    return picture


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "images" / "components.png")
    args = parser.parse_args(argv)
    image = load_dataset(str(SAMPLE), split="test")[INDEX]["image"].convert("RGB")
    args.output.parent.mkdir(parents=True, exist_ok=True)
    draw(image).quantize(256, dither=Image.Dither.NONE).save(args.output, optimize=True)
    print(f"Picture: {args.output}")


if __name__ == "__main__":
    main()
