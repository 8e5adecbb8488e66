"""`bench train`: which steps are taken, that both sides take the same ones, and what is made of them."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from mamba_sft.cli import bench_train
from mamba_sft.cli.app import app
from mamba_sft.diagnostics import training_benchmark, training_steps
from mamba_sft.diagnostics.benched_recipe import is_data_here, missing_sources, peer_targets
from mamba_sft.diagnostics.training_benchmark import measure_training, summed_up
from mamba_sft.diagnostics.training_steps import (
    first_steps,
    sequences,
    take_our_steps,
    take_stock_steps,
)
from mamba_sft.errors import MambaSFTError, UsageError


def step(number: int, seconds: float, tokens: int = 100, **more: Any) -> dict[str, Any]:
    facts = {
        "step": number,
        "seconds": seconds,
        "cpu_seconds": seconds / 2,
        "tokens": tokens,
        "peak_bytes": 7,
    }
    return facts | more


def whole(told: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [fact for fact in told if "seconds" in fact and "batch" not in fact]


# --- what is made of the steps ------------------------------------------------------------------------------


def test_the_median_counts_and_the_warm_up_does_not() -> None:
    told = [step(1, 50.0), {"step": 1, "loss": 3.0}, step(2, 40.0), step(3, 1.0), step(4, 4.0), step(5, 2.0)]
    found = summed_up([*told, {"step": 5, "loss": 2.0}], 2)
    assert (found["steps"], found["seconds_per_step"]) == (3, 2.0)
    assert found["tokens_per_second"] == 50.0
    assert found["tokens_per_second_range"] == [25.0, 100.0]
    assert found["cpu_seconds_per_token"] == pytest.approx(0.01)
    assert (found["first_loss"], found["peak_bytes"]) == (3.0, 7)


def test_the_rate_of_a_step_that_was_stopped_is_that_of_its_micro_batches() -> None:
    told = [{"step": 1}, step(1, 2.0, 30, batch=0), step(1, 5.0, 20, batch=1)]
    found = summed_up(told, 1)
    assert (found["steps"], found["tokens_per_second"], found["seconds_per_step"]) == (0, 10.0, None)
    nothing = summed_up([{"step": 1}], 1)
    assert nothing["tokens_per_second"] is nothing["peak_bytes"] is nothing["first_loss"] is None


# --- which steps --------------------------------------------------------------------------------------------


def test_the_first_steps_are_those_that_training_takes(recipe: Any) -> None:
    settings = recipe("train.max_steps=4", "train.gradient_accumulation_steps=2")
    steps = first_steps(settings, 3)
    every = first_steps(settings, 4)
    assert (steps.course.steps, every.course.steps) == (3, 4)
    for number in range(3):
        assert (steps.course.rows(number) == every.course.rows(number)).all()
    assert first_steps(settings, 99).course.steps == 4
    assert not steps.made_up
    assert steps.recipe.train.gradient_accumulation_steps == 2


def test_rows_that_are_not_here_are_made_up_in_the_length_of_the_recipe(recipe: Any) -> None:
    settings = recipe("data.sources.0.path=nowhere/to/be/found.jsonl", "data.max_length=2000")
    assert not is_data_here(settings)
    steps = first_steps(settings, 2)
    assert steps.made_up
    row = steps.rows[0]
    assert len(row["input_ids"]) == len(row["labels"]) == row["seq_lengths"].sum() == 2000
    assert len(row["seq_lengths"]) > 1
    loose = first_steps(recipe("data.sources.0.path=nowhere.jsonl", "data.packing=false"), 2)
    assert loose.rows[0]["seq_lengths"].tolist() == [96]


def test_what_a_glob_names_is_here(recipe: Any, tmp_path: Path) -> None:
    rows = '{"prompt": "a", "completion": "b"}\n'
    for name in ("one.jsonl", "two.jsonl"):
        (tmp_path / name).write_text(rows)
    assert is_data_here(recipe(f"data.sources.0.path={tmp_path}/*.jsonl"))
    assert missing_sources(recipe(f"data.sources.0.path={tmp_path}/*.csv")) == [f"{tmp_path}/*.csv"]


def test_a_packed_row_is_its_sequences_to_stock_tools() -> None:
    row = {"input_ids": np.arange(6), "labels": np.arange(6), "seq_lengths": np.array([1, 3, 2])}
    assert [piece["input_ids"].tolist() for piece in sequences(row)] == [[0], [1, 2, 3], [4, 5]]
    assert len(sequences({"input_ids": [1, 2], "labels": [1, 2]})) == 1


def test_peft_gets_the_targets_that_it_takes() -> None:
    assert peer_targets(["in_proj", "mixer.out_proj", "x_proj"]) == ["in_proj", "x_proj"]


# --- the steps ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes", [(), ("adapter=none",), ("train.checkpointing=block", "train.gradient_accumulation_steps=2")]
)
def test_both_sides_take_the_same_steps(
    recipe: Any, tmp_path: Path, changes: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    settings = recipe(*changes)
    (tmp_path / "bench").mkdir()
    ours: list[dict[str, Any]] = []
    stock: list[dict[str, Any]] = []
    take_our_steps(ours.append, settings, 2, str(tmp_path / "bench"))
    take_stock_steps(stock.append, settings, 2)
    assert [fact["tokens"] for fact in whole(ours)] == [fact["tokens"] for fact in whole(stock)]
    batches = [fact for fact in stock if fact["step"] == 1 and "batch" in fact]
    assert sum(fact["tokens"] for fact in batches) == whole(stock)[0]["tokens"]
    losses = [next(fact["loss"] for fact in told if "loss" in fact) for told in (ours, stock)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)
    assert all(fact["peak_bytes"] > 0 and fact["cpu_seconds"] > 0 for fact in whole(ours) + whole(stock))
    assert not Path(settings.output_dir).exists()
    assert capsys.readouterr().out == "", "no line of the trainer stands in the table or the JSON"


def told_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Has the steps taken in this process."""

    def told_by(measure: Any, *arguments: Any, what: str, seconds: float | None = None) -> list[Any]:
        found: list[Any] = []
        measure(found.append, *arguments)
        return found

    monkeypatch.setattr(training_benchmark, "told_by", told_by)


def test_the_result_has_both_sides_and_the_plan(recipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    told_here(monkeypatch)
    settings = recipe("adapter.target_modules=[in_proj, out_proj]")
    found = measure_training(settings, steps=1)
    assert json.loads(json.dumps(found)) == found
    assert found["times_peer"] == found["ours"]["tokens_per_second"] / found["peer"]["tokens_per_second"]
    assert found["peer"]["without_lora_on"] == ["out_proj"]
    assert found["plan"]["source"] == "estimated"
    assert found["plan"]["tokens_per_second"] > 0
    assert found["plan"]["of_measured_in_cpu_time"] > 0
    assert found["ours"]["steps"] == 1
    assert not Path(settings.output_dir).exists()
    alone = measure_training(settings, steps=1, peer=False)
    assert alone["peer"] is alone["times_peer"] is alone["times_peer_in_cpu_time"] is None


def test_stock_that_takes_too_long_or_too_much_is_told(recipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for error, text in (
        (training_benchmark.TooLongError, "stopped after 3.0 s"),
        (training_benchmark.NoMemoryError, "out of memory"),
    ):

        def told_by(measure: Any, *arguments: Any, error: Any = error, **more: Any) -> Any:
            yield {"step": 1, "next_tokens": 30}
            if measure is training_steps.take_stock_steps:
                raise error
            yield step(3, 1.0)

        monkeypatch.setattr(training_benchmark, "told_by", told_by)
        found = measure_training(recipe(), steps=1, peer_seconds=3.0)
        assert found["peer"]["ended"] == text
        assert found["times_peer"] is None
        shown = [str(part) for part in bench_train.rendered(found)]
        assert f"transformers + PEFT: {text}; no step was done" in shown
        more = "more than 10 times as fast as transformers + PEFT, which had not done one micro-batch"
        assert (more in shown) == (error is training_benchmark.TooLongError)  # 100 tokens/s against 30 in 3 s


def test_ours_that_takes_too_much_is_a_message_and_no_traceback(
    recipe: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def told_by(measure: Any, *arguments: Any, what: str, **more: Any) -> Any:
        yield {"step": 1}
        raise training_benchmark.NoMemoryError(what)

    monkeypatch.setattr(training_benchmark, "told_by", told_by)
    with pytest.raises(MambaSFTError, match="our steps took more memory than there is") as caught:
        measure_training(recipe(), steps=1)
    assert "smaller batches" in str(caught.value.hint)


# --- from outside -------------------------------------------------------------------------------------------

RESULT: dict[str, Any] = {
    "benchmark": "train",
    "machine": {"date": "2026-01-01", "cpu": "a processor", "threads": 2, "load": 0.1},
    "settings": {"steps": 3, "warm_up": 2, "base": "x", "dtype": "float32"},
    "rows": {"made_up": False, "max_length": 512, "batch_size": 4, "tokens_per_step": 2000.0},
    "ours": summed_up([step(3, 0.5, 2000)], 2),
    "peer": summed_up([step(2, 5.0, 2000)], 1)
    | {
        "of": "transformers + PEFT",
        "ended": None,
        "below_tokens_per_second": None,
        "without_lora_on": ["out_proj"],
    },
    "times_peer": 10.0,
    "times_peer_in_cpu_time": 9.5,
    "peak_of_peer": 0.25,
    "plan": {
        "tokens_per_second": 4400.0,
        "source": "runs/old",
        "processor": None,
        "of_measured": 1.1,
        "of_measured_in_cpu_time": None,
    },
}


def asked(monkeypatch: pytest.MonkeyPatch, *words: str) -> Any:
    calls = []
    monkeypatch.setattr(
        training_benchmark, "measure_training", lambda *a, **k: calls.append(k) or copy.deepcopy(RESULT)
    )
    shown = CliRunner().invoke(app, ["bench", "train", *words])
    if shown.exception is not None and not isinstance(shown.exception, SystemExit):
        raise shown.exception
    return shown, calls


def test_the_table_and_the_comparison(monkeypatch: pytest.MonkeyPatch) -> None:
    shown, calls = asked(monkeypatch, "quickstart", "--steps", "3", "--no-peer")
    assert calls == [{"steps": 3, "peer": False, "peer_seconds": 120.0}]
    lines = shown.stdout.splitlines()
    assert any(
        line.split() == ["mamba-sft", "4,000", "4,000", "to", "4,000", "500", "ms", "7", "bytes"]
        for line in lines
    )
    assert "10.0 times as fast as transformers + PEFT, in 0.25 of its memory" in lines
    assert "transformers + PEFT: no LoRA on `out_proj`, which PEFT refuses on Mamba models" in lines
    assert "`plan` says 4,400 tokens/s, measured in runs/old, 1.10 of what was measured" in lines
    assert "the machine was busy" not in shown.stdout


def test_json_on_stdout_and_in_a_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    file = tmp_path / "result.json"
    shown, _ = asked(monkeypatch, "quickstart", "--json", "--output", str(file))
    assert json.loads(shown.stdout) == json.loads(file.read_text()) == json.loads(json.dumps(RESULT))


@pytest.mark.parametrize("name", ["result.txt", "nowhere/result.json"])
def test_a_file_that_cannot_be_is_refused_before_anything_is_measured(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str
) -> None:
    with pytest.raises(UsageError, match="--output"):
        asked(monkeypatch, "quickstart", "--output", str(tmp_path / name))


def test_a_wrong_recipe_is_one_message(recipe: Any, tmp_path: Path) -> None:
    with pytest.raises(MambaSFTError, match="nobase"):
        measure_training(recipe(f"model.base={tmp_path / 'nobase'}"))


def test_a_busy_machine_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(RESULT["machine"], "load", 500.0)
    shown, _ = asked(monkeypatch, "quickstart")
    assert "the machine was busy before (load 500.0 on" in shown.stdout
