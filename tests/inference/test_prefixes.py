"""Beginnings that prompts share are read once, and answers are what they are without that."""

from __future__ import annotations

import random
from itertools import pairwise
from typing import Any

import pytest
import torch

from mamba_sft.inference import generation, prefixes
from mamba_sft.inference.generation import State, answers, prefill
from mamba_sft.inference.prefixes import batches, find_beginnings
from mamba_sft.inference.sampling import Sampling
from mamba_sft.inference.state_rows import rows_of, stacked
from mamba_sft.kernels.falcon_mamba import install

NEVER: frozenset[int] = frozenset()


class Numbers:
    """Decodes ids to their numbers."""

    def decode(self, ids: list[int], **_: Any) -> str:
        return " ".join(map(str, ids))


def ids(count: int, seed: int) -> list[int]:
    return torch.randint(12, 512, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def saved(prompts: dict[int, list[int]], least: int) -> int:
    """Tokens that need not be read."""
    found = find_beginnings(prompts, least)
    once = {found.groups[n]: found.lengths[n] for n in prompts}
    return sum(found.lengths.values()) - sum(once.values())


def most(prompts: dict[int, list[int]], least: int) -> int:
    """The most that beginnings can save, by trying every way to part the sorted prompts."""
    rows = sorted(prompts.values())
    common = []
    for pair in pairwise(rows):
        x, y = (row[:-1] for row in pair)
        common.append(next(size for size in range(len(x), -1, -1) if y[:size] == x[:size]))
    best = [0] * (len(rows) + 1)
    for last in range(1, len(rows) + 1):
        for first in range(last):
            shared = min(common[first : last - 1], default=0)
            gain = (last - first - 1) * shared if shared >= least else 0
            best[last] = max(best[last], best[first] + gain)
    return best[-1]


def test_the_beginnings_save_as_much_as_any_way_to_part_the_sorted_prompts():
    chance, ours, theirs = random.Random(0), 0, 0
    for _ in range(300):
        count = chance.randint(1, 9)
        prompts = {n: chance.choices(range(2), k=chance.randint(1, 8)) for n in range(count)}
        for least in (1, 2, 3):
            ours, theirs = ours + saved(prompts, least), theirs + most(prompts, least)
            assert saved(prompts, least) >= 0.5 * most(prompts, least), prompts
            found = find_beginnings(prompts, least)
            for n, own in prompts.items():
                length = found.lengths[n]
                assert length < len(own)
                assert length == 0 or length >= least
                others = [m for m in prompts if found.groups[m] == found.groups[n] != -1]
                assert all(prompts[m][:length] == own[:length] for m in others)
    assert ours >= theirs  # on the whole: which prompts take a shorter beginning is settled once


def test_numbers_of_any_size_are_in_order():
    prompts = {0: [255, 7, 1], 1: [256, 7, 2], 2: [255, 7, 3], 3: [65_023, 1, 1], 4: [255, 7, 70_000]}
    found = find_beginnings(prompts, 2)
    assert [found.lengths[n] for n in prompts] == [2, 0, 2, 0, 2]


def few_shot() -> list[list[int]]:
    """Two blocks of examples, one with a longer common part, and prompts of their own, of all lengths."""
    first, second = ids(90, 1), ids(70, 2)
    own = [ids(3 + 7 * n, 10 + n) for n in range(5)]
    prompts = [first + one for one in own] + own + [second + one for one in own[:3]]
    return [prompts[n] for n in (3, 9, 0, 11, 5, 12, 1, 7, 4, 10, 8, 2, 6)]


@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_answers_are_those_of_reading_everything(tiny_model, monkeypatch, batch_size):
    install(tiny_model)
    prompts = few_shot()
    monkeypatch.setattr(generation, "PREFILL_CHUNK", 16)
    ask = {"sampling": Sampling(8), "stop_ids": NEVER, "batch_size": batch_size}
    shared = answers(tiny_model, Numbers(), prompts, **ask)
    monkeypatch.setattr(generation, "find_beginnings", lambda prompts: find_beginnings(prompts, 10**6))
    assert answers(tiny_model, Numbers(), prompts, **ask) == shared
    assert sum(one.shared_tokens for one in shared) == 4 * 90 + 2 * 70
    assert [one.prompt_tokens for one in shared] == [len(prompt) for prompt in prompts]


def test_scores_behind_a_beginning_are_those_of_reading_everything(tiny_model):
    install(tiny_model)
    prompts = dict(enumerate(few_shot()))
    found = find_beginnings(prompts)
    kept = prefixes.KeptStates()
    checked = 0
    for numbers in batches(found, 4):
        batch = generation._read_batch(tiny_model, found, numbers, kept)
        for row, number in enumerate(batch.prompts):
            alone = State()
            prefill(tiny_model, prompts[number], alone)
            torch.testing.assert_close(batch.logits[row], alone.logits[0], rtol=1e-5, atol=1e-5)
            checked += 1
    assert checked == len(prompts)


def test_the_model_reads_a_beginning_once(tiny_model, monkeypatch):
    install(tiny_model)
    read = 0
    forward = generation.forward

    def counted(model: Any, tokens: Any, *rest: Any) -> Any:
        nonlocal read
        read += tokens.numel()
        return forward(model, tokens, *rest)

    monkeypatch.setattr(generation, "forward", counted)
    beginning = ids(200, 3)
    prompts = [beginning + ids(5, 20 + n) for n in range(20)]
    found = answers(tiny_model, Numbers(), prompts, sampling=Sampling(1), stop_ids=NEVER)
    assert read == 200 + 20 * 5
    assert sum(one.prompt_tokens - one.shared_tokens for one in found) == read


def test_states_that_were_let_go_are_read_again_and_counted(tiny_model, monkeypatch):
    install(tiny_model)
    monkeypatch.setattr(prefixes, "KEPT", 1)
    monkeypatch.setattr(prefixes, "WINDOW", 1)
    blocks = [ids(80, 1), ids(80, 2)]
    prompts = [blocks[n % 2] + ids(4, 30 + n) for n in range(8)]
    ask = {"sampling": Sampling(3), "stop_ids": NEVER, "batch_size": 2}
    found = answers(tiny_model, Numbers(), prompts, **ask)
    assert sum(one.shared_tokens for one in found) == 0  # every batch asks for both
    monkeypatch.setattr(prefixes, "KEPT", 8)
    again = answers(tiny_model, Numbers(), prompts, **ask)
    assert again == found
    assert sum(one.shared_tokens for one in again) == 6 * 80


def test_prompts_that_are_equal_are_answered_each(tiny_model):
    install(tiny_model)
    prompts = [ids(100, 1)] * 3 + [ids(100, 1)[:70]]
    found = answers(tiny_model, Numbers(), prompts, sampling=Sampling(5), stop_ids=NEVER)
    assert found[0] == found[1] == found[2]
    assert found[3] == answers(tiny_model, Numbers(), prompts[3:], sampling=Sampling(5), stop_ids=NEVER)[0]


def test_stacked_states_go_their_own_ways(tiny_model):
    install(tiny_model)
    one, other = State(), State()
    prefill(tiny_model, [40, 41], one)
    prefill(tiny_model, [50], other)
    before = one.copy()
    cache = stacked([rows_of(state.cache, [0]) for state in (one, other, one)])
    scores, _ = generation.forward(tiny_model, torch.tensor([[42], [42], [42]]), cache)
    for row, state in enumerate((one, other, one)):
        alone = state.copy()
        prefill(tiny_model, [42], alone)
        torch.testing.assert_close(scores[row], alone.logits[0], rtol=1e-5, atol=1e-5)
    prefill(tiny_model, [42], one)
    prefill(tiny_model, [42], before)
    assert torch.equal(one.logits, before.logits)  # reading on from the stack has not moved it


def test_no_answer_waits_for_all_that_were_asked_after_it():
    prompts = dict(enumerate([[1] * (500 - n) for n in range(400)]))
    order = [n for part in batches(find_beginnings(prompts, 10**6), 4) for n in part]
    assert sorted(order) == list(range(400))
    assert set(order[:64]) == set(range(64))
