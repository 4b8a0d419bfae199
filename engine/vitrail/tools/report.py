"""The report of ``vitrail verify``: named checks with their verdicts."""

from dataclasses import asdict, dataclass, field
from typing import Any, Literal

Verdict = Literal["pass", "fail", "note"]


@dataclass(frozen=True, slots=True)
class Check:
    """``facts`` holds the numbers behind the verdict, ready for JSON."""

    name: str
    verdict: Verdict
    text: str
    facts: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Report:
    """The checks of a model that computes in ``dtype``, or whose weights are "int8", and the
    ``reference`` that it was compared with, in words."""

    dtype: str
    reference: str
    checks: tuple[Check, ...]

    @property
    def passed(self) -> bool:
        return all(check.verdict != "fail" for check in self.checks)

    def to_dict(self) -> dict[str, Any]:
        return {"passed": self.passed, **asdict(self)}
