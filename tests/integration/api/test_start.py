"""A start that cannot work ends with one clear sentence."""

import sys
from pathlib import Path

import pytest

from tests.process import run

APP = [sys.executable, "-m", "app"]
UVICORN = [sys.executable, "-m", "uvicorn", "app.main:app", "--port", "0"]


@pytest.mark.parametrize("command", [UVICORN, APP])
def test_a_wrong_setting_is_named(command: list[str]) -> None:
    ended = run(command, API_PORT="eighty", REPLICATE_API_TOKEN="r8_secret-word")
    assert ended.returncode != 0
    assert "API_PORT" in ended.stderr
    assert "Traceback" not in ended.stderr
    assert "secret-word" not in ended.stderr


def test_a_storage_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    ended = run(UVICORN, STORAGE_PATH=str(tmp_path / "file" / "media"))
    assert ended.returncode != 0
    assert "STORAGE_PATH: cannot make the storage folders" in ended.stderr
    assert "Traceback" not in ended.stderr
