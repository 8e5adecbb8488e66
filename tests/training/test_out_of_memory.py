"""A micro-batch that runs out of memory is run in parts, and nothing but memory changes."""

from __future__ import annotations

import logging

import pytest
import torch

from mamba_sft.errors import TrainingError
from mamba_sft.training.out_of_memory import AutoBatch, Batch


class Card:
    """A linear model on a card that holds `capacity` rows, and forgets nothing of a failed backward."""

    def __init__(self, capacity: int):
        torch.manual_seed(0)
        self.model = torch.nn.Linear(3, 1)
        self.capacity = capacity
        self.sizes: list[int] = []

    def step(self, rows: Batch, last: bool) -> tuple[float, bool]:
        x = rows["input_ids"].float()
        self.sizes.append(len(x))
        loss = self.model(torch.nn.functional.dropout(x, 0.5)).square().sum() / 100
        loss.backward()  # before running out, as a backward does halfway through
        if len(x) > self.capacity:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return loss.item(), last


def batch(rows: int) -> Batch:
    return {"input_ids": torch.arange(3 * rows).reshape(rows, 3)}


def test_it_halves_until_it_fits_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    card = Card(capacity=2)
    auto = AutoBatch(card.model, effective_batch=16)
    with caplog.at_level(logging.WARNING):
        results = auto.run(batch(8), card.step)
    assert card.sizes == [8, 4, 2, 2, 2, 2]
    assert [last for _, last in results] == [False, False, False, True]
    assert caplog.messages == [
        "out of memory with 8 rows of 3 tokens at once: going on with 4; an optimizer step still has 16",
        "out of memory with 4 rows of 3 tokens at once: going on with 2; an optimizer step still has 16",
    ]
    card.sizes.clear()
    auto.run(batch(8), card.step)
    assert card.sizes == [2, 2, 2, 2], "it does not try again what did not fit"
    card.sizes.clear()
    auto.run(batch(3), card.step)
    assert card.sizes == [1, 1, 1]


def test_gradients_are_those_of_the_parts_and_of_earlier_micro_batches() -> None:
    card, free = Card(capacity=2), Card(capacity=2)
    torch.manual_seed(1)
    AutoBatch(card.model, effective_batch=8).run(batch(2), card.step)
    auto = AutoBatch(card.model, effective_batch=8)
    torch.manual_seed(2)
    auto.run(batch(4), card.step)

    torch.manual_seed(1)
    free.step(batch(2), True)
    torch.manual_seed(2)
    for part in (slice(0, 2), slice(2, 4)):
        free.step({"input_ids": batch(4)["input_ids"][part]}, True)
    torch.testing.assert_close(card.model.weight.grad, free.model.weight.grad)


def test_a_trial_leaves_nothing_but_the_number_of_parts() -> None:
    card = Card(capacity=1)
    card.step(batch(1), True)
    before = card.model.weight.grad.clone()
    auto = AutoBatch(card.model, effective_batch=8, processes=2)
    drawn = torch.get_rng_state()
    auto.run(batch(4), card.step, trial=True)
    assert auto.parts == 4
    assert torch.equal(card.model.weight.grad, before)
    assert torch.equal(torch.get_rng_state(), drawn)


def test_a_single_row_that_does_not_fit_is_an_error() -> None:
    card = Card(capacity=0)
    with pytest.raises(TrainingError, match="out of memory with 1 x 3 tokens") as caught:
        AutoBatch(card.model, effective_batch=2).run(batch(2), card.step)
    assert "train.stream_tokens" in (caught.value.hint or "")
    assert card.model.weight.grad is None


def test_one_of_several_processes_does_not_go_on_alone() -> None:
    card = Card(capacity=1)
    with pytest.raises(TrainingError, match="out of memory"):
        AutoBatch(card.model, effective_batch=2, processes=2).run(batch(2), card.step)


def test_other_errors_pass_through() -> None:
    def fail(rows: Batch, last: bool) -> None:
        raise ValueError("a bug")

    with pytest.raises(ValueError, match="a bug"):
        AutoBatch(torch.nn.Linear(1, 1), effective_batch=1).run(batch(2), fail)
