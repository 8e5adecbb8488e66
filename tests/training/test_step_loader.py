"""The rows of an optimizer step, shared out over processes and cut into micro-batches."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from accelerate import skip_first_batches
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st

from mamba_sft.data.packing import PADDING, Collator
from mamba_sft.data.rows import IGNORED
from mamba_sft.planning.course import Course, plan_course
from mamba_sft.recipe.fields import TrainSection
from mamba_sft.training.step_loader import StepRows, count_rows, load_steps


def course_of(rows: int, together: int, steps: int = -1) -> Course:
    train = TrainSection(per_device_train_batch_size=together, gradient_accumulation_steps=1, max_steps=steps)
    return plan_course(train, np.full(rows, 3), seed=3)


def loader(course: Course, rows: int, size: int, process: int = 0, processes: int = 1) -> Any:
    names = ("dataloader_num_workers", "dataloader_pin_memory", "dataloader_persistent_workers")
    fields: dict[str, Any] = dict.fromkeys(names, 0) | {"dataloader_prefetch_factor": None}
    fields |= {"train_batch_size": size, "process_index": process, "world_size": processes}
    ids = [[n, n, n] for n in range(rows)]
    dataset = Dataset.from_dict({"input_ids": ids, "labels": ids, "where": [f"f:{n}" for n in range(rows)]})
    return load_steps(dataset, Collator(pad_token_id=99), course, SimpleNamespace(**fields))


@given(
    rows=st.integers(1, 40), together=st.integers(1, 17), size=st.integers(1, 5), processes=st.integers(1, 5)
)
def test_every_process_has_as_many_micro_batches_and_every_row_is_in_one(
    rows: int, together: int, size: int, processes: int
) -> None:
    course = course_of(rows, together)
    shares = [StepRows(course, size, process=p, processes=processes) for p in range(processes)]
    for step in range(course.steps):
        own = [share.of(step) for share in shares]
        assert sorted(n for part in own for n in part if n >= 0) == sorted(course.rows(step))
        batches = [-(-sum(n >= 0 for n in part) // size) + part.count(-1) for part in own]
        assert len(set(batches)) == 1


def test_micro_batches_are_cut_in_the_order_of_the_course() -> None:
    course = course_of(10, 7)
    first, second = loader(course, 10, size=3)
    read = [[int(row[0]) for row in batch["input_ids"]] for batch in (*first, *second)]
    order = course.order.tolist()
    assert read == [order[0:3], order[3:6], order[6:7], order[7:10]]


def test_what_fills_up_trains_nothing_and_comes_from_nowhere() -> None:
    course = course_of(4, 4)
    (batches,) = loader(course, 4, size=4, process=1, processes=2)
    (filler,) = batches
    assert (filler["labels"] == IGNORED).all()
    assert (filler["seq_idx"] == PADDING).all()
    assert not filler["trained"].any()
    assert filler["where"].tolist() == [()]
    assert count_rows(filler) == 0
    ((real,),) = loader(course, 4, size=4, process=0, processes=2)
    assert count_rows(real) == 4


@pytest.mark.parametrize("done", [0, 1, 5, 6])
def test_a_resumed_run_reads_on_where_it_stopped(done: int) -> None:
    course = course_of(10, 4, steps=7)
    whole = [batch["where"].tolist() for step in loader(course, 10, size=2) for batch in step]
    rest = skip_first_batches(loader(course, 10, size=2), done) if done else loader(course, 10, size=2)
    got = [batch["where"].tolist() for step in rest for batch in step]
    assert got == whole[len(whole) - len(got) :]
    assert len(rest) == 7 - done
