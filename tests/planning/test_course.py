"""Which rows each step takes: every row once an epoch, in steps of the size that the recipe asks for."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from mamba_sft import Recipe
from mamba_sft.planning.course import Course, estimated_sizes, plan_course, ramped_size
from mamba_sft.planning.extent import RunLength, course_of, run_length
from mamba_sft.recipe.fields import RampSection, TrainSection

TEXT = "output_dir: x\nmodel: {base: b}\ndata: {sources: [{path: p}]}\n"

lengths_of_rows = st.lists(st.integers(1, 50), min_size=1, max_size=120).map(np.array)
ramps = st.tuples(st.integers(1, 40), st.integers(0, 60), st.integers(1, 4000)).map(
    lambda drawn: {"from": drawn[0], "to": drawn[0] + drawn[1], "tokens": drawn[2]}
)


def course(lengths: np.ndarray, processes: int = 1, seed: int = 3, **values: Any) -> Course:
    return plan_course(TrainSection(**values), lengths, seed=seed, processes=processes)


def asked(ramp: dict[str, int], read: int) -> int:
    """What the formula says, in fractions, halves up."""
    share = min(Fraction(1), Fraction(read, ramp["tokens"]))
    return math.floor(ramp["from"] + (ramp["to"] - ramp["from"]) * share + Fraction(1, 2))


@given(lengths=lengths_of_rows, ramp=ramps, epochs=st.sampled_from([0.1, 0.5, 1.0, 1.7, 2.0, 3.25]))
def test_steps_are_as_large_as_the_ramp_says(
    lengths: np.ndarray, ramp: dict[str, int], epochs: float
) -> None:
    found = course(lengths, batch_ramp=ramp, num_train_epochs=epochs)
    count = len(lengths)
    read = place = 0
    for step, size in enumerate(found.sizes):
        assert size == min(asked(ramp, read), count - place % count), "or what is left of the epoch"
        assert found.tokens[step] == lengths[found.rows(step)].sum()
        read, place = read + int(found.tokens[step]), place + int(size)
        assert found.epochs[step] == pytest.approx(place / count)
    wanted = Fraction(str(epochs)) * count
    assert place >= wanted > place - found.sizes[-1], "the fewest steps that read so many rows"


@given(lengths=lengths_of_rows, ramp=ramps | st.none(), steps=st.integers(1, 60), processes=st.integers(1, 4))
def test_every_row_is_read_once_an_epoch(
    lengths: np.ndarray, ramp: dict[str, int] | None, steps: int, processes: int
) -> None:
    values: dict[str, Any] = {"max_steps": steps, "per_device_train_batch_size": 3, "batch_ramp": ramp}
    found = course(lengths, processes, **values)
    assert found.steps == steps
    count = len(lengths)
    for start in range(0, len(found.order), count):
        epoch = found.order[start : start + count]
        assert len(set(epoch.tolist())) == len(epoch)
        generator = torch.Generator().manual_seed(3 + start // count)
        assert epoch.tolist() == torch.randperm(count, generator=generator).tolist()[: len(epoch)]
        assert start + len(epoch) in found.starts
    again = course(lengths, processes, **values)
    assert all(
        np.array_equal(getattr(found, name), getattr(again, name))
        for name in ("order", "starts", "tokens", "epochs")
    )


@given(lengths=lengths_of_rows, ramp=ramps, processes=st.integers(2, 9))
def test_a_ramp_is_the_same_on_any_number_of_processes(
    lengths: np.ndarray, ramp: dict[str, int], processes: int
) -> None:
    alone, many = course(lengths, batch_ramp=ramp), course(lengths, processes, batch_ramp=ramp)
    assert np.array_equal(alone.starts, many.starts)
    assert np.array_equal(alone.order, many.order)


def test_the_reports_ramp_to_the_last_step() -> None:
    """128 to 2,048 over 50 GT, a thousandth of it: rows of 2,048 tokens."""
    ramp = {"from": 128, "to": 2048, "tokens": 50_000_000}
    found = course(np.full(60_000, 2048), batch_ramp=ramp)
    assert found.sizes[0] == 128
    read = np.cumsum(found.tokens) - found.tokens
    closed = np.floor(128 + 1920 * np.minimum(1, read / 50_000_000) + 0.5).astype(int)
    assert found.sizes[:-1].tolist() == closed[:-1].tolist()
    assert (found.sizes[-2], found.sizes.sum()) == (2048, 60_000)
    # db/dt = 1920 / 50M * 2048 * b rows a step: the batch grows by the same factor in every step
    growth = found.sizes[1:30] / found.sizes[:29]
    assert growth == pytest.approx(1 + 1920 * 2048 / 50_000_000, abs=0.005)


def test_a_ramp_by_hand() -> None:
    """A row more for every token read, in rows of one token: each step doubles what was read."""
    found = course(np.ones(300, dtype=np.int64), batch_ramp={"from": 1, "to": 101, "tokens": 100})
    assert found.sizes.tolist() == [1, 2, 4, 8, 16, 32, 64, 101, 72]


def test_halves_are_rounded_up_and_large_numbers_are_exact() -> None:
    ramp = RampSection(**{"from": 1, "to": 2, "tokens": 10})
    assert [ramped_size(ramp, read) for read in (0, 4, 5, 10, 99)] == [1, 1, 2, 2, 2]
    huge = RampSection(**{"from": 1, "to": 1_000_000, "tokens": 10**15})
    for read in (10**15 - 1, 123_456_789_012_345, 10**15):
        assert ramped_size(huge, read) == asked({"from": 1, "to": 1_000_000, "tokens": 10**15}, read)


def test_a_course_without_a_ramp_is_what_it_was() -> None:
    found = course(np.arange(1, 11), per_device_train_batch_size=2, gradient_accumulation_steps=2)
    assert found.sizes.tolist() == [4, 4, 2]
    assert found.tokens.sum() == 55
    half = course(np.full(10, 7), gradient_accumulation_steps=4, num_train_epochs=1.5)
    assert half.sizes.tolist() == [4, 4, 2, 4, 4]


def test_no_rows_are_no_course() -> None:
    with pytest.raises(ValueError, match="rows"):
        course(np.array([], dtype=np.int64), batch_ramp={"from": 1, "to": 2, "tokens": 9})


def length_of(lengths: np.ndarray, *overrides: str, processes: int = 1) -> RunLength:
    recipe = Recipe.from_text(TEXT, overrides=overrides)
    return run_length(
        recipe, rows=len(lengths), tokens=int(lengths.sum()), processes=processes, lengths=lengths
    )


@given(
    lengths=lengths_of_rows,
    ramp=st.sampled_from(["", "train.batch_ramp={from: 2, to: 9, tokens: 700}"]),
    epochs=st.sampled_from([0.3, 1.0, 2.5]),
    batch=st.integers(1, 5),
    processes=st.integers(1, 3),
)
def test_the_length_of_a_run_is_its_courses(
    lengths: np.ndarray, ramp: str, epochs: float, batch: int, processes: int
) -> None:
    words = [
        f"train.num_train_epochs={epochs}", f"train.per_device_train_batch_size={batch}",
        "train.warmup_steps=10 tokens", *[ramp] * bool(ramp),
    ]  # fmt: skip
    recipe = Recipe.from_text(TEXT, overrides=words)
    course = course_of(recipe, lengths, processes=processes)
    assume(course.tokens.sum() >= 10)
    found = length_of(lengths, *words, processes=processes)
    accumulation = None if ramp else found.accumulation
    settled = recipe.train.model_copy(update={"gradient_accumulation_steps": accumulation})
    again = plan_course(settled, lengths, seed=recipe.seed, processes=processes)
    assert np.array_equal(again.starts, course.starts)
    assert (found.steps, found.read) == (course.steps, course.tokens.sum())
    assert found.warmup == np.argmax(np.cumsum(course.tokens) >= 10) + 1
    without = length_of(lengths, *words[:2], *[ramp] * bool(ramp), processes=processes)
    assert without.steps == course.steps


def test_the_ramp_says_the_batch() -> None:
    ramp = "train.batch_ramp={from: 8, to: 32, tokens: 4000}"
    found = length_of(np.full(1000, 10), ramp, "train.per_device_train_batch_size=3", processes=2)
    assert (found.ramp, found.accumulation, found.chosen) == ((8, 32), 6, False)
    assert found.tokens_per_step == 10_000 / found.steps
    assert found.to_dict()["ramp"] == (8, 32)
    assert found.warnings() == []


@pytest.mark.parametrize("count", [1, 7, 30, 100, 500])
@pytest.mark.parametrize("epochs", [0.5, 1.0, 3.0])
def test_the_fields_that_are_named_make_a_ramp_long_enough(count: int, epochs: float) -> None:
    words = ("train.batch_ramp={from: 100, to: 900, tokens: 4000}", f"train.num_train_epochs={epochs}")
    (warning,) = length_of(np.full(count, 10), *words, "train.warmup_steps=0").warnings()
    fields = warning.split("\n")[1].split()
    changed = length_of(np.full(count, 10), *words, *fields)
    assert changed.steps >= 20
    assert changed.warnings() == []


def test_where_the_rows_are_not_known_they_are_estimated() -> None:
    train = TrainSection(max_steps=6, batch_ramp={"from": 2, "to": 10, "tokens": 800})
    sizes = estimated_sizes(train, length=100)
    assert sizes.tolist() == [2, 4, 8, 10, 10, 10]
    plain = TrainSection(max_steps=3, per_device_train_batch_size=2, gradient_accumulation_steps=4)
    assert estimated_sizes(plain, length=100, processes=2).tolist() == [16, 16, 16]
    recipe = Recipe.from_text(
        TEXT,
        overrides=["train.max_steps=6", "train.batch_ramp={from: 2, to: 10, tokens: 800}",
                   "data.max_length=100", "train.warmup_steps=601 tokens"],
    )  # fmt: skip
    found = run_length(recipe, rows=0, tokens=0)
    assert (found.steps, found.read, found.warmup) == (6, 4400, 3)
