"""What is imported is declared and the other way round; what is said of it was read in what is pinned."""

from __future__ import annotations

import re
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


SAID = re.compile(
    r"\b(PEFT|TRL|bitsandbytes|transformers)\W[^().]{0,20}\((\d[\d.]+), read 20\d\d-\d\d-\d\d\)"
)
"""A tool, its version and when that was read, as in `PEFT (0.21.2, read 2026-11-27)`."""


def test_what_is_said_of_other_tools_was_read_in_their_pinned_versions() -> None:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pinned = dict(line.lower().split("==") for line in lines if "==" in line)
    files = [ROOT / "README.md", *sorted((ROOT / "mamba_sft").rglob("*.py"))]
    said = [
        (path.relative_to(ROOT).as_posix(), tool.lower(), version)
        for path in files
        for tool, version in SAID.findall(path.read_text(encoding="utf-8"))
    ]
    assert {tool for _, tool, _ in said} == {"bitsandbytes", "peft", "transformers", "trl"}
    assert [claim for claim in said if pinned[claim[1]] != claim[2]] == []
