"""What the scenarios measured, as one JSON file; and the choice of their size.

python -m tests.faults.report faults-report.json      (the same as a Markdown table)
"""

import fcntl
import json
import os
import sys
from collections import Counter
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

import pytest

from tests.faults.harness import FULL

T = TypeVar("T")

full_only = pytest.mark.skipif(not FULL, reason="full run only")


def sized(default: T, full: T) -> T:
    """Return the number for this run: scaled down in the default one."""
    return full if FULL else default


@dataclass
class Scenario:
    """One test's seed and figures, for the report."""

    name: str
    seed: int
    figures: dict[str, Any] = field(default_factory=dict)

    def record(self, **figures: Any) -> None:
        """Add figures to the report, seconds with two digits."""
        self.figures |= {
            name: round(value, 3) if isinstance(value, float) else value
            for name, value in figures.items()
        }

    def write(self, outcome: str, seconds: float) -> None:
        """Put the scenario into the report, if this run writes one."""
        path = report_path()
        if path is None:
            return
        entry = {
            "outcome": outcome,
            "seed": self.seed,
            "seconds": round(seconds, 1),
            "figures": self.figures,
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a+", encoding="utf-8") as file:
            fcntl.flock(file, fcntl.LOCK_EX)  # the other processes of the run write to it too
            file.seek(0)
            report = _of_this_run(file.read())
            report["scenarios"][self.name] = entry
            report["totals"] = _totals(list(report["scenarios"].values()))
            file.seek(0)
            file.truncate()
            file.write(json.dumps(report, indent=2, sort_keys=True) + "\n")


def _totals(entries: list[dict[str, Any]]) -> dict[str, Any]:
    """Sum what the oracle counted in all scenarios so far."""
    figures = [entry["figures"] for entry in entries]
    jobs: Counter[str] = Counter()
    for each in figures:
        jobs.update(each.get("jobs", {}))
    counted = ("creates", "lost_answers", "created_twice", "files")
    return {
        "scenarios": dict(Counter(entry["outcome"] for entry in entries)),
        "jobs": jobs.total(),
        "jobs_by_status": dict(jobs),
        **{name: sum(each.get(name, 0) for each in figures) for name in counted},
    }


def report_path() -> Path | None:
    """Return where the report goes; None when this run writes none."""
    given = os.environ.get("FAULTS_REPORT")
    if given:
        return Path(given)
    return Path("faults-report.json") if FULL else None


def _of_this_run(text: str) -> dict[str, Any]:
    """Go on with the report if it is this run's, else begin a new one."""
    run = os.environ.get("PYTEST_XDIST_TESTRUNUID", str(os.getpid()))
    report: dict[str, Any] = json.loads(text) if text else {}
    if report.get("run") == run:
        return report
    return {
        "run": run,
        "size": "full" if FULL else "default",
        "started_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "processors": os.cpu_count(),
        "scenarios": {},
    }


def as_table(report: dict[str, Any]) -> str:
    """Return the report as Markdown: a row a scenario, its figures in words."""
    rows = [
        f"| {name} | {entry['outcome']} | {entry['seconds']:.0f} | {_in_words(entry['figures'])} |"
        for name, entry in sorted(report["scenarios"].items())
    ]
    return "\n".join(["| scenario | outcome | s | figures |", "| --- | --- | --- | --- |", *rows])


def _in_words(figures: dict[str, Any]) -> str:
    """Leave out what is nothing, and what the totals tell."""
    jobs = ", ".join(f"{count} {status}" for status, count in figures.get("jobs", {}).items())
    others = [
        f"{name.replace('_', ' ')} {value}"
        for name, value in sorted(figures.items())
        if name not in ("jobs", "creates", "files", "reached") and value not in (0, 0.0, None)
    ]
    return "; ".join(filter(None, [jobs, *others]))


if __name__ == "__main__":
    print(as_table(json.loads(Path(sys.argv[1]).read_text())))  # noqa: T201
