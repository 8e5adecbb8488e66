"""Prompts as they are handed over: texts, messages, or the lines of a file. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mamba_sft.errors import DataError, UsageError
from mamba_sft.inference.request import check_files, check_text
from mamba_sft.json_lines import Row, read_prompt_file

Message = dict[str, Any]
Prompt = str | Sequence[Message]


@dataclass(frozen=True)
class PromptRow:
    """One prompt.

    Args:
        where: What to call it in messages: its file and line.
        prompt: A text, or messages.
        fields: What else its line has; `system` is the system message of this prompt.
    """

    where: str
    prompt: Prompt
    fields: dict[str, Any] = field(default_factory=dict)


def read_prompts(prompts: Prompt | Path | Iterable[Prompt]) -> list[PromptRow]:
    """Returns one prompt, several, or those of every line of a file that is not blank.

    Raises:
        UsageError: A prompt is blank, or there is none.
        DataError: There is no such file, or a line of it is not a prompt (with file and line).
    """
    if isinstance(prompts, Path):
        check_files(prompts, None)
        return [_parse(row) for row in read_prompt_file(prompts)]
    if isinstance(prompts, Mapping) or hasattr(prompts, "columns") or not isinstance(prompts, Iterable):
        raise UsageError(  # a mapping and a table of pandas would be asked the names in them
            f"prompts are a text, a list of them or a `Path`, and this is a `{type(prompts).__name__}`",
            hint='for example `["What is the capital of France?"]`; of a table give the column, of a message'
            ' a list: `[{"role": "user", "content": "Hello"}]`',
        )
    listed: list[Any] = [prompts] if isinstance(prompts, str) else list(prompts)
    if listed and isinstance(listed[0], dict):  # one conversation
        listed = [listed]
    if not listed:
        raise UsageError("there are no prompts to answer")
    rows = [PromptRow(f"prompt {number}", prompt) for number, prompt in enumerate(listed, 1)]
    for row in rows:
        _check_prompt(row.prompt, row.where, UsageError)
    return rows


def _parse(row: Row) -> PromptRow:
    where, value = row.where, row.value
    if not isinstance(value, dict) or ("prompt" in value) == ("messages" in value):
        raise DataError(
            f"{where}: a line needs either `prompt` or `messages`",
            hint='for example {"prompt": "What is the capital of France?"}',
        )
    key = "prompt" if "prompt" in value else "messages"
    prompt = value[key]
    if not isinstance(prompt, str if key == "prompt" else list):
        wanted = "a string" if key == "prompt" else "a list of messages"
        raise DataError(f"{where}: `{key}` is not {wanted}")
    if not isinstance(value.get("system"), str | None):
        raise DataError(f"{where}: `system` is not a string, which the system message of a prompt is")
    check_text(value.get("system") or "", f"{where}: `system`", DataError)
    _check_prompt(prompt, where, DataError)
    return PromptRow(where, prompt, {name: entry for name, entry in value.items() if name != key})


def _check_prompt(prompt: Any, where: str, kind: type[UsageError | DataError]) -> None:
    if isinstance(prompt, str):
        if not prompt.strip():
            raise kind(f"{where}: the prompt is empty")
        check_text(prompt, where, kind)
        return
    if not isinstance(prompt, Sequence):
        raise kind(f"{where}: a prompt is a text or a list of messages, not `{prompt!r:.80}`")
    if not prompt:
        raise kind(f"{where}: there are no messages")
    for message in prompt:
        if not _is_message(message):
            raise kind(
                f"{where}: a message needs `role` and `content`, both strings, not {message!r:.80}",
                hint='for example {"role": "user", "content": "Hello"}',
            )
        check_text(str(message.get("content") or ""), where, kind)
    if prompt[-1]["role"] == "assistant":
        raise kind(f"{where}: the last message is the assistant's own", hint="end with a `user` message")


def _is_message(message: Any) -> bool:
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        return False
    return isinstance(message.get("content"), str) or bool(message.get("tool_calls"))
