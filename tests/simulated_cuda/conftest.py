from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.simulated_cuda.build import COMPILER, compiler

ROOT = Path(__file__).parents[2]
Results = dict[str, dict[str, Any]]


@pytest.fixture
def can_simulate() -> None:
    """Skips where the card cannot be made."""
    if compiler() is None or not sys.platform.startswith("linux"):
        pytest.skip(f"the simulated card is compiled by `{COMPILER}`, on Linux, and there is none here")
    if torch.version.cuda is not None:
        pytest.skip("the simulated card answers for CUDA in a torch without it, and this one has its own")


@pytest.fixture
def run_script(can_simulate: None, tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs a script of the checkout with a card in it and in every process that it starts."""

    def run(card: str, script: str, *words: str) -> subprocess.CompletedProcess[str]:
        places = (ROOT / "tests" / "simulated_cuda" / "everywhere", ROOT)
        inherited = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
        return subprocess.run(
            [sys.executable, str(ROOT / script), *words], capture_output=True, text=True, check=False,
            cwd=tmp_path, stdin=subprocess.DEVNULL,
            env=inherited
            | {"PYTHONPATH": os.pathsep.join(map(str, places)), "SIMULATED_CARD": card,
               "HF_HUB_OFFLINE": "1", "NUMBA_NUM_THREADS": "1"},
        )  # fmt: skip

    return run


@pytest.fixture
def run_jobs(can_simulate: None, tmp_path: Path) -> Callable[..., Results]:
    """Runs jobs (see `run`) in a process of their own, with a card or, for `cpu`, without one."""

    def run(card: str, *jobs: list[str], fails: bool = False, **environment: str) -> Results:
        place = tmp_path / card
        place.mkdir(exist_ok=True)
        inherited = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
        done = subprocess.run(
            [sys.executable, "-m", "tests.simulated_cuda.run", card],
            input=json.dumps(jobs), capture_output=True, text=True, check=False, cwd=place,
            env=inherited | {"PYTHONPATH": str(ROOT), "TOKENIZERS_PARALLELISM": "false"} | environment,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-4000:]
        results: Results = json.loads(done.stdout.splitlines()[-1])
        broken = [found["traceback"] for found in results.values() if "error" in found]
        assert fails or not broken, broken[0]
        return results

    return run
