"""What the package imports is declared in pyproject.toml, and what is declared is imported."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_imports_and_declared_dependencies_agree() -> None:
    found = subprocess.run(
        [sys.executable, "-m", "deptry", ".", "--no-ansi"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert found.returncode == 0, found.stdout + found.stderr
