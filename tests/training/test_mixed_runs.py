"""Runs of several stages: one optimizer and one schedule through all, resumed in the middle of any."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import TrainerCallback

from mamba_sft import Run, train
from mamba_sft.model.checksums import file_checksum
from mamba_sft.training.fine_tuning import RunInterruptedError
from mamba_sft.training.preparation import prepare

STAGES = "train.stages=[{until: 0.5, max_length: 40, sources: {chats: 0.5, more: 0.5}}, {sources: {more: 1}}]"


class StopAfter(TrainerCallback):
    """Presses Ctrl-C after a step."""

    def __init__(self, step: int):
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            raise KeyboardInterrupt


@pytest.fixture
def mixed(recipe: Any, chats: Path, tmp_path: Path) -> Any:
    """Makes a recipe of two sources in two stages."""
    more = tmp_path / "more.jsonl"
    more.write_text(chats.read_text().replace("quick", "slow"))
    sources = f"data.sources=[{{path: {chats}}}, {{path: {more}}}]"
    return lambda *words, name="run": recipe(sources, STAGES, "train.max_steps=6", *words, name=name)


def lines(run: Run) -> list[dict[str, Any]]:
    timed = ("seconds", "runtime", "per_second", "memory")
    return [
        {name: value for name, value in line.items() if not any(word in name for word in timed)}
        for line in run.read_metrics()
    ]


def test_the_loss_of_each_source_is_logged_and_a_stage_reads_only_its_own(mixed: Any) -> None:
    run = train(
        mixed("train.logging_steps=1", "data.validation=6", "eval.eval_steps=3", "train.save_steps=3")
    )
    found = [line for line in run.read_metrics() if "loss" in line]
    assert any("loss/chats" in line for line in found[:3])
    assert [sorted(name for name in line if name.startswith("loss/")) for line in found[3:]] == [
        ["loss/more"]
    ] * 3
    assert all(line["loss/more"] == pytest.approx(line["loss"], rel=0.2) for line in found[3:])
    assert any("eval_loss/chats" in line for line in run.read_metrics())
    told = json.loads(run.data.read_text())["mixture"]
    assert [(stage["first"], stage["last"]) for stage in told["stages"]] == [(1, 3), (4, 6)]
    assert "loss by source" in run.report.read_text()
    assert "stage 2" in run.report.read_text()


@pytest.mark.parametrize("step", [2, 3, 5])
def test_a_mixed_run_goes_on_in_the_middle_of_a_stage(mixed: Any, step: int) -> None:
    more = ("train.save_steps=1", "adapter.lora_dropout=0.1")
    whole = train(mixed(*more, name="whole"))
    with pytest.raises(RunInterruptedError):
        train(mixed(*more), callbacks=[StopAfter(step)])
    resumed = train(mixed(*more), resume=True)
    name = "adapter/adapter_model.safetensors"
    assert file_checksum(resumed.path / name) == file_checksum(whole.path / name)
    assert lines(resumed) == lines(whole)


def test_parts_of_a_schedule_are_held_against_the_rows_that_are_read(mixed: Any, tmp_path: Path) -> None:
    """And not against rows of the mean length of all sources, of which a run may read the long ones alone."""
    more = tmp_path / "more.jsonl"
    more.write_text(more.read_text().replace("slow", "slow " * 25))
    long_rows = ("train.stages=[{sources: {more: 1}}]", "data.packing=false")
    read = int(prepare(mixed(*long_rows)).course.tokens.sum())
    parts = (f"train.stable_steps={read // 2} tokens", f"train.decay_steps={read // 2 - read // 10} tokens")
    assert prepare(mixed(*long_rows, *parts, "train.warmup_steps=0")).course.steps == 6
