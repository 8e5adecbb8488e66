"""Two models on the same documents."""

from __future__ import annotations

from math import sqrt

import pytest

from mamba_sft.evaluation.normalisation import Column, Pool
from mamba_sft.evaluation.paired import Z95, difference
from mamba_sft.evaluation.scores import Scores, TaskScores


def task(values: dict[str, float], name: str = "t", prompt: str = "") -> TaskScores:
    keys = tuple(values)
    return TaskScores(
        name, 0, keys, tuple(prompt + key for key in keys), {"acc": Scores.of(list(values.values()))}
    )


COLUMN = Column("x", (Pool(("t",), "acc", 1 / 4),))
BEFORE = {"a": 1.0, "b": 0.0, "c": 0.0, "d": 1.0}
AFTER = {"d": 1.0, "c": 1.0, "b": 1.0, "a": 1.0}


def test_documents_are_joined_by_what_they_are_and_not_by_their_order() -> None:
    found = difference(COLUMN, {"t": task(BEFORE)}, {"t": task(AFTER)})
    assert found is not None
    assert found.margin is not None
    assert (found.before, found.after) == (pytest.approx(100 / 3), 100.0)
    assert found.delta == pytest.approx(200 / 3)
    assert found.raw == pytest.approx(0.5)
    changes = [0, 1, 1, 0]
    error = sqrt(sum((x - 0.5) ** 2 for x in changes) / 3 / 4)
    assert found.margin == pytest.approx(Z95 * error * 100 / 0.75)
    assert (found.n, found.left_out, found.other_prompts) == (4, 0, 0)


def test_a_model_does_not_differ_from_itself() -> None:
    found = difference(COLUMN, {"t": task(BEFORE)}, {"t": task(BEFORE)})
    assert found is not None
    assert (found.delta, found.margin) == (0.0, 0.0)  # though its own score is anything but certain


def test_only_shared_documents_are_compared_and_the_rest_is_told() -> None:
    found = difference(COLUMN, {"t": task(BEFORE)}, {"t": task({"c": 1.0, "d": 1.0, "z": 0.0})})
    assert found is not None
    assert (found.n, found.left_out) == (2, 3)
    assert found.raw == pytest.approx(0.5)
    assert difference(COLUMN, {"t": task(BEFORE)}, {"t": task({"z": 0.0})}) is None
    assert difference(COLUMN, {"t": task(BEFORE)}, {}) is None


def test_other_prompts_are_counted() -> None:
    found = difference(COLUMN, {"t": task(BEFORE)}, {"t": task(AFTER, prompt="<user>")})
    assert found is not None
    assert found.other_prompts == 4


def test_parts_are_combined_as_the_column_combines_them() -> None:
    column = Column("x", (Pool(("t",), "acc", 1 / 2), Pool(("u",), "acc")))
    before = {"t": task({"a": 1, "b": 0, "c": 1}), "u": task({"d": 0, "e": 0, "f": 0}, "u")}
    after = {"t": task({"a": 1, "b": 1, "c": 1}), "u": task({"d": 1, "e": 0, "f": 0}, "u")}
    found = difference(column, before, after)
    assert found is not None
    assert found.margin is not None
    assert found.delta == pytest.approx((100 - 100 / 3 + 100 / 3) / 2)
    error = sqrt(1 / 3 * (2 / 3) ** 2 * 1 / 2 + 2 / 3 * (1 / 3) ** 2 * 1 / 2) / sqrt(3)  # of either part
    error = sqrt(((2 / 3) ** 2 + 2 * (1 / 3) ** 2) / 2 / 3)
    assert found.margin == pytest.approx(Z95 * sqrt((200 * error) ** 2 + (100 * error) ** 2) / 2)


def test_metrics_of_a_whole_task_are_compared_without_an_interval() -> None:
    column = Column("f1", (Pool(("t",), "f1"),), kind="number")
    sides = [{"t": TaskScores("t", 0, ("a",), ("a",), {}, {"f1": (value, 0.1)})} for value in (0.25, 0.75)]
    found = difference(column, *sides)
    assert found is not None
    assert (found.delta, found.margin, found.n) == (0.5, None, 1)


def test_a_metric_that_happens_to_be_a_mean_in_one_model_is_compared_all_the_same() -> None:
    column = Column("f1", (Pool(("t",), "f1"),), kind="number")
    zeros = {"t": TaskScores("t", 0, ("a", "b"), ("a", "b"), {"f1": Scores.of([0.0, 0.0])})}
    other = {"t": TaskScores("t", 0, ("a", "b"), ("a", "b"), {}, {"f1": (0.75, 0.1)})}
    for sides, delta in (((zeros, other), 0.75), ((other, zeros), -0.75)):
        found = difference(column, *sides)
        assert found is not None
        assert (found.delta, found.margin, found.n) == (delta, None, 2)


def test_a_metric_that_only_one_of_them_has_is_not_compared() -> None:
    column = Column("acc", (Pool(("t", "u"), "acc"),))
    whole = {name: task({"a": 1, "b": 0}, name) for name in ("t", "u")}
    less = whole | {"u": TaskScores("u", 0, ("a", "b"), ("a", "b"), {})}
    assert difference(column, whole, less) is None
    assert difference(column, less, whole) is None
