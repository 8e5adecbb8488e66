"""What lm-eval says of a task, as scores of its documents and as samples to read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import isclose
from typing import Any

from mamba_sft.evaluation.scores import Scores, TaskScores, document_keys, short_digest


def scores_of(name: str, task: Any, found: Any, seconds: float) -> TaskScores:
    """Returns what `evaluate` says of one task, a document at a time."""
    results, samples = found["results"][name], found["samples"][name]
    documents: dict[int, tuple[str, str]] = {}
    values: dict[str, dict[int, Any]] = {}
    for sample in samples:
        at = sample["doc_id"]
        documents[at] = sample["doc_hash"], sample["prompt_hash"]
        for metric in sample["metrics"]:
            values.setdefault(f"{metric},{sample['filter']}", {})[at] = sample[metric]
    order = sorted(documents)
    metrics, whole = {}, {}
    for key, value in results.items():
        if "," not in key or "_stderr," in key or not isinstance(value, int | float):
            continue
        given = values.get(key, {})
        scored = _by_document([given[at] for at in order]) if set(given) == set(order) else None
        if scored is not None and isclose(scored.mean, value, rel_tol=1e-6, abs_tol=1e-9):
            metrics[key] = scored
        else:
            error = results.get("{}_stderr,{}".format(*key.split(",", 1)))
            whole[key] = float(value), float(error) if isinstance(error, int | float) else None
    return TaskScores(
        task=name,
        shots=int(task.config.num_fewshot or 0),
        documents=document_keys(documents[at][0] for at in order),
        prompts=tuple(short_digest(documents[at][1].encode()) for at in order),
        metrics=metrics,
        whole=whole,
        seconds=seconds,
    )


def samples_of(found: Sequence[Mapping[str, Any]]) -> tuple[dict[str, Any], ...]:
    """Returns what was asked and answered, a document and filter each."""
    return tuple(
        {
            "document": short_digest(sample["doc_hash"].encode()),
            "filter": sample["filter"],
            "prompt": sample["arguments"][0][0],
            "choices": [given[1] for given in sample["arguments"] if isinstance(given[1], str)],
            "answers": [_plain(answer) for answer in sample["resps"]],
            "taken": [_plain(answer) for answer in sample["filtered_resps"]],
            "target": str(sample["target"]),
            "metrics": {metric: _plain(sample[metric]) for metric in sample["metrics"]},
        }
        for sample in found
    )


def _plain(value: Any) -> Any:
    """A value as JSON holds it."""
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    if isinstance(value, str | bool | int | float) or value is None:
        return value
    return value.item() if hasattr(value, "item") else str(value)


def _by_document(values: Sequence[Any]) -> Scores | None:
    """Scores of documents that have a number each, or several marks; None where they have something else."""
    if all(isinstance(value, int | float) or hasattr(value, "item") for value in values):
        return Scores.of([float(value) for value in values])
    if all(isinstance(value, list) and value for value in values):  # IFEval: a mark for each instruction
        with_marks = all(isinstance(mark, bool) for value in values for mark in value)
        return Scores(tuple(map(sum, values)), tuple(map(float, map(len, values)))) if with_marks else None
    return None
