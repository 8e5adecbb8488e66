"""The part of Go's `text/template` that a chat template for Ollama needs: written, and rendered to check it.

A Jinja template cannot be translated in general. One that only puts something before and after each message,
by role, can be learned from what it renders; that is how chat templates of this kind look. What was learned
is then rendered here, and compared with the Jinja template on chats of several turns.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from mamba_sft.errors import ExportError

Chat = Sequence[dict[str, str]]
Render = Callable[[Chat, bool], str]
"""Renders messages, and whether the assistant's turn is opened after them."""
ROLES = ("system", "user", "assistant")
_EQ = re.compile(r'eq \.Role "(\w+)"')

# Chats that a learned template must render as the Jinja template does.
_CHATS: tuple[Chat, ...] = (
    [{"role": "user", "content": "a question"}],
    [{"role": "system", "content": "be brief"}, {"role": "user", "content": "a question"}],
    [
        {"role": "system", "content": " spaces \n"},
        {"role": "user", "content": "\nfirst {{ .Content }}"},
        {"role": "assistant", "content": "answer <b> & 'quotes' \"too\"  "},
        {"role": "user", "content": "second\n\n"},
    ],
    [
        {"role": "user", "content": "eins"},
        {"role": "assistant", "content": "zwei"},
        {"role": "user", "content": "drei"},
        {"role": "assistant", "content": "vier"},
        {"role": "user", "content": "fünf"},
    ],
)


@dataclass(frozen=True)
class Turns:
    """A chat template that writes every message between two texts of its role.

    Args:
        before: By role, what stands before the content.
        after: By role, what stands behind it.
        opening: What opens the assistant's turn.
    """

    before: dict[str, str]
    after: dict[str, str]
    opening: str

    def to_go(self) -> str:
        """Returns the template in Go's syntax, over `.Messages`."""
        forms = {(self.before[role].replace(role, "\0"), self.after[role]) for role in ROLES}
        if len(forms) == 1:
            ((before, after),) = forms
            body = _text(before).replace("\0", "{{ .Role }}") + "{{ .Content }}" + _text(after)
        else:
            body = "{{ if eq .Role "
            body += "{{ else if eq .Role ".join(
                f'"{role}" }}}}{_text(self.before[role])}{{{{ .Content }}}}{_text(self.after[role])}'
                for role in ROLES
            )
            body += "{{ end }}"
        return f"{{{{ range .Messages }}}}{body}{{{{ end }}}}{_text(self.opening)}"


def to_go_template(render: Render, name: str) -> str:
    """Returns a Go template that renders chats as `render` does.

    Args:
        render: The model's own chat template.
        name: What to call it in messages.

    Raises:
        ExportError: It does more than putting text around messages.
    """
    try:
        template = learn_turns(render).to_go()
        same = all(render_go(template, chat) == render(chat, True) for chat in _CHATS)
    except (ValueError, KeyError) as error:
        raise ExportError(f"{name} cannot be written for Ollama: {error}", hint=_HINT) from error
    if not same:
        raise ExportError(f"{name} does more than put text around messages", hint=_HINT)
    return template


_HINT = (
    "Ollama's templates are Go, not Jinja; write the Modelfile by hand, or train with `chat.template: chatml`"
)


def learn_turns(render: Render) -> Turns:
    """Finds what a chat template writes around messages.

    Raises:
        ValueError: A message does not show up in what it renders.
    """
    probe = {"system": "\u2460", "user": "\u2461", "assistant": "\u2462"}
    chat: list[dict[str, str]] = []
    before, after = {}, {}
    seen = ""
    for role in ROLES:
        chat.append({"role": role, "content": probe[role]})
        text = render(chat, False)
        if not text.startswith(seen) or text.count(probe[role]) != 1:
            raise ValueError(f"the {role} message is not simply added to what was there")
        before[role], after[role] = text[len(seen) :].split(probe[role])
        seen = text
    user = chat[:2]
    opened, closed = render(user, True), render(user, False)
    if not opened.startswith(closed):
        raise ValueError("opening the assistant's turn changes what was there")
    return Turns(before, after, opened[len(closed) :])


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


def _text(text: str) -> str:
    if "{{" in text or '"""' in text:
        raise ValueError(f"{text!r} would be taken for template syntax")
    return text
