"""A measurement in a process of its own: what it tells, how it ends, and how it is ended."""

from __future__ import annotations

import os
import signal
import time

import pytest

from mamba_sft.diagnostics.measured_process import (
    MeasurementError,
    NoMemoryError,
    Tell,
    TooLongError,
    told_by,
)
from mamba_sft.errors import UsageError


def counts(tell: Tell, last: int) -> None:
    for number in range(last):
        tell({"number": number, "process": os.getpid()})


def ends_badly(tell: Tell, how: str) -> None:
    tell({"number": 0})
    if how == "mistake":
        raise UsageError("not so", hint="but so")
    if how == "bug":
        raise KeyError("a bug")
    if how == "memory":
        raise MemoryError
    if how == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if how == "exits":
        os._exit(7)
    time.sleep(600)


def test_facts_come_from_another_process() -> None:
    facts = list(told_by(counts, 3, what="numbers"))
    assert [fact["number"] for fact in facts] == [0, 1, 2]
    assert {fact["process"] for fact in facts} != {os.getpid()}


@pytest.mark.parametrize(
    ("how", "kind", "text"),
    [
        ("mistake", UsageError, "not so"), ("bug", MeasurementError, "KeyError: 'a bug'"),
        ("memory", NoMemoryError, "it took more memory than there is"),
        ("killed", NoMemoryError, "it took more memory than there is"),
        ("exits", MeasurementError, "the process that measures it died with code 7"),
    ],
)  # fmt: skip
def test_what_ends_it_is_raised_after_what_it_told(how: str, kind: type[Exception], text: str) -> None:
    facts = told_by(ends_badly, how, what="it")
    assert next(facts) == {"number": 0}
    with pytest.raises(kind) as caught:
        next(facts)
    assert text in str(caught.value)
    assert how != "mistake" or getattr(caught.value, "hint", None) == "but so"


def test_it_is_stopped_when_its_time_is_over() -> None:
    facts = told_by(ends_badly, "never", what="it", seconds=0.2)
    assert next(facts) == {"number": 0}
    with pytest.raises(TooLongError):
        next(facts)
