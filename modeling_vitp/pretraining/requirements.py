"""Requirements of a run: scores that it must reach, declared by their names in its configuration."""

import operator
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

RELATIONS = {">=": operator.ge, "<=": operator.le, ">": operator.gt, "<": operator.lt}
COMPARISON = re.compile(r"\s*(>=|<=|>|<)\s*([-+.\de]+)\s*", re.IGNORECASE)


@dataclass(frozen=True)
class Requirement:
    """Score that a run must reach.

    Args:
        score: dotted keys of the score in `metrics.json`, such as `probe.least_gain.linear`.
        relation: `>`, `>=`, `<` or `<=`.
        bound: value that the score is compared with.
    """

    score: str
    relation: str
    bound: float

    @classmethod
    def parse(cls, score: str, text: str) -> "Requirement":
        """Read the text of a requirement, such as `"> 0.02"`.

        Raises:
            ValueError: If the text is not a relation and a number; the message names the score.
        """
        try:
            relation, bound = COMPARISON.fullmatch(text).groups()
            return cls(score, relation, float(bound))
        except (TypeError, AttributeError, ValueError) as error:
            raise ValueError(
                f"require: expected {score!r} to be a relation and a number like '> 0.02', got {text!r}."
            ) from error

    def check(self, metrics: Mapping[str, Any]) -> dict[str, Any]:
        """Return the fields, the value `reached`, and whether the requirement is `passed`.

        A score that the metrics do not have is not passed: `reached` is `None`, and `missing` says what is there.
        """
        try:
            reached = look_up(metrics, self.score)
        except ValueError as error:
            return {**asdict(self), "reached": None, "missing": str(error), "passed": False}
        holds = RELATIONS[self.relation]
        return {**asdict(self), "reached": reached, "passed": holds(reached, self.bound)}


def check_requirements(require: Mapping[str, str] | None, metrics: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the result of each requirement, see [`Requirement.check`]."""
    checked_requirements = []
    for score, text in (require or {}).items():
        requirement = Requirement.parse(score, text)
        checked_requirements.append(requirement.check(metrics))
    return checked_requirements


def look_up(metrics: Mapping[str, Any], path: str) -> float:
    """Return a number of nested metrics by its dotted keys.

    Raises:
        ValueError: If a key is not found, or the value is not a number. The message lists the keys that are there.
    """
    value: Any = metrics
    for key in path.split("."):
        if not isinstance(value, Mapping) or key not in value:
            alternatives = ", ".join(sorted(value)) if isinstance(value, Mapping) else value
            raise ValueError(f"{path!r} not found in the metrics of the run. Found instead of {key!r}: {alternatives}.")
        value = value[key]
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"Expected {path!r} to be a number in the metrics of the run, got {value!r}.")
    return float(value)
