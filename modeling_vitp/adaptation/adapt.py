"""Adaptation of a ViT to a domain: from labels to a backbone that is compared with its start and with baselines.

[`Adaptation.run`] calls the commands of this package one after the other: `make_instructions`, `pretrain`, `probe`,
`finetune_…`, `evaluate_vlm`. The result of each finished part is kept in `progress.json`, and an unfinished run resumes
from its checkpoint, so that the same command goes on wherever it was stopped.
"""

import importlib
import json
import logging
import math
import os
import shutil
from collections.abc import Sequence
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import PartialState
from datasets import Dataset
from datasets import Image as ImageFeature
from huggingface_hub import snapshot_download
from transformers import AutoModel, PreTrainedConfig, set_seed
from trl import ModelConfig

from ..command.errors import RunStopped, TrainingDiverged, WrongArguments
from ..command.paths import config_of_data
from ..configuration_vitp import ViTPVisionConfig
from ..convert.export import export_backbone
from ..data.layouts import LAYOUTS
from ..evaluation.arguments import VLMArguments
from ..evaluation.comparison import Progress, check_same_settings
from ..evaluation.vlm import choose_questions
from ..image_processing_vitp import ViTPImageProcessor
from ..images.reading import has_8_bits
from ..instructions.answer_prior import LITTLE, check_answer_priors
from ..instructions.dry_run import summarize_sources
from ..instructions.from_annotations.questions import PHRASINGS
from ..instructions.mixture import load_sources
from ..instructions.overlap import TestImages
from ..instructions.rows import SourceSettings
from ..instructions.validation import print_reports, save_reports, validate
from ..metrics.resampling import Score, paired_difference
from ..modeling_vitp import ViTPVisionModel
from ..modeling_vitp_backbone import open_vit_config
from ..pretraining.arguments import SFT_MODULES, PretrainArguments, VRLArguments
from ..pretraining.config import ViTPTrainingConfig
from ..pretraining.loading import check_from_scratch, image_processor_of, tiling, vision_config_of
from ..pretraining.masked_autoencoder import MaskedAutoencoderConfig, mae_steps, train_masked_autoencoder
from ..pretraining.plan import config_of_start, pretraining_operations, print_plan, work_of
from ..training.checkpointing import FolderLock, last_checkpoint, write_whole
from ..training.command_line import load_class, load_plugins, parse
from ..training.results import no_library_bars
from ..vision_towers import pair
from .arguments import ADAPTED, LANGUAGE_MODEL, MAE, RANDOM, START, AdaptArguments
from .bundle import change_texts, write_bundle
from .comparison import Comparison, fine_tuning_settings
from .labels import instructions_digest, labels_digest, median_size, num_windows, read_labels, write_list
from .plan import Costs, choose_batch, choose_samples, choose_steps, choose_tiling, describe_machine
from .report import AdaptationReport
from .runs import describe_seconds, run_command, run_recipe, write_config
from .tasks import TASKS

logger = logging.getLogger(__name__)
EARLY = 0.1  # share of the steps after which the backbone is compared with its start
QUESTIONS = 200  # most questions of the control with other images
PROBED = 1000  # most images or windows of a split whose patch tokens are probed; those of DINOv2-B take 4 MB an image
MEASURED_STEPS = (2, 5)  # steps of the two runs whose difference in time gives the time of a step
OF_START = ("model_name_or_path", "vision_model", "language_model", "from_scratch")  # settings of the pretraining
ALL = "all"  # split of `make_instructions` that stands for all images of a list
STAGES = {
    "instructions": "Making instructions",
    "checks": "Checking the instructions",
    "plan": "Measuring steps",
    "pretraining": "Pretraining",
    "mae": "Training the masked autoencoder",
    "frozen": "Probing frozen backbones",
    "fine_tuning": "Fine-tuning",
    "controls": "Asking about other images",
    "bundle": "Exporting",
}


def adapt(
    data: str | Path,
    start: str | Path | None = None,
    baselines: Sequence[str] = (START, RANDOM),
    budget: str = "24h",
    output_dir: str | Path = "outputs/adaptation",
    **settings: Any,
) -> AdaptationReport:
    """Adapt a ViT to the domain of labeled images, and compare it with its start and with baselines.

    A second call with the same arguments goes on where the first was stopped, or returns its report.

    Args:
        data: folder of labeled images, or a configuration, see [`~modeling_vitp.adaptation.labels.read_labels`].
        start: folder or Hub id of the ViT, or of a vision-language model.
        baselines: `"start"`, `"random"`, `"mae"`, and folders or Hub ids of ViTs.
        budget: time for the whole, such as `"24h"`.
        output_dir: folder of all results.
        settings: further fields of [`~modeling_vitp.adaptation.arguments.AdaptArguments`].

    Returns:
        The report with all scores, the verdict and the controls.

    Raises:
        ValueError: if the labels cannot be used, answers follow from their questions, a test image is in the training
            data, or the budget is too short.
        RunStopped: if the backbone is worse than its start after a tenth of the steps.
    """
    start = None if start is None else str(start)
    where = {"data": str(data), "start": start, "output_dir": str(output_dir), "budget": budget}
    return Adaptation(AdaptArguments(baselines=list(baselines), **where, **settings)).run()


class Adaptation:
    """Run of `vitp adapt`, whose methods are its stages.

    Args:
        args: arguments of the command.
    """

    def __init__(self, args: AdaptArguments):
        load_plugins(args.plugins)
        self.args, self.folder = args, Path(args.output_dir)
        self.progress = Progress(self.folder / "progress.json")
        self.lock = FolderLock(self.folder)  # released when this object is deleted
        self.plan: dict[str, Any] = {}
        self.diverged: list[str] = []  # sentences on fine-tunings that are left out
        self.shown = ""  # last line of `begin`

    @no_library_bars()
    def run(self) -> AdaptationReport | None:
        """Run the stages that are left, and return the report; `None` with `dry_run`."""
        args = self.args
        self.check_folders()
        is_new = not self.folder.exists()  # labels that cannot be used leave no folder
        if not is_new:
            self.check_settings()
        self.labels = read_labels(args.data, self.folder / "splits", args.task, args.scene_pattern, args.seed)
        if is_new:
            self.check_settings()
        print(self.labels.how)
        self.parse_fine_tuning()
        if args.instructions is None:
            Path(self.instructions).mkdir(parents=True, exist_ok=True)  # otherwise the next line misses a data set
            self.parse_pretraining({}, 1)  # reports a wrong setting or a missing model before questions are made
            self.begin("instructions")
            for split in ("train", "test"):
                self.progress.result(f"instructions/{split}", lambda split=split: self.make_instructions(split))
            # The controls come last: their errors must not wait for the trainings.
            asked = VLMArguments(**self.control_settings())
            self.progress.result("instructions/asked", lambda: len(choose_questions(asked)[1]))
        self.begin("checks")
        checks = self.progress.result("checks", self.check_instructions)
        if checks["problems"] and not args.force:
            self.progress.forget("checks")  # so that corrected data are checked again
            raise ValueError(" ".join([*checks["problems"], "To go on anyway, add --force."]))
        self.plan = self.make_plan()
        if args.dry_run:
            return None
        self.pretrain()
        self.begin("frozen")
        frozen = self.progress.result("frozen", self.probe_backbones)
        fine_tuned = self.fine_tune_backbones()
        self.begin("controls")
        controls = checks | self.progress.result("controls", self.ask_about_other_images)
        report = self.make_report(frozen, fine_tuned, controls)
        self.begin("bundle")
        self.progress.result("bundle", lambda: self.make_bundle(report))
        return report

    def check_folders(self) -> None:
        """Raise an error, before anything runs, for folders that overlap, or a start or a baseline that is no ViT."""
        if (processes := PartialState().num_processes) > 1:  # most stages run in one process, and would wait for it
            raise ValueError(f"adapt runs in one process, got {processes}. Start it without accelerate launch.")
        data, folder = Path(self.args.data).resolve(), self.folder.resolve()
        if data.is_relative_to(folder) or folder.is_relative_to(data):
            raise ValueError(f"data and output_dir must not contain each other, got {data} and {folder}.")
        for option, path in [("start", self.args.start), *(("baselines", path) for path in self.others)]:
            if path is not None and "/" not in path and not Path(path).exists():
                words = "start, random, mae, or " if option == "baselines" else ""
                raise ValueError(f"{option}: {path!r} not found. Expected {words}a folder or Hub id of a ViT.")
        for path in self.others:
            open_vit_config(path)
        start, language_model = self.pretraining_start(), self.args.language_model
        if language_model not in (None, start.get("language_model")):
            raise ValueError(
                f"language_model must be combined with a ViT as start, got {language_model!r} for the start {start}. "
                "Remove it, or set start to a ViT, without from_scratch in pretraining."
            )
        check_from_scratch(start.get("from_scratch"))
        if "vision_model" in start:
            open_vit_config(start["vision_model"])

    def check_settings(self) -> None:
        """Lock the folder, and check that the settings and the files of the data are those of an earlier call.

        If nothing was trained after the plan of the earlier call, other settings or files begin anew.
        """
        self.lock.acquire()
        left_out = ("dry_run", "force", "output_dir", "budget", "seconds")
        settings = {name: value for name, value in vars(self.args).items() if name not in left_out}
        settings = json.loads(json.dumps(change_texts(settings, absolute_path)))
        settings |= {"data": os.path.abspath(self.args.data), "labels": labels_digest(self.args.data)}
        given = self.args.instructions
        settings["files of instructions"] = None if given is None else instructions_digest(given)
        path = self.folder / "settings.json"
        if path.is_file() and "plan" not in self.progress.parts:
            recorded = json.loads(path.read_text())
            if recorded != settings and recorded.keys() == settings.keys():
                for name in ("splits", "instructions", "validation", "plan", "start", "random"):
                    shutil.rmtree(self.folder / name, ignore_errors=True)
                path.unlink()
                self.progress.path.unlink(missing_ok=True)
        self.progress = Progress(self.progress.path)
        check_same_settings(path, settings)

    def begin(self, stage: str) -> None:
        """Print the stage and the estimated time that is left."""
        number = list(STAGES).index(stage)
        planned = self.plan.get("planned_seconds", {})
        later = [name for name in list(STAGES)[number:] if name in planned]
        left = sum(max(planned[name] - self.progress.seconds(name), 0) for name in later)
        about = f"; about {describe_seconds(left)} left" if planned else ""
        text = f"\n[{number + 1}/{len(STAGES)}] {STAGES[stage]}{about}"
        if text != self.shown:
            print(text, flush=True)
        self.shown = text

    # Instructions

    @property
    def instructions(self) -> str:
        return self.args.instructions or str(self.folder / "instructions" / "train")

    def make_instructions(self, split: str) -> None:
        """Make questions from the labels of a split.

        The pretraining draws its own from the same labels: those of the training images are for checks and estimates.
        Test images have no questions for the description of a box, which would be scored as captions.
        """
        output = self.folder / "instructions" / split
        shutil.rmtree(output, ignore_errors=True)
        options = self.label_options(split)
        if split == "test":
            subject = LAYOUTS[self.labels.layout].subject
            options["kinds"] = [kind for kind in PHRASINGS[subject] if kind != "region_caption"]
        if names := options.pop("names", None):
            options["names"] = self.folder / "instructions" / "names.json"
            options["names"].parent.mkdir(parents=True, exist_ok=True)
            write_whole(options["names"], json.dumps(names))
        if "files" in options:
            options["annotations"] = options.pop("files")
        words = [options.pop("layout"), self.labels.root, "--output_dir", output, "--seed", self.args.seed]
        for name, value in options.items():
            words += [f"--{name}", *(value if isinstance(value, list) else [value])]
        run_command("make_instructions", list(map(str, words)), output.with_name(f"{split}.log"))

    def label_options(self, split: str) -> dict[str, Any]:
        """Return the options of instructions about the labels of a split, as `annotation_options` of `vitp pretrain`.

        Instructions for training are also about collages of 8-bit images.
        """
        labels = self.labels
        subject = LAYOUTS[labels.layout].subject
        options: dict[str, Any] = {
            "layout": labels.layout,
            "split": "train" if split == "train" else ALL,
            "split_list": str(labels.lists[split]),
        }
        names = self.phrases()
        if named := labels.data.get("class_property"):
            options["class_property"] = named
        if config_of_data(self.args.data) is not None and labels.layout != "yolo":  # whose layout finds its YAML file
            options["files"] = str(labels.root / labels.data["splits"][split]["annotations"])
        left_out = {name.casefold() for name in labels.data.get("leave_out", ())}
        if "files" in options and (names or left_out):
            class_property = {"class_property": named} if named else {}
            layout = LAYOUTS[labels.layout](labels.root, annotations=Path(options["files"]), **class_property)
            found = layout.class_names()
            # Test images may lack a class of `class_names`. For training images, `make_instructions` reports it.
            names = {label: phrase for label, phrase in names.items() if split == "train" or label in found}
            names |= {label: None for label in found if label.casefold() in left_out}
        if names:
            options["names"] = names
        tile = labels.data["splits"][split].get("tile")
        if subject == "objects" and tile is not None:
            options |= {"window": tile["size"], "overlap": tile["overlap"]}
        if labels.data.get("bad_objects") == "skip":
            options["on_error"] = "skip"
        if split == "train" and subject in ("objects", "regions") and all(map(has_8_bits, labels.images[split])):
            options["collages"] = 1
        return options

    def phrases(self) -> dict[str, str | None]:
        """Return the phrases of the classes for `make_instructions --names`."""
        return TASKS[self.labels.task].phrases(self.args.class_names or {}, self.labels.data)

    def check_instructions(self) -> dict[str, Any]:
        """Check the instructions for test images, damaged rows and answers that follow from their questions.

        Returns:
            `problems`, sentences for which the run stops; `answer_prior`, a table; `overlap`, the number of images.
        """
        mixture, workers = load_sources(self.instructions), os.cpu_count()
        files = list(map(str, self.labels.images["test"]))
        tests = Dataset.from_dict({"image": files}).cast_column("image", ImageFeature(decode=False))
        args, _, model_args = self.parse_pretraining({}, 1)
        image_processor, _ = self.tiling(args, model_args)
        if args.input_spec is not None:
            image_processor = image_processor.with_input_spec(args.input_spec)
        test_images = TestImages(tests, files, workers, SourceSettings().spec_for(image_processor))
        reports = validate(mixture, workers, test_images=test_images, input_spec=image_processor.input_spec)
        # Without a limit of time, on which the learning rate would depend, so that a resumed run has the same figures.
        answer_prior = check_answer_priors(mixture.sources, reports, None, self.args.seed, math.inf)
        path = self.folder / "validation" / "report.json"
        is_passed = save_reports(reports, {"instructions": self.instructions}, path)
        print_reports(reports)
        print(answer_prior)
        found = [match for report in reports for match in report.overlap]
        problems, number = [], len({match["test_image"] for match in found})
        if found:
            is_drawn = self.labels.how.startswith("Split by")  # and not by the labels
            pattern = ", or set scene_pattern so that the images of a scene stay together" if is_drawn else ""
            problems.append(
                f"{number} test image(s) are in the training data, such as {found[0]['test_image']} in row "
                f"{found[0]['id']}. Take them out{pattern}."
            )
        elif not is_passed:
            problems.append(f"The instructions are invalid, see {path}.")
        if self.labels.test_scenes == 1:
            problems.append(
                f"All {len(files)} test images are of one scene or patient: the verdict would be 'Not decided'. Add "
                "images of other scenes, or set scene_pattern so that they are told apart."
            )
        priors = {report.name: report.answer_prior for report in reports if report.answer_prior is not None}
        for name in (name for name, prior in priors.items() if prior.hidden_bits < LITTLE):
            problems.append(
                f"The answers of {name} follow from their questions: a ViT learns nothing from them. Give labels with "
                "several classes or numbers of objects, or other instructions."
            )
        return {"problems": problems, "answer_prior": answer_prior, "overlap": number}

    # Plan

    @cached_property
    def start(self) -> str | None:
        """Folder or Hub id of the ViT that the pretraining starts from; `None` for random weights."""
        settings = self.pretraining_start()
        if "vision_model" in settings:
            return settings["vision_model"]
        if "model_name_or_path" not in settings:
            return None
        folder = self.folder / "start"
        self.progress.result("start", lambda: str(export_backbone(settings["model_name_or_path"], folder)))
        return str(folder)

    @property
    def vision_config(self) -> PreTrainedConfig:
        """Configuration of the start's ViT."""
        if self.start is None:
            return ViTPVisionConfig(**self.pretraining_start()["from_scratch"]["vision_config"])
        return open_vit_config(self.start)

    def pretraining_start(self) -> dict[str, Any]:
        """Return the settings of the start for `vitp pretrain`."""
        args = self.args
        given = {name: args.pretraining[name] for name in OF_START if args.pretraining.get(name)}
        if args.start is None:
            return given
        model_type = PreTrainedConfig.get_config_dict(args.start)[0].get("model_type")
        if model_type in ("vitp", "internvl"):
            return {"model_name_or_path": args.start}
        if "from_scratch" in given:
            return {"vision_model": args.start, "from_scratch": given["from_scratch"]}
        return {"vision_model": args.start, "language_model": args.language_model or LANGUAGE_MODEL}

    def pretraining_settings(self, **settings: Any) -> dict[str, Any]:
        """Return the configuration of `vitp pretrain`: defaults, the given settings, and those of this run."""
        start = self.pretraining_start()
        defaults = {
            "learning_rate": 2e-5,
            "lr_scheduler_type": "cosine",
            "warmup_steps": 0.05,
            "weight_decay": 0.05,
            "logging_steps": 10,
            "eval_strategy": "no",
            "save_total_limit": 1,
            "report_to": "none",
        }
        if start.get("language_model"):
            defaults["learning_rate"] = 5e-5
            if not self.args.pretraining.get("freeze_projector"):  # A frozen part has no learning rate.
                defaults["projector_learning_rate"] = 1e-3
        fixed = {"seed": self.args.seed, "eval_strategy": "no", "report_to": "none"}
        own = {name: value for name, value in self.args.pretraining.items() if name not in OF_START}
        return defaults | settings | own | start | fixed | self.pretraining_data()

    def pretraining_data(self) -> dict[str, Any]:
        """Return the settings of the pretraining's data: the labels, to draw questions from, or stored instructions.

        Classes of whole images keep their stored instructions: a crop may not show what the class is about.
        """
        if self.args.instructions is not None or not TASKS[self.labels.task].draws_questions:
            return {"dataset_name": self.instructions}
        return {
            "annotations": str(self.labels.root),
            "annotation_options": self.label_options("train") | self.args.pretraining.get("annotation_options", {}),
            "dataset_test_split": "",  # The test images are scored by later stages.
        }

    def make_plan(self) -> dict[str, Any]:
        """Choose batch, tiles, checkpointing, steps and seeds, print the plan, and keep it unless this is a dry run."""
        args = self.args
        if "plan" not in self.progress.parts:
            self.begin("plan")
        chosen = self.progress.result("plan/batch", self.choose_batch)
        costs = None
        if args.steps is None or args.fine_tuning_steps is None or args.seeds is None:
            costs = Costs(**self.progress.result("plan/costs", lambda: asdict(self.measure_costs(chosen))))
        if args.dry_run:
            plan = self.choose_plan(chosen, costs)
        else:
            plan = self.progress.result("plan", lambda: self.choose_plan(chosen, costs))
        if plan["budget"] != args.budget:
            print(f"The plan of the budget {plan['budget']} is kept. For {args.budget}, set another output_dir.")
        settings = ", ".join(f"{name} {value}" for name, value in plan["settings"].items())
        print(
            f"\nPlan on {plan['machine']}: {plan['steps']} steps of pretraining ({settings}); {plan['fine_tunings']} "
            f"fine-tunings of {plan['fine_tuning_steps']} steps, seeds {plan['seeds']}. Models: "
            f"{', '.join(self.models)}."
        )
        if plan["planned_seconds"]:
            needed = describe_seconds(sum(plan["planned_seconds"].values()))
            print(f"Pretraining and fine-tuning take about {needed} of {plan['budget']}.")
        if args.dry_run and "plan_device" in args.pretraining:
            self.print_estimates(plan)
        return plan

    def choose_plan(self, chosen: dict[str, Any], costs: Costs | None) -> dict[str, Any]:
        """Return the plan.

        Args:
            chosen: rows and settings of [`choose_batch`].
            costs: measured costs; `None` if the arguments have the steps and the seeds.
        """
        args = self.args
        steps = {"steps": args.steps, "fine_tuning_steps": args.fine_tuning_steps, "seeds": args.seeds}
        if costs is not None:
            epoch = -(-chosen["rows"] // chosen["settings"]["global_batch_size"])
            settings = self.fine_tuning_settings()
            accumulated = settings["per_device_train_batch_size"] * settings.get("gradient_accumulation_steps", 1)
            batch = settings.get("global_batch_size") or accumulated
            samples = len(self.labels.images["train"]) * num_windows(self.labels, "train")
            epochs = epoch, max(samples // batch, 1)
            seeds = None if args.seeds is None else len(args.seeds)
            found = choose_steps(args.seconds, costs, *epochs, MAE in args.baselines, self.num_fine_tunings, seeds)
            steps = {name: found[name] if value is None else value for name, value in steps.items()}
        runs, planned = self.num_fine_tunings(len(steps["seeds"])), {}
        if costs is not None:
            planned["pretraining"] = steps["steps"] * costs.step
            if MAE in args.baselines:
                planned["mae"] = planned["pretraining"]
            planned["fine_tuning"] = runs * (steps["fine_tuning_steps"] * costs.fine_tuning_step + costs.evaluation)
        return steps | {
            "machine": describe_machine(),
            "budget": args.budget,
            "fine_tunings": runs,
            "settings": chosen["settings"],
            "planned_seconds": planned,
        }

    def print_estimates(self, plan: dict[str, Any]) -> None:
        """Print memory and hours of the pretraining and of a fine-tuning on `plan_device`, from the models' shapes."""
        args, training_args, model_args = self.parse_pretraining(plan["settings"], plan["steps"])
        image_processor, _ = self.tiling(args, model_args)
        print("\nPretraining", end="")
        summaries = summarize_sources(load_sources(self.instructions), image_processor)
        print_plan(args, training_args, model_args, summaries)
        print("\nOne fine-tuning. Weights of the start are not needed for its estimate.")
        path = self.folder / "plan" / "fine_tune.yaml"
        settings = {"model_name_or_path": self.backbone(RANDOM, plan["seeds"][0]), "output_dir": str(path.parent)}
        settings |= {"max_steps": plan["fine_tuning_steps"], "plan_device": args.plan_device}
        write_config(path, self.fine_tuning_settings() | settings)
        run = importlib.import_module(f"modeling_vitp.recipes.finetune_{self.labels.task}").main
        run(["--config", str(path), "--dry_run", "true"])

    def choose_batch(self) -> dict[str, Any]:
        """Return the number of rows, and the settings of tiles, VRL, batch and checkpointing."""
        pretrain_args, training_args, model_args = self.parse_pretraining({}, 1)
        image_processor, tokens = self.tiling(pretrain_args, model_args)
        window = self.labels.data["splits"]["train"].get("tile", {}).get("size", math.inf)
        height, width = (min(side, window) for side in median_size(self.labels.images["train"]))
        settings = choose_tiling((height, width), image_processor, tokens)
        settings |= {name: value for name, value in self.args.pretraining.items() if name in settings}
        image_processor.max_patches = settings["max_patches"]
        summaries = summarize_sources(load_sources(self.instructions), image_processor)
        rows = sum(summary.effective for summary in summaries)
        batch = {"per_device_train_batch_size", "global_batch_size", "gradient_accumulation_steps"}
        if not batch & self.args.pretraining.keys():
            settings |= choose_batch(pretrain_args, training_args, model_args, summaries, choose_samples(rows))
        else:
            each = training_args.per_device_train_batch_size * training_args.gradient_accumulation_steps
            settings["global_batch_size"] = each
        return {"rows": rows, "settings": settings}

    def parse_pretraining(
        self, settings: dict[str, Any], steps: int
    ) -> tuple[PretrainArguments, ViTPTrainingConfig, ModelConfig]:
        """Return the arguments of the pretraining as its command parses them, with folders in place of Hub ids."""
        pretrain = importlib.import_module("modeling_vitp.recipes.pretrain")
        path = self.folder / "plan" / "pretrain.yaml"
        settings = self.pretraining_settings(**settings) | {"max_steps": steps, "output_dir": str(path.parent)}
        write_config(path, settings)
        own = PretrainArguments, VRLArguments, ModelConfig
        try:
            args, training_args, model_args = parse(
                ["--config", str(path)], pretrain.__doc__, own, pretrain.WHOLE, SFT_MODULES
            )
        except WrongArguments as error:
            raise ValueError(f"pretraining: {error} `vitp pretrain --help_all` lists the options.") from error
        # Shapes are read from folders, and without one those of InternVL2.5 would be assumed.
        args.vision_model, args.language_model = map(configuration_folder, (args.vision_model, args.language_model))
        model_args.model_name_or_path = configuration_folder(model_args.model_name_or_path)
        return args, training_args, model_args

    def tiling(self, args: PretrainArguments, model_args: ModelConfig) -> tuple[ViTPImageProcessor, int]:
        """Return the image processor of the start with the tiles of the plan, and the visual tokens of a tile."""
        start = model_args.model_name_or_path, args.from_scratch, args.vision_model
        return tiling(*start, args.max_patches, args.vision_image_size)

    def measure_costs(self, chosen: dict[str, Any]) -> Costs:
        """Measure steps of the pretraining and of a fine-tuning by two short runs of each."""
        folder = self.folder / "plan"
        fewer, more = MEASURED_STEPS
        seconds, evaluation = {}, 0.0
        for steps in MEASURED_STEPS:
            output = folder / f"pretraining_{steps}"
            settings = self.pretraining_settings(**chosen["settings"]) | {"save_strategy": "no", "watch_samples": 0}
            metrics = run_recipe("pretrain", settings | {"max_steps": steps}, output)
            seconds["pretraining", steps] = metrics["train"]["train_runtime"]
            output = folder / f"fine_tuning_{steps}"
            backbone = self.start or str(folder / f"pretraining_{steps}" / "backbone")
            settings = self.fine_tuning_settings() | {"model_name_or_path": backbone, "save_strategy": "no"}
            metrics = run_recipe(f"finetune_{self.labels.task}", settings | {"max_steps": steps}, output)
            seconds["fine_tuning", steps] = metrics["train"]["train_runtime"]
            evaluation = metrics["eval"]["eval_runtime"]
        shutil.rmtree(folder)
        step, fine_tuning_step = (
            max(seconds[name, more] - seconds[name, fewer], 1e-3) / (more - fewer)
            for name in ("pretraining", "fine_tuning")
        )
        return Costs(step, fine_tuning_step, evaluation)

    def num_fine_tunings(self, seeds: int) -> int:
        """Return the number of fine-tunings. The best one of the search of the learning rate is also a scored one."""
        others = len(self.args.learning_rates) - 1
        return len(self.models) * (others + seeds * len(self.args.label_fractions))

    # Pretraining

    @property
    def models(self) -> dict[str, str]:
        """Descriptions of the compared models by name, the adapted backbone first."""
        args, models = self.args, {ADAPTED: "the backbone of this run"}
        if {START, args.start} & {*args.baselines} and self.start is not None:
            models[self.start_name] = f"{args.start or self.start}, the start"
        if RANDOM in args.baselines or self.start is None:
            models[RANDOM] = "random weights"
        if MAE in args.baselines:
            images = "same" if args.instructions is None else "labeled training"
            models[MAE] = f"masked autoencoder on the {images} images, with as many operations"
        for path in self.others:
            name, taken = short_name(path), {*models, MAE, RANDOM, self.start_name}
            names = (name, *(f"{name}-{number}" for number in range(2, len(taken) + 3)))
            models[next(one for one in names if one not in taken)] = path
        return models

    @property
    def others(self) -> list[str]:
        """Folders and Hub ids of the baselines."""
        return [path for path in self.args.baselines if path not in (START, RANDOM, MAE, self.args.start)]

    @property
    def start_name(self) -> str:
        """Name of the start in the report."""
        if self.start is None:
            return RANDOM
        name = short_name(self.args.start or self.start)
        is_taken = name in (ADAPTED, RANDOM) or (name == MAE and MAE in self.args.baselines)
        return f"{name}-start" if is_taken else name

    def pretrain(self) -> None:
        """Pretrain, with an early comparison of the backbone with its start, and train the masked autoencoder."""
        self.begin("pretraining")
        steps, output = self.plan["steps"], self.folder / "pretraining"
        save_steps = max(steps // 10, 1)
        settings = self.pretraining_settings(save_steps=save_steps, **self.plan["settings"]) | {"max_steps": steps}
        early = round(EARLY * steps)
        if early:

            def train_to_early() -> None:
                try:
                    run_recipe("pretrain", settings | {"stop_at_step": early}, output)
                except RunStopped as error:
                    if error.status:
                        raise

            self.progress.result("pretraining/early", train_to_early)
            found = self.progress.result("pretraining/look", lambda: self.look_early(last_checkpoint(output)))
            if found["is_worse"] and not self.args.force:
                raise RunStopped(
                    f"After {early} of {steps} steps the frozen backbone is worse than its start: {found['text']}. "
                    "Lower learning_rate in `pretraining`, or check the labels. To go on anyway, add --force."
                )
        self.progress.result("pretraining/run", lambda: run_recipe("pretrain", settings, output)["train"])
        if MAE in self.models:
            self.begin("mae")
            self.progress.result("mae", self.train_mae)

    def look_early(self, checkpoint: str) -> dict[str, Any]:
        """Compare the frozen backbone of a checkpoint with the start, by a linear probe on the validation split."""
        folder = self.folder / "early"
        backbones = [str(export_backbone(checkpoint, folder / "backbone"))]
        backbones.append(self.backbone(self.start_name, self.args.seed))
        entries = self.probe(backbones, "val", folder / "probe")
        ours, start = (entry for entry in entries if entry["probe"] == "linear")
        scores = ([Score(entry["score"], entry["resampled"], entry["cases"])] for entry in (ours, start))
        found = paired_difference(*scores)
        text = f"{TASKS[self.labels.task].probe_title} {ours['score']:.3f} instead of {start['score']:.3f}"
        text += f" (95% interval of the difference {found.low:+.3f} to {found.high:+.3f})"
        shutil.rmtree(folder)
        print(f"After {EARLY:.0%} of the steps, a linear probe of the backbone reaches {text}.")
        return {"is_worse": found.high < 0, "text": text}

    def train_mae(self) -> dict[str, Any]:
        """Train a masked autoencoder from the same start, on the same images, with as many operations."""
        args, training_args, model_args = self.parse_pretraining(self.plan["settings"], self.plan["steps"])
        config, _ = config_of_start(args, model_args)
        summaries = summarize_sources(load_sources(self.instructions), self.tiling(args, model_args)[0])
        work = work_of(training_args, 1, summaries, args.from_scratch is not None)
        operations = pretraining_operations(config, work, training_args.vrl_drop_ratio, bf16=training_args.bf16)
        images = self.labels.images["train"]
        batch = min(64, len(images))
        steps = mae_steps(self.vision_config, batch, operations)
        settings = {"per_device_train_batch_size": batch, "max_steps": steps, "save_steps": max(steps // 10, 1)}
        settings |= {"save_total_limit": 1, "logging_steps": 10, "seed": self.args.seed, "report_to": "none"}
        settings["watch_samples"] = training_args.watch_samples
        start = self.start or self.backbone(RANDOM, self.args.seed)
        config = MaskedAutoencoderConfig(str(self.folder / "mae"), lr_scheduler_type="cosine", **settings)
        train_masked_autoencoder(start, images, config)
        return {"steps": steps, "batch": batch, "operations": operations}

    def backbone(self, model: str, seed: int) -> str:
        """Return the folder or Hub id of the backbone of a model; random weights have a folder for each seed."""
        if model == RANDOM:
            folder = self.folder / "random" / f"seed_{seed}"
            self.progress.result(f"random/{seed}", lambda: self.write_random(folder, seed))
            return str(folder)
        own = {ADAPTED: self.folder / "pretraining" / "backbone", MAE: self.folder / "mae" / "backbone"}
        if self.start is not None:
            own[self.start_name] = self.start
        return str(own.get(model) or self.models[model])

    def write_random(self, folder: Path, seed: int) -> None:
        """Export a backbone of the shape of the start with random weights."""
        config = self.vision_config
        if self.start is None:
            image_processor, _ = tiling(None, self.pretraining_start()["from_scratch"])
        else:
            image_processor = image_processor_of(self.start, pair(config.image_size))
        set_seed(seed)
        is_own = isinstance(config, ViTPVisionConfig)
        export_backbone(ViTPVisionModel(config) if is_own else AutoModel.from_config(config), folder, image_processor)

    # Comparison

    def probe_backbones(self) -> list[dict[str, Any]]:
        """Return the scores of probes of the frozen backbones on the test split."""
        names = {self.backbone(model, self.plan["seeds"][0]): model for model in self.models}
        entries = self.probe(list(names), "test", self.folder / "frozen")
        return [{"model": names[entry.pop("backbone")], **entry} for entry in entries]

    def probe(self, backbones: Sequence[str], split: str, folder: Path) -> list[dict[str, Any]]:
        """Run `vitp probe`, and return the main score of each backbone and probe with its resampled values."""
        config = self.vision_config
        if self.start is not None:
            config = vision_config_of(self.start, self.args.pretraining.get("vision_image_size"))
        settings = {
            "backbones": backbones,
            "data": self.probed_data(split),
            # The same for all, unlike the crops of published image processors.
            "image_size": pair(config.image_size)[0],
            "annotations": TASKS[self.labels.task].annotations,
            "test_split": split,
            "intervals": True,
        }
        metrics = run_recipe("probe", settings, folder)
        shutil.rmtree(folder / "features", ignore_errors=True)
        shown = TASKS[self.labels.task].probe_score
        return [
            {"backbone": entry["backbone"], "probe": entry["probe"]}
            | {"score": entry["scores"][shown]["mean"], "resampled": entry["resampled"][0], "cases": entry["cases"]}
            for entry in metrics["results"]
        ]

    def probed_data(self, split: str) -> dict[str, Any]:
        """Return the setting `data` with about `PROBED` training images and images of a split, except for classes."""
        data, labels = self.labels.data, self.labels
        splits = dict(data["splits"])
        for name in ("train", split) if TASKS[labels.task].probes_patches else ():
            images = labels.images[name]
            if len(images) > (most := max(PROBED // num_windows(labels, name), 1)):
                chosen = np.random.default_rng(self.args.seed).permutation(len(images))[:most]
                path = self.folder / "splits" / f"{name}_probed.txt"
                write_list(path, labels.root, [images[index] for index in sorted(chosen)])
                splits[name] = {**splits[name], "list": str(path.resolve())}
        return {**data, "splits": splits}

    def fine_tuning_settings(self) -> dict[str, Any]:
        """Return the configuration of the fine-tuning: defaults for images of this size, and the given settings."""
        return fine_tuning_settings(self.labels, self.vision_config, self.args.fine_tuning)

    def parse_fine_tuning(self) -> None:
        """Parse the arguments of the fine-tuning, so that a wrong one is reported before the pretraining."""
        recipe_name = f"finetune_{self.labels.task}"
        recipe = importlib.import_module(f"modeling_vitp.recipes.{recipe_name}")
        path = self.folder / "plan" / "fine_tune.yaml"
        write_config(path, self.fine_tuning_settings() | {"max_steps": 1, "output_dir": str(path.parent)})
        try:
            parse(["--config", str(path)], recipe.__doc__, [load_class(name) for name in recipe.WHOLE], recipe.WHOLE)
        except WrongArguments as error:
            raise ValueError(f"fine_tuning: {error} `vitp {recipe_name} --help_all` lists the options.") from error

    @property
    def comparison(self) -> Comparison:
        """Fine-tuning of the backbones."""
        steps, folder = self.plan["fine_tuning_steps"], self.folder / "fine_tuning"
        settings, rates = self.fine_tuning_settings(), self.args.learning_rates
        return Comparison(self.labels, settings, steps, rates, folder, self.progress, lambda: self.begin("fine_tuning"))

    def fine_tune_backbones(self) -> list[dict[str, Any]]:
        """Fine-tune all models with all seeds and label fractions, and return their scores on the test split.

        The learning rate of a model is the best of the first seed on the validation split with all labels. If the
        training of another seed or fraction diverges, it is left out.
        """
        results, seeds, comparison = [], self.plan["seeds"], self.comparison
        for model in self.models:
            rate = comparison.choose_rate(model, self.backbone(model, seeds[0]), seeds[0])
            for fraction in self.args.label_fractions:
                for seed in seeds:
                    is_kept = seed == seeds[0] and fraction == 1
                    run = model, self.backbone(model, seed), rate, seed, fraction, is_kept
                    try:
                        results.append(comparison.score(*run))
                    except TrainingDiverged as error:
                        if is_kept:
                            raise
                        of_labels = f" and {100 * fraction:g}% of the labels" if fraction < 1 else ""
                        self.diverged.append(f"{model} with seed {seed}{of_labels} is left out: {error}")
                        print(self.diverged[-1])
        return results

    def control_settings(self) -> dict[str, Any]:
        """Return the configuration of `vitp evaluate_vlm` for questions about test images."""
        return {
            "models": [str(self.folder / "pretraining")],
            "dataset_name": str(self.folder / "instructions" / "test"),
            "split": "train",
            "limit": QUESTIONS,
        }

    def ask_about_other_images(self) -> dict[str, Any]:
        """Return the scores of answers to questions about test images, with their own images and with others."""
        if self.args.instructions is not None:
            return {"answers": {}}
        found = run_recipe("evaluate_vlm", self.control_settings(), self.folder / "controls")
        return {"answers": found["models"][0]["scores"]}

    # Results

    @property
    def bundle(self) -> Path:
        """Folder of the backbone, the exports and the report."""
        return self.folder / "bundle"

    def make_report(
        self, frozen: list[dict[str, Any]], fine_tuned: list[dict[str, Any]], controls: dict[str, Any]
    ) -> AdaptationReport:
        """Collect the scores, the controls, the cost and what was not tested."""
        plan, labels = self.plan, self.labels
        if "pretraining/look" in self.progress.parts:
            controls["early"] = self.progress.parts["pretraining/look"]["result"]["text"]
        notes = ["Images of another place, time or device than those of the test split were not tested."]
        notes += self.diverged
        if len(plan["seeds"]) == 1:
            notes.append("Each model was fine-tuned with one seed: the randomness of training is not in the intervals.")
        if not controls["answers"]:
            notes.append("Answers were not compared with those about other images.")
        pictures = {}
        for entry in fine_tuned:
            drawn = Path(entry.pop("folder")) / "test" / "predictions.png"
            if drawn.is_file() and entry["model"] in (ADAPTED, self.start_name):
                pictures[f"predictions_{entry['model']}.png"] = drawn
        for name, path in pictures.items():
            shutil.copy(path, self.folder / name)
        used = {stage: self.progress.seconds(stage) for stage in STAGES if self.progress.seconds(stage)}
        shown = {name: plan[name] for name in ("machine", "budget", "steps", "fine_tuning_steps", "seeds")}
        return AdaptationReport(
            task=labels.task,
            metric=fine_tuned[0]["metric"],
            classes=[entry["name"] if isinstance(entry, dict) else entry for entry in labels.data["classes"]],
            data={
                "name": labels.root.name,
                "images": {split: len(images) for split, images in labels.images.items()},
                "test_scenes": labels.test_scenes,
                "how": labels.how,
            },
            plan=shown | plan["settings"] | {"planned_seconds": plan["planned_seconds"], "used_seconds": used},
            models=self.models,
            start=self.start_name,
            fine_tuned=fine_tuned,
            frozen=frozen,
            controls={name: value for name, value in controls.items() if name != "problems"},
            pictures=list(pictures),
            notes=notes,
        )

    def make_bundle(self, report: AdaptationReport) -> list[str]:
        """Write the bundle, and return sentences on what could not be exported."""
        best = next(entry for entry in report.fine_tuned if entry["model"] == ADAPTED)
        fine_tuned = self.comparison.run_folder(ADAPTED, best["learning_rate"], best["seed"])
        images = [path for part in self.labels.images.values() for path in part]
        unset = ("dry_run", "force", "seconds")
        config = {name: value for name, value in vars(self.args).items() if value and name not in unset}
        return write_bundle(report, self.folder / "pretraining" / "backbone", fine_tuned, images, self.bundle, config)


def configuration_folder(name: str | None) -> str | None:
    """Return the folder of a model; of a Hub id, the folder of the cache with its configurations."""
    return name if name is None or Path(name).is_dir() else snapshot_download(name, allow_patterns="*.json")


def short_name(path: str) -> str:
    """Return the last part of a folder or Hub id; of the folder `backbone` of a run, that of the run."""
    path = Path(os.path.abspath(path))
    return path.parent.name if path.name == "backbone" and path.parent.name else path.name


def absolute_path(text: str) -> str:
    """Return a relative path of an existing file as an absolute one, and other texts as they are."""
    return os.path.abspath(text) if os.sep in text and os.path.exists(text) else text
