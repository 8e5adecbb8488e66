"""Marks of turns that stand in the text itself: rows that were made ready for a model, ours or another."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from mamba_sft.data.notes import FOREIGN, MARKED, Notes

_MARKS = (
    "[INST]", "<|im_start|>", "<|start_header_id|>", "<start_of_turn>", "<|start_of_role|>", "<|user|>",
    "<|assistant|>", "<|User|>", "<|Assistant|>", "<|prompter|>", "### Human:", "### Assistant:",
    "### Instruction:", "### Response:", "GPT4 Correct User:",
)  # fmt: skip
"""What begins a turn in the prompts of models that people take rows from: Llama 2 and 3, Mistral, Qwen,
Gemma, Granite, Zephyr, Phi, DeepSeek, OpenAssistant, Guanaco, Alpaca, OpenChat."""
_ANYWHERE = re.compile("|".join(map(re.escape, _MARKS)))
_AT_START = re.compile(rf"\s*(?:<s>|<bos>|<\|begin_of_text\|>)?\s*(?:{_ANYWHERE.pattern})")


def note_marks_of_text(text: str, stop_token: str | None, notes: Notes) -> None:
    """Notes marks anywhere in a text outside the chat template.

    Args:
        text: All of it.
        stop_token: The chat template's own, which is a control token where it stands at the end.
        notes: Of its row.
    """
    if stop_token and stop_token in text.rstrip().removesuffix(stop_token):
        notes.note(MARKED)
    elif _ANYWHERE.search(text):
        notes.note(FOREIGN)


def note_marks_of_chat(messages: Iterable[Mapping[str, Any]], notes: Notes) -> None:
    """Notes messages that begin with a mark: farther in, a text may speak of one."""
    if any(_AT_START.match(str(message.get("content", ""))) for message in messages):
        notes.note(FOREIGN)
