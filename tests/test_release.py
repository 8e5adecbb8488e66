"""What a release is made of agrees with itself: versions, Pythons, workflows, the image, the citation."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import yaml

import mamba_sft

ROOT = Path(__file__).parents[1]
WORKFLOWS = sorted((ROOT / ".github/workflows").glob("*.yml"))
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def read(path: Path) -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load(path.read_text(encoding="utf-8"))
    return loaded


def jobs() -> list[tuple[str, str, dict[str, Any]]]:
    return [(path.name, name, job) for path in WORKFLOWS for name, job in read(path)["jobs"].items()]


def test_one_version_everywhere() -> None:
    citation = read(ROOT / "CITATION.cff")
    assert {PROJECT["version"], mamba_sft.__version__, citation["version"]} == {mamba_sft.__version__}
    assert citation["license"] == PROJECT["license"]
    log = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    headings = re.findall(r"^## (.+)$", log, re.MULTILINE)
    assert headings[0] == "[Unreleased]"
    assert all(re.fullmatch(r"\[\d+\.\d+\.\d+\] - \d{4}-\d\d-\d\d", one) for one in headings[1:])
    assert set(re.findall(r"^### (.+)$", log, re.MULTILINE)) <= {
        "Added", "Changed", "Deprecated", "Removed", "Fixed", "Security",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("tag", "unlike"), [(mamba_sft.__version__, None), ("0.0.9", "pyproject.toml"), ("0.1", "pyproject.toml")]
)
def test_a_release_refuses_a_tag_that_is_not_the_version(tag: str, unlike: str | None) -> None:
    (step,) = [
        one
        for one in read(ROOT / ".github/workflows/release.yml")["jobs"]["same-version"]["steps"]
        if "run" in one
    ]
    words = ["bash", "-e", "-c", step["run"]]
    environment = {**os.environ, "GITHUB_REF_NAME": f"v{tag}"}
    done = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == (0 if unlike is None else 1), done.stdout
    assert done.stdout.startswith("" if unlike is None else f"::error file={unlike}::the tag is of {tag}; ")


@pytest.fixture
def build_hook(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """`hatch_build.py`, which only a build imports: hatchling is not installed here."""
    interface = SimpleNamespace(MetadataHookInterface=object)
    monkeypatch.setitem(sys.modules, "hatchling.metadata.plugin.interface", interface)
    spec = importlib.util.spec_from_file_location("hatch_build", ROOT / "hatch_build.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


ADDRESS = "https://github.com/someone/mamba-sft"


def test_the_page_of_an_index_leads_into_the_repository(
    build_hook: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    hook = build_hook.IndexPage()
    hook.root = str(ROOT)
    known: dict[str, Any] = {"version": "1.2.3"}
    monkeypatch.setenv("REPOSITORY_URL", ADDRESS + "/")
    hook.update(known)
    page = known["readme"]["text"]
    assert "REPOSITORY" not in page
    links = re.findall(r"\]\(([^)]+)\)", page)
    assert links
    assert not [link for link in links if not link.startswith("https://")]
    for link in [*links, *known["urls"].values()]:
        file = re.fullmatch(re.escape(ADDRESS) + r"/(blob|raw)/v1\.2\.3/([^#]+)(#.*)?", link)
        assert file is None or (ROOT / file[2]).exists(), link
        assert file is None or (file[1] == "raw") == link.endswith(".svg")
    assert f"![A recording of the quickstart's terminal]({ADDRESS}/raw/v1.2.3/docs/quickstart.svg)" in page

    unknown: dict[str, Any] = {"version": "1.2.3"}
    monkeypatch.delenv("REPOSITORY_URL")
    hook.update(unknown)
    assert unknown["readme"]["text"] == (ROOT / "README.md").read_text(encoding="utf-8")
    assert "urls" not in unknown  # no address is made up


def test_pages_that_a_workflow_builds_know_the_address() -> None:
    built = [
        (file, step["env"]["REPOSITORY_URL"])
        for file, _, job in jobs()
        for step in job.get("steps", [])
        if "python -m build" in step.get("run", "") or "mkdocs build" in step.get("run", "")
    ]
    address = "${{ github.server_url }}/${{ github.repository }}"
    assert built == [("docs.yml", address), ("wheel.yml", address)]


def test_the_workflows_are_those_that_a_release_needs() -> None:
    assert [path.stem for path in WORKFLOWS] == ["docs", "lint", "release", "tests", "wheel"]
    for path in WORKFLOWS:
        assert read(path)["permissions"] == {"contents": "read"}, path.name
    for file, name, job in jobs():
        assert "uses" in job or job["timeout-minutes"], f"{file}: {name}"


def test_the_wheel_is_tried_on_every_python_that_is_named() -> None:
    named = [line.rpartition(" ")[2] for line in PROJECT["classifiers"] if ":: Python :: 3." in line]
    (matrix,) = [
        job["strategy"]["matrix"] for file, _, job in jobs() if file == "wheel.yml" if "strategy" in job
    ]
    assert matrix["python"] == named
    assert PROJECT["requires-python"] == f">={named[0]}"


def test_the_three_sets_of_packages_are_tested() -> None:
    tests = read(ROOT / ".github/workflows/tests.yml")["jobs"]
    assert {one["set"] for one in tests["bounds"]["strategy"]["matrix"]["include"]} == {"oldest", "newest"}
    assert {"run": "bash .ci/run"} in tests["pinned"]["steps"]


def test_what_workflows_and_the_image_name_is_there() -> None:
    texts = [path.read_text(encoding="utf-8") for path in [*WORKFLOWS, ROOT / "Dockerfile"]]
    for name in re.findall(r"(?<![\w/.-])((?:docs|benchmarks|\.ci)/[\w./-]+|[\w-]+\.txt)", "\n".join(texts)):
        assert (ROOT / name).exists() or name == "set.txt", name  # which uv writes
    left_out = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    copied = re.findall(r"^COPY (?!--from)(.+) \S+$", texts[-1], re.MULTILINE)
    assert not {path for line in copied for path in line.split()} & set(left_out)


@pytest.mark.parametrize("tool", ["hadolint", "actionlint"])
def test_linters_find_nothing(tool: str) -> None:
    """They are no packages of Python, so they are asked where they are installed, as in the workflow."""
    if shutil.which(tool) is None:
        pytest.skip(f"{tool} is not here")
    files = [ROOT / "Dockerfile"] if tool == "hadolint" else WORKFLOWS
    done = subprocess.run([tool, *map(str, files)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
