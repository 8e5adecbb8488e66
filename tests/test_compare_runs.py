"""The tool that refactorings are held against must see a single bit."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from mamba_sft.run import ADAPTER_WEIGHTS, Run

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "compare_runs.py"


@pytest.fixture
def compare(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    spec = importlib.util.spec_from_file_location("compare_runs", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    def run(a: Run, b: Run) -> tuple[int, str]:
        monkeypatch.setattr("sys.argv", ["compare_runs.py", str(a.path), str(b.path)])
        return module.main(), capsys.readouterr().out

    return run


@pytest.fixture
def runs(tmp_path: Path) -> tuple[Run, Run]:
    made = tuple(Run(tmp_path / name) for name in ("a", "b"))
    for run, seconds in zip(made, (1.0, 2.0), strict=True):
        run.adapter.mkdir(parents=True)
        run.recipe.touch()
        lines = [
            {"step": 1, "loss": 2.5, "grad_norm": float("nan")},
            {"step": 2, "loss": 2.25, "train_runtime": seconds, "note": "text"},
        ]
        run.metrics_file.write_text("".join(json.dumps(line) + "\n" for line in lines))
        save_file({"w": torch.arange(4.0)}, run.adapter / ADAPTER_WEIGHTS)
    return made  # type: ignore[return-value]


def test_equal_runs_are_identical_whatever_time_they_took(compare: Any, runs: tuple[Run, Run]) -> None:
    code, text = compare(*runs)
    assert code == 0
    assert text.startswith("identical: 2 lines of metrics up to step 2")


def test_a_changed_bit_and_a_missing_line_are_seen(compare: Any, runs: tuple[Run, Run]) -> None:
    weights = runs[1].adapter / ADAPTER_WEIGHTS
    tensors = load_file(weights)
    tensors["w"][3] = torch.nextafter(torch.tensor(3.0), torch.tensor(4.0))
    save_file(tensors, weights)
    code, text = compare(*runs)
    assert code == 1
    assert "w: differs by at most 2.38e-07" in text
    runs[1].metrics_file.write_text('{"step": 1, "loss": 2.5000000000000004, "grad_norm": NaN}\n')
    text = compare(*runs)[1]
    assert "loss: 1 of 2 values differ, first at step 1" in text
    assert "loss: only one of them logged it at step 2" in text
    assert "grad_norm" not in text
