"""docs/logs.md lists the events that the service logs, each with its level, and no others."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
LEVELS = {"debug", "info", "warning", "error", "critical", "exception"}
ROW = re.compile(r"^\| `(\w+)`¹? \| (\w+) \|", re.MULTILINE)


def test_the_documented_events_are_those_in_the_code() -> None:
    documented = ROW.findall((ROOT / "docs/logs.md").read_text())
    assert len(documented) == len(set(documented))
    assert set(documented) == set(_logged())


def _logged() -> Iterator[tuple[str, str]]:
    for path in (ROOT / "app").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            match node:
                case ast.Call(
                    func=ast.Attribute(value=ast.Name(id="log" | "access_log"), attr=level),
                    args=[ast.Constant(value=str(event)), *_],
                ) if level in LEVELS:
                    yield event, "error" if level == "exception" else level
