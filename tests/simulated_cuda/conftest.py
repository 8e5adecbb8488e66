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
def run_jobs(tmp_path: Path) -> Callable[..., Results]:
    """Runs jobs (see `run`) in a process of their own, with a card or, for `cpu`, without one."""
    if compiler() is None or not sys.platform.startswith("linux"):
        pytest.skip(f"the simulated card is compiled by `{COMPILER}`, on Linux, and there is none here")
    if torch.version.cuda is not None:
        pytest.skip("the simulated card answers for CUDA in a torch without it, and this one has its own")

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
