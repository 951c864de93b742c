"""A few hundred mutated pictures; `scripts/fuzz_media.py` tries as many as one likes."""

from scripts.fuzz_media import fuzz


def test_no_mutated_picture_does_harm() -> None:
    report = fuzz(400, seed=7, seconds=60)
    assert report.faults == []
    assert sum(report.outcomes.values()) == 500
    assert any("kept" in outcome for outcome in report.outcomes)
    assert any("refused" in outcome for outcome in report.outcomes)
