"""How the next token is chosen. No torch at import: the command line takes its defaults from here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mamba_sft.errors import UsageError


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen and when an answer ends, by the names `transformers` uses.

    Args:
        max_new_tokens: Longest answer, in tokens.
        temperature: 0 takes the likeliest token; above 0 samples.
        top_p: Sample from the fewest tokens whose probabilities add up to this.
        top_k: Sample from this many of the likeliest tokens; 0 means all.
        seed: Makes sampling repeatable.

    Raises:
        UsageError: A value out of range.
    """

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None

    def __post_init__(self) -> None:
        bounds = {
            "max_new_tokens": (self.max_new_tokens >= 1, "at least 1"),
            "temperature": (self.temperature >= 0, "0 (take the likeliest token) or more"),
            "top_p": (0 < self.top_p <= 1, "above 0 and at most 1"),
            "top_k": (self.top_k >= 0, "0 (no limit) or more"),
        }
        for name, (fits, range_) in bounds.items():
            if not fits:
                raise UsageError(f"`{name}` must be {range_}, not {getattr(self, name)}")

    def generator(self, device: Any, offset: int = 0) -> Any:
        """Returns a random source of its own on `device`: `offset` tells apart the answers of one seed."""
        import torch

        generator = torch.Generator(device)
        if self.seed is None:
            generator.seed()
        else:
            generator.manual_seed(self.seed + offset)
        return generator


def choose(logits: Any, sampling: Sampling, generators: Sequence[Any]) -> Any:
    """Picks the next token of every row.

    Args:
        logits: `(B, vocabulary)`, fp32.
        sampling: Greedy, or temperature first, then `top_k`, then `top_p`.
        generators: One a row, so that a row's draws do not depend on its neighbours.

    Returns:
        `(B,)` int64.
    """
    import torch

    if sampling.temperature == 0:
        return logits.argmax(-1)
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
    drawn = [torch.multinomial(row, 1, generator=g) for row, g in zip(probabilities, generators, strict=True)]
    return torch.cat(drawn)
