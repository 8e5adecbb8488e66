"""The commands of a chat: what is one, what each does to the conversation, what Tab completes.

Answering again, helping and leaving are the loop's (`terminal`).
"""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass, fields, replace
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any, NamedTuple

from mamba_sft.errors import UsageError
from mamba_sft.inference.request import check_text
from mamba_sft.inference.sampling import Sampling
from mamba_sft.recipe.builtin import expanded
from mamba_sft.wording import count_text, shown

if TYPE_CHECKING:
    from mamba_sft.inference.sessions import ChatSession, CompareSession


@dataclass(frozen=True)
class Command:
    """One command.

    Args:
        meaning: What `/help` says of it.
        takes: What stands behind it; empty where nothing may.
    """

    meaning: str
    takes: str = ""


COMMANDS = {
    "/help": Command("show this"),
    "/retry": Command("answer the last message again"),
    "/undo": Command("take back the last message and its answer"),
    "/reset": Command("forget the conversation; the system message stays"),
    "/system": Command("set the system message (`none`: none); without TEXT, show it", "TEXT"),
    "/set": Command(
        "how answers are chosen, as `/set temperature 0.7`; without NAME, show all", "NAME VALUE"
    ),
    "/save": Command("add the conversation to a JSON Lines file that a recipe can train on", "FILE"),
    "/load": Command("go on with the last conversation of such a file", "FILE"),
    "/exit": Command("leave, like /quit, Ctrl-D, or Ctrl-C where no answer is being written"),
}
_OTHER_NAMES = {"/quit": "/exit"}
_A_COMMAND = re.compile(r"/[A-Za-z_]+")
_MESSAGE = "a line that begins with a blank is a message"
_MOST = 200
"""More files than anybody looks through."""


class Typed(NamedTuple):
    """A command as it was typed.

    Args:
        name: One of `COMMANDS`.
        rest: What stands behind it.
    """

    name: str
    rest: str


def command_in(line: str) -> Typed | None:
    """Returns the command that a line is, None for a message.

    A slash and letters begin a command. `/etc/hosts` is a message, and so is a line that begins with a blank.

    Raises:
        UsageError: There is no such command, or it takes nothing and something stands behind it.
    """
    word, *behind = line.split(maxsplit=1) or [""]
    if not line.startswith("/") or not _A_COMMAND.fullmatch(word):
        return None
    name, rest = _OTHER_NAMES.get(word.lower(), word.lower()), "".join(behind).strip()
    if name not in COMMANDS:
        raise UsageError(f"no command `{shown(word)}`{_meant(name)}", hint=f"/help lists them; {_MESSAGE}")
    if rest and not COMMANDS[name].takes:
        raise UsageError(f"`{name}` takes nothing, not `{shown(rest, 40)}`", hint=_MESSAGE)
    return Typed(name, rest)


def obey(session: ChatSession | CompareSession, typed: Typed) -> str:
    """Does what a command says to the conversation.

    Returns:
        What to tell of it.

    Raises:
        UsageError: It cannot be done.
    """
    name, rest = typed
    if name == "/undo":
        return f"took back: {session.undo()}"
    if name == "/reset":
        session.reset()
        return "the conversation is forgotten"
    if name == "/system":
        return _system(session, rest)
    if name == "/set":
        return _set(session, rest)
    if not rest:
        raise UsageError(f"`{name}` needs a file", hint=f"for example `{name} chats.jsonl`")
    if name == "/save":
        session.save(expanded(rest))
        return f"added the conversation to {rest}"
    session.load(expanded(rest))
    return f"{count_text(len(session.messages), 'message')} of {rest}; the next message reads them"


def completions(line: str) -> list[str]:
    """Returns the lines that an unfinished line may become: names of commands, settings and files."""
    name, blank, rest = line.partition(" ")
    if not name.startswith("/"):
        return []
    if not blank:
        return [
            f"{known} " if COMMANDS[known].takes else known for known in COMMANDS if known.startswith(name)
        ]
    if name == "/set":
        return [f"{name} {known} " for known in _settings() if known.startswith(rest)]
    return [f"{name} {path}" for path in _paths(rest)] if name in ("/save", "/load") else []


def _paths(begun: str) -> list[str]:
    """Files and directories that begin with what is typed, `~` kept as it is."""
    typed, start = begun, os.path.expanduser(begun)
    found = sorted(glob.iglob(glob.escape(start) + "*"))[:_MOST]
    return [typed + path[len(start) :] + (os.sep if os.path.isdir(path) else "") for path in found]


def _system(session: ChatSession | CompareSession, text: str) -> str:
    before = session.system
    if text:
        check_text(text, "the system message", UsageError)
        session.system = None if text == "none" else text
    told = f"system message: {session.system or 'none'}"
    changed = session.system != before and session.messages
    return told + ("; the next message reads the conversation again" if changed else "")


def _settings() -> dict[str, str]:
    """The settings that a value can be typed for, with the type of each."""
    types = {"int", "float", "int | None", "float | None"}
    return {field.name: str(field.type) for field in fields(Sampling) if str(field.type) in types}


def _set(session: ChatSession | CompareSession, text: str) -> str:
    known = _settings()
    name, _, value = text.replace("=", " ", 1).partition(" ")
    name, value = name.replace("-", "_"), value.strip()
    if name and name not in known:
        raise UsageError(
            f"no setting `{shown(name)}`{_meant(name, known)}", hint="there are " + ", ".join(known)
        )
    if value:
        changed: Any = {name: _value(name, value, known[name])}
        session.sampling = replace(session.sampling, **changed)
    told = [f"{one} {getattr(session.sampling, one)}" for one in ([name] if name else known)]
    if value and session.sampling.idle is not None:
        told.append(session.sampling.idle)
    return " · ".join(told)


def _meant(word: str, known: Iterable[str] = (*COMMANDS, *_OTHER_NAMES)) -> str:
    """The question whether something like a word was meant, where there is such."""
    if word.startswith("/") and (settings := get_close_matches(word[1:], _settings(), n=1, cutoff=0.7)):
        return f"; did you mean `/set {settings[0]}`?"
    close = get_close_matches(word, known, n=1, cutoff=0.7)
    return f"; did you mean `{close[0]}`?" if close else ""


def _value(name: str, text: str, kind: str) -> int | float | None:
    if text == "none" and "None" in kind:
        return None
    try:
        return float(text) if "float" in kind else int(text)
    except ValueError:
        a_number = "a number" if "float" in kind else "a whole number"
        raise UsageError(f"`{name}` is {a_number}, not `{shown(text)}`") from None
