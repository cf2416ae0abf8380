"""Entry point of the processes of `torchrun dense_run.py CONFIG`, which run the segmentation recipe."""

import sys

from modeling_vitp.recipes.finetune_segmentation import main

if __name__ == "__main__":
    sys.exit(main(["--config", sys.argv[1]]))
