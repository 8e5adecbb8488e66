"""The bars: what a terminal and a log file show."""

from __future__ import annotations

import io
import time
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from mamba_sft.cli.progress import StageBar, TaskBar, TrainingBar


def drive(console: Console, steps: int, start: int = 0) -> TrainingBar:
    """Calls the bar as the trainer does."""
    bar = TrainingBar(console)
    state: Any = SimpleNamespace(max_steps=steps, global_step=start, is_world_process_zero=True)
    nothing: Any = None
    bar.on_train_begin(nothing, state, nothing)
    for step in range(start + 1, steps + 1):
        bar.on_step_begin(nothing, state, nothing)
        time.sleep(0.002)
        state.global_step = step
        bar.on_step_end(nothing, state, nothing)
        bar.on_log(nothing, state, nothing, logs={"loss": 3.0 / step, "num_tokens": 1000.0 * step})
        if step == steps // 2:
            bar.on_log(nothing, state, nothing, logs={"eval_loss": 1.5})
    bar.on_train_end(nothing, state, nothing)
    return bar


def test_a_log_file_gets_about_twenty_lines() -> None:
    text = io.StringIO()
    drive(Console(file=text, width=100), 200)
    lines = [line for line in text.getvalue().splitlines() if line]  # rich 14.0 ends with an empty one
    assert len(lines) == 20
    assert lines[-1].startswith("step 200/200  loss 0.015  val 1.500  ")
    assert "tokens/s" in lines[-1]
    assert lines[-1].endswith("0 s left")


def test_a_line_has_the_validation_loss_of_its_own_step() -> None:
    text = io.StringIO()
    drive(Console(file=text, width=100), 8)
    lines = text.getvalue().splitlines()
    assert ["val" in line for line in lines] == [False] * 3 + [True] * 5
    assert lines[3].startswith("step 4/8  loss 0.750  val 1.500")


@pytest.mark.parametrize("terminal", [True, False])
def test_sample_answers_are_counted_while_they_are_given(terminal: bool) -> None:
    text = io.StringIO()
    bar = TrainingBar(Console(file=text, force_terminal=terminal, width=100, color_system=None))
    for when in ("before", "after"):
        for done in (1, 2, 3):
            bar.on_sample_answer(when, done, 3)
    for when in ("before", "after"):
        assert (f"answers {when} training" in text.getvalue()) == terminal
    bar.on_sample_answer("after", 1, 3)
    bar.close()  # stopped in the middle: the terminal is free again
    assert bar._answers is None


def test_a_terminal_gets_one_line_with_everything() -> None:
    text = io.StringIO()
    drive(Console(file=text, force_terminal=True, width=140, color_system=None), 8)
    last = text.getvalue()
    for part in ("training", "8/8", "loss 0.375", "val 1.500", "tokens/s", "left"):
        assert part in last


def test_tokens_per_second_counts_steps_only() -> None:
    bar = drive(Console(file=io.StringIO()), 10)
    assert bar.counted == 9000  # the first step only sets the mark
    assert 0.015 < bar.seconds < 5


def test_a_resumed_run_estimates_from_its_own_steps() -> None:
    text = io.StringIO()
    drive(Console(file=text, width=100), 20, start=10)
    first = text.getvalue().splitlines()[0]
    assert first.startswith("step 11/20")
    assert float(first.rsplit(" s left", 1)[0].rsplit(" ", 1)[1]) < 60


@pytest.mark.parametrize("terminal", [True, False])
def test_stages(terminal: bool) -> None:
    text = io.StringIO()
    with StageBar(Console(file=text, force_terminal=terminal, width=100, color_system=None)) as bar:
        bar.update("merging", 50, 100)
        bar.update("merging", 100, 100)
        bar.update("checking", 1, 2)
    assert ("merging" in text.getvalue()) == terminal
    assert ("checking" in text.getvalue()) == terminal


@pytest.mark.parametrize("terminal", [True, False])
def test_tasks(terminal: bool) -> None:
    text = io.StringIO()
    with StageBar(Console(file=text, force_terminal=terminal, width=100, color_system=None)) as drawn:
        bar = TaskBar(drawn, 3)
        for name, done in (
            ("musr", 0),
            ("musr", 2),
            ("ifeval", 0),
            ("ifeval", 2),
            ("ifeval", 0),
            ("ifeval", 1),
        ):
            bar.update(name, done, 2)
        bar.end()
    if terminal:
        assert "tasks" in text.getvalue()
        assert "ifeval" in text.getvalue()
    else:  # the same task again is that of the second model
        assert text.getvalue().splitlines()[:3] == ["1/3  musr", "2/3  ifeval", "3/3  ifeval"]
