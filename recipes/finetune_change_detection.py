"""Change detection from a pretrained backbone, on pairs of images of the same ground.

    python recipes/finetune_change_detection.py --config recipes/configs/levir_cd.yaml --model_name_or_path my_backbone

As finetune_segmentation.py, with one backbone for both images of a pair and the scores of the change class.
"""

import sys

from modeling_vitp import ViTPForChangeDetection
from modeling_vitp.recipes.finetune_segmentation import main

if __name__ == "__main__":
    sys.exit(main(model_class=ViTPForChangeDetection, metric="change_detection"))
