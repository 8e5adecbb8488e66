"""Told while it runs: the page appears early, changes no number, and never ends a run."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainerCallback

from mamba_sft import Run
from mamba_sft.training import live_report
from mamba_sft.training.fine_tuning import train

PROMPTS = '{"prompt": "hello 3", "answer": "quick 3 fox"}\n{"prompt": "hello"}\n'


class Reader(TrainerCallback):
    """Keeps what the page says at the end of every step, and may end the run."""

    def __init__(self, run: Path, fails_at: int = 0):
        self.page, self.fails_at = run / "report.html", fails_at
        self.seen: list[str] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.seen.append(self.page.read_text() if self.page.exists() else "")
        if state.global_step == self.fails_at:
            raise RuntimeError("the roof is on fire")


def tensors(run: Run) -> dict[str, torch.Tensor]:
    return load_file(run.adapter / "adapter_model.safetensors")


def test_the_page_is_there_from_the_start_and_kept_up(
    recipe: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(live_report, "EVERY", 0.0)
    monkeypatch.setattr(live_report, "SHARE", 1e9)
    chosen = recipe("train.max_steps=4")
    reader = Reader(Path(chosen.output_dir))
    run = train(chosen, callbacks=[reader])
    assert "step 0 of 4; this page is rewritten while it runs" in reader.seen[0]
    for done, page in enumerate(reader.seen):
        assert f"step {done} of 4" in page
        assert 'http-equiv="refresh"' in page
    page = run.report.read_text()
    assert "this page is rewritten" not in page
    assert "refresh" not in page
    assert run.report_text.is_file()
    logged = [line for line in run.read_metrics() if "loss" in line]
    for line in logged:
        assert line["tokens_per_second"] == pytest.approx(line["tokens_per_step"] / line["seconds_per_step"])
        assert line["peak_memory"] > 1e7
        assert line["rows_per_step"] >= line["rows_at_once"] > 0
    assert sum(line["tokens_per_step"] for line in logged) == pytest.approx(logged[-1]["num_tokens"])


def test_it_is_not_written_more_often_than_every_ten_seconds(recipe: Any) -> None:
    chosen = recipe("train.max_steps=4")
    reader = Reader(Path(chosen.output_dir))
    train(chosen, callbacks=[reader])
    assert len(set(reader.seen)) == 1


def test_a_run_that_fails_says_so_on_its_page(recipe: Any) -> None:
    chosen = recipe("train.max_steps=4")
    with pytest.raises(RuntimeError, match="roof"):
        train(chosen, callbacks=[Reader(Path(chosen.output_dir), fails_at=3)])
    page = Run(Path(chosen.output_dir)).report.read_text()
    assert "ended early: the roof is on fire" in page
    assert "refresh" not in page


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), ZeroDivisionError("a bug")])
def test_a_page_that_cannot_be_written_warns_once_and_ends_nothing(
    recipe: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, error: Exception
) -> None:
    def fail(*_: Any) -> None:
        raise error

    monkeypatch.setattr(live_report, "EVERY", 0.0)
    monkeypatch.setattr(live_report, "write_report", fail)
    with caplog.at_level(logging.WARNING):
        run = train(recipe("train.max_steps=3"))
    assert run.adapter.is_dir()
    told = [record for record in caplog.records if "the report of" in record.getMessage()]
    assert len(told) == 1
    assert bool(told[0].exc_info) is isinstance(error, ZeroDivisionError)  # a bug keeps its traceback


def test_answers_in_between_are_kept_and_change_no_number(recipe: Any, tmp_path: Path) -> None:
    (tmp_path / "prompts.jsonl").write_text(PROMPTS)
    words = ["train.max_steps=5", f"eval.prompts={tmp_path / 'prompts.jsonl'}", "eval.max_new_tokens=4",
             "adapter.lora_dropout=0.1"]  # fmt: skip
    with_them = train(recipe(*words, "eval.sample_steps=2", f"output_dir={tmp_path / 'with'}"))
    without = train(recipe(*words, f"output_dir={tmp_path / 'without'}"))
    rows = [json.loads(line) for line in with_them.step_samples.read_text().splitlines()]
    assert [(row["step"], row["prompt"]) for row in rows] == [
        (step, prompt) for step in (0, 2, 4) for prompt in ("hello 3", "hello")
    ]
    before = [json.loads(line)["before"] for line in with_them.samples_file.read_text().splitlines()]
    assert [row["given"] for row in rows[:2]] == before
    assert "Answers while it learned" in with_them.report.read_text()
    assert not without.step_samples.exists()
    ours, theirs = tensors(with_them), tensors(without)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
