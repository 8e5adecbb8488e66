"""Which rows each optimizer step takes."""

from __future__ import annotations

import numpy as np
import pytest
from accelerate.data_loader import SeedableRandomSampler
from hypothesis import given
from hypothesis import strategies as st

from mamba_sft.planning.course import plan_course
from mamba_sft.recipe.fields import TrainSection


def section(**fields: object) -> TrainSection:
    return TrainSection.model_validate({"gradient_accumulation_steps": 1} | fields)


def test_an_epoch_is_in_the_order_that_accelerate_gives_it() -> None:
    course = plan_course(section(num_train_epochs=3.0), np.arange(1, 21), seed=7)
    sampler = SeedableRandomSampler(range(20), data_seed=7)
    assert course.order.tolist() == [*sampler, *sampler, *sampler]


@given(
    rows=st.integers(1, 60),
    size=st.integers(1, 7),
    accumulation=st.integers(1, 5),
    processes=st.integers(1, 4),
    epochs=st.floats(0.1, 3.0),
)
def test_each_row_is_read_once_an_epoch(
    rows: int, size: int, accumulation: int, processes: int, epochs: float
) -> None:
    lengths = np.arange(1, rows + 1)
    train = section(
        per_device_train_batch_size=size, gradient_accumulation_steps=accumulation, num_train_epochs=epochs
    )
    course = plan_course(train, lengths, seed=1, processes=processes)
    whole = len(course.order) // rows
    for epoch in range(whole):
        assert sorted(course.order[epoch * rows : (epoch + 1) * rows]) == list(range(rows))
    assert len(set(course.order[whole * rows :])) == len(course.order) - whole * rows
    together = size * accumulation * processes
    assert all(0 < taken <= together for taken in course.sizes)
    assert course.epochs[-1] >= min(epochs, whole + 1) - 1e-9 or course.epochs[-1] == pytest.approx(epochs)
    assert course.tokens.sum() == lengths[course.order].sum()
    assert [course.rows(step).tolist() for step in range(course.steps)] == [
        part.tolist() for part in np.split(course.order, course.starts[1:-1])
    ]


def test_steps_that_are_asked_for_go_on_into_further_epochs() -> None:
    train = section(per_device_train_batch_size=4, max_steps=5)
    course = plan_course(train, np.full(10, 3), seed=0)
    assert course.sizes.tolist() == [4, 4, 2, 4, 4]
    assert course.tokens.tolist() == [12, 12, 6, 12, 12]
    assert course.epochs.tolist() == pytest.approx([0.4, 0.8, 1.0, 1.4, 1.8])
