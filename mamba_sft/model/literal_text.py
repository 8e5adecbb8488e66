"""Text is text: what a message says is never taken for a mark of the template.

A message may quote `<|im_start|>`, as a README about chat templates does, or be written to open a turn that
nobody took. Encoded as it stands, that would become the control token. So before a template renders a
conversation, each spelling of a special token in it is put between two code points that are no characters.
Where the rendering is encoded, only what stands outside of them is a control token; the text between two
control tokens is encoded as any text is, the enclosed spellings with it. A message that ends with the first
half of a spelling could take the template's own token behind it for the second; such halves are enclosed as
well. Conversations without either, nearly all, are rendered and encoded as they stand.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Self, TypeVar
from weakref import WeakKeyDictionary

from mamba_sft.errors import DataError

Made = TypeVar("Made")
Marks = tuple[str, str]
"""What stands before and behind a text that is none of the template's."""

_PAIRS = [(chr(code), chr(code + 1)) for code in range(0xFDD0, 0xFDF0, 2)]
"""Code points that Unicode gives no meaning and keeps for use inside a program."""
_ROLES = frozenset(("system", "user", "assistant", "tool"))
"""Texts that templates compare with, so that nothing may be put around them."""
_KNOWN = _ROLES | {"role", "content"}
"""These and the keys of every message: most texts of a conversation, and the spelling of no special token."""


class Marked(str):
    """Rendered text in which what stands between `marks` is text, whatever it spells."""

    __slots__ = ("marks",)
    marks: Marks

    @classmethod
    def of(cls, text: str, marks: Marks) -> Self:
        """Returns `text` with its marks."""
        marked = cls(text)
        marked.marks = marks
        return marked


@dataclass(frozen=True)
class Spellings:
    """How the special tokens of a tokenizer are written.

    Args:
        tokens: Spelling -> (id, added token).
        starts: First characters of spellings: a text without any of them holds none.
        heads: Beginnings of spellings that a text might end with, longest first.
        tails: Ends of spellings that a text might begin with, longest first.
        pattern: Matches every spelling, or nothing.
    """

    tokens: dict[str, tuple[int, Any]]
    starts: tuple[str, ...]
    heads: tuple[str, ...]
    tails: tuple[str, ...]
    pattern: str

    def stand_apart(self, value: Any) -> bool:
        """Whether texts, or lists and objects of them at any depth, can be rendered as they are."""
        if isinstance(value, str):
            if value in _KNOWN:
                return True
            if any(start in value for start in self.starts) and _matcher(self.pattern).search(value):
                return False
            return not (value.rstrip().endswith(self.heads) or value.lstrip().startswith(self.tails))
        if isinstance(value, dict):
            return all(map(self.stand_apart, value)) and all(map(self.stand_apart, value.values()))
        return not isinstance(value, list) or all(map(self.stand_apart, value))

    def enclose(self, value: Any, marks: Marks) -> Any:
        """Returns messages or tools in which every spelling stands between marks, and half of one at an end.

        Args:
            value: A text, or lists and objects of them at any depth; it is not changed.
            marks: What to put before and behind.
        """
        if isinstance(value, str):
            return value if value in _ROLES or self.stand_apart(value) else self._enclose_text(value, *marks)
        if isinstance(value, dict):
            return {self.enclose(key, marks): self.enclose(entry, marks) for key, entry in value.items()}
        if isinstance(value, list):
            return [self.enclose(entry, marks) for entry in value]
        return value

    def _enclose_text(self, text: str, opening: str, closing: str) -> str:
        text = _matcher(self.pattern).sub(lambda found: opening + found[0] + closing, text)
        bare = text.rstrip()
        head = next((head for head in self.heads if bare.endswith(head)), "")
        if head:
            text = f"{bare[: -len(head)]}{opening}{head}{closing}{text[len(bare) :]}"
        bare = text.lstrip()
        tail = next((tail for tail in self.tails if bare.startswith(tail)), "")
        if tail:
            text = f"{text[: len(text) - len(bare)]}{opening}{tail}{closing}{bare[len(tail) :]}"
        return text

    def cut(self, text: Marked) -> Iterator[str | int]:
        """Yields the control tokens of a rendered text, by their ids, and the texts between them."""
        opening, closing = text.marks
        either = _matcher(f"{opening}([^{closing}]*){closing}|({self.pattern})|({opening}|{closing})")
        plain, at, strips = "", 0, False
        for found in either.finditer(text):
            plain += text[at : found.start()] + (found[1] or "")
            at = found.end()
            if found[2] is None:
                continue
            number, token = self.tokens[found[2]]
            plain = plain.lstrip() if strips else plain
            yield plain.rstrip() if token.lstrip else plain
            yield number
            plain, strips = "", token.rstrip
        plain += text[at:]
        yield plain.lstrip() if strips else plain


def spellings_of(tokenizer: Any) -> Spellings:
    """Returns how a tokenizer's special tokens are written."""
    return _kept(_known, tokenizer, _spellings)


def encode_as_text(tokenizer: Any, texts: list[str]) -> list[list[int]]:
    """Returns the token ids of each text by a tokenizer like this one that knows no control tokens.

    It is one of its own, made when it is first needed: a switch of the shared one would be seen by every
    thread that encodes at the same time.
    """
    own = _kept(_without_special, tokenizer, _without_control_tokens)
    return [encoded.ids for encoded in own.encode_batch(texts, add_special_tokens=False)]


def _kept(
    made: WeakKeyDictionary[Any, tuple[int, Made]], tokenizer: Any, make: Callable[[Any], Made]
) -> Made:
    """What is made once of a tokenizer, and again when it has got more tokens."""
    size, found = made.get(tokenizer, (-1, None))
    if found is None or size != len(tokenizer):
        found = make(tokenizer)
        made[tokenizer] = len(tokenizer), found
    return found


def choose_marks(*values: Any) -> Marks:
    """Returns marks that occur nowhere in messages and tools.

    Raises:
        DataError: All of them do.
    """
    text = json.dumps(values, ensure_ascii=False, default=str)
    for pair in _PAIRS:
        if not any(mark in text or f"\\u{ord(mark):04x}" in text.lower() for mark in pair):
            return pair
    raise DataError("a text spells special tokens and holds all of U+FDD0 to U+FDEF, which are no characters")


def unescaped(text: str, marks: Marks) -> str:
    """Returns rendered text with its marks as they were, where the template wrote them as ASCII JSON does."""
    for mark in marks:
        text = text.replace(f"\\u{ord(mark):04x}", mark)
    return text


_known: WeakKeyDictionary[Any, tuple[int, Spellings]] = WeakKeyDictionary()
_without_special: WeakKeyDictionary[Any, tuple[int, Any]] = WeakKeyDictionary()


def _spellings(tokenizer: Any) -> Spellings:
    special = {
        token.content: (i, token) for i, token in tokenizer.added_tokens_decoder.items() if token.special
    }
    texts = sorted(special, key=len, reverse=True)
    # halves that are words (of a token such as `eos`) end half of all texts, and templates put no words there
    heads = {text[:size] for text in texts if not text[0].isalnum() for size in range(1, len(text))}
    tails = {text[size:] for text in texts if not text[-1].isalnum() for size in range(1, len(text))}
    return Spellings(
        tokens=special,
        starts=tuple({text[:2] for text in texts}),
        heads=tuple(sorted(heads, key=len, reverse=True)),
        tails=tuple(sorted(tails, key=len, reverse=True)),
        pattern="|".join(map(re.escape, texts)) or r"(?!)",
    )


def _without_control_tokens(tokenizer: Any) -> Any:
    from tokenizers import Tokenizer

    own = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    own.no_truncation()
    own.no_padding()
    own.encode_special_tokens = True
    return own


@lru_cache(maxsize=32)
def _matcher(pattern: str) -> re.Pattern[str]:
    return re.compile(pattern)
