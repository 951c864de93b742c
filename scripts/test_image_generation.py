"""Checks one high-quality picture of a running service, from the prompt to the downloaded PNG.

Against Replicate (a real token) the picture is a paid one. Usage:
python scripts/test_image_generation.py [http://localhost:8000]
"""

import hashlib
import sys
from io import BytesIO
from pathlib import Path

import httpx
from PIL import Image

# Run by its path, a script finds the modules of its own folder only.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from scripts.checks import (
    Job,
    Report,
    completed_job,
    expect,
    expect_status,
    living_worker,
    run,
)

WIDTH = HEIGHT = 1024
REQUEST = {
    "prompt": "A photorealistic portrait of a majestic lion in golden hour lighting,"
    " ultra detailed, 8K quality",
    "model_name": "black-forest-labs/flux-schnell",
    # A string that holds an object: the documented form.
    "parameters": f'{{"width": {WIDTH}, "height": {HEIGHT},'
    ' "num_inference_steps": 4, "guidance_scale": 3.5}',
}


def check_picture(client: httpx.Client, report: Report) -> None:
    """Every check, in order."""
    report.need("A worker is alive", living_worker, client)
    job = report.need("A high-quality job completes", completed_job, client, report, **REQUEST)
    report.check("The job tells what it made", expect_result, job)
    picture = report.need("The picture can be downloaded", download, client, job)
    report.check("Its SHA-256 and size are the job's", expect_identity, job, picture)
    report.check("It opens as a PNG", expect_png, picture)
    report.check(f"It has {WIDTH} x {HEIGHT} pixels", expect_size, picture)
    report.check("It is not of one colour", expect_content, picture)
    report.check("/media has the same bytes", expect_same_media, client, job, picture)


def expect_result(job: Job) -> None:
    """Raises: CheckFailed unless a completed job has its results and no error."""
    expect(job["outputs"], "The job has no outputs.")
    expect(job["result_url"].endswith(f"/{job['id']}.png"), f"result_url: {job['result_url']}")
    expect(job["file_size"] == job["outputs"][0]["size_bytes"], "file_size is another one.")
    expect(job["external_job_id"], "The prediction's id is missing.")
    expect(job["created_at"] <= job["started_at"] <= job["completed_at"], "The times run back.")
    expect(job["error_code"] is None, f"The job has the error {job['error_code']}.")


def download(client: httpx.Client, job: Job) -> bytes:
    """Return the bytes of the picture. Raises: CheckFailed, httpx.HTTPError."""
    answer = client.get(f"/api/v1/download/{job['id']}")
    expect_status(answer, 200)
    media_type = answer.headers["content-type"]
    expect(media_type == "image/png", f"The picture came as {media_type}.")
    name = answer.headers.get("content-disposition", "")
    expect(f"{job['id']}.png" in name, f"Content-Disposition: {name}")
    return answer.content


def expect_identity(job: Job, picture: bytes) -> None:
    """Raises: CheckFailed unless these are the bytes that the job recorded."""
    output = job["outputs"][0]
    expect(len(picture) == output["size_bytes"], f"{len(picture)} bytes came.")
    sha256 = hashlib.sha256(picture).hexdigest()
    expect(sha256 == output["sha256"], f"The SHA-256 of what came is {sha256}.")


def expect_png(picture: bytes) -> None:
    """Raises: CheckFailed, or what Pillow raises, unless the whole file decodes."""
    with Image.open(BytesIO(picture)) as image:
        expect(image.format == "PNG", f"The format is {image.format}.")
        image.load()


def expect_size(picture: bytes) -> None:
    """Raises: CheckFailed unless the picture has the size that was asked for."""
    with Image.open(BytesIO(picture)) as image:
        expect(image.size == (WIDTH, HEIGHT), f"It has {image.width} x {image.height}.")


def expect_content(picture: bytes) -> None:
    """Raises: CheckFailed when every pixel has the same colour."""
    with Image.open(BytesIO(picture)) as image:
        expect(image.convert("RGB").getcolors(1) is None, "Every pixel has the same colour.")


def expect_same_media(client: httpx.Client, job: Job, picture: bytes) -> None:
    """Raises: CheckFailed unless /media serves the same file, cacheable for ever."""
    answer = client.get(f"/media/{job['id']}.png")
    expect_status(answer, 200)
    expect(answer.content == picture, "The bytes differ.")
    cached = answer.headers.get("cache-control", "")
    expect("immutable" in cached, f"Cache-Control: {cached}")


if __name__ == "__main__":
    sys.exit(run(__doc__, check_picture))
