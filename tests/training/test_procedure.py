"""The published model's procedure, from its recipe, on the tiny base."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mamba_sft import Recipe, train

SMALL = [
    "model.dtype=float32", "data.max_length=96", "train.stages.0.max_length=40",
    "train.stages.1.max_length=64", "train.stages.2.max_length=96", "data.validation=4", "adapter.r=4",
    "train.batch_ramp.from=1", "train.batch_ramp.to=4", "train.batch_ramp.tokens=800", "eval.eval_steps=0.5",
    "train.save_steps=0.5", "train.num_train_epochs=3", "train.checkpointing=none",
]  # fmt: skip
"""Lengths, rank and batch in the size of the tiny base; stages, shares and schedule are the recipe's own."""


@pytest.fixture
def small(tiny_base: Path, chats: Path, tmp_path: Path) -> Any:
    paths = []
    for number in range(3):
        path = tmp_path / f"source-{number}.jsonl"
        path.write_text(chats.read_text().replace("fox", f"fox {number}"))
        paths += [f"data.sources.{number}.path={path}", f"data.sources.{number}.split=train"]
    paths += ["data.sources.1.columns={}"]
    return Recipe.load(
        "falcon-mamba-procedure",
        overrides=[f"model.base={tiny_base}", f"output_dir={tmp_path / 'run'}", *paths, *SMALL],
    )


def test_the_procedure_runs_as_the_card_says(small: Recipe) -> None:
    run = train(small)
    lines = [line for line in run.read_metrics() if "learning_rate" in line]
    rate, rows, read = (
        np.array([line[name] for line in lines]) for name in ("learning_rate", "rows_per_step", "num_tokens")
    )
    peak = small.train.learning_rate
    stages = json.loads(run.data.read_text())["mixture"]["stages"]
    assert [stage["max_length"] for stage in stages] == [40, 64, 96]
    assert set(stages[0]["tokens"]) == {"conversations", "mathematics"}
    assert set(stages[2]["tokens"]) == {"conversations", "mathematics", "curated"}
    assert rows[0] == 1
    assert rows[read > 1000].min() == 4
    stable = (read > 1000) & (np.arange(len(lines)) < 0.85 * len(lines))
    assert rate[stable] == pytest.approx(peak)  # the batch is at its size, so BatchScaling has no say
    growing = (rows > 1) & (rows < 4) & (np.arange(len(lines)) > 0.02 * len(lines))
    assert rate[growing] / np.sqrt(rows[growing]) == pytest.approx(
        peak / 2
    )  # eta / sqrt(b), b of the ramp's end
    falling = rate[int(0.92 * len(lines)) :]
    assert np.diff(np.log(falling)) == pytest.approx(np.diff(np.log(falling))[0])  # exponential
    assert falling[-1] == pytest.approx(peak / 256, rel=0.5)
