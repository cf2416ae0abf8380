"""Stages of an adaptation without their trainings: resuming, early stop, time that is left."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from modeling_vitp.adaptation import masked_autoencoder, pretraining, probing, runs
from modeling_vitp.adaptation.backbones import Start
from modeling_vitp.adaptation.masked_autoencoder import Autoencoder
from modeling_vitp.adaptation.plan import count_autoencoders
from modeling_vitp.adaptation.pretraining import Pretraining, early_comparison, pretrain
from modeling_vitp.adaptation.probing import Prober, compare_with_start
from modeling_vitp.adaptation.report import untested
from modeling_vitp.command.errors import RunStopped
from modeling_vitp.evaluation.comparison import Progress
from modeling_vitp.metrics.resampling import Score


@pytest.fixture
def trainings(monkeypatch):
    """Replace the pretraining, and return the list of the steps that it was stopped at."""
    stopped_at = []

    def run_pretraining(settings, output):
        stopped_at.append(settings.get("stop_at_step", settings["max_steps"]))
        if "stop_at_step" in settings:
            raise RunStopped("stopped", 0)
        return {"train": {"train_runtime": 1.0}}

    monkeypatch.setattr(runs, "run_pretraining", run_pretraining)
    monkeypatch.setattr(pretraining, "last_checkpoint", lambda output: "checkpoint")
    return stopped_at


def run_pretrain(folder: Path, steps: int = 20, is_worse: bool = False, force: bool = False) -> Progress:
    """Run or resume a pretraining."""
    progress = Progress(folder / "progress.json")
    settings = Pretraining(Start({}, None, "random"), {}, {}, "instructions", 0, folder / "plan")
    plan = {"steps": steps, "settings": {}}
    look = {"chosen": 0, "is_worse": is_worse, "text": "accuracy 0.2"}
    pretrain(settings, plan, folder / "pretraining", progress, lambda checkpoints: look, force)
    return progress


def test_pretraining_looks_early_and_is_run_once(tmp_path, trainings):
    progress = run_pretrain(tmp_path)
    assert list(progress.parts) == ["pretraining/early", "pretraining/look", "pretraining/run"]
    assert run_pretrain(tmp_path).parts == progress.parts and trainings == [2, 20]
    assert early_comparison(progress) == {"early": "accuracy 0.2"}
    (tmp_path / "short").mkdir()
    progress = run_pretrain(tmp_path / "short", steps=4)
    assert trainings[2:] == [4] and early_comparison(progress) == {}


def test_worse_backbone_stops_unless_forced(tmp_path, trainings):
    for _ in range(2):
        with pytest.raises(RunStopped, match="After 2 of 20 steps .*: accuracy 0.2.*--force"):
            run_pretrain(tmp_path, is_worse=True)
    assert trainings == [2]
    run_pretrain(tmp_path, force=True)
    assert trainings == [2, 20]


def test_chosen_learning_rate_of_the_vit_goes_on(tmp_path, monkeypatch):
    """Each rate has the first tenth of the steps, and the run of the chosen one is continued, also after a stop."""
    runs_made = []

    def run_pretraining(settings, output):
        runs_made.append((output.name, settings["part_learning_rates"], settings.get("stop_at_step")))
        output.mkdir(exist_ok=True)
        (output / "rate").write_text(str(settings["part_learning_rates"]["vision"]))
        if "stop_at_step" in settings:
            raise RunStopped("stopped", 0)
        raise KeyboardInterrupt

    def compare(checkpoints):
        assert checkpoints == [tmp_path / "pretraining_rate_1e-05", tmp_path / "pretraining_rate_5e-05"]
        return {"chosen": 1, "is_worse": False, "text": "accuracy 0.9"}

    monkeypatch.setattr(runs, "run_pretraining", run_pretraining)
    monkeypatch.setattr(pretraining, "last_checkpoint", lambda output: output)
    start = Start({"vision_model": "vit", "language_model": "lm"}, "vit", "vit")
    settings = Pretraining(start, {}, {}, "instructions", 0, tmp_path / "plan")
    assert settings.vision_rates == pytest.approx([1e-5, 5e-5])
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            progress = Progress(tmp_path / "progress.json")
            plan = {"steps": 20, "settings": {}}
            pretrain(settings, plan, tmp_path / "pretraining", progress, compare)
    vision = pytest.approx(5e-5)
    assert [name for name, _, _ in runs_made] == [
        "pretraining_rate_1e-05",
        "pretraining_rate_5e-05",
        "pretraining",
        "pretraining",
    ]
    assert [step for _, _, step in runs_made] == [2, 2, None, None]
    assert runs_made[2][1] == {"projector": 1e-3, "vision": vision} == runs_made[1][1]
    assert float((tmp_path / "pretraining" / "rate").read_text()) == vision
    assert not (tmp_path / "pretraining_rate_5e-05").exists() and not (tmp_path / "pretraining_rate_1e-05").exists()


@pytest.mark.parametrize(
    ("vit", "user_settings"),
    [
        (None, {}),
        ("vit", {"learning_rate": 3e-5}),
        ("vit", {"part_learning_rates": {"vision": 3e-5}}),
        ("vit", {"freeze": ["vision"]}),
    ],
)
def test_rate_that_is_set_or_not_used_is_not_searched(tmp_path, vit, user_settings):
    start = Start({"vision_model": vit, "language_model": "lm"}, vit, "vit")
    assert Pretraining(start, user_settings, {}, "instructions", 0, tmp_path).vision_rates == []


def test_failed_pretraining_is_not_a_finished_part(tmp_path, trainings, monkeypatch):
    def run_pretraining(settings, output):
        raise RunStopped("failed", 1)

    monkeypatch.setattr(runs, "run_pretraining", run_pretraining)
    with pytest.raises(RunStopped, match="failed"):
        run_pretrain(tmp_path)
    assert not Progress(tmp_path / "progress.json").parts


@pytest.mark.parametrize(
    ("scores", "chosen", "is_worse"),
    [
        ((0.1, 0.2), 1, True),
        ((0.7, 0.8), 1, False),
        ((0.795, 0.8), 0, False),  # not told apart
    ],
)
def test_checkpoint_is_chosen_and_compared_with_its_start(tmp_path, monkeypatch, scores, chosen, is_worse):
    """The standard deviation of the difference of two scores is .01 times the square root of 2."""

    def score_all(self, backbones, split, output):
        generator = np.random.default_rng(0)
        entries = []
        for probe in ("20-NN", "linear"):
            for backbone, value in zip(backbones, (*scores, 0.5)):
                resampled = value + 0.01 * generator.standard_normal(1000)
                entry = {"backbone": backbone, "probe": probe, "metric": "mIoU", "score": value, "cases": 1000}
                entries.append(entry | {"resampled": resampled.tolist()})
        return entries

    def export(checkpoint, folder):
        folder.mkdir(parents=True)
        return folder

    monkeypatch.setattr(probing, "export_backbone", export)
    monkeypatch.setattr(Prober, "score", score_all)
    prober = Prober(SimpleNamespace(task="segmentation"), 32, 0)
    (tmp_path / "early" / "backbone_0").mkdir(parents=True)  # of a call that was stopped
    comparison = compare_with_start(prober, ["low_rate", "high_rate"], "start", tmp_path / "early")
    assert comparison["chosen"] == chosen and comparison["is_worse"] == is_worse
    assert not (tmp_path / "early").exists()
    assert comparison["text"].startswith(f"mIoU {scores[chosen]:.3f} instead of 0.500 (95% interval")


@pytest.fixture
def autoencoders(monkeypatch):
    """Replace the training of the masked autoencoder, and return the list of folders, steps and learning rates."""
    made = []

    def train_masked_autoencoder(vit, images, config, image_size):
        output = Path(config.output_dir)
        (output / "backbone").mkdir(parents=True)
        made.append((output.name, config.max_steps, config.learning_rate))

    monkeypatch.setattr(masked_autoencoder, "train_masked_autoencoder", train_masked_autoencoder)
    monkeypatch.setattr(masked_autoencoder.Autoencoder, "operations", 1e12)
    monkeypatch.setattr(masked_autoencoder, "mae_steps", lambda config, batch, operations: 50)
    return made


@pytest.mark.parametrize(
    ("scores", "settings", "expected"),
    [
        ([0.5, 0.8], {}, [("rate_3e-05", 5, 3e-5), ("rate_0.00015", 5, 1.5e-4), ("mae", 50, 1.5e-4)]),
        ([0.795, 0.8], {}, [("rate_3e-05", 5, 3e-5), ("rate_0.00015", 5, 1.5e-4), ("mae", 50, 3e-5)]),
        (None, {"learning_rate": 1e-3}, [("mae", 50, 1e-3)]),
    ],
)
def test_autoencoder_tries_as_many_rates_as_the_pretraining(tmp_path, autoencoders, scores, settings, expected):
    """The standard deviation of the difference of two scores is .01 times the square root of 2."""

    def linear_scores(backbones, folder):
        generator = np.random.default_rng(0)
        return [Score(value, (value + 0.01 * generator.standard_normal(1000)).tolist(), 1000) for value in scores]

    training_args = SimpleNamespace(bf16=False, fp16=False, watch_samples=0)
    settings_of_run = SimpleNamespace(
        arguments=SimpleNamespace(training_args=training_args),
        vision_rates=[1e-5, 5e-5],
        seed=0,
        start=SimpleNamespace(vit="vit", config=None, image_size=32),
    )
    labels = SimpleNamespace(images={"train": ["a.png"] * 3})
    for _ in range(2):  # The second call finds the results.
        backbones = SimpleNamespace(
            folder=tmp_path, progress=Progress(tmp_path / "progress.json"), args=SimpleNamespace(mae=settings)
        )
        prober = SimpleNamespace(labels=labels, linear_scores=linear_scores)
        Autoencoder(settings_of_run, {"steps": 20}, backbones, prober).train()
    assert [(name, steps, pytest.approx(rate)) for name, steps, rate in expected] == autoencoders
    assert backbones.progress.parts["mae"]["result"]["learning_rate"] == pytest.approx(expected[-1][2])
    assert not (tmp_path / "mae_rates").exists()
    assert count_autoencoders(settings_of_run, backbones) == pytest.approx(1 + 0.1 * (len(expected) - 1))


def test_missing_controls_are_noted():
    plan = {"seeds": [0]}
    assert len(untested(plan, {"answers": {}, "compared": [0.5, 1.0]}, ["mae with seed 1 is left out"])) == 5
    assert len(untested({"seeds": [0, 1]}, {"answers": {"count": {}}, "compared": [1.0, 1.0]}, [])) == 1
