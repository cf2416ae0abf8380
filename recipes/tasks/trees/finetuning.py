"""Tree crowns fine-tuned from the backbones of an experiment, the learning rate chosen on held-out training ground."""

import logging
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset, DatasetDict

from modeling_vitp.evaluation.comparison import once
from modeling_vitp.recipes import finetune_segmentation
from modeling_vitp.recipes.data.build_tree_masks import write_test, write_train
from modeling_vitp.recipes.experiments.arguments import FinetuningPlan, slug
from modeling_vitp.recipes.experiments.variants import Experiment, claimed

from .labels import labelled_rows, split_held_out, write_splits

logger = logging.getLogger(__name__)
SCORE = "test_iou/tree"


@dataclass
class Finetuning:
    """The fine-tunings of an experiment.

    For each layer-wise decay, an arm has the rate that is best on a part of the training ground that neither its
    pretraining nor its fine-tuning saw: backbones are pretrained for that on the rest. With it, and the masks of each
    share of the windows, the backbone of each seed is fine-tuned. The last checkpoint is scored, once, on the test.
    """

    plan: FinetuningPlan
    splits: DatasetDict

    def scores(self, experiment: Experiment, arm: str, seed: int, folder: Path) -> dict:
        """By layer-wise decay and share of the labels, both in percent, the IoU of the trees; and the `rates`."""
        rates = experiment.tuning(arm, lambda: self.tune(experiment, arm))["chosen"]
        found = {"rates": rates}
        for decay in self.plan.layer_decays:
            of_decay = found[key("layer_decay", decay)] = {}
            for share in self.plan.label_shares:
                rows = labelled_rows(self.splits["train"], share, seed)
                rate = rates[key("layer_decay", decay)]
                name = f"{key('labels', share)}_rate_{rate:g}_{key('layer_decay', decay)}"
                output = folder / "finetuning" / name
                iou = self.finetune(folder / "backbone", rows, self.splits["test"], seed, rate, decay, output)
                of_decay[key("labels", share)] = iou
        return found

    def tune(self, experiment: Experiment, arm: str) -> dict[str, Any]:
        """The learning rate of an arm that is `chosen` for each layer-wise decay, and all that were `tried`."""
        plan = self.plan
        rows, held_out = split_held_out(self.splits["train"], plan.held_out_scene, plan.held_out_top)
        tuning = experiment.folder / "tuning"
        folder = tuning / slug(arm)
        chosen, tried = {}, []
        with claimed(folder):
            data = write_splits({"train": rows, "test": held_out, "second_scene": held_out}, tuning / "held_out")
            experiment.train(arm, plan.seed, folder, dataset_name=data)
            for decay in plan.layer_decays:
                of_decay = {}
                for rate in plan.learning_rates:
                    output = folder / "finetuning" / f"rate_{rate:g}_{key('layer_decay', decay)}"
                    start = folder / "backbone"
                    of_decay[rate] = self.finetune(start, rows, held_out, plan.seed, rate, decay, output)
                    tried.append({"layer_decay": decay, "learning_rate": rate, "iou": of_decay[rate]})
                chosen[key("layer_decay", decay)] = max(of_decay, key=of_decay.get)
        return {"chosen": chosen, "tried": tried}

    def finetune(
        self, backbone: Path, rows: Dataset, scored: Dataset, seed: int, rate: float, decay: float, output: Path
    ) -> float:
        """The IoU of trees on the rows that are scored, of a model that is trained on the masks of `rows`."""

        def run() -> None:
            data = output / "data"
            write_train(rows, data / "train")
            write_test(scored, data / "test")
            settings = {"output_dir": output, "data_root": data, "seed": seed, "learning_rate": rate}
            settings |= {"layer_decay": decay, "model_name_or_path": backbone, "num_pictures": 0}
            options = [str(part) for name, value in settings.items() for part in (f"--{name}", value)]
            finetune_segmentation.main(["--config", self.plan.config, *options])
            (output / "model.safetensors").unlink()
            shutil.rmtree(data)

        iou = once(output, run)["test"][SCORE]
        logger.info("Rate %g, layer-wise decay %g: IoU of trees %.3f (%s)", rate, decay, iou, output)
        return iou


def key(name: str, share: float) -> str:
    """As `labels_10` for a tenth of them, so that a measure can name it."""
    return f"{name}_{round(100 * share)}"
