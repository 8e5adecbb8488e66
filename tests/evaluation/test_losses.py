"""A loss that rose is told from one that wavers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mamba_sft.evaluation.losses import loss_warnings, risen_loss
from mamba_sft.evaluation.report import write_report
from mamba_sft.run import Run


def log(losses: list[float]) -> list[dict[str, Any]]:
    lines: list[dict[str, Any]] = [
        {"step": step, "loss": loss, "learning_rate": 2e-3} for step, loss in enumerate(losses, start=1)
    ]
    return [*lines, {"step": len(losses), "eval_loss": 99.0}, {"step": len(losses), "train_loss": 99.0}]


@pytest.mark.parametrize(
    "losses", [[], [3.0], [3.0, 1.0], [3.0, 3.3], [2.0, 9.0, 2.1], [2.0, 2.4] * 20, [1.0] * 50 + [5.0]]
)
def test_a_loss_that_falls_or_wavers_is_not_told(losses: list[float]) -> None:
    assert risen_loss(log(losses)) is None
    assert loss_warnings(log(losses)) == []


@pytest.mark.parametrize("losses", [[3.0, 4.0], [2.0] * 5 + [6.0] * 5, [4.0, 1.0] + [7.0] * 30])
def test_a_loss_that_rose_is_told(losses: list[float]) -> None:
    (warning,) = loss_warnings(log(losses))
    assert "well above" in warning
    assert warning.endswith("\ntrain.learning_rate=0.0002")


def test_the_report_says_so(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.recipe.write_text("output_dir: x\n")
    run.environment.write_text(json.dumps({"packages": {"mamba-sft": "1"}}))
    for losses, told in (([2.0, 9.0], True), ([9.0, 2.0], False)):
        run.metrics_file.write_text("".join(json.dumps(line) + "\n" for line in log(losses)))
        write_report(run)
        assert ("the training loss ended at 9" in run.report.read_text()) is told
