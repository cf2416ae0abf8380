"""Report of an adaptation: rules of the verdict, and pages with the figures of the data."""

import re
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from modeling_vitp.adaptation.arguments import ADAPTED, RANDOM
from modeling_vitp.adaptation.pages import read_blocks
from modeling_vitp.adaptation.report import AdaptationReport
from modeling_vitp.metrics.resampling import resample

START = "dinov2-base"
EVIL = "<script>alert(1)</script> | *a*"
VOID = {"meta", "img", "br"}


def runs_of(model: str, mean: float, seeds: int = 3, labels: float = 1.0) -> list[dict]:
    """Return runs whose scores differ by ±0.002 between seeds, with resamples that differ by 0.01."""
    runs = []
    for seed in range(seeds):
        score = mean + 0.002 * (seed - (seeds - 1) / 2) * (1 if model == ADAPTED else -1)
        resampled = (score + 0.01 * np.random.default_rng(len(model)).standard_normal(100)).tolist()
        runs.append({"model": model, "labels": labels, "seed": seed, "learning_rate": 1e-4, "score": score})
        runs[-1] |= {"resampled": resampled, "cases": 100, "folder": f"{model}/{seed}"}
    return runs


def make_report(means: dict[str, float], start: str = START, seeds: int = 3, **settings) -> AdaptationReport:
    defaults = {
        "task": "segmentation",
        "metric": "mean_iou",
        "classes": ["tree", EVIL],
        "data": {"name": "my_coco", "images": {"train": 70, "val": 10, "test": 20}, "how": "Split by image."},
        "plan": {
            "steps": 1000,
            "vrl_drop_ratio": 0.75,
            "planned_seconds": {"pretraining": 3600, "fine_tuning": 1800},
            "used_seconds": {"checks": 9.6, "pretraining": 3700.4, "frozen": 61},
        },
        "models": {name: f"weights of {name}" for name in means},
        "fine_tuned": [run for name, mean in means.items() for run in runs_of(name, mean, seeds)],
    }
    return AdaptationReport(start=start, **(defaults | settings))


def answers_with_gains(*lows: float) -> dict:
    answers = {}
    for index, low in enumerate(lows):
        answers[f"kind {index}"] = {"accuracy": {"own": 0.6, "other_images": 0.5, "gain": [low, 0.2]}}
    return answers


USE_IT = "Use the adapted backbone: +10.0 points of mIoU"
VERDICTS = [  # means of the scores; beginning of the verdict; names in the sentences after it
    ({ADAPTED: 0.60, START: 0.50, "mae": 0.40, RANDOM: 0.30}, USE_IT, ()),
    ({ADAPTED: 0.60, START: 0.50, "mae": 0.60}, USE_IT, ("to mae was",)),
    ({ADAPTED: 0.60, START: 0.50, "mae": 0.70}, "Use mae: it is better than the adapted backbone by 10.0 ", ()),
    ({ADAPTED: 0.50, START: 0.50, RANDOM: 0.70}, "Use random weights: they are", ("to dinov2-base was",)),
    ({ADAPTED: 0.50, START: 0.60, "mae": 0.70, "big": 0.65}, "Use mae:", ("than dinov2-base by", "than big by")),
    ({ADAPTED: 0.50, START: 0.70, "mae": 0.60}, "Keep dinov2-base: the adapted backbone is worse by 20.0 ", ("mae",)),
    ({ADAPTED: 0.50, START: 0.50}, "Keep dinov2-base: no difference to the adapted backbone was found (+0.0 ", ()),
    ({ADAPTED: 0.50, START: 0.50, RANDOM: 0.50}, "Keep dinov2-base: no difference", ("to random weights was",)),
    ({ADAPTED: 0.50, "mae": 0.50}, "Not decided: the adapted backbone was not compared", ("to mae was",)),
    ({}, "Not decided", ()),
]
LOWER_IS_BETTER = [
    ({ADAPTED: 0.50, START: 0.60}, "Use the adapted backbone: −10.0 points of error rate", ()),
    ({ADAPTED: 0.50, START: 0.60, "mae": 0.40}, "Use mae: it is better than the adapted backbone by 10.0 ", ()),
    ({ADAPTED: 0.70, START: 0.60, "mae": 0.50}, "Use mae: it is better", ("worse than dinov2-base by 10.0",)),
    ({ADAPTED: 0.70, START: 0.50, "mae": 0.60}, "Keep dinov2-base:", ("worse than mae by 10.0",)),
    ({ADAPTED: 0.50, START: 0.50}, "Keep dinov2-base: no difference to the adapted backbone was found", ()),
]
CASES = [(*case, True) for case in VERDICTS] + [(*case, False) for case in LOWER_IS_BETTER]


@pytest.mark.parametrize("means, first, others, greater_is_better", CASES)
def test_verdict_follows_the_rules(means, first, others, greater_is_better):
    metric = "mean_iou" if greater_is_better else "error_rate"
    report = make_report(means, metric=metric, greater_is_better=greater_is_better)
    beginning, *sentences = re.split(r"(?<=\.) (?=[A-Z])", report.verdict)
    if not greater_is_better:
        assert sentences.pop() == "A lower error rate is better."
    assert beginning.startswith(first)
    assert len(sentences) == len(others)
    assert all(name in sentence for name, sentence in zip(others, sentences))


def test_verdict_has_the_interval_in_points():
    report = make_report({ADAPTED: 0.60, START: 0.58, "mae": 0.70})
    to_mae = report.differences()["mae"]
    low, high = 100 * -to_mae.high, 100 * -to_mae.low
    assert f"by 10.0 points of mIoU (95% interval {low:.1f} to {high:.1f})." in report.verdict
    assert low < 10 < high


@pytest.mark.parametrize(("adapted", "is_warned"), [(0.3, True), (0.7, False)])
def test_verdict_warns_of_frozen_features_below_random_weights(adapted, is_warned):
    frozen = []
    for name, mean in ((ADAPTED, adapted), (RANDOM, 0.5)):
        run = runs_of(name, mean, seeds=1)[0]
        frozen.append(
            {
                "model": name,
                "probe": "linear",
                "metric": "accuracy",
                **{key: run[key] for key in ("score", "resampled", "cases")},
            }
        )
    report = make_report({ADAPTED: 0.60, START: 0.50}, frozen=frozen)
    assert ("below random weights in the probe linear (−20.0 points" in report.verdict) == is_warned
    assert ("Remarks" in report.sections()) == is_warned


def test_verdict_of_one_seed_is_not_decided():
    verdict = make_report({ADAPTED: 0.60, START: 0.30, "mae": 0.90}, seeds=1).verdict
    assert verdict.startswith("Not decided: with one seed, the interval covers test images only.")
    assert "to dinov2-base is +30.0 points" in verdict and "to mae is −30.0 points" in verdict


@pytest.mark.parametrize(
    ("number", "scenes", "warning"),
    [
        (4, 4, "The test split has 4 images: with so few"),
        (20, 20, None),
        (20, 2, "The test split has images of 2 scenes or patients: with so few"),
        (20, 1, "Not decided: all test images are of one scene or patient."),
    ],
)
def test_verdict_warns_of_few_test_images(number, scenes, warning):
    data = {"name": "my_coco", "images": {"train": 70, "val": 10, "test": number}, "how": "", "test_scenes": scenes}
    verdict = make_report({ADAPTED: 0.60, START: 0.50}, data=data).verdict
    if warning is None:
        assert "test split" not in verdict
    else:
        assert warning in verdict


# `answers_with_box` may depend on the image although no box is right.
BOXES = {
    "mean_iou": {"own": 0.1, "other_images": 0.1, "gain": [-0.1, 0.1]},
    "answers_with_box": {"own": 1.0, "other_images": 0.5, "gain": [0.4, 0.6]},
}


def errors_of_counts(*gain):
    return {"mean_error": {"own": 1.0, "other_images": 1.2, "gain": list(gain)}}


@pytest.mark.parametrize(
    ("answers", "looks"),
    [
        (answers_with_gains(-0.1, 0.0), False),
        (answers_with_gains(-0.1, 0.01), True),
        ({"count": errors_of_counts(-0.4, -0.1)}, True),
        ({"count": errors_of_counts(0.1, 0.4)}, False),
        ({"grounding": BOXES}, False),
    ],
)
def test_verdict_says_when_answers_ignore_the_image(answers, looks):
    report = make_report({ADAPTED: 0.60, START: 0.50}, controls={"answers": answers})
    assert report.looks_at_images() == looks
    assert report.verdict.endswith("what the labels say.") != looks


def test_same_weights_give_no_difference():
    runs = runs_of(ADAPTED, 0.5)
    same = [{**run, "model": START} for run in runs]
    report = make_report({ADAPTED: 0.5, START: 0.5}, fine_tuned=runs + same)
    assert report.verdict.startswith(
        "Keep dinov2-base: no difference to the adapted backbone was found (+0.0 points of"
    )
    assert report.verdict.endswith("mIoU, 95% interval 0.0 to 0.0).")


def test_equal_models_are_not_told_apart():
    """Two models of the same accuracy, with three seeds: 19 of 20 verdicts find no difference."""
    draws, found = resample(200), 0
    for trial in range(20):
        generator = np.random.default_rng(trial)
        difficulty, runs = generator.beta(2, 1, size=200), []
        for model in (ADAPTED, START):
            for seed in range(3):
                chance = np.clip(difficulty + 0.03 * generator.standard_normal(), 0, 1)
                right = generator.random(200) < chance
                scores = {"score": right.mean().item(), "resampled": right[draws].mean(1).tolist(), "cases": 200}
                runs.append(
                    {"model": model, "labels": 1.0, "seed": seed, "learning_rate": 1e-4, "folder": "", **scores}
                )
        report = make_report({ADAPTED: 0.5, START: 0.5}, fine_tuned=runs)
        found += report.verdict.startswith("Keep dinov2-base: no difference")
    assert found >= 19


def test_differences_pair_seeds_of_a_label_fraction():
    few = runs_of(ADAPTED, 0.4, labels=0.1) + runs_of(START, 0.3, seeds=2, labels=0.1)
    report = make_report({ADAPTED: 0.6, START: 0.6})
    report.fine_tuned += few
    expected = np.mean([few[0]["score"] - few[3]["score"], few[1]["score"] - few[4]["score"]])
    found = report.differences(0.1)[START]
    assert found.seeds == 2 and found.mean == pytest.approx(expected)
    assert report.differences()[START].seeds == 3


class Page(HTMLParser):
    """Parser that checks that tags are closed, and collects tags, texts, and what the page would load."""

    def __init__(self, page: str):
        super().__init__()
        self.open, self.tags, self.loaded, self.texts = [], [], [], []
        self.feed(page)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.open += [] if tag in VOID else [tag]
        self.loaded += [value for name, value in attributes if name in ("src", "href", "xlink:href", "srcset")]

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)


@pytest.fixture(scope="module")
def full_report():
    report = make_report({ADAPTED: 0.60, START: 0.58, "mae": 0.50, RANDOM: 0.30})
    report.models["$x_$"] = EVIL
    report.fine_tuned += runs_of("$x_$", 0.2)
    for index, name in enumerate(report.models):
        report.fine_tuned += runs_of(name, 0.2 + 0.01 * index, labels=0.25)
        run = runs_of(name, 0.5 - 0.1 * index, seeds=1)[0]
        scores = {key: run[key] for key in ("score", "resampled", "cases")}
        report.frozen.append({"model": name, "probe": "20-NN", "metric": "mIoU", **scores})
    prior = "| source | accuracy |\n| --- | --- |\n| a \\| b | 7% |\n\nAnswers follow from *their* questions."
    report.controls = {
        "answers": answers_with_gains(0.01),
        "answer_prior": prior,
        "overlap": 0,
        "early": "0.712 instead of 0.7",
    }
    report.notes, report.command = ["A second site was not tested.", EVIL], "vitp adapt --data my_coco"
    report.pictures = ["side by side.png"]
    return report


@pytest.fixture(scope="module")
def folder(full_report, tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    image = np.random.default_rng(0).integers(255, size=(120, 128, 3), dtype=np.uint8)
    Image.fromarray(image).save(folder / "side by side.png")
    full_report.save(folder)
    return folder


def test_report_is_the_same_when_loaded(full_report, folder):
    assert AdaptationReport.load(folder) == full_report
    assert (folder / "README.md").read_text() == full_report.to_markdown()
    assert (folder / "report.html").read_text() == full_report.to_html(folder)


def test_pages_have_the_figures_of_the_data(full_report, folder):
    readme, page = (folder / "README.md").read_text(), Page((folder / "report.html").read_text())
    tables = [one for one in read_blocks(readme) if hasattr(one, "rows")]
    runs = {}
    for run in full_report.fine_tuned:
        runs.setdefault((run["model"], run["labels"]), []).append(run)
    for labels, shown in ((1.0, tables[0].rows), (0.25, [row[1:] for row in tables[1].rows if row[0] == "25%"])):
        assert len(shown) == len(full_report.models)
        for name, row in zip(full_report.models, shown):
            values = [100 * run["score"] for run in runs[name, labels]]
            assert row[1] == f"{np.mean(values):.1f} ± {np.std(values, ddof=1):.1f}" and row[2] == "3"
            if name != ADAPTED:
                figures = [float(one) for one in re.findall(r"-?[\d.]+", row[3].replace("−", "-"))]
                gap = full_report.differences(labels)[name]
                assert figures == pytest.approx([100 * gap.mean, 100 * gap.low, 100 * gap.high], abs=0.0501)
                assert row[3].startswith("**") == gap.is_clear
            assert {row[1], row[3].strip("*")} - {""} <= set(page.texts)
    assert "mIoU" in full_report.sections()["Frozen"][0]
    frozen = {row[1]: row[2:] for row in tables[2].rows}
    assert frozen["mae"][0] == "30.0" and frozen["mae"][1].startswith("**+20.0 (")
    assert ["kind 0", "accuracy", "60.0", "50.0", "1.0 to 20.0"] in tables[3].rows
    assert tables[-1].rows == [
        ["checks", "before the plan", "0:00:10"],
        ["pretraining", "1:00:00", "1:01:40"],
        ["frozen", "in the time that the plan leaves", "0:01:01"],
        ["fine_tuning", "0:30:00", ""],
        ["all", "1:30:00", "1:02:51"],
    ]
    cells = [
        re.sub(r"\\([*_<>$\[\]])", r"\1", re.sub(r"^\*\*(.*)\*\*$", r"\1", cell))
        for one in tables
        for row in one.rows
        for cell in row
    ]
    assert set(cells) - {""} <= set(page.texts)
    assert full_report.verdict in page.texts and f"**{full_report.verdict}**" in readme


def test_charts_are_drawn_from_the_data(full_report, folder):
    sections = full_report.sections()
    forest = sections["Fine-tuned"][-1].figure.axes[0]
    assert [label.get_text() for label in forest.get_yticklabels()] == [
        "to dinov2-base", "to mae", "to random weights", "to $x_$"
    ]  # fmt: skip
    means = [container.lines[0].get_xdata()[0] for container in forest.containers]
    assert means == pytest.approx([100 * one.mean for one in full_report.differences().values()])
    curve = sections["Fewer labels"][-1].figure.axes[0].lines[0]
    assert curve.get_xydata().tolist() == [pytest.approx([25, 20]), pytest.approx([100, 60])]
    for file in re.findall(r"!\[.*?\]\((.*?)\)", (folder / "README.md").read_text()):
        assert Image.open(folder / file.replace("%20", " ")).size > (100, 100)


def test_page_loads_nothing_and_escapes_texts(full_report, folder):
    page = Page((folder / "report.html").read_text())
    assert "script" not in page.tags and page.tags.count("svg") == 2 and page.tags.count("img") == 1
    assert all(value.startswith(("#", "data:image/png;base64,")) for value in page.loaded)
    assert EVIL in page.texts and "to $x_$" in page.texts
    assert not re.search(r"url\((?!#)|@import", (folder / "report.html").read_text())
    assert re.search(r"(?<!\\)<script", (folder / "README.md").read_text()) is None
