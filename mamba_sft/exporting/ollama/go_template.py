"""A chat template in the syntax of Go's `text/template`, as Ollama wants it.

A Jinja template cannot be translated in general. One that only puts something before and after each message,
by role, can be learned from what it renders; that is how chat templates of this kind look. What was learned
is held against the Jinja template on chats of several turns. The tests render the Go text itself.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from mamba_sft.errors import ExportError

Chat = Sequence[dict[str, str]]
Render = Callable[[Chat, bool], str]
"""Renders messages, and whether the assistant's turn is opened after them."""
ROLES = ("system", "user", "assistant")

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

    def render(self, messages: Chat) -> str:
        """Returns the text of a chat with the assistant's turn opened after it."""
        turns = [
            self.before[message["role"]] + message["content"] + self.after[message["role"]]
            for message in messages
        ]
        return "".join(turns) + self.opening

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
        turns = learn_turns(render)
        template = turns.to_go()
        same = all(turns.render(chat) == render(chat, True) for chat in _CHATS)
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


def _text(text: str) -> str:
    if "{{" in text or '"""' in text:
        raise ValueError(f"{text!r} would be taken for template syntax")
    return text
