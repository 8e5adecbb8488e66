"""Answers, token by token, with the model's state carried on.

A Mamba model reads a conversation into a state of constant size, so nothing is ever read twice: a `State`
goes in with the new tokens and comes out having read them and the answer. This module knows token ids and,
at its edge, text; it knows nothing about turns or templates.

The model must have our mixer (`kernels.falcon_mamba.install`): stock transformers restarts the recurrence
when several tokens are given on top of a cache.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from mamba_sft.errors import UsageError
from mamba_sft.inference.answer import Answer, FinishReason
from mamba_sft.inference.answer_text import AnswerText, decode
from mamba_sft.inference.evaluating import evaluation_mode
from mamba_sft.inference.next_token import NextToken, forward
from mamba_sft.inference.prefixes import Beginnings, KeptStates, batches, find_beginnings
from mamba_sft.inference.sampling import Sampling, SeenTokens, choose
from mamba_sft.inference.state_rows import stacked

PREFILL_CHUNK = 2048
"""Tokens read at once, so that the memory a long prompt takes does not grow with its length."""


@dataclass
class State:
    """All that is needed to go on with a sequence.

    Args:
        read: The ids that the cache has read, in order.
        cache: The recurrent and convolution states, the same size however long `read` is.
        logits: Scores of the next token, `(1, vocabulary)` fp32; None before the first.
    """

    read: list[int] = field(default_factory=list)
    cache: Any = None
    logits: Any = None

    def copy(self) -> State:
        """Returns an independent state at the same place: going on with one leaves the other alone."""
        logits = None if self.logits is None else self.logits.clone()
        return State(list(self.read), copy.deepcopy(self.cache), logits)

    def clear(self) -> None:
        """Forgets everything read."""
        self.read, self.cache, self.logits = [], None, None


def prefill(model: Any, ids: Sequence[int], state: State) -> None:
    """Reads `ids` into `state`.

    An exception in the middle (Ctrl-C, out of memory) clears the state: some layers have read more than
    others.
    """
    for start in range(0, len(ids), PREFILL_CHUNK):
        chunk = list(ids[start : start + PREFILL_CHUNK])
        with _whole_or_cleared(state):
            ids_here = torch.tensor([chunk], device=model.device)  # (1, L)
            state.logits, state.cache = forward(model, ids_here, state.cache)
        state.read.extend(chunk)


@contextmanager
def _whole_or_cleared(state: State) -> Iterator[None]:
    try:
        yield
    except BaseException:
        state.clear()
        raise


def stream(
    model: Any, ids: Sequence[int], state: State, *, sampling: Sampling, stop_ids: Collection[int]
) -> Iterator[int]:
    """Reads `ids`, then yields the answer's token ids as they are chosen.

    Ends before a stop id, which is neither yielded nor read: the next turn's text says how the answer closes.
    Stop strings are for who makes text of the ids (`AnswerText`) and drops the iterator.
    Exactly `sampling.max_new_tokens` ids mean that the length ended it. Every yielded id has been read by
    `state`, so the iterator may be dropped at any time.

    Args:
        model: A causal FalconMamba with our mixer, bare or PEFT-wrapped.
        ids: What to read first; may be empty when `state` has read something.
        state: Where to go on from; it is moved along.
        sampling: How to choose and when to stop.
        stop_ids: Ids that end an answer.

    Raises:
        UsageError: There is nothing to answer: no ids, now or before.
    """
    if not ids and not state.read:
        raise UsageError("the prompt is empty: there is nothing to answer")
    with evaluation_mode(model):
        prefill(model, ids, state)
        generators = [sampling.generator(model.device)]
        next_token = NextToken(model, state.cache)
        seen = _seen(sampling, [state.read], state.logits)
        try:
            for _ in range(sampling.max_new_tokens):
                chosen = choose(state.logits, sampling, generators, seen)  # (1,)
                if seen is not None:
                    seen.add(chosen)
                token = int(chosen)  # what the host must know of an answer, and waits for
                if token in stop_ids:
                    return
                with _whole_or_cleared(state):
                    state.logits = next_token(chosen[None])
                state.read.append(token)
                yield token
        finally:
            if next_token.is_recorded and state.logits is not None:  # no longer where the graph writes
                state.logits = state.logits.clone()


def _seen(sampling: Sampling, rows: Sequence[Sequence[int]], logits: Any) -> SeenTokens | None:
    return SeenTokens(rows, logits) if sampling.repetition_penalty != 1 else None


def finish_reason(tokens: int, sampling: Sampling) -> FinishReason:
    """Returns why an answer of that many tokens, from `stream` or `answers`, has ended."""
    return "length" if tokens == sampling.max_new_tokens else "stop"


def answers(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    *,
    sampling: Sampling,
    stop_ids: Collection[int],
    batch_size: int = 8,
    on_answer: Callable[[int, Answer], None] | None = None,
    only: Sequence[int] | None = None,
) -> list[Answer]:
    """Answers every prompt, several at a time; its neighbours in a batch do not change an answer.

    Args:
        model: As for `stream`; put back into training mode afterwards if it was.
        tokenizer: Decodes the answers.
        prompts: Token ids, one sequence a prompt.
        sampling: As for `stream`; prompt number i draws with `seed + i`.
        stop_ids: Ids that end an answer.
        batch_size: Prompts answered together.
        on_answer: Called with the prompt's number and its answer as each one finishes, in any order.
        only: The numbers of the prompts to answer; None answers all.

    Returns:
        The answers, in the order of `prompts`, or of `only`.

    Raises:
        UsageError: A prompt is empty.
    """
    if not all(len(ids) for ids in prompts):
        raise UsageError("a prompt is empty: there is nothing to answer")
    only = range(len(prompts)) if only is None else only
    beginnings = find_beginnings({number: prompts[number] for number in only})
    found: dict[int, Answer] = {}
    kept = KeptStates()
    with evaluation_mode(model):
        for numbers in batches(beginnings, batch_size):
            batch = _read_batch(model, beginnings, numbers, kept)
            texts = {number: AnswerText(tokenizer, sampling.stop_strings) for number in numbers}
            for number, ids in _answer_batch(model, batch, sampling, stop_ids, texts):
                reason: FinishReason = "stop" if texts[number].stopped else finish_reason(len(ids), sampling)
                text = texts[number].text if sampling.stop_strings else decode(tokenizer, ids)
                counts = len(ids), len(prompts[number]), batch.spared[number]
                found[number] = Answer(text, reason, *counts)
                if on_answer is not None:
                    on_answer(number, found[number])
    return [found[number] for number in only]


@dataclass
class _Batch:
    """Prompts that were read together.

    Args:
        prompts: The ids of each, by its number, in the order of the rows.
        logits: Scores of the next token, `(B, vocabulary)`.
        cache: What the rows have read.
        spared: How many tokens of each were not read, by its number.
    """

    prompts: dict[int, Sequence[int]]
    logits: Any
    cache: Any
    spared: dict[int, int]


def _answer_batch(
    model: Any,
    batch: _Batch,
    sampling: Sampling,
    stop_ids: Collection[int],
    texts: dict[int, AnswerText],
) -> Iterator[tuple[int, list[int]]]:
    """Yields `(number, answer ids)` as they finish; finished rows leave the batch."""
    rows, logits, cache = list(batch.prompts), batch.logits, batch.cache
    generators = [sampling.generator(model.device, offset=number) for number in rows]
    seen = _seen(sampling, list(batch.prompts.values()), logits)
    written: dict[int, list[int]] = {number: [] for number in rows}
    next_token, going = NextToken(model, cache), list(range(len(rows)))
    while True:
        chosen = choose(logits, sampling, generators, seen)  # (B,)
        tokens, ended = chosen.tolist(), []
        for row in going:
            if _ends(tokens[row], written[rows[row]], sampling, stop_ids, texts[rows[row]]):
                ended.append(row)
                yield rows[row], written[rows[row]]
        going = [row for row in going if row not in ended]
        if not going:
            return
        if seen is not None:
            seen.add(chosen)
        # a recorded step is for as many rows as it was recorded with: those that ended go along for a while
        if len(going) < len(rows) and (not next_token.is_recorded or 2 * len(going) <= len(rows)):
            kept = torch.tensor(going, device=chosen.device)
            cache.reorder_cache(kept)
            chosen = chosen[kept]
            if seen is not None:
                seen.keep(kept)
            rows, generators = [rows[row] for row in going], [generators[row] for row in going]
            next_token, going = NextToken(model, cache), list(range(len(rows)))
        logits = next_token(chosen[:, None])


def _ends(
    token: int, written: list[int], sampling: Sampling, stop_ids: Collection[int], text: AnswerText
) -> bool:
    """Adds a token to what is written unless it is a stop token. Returns whether the answer has ended."""
    if token in stop_ids:
        ended = True
    else:
        written.append(token)
        if sampling.stop_strings:
            text.add(token)
        ended = text.stopped or len(written) == sampling.max_new_tokens
    if ended:
        text.close()
    return ended


def _read_batch(model: Any, beginnings: Beginnings, numbers: Sequence[int], kept: KeptStates) -> _Batch:
    """Reads some prompts, all of them with a beginning to start from or all without."""
    prompts, lengths = beginnings.prompts, beginnings.lengths
    if not lengths[numbers[0]]:
        batch = {number: prompts[number] for number in numbers}
        return _Batch(batch, *_read_padded(model, list(batch.values())), dict.fromkeys(numbers, 0))
    longest_first = sorted(numbers, key=lambda number: lengths[number] - len(prompts[number]))
    states, spared = [], {number: lengths[number] for number in numbers}
    for number in longest_first:
        state = kept.get(beginnings.groups[number])
        if state is None:
            state, spared[number] = State(), 0
            prefill(model, prompts[number][: lengths[number]], state)
            kept.put(beginnings.groups[number], state)
        states.append(state)
    batch = {number: prompts[number] for number in longest_first}
    rests = [prompts[number][lengths[number] :] for number in longest_first]
    return _Batch(batch, *_read_begun(model, rests, states), spared)


def _read_begun(model: Any, rests: Sequence[Sequence[int]], states: Sequence[State]) -> tuple[Any, Any]:
    """Reads what follows some states, the longest first. Returns (logits, cache).

    A mask keeps a state that is zero at zero, and moves any other. So there is no padding: a row joins the
    batch when as many tokens are left of the longest as it has itself, and all end together.
    """
    length, logits, cache, joined = len(rests[0]), None, None, 0
    starts = [length - len(ids) for ids in rests]
    for start, end in zip(sorted({*starts}), [*sorted({*starts})[1:], length], strict=True):
        new = [state for state, own in zip(states, starts, strict=True) if own == start]
        # copies, since other rows start from them too; a GGUF file's state can be copied, and has no rows
        begun = [copy.deepcopy(state.cache) for state in new]
        cache = stacked(begun if cache is None else [cache, *begun])
        joined += len(new)
        for at in range(start, end, PREFILL_CHUNK):
            to = min(at + PREFILL_CHUNK, end)
            ids = [rest[at - own : to - own] for rest, own in zip(rests[:joined], starts, strict=False)]
            logits, cache = forward(model, torch.tensor(ids, device=model.device), cache)
    return logits, cache


def _read_padded(model: Any, prompts: Sequence[Sequence[int]]) -> tuple[Any, Any]:
    """Reads prompts padded on the left, where the mask keeps the state at zero. Returns (logits, cache)."""
    length = max(len(ids) for ids in prompts)
    logits, cache = None, None
    for start in range(0, length, PREFILL_CHUNK):
        end = min(start + PREFILL_CHUNK, length)
        rows, mask = [], []
        for ids in prompts:
            pads = length - len(ids)
            part = list(ids[max(start - pads, 0) : max(end - pads, 0)])
            rows.append([0] * (end - start - len(part)) + part)
            mask.append([0] * (end - start - len(part)) + [1] * len(part))
        kept = None if all(map(all, mask)) else torch.tensor(mask, device=model.device)
        logits, cache = forward(model, torch.tensor(rows, device=model.device), cache, kept)
    return logits, cache


def stop_token_ids(model: Any, tokenizer: Any) -> frozenset[int]:
    """Returns the ids that end an answer: the tokenizer's `eos_token` and the generation config's."""
    configured = model.generation_config.eos_token_id
    ids = configured if isinstance(configured, list) else [configured]
    return frozenset(number for number in [*ids, tokenizer.eos_token_id] if number is not None)
