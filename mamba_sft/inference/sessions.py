"""A conversation with a model, or with two side by side.

A session carries the model's state from turn to turn. What a turn adds is found by rendering the whole
conversation through the chat template and feeding only what the state has not read.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from mamba_sft.errors import UsageError
from mamba_sft.inference.answer_text import AnswerText
from mamba_sft.inference.chat_model import ChatModel, require_template
from mamba_sft.inference.evaluating import evaluation_mode
from mamba_sft.inference.generation import PREFILL_CHUNK, State, finish_reason, prefill, stream
from mamba_sft.inference.repetition import RepetitionWatch
from mamba_sft.inference.sampling import Sampling
from mamba_sft.inference.saved_chats import add_chat, last_chat
from mamba_sft.inference.unread import Rendering, common_beginning, continuation
from mamba_sft.model.chat_template import with_system

UNDO_DEPTH = 8
"""Turns whose starting state is kept; undoing more than these reads the conversation again."""

FinishReason = Literal["stop", "length", "interrupted", "repetition"]


@dataclass(frozen=True)
class Turn:
    """What is known about an answer when it has ended.

    Args:
        tokens: Tokens of the answer.
        tokens_per_second: Speed of writing, reading the prompt not counted; None for fewer than two tokens.
        finish_reason: `stop` at a stop token, `length` at `max_new_tokens`, `interrupted` by the user,
            `repetition` where the answer went round in a circle and the session stops those.
        seen: Tokens that the state has read since the conversation began; 0 where it was interrupted while it
            read one, and goes back to where the turn began.
        read: Tokens that were read for this answer before its first one.
        reread: Whether the conversation had to be read again from the start.
        repeats: Whether the answer ended in a circle (`repetition` says what that is), stopped or not.
    """

    tokens: int
    tokens_per_second: float | None
    finish_reason: FinishReason
    seen: int
    read: int
    reread: bool
    repeats: bool


class ChatSession:
    """A conversation with one model.

    A turn reads what is new. The system message is read once: after `reset`, and after `undo` of all turns,
    the next conversation goes on from the state behind it.

    Args:
        chat_model: Who answers.
        sampling: How; with a seed, the same inputs give the same session. May be changed between turns.
        system: The system message; None takes the one the model was trained with. May be changed between
            turns: the next one then reads the conversation again.
        stop_repetition: End an answer that goes round in a circle. Else it is only noted in its `Turn`,
            since it may be what was asked for.

    Raises:
        DataError: The model's tokenizer has no chat template.
    """

    def __init__(
        self,
        chat_model: ChatModel,
        *,
        sampling: Sampling | None = None,
        system: str | None = None,
        stop_repetition: bool = False,
    ):
        require_template(chat_model.name, chat_model.tokenizer)
        self.chat_model = chat_model
        self.sampling = sampling or Sampling()
        self.system = chat_model.system if system is None else system
        self.stop_repetition = stop_repetition
        self.last_turn: Turn | None = None
        self.on_read: Callable[[int, int], None] | None = None
        """Called while a message is read, before each of its parts: tokens read of it, and tokens of it."""
        self._turns: list[dict[str, str]] = []
        self._rendering = Rendering(chat_model.tokenizer)
        self._state = State()
        self._start = State()  # having read what stands before the first message
        self._before: deque[State] = deque(maxlen=UNDO_DEPTH)  # where each of the last turns began
        self._drawn = 0

    @property
    def messages(self) -> list[dict[str, str]]:
        """The conversation so far, its system message first."""
        return with_system(self._turns, self.system) if self._turns else []

    def send(self, text: str) -> Iterator[str]:
        """Says `text` and yields the answer in pieces, as they are written.

        Dropping the iterator ends the answer there; what was written stays part of the conversation. An
        answer dropped before its first token takes `text` back.

        Raises:
            UsageError: `text` is blank.
            DataError: The chat template refuses the conversation; `text` is then no part of it.
        """
        if not text.strip():
            raise UsageError("the message is empty")
        clean = text.encode("utf-8", "surrogateescape").decode(
            "utf-8", "replace"
        )  # a terminal lets any byte through
        return self._answer(clean)

    def retry(self) -> Iterator[str]:
        """Takes the last answer back and yields another one; the same one if `temperature` is 0.

        Raises:
            UsageError: Nothing was said yet.
        """
        yield from self.send(self.undo())

    def undo(self) -> str:
        """Takes the last message and its answer back; returns the message.

        Raises:
            UsageError: Nothing was said yet.
        """
        if not self._turns:
            raise UsageError("there is nothing to take back")
        asked = max(at for at, turn in enumerate(self._turns) if turn["role"] == "user")
        text = self._turns[asked]["content"]
        del self._turns[asked:]
        self._state = self._before.pop() if self._before else State()
        return text

    def reset(self) -> None:
        """Forgets the conversation; the system message stays."""
        self._forget([])

    def save(self, path: Path) -> None:
        """Adds the conversation to a JSON Lines file, one `{"messages": [...]}` that `data.sources` reads.

        Raises:
            UsageError: Nothing was said yet, or the file cannot be written.
        """
        if not self._turns:
            raise UsageError("there is nothing to save yet")
        add_chat(path, self.messages)

    def load(self, path: Path) -> None:
        """Goes on with the last conversation of a file that `save` wrote; the next turn reads it.

        Raises:
            UsageError: There is no such file, or its last line is no conversation that can be gone on with.
        """
        messages = last_chat(path)
        has_system = messages[0]["role"] == "system"
        self.system = messages[0]["content"] if has_system else None
        self._forget(messages[has_system:])

    def _forget(self, turns: list[dict[str, str]]) -> None:
        self._turns = turns
        self._before.clear()
        self._state = State()
        self.last_turn = None

    def _answer(self, text: str) -> Iterator[str]:
        self._turns.append({"role": "user", "content": text})
        try:
            unread = self._unread()
        except BaseException:
            self._turns.pop()
            raise
        self.last_turn = None
        self._before.append(self._state.copy())
        sampling, spent = self._next_sampling(), []
        answer = AnswerText(self.chat_model.tokenizer, sampling.stop_strings)
        watch, repeats = RepetitionWatch(), False
        reason: FinishReason = "interrupted"
        try:
            started = time.perf_counter()
            self._read(unread)
            for token in self._written(sampling):
                spent.append(time.perf_counter() - started)
                piece = answer.add(token)
                repeats = watch.repeats(token, piece)
                if piece:
                    yield piece
                if answer.stopped:
                    break
                if repeats and self.stop_repetition:
                    reason = "repetition"
                    break
                started = time.perf_counter()
            else:
                reason = finish_reason(len(spent), sampling)
            if piece := answer.close():
                yield piece
        finally:
            answer.close()
            reason = "stop" if answer.stopped else reason
            turn = Turn(
                tokens=len(spent),
                tokens_per_second=_speed(spent),
                finish_reason=reason,
                seen=len(self._state.read),
                read=unread.tokens,
                reread=unread.reread,
                repeats=repeats,
            )
            if answer.stopped:  # the stop string was read, and is no part of the conversation
                self._state = self._before[-1].copy()
            self._finish(answer.text, turn)

    def _unread(self) -> _Unread:
        """Returns what is to be read for the last message, and puts the state where that begins.

        A state that has read something else is of no use, nor are those of the turns before.
        """
        tokenizer, messages = self.chat_model.tokenizer, self.messages
        rendered = self._rendering.ids(messages)
        if self._state.read:
            rest = continuation(tokenizer, self._state.read, rendered)
            if rest is not None:
                return _Unread([], [], rest, reread=False)
        self._before.clear()
        opening = self._opening(rendered)
        earlier = len(self._turns) > 1
        history = common_beginning(tokenizer, messages, rendered) if earlier else []
        begins = len(opening) or len(self._state.read)
        return _Unread(opening, history[begins:], rendered[max(begins, len(history)) :], reread=earlier)

    def _opening(self, rendered: list[int]) -> list[int]:
        """Returns what stands before the first message, unless a state has read it: then that is taken."""
        tokenizer, first = self.chat_model.tokenizer, with_system(self._turns[:1], self.system)
        opening = common_beginning(tokenizer, first, Rendering(tokenizer).ids(first))
        if rendered[: len(opening)] != opening:  # a template that begins another way when more was said
            opening = []
        if opening and self._start.read == opening:
            self._state = self._start.copy()
            return []
        self._state = State()
        return opening

    def _read(self, unread: _Unread) -> None:
        """Reads a message, and what of the conversation has to be read before it."""
        self._prefill(unread.opening, 0, unread.tokens)
        if unread.opening:
            self._start = self._state.copy()
        self._prefill(unread.history, len(unread.opening), unread.tokens)
        if unread.opening or unread.history:
            self._before[-1] = self._state.copy()
        self._prefill(unread.message, unread.tokens - len(unread.message), unread.tokens)

    def _prefill(self, ids: list[int], done: int, total: int) -> None:
        with evaluation_mode(self.chat_model.model):
            for at in range(0, len(ids), PREFILL_CHUNK):
                if self.on_read is not None:
                    self.on_read(done + at, total)
                prefill(self.chat_model.model, ids[at : at + PREFILL_CHUNK], self._state)

    def _written(self, sampling: Sampling) -> Iterator[int]:
        return stream(
            self.chat_model.model, [], self._state, sampling=sampling, stop_ids=self.chat_model.stop_ids
        )

    def _next_sampling(self) -> Sampling:
        """Every answer draws anew, repeatably when the session has a seed."""
        seed = self.sampling.seed
        self._drawn += 1
        return self.sampling if seed is None else replace(self.sampling, seed=seed + self._drawn - 1)

    def _finish(self, answer: str, turn: Turn) -> None:
        if turn.finish_reason == "interrupted" and not turn.tokens:
            self.undo()
            return
        if not self._state.read:  # interrupted while a token was being read: the turn's start is still whole
            self._state = self._before[-1].copy()
        self._turns.append({"role": "assistant", "content": answer})
        self.last_turn = turn


class CompareSession:
    """The same conversation with two models.

    Args:
        tuned: A session with the one that matters, which answers first.
        base: A session with the one to compare it with.
    """

    def __init__(self, tuned: ChatSession, base: ChatSession):
        self.sides = (tuned, base)

    def send(self, text: str) -> Iterator[tuple[int, str]]:
        """Says `text` to both and yields `(side, piece)`, side 0 or 1, until both have answered.

        Raises:
            UsageError: `text` is blank.
        """
        return self._interleave([side.send(text) for side in self.sides])

    def in_turn(self, text: str) -> Iterator[tuple[int, Iterator[str]]]:
        """Says `text` to one after the other: yields each side's number with its answer.

        An answer is to be read, or closed, before the next is asked for. A side that takes the message back,
        since its answer was dropped before the first token, is the last that is asked.

        Raises:
            UsageError: `text` is blank.
        """
        answers = [side.send(text) for side in self.sides]
        try:
            for number, answer in enumerate(answers):
                before = len(self.sides[number].messages)
                yield number, answer
                answer.close()  # type: ignore[attr-defined]
                if len(self.sides[number].messages) == before:
                    return
        finally:
            self._stop(answers)

    def retry(self) -> Iterator[tuple[int, str]]:
        """Like `ChatSession.retry`, on both sides."""
        yield from self.send(self.undo())

    def undo(self) -> str:
        """Like `ChatSession.undo`, on both sides."""
        for side in self.sides:
            text = side.undo()
        return text

    def reset(self) -> None:
        """Like `ChatSession.reset`, on both sides."""
        for side in self.sides:
            side.reset()

    def save(self, path: Path) -> None:
        """Saves the tuned side's conversation."""
        self.sides[0].save(path)

    def load(self, path: Path) -> None:
        """Like `ChatSession.load`, on both sides."""
        for side in self.sides:
            side.load(path)

    @property
    def messages(self) -> list[dict[str, str]]:
        """The tuned side's conversation so far."""
        return self.sides[0].messages

    @property
    def system(self) -> str | None:
        """The system message of both."""
        return self.sides[0].system

    @system.setter
    def system(self, text: str | None) -> None:
        for side in self.sides:
            side.system = text

    @property
    def sampling(self) -> Sampling:
        """How both choose tokens."""
        return self.sides[0].sampling

    @sampling.setter
    def sampling(self, sampling: Sampling) -> None:
        for side in self.sides:
            side.sampling = sampling

    def _interleave(self, answers: list[Iterator[str]]) -> Iterator[tuple[int, str]]:
        going = dict(enumerate(answers))
        try:
            while going:
                for number, answer in list(going.items()):
                    piece = next(answer, None)
                    if piece is None:
                        del going[number]
                    else:
                        yield number, piece
        finally:
            self._stop(answers)

    def _stop(self, answers: list[Any]) -> None:
        """Ends both answers; a message that only one side began to answer is taken back from both."""
        for answer in answers:
            answer.close()
        counts = [len(side.messages) for side in self.sides]
        for side, count in zip(self.sides, counts, strict=True):
            if count > min(counts):
                side.undo()


@dataclass(frozen=True)
class _Unread:
    """What is to be read before an answer, in this order.

    Args:
        opening: What stands before the first message, unless a state has read it.
        history: The conversation, where its state is gone.
        message: What comes after it.
        reread: Whether there is a history that was read before.
    """

    opening: list[int]
    history: list[int]
    message: list[int]
    reread: bool

    @property
    def tokens(self) -> int:
        return len(self.opening) + len(self.history) + len(self.message)


def _speed(spent: list[float]) -> float | None:
    """Tokens a second from the second token on: the first one's time is the prompt's."""
    writing = sum(spent[1:])
    return (len(spent) - 1) / writing if writing else None
