"""What each process of `torchrun dense_run.py CONFIG` does: the segmentation recipe, as from the command line."""

import sys

from modeling_vitp.recipes.finetune_segmentation import main

if __name__ == "__main__":
    sys.exit(main(["--config", sys.argv[1]]))
