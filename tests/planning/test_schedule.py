"""The rate of every step, to the last one: closed forms, the parts of a schedule, and a batch that grows."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import get_scheduler

from mamba_sft.errors import RecipeError
from mamba_sft.planning.course import plan_course
from mamba_sft.planning.schedule import (
    TRAINER_NAMES,
    Phases,
    find_phases,
    learning_rates,
    make_scheduler,
    warmup_count,
)
from mamba_sft.recipe.fields import TrainSection

PEAK = 6.4e-4
KINDS = ("wsd", "cosine", "linear", "constant")


def train_section(**values: Any) -> TrainSection:
    return TrainSection(**{"learning_rate": PEAK, "warmup_steps": 0.0} | values)


def rates(steps: int, **values: Any) -> list[float]:
    """The rate of each step of a run whose steps have 100 tokens."""
    found = learning_rates(train_section(**values), np.full(steps, 100))
    assert found.dtype == np.float64
    return list(found)


def optimizer(peak: float = PEAK) -> torch.optim.Optimizer:
    return torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=peak)


def stepped(scheduler: Any, steps: int) -> list[float]:
    """The rates that an optimizer had, step by step."""
    found = []
    for _ in range(steps):
        found.append(scheduler.optimizer.param_groups[0]["lr"])
        scheduler.optimizer.step()
        scheduler.step()
    return found


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("warmup", [0, 1, 3, 7.0, 0.03, 0.25])
@pytest.mark.parametrize("steps", [1, 2, 3, 7, 40, 333])
def test_without_the_new_fields_all_is_what_transformers_has_to_the_bit(
    kind: str, warmup: float, steps: int
) -> None:
    rising = warmup_count(warmup, steps)
    left = max(1, steps - rising)
    decay = min(max(1, round(0.2 * steps)), left)
    more = {"num_decay_steps": decay, "decay_type": "1-sqrt"} if kind == "wsd" else {}
    theirs = stepped(get_scheduler(TRAINER_NAMES[kind], optimizer(), 0, left, more), left)
    whole = [PEAK * ((s + 1) / (rising + 1)) for s in range(rising)] + theirs
    assert rates(steps, lr_scheduler_type=kind, warmup_steps=float(warmup)) == whole[:steps]


def test_todays_rates_are_these() -> None:
    assert rates(50, warmup_steps=5.0)[:7] == [PEAK * ((s + 1) / 6) for s in range(5)] + [PEAK] * 2
    assert rates(50, warmup_steps=5.0)[5:41] == [PEAK] * 36
    assert rates(50)[40:] == [PEAK * (1 - math.sqrt(k / 10)) for k in range(10)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("more", [{}, {"batch_scaling": True}])
def test_the_optimizer_gets_the_rates_of_the_plain_function(kind: str, more: dict[str, Any]) -> None:
    ramp = {"from": 2, "to": 9, "tokens": 1500}
    section = train_section(lr_scheduler_type=kind, warmup_steps=4.0, batch_ramp=ramp, **more)
    tokens = np.full(30, 100)
    made = make_scheduler(optimizer(), section, tokens)
    assert stepped(made, 30) == list(learning_rates(section, tokens))
    made.step()  # the trainer may, after its last step
    assert made.get_last_lr()[0] <= PEAK


def test_a_resumed_schedule_goes_on_where_it_stopped() -> None:
    section = train_section(
        decay="exponential", batch_ramp={"from": 2, "to": 9, "tokens": 900}, batch_scaling=True
    )
    tokens = np.full(20, 100)
    whole = list(learning_rates(section, tokens))
    for stop in range(20):
        first = make_scheduler(optimizer(), section, tokens)
        stepped(first, stop)
        again = optimizer()
        second = make_scheduler(again, section, tokens)
        again.load_state_dict(first.optimizer.state_dict())
        second.load_state_dict(first.state_dict())
        assert stepped(second, 20 - stop) == whole[stop:]


def test_the_exponential_decay_is_the_reports() -> None:
    found = rates(100, decay="exponential", decay_steps=40.0, warmup_steps=10.0)
    assert found[10:60] == [PEAK] * 50
    low = PEAK / 256
    closed = [PEAK * math.exp(-t / 40 * math.log(PEAK / low)) for t in range(1, 41)]
    assert found[60:] == pytest.approx(closed, rel=1e-13)
    assert found[-1] == low
    ratios = np.array(found[60:]) / np.array(found[59:-1])
    assert ratios == pytest.approx(256 ** (-1 / 40))


@pytest.mark.parametrize(
    ("decay", "form"), [("linear", lambda p: 1 - p), ("1-sqrt", lambda p: 1 - math.sqrt(p))]
)
def test_the_other_decays_end_at_the_ratio(decay: str, form: Any) -> None:
    found = rates(50, decay=decay, decay_steps=0.4, min_lr_ratio=0.1)
    assert found[:30] == [PEAK] * 30
    assert found[30:] == pytest.approx([PEAK * (0.1 + 0.9 * form(k / 20)) for k in range(1, 21)], rel=1e-14)
    assert found[-1] == PEAK * 0.1
    to_zero = rates(50, decay=decay, decay_steps=0.4)
    assert to_zero[30:] == pytest.approx([PEAK * form(k / 20) for k in range(20)], rel=1e-14)


@pytest.mark.parametrize(
    ("kind", "form"), [("linear", lambda p: 1 - p), ("cosine", lambda p: (1 + math.cos(math.pi * p)) / 2)]
)
def test_cosine_and_linear_end_at_the_ratio(kind: str, form: Any) -> None:
    found = rates(60, lr_scheduler_type=kind, warmup_steps=9.0, min_lr_ratio=0.25)
    assert found[9:] == pytest.approx([PEAK * (0.25 + 0.75 * form(k / 50)) for k in range(51)], rel=1e-14)
    assert (found[9], found[-1]) == (PEAK, PEAK * 0.25)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("more", [{}, {"min_lr_ratio": 0.1}, {"decay": "exponential"}, {"decay": "linear"}])
@given(steps=st.integers(1, 60), warmup=st.integers(0, 70))
def test_no_step_is_for_nothing(kind: str, more: dict[str, Any], steps: int, warmup: int) -> None:
    found = rates(steps, lr_scheduler_type=kind, warmup_steps=float(warmup), **more)
    assert len(found) == steps
    assert min(found) > 0
    assert max(found) <= PEAK
    assert found[:warmup] == sorted(found[:warmup])
    assert found[warmup:] == sorted(found[warmup:], reverse=True)


@pytest.mark.parametrize("kind", KINDS)
def test_the_warm_up_rises_evenly_to_the_peak(kind: str) -> None:
    found = rates(40, lr_scheduler_type=kind, warmup_steps=4.0, learning_rate=1.0)
    assert found[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert rates(40, lr_scheduler_type=kind)[0] == PEAK


def phases(steps: int | np.ndarray, **values: Any) -> Phases:
    tokens = np.full(steps, 100) if isinstance(steps, int) else steps
    return find_phases(train_section(**values), tokens)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({}, (0, 80, 20)),
        ({"warmup_steps": 10.0}, (10, 70, 20)),
        ({"warmup_steps": 0.03, "decay_steps": 0.1}, (3, 87, 10)),
        ({"warmup_steps": 5.0, "stable_steps": 60.0}, (5, 60, 35)),
        ({"stable_steps": 0.0}, (0, 0, 100)),
        ({"warmup_steps": 10.0, "stable_steps": 70.0, "decay_steps": 20.0}, (10, 70, 20)),
        ({"warmup_steps": 0.1, "stable_steps": 0.7, "decay_steps": 0.2}, (10, 70, 20)),
        ({"warmup_steps": "1k tokens", "decay_steps": "2.5k tokens"}, (10, 65, 25)),
        ({"warmup_steps": "1001 tokens", "decay_steps": "2501 tokens"}, (11, 63, 26)),
        ({"warmup_steps": "1 tokens", "stable_steps": "8k tokens"}, (1, 80, 19)),
        ({"lr_scheduler_type": "cosine", "warmup_steps": "450 tokens"}, (5, 0, 95)),
        ({"lr_scheduler_type": "constant", "warmup_steps": 5.0}, (5, 95, 0)),
    ],
)
def test_the_parts_come_in_steps_shares_and_tokens(values: dict[str, Any], expected: Any) -> None:
    assert phases(100, **values) == expected


def test_tokens_are_counted_from_the_end_for_the_decay() -> None:
    tokens = np.arange(1, 101)
    assert phases(tokens, warmup_steps="55 tokens", decay_steps="199 tokens") == (10, 88, 2)
    assert phases(tokens, warmup_steps="56 tokens", decay_steps="200 tokens") == (11, 86, 3)


@given(st.integers(1, 300), st.floats(0.001, 0.998), st.floats(0.001, 0.998))
def test_shares_that_make_a_run_make_every_run(steps: int, first: float, second: float) -> None:
    warmup, stable = sorted((first, second))[0], abs(first - second)
    decay = 1 - warmup - stable
    values = {"warmup_steps": warmup, "decay_steps": decay, "stable_steps": stable}
    values = {name: value for name, value in values.items() if 1e-9 < value < 1}
    found = phases(steps, **{"warmup_steps": 0.0} | values)
    assert found.warmup + found.stable + found.decay == max(steps, found.warmup + 1)
    assert abs(found.decay - decay * steps) <= 2 or "decay_steps" not in values


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"warmup_steps": 60.0, "decay_steps": 41.0}, "`warmup_steps: 60` is 60, `decay_steps: 41` is 41"),
        ({"warmup_steps": 60.0, "stable_steps": 40.0}, "and `decay_steps` has to be 1 at least"),
        (
            {"warmup_steps": 10.0, "stable_steps": 60.0, "decay_steps": 20.0},
            "do not make the 100 steps of the run: `warmup_steps: 10` is 10, `stable_steps: 60` is 60, ",
        ),
        ({"decay_steps": "10001 tokens"}, "`train.decay_steps` is `10001 tokens`, and the steps that it"),
        ({"warmup_steps": "20k tokens"}, "`train.warmup_steps` is `20k tokens`, and the steps that it could"),
        ({"warmup_steps": 0.5, "stable_steps": "5001 tokens"}, "could take read 5,000 tokens"),
        ({"warmup_steps": "6k tokens", "decay_steps": "5k tokens"}, "is 60, `decay_steps: 5k tokens` is 50"),
    ],
)
def test_parts_that_do_not_make_the_run_are_refused(values: dict[str, Any], words: str) -> None:
    with pytest.raises(RecipeError, match=r"the run|could take") as caught:
        phases(100, **values)
    assert words in caught.value.message
    assert caught.value.hint


def test_batch_scaling_keeps_the_noise_temperature() -> None:
    ramp = {"from": 128, "to": 2048, "tokens": 50_000_000}
    section = train_section(
        lr_scheduler_type="constant", batch_ramp=ramp, batch_scaling=True, num_train_epochs=2.0
    )
    course = plan_course(section, np.full(60_000, 1000), seed=0)
    found = learning_rates(section, course.tokens)
    read = np.cumsum(course.tokens) - course.tokens
    asked = np.floor(128 + 1920 * np.minimum(1, read / 50_000_000) + 0.5)
    assert found / np.sqrt(asked) == pytest.approx(PEAK / math.sqrt(2048), rel=1e-14)
    assert found[0] == PEAK * 0.25
    assert found[-1] == PEAK
    short = course.sizes < asked
    assert short.sum() >= 1, "the last step of an epoch has what is left"
    assert (np.diff(found) >= 0).all(), "and its rate does not dip"


def test_batch_scaling_multiplies_the_schedule() -> None:
    values: dict[str, Any] = {
        "decay": "exponential", "warmup_steps": 3.0, "batch_ramp": {"from": 4, "to": 16, "tokens": 900},
    }  # fmt: skip
    tokens = np.full(30, 100)
    plain = learning_rates(train_section(**values), tokens)
    scaled = learning_rates(train_section(**values, batch_scaling=True), tokens)
    growing = np.minimum(16, np.floor(4 + 12 * (100 * np.arange(30)) / 900 + 0.5))
    assert scaled == pytest.approx(plain * np.sqrt(growing / 16), rel=1e-14)
    assert list(scaled[9:]) == list(plain[9:])


def test_a_share_of_the_run_is_rounded_up() -> None:
    assert [warmup_count(value, 40) for value in (0, 0.03, 0.5, 1, 7)] == [0, 2, 20, 1, 7]
