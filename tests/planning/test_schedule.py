"""The rate of every step: none is for nothing, and the warm-up is what the recipe says."""

from __future__ import annotations

import pytest
import torch
from transformers import SchedulerType

from mamba_sft.planning.schedule import TRAINER_NAMES, make_scheduler, warmup_count

UNSCHEDULED = {"reduce_lr_on_plateau", "greedy"}
"""Of `transformers`: they follow the loss, not the step."""
MORE_ARGUMENTS = {"cosine_with_min_lr", "cosine_warmup_with_min_lr"}
"""They want a lowest rate, which no recipe has a field for."""
NAMES = sorted({kind.value for kind in SchedulerType} - UNSCHEDULED - MORE_ARGUMENTS)


def rates(name: str, steps: int, warmup: int, peak: float = 1.0) -> list[float]:
    """The rate of each step of a run."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=peak)
    scheduler = make_scheduler(name, optimizer, warmup=warmup, steps=steps)
    found = []
    for _ in range(steps):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return found


def test_the_names_of_the_recipe_are_among_them() -> None:
    assert set(TRAINER_NAMES.values()) <= set(NAMES)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("steps", "warmup"), [(1, 0), (1, 1), (2, 1), (3, 0), (7, 3), (40, 5), (5, 9)])
def test_no_step_is_for_nothing(name: str, steps: int, warmup: int) -> None:
    found = rates(name, steps, warmup, peak=0.5)
    assert min(found) > 0
    assert max(found) <= 0.5


@pytest.mark.parametrize("name", NAMES)
def test_the_warm_up_rises_evenly_to_the_peak(name: str) -> None:
    found = rates(name, 40, 4)
    assert found[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert rates(name, 40, 0)[0] == 1.0


@pytest.mark.parametrize("name", ["warmup_stable_decay", "cosine", "linear"])
def test_the_rate_falls_at_the_end(name: str) -> None:
    found = rates(name, 40, 4)
    assert found[-1] < 0.2
    assert found[4:] == sorted(found[4:], reverse=True)


def test_wsd_holds_the_peak_and_decays_in_the_last_fifth() -> None:
    found = rates("warmup_stable_decay", 50, 5)
    assert found[5:41] == [1.0] * 36
    assert found[41:] == pytest.approx([1 - (k / 10) ** 0.5 for k in range(1, 10)])


def test_a_resumed_schedule_goes_on_where_it_stopped() -> None:
    whole = rates("warmup_stable_decay", 20, 4)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    first = make_scheduler("warmup_stable_decay", optimizer, warmup=4, steps=20)
    for _ in range(7):
        optimizer.step()
        first.step()
    state, optimizer_state = first.state_dict(), optimizer.state_dict()
    again = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    second = make_scheduler("warmup_stable_decay", again, warmup=4, steps=20)
    again.load_state_dict(optimizer_state)
    second.load_state_dict(state)
    assert again.param_groups[0]["lr"] == whole[7]
    again.step()
    second.step()
    assert again.param_groups[0]["lr"] == whole[8]


def test_a_share_of_the_run_is_rounded_up() -> None:
    assert [warmup_count(value, 40) for value in (0, 0.03, 0.5, 1, 7)] == [0, 2, 20, 1, 7]
