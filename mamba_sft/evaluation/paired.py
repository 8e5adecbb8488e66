"""Two models on the same documents: the difference of a column, and how far chance alone could move it.

Most of what a document adds to a score it adds for both models: it is hard or easy. So the differences are
taken document by document, and the interval is theirs; it is several times narrower than what the two
standard errors would give. A document occurs in both results under the same digest.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import fsum, sqrt

from mamba_sft.evaluation.normalisation import Column, as_shown, figure, influences, pool_scores, whole_of
from mamba_sft.evaluation.scores import Scores, TaskScores

Z95 = 1.959964
"""Standard errors of a normal variable on either side that hold 95 % of it."""


@dataclass(frozen=True)
class Difference:
    """How a column differs between two models, over the documents that both were scored on.

    Args:
        before: Its value for the first, over these documents.
        after: For the second.
        delta: `after - before`, as the table shows both.
        raw: The same on the metric's own scale, where nothing below chance is cut off.
        margin: Half the width of the 95 % interval around `delta`; None where it cannot be told. Near chance
            the cut makes it approximate.
        n: Documents that both have.
        left_out: Documents that only one of them has.
        other_prompts: Documents whose prompts differ, as they do with another chat template.
    """

    before: float
    after: float
    delta: float
    raw: float
    margin: float | None
    n: int
    left_out: int
    other_prompts: int


def difference(
    column: Column, before: Mapping[str, TaskScores], after: Mapping[str, TaskScores]
) -> Difference | None:
    """Returns how a column differs; None where a task is missing, or the two share no document of it.

    Args:
        column: Which.
        before: The tasks of the first model.
        after: Those of the second.
    """
    names = column.tasks
    if any(figure(column, side) is None for side in (before, after)):
        return None
    if any(whole_of(column, side) is not None for side in (before, after)):
        return _of_wholes(column, before, after)
    shared = {task: set(before[task].documents) & set(after[task].documents) for task in names}
    if not all(shared.values()):
        return None
    first = {task: _only(before[task], shared[task]) for task in names}
    second = {task: _only(after[task], shared[task]) for task in names}
    values = [_values(column, side) for side in (first, second)]
    raws = [fsum(pool_scores(pool, side).mean for pool in column.pools) for side in (first, second)]
    sizes = [sum(len(side[task].documents) for task in names) for side in (before, after)]
    n = sum(map(len, shared.values()))
    return Difference(
        before=values[0],
        after=values[1],
        delta=values[1] - values[0],
        raw=(raws[1] - raws[0]) / len(column.pools),
        margin=_margin(column, first, second),
        n=n,
        left_out=sizes[0] + sizes[1] - 2 * n,
        other_prompts=sum(_other_prompts(first[task], second[task]) for task in names),
    )


def _of_wholes(
    column: Column, before: Mapping[str, TaskScores], after: Mapping[str, TaskScores]
) -> Difference | None:
    """Of a metric that is known as a whole, of one or both: a corpus' F1 of all zeros is a mean as well."""
    first, second = figure(column, before), figure(column, after)
    if first is None or second is None:
        return None
    one, other = before[column.tasks[0]], after[column.tasks[0]]
    n = len(set(one.documents) & set(other.documents))
    left_out = len(one.documents) + len(other.documents) - 2 * n
    delta = second.value - first.value
    return Difference(first.value, second.value, delta, delta, None, n, left_out, _other_prompts(one, other))


def _values(column: Column, side: Mapping[str, TaskScores]) -> float:
    return fsum(as_shown(column, pool, pool_scores(pool, side).mean) for pool in column.pools) / len(
        column.pools
    )


def _margin(
    column: Column, first: Mapping[str, TaskScores], second: Mapping[str, TaskScores]
) -> float | None:
    if column.kind == "perplexity":
        return None  # nothing like a normal variable; the loss, which is one, has the interval
    moved = [influences(column, side) for side in (first, second)]
    if moved[0] is None or moved[1] is None:
        return None
    return Z95 * sqrt(fsum((moved[1][key] - x) ** 2 for key, x in moved[0].items()))


def _only(scores: TaskScores, kept: set[str]) -> TaskScores:
    places = [i for i, key in enumerate(scores.documents) if key in kept]
    return TaskScores(
        scores.task,
        scores.shots,
        tuple(scores.documents[i] for i in places),
        tuple(scores.prompts[i] for i in places),
        {
            name: Scores(tuple(one.totals[i] for i in places), tuple(one.weights[i] for i in places))
            for name, one in scores.metrics.items()
        },
    )


def _other_prompts(first: TaskScores, second: TaskScores) -> int:
    prompts = dict(zip(first.documents, first.prompts, strict=True))
    return sum(
        prompts.get(key, prompt) != prompt
        for key, prompt in zip(second.documents, second.prompts, strict=True)
    )
