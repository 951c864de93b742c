"""Every kind of output on both storages, compared with what the provider served."""

import json
from collections import Counter
from io import BytesIO
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import httpx
import pytest
from PIL import Image

from tests.doubles.replicate_ledger import LedgerEntry
from tests.faults.bucket import bucket_settings, fetch_bucket
from tests.faults.harness import Stack, StartStack
from tests.faults.oracle import check
from tests.faults.records import jobs_about
from tests.faults.report import Scenario, sized

# What is asked for: a model, its parameters, and how many files it makes.
KINDS: list[tuple[str, dict[str, Any], int]] = [
    ("acme/painter", {}, 1),
    ("acme/painter", {"output_format": "webp"}, 1),
    ("acme/painter", {"output_format": "jpg", "num_outputs": 3}, 3),
    ("acme/painter", {"output_format": "png", "num_outputs": 4}, 4),
    ("acme/filmer", {}, 1),
    ("acme/writer", {}, 1),
    ("acme/judge", {}, 1),
]


@pytest.mark.parametrize("storage", ["disk", "bucket"])
def test_mixed_models_are_kept_as_they_were_served(
    start_stack: StartStack, scenario: Scenario, s3_url: str, storage: str
) -> None:
    """500 jobs: pictures, lists, videos, texts, documents; a worker is killed in the middle.

    Bytes are the same where nothing was re-encoded, and pixels where something was.
    """
    stack = start_stack(workers=2, **(bucket_settings(s3_url) if storage == "bucket" else {}))
    for model, parameters, _ in islice(cycle(KINDS), sized(7, 500)):
        stack.post(1, model=model, **parameters)
    stack.replace(stack.workers[0])
    stack.wait_until_done(sized(90, 300))
    assert set(stack.counts()) == {"completed"}
    if storage == "bucket":
        fetch_bucket(stack, s3_url)
    kept = Counter[str]()
    entries = {entry.id: entry for entry in stack.replicate.creates()}
    for job in jobs_about(stack):
        kept += _compare(stack, str(job["id"]), entries[job["external_job_id"]])
    scenario.record(kept=dict(kept), **vars(check(stack)))
    assert kept.keys() == {"same bytes", "same pixels", "same text", "same document"}


def _compare(stack: Stack, job_id: str, entry: LedgerEntry) -> Counter[str]:
    """Compare each file of a job with what the provider has; count in which way it is the same."""
    kind = entry.model.partition("/")[2]
    wanted = entry.input.get("num_outputs", 1)
    files = [stack.media / f"{job_id}{_numbered(index)}" for index in range(wanted)]
    kept = Counter[str]()
    for index, stem in enumerate(files):
        [file] = stem.parent.glob(f"{stem.name}.*")
        if kind == "writer":
            assert file.read_text().split()[4:] == entry.input["prompt"].split()
            kept["same text"] += 1
        elif kind == "judge":
            assert json.loads(file.read_text())["caption"] == entry.input["prompt"]
            kept["same document"] += 1
        else:
            kept[_compare_file(file, _served(stack, entry, index))] += 1
    assert len(list(stack.media.glob(f"{job_id}*"))) == wanted
    return kept


def _numbered(index: int) -> str:
    return f"-{index}" if index else ""


def _served(stack: Stack, entry: LedgerEntry, index: int) -> bytes:
    suffix = "mp4" if entry.model.endswith("/filmer") else entry.input["output_format"]
    url = f"{stack.replicate.origin}/files/{entry.id}/out-{index}.{suffix}"
    return httpx.get(url, trust_env=False).raise_for_status().content


def _compare_file(file: Path, served: bytes) -> str:
    if file.read_bytes() == served:
        return "same bytes"
    assert not served.startswith(b"\x89PNG")
    assert file.suffix == ".png"
    with Image.open(file) as kept, Image.open(BytesIO(served)) as original:
        assert kept.convert("RGB").tobytes() == original.convert("RGB").tobytes()
    return "same pixels"
