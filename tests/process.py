"""A process of its own that ends by itself, with an environment of its own."""

import os
import subprocess
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parents[1]


def run(
    command: Sequence[str | Path], *, timeout_seconds: float = 60, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run it in the project's folder until it ends, with these variables beside ours."""
    return subprocess.run(
        [*command],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=timeout_seconds,
        check=False,
    )
