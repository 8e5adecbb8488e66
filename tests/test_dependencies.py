"""What is imported is declared and the other way round; what is said of it was read in what is pinned."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

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


def pins(name: str) -> dict[str, str]:
    lines = (ROOT / name).read_text(encoding="utf-8").splitlines()
    return {canonicalize_name(line.split("==")[0]): line.split("==")[1] for line in lines if "==" in line}


def declared(*extras: str) -> set[str]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    lines = [line for extra in extras for line in project["optional-dependencies"][extra]]
    named = {canonicalize_name(Requirement(line).name) for line in (lines or project["dependencies"])}
    return named - {"mamba-sft", "triton"}  # triton comes with torch for those who have a GPU


def test_what_tests_and_pages_take_is_pinned_apart_from_what_users_install() -> None:
    users, tools = pins("constraints.txt"), pins("constraints-tools.txt")
    assert "-c constraints-tools.txt" in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    assert declared() | declared("gguf") <= set(users)
    assert declared("test", "docs") <= set(tools)
    assert not declared("test", "docs") & set(users)
    assert all(users[name] == tools[name] for name in set(users) & set(tools))


def test_what_is_said_of_other_tools_was_read_in_their_pinned_versions() -> None:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pinned = dict(line.lower().split("==") for line in lines if "==" in line)
    pages = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    files = [*pages, *sorted((ROOT / "mamba_sft").rglob("*.py"))]
    said = [
        (path.relative_to(ROOT).as_posix(), tool.lower(), version)
        for path in files
        for tool, version in SAID.findall(path.read_text(encoding="utf-8"))
    ]
    assert {tool for _, tool, _ in said} == {"bitsandbytes", "peft", "transformers", "trl"}
    assert [claim for claim in said if pinned[claim[1]] != claim[2]] == []
