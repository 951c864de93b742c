"""A start that cannot work ends with one clear sentence."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]


def serve(command: list[str], **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", *command],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


UVICORN = ["uvicorn", "app.main:app", "--port", "0"]


@pytest.mark.parametrize("command", [UVICORN, ["app"]])
def test_a_wrong_setting_is_named(command: list[str]) -> None:
    ended = serve(command, API_PORT="eighty", REPLICATE_API_TOKEN="r8_secret-word")
    assert ended.returncode != 0
    assert "API_PORT" in ended.stderr
    assert "Traceback" not in ended.stderr
    assert "secret-word" not in ended.stderr


def test_a_storage_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    ended = serve(UVICORN, STORAGE_PATH=str(tmp_path / "file" / "media"))
    assert ended.returncode != 0
    assert "STORAGE_PATH: cannot make the storage folders" in ended.stderr
    assert "Traceback" not in ended.stderr
