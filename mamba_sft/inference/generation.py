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
from typing import Any, Literal

import torch
from tokenizers.decoders import DecodeStream

from mamba_sft.errors import UsageError
from mamba_sft.inference.evaluating import evaluation_mode
from mamba_sft.inference.next_token import NextToken, forward
from mamba_sft.inference.sampling import Sampling, choose

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
        try:
            for _ in range(sampling.max_new_tokens):
                chosen = choose(state.logits, sampling, generators)  # (1,)
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


@dataclass(frozen=True)
class Answer:
    """One finished answer.

    Args:
        text: Without special tokens.
        finish_reason: `stop` at a stop token, `length` at `max_new_tokens`.
        tokens: Answer tokens, the stop token not counted.
    """

    text: str
    finish_reason: Literal["stop", "length"]
    tokens: int


def finish_reason(tokens: int, sampling: Sampling) -> Literal["stop", "length"]:
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

    Returns:
        The answers, in the order of `prompts`.

    Raises:
        UsageError: A prompt is empty.
    """
    if not all(len(ids) for ids in prompts):
        raise UsageError("a prompt is empty: there is nothing to answer")
    by_length = sorted(range(len(prompts)), key=lambda number: len(prompts[number]))  # little padding
    found: dict[int, Answer] = {}
    with evaluation_mode(model):
        for start in range(0, len(by_length), batch_size):
            batch = {number: prompts[number] for number in by_length[start : start + batch_size]}
            for number, ids in _answer_batch(model, batch, sampling, stop_ids):
                reason: Literal["stop", "length"] = (
                    "length" if len(ids) == sampling.max_new_tokens else "stop"
                )
                found[number] = Answer(_decode(tokenizer, ids), reason, len(ids))
                if on_answer is not None:
                    on_answer(number, found[number])
    return [found[number] for number in range(len(prompts))]


def _answer_batch(
    model: Any, prompts: dict[int, Sequence[int]], sampling: Sampling, stop_ids: Collection[int]
) -> Iterator[tuple[int, list[int]]]:
    """Yields `(number, answer ids)` as they finish; finished rows leave the batch."""
    rows = list(prompts)
    logits, cache = _prefill_batch(model, [prompts[number] for number in rows])
    generators = [sampling.generator(model.device, offset=number) for number in rows]
    written: dict[int, list[int]] = {number: [] for number in rows}
    next_token, going = NextToken(model, cache), list(range(len(rows)))
    while True:
        chosen = choose(logits, sampling, generators)  # (B,)
        ended = []
        tokens = chosen.tolist()
        for row in going:
            ids = written[rows[row]]
            if tokens[row] not in stop_ids:
                ids.append(tokens[row])
                if len(ids) < sampling.max_new_tokens:
                    continue
            ended.append(row)
            yield rows[row], ids
        going = [row for row in going if row not in ended]
        if not going:
            return
        # a recorded step is for as many rows as it was recorded with: those that ended go along for a while
        if len(going) < len(rows) and (not next_token.is_recorded or 2 * len(going) <= len(rows)):
            kept = torch.tensor(going, device=chosen.device)
            cache.reorder_cache(kept)
            chosen = chosen[kept]
            rows, generators = [rows[row] for row in going], [generators[row] for row in going]
            next_token, going = NextToken(model, cache), list(range(len(rows)))
        logits = next_token(chosen[:, None])


def _prefill_batch(model: Any, prompts: Sequence[Sequence[int]]) -> tuple[Any, Any]:
    """Reads prompts padded on the left, where the mask keeps the state at zero. Returns (logits, cache)."""
    length = max(len(ids) for ids in prompts)
    padded = torch.tensor([[0] * (length - len(ids)) + list(ids) for ids in prompts])  # (B, L)
    mask = torch.tensor([[0] * (length - len(ids)) + [1] * len(ids) for ids in prompts])
    logits, cache = None, None
    for start in range(0, length, PREFILL_CHUNK):
        chunk = slice(start, start + PREFILL_CHUNK)
        kept = None if mask[:, chunk].all() else mask[:, chunk].to(model.device)
        logits, cache = forward(model, padded[:, chunk].to(model.device), cache, kept)
    return logits, cache


def stop_token_ids(model: Any, tokenizer: Any) -> frozenset[int]:
    """Returns the ids that end an answer: the tokenizer's `eos_token` and the generation config's."""
    configured = model.generation_config.eos_token_id
    ids = configured if isinstance(configured, list) else [configured]
    return frozenset(number for number in [*ids, tokenizer.eos_token_id] if number is not None)


class TextStream:
    """Turns token ids into text as they come, never yielding half a character.

    A byte-level token may hold part of a UTF-8 character; its bytes wait for the rest. Special tokens give no
    text. All pieces joined are the decoding of all ids.

    Args:
        tokenizer: A fast tokenizer.
    """

    def __init__(self, tokenizer: Any):
        self._tokenizer = tokenizer
        self._restart()

    def push(self, token: int) -> str:
        """Returns the text that `token` completes, possibly none."""
        self._waiting.append(token)
        try:
            piece = self._stream.step(self._tokenizer.backend_tokenizer, token)
        except Exception:  # a bare one: bytes that are no text, behind ones that were, undid what was shown
            return self.flush()
        if piece is None:
            return ""
        self._waiting.clear()
        return piece

    def flush(self) -> str:
        """Returns what still waits when the answer ends: bytes that never became a character."""
        piece = _decode(self._tokenizer, self._waiting)
        self._restart()
        return piece

    def _restart(self) -> None:
        self._stream = DecodeStream(skip_special_tokens=True)
        self._waiting: list[int] = []  # tokens whose text has not been shown


def _decode(tokenizer: Any, ids: Sequence[int]) -> str:
    text: str = tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return text
