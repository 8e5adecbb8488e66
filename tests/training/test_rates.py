"""A run has the rates that are planned for it, to the bit, and goes on with them wherever it stopped."""

from __future__ import annotations

from typing import Any

import pytest

from mamba_sft.data.rows import row_lengths
from mamba_sft.errors import RecipeError
from mamba_sft.planning.extent import course_of
from mamba_sft.planning.schedule import learning_rates
from mamba_sft.run import Run
from mamba_sft.training.fine_tuning import RunInterruptedError, train, train_prepared
from mamba_sft.training.preparation import Preparation, prepare
from tests.training.test_fine_tuning import SignalAt

OWN = (
    "train.decay=exponential", "train.warmup_steps=150 tokens", "train.decay_steps=400 tokens",
    "train.max_steps=9", "data.packing=false",
)  # fmt: skip


def planned(preparation: Preparation) -> list[float]:
    lengths = row_lengths(preparation.data.train_rows)
    course = course_of(preparation.recipe, lengths)
    return list(learning_rates(preparation.recipe.train, course.tokens))


def trained(run: Run) -> list[float]:
    return [line["learning_rate"] for line in run.read_metrics() if "loss" in line]


def test_the_steps_have_the_planned_rates(recipe: Any) -> None:
    preparation = prepare(recipe(*OWN))
    expected = planned(preparation)
    assert len(set(expected)) > 4
    assert expected[-1] == 1e-2 / 256
    assert trained(train_prepared(preparation)) == expected


def test_an_interrupted_run_goes_on_with_them(recipe: Any) -> None:
    expected = planned(prepare(recipe(*OWN)))
    with pytest.raises(RunInterruptedError):
        train_prepared(prepare(recipe(*OWN)), callbacks=[SignalAt(7)])
    assert trained(train(recipe(*OWN), resume=True)) == expected


def test_parts_that_do_not_go_into_the_run_are_refused_before_the_weights(recipe: Any) -> None:
    with pytest.raises(RecipeError, match=r"`train.decay_steps` is `2M tokens`, and the steps that"):
        prepare(recipe("train.decay_steps=2M tokens"))
