"""What an answer is, and the row that a file of answers has of it. Imports no torch."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any, Literal

from mamba_sft.credentials import without_secrets
from mamba_sft.inference.prompt_rows import PromptRow

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True)
class Answer:
    """One finished answer.

    Args:
        text: Without special tokens, and without the stop string.
        finish_reason: `stop` at a stop token or a stop string, `length` at `max_new_tokens`.
        tokens: Tokens that were written; a stop token is not counted, those of a stop string are.
        prompt_tokens: Tokens of the prompt.
        shared_tokens: How many of them were not read, because an earlier prompt begins with the same.
    """

    text: str
    finish_reason: FinishReason
    tokens: int
    prompt_tokens: int = field(default=0, compare=False)
    shared_tokens: int = field(default=0, compare=False)


OWN_FIELDS = ("prompt", "messages", "answer", "finish_reason", "tokens")
"""What a row of answers has by itself."""


def answer_row(row: PromptRow, answer: Answer) -> dict[str, Any]:
    """Returns a prompt, a text or messages, with its answer, as a file of answers has them.

    What else the prompt's line has is carried along; a field whose name the row needs is called `input_NAME`.
    """
    carried = {f"input_{name}" if name in OWN_FIELDS else name: value for name, value in row.fields.items()}
    return {
        "prompt" if isinstance(row.prompt, str) else "messages": row.prompt,
        **carried,
        "answer": answer.text,
        "finish_reason": answer.finish_reason,
        "tokens": answer.tokens,
    }


def row_line(row: PromptRow, answer: Answer) -> bytes:
    """Returns the same as a line of JSON, without what looks like a token or password."""
    text = without_secrets(json.dumps(answer_row(row, answer), ensure_ascii=False)) + "\n"
    return text.encode("utf-8", "backslashreplace")
