"""Text is text: what a message says is never taken for a mark of the template.

A message may quote `<|im_start|>`, as a README about chat templates does, or be written to open a turn that
nobody took. Encoded as it stands it would become the control token. So before a template renders a
conversation, each spelling of a special token inside it is split by a code point that is no character; where
a text is encoded it is cut there, and both halves become ordinary tokens, which together say what was
written.
"""

from __future__ import annotations

import re
from typing import Any

from mamba_sft.errors import DataError

SPLIT = "\ufdd0"
"""A noncharacter: Unicode gives it no meaning and keeps it for use inside a program."""


def special_spellings(tokenizer: Any) -> re.Pattern[str]:
    """Returns a pattern of all special tokens as they are written; it matches nothing if there are none."""
    special = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    return re.compile("|".join(map(re.escape, sorted(special, key=len, reverse=True))) or r"(?!)")


def mark_literals(value: Any, special: re.Pattern[str]) -> Any:
    """Returns messages or tools, every spelling of a special token in their texts split.

    Args:
        value: A text, or lists and objects of them at any depth; it is not changed.
        special: From `special_spellings`.

    Raises:
        DataError: A text holds the code point that marks the split.
    """
    if isinstance(value, str):
        if SPLIT in value:
            raise DataError("a text holds U+FDD0, a code point that is no character", hint="take it out")
        return special.sub(lambda found: found[0][0] + SPLIT + found[0][1:], value)
    if isinstance(value, dict):
        return {key: mark_literals(entry, special) for key, entry in value.items()}
    if isinstance(value, list):
        return [mark_literals(entry, special) for entry in value]
    return value
