"""A notebook's cell: our messages, one output that changes, errors as boxes; and elsewhere nothing of it."""

from __future__ import annotations

import inspect
import logging
import os
import re
from typing import Any

import pytest
from transformers import TrainerState

import mamba_sft
from mamba_sft import MambaSFTError, Run
from mamba_sft.errors import UsageError
from mamba_sft.framing import CALLS, in_cell
from mamba_sft.notebook import cell, live, stages
from mamba_sft.notebook.live import LiveTraining
from mamba_sft.notebook.stages import StageBar
from mamba_sft.training.fine_tuning import RunInterruptedError
from tests.notebook.conftest import Kernel, is_safe


def test_elsewhere_nothing_changes(capsys: pytest.CaptureFixture[str]) -> None:
    logger = logging.getLogger("mamba_sft")
    before = list(logger.handlers)
    cell.speak_here()
    assert logger.handlers == before
    cell.Output().show("<b>", "b")
    assert capsys.readouterr().out == ""


def test_messages_appear_in_the_cell_once(
    kernel: Kernel, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(logging.getLogger("mamba_sft"), "handlers", [])
    monkeypatch.setenv("HF_TOKEN", "hf_" + "a" * 20)
    for _ in range(3):
        cell.speak_here()
    logging.getLogger("mamba_sft.training").info("loading `%s\x1b[31m`, %s", "base", os.environ["HF_TOKEN"])
    captured = capsys.readouterr()
    assert captured.out == "loading `base\\x1b[31m`, ***\n"
    assert captured.err == ""


def test_a_handler_of_the_users_stays_the_only_one(kernel: Kernel, monkeypatch: pytest.MonkeyPatch) -> None:
    own = logging.NullHandler()
    monkeypatch.setattr(logging.getLogger("mamba_sft"), "handlers", [own])
    cell.speak_here()
    assert logging.getLogger("mamba_sft").handlers == [own]


def test_an_error_is_one_box_with_message_and_hint() -> None:
    lines = UsageError(
        "no run at `runs/x`\x1b[2J", hint="`mamba-sft train RECIPE` makes one"
    )._render_traceback_()
    text = re.sub(r"\x1b\[[0-9;]*m", "", "\n".join(lines))
    assert text.startswith("╭─ error ─")
    assert "│ no run at `runs/x`\\x1b[2J\n" in text
    assert '│ hint: `train("RECIPE")` makes one\n' in text
    assert lines[-1].startswith("\x1b[31m╰")
    stopped = "\n".join(RunInterruptedError("stopped at step 3 of 9")._render_traceback_())
    assert "╭─ stopped ─" in stopped
    assert "\x1b[33m" in stopped
    assert "hint" not in stopped


def test_options_are_arguments_in_python() -> None:
    hint = "`--overwrite`, `--dtype bfloat16`, another `--output`, or `mamba-sft train a.yaml --resume`"
    text = "\n".join(UsageError("`--onto` is wrong", hint=hint)._render_traceback_())
    assert "│\x1b[0m `onto=...` is wrong" in text
    assert '`overwrite=True`, `dtype="bfloat16"`, another `output=...`, or' in text
    assert "resume=True)`" in text
    assert "`card=...`" in "\n".join(UsageError("no `--card`")._render_traceback_())


@pytest.mark.parametrize(
    ("command", "cell"),
    [
        ("mamba-sft train 'runs/a b/recipe.yaml' --resume", 'train("runs/a b/recipe.yaml", resume=True)'),
        ("mamba-sft chat runs/a --compare", 'chat("runs/a", compare=True)'),
        (
            "mamba-sft export runs/a -q Q4_K_M --format ollama",
            'export("runs/a", quantization="Q4_K_M", format="ollama")',
        ),
        ("mamba-sft report runs/a runs/OTHER", 'report("runs/a", "runs/OTHER")'),
        ("mamba-sft doctor", "doctor()"),
        ("mamba-sft doctor --why", "!mamba-sft doctor --why"),
        ("mamba-sft train instruct train.max_steps=5", "!mamba-sft train instruct train.max_steps=5"),
        ("mamba-sft recipes show quickstart", "!mamba-sft recipes show quickstart"),
        ("mamba-sft generate base --raw --prompt 'Once'", "!mamba-sft generate base --raw --prompt 'Once'"),
        ("mamba-sft", "!mamba-sft"),
        ("mamba-sft chat it's", "!mamba-sft chat it's"),
        ("hf download owner/name", "!hf download owner/name"),
    ],
)
def test_a_command_is_what_a_cell_can_run(command: str, cell: str) -> None:
    assert in_cell(command) == cell
    if command != "mamba-sft":
        assert f"`{cell}`" in "\n".join(UsageError("no", hint=f"`{command}`")._render_traceback_())


def test_the_calls_are_those_of_the_package() -> None:
    for function, options in CALLS.values():
        assert options <= set(inspect.signature(getattr(mamba_sft, function)).parameters), function


def test_a_long_word_of_an_error_stays_whole() -> None:
    path = "runs/" + "x" * 120
    assert any(path in line for line in MambaSFTError(f"no file `{path}`")._render_traceback_())


def test_the_hint_is_in_the_text_of_an_error() -> None:
    assert str(MambaSFTError("what", "the fix")) == "what\nhint: the fix"
    assert str(MambaSFTError("what")) == "what"


def state(step: int) -> TrainerState:
    history = [{"step": n, "loss": 3.0 - n} for n in range(1, step + 1)]
    return TrainerState(global_step=step, max_steps=4, log_history=history)


def test_training_is_one_output_that_changes(
    kernel: Kernel, tiny_run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(live, "EVERY", 0.0)
    shown = LiveTraining(tiny_run, ["a warning <b>"])
    nothing: Any = None
    shown.on_train_begin(nothing, state(0), nothing)
    for step in (1, 2, 3, 4):
        shown.on_log(nothing, state(step), nothing, logs={"loss": 3.0 - step, "tokens_per_second": 12.0})
        shown.on_step_end(nothing, state(step), nothing)
    shown.on_train_end(nothing, state(4), nothing)
    assert {number for number, _, _ in kernel.shown} == {kernel.shown[0][0]}
    assert [update for _, update, _ in kernel.shown] == [False] + [True] * (len(kernel.shown) - 1)
    first, last = kernel.shown[0][2], kernel.shown[-1][2]
    assert "step 0 of 4" in first
    assert "<svg" not in first
    assert "step 4 of 4 · loss -1.000 · 12 tokens/s · took" in last
    assert "width:100.0%" in last
    assert "<svg" in last
    assert "a warning &lt;b&gt;" in last
    assert is_safe(last)
    assert "left" in kernel.shown[2][2]


def test_sample_answers_are_counted_before_and_after_training(
    kernel: Kernel, tiny_run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(live, "EVERY", 0.0)
    shown, nothing = LiveTraining(tiny_run, ["a warning"]), None
    shown.on_sample_answer("before", 1, 4)
    shown.on_train_begin(nothing, state(0), nothing)  # type: ignore[arg-type]
    shown.on_train_end(nothing, state(4), nothing)  # type: ignore[arg-type]
    shown.on_sample_answer("after", 3, 4)
    shown.on_sample_answer("after", 4, 4)
    before, _, _, after, done = (html for _, _, html in kernel.shown)
    assert "a warning" in before
    assert "sample prompts answered before training: 1 of 4" in before
    assert "width:25.0%" in before
    assert "step 4 of 4" in after
    assert "sample prompts answered after training: 3 of 4" in after
    assert "sample prompts" not in done
    assert len({number for number, _, _ in kernel.shown}) == 1


def test_a_drawing_waits_for_the_last_one(
    kernel: Kernel, tiny_run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(live, "EVERY", 1e9)
    shown, nothing = LiveTraining(tiny_run), None
    for step in range(1, 5):
        shown.on_step_end(nothing, state(step), nothing)  # type: ignore[arg-type]
    assert len(kernel.shown) <= 1


def test_stages_are_one_bar(kernel: Kernel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stages, "EVERY", 0.0)
    with StageBar("merge", 2) as bar:
        bar.update("merging", 1, 2)
        bar.update("checking", 1, 4)
        bar.count(0, None)
    assert len({number for number, _, _ in kernel.shown}) == 1
    assert "checking · 25 %" in kernel.shown[1][2]
    assert "answers · 50 %" in kernel.shown[2][2]
    assert "done · 100 %" in kernel.shown[-1][2]


def test_a_bar_does_not_say_done_of_what_failed(kernel: Kernel) -> None:
    bar = StageBar("merge")
    bar.update("merging", 1, 2)
    bar.__exit__(ValueError, ValueError(), None)
    assert "done" not in kernel.shown[-1][2]
