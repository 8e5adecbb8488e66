"""The notebooks: made by their script, short, and run from start to end on the tiny base."""

from __future__ import annotations

import importlib.util
import json
import re
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]
KEPT = ("torch", "numpy", "pandas", "matplotlib")
"""What an installation must leave as it is: a runtime has these loaded, and builds of its own."""

nbformat = pytest.importorskip("nbformat")


@pytest.fixture(scope="module")
def maker() -> Any:
    spec = importlib.util.spec_from_file_location("make_notebooks", ROOT / "notebooks/make_notebooks.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["make_notebooks"] = module  # where its dataclasses look their names up
    spec.loader.exec_module(module)
    return module


def stored(kind: Any) -> Any:
    return nbformat.read(ROOT / f"notebooks/{kind.file}.ipynb", as_version=4)


def by_id(notebook: Any) -> dict[str, Any]:
    return {cell["id"]: cell for cell in notebook.cells}


def test_the_files_are_what_the_script_makes(maker: Any) -> None:
    """After a change: `python notebooks/make_notebooks.py`."""
    for kind in maker.KINDS:
        made, there = maker.notebook_of(kind), stored(kind)
        nbformat.validate(there)
        assert [(cell["id"], cell.source) for cell in there.cells] == [
            (cell["id"], cell.source) for cell in made.cells
        ]
        assert {name: there.metadata[name] for name in made.metadata} == made.metadata
    names = {f"{kind.file}.ipynb" for kind in maker.KINDS}
    assert {path.name for path in (ROOT / "notebooks").glob("*.ipynb")} == names


def test_each_names_what_was_asked_for(maker: Any) -> None:
    asked = {"doctor", "plan", "preview", "generate", "memory", "train", "merge", "export", "report", "chat"}
    for kind in maker.KINDS:
        code = "\n".join(cell.source for cell in maker.cells_of(kind) if cell.cell_type == "code")
        imported = re.findall(r"^from mamba_sft import (.+)$", code, re.MULTILINE)
        assert asked <= {name for names in imported for name in names.split(", ")}
        title = maker.cells_of(kind)[0].source
        assert (
            f"colab.research.google.com/github/{maker.REPOSITORY}/blob/main/notebooks/{kind.file}.ipynb"
            in title
        )
    assert "T4 x2" in maker.cells_of(maker.KINDS[0])[0].source


def test_cells_are_short_and_import_only_public_names(maker: Any) -> None:
    import mamba_sft

    for kind in maker.KINDS:
        for cell in maker.cells_of(kind):
            if cell.cell_type != "code":
                continue
            lines = cell.source.splitlines()
            assert len(lines) <= 16, cell["id"]
            assert max(map(len, lines)) <= 100, cell["id"]
            for module in re.findall(r"^\s*(?:from|import) (\S+)", cell.source, re.MULTILINE):
                assert module in {"mamba_sft", "os", "google.colab"}, cell["id"]
            for names in re.findall(r"^from mamba_sft import (.+)$", cell.source, re.MULTILINE):
                assert set(names.split(", ")) <= set(mamba_sft.__all__)


def test_the_quickstart_has_the_outputs_of_a_whole_run(maker: Any) -> None:
    cells = by_id(stored(next(kind for kind in maker.KINDS if kind.recipe == "quickstart")))
    for name, cell in cells.items():
        if cell.cell_type == "code" and name not in {"install", "settings", "download", "push"}:
            kinds = {kind for one in cell.outputs for kind in one.get("data", {})}
            assert kinds & {"text/html", "application/vnd.jupyter.widget-view+json"}, name
    text = json.dumps([cell.get("outputs", []) for cell in cells.values()], ensure_ascii=False)
    assert "step 320 of 320" in text
    score = re.search(r"exact match after\s+(\d+\.\d) %", text)
    assert score is not None
    assert float(score[1]) > 90
    assert not [
        one for cell in cells.values() for one in cell.get("outputs", []) if one.output_type == "error"
    ]
    assert not re.findall(r"(?<![\w.])/(?:root|home|tmp|work|Users)/", text), (
        "places of the machine that ran it"
    )


def test_the_others_have_none(maker: Any) -> None:
    for kind in maker.KINDS:
        if kind.recipe != "quickstart":
            assert not [cell["id"] for cell in stored(kind).cells if cell.get("outputs")]


def run_tiny(maker: Any, number: int, place: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Runs a notebook from start to end on the tiny base: one cell, its settings, is replaced."""
    pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    kind = maker.KINDS[number]
    notebook = maker.notebook_of(kind)
    by_id(notebook)["settings"].source = maker.tiny_settings(kind, Path("runs/tiny"))
    cells = by_id(maker.executed(notebook, place))
    assert all(
        cell.execution_count
        for name, cell in cells.items()
        if "execution_count" in cell and name != "install"
    )
    return cells


def outputs_of(cell: Any, kind: str) -> list[Any]:
    return [one for one in cell.outputs if one.output_type == kind]


def test_the_quickstart_runs_from_start_to_end(
    maker: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cells = run_tiny(maker, 2, tmp_path, monkeypatch)
    train = cells["train"]
    (bar,) = outputs_of(train, "display_data")
    assert "step 3 of 3" in bar["data"]["text/plain"], "one bar, ours, and not the trainer's beside it"
    messages = "".join(one["text"] for one in outputs_of(train, "stream"))
    assert "scan and convolution: backend cpu" in messages
    assert {one["name"] for one in outputs_of(train, "stream")} == {"stdout"}
    assert "finished" in cells["run"].outputs[-1]["data"]["text/plain"]
    assert "What is the opposite of hot?" in cells["after"].outputs[-1]["data"]["text/html"]
    assert "srcdoc" in cells["report"].outputs[-1]["data"]["text/html"]
    assert "here it is: runs/tiny/export" in cells["download"].outputs[-1]["text"]
    assert (tmp_path / "runs/tiny/merged/config.json").is_file()
    assert list((tmp_path / "runs/tiny/export").glob("*Q8_0.gguf"))


@pytest.mark.slow
@pytest.mark.parametrize("number", [0, 1], ids=["t4", "gpu"])
def test_the_gpu_notebooks_run_from_start_to_end(
    maker: Any, number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cells = run_tiny(maker, number, tmp_path, monkeypatch)
    assert "finished" in cells["run"].outputs[-1]["data"]["text/plain"]
    assert "answers side by side" in cells["after"].outputs[-1]["data"]["text/plain"]


def colab() -> dict[str, str]:
    """What a Colab runtime has, without the ends of versions that name a build."""
    lines = (ROOT / "tests/colab_packages.txt").read_text(encoding="utf-8").splitlines()
    pairs = (line.split("==") for line in lines if line and not line.startswith("#"))
    return {name.lower(): version.partition("+")[0] for name, version in pairs}


def installed_by_the_notebooks() -> list[Requirement]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    return [Requirement(line) for line in (*project["dependencies"], *extras["gguf"], *extras["notebook"])]


def test_an_installation_on_colab_leaves_what_is_there(maker: Any) -> None:
    there = colab()
    assert set(KEPT) <= set(there)
    refused = [
        str(one)
        for one in installed_by_the_notebooks()
        if one.name.lower() in (*KEPT, "ipython", "ipywidgets", "psutil", "packaging")
        and not one.specifier.contains(there[one.name.lower()], prereleases=True)
    ]
    assert not refused, "these would be replaced, most of them under a kernel that has them loaded"
    assert "constraints" not in maker.INSTALL
    assert "-U" not in maker.INSTALL.split()


@pytest.mark.slow
@pytest.mark.network
def test_all_that_comes_with_it_leaves_them_too(tmp_path: Path) -> None:
    """Asks pip for a set of packages in which they are as they were; needs the package index."""
    import subprocess

    there = colab()
    (tmp_path / "kept.txt").write_text("".join(f"{name}=={there[name]}\n" for name in KEPT))
    wanted = [str(one) for one in installed_by_the_notebooks()]
    command = [
        sys.executable, "-m", "pip", "install", "--dry-run", "--quiet", "--ignore-installed",
        "--python-version", "3.12", "--only-binary=:all:", "--target", str(tmp_path / "nowhere"),
        "-c", str(tmp_path / "kept.txt"),
        "--report", str(tmp_path / "report.json"), *wanted, "matplotlib",
    ]  # fmt: skip
    subprocess.run(command, check=True)
    report = json.loads((tmp_path / "report.json").read_text())
    found = {one["metadata"]["name"].lower(): one["metadata"]["version"] for one in report["install"]}
    assert {name: found[name] for name in KEPT} == {name: there[name] for name in KEPT}
