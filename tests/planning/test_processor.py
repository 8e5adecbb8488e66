"""What a CPU's step is put together of, and that the machine is measured once and named."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from mamba_sft.cli.app import app
from mamba_sft.planning import processor, speed
from mamba_sft.planning.course import plan_course
from mamba_sft.planning.plan import make_plan
from mamba_sft.planning.processor import Processor, this_processor
from mamba_sft.planning.speed import CPU_EFFICIENCY, Rows, cpu_seconds, estimate, flops, measured
from mamba_sft.recipe.recipe import Recipe
from mamba_sft.run import Run

KNOWN = Processor(
    name="a processor", threads=2, dtype="float32", date="2026-01-01", busy=False, layer=0.004, channel=1e-7,
    forward=0.5, products=1e11, logit=1e-8,
)  # fmt: skip


@pytest.fixture
def kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """An empty cache, and the number formats that were measured."""
    monkeypatch.setenv("MAMBA_SFT_CACHE", str(tmp_path / "cache"))
    asked: list[str] = []

    def measure(dtype: str) -> Processor:
        asked.append(dtype)
        return replace(KNOWN, dtype=dtype)

    monkeypatch.setattr(processor, "measure_processor", measure)
    return asked


def work_of(*overrides: str) -> Any:
    return make_plan(Recipe.load("quickstart", overrides=["output_dir=none/q", *overrides])).work


def test_a_step_is_its_layers_channels_products_and_logits() -> None:
    work, rows = work_of(), Rows(2000.0, filled=0.9, trained=0.5)
    head = 4 * 2 * 192 * 1536  # logits twice, two gradients
    layers = flops(work) - head
    trained = 0.9 * 0.5
    shared = 4 * 384 * 1e-7 + (layers + trained * head) / 1e11 + trained * 1536 * 1e-8
    expected = ((4 + 3) * 0.004 / 2000 + shared / 2) / CPU_EFFICIENCY
    assert cpu_seconds(work, KNOWN, rows) == pytest.approx(expected)


def test_repeated_forwards_and_fewer_threads_take_longer() -> None:
    rows = Rows(2048.0)
    seconds = cpu_seconds(work_of(), KNOWN, rows)
    assert cpu_seconds(work_of("train.checkpointing=block"), KNOWN, rows) > 1.2 * seconds
    assert cpu_seconds(work_of("train.stream_tokens=64"), KNOWN, rows) > 1.2 * seconds
    assert 1.5 * seconds < cpu_seconds(work_of(), replace(KNOWN, threads=1), rows) < 2 * seconds
    assert cpu_seconds(work_of(), KNOWN, Rows(64.0)) > 1.5 * seconds  # a layer takes something by itself


def test_padding_and_untrained_tokens_are_told_from_the_rows() -> None:
    lengths = np.array([10, 30, 30, 50])
    train = Recipe.load("quickstart", overrides=["train.max_steps=1"]).train
    four = plan_course(train, lengths, seed=0)
    rows = Rows.of(four, lengths, size=4, trained=0.25)
    assert rows == Rows(positions=200.0, filled=120 / 200, trained=0.25)
    assert Rows.of(four, lengths, size=1, trained=1.0) == Rows(positions=30.0, filled=1.0)


def test_tokens_are_counted_without_the_padding(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speed, "this_processor", lambda dtype: KNOWN)
    cpu = make_plan(Recipe.load("quickstart", overrides=["output_dir=none/q"])).accelerator
    full, half = (estimate(work_of(), cpu, Rows(2048.0, filled, 1e-9)) for filled in (1.0, 0.5))
    assert full is not None
    assert half is not None
    assert half.tokens_per_second == pytest.approx(full.tokens_per_second / 2, rel=0.01)
    assert full.processor == "measured 2026-01-01 with 2 threads"


def test_the_machine_is_measured_once_for_each_number_format_and_says_so(
    kept: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="mamba_sft")
    for dtype in ("float32", "float32", "bfloat16", "float32"):
        assert this_processor(dtype).dtype == dtype
    assert kept == ["float32", "bfloat16"]
    told = [message for message in caplog.messages if "measuring this processor" in message]
    assert len(told) == 2
    assert told[0].endswith("in float32, once: some seconds")


def test_other_threads_are_another_measurement(kept: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    this_processor("float32")
    monkeypatch.setattr(torch, "get_num_threads", lambda: 77)
    this_processor("float32")
    assert kept == ["float32"] * 2


@pytest.mark.parametrize("content", ["{", "[]", '{"name": 1}', ""])
def test_a_damaged_measurement_is_made_again(kept: list[str], content: str) -> None:
    this_processor("float32")
    path = processor.place_of(torch.get_num_threads(), "float32")
    path.write_text(content)
    this_processor("float32")
    this_processor("float32")
    assert kept == ["float32"] * 2


def test_what_was_measured_on_a_busy_machine_is_measured_again_when_it_is_not(
    kept: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def measure(dtype: str) -> Processor:
        kept.append(dtype)
        return replace(KNOWN, busy=len(kept) == 1)

    monkeypatch.setattr(processor, "measure_processor", measure)
    monkeypatch.setattr(processor, "_asked_again", [0.0])
    monkeypatch.setattr(processor, "is_alone", lambda: False)
    assert this_processor("float32").described.endswith(", when it was busy")
    assert this_processor("float32").busy
    monkeypatch.setattr(processor, "is_alone", lambda: True)
    assert this_processor("float32").busy  # it was just now
    monkeypatch.setattr(processor, "_asked_again", [0.0])
    assert not this_processor("float32").busy
    assert not this_processor("float32").busy
    assert len(kept) == 2


def test_a_plan_on_a_busy_machine_does_not_ask_a_hundred_times_whether_it_still_is(
    kept: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[bool] = []

    def alone() -> bool:
        asked.append(True)
        return len(asked) % 7 == 0  # now and then, as on a machine that is half busy

    monkeypatch.setattr(processor, "_asked_again", [0.0])
    monkeypatch.setattr(processor, "measure_processor", lambda dtype: replace(KNOWN, dtype=dtype, busy=True))
    monkeypatch.setattr(processor, "is_alone", alone)
    for _ in range(100):
        this_processor("float32")
    assert len(asked) == 1


def test_a_cache_that_cannot_be_written_is_no_error(
    kept: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("MAMBA_SFT_CACHE", str(tmp_path / "file" / "below"))
    assert this_processor("float32") == KNOWN


def test_a_measurement_has_parts_that_make_sense(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processor, "quiet_seconds", lambda step: real(step, 0.0))  # the fewest repeats
    found = processor.measure_processor("float32")
    assert found.threads == torch.get_num_threads()
    assert found.layer > 0
    assert 0 < found.forward <= 0.5
    assert 1e8 < found.products < 1e14
    assert 0 <= found.channel < 1e-3
    assert 0 <= found.logit < 1e-3


real = processor.quiet_seconds


def test_a_plan_names_how_the_processor_was_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speed, "this_processor", lambda dtype: KNOWN)
    monkeypatch.setattr("mamba_sft.planning.plan.measured", lambda *asked: None)
    shown = CliRunner().invoke(app, ["plan", "quickstart"]).stdout
    assert "tokens/s, estimated from parts of a step" in shown
    assert "this processor: measured 2026-01-01 with 2 threads" in shown
    plan = json.loads(CliRunner().invoke(app, ["plan", "quickstart", "--json"]).stdout)
    assert (plan["rate_source"], plan["rate_processor"]) == ("estimated", KNOWN.described)


@pytest.mark.parametrize("how", [["--card", "h100"], ["an earlier run"]])
def test_nothing_is_measured_without_need(how: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speed, "this_processor", lambda dtype: pytest.fail("measured"))
    if how == ["an earlier run"]:
        how = []
        monkeypatch.setattr("mamba_sft.planning.plan.measured", lambda *asked: speed.Rate(123.0, "runs/old"))
    shown = CliRunner().invoke(app, ["plan", "quickstart", *how])
    assert shown.exit_code == 0
    assert "this processor" not in shown.stdout
    assert how or "123 tokens/s, measured in runs/old" in shown.stdout


def test_a_run_with_other_threads_gives_no_rate(recipe: Any) -> None:
    settings = recipe(name="new")
    run = Run(Path(settings.output_dir).parent / "old")
    run.path.mkdir()
    run.recipe.write_text(settings.to_yaml())
    sessions = [{"device": "cpu", "tokens": 100, "train_seconds": 2.0}]
    facts = {"device": {"name": "cpu", "threads": 2}, "sessions": sessions}
    run.environment.write_text(json.dumps(facts))
    rates = {threads: measured(settings, "cpu", threads) for threads in (None, 1, 2)}
    assert {threads: rate and rate.tokens_per_second for threads, rate in rates.items()} == {
        None: 50.0, 1: None, 2: 50.0,
    }  # fmt: skip


def test_a_wrong_card_is_refused_before_torch_is_loaded() -> None:
    code = """
import sys
from mamba_sft.cli.app import app
try:
    app(["plan", "quickstart", "--card", "409"])
except Exception as error:
    print(error.message, sorted({"torch", "transformers"} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "no GPU `409` is known; did you mean `4090`? []"
