"""The next token is chosen as transformers chooses it."""

from __future__ import annotations

import pytest
import torch
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from mamba_sft.errors import UsageError
from mamba_sft.inference.answering import generate, open_session
from mamba_sft.inference.sampling import Sampling, SeenTokens, choose, kept_probabilities

GREEDY = Sampling(repetition_penalty=1.7)


def scores(rows: int = 6, vocabulary: int = 400) -> torch.Tensor:
    return torch.randn(rows, vocabulary, generator=torch.Generator().manual_seed(1)) * 3


def theirs(sampling: Sampling, ids: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    """What transformers would draw by, in the order in which `generate` applies its processors."""
    steps = LogitsProcessorList()
    if sampling.repetition_penalty != 1:
        steps.append(RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty))
    steps.append(TemperatureLogitsWarper(sampling.temperature))
    if sampling.top_k:
        steps.append(TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1:
        steps.append(TopPLogitsWarper(sampling.top_p))
    if sampling.min_p:
        steps.append(MinPLogitsWarper(sampling.min_p))
    return steps(ids, logits).softmax(-1)


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"top_k": 5},
        {"top_p": 0.7},
        {"min_p": 0.1},
        {"min_p": 1.0},
        {"top_k": 20, "top_p": 0.8, "min_p": 0.05},
        {"repetition_penalty": 1.5},
        {"repetition_penalty": 0.5, "top_p": 0.9},
        {"repetition_penalty": 2.0, "top_k": 7, "min_p": 0.3},
    ],
)
@pytest.mark.parametrize("temperature", [0.6, 1.0, 1.9])
def test_tokens_are_drawn_by_what_transformers_draws_by(values, temperature):
    sampling = Sampling(temperature=temperature, **values)
    logits = scores()
    ids = torch.randint(0, 400, (6, 50), generator=torch.Generator().manual_seed(2))
    expected = theirs(sampling, ids, logits)
    seen = SeenTokens(ids.tolist(), logits)
    penalized = seen.penalize(logits, sampling.repetition_penalty)
    weights = kept_probabilities(penalized, sampling)
    torch.testing.assert_close(weights / weights.sum(-1, keepdim=True), expected, rtol=1e-4, atol=1e-6)
    assert torch.equal(weights > 0, expected > 0)


def test_the_penalty_counts_when_the_likeliest_token_is_taken():
    logits = torch.tensor([[2.0, 1.5, -1.0], [-1.0, -1.5, -9.0]])
    seen = SeenTokens([[0], [0]], logits)
    assert choose(logits, GREEDY, [], seen).tolist() == [1, 1]  # 2 / 1.7 < 1.5, and -1 * 1.7 < -1.5
    seen.add(torch.tensor([1, 1]))
    assert choose(logits, GREEDY, [], seen).tolist() == [0, 0]
    seen.keep(torch.tensor([1]))
    assert seen.penalize(logits[1:], 1.7).tolist() == [[pytest.approx(-1.7), pytest.approx(-2.55), -9.0]]


@pytest.mark.parametrize(
    "values",
    [
        {"min_p": 1.5},
        {"min_p": -0.1},
        {"repetition_penalty": 0},
        {"repetition_penalty": float("inf")},
        {"seed": -1},
        {"seed": 2**64},
    ],
)
def test_values_out_of_range_are_named(values):
    with pytest.raises(UsageError, match=f"`{next(iter(values))}` must be .*{next(iter(values.values()))}"):
        Sampling(**values)


def test_settings_that_change_nothing_are_told(chat_model, caplog):
    assert Sampling(top_p=0.5, temperature=0.7).idle is None
    assert Sampling(seed=3, repetition_penalty=2).idle is None
    idle = Sampling(2, top_p=0.5, min_p=0.1)
    for ask in (
        lambda: generate(chat_model, "x", sampling=idle),
        lambda: open_session(chat_model, sampling=idle),
    ):
        caplog.clear()
        ask()
        assert "`top_p` and `min_p` change nothing while `temperature` is 0" in caplog.text


def test_stop_strings_are_texts():
    assert Sampling(stop_strings="END").stop_strings == ("END",)
    assert Sampling(stop_strings=["a", "b"]).stop_strings == ("a", "b")
    with pytest.raises(UsageError, match="a stop string is empty"):
        Sampling(stop_strings=["a", ""])
