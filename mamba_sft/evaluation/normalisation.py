"""Scores of tasks to the figures of a table, as the leaderboard computes them.

`rescale` puts guessing at 0 and perfection at 100. Some figures pool the documents of several tasks before
they are rescaled (GPQA, MATH), others rescale each task with its own chance level and take the plain mean
(BBH, MuSR): a `Column` says which, as pools whose values are averaged. The formulas are those of the
leaderboard's documentation (huggingface.co/docs/leaderboards, "normalization" and "about", read 2026-11-27);
that GPQA and MATH pool is settled by the published values, each of which is then a whole count.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from math import exp, fsum, inf, sqrt
from typing import Literal

from mamba_sft.evaluation.scores import Scores, TaskScores

Kind = Literal["percent", "number", "perplexity"]


@dataclass(frozen=True)
class Pool:
    """Documents that are scored together: those of one task, or of several.

    Args:
        tasks: The tasks.
        metric: Their metric.
        chance: What guessing scores; rescaled to 0.
    """

    tasks: tuple[str, ...]
    metric: str
    chance: float = 0.0


@dataclass(frozen=True)
class Column:
    """One figure of a table: the mean of its pools.

    Args:
        title: As it stands above the column.
        pools: What it is the mean of.
        kind: `percent` is rescaled to 0 to 100; `number` is the mean as it is; `perplexity` its exponential.
        averaged: Whether the table's Average has it as a part.
        falls: Whether less is better.
    """

    title: str
    pools: tuple[Pool, ...]
    kind: Kind = "percent"
    averaged: bool = True
    falls: bool = False

    @property
    def tasks(self) -> tuple[str, ...]:
        """The tasks it needs, each once."""
        return tuple(dict.fromkeys(chain.from_iterable(pool.tasks for pool in self.pools)))

    @property
    def metrics(self) -> tuple[str, ...]:
        """The metrics it needs, each once."""
        return tuple(dict.fromkeys(pool.metric for pool in self.pools))


@dataclass(frozen=True)
class Figure:
    """The value of a column for one model.

    Args:
        value: What the table shows, unrounded.
        raw: The mean of the pools before they are rescaled.
        stderr: The standard error of `value`; None where a pool has one document.
        n: Documents.
        shots: Examples before each document; None where tasks differ.
    """

    value: float
    raw: float
    stderr: float | None
    n: int
    shots: int | None


def rescale(x: float, chance: float) -> float:
    """Returns a share of right answers as 0 (guessing, or worse) to 100 (all)."""
    return 100.0 * max(0.0, (x - chance) / (1.0 - chance))


def figure(column: Column, scored: Mapping[str, TaskScores]) -> Figure | None:
    """Returns the value of a column; None where a task or its metric is missing: part of a mean is no mean.

    Args:
        column: Which.
        scored: The tasks that have been scored, by name.
    """
    if any(task not in scored for task in column.tasks):
        return None
    shots = {scored[task].shots for task in column.tasks}
    n = sum(len(scored[task].documents) for task in column.tasks)
    only = shots.pop() if len(shots) == 1 else None
    if (whole := whole_of(column, scored)) is not None:
        return Figure(whole[0], whole[0], whole[1], n, only)
    if any(pool.metric not in scored[task].metrics for pool in column.pools for task in pool.tasks):
        return None
    pooled = [pool_scores(pool, scored) for pool in column.pools]
    means = [one.mean for one in pooled]
    values = [as_shown(column, pool, mean) for pool, mean in zip(column.pools, means, strict=True)]
    moved = influences(column, scored)
    return Figure(
        value=fsum(values) / len(values),
        raw=fsum(means) / len(means),
        stderr=None if moved is None else sqrt(fsum(x * x for x in moved.values())),
        n=n,
        shots=only,
    )


def whole_of(column: Column, scored: Mapping[str, TaskScores]) -> tuple[float, float | None] | None:
    """Returns a metric that is known of a task as a whole only, with its error; None of any other column."""
    task, metric = column.tasks[0], column.metrics[0]
    return scored[task].whole.get(metric) if len(column.tasks) == 1 else None


def average(figures: Sequence[tuple[Column, Figure | None]]) -> float | None:
    """Returns the mean of the unrounded values of columns that are averaged; None where one is missing."""
    values = [None if one is None else one.value for column, one in figures if column.averaged]
    if not values or None in values:
        return None
    return fsum(value for value in values if value is not None) / len(values)


def pool_scores(pool: Pool, scored: Mapping[str, TaskScores]) -> Scores:
    """Returns the scores of all documents of a pool, as one task's."""
    parts = [scored[task].metrics[pool.metric] for task in pool.tasks]
    return Scores(
        tuple(chain.from_iterable(part.totals for part in parts)),
        tuple(chain.from_iterable(part.weights for part in parts)),
    )


def as_shown(column: Column, pool: Pool, mean: float) -> float:
    """Returns the mean of a pool on the scale of its column."""
    if column.kind == "percent":
        return rescale(mean, pool.chance)
    return _perplexity(mean) if column.kind == "perplexity" else mean


def slope(column: Column, pool: Pool, mean: float) -> float:
    """Returns how fast the shown value moves with the mean, where nothing is clipped."""
    if column.kind == "percent":
        return 100.0 / (1.0 - pool.chance)
    return _perplexity(mean) if column.kind == "perplexity" else 1.0


def _perplexity(loss: float) -> float:
    """The exponential of a loss; of one that no number can hold, as a broken model has, infinity."""
    try:
        return exp(loss)
    except OverflowError:
        return inf


def influences(column: Column, scored: Mapping[str, TaskScores]) -> dict[str, float] | None:
    """Returns what each document adds to the shown value's distance from what it would be on average.

    Their squares sum to the variance of the value. A document that occurs in several pools, as each of IFEval
    does in both metrics, is one document with one influence; so is one that two tasks share.

    Args:
        column: Which.
        scored: Its tasks.

    Returns:
        By document; None where a pool has fewer than two, of which nothing can be said.
    """
    found: dict[str, float] = {}
    for pool in column.pools:
        scores = pool_scores(pool, scored)
        keys = [key for task in pool.tasks for key in scored[task].documents]
        count, mean = len(keys), scores.mean
        if count < 2:
            return None
        by = slope(column, pool, mean) / len(column.pools) / fsum(scores.weights)
        by *= sqrt(count / (count - 1))
        for key, total, weight in zip(keys, scores.totals, scores.weights, strict=True):
            found[key] = found.get(key, 0.0) + by * (total - mean * weight)
    return found
