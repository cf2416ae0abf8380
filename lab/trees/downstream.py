"""Tree task of experiments: subsets of labels, fine-tuning and probes of a backbone."""

import logging
import shutil
import tempfile
from collections.abc import Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset, DatasetDict, load_dataset
from tqdm import tqdm
from transformers import set_seed

from lab.command import find_config, run_module
from lab.data.build_aerial_trees import FEATURES, cut
from lab.data.build_tree_masks import check_apart, row_boxes, write_test, write_train
from lab.experiments.arguments import ExperimentArguments, TreeFinetuningPlan, slug
from lab.experiments.variants import Experiment, claimed, key, progress_of
from modeling_vitp.adaptation.runs import remove_weights
from modeling_vitp.command.paths import read_yaml
from modeling_vitp.evaluation.gains import DEPTHS, gains_of, load_backbones, measure_gains
from modeling_vitp.images.corruptions import SEVERITIES, CorruptedImages
from modeling_vitp.images.pixels import ColorJitter
from modeling_vitp.probing.backbones import Backbone, extract_maps, load_backbone
from modeling_vitp.probing.few_labels import FewLabels
from modeling_vitp.tasks.segmentation.probe import SegmentationProbe, single_image

from .evaluation import PROBE_VIEWS, SCORED, probe_backbone, write_probe_data

logger = logging.getLogger(__name__)
SCORE = "test_iou/tree"
TREES_TOLERANCE = 0.2  # relative tolerance of the share of trees in a subset of windows
SCENE_CROP = 200  # pixels of the crops of a training scene that an arm leaves out: a quarter of a small scene


class Downstream:
    """Subsets of labels and further scores for [`~lab.experiments.variants.Experiment`]."""

    def __init__(self, args: ExperimentArguments):
        self.args = args

    @cached_property
    def splits(self) -> DatasetDict:
        return load_dataset(read_yaml(self.args.base)["dataset_name"])

    def write_labeled(
        self,
        dataset_name: str,
        seed: int,
        folder: Path,
        label_share: float = 1.0,
        without_scenes: Sequence[str] = (),
    ) -> None:
        splits = load_dataset(dataset_name)
        rows = labeled_rows(rows_without(splits["train"], without_scenes), label_share, seed)
        write_splits({**splits, "train": rows}, folder)

    def score(self, experiment: Experiment, arm: str, seed: int, folder: Path) -> dict[str, Any]:
        args, found = self.args, {}
        scenes = (args.arms[arm] or {}).get("without_scenes")
        if scenes:
            found["other_scenes"] = progress_of(folder).result(
                "other_scenes", lambda: self.other_scenes(folder, seed, scenes)
            )
        if isinstance(args.finetuning, TreeFinetuningPlan):
            found["finetuning"] = self.fine_tune_all(experiment, arm, seed, folder)
        if args.probe_label_shares:
            name = "_".join(["probe", *(key("labels", share) for share in args.probe_label_shares)])
            found["probe"] = progress_of(folder).result(name, lambda: self.few_labels(folder, seed))
        if args.corruption_severities:
            name = "_".join(["corruptions", *map(str, args.corruption_severities)])
            found["corruptions"] = progress_of(folder).result(name, lambda: self.corruptions(folder, seed))
        if args.probe_color_jitter is not None:
            jitter = ColorJitter(**args.probe_color_jitter)
            probe = partial(probe_backbone, self.splits, folder, seed, "cpu", jitter)
            found["color_probe"] = progress_of(folder).result(f"color_probe_{jitter}", probe)
        return found

    def fine_tune_all(self, experiment: Experiment, arm: str, seed: int, folder: Path) -> dict:
        """Return the IoU of trees by layer-wise decay and share of labels, both in percent, and the `rates`.

        The learning rate of each arm and decay is chosen on held-out training ground that neither the pretraining nor
        the fine-tuning of the choice has used. The last checkpoint is scored once on the test split.
        """
        rates = experiment.tuning(arm, lambda: self.tune(experiment, arm))["chosen"]
        found = {"rates": rates}
        for decay in self.args.finetuning.layer_decays:
            of_decay = found[key("layer_decay", decay)] = {}
            for share in self.args.finetuning.label_shares:
                rows = labeled_rows(self.splits["train"], share, seed)
                rate = rates[key("layer_decay", decay)]
                name = f"{key('labels', share)}_rate_{rate:g}_{key('layer_decay', decay)}"
                iou = self.fine_tune(folder, name, rows, self.splits["test"], seed, rate, decay)
                of_decay[key("labels", share)] = iou
        return found

    def tune(self, experiment: Experiment, arm: str) -> dict[str, Any]:
        """Choose the learning rate of an arm for each layer-wise decay; return `chosen` and all results as `tried`."""
        plan = self.args.finetuning
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
                    name = f"rate_{rate:g}_{key('layer_decay', decay)}"
                    of_decay[rate] = self.fine_tune(folder, name, rows, held_out, plan.seed, rate, decay)
                    tried.append({"layer_decay": decay, "learning_rate": rate, "iou": of_decay[rate]})
                chosen[key("layer_decay", decay)] = max(of_decay, key=of_decay.get)
        return {"chosen": chosen, "tried": tried}

    def fine_tune(
        self, folder: Path, name: str, rows: Dataset, scored: Dataset, seed: int, rate: float, decay: float
    ) -> float:
        """Fine-tune the backbone of a run on the masks of `rows` and return the IoU of trees on the `scored` rows."""
        output = folder / "finetuning" / name

        def run() -> float:
            data, config = output / "data", read_yaml(find_config(self.args.finetuning.config))
            write_train(rows, data / "train")
            write_test(scored, data / "test")
            settings = {"data": config["data"] | {"root": str(data)}, "seed": seed, "learning_rate": rate}
            settings |= {"layer_decay": decay, "model_name_or_path": str(folder / "backbone"), "num_pictures": 0}
            metrics = run_module("modeling_vitp.recipes.finetune_segmentation", config | settings, output)
            remove_weights(output)
            shutil.rmtree(data)
            return metrics["test"][SCORE]

        iou = progress_of(folder).result(f"finetuning/{name}", run)
        logger.info("Rate %g, layer-wise decay %g: IoU of trees %.3f (%s)", rate, decay, iou, output)
        return iou

    def other_scenes(self, folder: Path, seed: int, scenes: Sequence[str]) -> dict[str, dict]:
        """Return the scores of probes on the second scene and on training scenes that the run has left out.

        Returns:
            Results by scene, see [`~modeling_vitp.evaluation.gains.measure_gains`], of probes that are fitted on the
            training rows. `fitted_there` has `scores` and `gains` of probes that are fitted on one half of the scene
            and scored on the other, averaged over both halves.
        """
        train = self.splits["train"]
        there = {"second_scene": self.splits["second_scene"], **{name: crops_of(train, name) for name in scenes}}
        halves = {name: (f"{name}_left", f"{name}_right") for name in there}
        parts = {half: rows for name in there for half, rows in zip(halves[name], halves_of(there[name]))}
        output = folder / "other_scenes"
        data = write_probe_data({"train": rows_without(train, scenes), **there, **parts}, output / "data", seed)
        backbones = load_backbones(folder / "backbone", folder / "backbone_at_start", seed)
        probe = partial(measure_gains, data, backbones=backbones, folder=output)
        found = probe("train", *there)
        for name, (left, right) in halves.items():
            folds = probe(left, right)[right]["scores"], probe(right, left)[left]["scores"]
            scores = {
                arm: {
                    depth: {"patch_auc": float(np.mean([fold[arm][depth]["patch_auc"] for fold in folds]))}
                    for depth in of_arm
                }
                for arm, of_arm in folds[0].items()
            }
            found[name]["fitted_there"] = {"scores": scores, "gains": gains_of(scores)}
        return found

    def few_labels(self, folder: Path, seed: int) -> dict[str, dict[str, dict[str, float]]]:
        """Return the patch AUC by split, share of labeled windows and probe."""
        trees = [len(boxes) for boxes in self.splits["train"]["boxes"]]
        draws, found = {}, {}
        for share in self.args.probe_label_shares:
            windows = np.array(label_subset(trees, share, seed))
            draws[share] = [(windows[:, None] * PROBE_VIEWS + np.arange(PROBE_VIEWS)).ravel()]
        tasks, backbone = self.frozen(folder, seed)
        with tempfile.TemporaryDirectory(dir=folder) as features:
            heads = tasks["test"].fit(backbone, draws, None, Path(features))
            for split, task in tasks.items():
                of_split = found[split] = {key("labels", share): {} for share in draws}
                for (probe, share), draw in task.score(heads, backbone, None, Path(features)).items():
                    of_split[key("labels", share)][probe] = draw[0]["patch_auc"]
        return found

    def corruptions(self, folder: Path, seed: int) -> dict[str, dict[str, dict]]:
        """Return the result of [`probe_robustness`] on the test split."""
        tasks, backbone = self.frozen(folder, seed)
        return probe_robustness(tasks["test"], backbone, self.args.corruption_severities, seed, folder)

    def frozen(self, folder: Path, seed: int) -> tuple[dict[str, SegmentationProbe], Backbone]:
        """Return the probe of each split and the frozen backbone of a run."""
        set_seed(seed)
        data = write_probe_data(self.splits, folder / "probe" / "data", seed)
        backbone = load_backbone(str(folder / "backbone"))
        depths = min(DEPTHS, backbone.model.config.num_hidden_layers)
        tasks = {split: SegmentationProbe(data, {"train": "train", "test": split}, 1e-2, depths) for split in SCORED}
        return tasks, backbone


def rows_without(train: Dataset, scenes: Sequence[str]) -> Dataset:
    """Return the rows of all other scenes.

    Raises:
        ValueError: if the rows have no such scene.
    """
    found = train["scene"]
    if unknown := set(scenes) - set(found):
        raise ValueError(f"without_scenes: unknown scenes {sorted(unknown)}. Found: {sorted(set(found))}.")
    return train.select([index for index, scene in enumerate(found) if scene not in scenes])


def crops_of(train: Dataset, scene: str) -> Dataset:
    """Return crops of `SCENE_CROP` pixels, side by side, of a scene that is one row.

    Raises:
        ValueError: if the scene has several rows, which may overlap.
    """
    rows = train.select([index for index, name in enumerate(train["scene"]) if name == scene])
    if len(rows) > 1:
        raise ValueError(f"without_scenes: expected a scene of one row, got {scene!r} with {len(rows)}.")
    image, boxes = rows[0]["image"], rows[0]["boxes"]
    return Dataset.from_list(cut(image, boxes, scene, (0, 0, *image.size), SCENE_CROP, SCENE_CROP), features=FEATURES)


def halves_of(rows: Dataset) -> tuple[Dataset, Dataset]:
    """Return the rows in the left and in the right half of their scene, which must not overlap."""
    centers = np.array([left + right for _, (left, _, right, _) in row_boxes(rows)])
    is_left = centers < (centers.min() + centers.max()) / 2
    halves = rows.select(np.flatnonzero(is_left)), rows.select(np.flatnonzero(~is_left))
    check_apart(*halves)
    return halves


def split_held_out(train: Dataset, scene: str, top: int) -> tuple[Dataset, Dataset]:
    """Return the rows above `top` (and those of other scenes), and the held-out rows of the scene below `top`."""
    where = row_boxes(train)
    rows = [index for index, (name, box) in enumerate(where) if name != scene or box[3] <= top]
    held_out = [index for index, (name, box) in enumerate(where) if name == scene and box[1] >= top]
    if not rows or not held_out:
        raise ValueError(
            f"held_out_top={top} of {scene!r} gives {len(rows)} training and {len(held_out)} held-out windows. Both "
            "must be positive."
        )
    return train.select(rows), train.select(held_out)


def label_subset(trees: Sequence[int], share: float, seed: int) -> list[int]:
    """Draw a share of the windows that has about the same share of the trees and return their indices.

    The number of trees in a window varies from zero to dozens, so a random tenth of the windows may have no tree.

    Args:
        trees: number of trees in each window.
        share: share of the windows, in (0, 1].
        seed: seed of the draw.
    """
    generator = np.random.default_rng(seed)
    for _ in range(10_000):
        chosen = np.sort(generator.permutation(len(trees))[: max(round(share * len(trees)), 1)]).tolist()
        if abs(sum(trees[index] for index in chosen) / sum(trees) - share) <= TREES_TOLERANCE * share:
            return chosen
    raise ValueError(f"label_shares: found no {share:.0%} of the windows with about that share of the trees.")


def labeled_rows(rows: Dataset, share: float, seed: int) -> Dataset:
    """Return the rows of [`label_subset`]."""
    return rows.select(label_subset([len(boxes) for boxes in rows["boxes"]], share, seed))


def write_splits(splits: dict[str, Dataset], folder: Path) -> str:
    """Write splits with their images for `load_dataset` and return the folder. An existing folder is complete."""
    if not folder.is_dir():
        written = folder.with_name(f"{folder.name}_writing")
        shutil.rmtree(written, ignore_errors=True)
        (written / "data").mkdir(parents=True)
        for name, rows in splits.items():
            rows.to_parquet(written / "data" / f"{name}-00000-of-00001.parquet")
        written.rename(folder)
    return str(folder)


class CorruptedProbe(SegmentationProbe):
    """Probe of 8-bit RGB images with corrupted test images.

    Features are stored by backbone and corruption: their folder must be of one task.

    Args:
        task: probe with clean images.
        corruption, severity, seed: see [`~modeling_vitp.images.corruptions.CorruptedImages`].
    """

    def __init__(self, task: SegmentationProbe, corruption: str, severity: int, seed: int):
        vars(self).update(vars(task))
        self.corruption = corruption, severity, seed
        self.samples = {**task.samples, "test": CorruptedImages(task.samples["test"], *self.corruption)}

    def features(self, backbone: Backbone, role: str, image_size: int | None, folder: Path, **loading) -> np.ndarray:
        """Return the patch tokens of a split, `train` or `test`, float32 `(images, rows, columns, width)`."""
        samples, key = self.samples[role], f"{role} {self.corruption}"
        read = partial(single_image, samples)
        return extract_maps(backbone, len(samples), read, self.depths, image_size, key, folder, **loading)


def probe_robustness(
    task: SegmentationProbe, backbone: Backbone, severities: Sequence[int], seed: int, folder: Path
) -> dict[str, dict[str, dict]]:
    """Return the scores of probes of a frozen backbone, fitted once, on clean and on corrupted test images.

    Args:
        task: probing task.
        backbone: frozen backbone.
        severities: severities of each corruption, from 1 to 5.
        seed: seed of the corruptions: noise, clouds, gaps, directions.
        folder: folder for temporary feature files.

    Returns:
        Scores by probe and score name (`patch_auc`, `mean_iou`): `clean`; `corruptions`, the mean over the severities
        of each corruption; `average`, the mean over the corruptions; and `relative`, `average` divided by `clean`.
    """
    labels = FewLabels(share=1.0)
    draws = {labels: [np.arange(len(task.samples["train"]))]}
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as features:
        heads = task.fit(backbone, draws, None, Path(features))

        def score(task: SegmentationProbe) -> dict[str, dict[str, float]]:
            return {probe: draw[0] for (probe, _), draw in task.score(heads, backbone, None, Path(features)).items()}

        clean, corrupted = score(task), {}
        for name in tqdm(SEVERITIES, desc=f"{backbone.name}, corruptions"):
            corrupted[name] = [score(CorruptedProbe(task, name, severity, seed)) for severity in severities]

    def summarize(probe: str, shown: str) -> dict:
        whole = clean[probe][shown]
        means = {name: float(np.mean([one[probe][shown] for one in scores])) for name, scores in corrupted.items()}
        average = float(np.mean(list(means.values())))
        return {"clean": whole, "average": average, "relative": average / whole, "corruptions": means}

    return {probe: {shown: summarize(probe, shown) for shown in ("patch_auc", "mean_iou")} for probe in clean}
