"""What of a conversation is still to be read, in tokens.

A chat template renders whole conversations. Each time it renders this one, all but its end is what it was, so
only the new pieces are tokenized, and only tokens that the state has not read are read.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import compress, count
from operator import ne
from typing import Any

from mamba_sft.model.chat_template import Message, encode_batch, join_pieces, split_rendered

Piece = tuple[str, bool]


class Rendering:
    """Renders a conversation that grows; a piece that was there before keeps its tokens.

    Args:
        tokenizer: With its chat template.
    """

    def __init__(self, tokenizer: Any):
        self._tokenizer = tokenizer
        self._pieces: list[Piece] = []
        self._encoded: list[list[int]] = []

    def ids(self, messages: Sequence[Message]) -> list[int]:
        """Returns the tokens of a conversation that the model is to answer.

        Raises:
            DataError: The template refuses the conversation.
        """
        pieces = split_rendered(self._tokenizer, messages, add_generation_prompt=True)
        same = _equal_at_first([_identity(piece) for piece in pieces], [_identity(p) for p in self._pieces])
        new = encode_batch(self._tokenizer, [text for text, _ in pieces[same:]])
        self._pieces, self._encoded = pieces, self._encoded[:same] + new
        return join_pieces(self._tokenizer, pieces, self._encoded)[0]


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
    same = _equal_at_first(read, rendered)
    if same == len(read):
        return rendered[same:]
    same = _whole_turns(tokenizer, read[:same])
    seen, whole = (
        tokenizer.decode(ids[same:], clean_up_tokenization_spaces=False) for ids in (read, rendered)
    )
    if not whole.startswith(seen):
        return None
    rest: list[int] = tokenizer.encode(whole[len(seen) :], add_special_tokens=False)
    return rest if rest and rendered[-len(rest) :] == rest else None


def common_beginning(tokenizer: Any, messages: Sequence[Message], rendered: list[int]) -> list[int]:
    """Returns the ids that a conversation begins with whatever its last message says.

    Found by rendering it with another last message, so that nothing has to be known about the template. They
    end at a special token: what stands before one is the same tokens, whatever comes after it.

    Args:
        tokenizer: The one that rendered.
        messages: The conversation, the last message a user's.
        rendered: Its ids.
    """
    last = messages[-1]
    other = "b" if str(last["content"]).strip().startswith("a") else "a"
    probe = Rendering(tokenizer).ids([*messages[:-1], {**last, "content": other}])
    return rendered[: _whole_turns(tokenizer, rendered[: _equal_at_first(rendered, probe)])]


def _whole_turns(tokenizer: Any, ids: list[int]) -> int:
    """How many of `ids` there are up to the last special token among them."""
    special = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    return next((at + 1 for at in range(len(ids) - 1, -1, -1) if ids[at] in special), 0)


def _equal_at_first(one: Sequence[Any], other: Sequence[Any]) -> int:
    """How many entries two sequences have in common before they differ."""
    return next(compress(count(), map(ne, one, other)), min(len(one), len(other)))


def _identity(piece: Piece) -> tuple[str, bool, Any]:
    """What a piece's tokens depend on: its text, and what marks literal text in it."""
    return (*piece, getattr(piece[0], "marks", None))
