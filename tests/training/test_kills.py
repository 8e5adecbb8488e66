"""A process that is killed goes on as if it had not been; `benchmarks/bench_kills.py` does the killing."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("kills", "seed"), [(2, 1), pytest.param(20, 2, marks=pytest.mark.slow)], ids=["few", "many"]
)
def test_killed_runs_end_as_undisturbed_ones(kills: int, seed: int) -> None:
    done = subprocess.run(
        [sys.executable, "benchmarks/bench_kills.py", "--kills", str(kills), "--seed", str(seed)],
        check=False, cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{kills} kills, {kills // 2} of them in the middle of a change of files" in done.stdout
    assert "no differences from the undisturbed run" in done.stdout
