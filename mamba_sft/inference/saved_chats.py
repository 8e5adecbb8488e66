"""Conversations in a file: one a line of JSON Lines, as `data.sources` reads them."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from mamba_sft.errors import DataError, UsageError
from mamba_sft.inference.request import refuse_packed
from mamba_sft.json_lines import read_json_lines
from mamba_sft.packed_files import CANNOT_READ
from mamba_sft.wording import shown


def add_chat(path: Path, messages: list[dict[str, str]]) -> None:
    """Adds a conversation to the end of a file, which is made if there is none.

    Raises:
        UsageError: The file cannot be written, or its name says that it is packed.
    """
    refuse_packed(path)
    line = json.dumps({"messages": messages}, ensure_ascii=False) + "\n"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("ab+") as file:
            if file.tell() and _last_byte(file) != b"\n":  # an editor left the last line open
                line = "\n" + line
            file.write(line.encode("utf-8"))
    except OSError as error:
        raise UsageError(f"cannot save to `{path}`: {error.strerror}") from error


def last_chat(path: Path) -> list[dict[str, str]]:
    """Returns the messages of the last conversation of a file.

    Raises:
        UsageError: It cannot be read, or its last line is no conversation of texts that an answer ends.
    """
    try:
        row = None
        for row in read_json_lines(path):  # noqa: B007  # the last one
            pass
    except (DataError, *CANNOT_READ) as error:
        reason = getattr(error, "strerror", None) or error
        raise UsageError(f"cannot load `{path}`: {reason}") from error
    if row is None:
        raise UsageError(f"`{path}` holds no conversation")
    if row.problem is not None:
        raise UsageError(f"{row.where}: {row.problem}")
    messages = row.value.get("messages") if isinstance(row.value, dict) else None
    if not isinstance(messages, list) or not all(_is_text(message) for message in messages):
        raise UsageError(
            f"{row.where}: no conversation of texts: {shown(json.dumps(row.value), 60)}",
            hint='a line is {"messages": [...]}, each with `role` and `content`, as `/save` writes it',
        )
    turns = messages[1:] if messages and messages[0]["role"] == "system" else messages
    roles = [message["role"] for message in turns]
    if not roles or roles != ["user", "assistant"] * (len(roles) // 2):
        raise UsageError(
            f"{row.where}: its turns are not a user's and the assistant's in turn,"
            f" but {shown(', '.join(roles) or 'none', 60)}",
        )
    return [{"role": message["role"], "content": message["content"]} for message in messages]


def _is_text(message: Any) -> bool:
    return (
        isinstance(message, dict)
        and isinstance(message.get("role"), str)
        and isinstance(message.get("content"), str)
    )


def _last_byte(file: Any) -> bytes:
    file.seek(-1, os.SEEK_END)
    byte: bytes = file.read(1)
    return byte
