"""How the next token is chosen. No torch at import: the command line takes its defaults from here."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mamba_sft.errors import UsageError


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen and when an answer ends, by the names `transformers` uses.

    Example: `generate("runs/quickstart", "Hello", sampling=Sampling(max_new_tokens=32, temperature=0.7))`.

    Args:
        max_new_tokens: Longest answer, in tokens.
        temperature: 0 takes the likeliest token; above 0 samples.
        top_p: Sample from the fewest tokens whose probabilities add up to this.
        top_k: Sample from this many of the likeliest tokens; 0 means all.
        seed: Makes sampling repeatable.
        repetition_penalty: Above 1 makes tokens less likely that prompt or answer have already; 1 is none.
        min_p: Sample from tokens that are at least this share as probable as the likeliest one; 0 means all.
        stop_strings: Texts that end an answer, and are not part of it.

    Raises:
        UsageError: A value out of range.
    """

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None
    repetition_penalty: float = 1.0
    min_p: float = 0.0
    stop_strings: Sequence[str] = ()

    def __post_init__(self) -> None:
        stops = (self.stop_strings,) if isinstance(self.stop_strings, str) else tuple(self.stop_strings)
        object.__setattr__(self, "stop_strings", stops)
        bounds = {
            "max_new_tokens": (self.max_new_tokens >= 1, "at least 1"),
            "temperature": (self.temperature >= 0, "0 (take the likeliest token) or more"),
            "top_p": (0 < self.top_p <= 1, "above 0 and at most 1"),
            "top_k": (self.top_k >= 0, "0 (no limit) or more"),
            "repetition_penalty": (0 < self.repetition_penalty < math.inf, "above 0 (1 is no penalty)"),
            "min_p": (0 <= self.min_p <= 1, "from 0 (no limit) to 1"),
            "seed": (self.seed is None or 0 <= self.seed < 2**63, "from 0 to 2**63 - 1"),
        }
        for name, (fits, range_) in bounds.items():
            if not fits:
                raise UsageError(f"`{name}` must be {range_}, not {getattr(self, name)}")
        if not all(stops):
            raise UsageError("a stop string is empty, which every answer begins with")

    @property
    def idle(self) -> str | None:
        """What to say of settings that change nothing while nothing is drawn; None where all do something."""
        changed = [
            name for name in ("top_p", "top_k", "min_p") if getattr(self, name) != getattr(Sampling, name)
        ]
        if self.temperature > 0 or not changed:
            return None
        told = " and ".join(f"`{name}`" for name in changed)
        verb = "changes" if len(changed) == 1 else "change"
        return f"{told} {verb} nothing while `temperature` is 0, which takes the likeliest token"

    def generator(self, device: Any, offset: int = 0) -> Any:
        """Returns a random source of its own on `device`: `offset` tells apart the answers of one seed."""
        import torch

        generator = torch.Generator(device)
        if self.seed is None:
            generator.seed()
        else:
            generator.manual_seed(self.seed + offset)
        return generator


class SeenTokens:
    """Which tokens the rows of a batch have, in prompt and answer, for the penalty on repeating them.

    Args:
        rows: The ids of each row so far.
        logits: `(B, vocabulary)`, for size and device.
    """

    def __init__(self, rows: Sequence[Sequence[int]], logits: Any):
        import torch

        self._seen = torch.zeros(logits.shape, dtype=torch.bool, device=logits.device)
        for row, ids in enumerate(rows):
            self._seen[row, torch.tensor(sorted(set(ids)), dtype=torch.int64, device=logits.device)] = True

    def add(self, tokens: Any) -> None:
        """Adds the next token of each row, `(B,)`."""
        self._seen.scatter_(1, tokens[:, None], True)

    def keep(self, rows: Any) -> None:
        """Keeps these rows only."""
        self._seen = self._seen[rows]

    def penalize(self, logits: Any, penalty: float) -> Any:
        """Returns logits with lower scores for seen tokens: divided, or multiplied where below 0."""
        import torch

        return torch.where(self._seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)


def choose(logits: Any, sampling: Sampling, generators: Sequence[Any], seen: SeenTokens | None = None) -> Any:
    """Picks the next token of every row.

    Args:
        logits: `(B, vocabulary)`, fp32.
        sampling: Greedy, or temperature first, then `top_k`, `top_p` and `min_p`, as `transformers` has it.
        generators: One a row, so that a row's draws do not depend on its neighbours.
        seen: What the rows have, for `repetition_penalty`, which comes before everything else.

    Returns:
        `(B,)` int64.
    """
    import torch

    if seen is not None:
        logits = seen.penalize(logits, sampling.repetition_penalty)
    if sampling.temperature == 0:
        return logits.argmax(-1)
    probabilities = kept_probabilities(logits, sampling)
    drawn = [torch.multinomial(row, 1, generator=g) for row, g in zip(probabilities, generators, strict=True)]
    return torch.cat(drawn)


def kept_probabilities(logits: Any, sampling: Sampling) -> Any:
    """Returns the weights `(B, vocabulary)` that tokens are drawn by; 0 for those that are left out.

    Args:
        logits: `(B, vocabulary)`, fp32.
        sampling: With a temperature above 0.
    """
    import torch

    scores = logits / sampling.temperature
    if 0 < sampling.top_k < scores.shape[-1]:
        least = scores.topk(sampling.top_k, dim=-1).values[:, -1:]
        scores = scores.masked_fill(scores < least, -torch.inf)
    probabilities = scores.softmax(-1)
    if sampling.top_p < 1:
        ordered, order = probabilities.sort(dim=-1, descending=True)
        before = ordered.cumsum(-1) - ordered  # probability of all likelier tokens
        kept = ordered.masked_fill(before >= sampling.top_p, 0)
        probabilities = torch.zeros_like(kept).scatter(-1, order, kept)
    if sampling.min_p > 0:  # of the likeliest: what was left out before changes no ratio
        least = sampling.min_p * probabilities.amax(-1, keepdim=True)
        probabilities = probabilities.masked_fill(probabilities < least, 0)
    return probabilities
