"""docs/errors.md lists the error codes that a job can have, and no others."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

from app.providers.replicate.failures import ACCOUNT_REFUSALS

ROOT = Path(__file__).parents[2]
# The calls that a code is written down in.
MAKERS = {"ProviderError", "__init__", "_refused", "_internal", "_unsure", "_fail_all"}
CODE = re.compile(r"[a-z]+(_[a-z]+)*")
# No job shows them: the mock is never asked for its secret, and a deleted input leaves the outcome
# unknown, which has a code of its own.
INNER = {"no_webhooks", "input_deleted"}


def test_the_documented_codes_are_those_in_the_code() -> None:
    documented = re.findall(r"^\| `(\w+)` \|", (ROOT / "docs/errors.md").read_text(), re.MULTILINE)
    assert len(documented) == len(set(documented))
    assert set(documented) == set(_written()) - INNER


def _written() -> Iterator[str]:
    yield from (code for code, _ in ACCOUNT_REFUSALS.values())
    for path in (ROOT / "app").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and _name(node.func) in MAKERS:
                yield from filter(CODE.fullmatch, _texts(node))


def _name(function: ast.expr) -> str:
    match function:
        case ast.Name(id=name) | ast.Attribute(attr=name):
            return name
        case _:
            return ""


def _texts(call: ast.Call) -> Iterator[str]:
    for argument in call.args:
        if isinstance(argument, ast.Constant) and isinstance(argument.value, str):
            yield argument.value
