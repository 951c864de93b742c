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

# What is asked for: a model and its parameters.
KINDS: list[tuple[str, dict[str, Any]]] = [
    ("acme/painter", {}),
    ("acme/painter", {"output_format": "webp"}),
    ("acme/painter", {"output_format": "jpg", "num_outputs": 3}),
    ("acme/painter", {"output_format": "png", "num_outputs": 4}),
    ("acme/filmer", {}),
    ("acme/writer", {}),
    ("acme/judge", {}),
]


@pytest.mark.parametrize("storage", ["disk", "bucket"])
def test_mixed_models_are_kept_as_they_were_served(
    start_stack: StartStack, scenario: Scenario, s3_url: str, storage: str
) -> None:
    """500 jobs: pictures, lists, videos, texts, documents; a worker is killed in the middle.

    Bytes are the same where nothing was re-encoded, and pixels where something was.
    """
    stack = start_stack(workers=2, **(bucket_settings(s3_url) if storage == "bucket" else {}))
    jobs = sized(7, 500)
    for number, (model, parameters) in enumerate(islice(cycle(KINDS), jobs)):
        stack.post(1, model=model, **parameters)
        if number == jobs // 2:
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
    output = _output(stack, entry.id)
    files = sorted(stack.media.glob(f"{job_id}*"), key=lambda file: (len(file.stem), file.stem))
    if entry.model == "acme/writer":
        assert [file.read_text() for file in files] == ["".join(output)]
        return Counter(["same text"])
    if entry.model == "acme/judge":
        assert [json.loads(file.read_text()) for file in files] == [output]
        return Counter(["same document"])
    return Counter(_compare_file(*pair) for pair in zip(files, output, strict=True))


def _output(stack: Stack, prediction_id: str) -> Any:
    """Ask the provider what this prediction has made."""
    headers = {"Authorization": f"Bearer {stack.replicate.token}"}
    url = f"{stack.replicate.origin}/v1/predictions/{prediction_id}"
    return httpx.get(url, headers=headers, trust_env=False).raise_for_status().json()["output"]


def _compare_file(file: Path, url: str) -> str:
    served = httpx.get(url, trust_env=False).raise_for_status().content
    if file.read_bytes() == served:
        return "same bytes"
    assert not served.startswith(b"\x89PNG")
    assert file.suffix == ".png"
    with Image.open(file) as kept, Image.open(BytesIO(served)) as original:
        assert kept.convert("RGB").tobytes() == original.convert("RGB").tobytes()
    return "same pixels"
