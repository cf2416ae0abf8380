"""Scores that a run must reach."""

import pytest

from modeling_vitp.pretraining.arguments import PretrainArguments
from modeling_vitp.pretraining.requirements import Requirement, check_requirements

METRICS = {"probe": {"least_gain": {"linear": 0.03, "nonlinear": -0.01}}, "answers": {"count": 2}, "seed": 0}


def test_requirement_is_parsed():
    for text, relation, bound in [
        ("> 0.02", ">", 0.02),
        (">=0.02", ">=", 0.02),
        (" < -1 ", "<", -1),
        ("<=1e-3", "<=", 1e-3),
    ]:
        assert Requirement.parse("a.b", text) == Requirement("a.b", relation, bound)
    # The bound itself is 2, below and above which are 1 and 3.
    for relation, passed in [(">", [0, 0, 1]), (">=", [0, 1, 1]), ("<", [1, 0, 0]), ("<=", [1, 1, 0])]:
        for value, is_passed in zip((1, 2, 3), passed):
            (result,) = check_requirements({"answers.count": f"{relation} 2"}, {"answers": {"count": value}})
            assert result["passed"] is bool(is_passed) and result["reached"] == value


@pytest.mark.parametrize("text", ["0.02", "> high", "== 1", "> nan", 0.02])
def test_text_without_relation_is_refused(text):
    with pytest.raises(ValueError, match=r"'probe\.least_gain\.linear'"):
        Requirement.parse("probe.least_gain.linear", text)


def test_result_has_name_bound_and_value():
    require = {"probe.least_gain.linear": "> 0.02", "probe.least_gain.nonlinear": "> 0.02"}
    first, second = check_requirements(require, METRICS)
    bound = {"score": "probe.least_gain.linear", "relation": ">", "bound": 0.02}
    assert first == bound | {"reached": 0.03, "passed": True}
    assert second["reached"] == -0.01 and second["passed"] is False
    assert check_requirements(None, METRICS) == []


def test_unknown_score_lists_known_keys():
    for score, names in [
        ("probe.least_gain.liner", ["liner", "linear", "nonlinear"]),
        ("prob.least_gain.linear", ["prob", "answers", "probe", "seed"]),
        ("answers.count.mean_error", ["mean_error"]),
        ("probe.least_gain", ["probe.least_gain"]),
    ]:
        (result,) = check_requirements({score: "> 0"}, METRICS)
        assert result["reached"] is None and not result["passed"]
        assert all(name in result["missing"] for name in [score, *names])


def test_bad_requirement_is_refused_before_the_run(tmp_path):
    settings = {"annotations": str(tmp_path)}
    with pytest.raises(ValueError, match=r"'answers\.count\.mean_error'"):
        PretrainArguments(require={"probe.least_gain.linear": "> 0.02", "answers.count.mean_error": "low"}, **settings)
    text = '{"probe.least_gain.linear": "> 0.02"}'
    assert PretrainArguments(require=text, **settings).require == {"probe.least_gain.linear": "> 0.02"}
