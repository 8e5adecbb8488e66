"""What the shell offers, asked as the shells ask: by the environment of a process."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from mamba_sft.cli.app import app
from mamba_sft.exporting.gguf import names
from mamba_sft.planning.gpu_names import GB
from mamba_sft.planning.gpus import GPUS
from mamba_sft.recipe.builtin import builtin_recipes
from mamba_sft.wording import GIB


def offered(line: str, shell: str = "fish") -> list[str]:
    """What `shell` is offered for a line, the cursor at its end."""
    ask = {"_MAMBA_SFT_COMPLETE": f"complete_{shell}"}
    if shell == "bash":  # which breaks words at `=` too
        words = line.replace("=", " = ").split(" ") if "=" in line else line.split(" ")
        ask |= {"COMP_WORDS": "\n".join(words), "COMP_CWORD": str(len(words) - 1)}
    else:
        ask |= {"_TYPER_COMPLETE_ARGS": line, "_TYPER_COMPLETE_FISH_ACTION": "get-args"}
    shown = CliRunner().invoke(app, [], prog_name="mamba-sft", env=ask)
    assert shown.exit_code == 0, shown.output
    return [one.partition("\t")[0] for one in shown.stdout.splitlines() if one]


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for age, name in enumerate(("new", "old")):
        run = tmp_path / "runs" / name
        run.mkdir(parents=True)
        (run / "recipe.yaml").write_text("a: 1")
        os.utime(run / "recipe.yaml", (1_000_000 - age, 1_000_000 - age))
    (tmp_path / "runs/new/merged").mkdir()
    (tmp_path / "runs/new/merged/config.json").write_text("{}")
    (tmp_path / "base").mkdir()
    (tmp_path / "base/config.json").write_text("{}")
    (tmp_path / "mine.yaml").write_text("a: 1")
    (tmp_path / "mine.txt").write_text("a: 1")
    return tmp_path


@pytest.mark.parametrize("verb", ["train", "plan", "data"])
@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_recipes(place: Path, verb: str, shell: str) -> None:
    shown = "\n".join(offered(f"mamba-sft {verb} ", shell))
    assert all(name in shown for name in (*builtin_recipes(), "mine.yaml"))
    assert "mine.txt" not in shown


def test_recipes_by_what_is_typed(place: Path) -> None:
    named = [name for name in builtin_recipes() if name.startswith("instruct-")]
    assert offered("mamba-sft train instruct-") == named
    assert {"instruct-qlora", "instruct-t4"} <= set(named)
    assert offered("mamba-sft train m") == ["mine.yaml"]
    assert offered("mamba-sft train runs/n") == ["runs/new/recipe.yaml"]
    assert offered("mamba-sft recipes show lo") == ["long-context"]


def test_runs_the_newest_first(place: Path) -> None:
    for verb in ("merge", "report", "chat", "generate", "export"):
        assert offered(f"mamba-sft {verb} ")[:2] == ["runs/new", "runs/old"]
        assert offered(f"mamba-sft {verb} runs/o", "bash") == ["runs/old"]
    assert offered("mamba-sft report runs/new ") == ["runs/new", "runs/old"]


def test_models_beside_runs(place: Path) -> None:
    assert offered("mamba-sft chat runs/new/") == ["runs/new/merged"]
    assert offered("mamba-sft generate b") == ["base"]
    assert offered("mamba-sft merge b") == []


def test_cards(place: Path) -> None:
    assert offered("mamba-sft plan instruct --card ") == list(GPUS)
    assert offered("mamba-sft plan instruct --card a100", "bash") == ["a100-40", "a100-80"]
    assert [gpu.nominal_bytes for gpu in GPUS.values()] == [size * GIB for size in GB.values()]


def test_quantizations_and_dtypes() -> None:
    assert offered("mamba-sft export -q Q8") == ["Q8_0"]
    assert offered("mamba-sft export --quantization q8") == ["q8_0"]
    assert {"all", *names.QUANTIZED, *names.FLOATS} == set(offered("mamba-sft export -q "))
    assert offered("mamba-sft merge --dtype f") == ["float16", "float32"]
    assert offered("mamba-sft merge --onto d") == ["dequantized"]
    assert offered("mamba-sft export --format ") == ["gguf", "hf", "ollama"]
    assert offered("mamba-sft bench kernels --device c") == ["cpu", "cuda"]


@pytest.mark.parametrize("shell", ["bash", "fish"])
def test_fields_and_their_words(shell: str) -> None:
    steps, norm = "train.max_steps=", "train.max_grad_norm="
    assert offered("mamba-sft train quickstart train.max", shell) == [steps, norm]
    assert offered("mamba-sft plan quickstart seed=1 output", shell) == ["output_dir="]
    found = offered("mamba-sft train quickstart model.dtype=fl", shell)
    before = "" if shell == "bash" else "model.dtype="  # bash has that before the cursor already
    assert found == [f"{before}float16", f"{before}float32"]
    assert offered("mamba-sft train quickstart data.packing=t", shell)[0].endswith("true")
    assert offered("mamba-sft train quickstart train.learning_rate=1", shell) == []


def test_a_lone_equals_sign_ends_no_completion() -> None:
    assert offered("mamba-sft train quickstart = ", "bash")


def test_methods_are_those_that_files_have() -> None:
    types = pytest.importorskip("mamba_sft.exporting.gguf.types")
    assert list(types.METHODS) == [*names.QUANTIZED, *names.FLOATS]
    assert [name for name, method in types.METHODS.items() if method.quantized] == list(names.QUANTIZED)


def test_a_tab_loads_no_heavy_library(place: Path) -> None:
    code = """
import atexit, sys
from mamba_sft.cli.app import app
heavy = {"torch", "transformers", "numpy", "gguf"}
atexit.register(lambda: print(sorted(heavy & set(sys.modules))))
app(prog_name="mamba-sft")
"""
    for line in ("train q", "plan x --card a", "export -q Q", "chat r", "train q train.max_steps"):
        ask = {"_MAMBA_SFT_COMPLETE": "complete_fish", "_TYPER_COMPLETE_FISH_ACTION": "get-args"}
        ask["_TYPER_COMPLETE_ARGS"] = f"mamba-sft {line}"
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=os.environ | ask
        )
        first, *_, last = done.stdout.splitlines()
        assert (bool(first), last) == (True, "[]")


def test_the_script_for_a_shell() -> None:
    ask = {"_MAMBA_SFT_COMPLETE": "source_bash"}
    shown = CliRunner().invoke(app, [], prog_name="mamba-sft", env=ask)
    assert "_MAMBA_SFT_COMPLETE=complete_bash" in shown.stdout
    assert "mamba-sft" in shown.stdout
