"""What a model was scored on, a document at a time: the ground that every figure of an evaluation stands on.

Per-document scores are kept because two models are compared on the same documents, and because a figure that
pools several tasks is a count over their documents and no mean of their means.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from hashlib import blake2b
from math import fsum, sqrt
from typing import Any


@dataclass(frozen=True)
class Scores:
    """One metric of one task: a total for each document, over as much as there was to score in it.

    Args:
        totals: A document's score; with a weight, the sum over what it weighs, e.g. the loss of its tokens.
        weights: How much each document had to score: 1, or its tokens, or its instructions.
    """

    totals: tuple[float, ...]
    weights: tuple[float, ...]

    @classmethod
    def of(cls, values: list[float]) -> Scores:
        """Returns scores of documents that weigh the same."""
        return cls(tuple(values), (1.0,) * len(values))

    @property
    def mean(self) -> float:
        """The sum of the totals over the sum of the weights."""
        return fsum(self.totals) / fsum(self.weights)

    @cached_property
    def stderr(self) -> float | None:
        """The standard error of the mean, documents being independent; None of fewer than two."""
        mean, count = self.mean, len(self.totals)
        if count < 2:
            return None
        squares = fsum((x - mean * w) ** 2 for x, w in zip(self.totals, self.weights, strict=True))
        return sqrt(squares * count / (count - 1)) / fsum(self.weights)


@dataclass(frozen=True)
class TaskScores:
    """What one task says of one model.

    Args:
        task: Its name, e.g. `leaderboard_bbh_navigate`.
        shots: Examples that stood before each document.
        documents: What each document is known by, the same for every model: a digest of it.
        prompts: A digest of what the model was shown for it; models with other templates are shown another.
        metrics: The scores by metric, each with as many entries as there are documents.
        whole: Metrics that are no mean over documents, such as the F1 of a corpus, with the standard error.
        seconds: How long it took.
        samples: What was asked and answered, for a file of samples; kept in no result.
    """

    task: str
    shots: int
    documents: tuple[str, ...]
    prompts: tuple[str, ...]
    metrics: Mapping[str, Scores]
    whole: Mapping[str, tuple[float, float | None]] = field(default_factory=dict)
    seconds: float = 0.0
    samples: tuple[dict[str, Any], ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Returns what `from_json` reads again."""
        metrics = {
            name: {"value": one.mean, "stderr": one.stderr, "totals": list(one.totals)}
            | ({} if set(one.weights) == {1.0} else {"weights": list(one.weights)})
            for name, one in self.metrics.items()
        }
        return {
            "shots": self.shots,
            "n": len(self.documents),
            "seconds": round(self.seconds, 1),
            "metrics": metrics,
            "whole": {name: {"value": value, "stderr": error} for name, (value, error) in self.whole.items()},
            "documents": list(self.documents),
            "prompts": list(self.prompts),
        }

    @classmethod
    def from_json(cls, task: str, found: Mapping[str, Any]) -> TaskScores:
        """Returns what `to_json` wrote.

        Raises:
            KeyError, TypeError, ValueError: It is something else.
        """
        documents, prompts = tuple(map(str, found["documents"])), tuple(map(str, found["prompts"]))
        metrics = {}
        for name, one in found["metrics"].items():
            totals = tuple(map(float, one["totals"]))
            weights = tuple(map(float, one.get("weights", (1.0,) * len(totals))))
            if not len(totals) == len(weights) == len(documents) == len(prompts) or not sum(weights):
                raise ValueError(f"`{task}` has {len(totals)} scores of {len(documents)} documents")
            metrics[name] = Scores(totals, weights)
        whole = {name: (float(one["value"]), one["stderr"]) for name, one in found["whole"].items()}
        return cls(task, int(found["shots"]), documents, prompts, metrics, whole, float(found["seconds"]))


def document_keys(texts: Iterable[str]) -> tuple[str, ...]:
    """Returns what documents are known by: digests, of which each occurs once, however often a text does."""
    seen: dict[str, int] = {}
    keys = []
    for text in texts:
        key = short_digest(text.encode(errors="backslashreplace"))
        seen[key] = seen.get(key, 0) + 1
        keys.append(key if seen[key] == 1 else f"{key}#{seen[key]}")
    return tuple(keys)


def short_digest(content: bytes) -> str:
    """Returns a digest of 16 hex digits: it tells one document, prompt or file from another."""
    return blake2b(content, digest_size=8).hexdigest()
