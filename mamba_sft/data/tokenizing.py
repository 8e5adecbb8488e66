"""From examples to token ids: what a row's tokens are, and which of them are trained."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain, islice

import numpy as np

from mamba_sft.data.chats import Chat
from mamba_sft.data.formats import Passage
from mamba_sft.data.values import BadRowError
from mamba_sft.errors import DataError
from mamba_sft.json_lines import Row
from mamba_sft.model.chat_template import (
    Message,
    Pieces,
    TemplateSetup,
    Tools,
    check_generation_marks,
    check_stops,
    encode_batch,
    split_rendered_batch,
    with_reasoning_as_text,
    with_system,
)
from mamba_sft.model.template_process import EndlessTemplateError

_BATCH = 256
"""Rows tokenized in one call, which the tokenizer spreads over the cores. What it returns takes some 150
bytes a token before it is an array."""
Example = Chat | Passage
Batch = list[tuple[Row, Example]]


@dataclass(frozen=True)
class Tokens:
    """A row's tokens.

    Args:
        where: The file and line it came from.
        ids: (L,) int32.
        trained: (L,) bool; the first is False, as nothing before it predicts it.
    """

    where: str
    ids: np.ndarray
    trained: np.ndarray


class Renderer:
    """Renders examples with one tokenizer.

    Args:
        setup: The tokenizer and its template.
        system: System message of chats that have none.
        assistant_only: Train on the assistant's turns or the completion only; else on every token.
    """

    def __init__(self, setup: TemplateSetup, system: str | None, assistant_only: bool):
        self.tokenizer = setup.tokenizer
        self.setup = setup
        self.system = system
        self.assistant_only = assistant_only
        self._marks_checked = False

    def render(self, examples: Iterable[tuple[Row, Example]]) -> Iterator[Tokens | tuple[Row, str]]:
        """Yields the tokens of each (row, example), in order, or (row, reason) if the template refuses it.

        While the tokenizer, which needs no Python, works on one batch, the next one is read and rendered.

        Raises:
            DataError: The template has no generation marks, or they leave out the stop token.
        """
        waiting: tuple[Batch, list[Pieces | str], Future[list[list[int]]]] | None = None
        with ThreadPoolExecutor(1, "encode") as pool:
            for batch in _batches(examples):
                pieces = self._pieces_or_reasons([example for _, example in batch])
                texts = [text for cut in pieces for text, _ in _as_pieces(cut)]
                encoded = pool.submit(encode_batch, self.tokenizer, texts)
                if waiting is not None:
                    yield from self._finish(*waiting)
                waiting = batch, pieces, encoded
            if waiting is not None:
                yield from self._finish(*waiting)

    def _finish(
        self, batch: Batch, pieces: list[Pieces | str], future: Future[list[list[int]]]
    ) -> Iterator[Tokens | tuple[Row, str]]:
        encoded = iter(future.result())
        for (row, example), cut in zip(batch, pieces, strict=True):
            if isinstance(cut, str):
                yield row, cut
            else:
                yield self._tokens(row.where, example, cut, list(islice(encoded, len(cut))))

    def _pieces_or_reasons(self, examples: list[Example]) -> list[Pieces | str]:
        asked = [self._asked(example) for example in examples]
        rendered = iter(self._rendered([one for one in asked if isinstance(one, tuple)]))
        return [
            self._passage(example)
            if isinstance(example, Passage)
            else one
            if isinstance(one, str)
            else self._checked(example, next(rendered))
            for example, one in zip(examples, asked, strict=True)
        ]

    def _asked(self, example: Example) -> tuple[list[Message], Tools] | str | None:
        """What the template is given, or why it is not; nothing for what needs no template."""
        if isinstance(example, Passage):
            return None
        if self.assistant_only and not self._marks_checked:
            check_generation_marks(self.setup)
            self._marks_checked = True
        try:
            self._check_carried(example)
        except BadRowError as error:
            return str(error)
        messages = with_system(example.messages, self.system)
        return messages if self.setup.carries.reasoning else with_reasoning_as_text(messages), example.tools

    def _rendered(self, chats: list[tuple[list[Message], Tools]]) -> list[Pieces | DataError]:
        try:
            return split_rendered_batch(self.tokenizer, chats)
        except EndlessTemplateError as error:
            raise DataError(f"`{self.setup.template}`: {error.message}") from error

    def _checked(self, chat: Chat, pieces: Pieces | DataError) -> Pieces | str:
        """The pieces, or why the row cannot be trained on."""
        if isinstance(pieces, DataError):
            return pieces.message
        if not (self.assistant_only or chat.masked):
            return pieces
        marked = sum(trained for _, trained in pieces)
        turns = sum(message["role"] == "assistant" for message in chat.messages)
        return pieces if marked == turns else f"the chat template marks {marked} of {turns} assistant turns"

    def _check_carried(self, chat: Chat) -> None:
        if chat.masked_others is not None and not self.assistant_only:
            raise BadRowError(
                f"turn {chat.masked_others}: weight 0 on a turn that is not the assistant's, and"
                " `data.assistant_only_loss: false` trains all of these"
            )
        template = f"the chat template `{self.setup.template}`"
        if chat.tools and not self.setup.carries.tools:
            raise BadRowError(f"`tools`: {template} does not show them; use `chat.template: chatml`")
        if not self.setup.carries.calls and any("tool_calls" in message for message in chat.messages):
            raise BadRowError(f"a tool call: {template} does not render it; use `chat.template: chatml`")

    def _passage(self, passage: Passage) -> Pieces:
        stop = self.setup.stop_token
        stopped = passage.text.rstrip()  # blanks behind a stop token are not another text
        text = stopped if stopped.endswith(stop) else passage.text + stop
        return [(passage.prompt, False), (text, True)] if passage.prompt else [(text, True)]

    def _tokens(self, where: str, example: Example, pieces: Pieces, encoded: list[list[int]]) -> Tokens:
        try:
            check_stops(self.tokenizer, pieces, encoded)
        except DataError as error:
            raise DataError(f"{where}: {error.message}", error.hint) from error
        lengths = [len(tokens) for tokens in encoded]
        ids = np.fromiter(chain.from_iterable(encoded), np.int32, sum(lengths))
        marks = np.array([is_trained or not self.assistant_only for _, is_trained in pieces])
        trained = np.repeat(marks, lengths)
        if isinstance(example, Chat):
            context = example.context if self.assistant_only else example.masked
            for start, end in _answer_spans(pieces, encoded, context):
                trained[start:end] = False
        trained[:1] = False
        length = (
            int(trained.nonzero()[0].max(initial=-1)) + 1
        )  # what follows the last trained token teaches nothing
        return Tokens(where, ids[:length], trained[:length])


def _batches(examples: Iterable[tuple[Row, Example]]) -> Iterator[Batch]:
    examples = iter(examples)
    while batch := list(islice(examples, _BATCH)):
        yield batch


def _as_pieces(cut: Pieces | str) -> Pieces:
    return [] if isinstance(cut, str) else cut


def _answer_spans(
    pieces: Pieces, encoded: list[list[int]], turns: Collection[int]
) -> Iterator[tuple[int, int]]:
    """Where the assistant's `turns`, counted from 0, begin and end in tokens."""
    end, turn = 0, -1
    for (_, trained), tokens in zip(pieces if turns else [], encoded, strict=False):
        start, end = end, end + len(tokens)
        turn += trained
        if trained and turn in turns:
            yield start, end
