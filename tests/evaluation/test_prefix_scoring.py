"""Likelihoods from shared states are those of reading each text by itself, for fewer tokens."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mamba_sft.errors import UsageError
from mamba_sft.evaluation import prefix_scoring
from mamba_sft.evaluation.prefix_scoring import Pair, score_continuations
from mamba_sft.inference.generation import State, prefill
from mamba_sft.inference.state_rows import rows_of, stacked
from mamba_sft.kernels.falcon_mamba import install
from mamba_sft.model.adapter import attach_adapter
from mamba_sft.recipe.fields import AdapterSection
from tests.conftest import build_model


@pytest.fixture(scope="module")
def model() -> Any:
    return install(build_model())


def some_ids(count: int, seed: int) -> list[int]:
    return torch.randint(12, 500, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def plain(model: Any, pairs: list[Pair], max_length: int | None = None) -> list[tuple[float, bool]]:
    """Each text by itself, with all its logits."""
    found = []
    for context, continuation in pairs:
        ids = [*context, *continuation]
        ids = ids if max_length is None else ids[-(max_length + 1) :]
        targets = torch.tensor(continuation)
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([ids[:-1]])).logits[0].log_softmax(-1)[-len(targets) :]
        total = logits.gather(1, targets[:, None]).sum()
        found.append((float(total), bool((logits.argmax(-1) == targets).all())))
    return found


def few_shot_choices(documents: int = 7, shots: int = 150) -> list[Pair]:
    """As a benchmark asks: examples, a document of a length of its own, choices of several tokens."""
    examples = some_ids(shots, 1)
    return [
        (examples + some_ids(40 + 5 * number, 2 + number), [40, 50 + choice, *some_ids(choice, choice)])
        for number in range(documents)
        for choice in range(4)
    ]


def check(model: Any, pairs: list[Pair], max_length: int | None = None, **options: Any) -> int:
    """Checks every likelihood; returns how many tokens were read."""
    scored = score_continuations(model, pairs, max_length=max_length, **options)
    expected = plain(model, pairs, max_length)
    for ours, (total, greedy) in zip(scored.likelihoods, expected, strict=True):
        assert ours.log_likelihood == pytest.approx(total, abs=1e-4)
        assert ours.is_greedy == greedy
    return scored.tokens_read


@pytest.mark.parametrize("batch_size", [1, 3, 8, 100])
@pytest.mark.parametrize("max_states", [0, 1, 2, 5, 64])
def test_any_batch_and_any_bound_on_states_give_the_same(
    model: Any, batch_size: int, max_states: int
) -> None:
    check(model, few_shot_choices(), batch_size=batch_size, max_states=max_states)


def test_what_is_shared_is_read_once(model: Any) -> None:
    pairs = few_shot_choices()
    documents = sum(len({tuple(context) for context, _ in pairs[4 * n : 4 * n + 4]}) for n in range(7))
    assert documents == 7
    unique = 150 + sum(len(pairs[4 * n][0]) - 150 for n in range(7))
    ends = sum(len(continuation) - 1 for _, continuation in pairs)
    read = check(model, pairs, batch_size=1)
    assert read <= unique + ends
    assert read * 4 < sum(len(context) + len(continuation) - 1 for context, continuation in pairs)


def test_states_kept_at_a_time_are_bounded(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    alive: list[int] = []
    kept = prefix_scoring._Kept

    def count(cache: Any, states: int, batches: Any) -> Any:
        alive.append(states)
        return kept(cache, states, batches)

    monkeypatch.setattr(prefix_scoring, "_Kept", count)
    check(model, few_shot_choices(), batch_size=8, max_states=3)
    assert 0 < max(alive) <= 3


def test_a_chain_of_texts_each_longer_by_some_is_read_once(model: Any) -> None:
    """As deep as texts are many: nothing recurses, and little is read twice."""
    whole = some_ids(2600, 5)
    pairs = [(whole[:end], whole[end : end + 1]) for end in range(40, 2600, 2)]
    scored = score_continuations(model, pairs, batch_size=4)
    sample = [0, 1, 640, len(pairs) - 1]
    for number, (total, greedy) in zip(sample, plain(model, [pairs[n] for n in sample]), strict=True):
        assert scored.likelihoods[number] == (pytest.approx(total, abs=1e-4), greedy)
    assert scored.tokens_read * 50 < scored.tokens_in_all


def test_identical_requests_one_token_and_every_token_scored(model: Any) -> None:
    ids = some_ids(60, 7)
    pairs: list[Pair] = [
        (ids, [33]), (ids, [33]), (ids, [34]), (ids[:1], ids[1:]), (ids[:1], ids[1:]), (ids[:5], ids[5:9]),
    ]  # fmt: skip
    check(model, pairs)


def test_the_same_text_with_its_border_at_different_places(model: Any) -> None:
    """Contexts that end inside another's continuation: each is scored from its own border on."""
    ids = some_ids(80, 8)
    check(model, [(ids[:border], ids[border:end]) for border in (1, 20, 60) for end in (61, 62, 80)])


def test_the_likeliest_is_told(model: Any) -> None:
    state = State()
    context = some_ids(40, 3)
    with torch.no_grad():
        prefill(model, context, state)
    best = int(state.logits.argmax())
    scored = score_continuations(model, [(context, [best]), (context, [best + 1]), (context, [best, 3])])
    assert [one.is_greedy for one in scored.likelihoods][:2] == [True, False]


@pytest.mark.parametrize("max_length", [30, 100, 152])
def test_long_texts_lose_their_beginning(
    model: Any, max_length: int, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        check(model, few_shot_choices(documents=3), max_length)
    assert "12 of 12 texts are longer" in caplog.text
    whole = score_continuations(model, few_shot_choices(3)).likelihoods[0].log_likelihood
    cut = score_continuations(model, few_shot_choices(3), max_length=30).likelihoods[0].log_likelihood
    assert abs(whole - cut) > 1e-3


def test_texts_longer_than_a_chunk(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefix_scoring, "PREFILL_CHUNK", 16)
    monkeypatch.setattr(prefix_scoring, "_POSITIONS", 7)
    ids = some_ids(100, 9)
    check(model, [*few_shot_choices(3), (ids[:1], ids[1:]), (ids[:50], ids[50:])], batch_size=3)


def test_each_score_is_told_once_when_it_is_whole(model: Any) -> None:
    told: dict[int, Any] = {}

    def take(number: int, score: Any) -> None:
        assert number not in told
        told[number] = score

    pairs = [*few_shot_choices(3), *few_shot_choices(1)]
    scored = score_continuations(model, pairs, on_score=take)
    assert [told[number] for number in range(len(pairs))] == scored.likelihoods


def test_with_an_adapter_and_in_training_mode() -> None:
    model = attach_adapter(
        install(build_model()), AdapterSection(lora_dropout=0.5), trained_token_ids=[9, 10]
    )
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1)
    pairs = few_shot_choices(2)
    expected = plain(model.eval(), pairs)
    model.train()
    scored = score_continuations(model, pairs)
    assert [one.log_likelihood for one in scored.likelihoods] == pytest.approx(
        [t for t, _ in expected], abs=1e-4
    )
    assert model.training


@pytest.mark.parametrize(
    ("pair", "message"),
    [
        (([], [1]), "context is empty"),
        (([1], []), "continuation is empty"),
        (([1], [2] * 9), "9 tokens, more"),
    ],
)
def test_what_cannot_be_scored_is_told(model: Any, pair: Pair, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        score_continuations(model, [([5], [6]), pair], max_length=8)


def test_no_requests(model: Any) -> None:
    assert score_continuations(model, []).likelihoods == []


def test_rows_are_taken_apart_and_put_together(model: Any) -> None:
    states = [State(), State()]
    for number, state in enumerate(states):
        with torch.no_grad():
            prefill(model, some_ids(20 + number, number), state)
    both = stacked([state.cache for state in states])
    turned = rows_of(both, [1, 0, 1])
    assert turned.layers[0].conv_states[0].shape[0] == 3
    next_ids = torch.tensor([[77], [77], [77]])
    before = [both.layers[1].recurrent_states[0].clone()]
    with torch.no_grad():
        logits = model(input_ids=next_ids, cache_params=turned).logits[:, -1]
        alone = [
            model(input_ids=next_ids[:1], cache_params=rows_of(s.cache, [0])).logits[0, -1] for s in states
        ]
    for row, number in enumerate([1, 0, 1]):
        torch.testing.assert_close(logits[row], alone[number], atol=1e-5, rtol=1e-4)
    assert torch.equal(both.layers[1].recurrent_states[0], before[0])  # what rows were taken of stays
    assert rows_of(None, [0]) is None


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_any_set_of_texts(model: Any, data: st.DataObject) -> None:
    """Few kinds of tokens, so that texts share beginnings in every way."""
    ids = st.lists(st.sampled_from([20, 21]), min_size=1, max_size=60)
    pairs = data.draw(st.lists(st.tuples(ids, ids), min_size=1, max_size=12))
    check(model, pairs, batch_size=data.draw(st.integers(1, 5)), max_states=data.draw(st.integers(0, 6)))
