"""What the quickstart says in the end: where the picture really lies."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from app.config import Settings
from scripts.quickstart import _report

RUNNING: Any = SimpleNamespace(api_url="http://127.0.0.1:8000", flower_url="http://127.0.0.1:5555")


def said(capsys: pytest.CaptureFixture[str], url: str, **settings: Any) -> list[str]:
    job = {"id": "j", "status": "completed", "outputs": [{"url": url}]}
    _report(job, Settings(_env_file=None, **settings), RUNNING)
    return [line.split()[-1] for line in capsys.readouterr().out.splitlines()]


def test_a_file_by_its_own_name(capsys: pytest.CaptureFixture[str]) -> None:
    places = said(capsys, "http://localhost:8000/media/j.webp", storage_path=Path("/data/media"))
    assert places[:2] == ["/data/media/j.webp", "/data/metadata/j.json"]


def test_one_in_a_bucket_by_its_address(capsys: pytest.CaptureFixture[str]) -> None:
    places = said(capsys, "http://localhost:8000/media/j.png", storage_url="s3://media")
    assert places[0] == "http://localhost:8000/media/j.png"
    assert not [place for place in places if "storage" in place]
