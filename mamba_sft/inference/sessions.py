"""A conversation with a model, or with two side by side.

A session carries the model's state from turn to turn. What a turn adds is found by rendering the whole
conversation through the chat template and feeding only what the state has not read.
"""

from __future__ import annotations

import json
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from mamba_sft.errors import UsageError
from mamba_sft.inference.answer_text import AnswerText
from mamba_sft.inference.chat_model import ChatModel, require_template
from mamba_sft.inference.generation import State, finish_reason, stream
from mamba_sft.inference.sampling import Sampling
from mamba_sft.model.chat_template import render, with_system

UNDO_DEPTH = 8
"""Turns whose starting state is kept; undoing more than these reads the conversation again."""

FinishReason = Literal["stop", "length", "interrupted"]


@dataclass(frozen=True)
class Turn:
    """What is known about an answer when it has ended.

    Args:
        tokens: Tokens of the answer.
        tokens_per_second: Speed of writing, reading the prompt not counted; None for fewer than two tokens.
        finish_reason: `stop` at a stop token, `length` at `max_new_tokens`, `interrupted` by the user.
        seen: Tokens that the state has read since the conversation began.
        reread: Whether the conversation had to be read again from the start.
    """

    tokens: int
    tokens_per_second: float | None
    finish_reason: FinishReason
    seen: int
    reread: bool


class ChatSession:
    """A conversation with one model.

    Args:
        chat_model: Who answers.
        sampling: How; with a seed, the same inputs give the same session.
        system: The system message; None takes the one the model was trained with.

    Raises:
        DataError: The model's tokenizer has no chat template.
    """

    def __init__(self, chat_model: ChatModel, *, sampling: Sampling | None = None, system: str | None = None):
        require_template(chat_model.name, chat_model.tokenizer)
        self.chat_model = chat_model
        self.sampling = sampling or Sampling()
        self.system = chat_model.system if system is None else system
        self.last_turn: Turn | None = None
        self._turns: list[dict[str, str]] = []
        self._state = State()
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
        self._turns.clear()
        self._before.clear()
        self._state = State()
        self.last_turn = None

    def save(self, path: Path) -> None:
        """Adds the conversation to a JSON Lines file, one `{"messages": [...]}` that `data.sources` reads.

        Raises:
            UsageError: Nothing was said yet, or the file cannot be written.
        """
        if not self._turns:
            raise UsageError("there is nothing to save yet")
        line = json.dumps({"messages": self.messages}, ensure_ascii=False)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("a", encoding="utf-8") as file:
                file.write(line + "\n")
        except OSError as error:
            raise UsageError(f"cannot save to `{path}`: {error.strerror}") from error

    def _answer(self, text: str) -> Iterator[str]:
        self._turns.append({"role": "user", "content": text})
        self._before.append(self._state.copy())
        self.last_turn = None
        unread = self._unread()
        reread = not self._state.read and len(self._turns) > 1
        sampling, spent = self._next_sampling(), []
        answer = AnswerText(self.chat_model.tokenizer, sampling.stop_strings)
        tokens = stream(
            self.chat_model.model, unread, self._state, sampling=sampling, stop_ids=self.chat_model.stop_ids
        )
        reason: FinishReason = "interrupted"
        try:
            started = time.perf_counter()
            for token in tokens:
                spent.append(time.perf_counter() - started)
                if piece := answer.add(token):
                    yield piece
                if answer.stopped:
                    break
                started = time.perf_counter()
            reason = "stop" if answer.stopped else finish_reason(len(spent), sampling)
            if piece := answer.close():
                yield piece
        finally:
            answer.close()
            if answer.stopped:  # the stop string was read, and is no part of the conversation
                self._state = self._before[-1].copy()
            turn = Turn(len(spent), _speed(spent), reason, len(self._state.read), reread)
            self._finish(answer.text, turn)

    def _unread(self) -> list[int]:
        """Returns what the state has not read of the conversation: all of it if it read something else."""
        rendered, _ = render(self.chat_model.tokenizer, self.messages, add_generation_prompt=True)
        unread = continuation(self.chat_model.tokenizer, self._state.read, rendered)
        if unread is None:
            self._state.clear()
            return rendered
        return unread

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
    """The same conversation with two models, answering side by side.

    Args:
        left: A session with the one, such as the base.
        right: A session with the other, such as the tuned model.
    """

    def __init__(self, left: ChatSession, right: ChatSession):
        self.sides = (left, right)

    def send(self, text: str) -> Iterator[tuple[int, str]]:
        """Says `text` to both and yields `(side, piece)`, side 0 or 1, until both have answered.

        Raises:
            UsageError: `text` is blank.
        """
        return self._interleave([side.send(text) for side in self.sides])

    def retry(self) -> Iterator[tuple[int, str]]:
        """Like `ChatSession.retry`, on both sides."""
        yield from self.send(self.undo())

    def undo(self) -> str:
        """Like `ChatSession.undo`, on both sides."""
        return [side.undo() for side in self.sides][-1]

    def reset(self) -> None:
        """Like `ChatSession.reset`, on both sides."""
        for side in self.sides:
            side.reset()

    def save(self, path: Path) -> None:
        """Saves the right side's conversation."""
        self.sides[1].save(path)

    @property
    def system(self) -> str | None:
        """The system message of both."""
        return self.sides[1].system

    @system.setter
    def system(self, text: str | None) -> None:
        for side in self.sides:
            side.system = text

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


def continuation(tokenizer: Any, read: list[int], rendered: list[int]) -> list[int] | None:
    """Returns what of a rendered conversation is still to be read, None if all of it has to be.

    What a model wrote need not be how the tokenizer would write it ("he" + "llo" for "hello"), so where ids
    differ the texts decide: the state keeps the tokens that were really written, and the rest is, token for
    token, the end of the rendering.

    Args:
        tokenizer: The one that rendered.
        read: Ids that the state has read.
        rendered: Ids of the whole conversation.
    """
    if rendered[: len(read)] == read:
        return rendered[len(read) :]
    seen, whole = (tokenizer.decode(ids, clean_up_tokenization_spaces=False) for ids in (read, rendered))
    if not whole.startswith(seen):
        return None
    rest: list[int] = tokenizer.encode(whole[len(seen) :], add_special_tokens=False)
    return rest if rest and rendered[-len(rest) :] == rest else None


def _speed(spent: list[float]) -> float | None:
    """Tokens a second from the second token on: the first one's time is the prompt's."""
    writing = sum(spent[1:])
    return (len(spent) - 1) / writing if writing else None
