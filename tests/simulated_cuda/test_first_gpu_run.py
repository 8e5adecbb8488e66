"""The CUDA half of `benchmarks/first_gpu_run.py`, which no CPU takes: every part of it, on tiny shapes.

Not the gpu tests themselves: their shapes are a real card's, and this one's memory is the host's.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

SCRIPT = "benchmarks/first_gpu_run.py"
MEASURED = ("doctor", "kernels", "training", "decode", "residual")


def entry(run_script: Callable[..., Any], place: Path, *names: str) -> tuple[dict[str, Any], str]:
    """Runs the parts with such names and returns what was written of them."""
    ran = run_script("h100", SCRIPT, "--tiny", "--minutes", "25", "--output", str(place), "--only", *names)
    (path,) = place.glob("*.json")
    written = json.loads(path.read_text())
    failed = {part["name"]: (part["reason"], part["log"]) for part in written["parts"] if part["log"]}
    assert failed == {}, ran.stderr[-2000:]
    assert ran.returncode == 0
    return written, path.with_suffix(".md").read_text()


def test_the_largest_residual_of_a_card(run_script: Callable[..., Any], tmp_path: Path) -> None:
    written, text = entry(run_script, tmp_path, "residual")
    ((row,),) = (part["rows"] for part in written["parts"])
    assert row["weights"] == "bf16, random"
    assert row["largest"] == max(row["of each layer"]) > 0
    assert row["logits off"] < 0.05
    assert "A trial of the script on tiny shapes" in text


@pytest.mark.slow
@pytest.mark.timeout(1600)
def test_every_part_that_measures(run_script: Callable[..., Any], tmp_path: Path) -> None:
    written, text = entry(run_script, tmp_path, *MEASURED)
    rows = [row for part in written["parts"] for row in part["rows"] if "table" in row]
    facts = written["parts"][0]["rows"][0]["facts"]
    assert written["card"] == facts["machine"]["gpu"] == "NVIDIA H100 80GB HBM3 (simulated)"
    steps = [row for row in rows if row["table"] == "training"]
    assert len(steps) == 5
    for row in steps:  # bytes are counted on this card, seconds are the host's
        assert row["peak GB"] == pytest.approx(row["planned GB"], rel=0.2), row
        assert row["MFU"] is not None
    assert [row["batch"] for row in rows if row["table"] == "decoding"] == [1, 8, 1, 8]
    assert all(row["of bandwidth"] for row in rows if row["table"] == "decoding")
    scan, *_ = (row for row in rows if row["table"].startswith("scan, backend triton, bfloat16"))
    assert scan["peak_MiB"] > 0
    assert all(f"\n{title}:\n\n|" in text for title in dict.fromkeys(row["table"] for row in rows))
