"""As much of Go's `text/template` as the exported chat templates use, to render them as Ollama does."""

from __future__ import annotations

import re
from collections.abc import Iterator

from mamba_sft.exporting.ollama.go_template import Chat

_EQ = re.compile(r'eq \.Role "(\w+)"')


def render_go(template: str, messages: Chat) -> str:
    """Renders a template over `.Messages`: `range`, `if eq .Role`, `else`, `.Role`, `.Content`, trim marks.

    Raises:
        ValueError: It uses anything else.
    """
    tokens = list(_tokens(template))
    text, end = _render(tokens, 0, None, messages, live=True)
    if end != len(tokens):
        raise ValueError("an `end` too many")
    return text


def _tokens(template: str) -> Iterator[tuple[bool, str]]:
    """Yields (is an action, text or action), white space trimmed where a `-` asks for it."""
    at, trim = 0, False
    for match in re.finditer(r"\{\{(- )?\s*(.*?)\s*( -)?\}\}", template, re.DOTALL):
        text = template[at : match.start()]
        text = text.lstrip() if trim else text
        yield False, text.rstrip() if match[1] else text
        yield True, match[2]
        at, trim = match.end(), bool(match[3])
    yield False, template[at:].lstrip() if trim else template[at:]


def _render(
    tokens: list[tuple[bool, str]], at: int, message: dict[str, str] | None, messages: Chat, *, live: bool
) -> tuple[str, int]:
    """Renders up to the `else` or `end` that closes the block, and returns the text and where that is."""
    out = ""
    while at < len(tokens):
        is_action, text = tokens[at]
        if is_action and (text == "end" or text.startswith("else")):
            return out, at
        if not is_action:
            piece, at = text, at + 1
        elif text == "range .Messages":
            piece, at = _range(tokens, at + 1, messages, live=live)
        elif text.startswith("if "):
            piece, at = _if(tokens, at, message, messages, live=live)
        elif text in (".Role", ".Content"):
            piece = (message or {})[text[1:].lower()] if live else ""
            at += 1
        else:
            raise ValueError(f"`{text}` is not in the part of Go's templates used here")
        out += piece if live else ""
    return out, at


def _range(tokens: list[tuple[bool, str]], at: int, messages: Chat, *, live: bool) -> tuple[str, int]:
    out = ""
    _, end = _render(tokens, at, None, messages, live=False)
    for message in messages if live else ():
        out += _render(tokens, at, message, messages, live=True)[0]
    return out, end + 1


def _if(
    tokens: list[tuple[bool, str]], at: int, message: dict[str, str] | None, messages: Chat, *, live: bool
) -> tuple[str, int]:
    out, done = "", False
    while True:
        condition = tokens[at][1].removeprefix("else").strip().removeprefix("if").strip()
        match = _EQ.fullmatch(condition)
        if condition and not match:
            raise ValueError(f"`{condition}` is not in the part of Go's templates used here")
        holds = live and not done and (match is None or (message or {})["role"] == match[1])
        text, at = _render(tokens, at + 1, message, messages, live=holds)
        out, done = out + text, done or holds
        if tokens[at][1] == "end":
            return out, at + 1
